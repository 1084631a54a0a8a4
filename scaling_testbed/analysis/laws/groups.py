"""One law for several groups of runs, such as those of several data sets, with shared and with own parameters.

The groups are fitted together: an own parameter has one value for each group, a shared one has one value. Four ways of
sharing are compared, from no shared parameter to one law for all runs.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.checks import doubts
from scaling_testbed.analysis.laws.fitted import Fit, with_ratios
from scaling_testbed.analysis.laws.fitting import fit, problem_of
from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.laws.prediction import beside_fitted, beside_held_out
from scaling_testbed.analysis.laws.selection import ALIKE, aicc_of, errors_of, mean_error
from scaling_testbed.analysis.laws.settings import MOST_VALUES, unseen
from scaling_testbed.analysis.laws.study import Fitting, Rows
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError, UserError

GROUP = "group"  # the input that holds the number of a run's group
EQUAL = 2.0  # of AICc: a smaller difference does not tell two ways of sharing apart (Burnham and Anderson 2002)
FLOOR = "E"
FEWEST_ROWS = 5  # of a group: resamples of fewer do not hold the noise of its own parameters
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GroupsReport:
    """A law fitted to groups of runs together.

    fits: for each group the law with its parameters, shared and own. shared: the names of the shared parameters.
    sharing: the ways of sharing side by side. reason: why this one is taken. The fitted and the held-out runs stand
    beside the values of their group's law.
    """

    by: str
    fits: dict[str, Fit]
    shared: list[str]
    sharing: list[Record]
    reason: str
    fitted: list[Record]
    predictions: list[Record]
    warnings: list[str]
    origin: str
    where: list[str] = field(default_factory=list)
    hold_out: list[str] = field(default_factory=list)

    def table(self) -> list[Record]:
        """The parameters of the groups as flat rows; a shared one has one row."""
        return [
            {self.by: "all" if one["parameter"] in self.shared else name, **one}
            for place, (name, found) in enumerate(self.fits.items())
            for one in found.table()
            if place == 0 or one["parameter"] not in self.shared
        ]

    def record(self) -> Record:
        """The content of a saved file."""
        told = {"by": self.by, "groups": {name: asdict(one) for name, one in self.fits.items()}, "shared": self.shared}
        found = {"sharing": self.sharing, "reason": self.reason, "warnings": self.warnings, "rows": self.origin}
        beside = {"fitted": self.fitted, "predictions": self.predictions}
        return {**told, **found, "where": self.where, "hold_out": self.hold_out, **beside}


def grouped(law: Law, names: Sequence[str], own: Collection[str]) -> Law:
    """The law of several groups, with one more input, the number of the group. A parameter P of `own` becomes one
    parameter P[NAME] for each group."""

    def function(p, x):
        values = dict(p)
        for name in own:
            values[name] = sum(p[f"{name}[{one}]"] * (x[GROUP] == place) for place, one in enumerate(names))
        return law.function(values, x)

    params = [
        replace(param, name=f"{param.name}[{one}]") if param.name in own else param
        for param in law.params
        for one in (names if param.name in own else names[:1])
    ]
    return replace(law, inputs=(*law.inputs, GROUP), params=tuple(params), function=function)


def ways(law: Law, fixed: Collection[str] = ()) -> dict[str, list[str]]:
    """What is shared in each way of sharing -> the own parameters: all of them; the floor and the scales; the floor;
    none. Fixed parameters are never own, and ways that share the same are one."""
    free = [param for param in law.params if param.name not in fixed and not param.centre]
    all_own, floor = [param.name for param in free], [param.name for param in free if param.name == FLOOR]
    scales = [param.name for param in free if param.name == FLOOR or param.log]
    found = {"none": all_own, "exponents": scales, f"all but {FLOOR}": floor, "all": []}
    return {name: own for name, own in found.items() if list(found.values()).index(own) == list(found).index(name)}


def fit_groups(
    given: Rows,
    law: Law,
    by: str,
    *,
    where: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    fixed: Mapping[str, float] | None = None,
    fitting: Fitting | None = None,
) -> GroupsReport:
    """Fit `law` to the rows that match all of `where` and none of `hold_out`, with groups by the column `by`.

    Each way of sharing has an AICc, and an error on the dearer half of each group, fitted to its cheaper half and to
    the other groups. The way with the fewest parameters is taken whose AICc lies less than two above the least and
    whose error is at most 1.3 times the least; without one, that of the least AICc. A bootstrap resamples the rows of
    each group. Raises ConfigError if `by` is no column of two to twenty values, or the law is one of best runs, and
    UserError if the rows are too few for every way.
    """
    fitting, fixed = fitting or Fitting(), dict(fixed or {})
    if law.of_best:
        raise ConfigError(f"--by fits groups of runs together; {law.name} is a law of best runs: use --where instead")
    kept, held = columns.select(given.rows, where, hold_out)
    said = [*given.said, *columns.check_sizes_and_losses([*kept, *held], (*law.inputs, law.output), given.mapping)]
    kept, empty = columns.without_output(kept, law)
    names = _names(kept, by)
    for row in held:
        _held(row, by, names)
    inputs, observed = columns.values(kept, law)
    inputs = inputs | {GROUP: [float(names.index(str(row[by]))) for row in kept]}
    found, problems, missed = {}, {}, []
    for name, own in ways(law, fixed).items():
        joint = grouped(law, names, own)
        try:
            problems[name] = problem_of(joint, inputs, observed, fitting.objective, fixed, fitting.delta)
            found[name] = fit(joint, inputs, observed, objective=fitting.objective, delta=fitting.delta, fixed=fixed,
                              starts=fitting.starts, bootstrap=0, seed=fitting.seed, size=fitting.size)  # fmt: skip
        except UserError as error:
            missed.append(f"{name} shared: {error}")
    if not found:
        raise UserError("; ".join([*missed, *said, *empty]))
    fitted_to, tests = _halves(np.array(inputs[GROUP]), _cost(kept, law))
    errors = {name: errors_of(one, found[name], fitted_to, tests) for name, one in problems.items() if name in found}
    wrong = {name: mean_error(np.abs(np.concatenate(one))) for name, one in errors.items()}
    aicc = {name: aicc_of(one, problems[name]) for name, one in found.items()}
    taken, reason = _taken(found, aicc, wrong)
    own = ways(law, fixed)[taken]
    joint, whole = grouped(law, names, own), found[taken]
    if fitting.bootstrap:
        whole = fit(joint, inputs, observed, objective=fitting.objective, delta=fitting.delta, fixed=fixed,
                    starts=fitting.starts, bootstrap=fitting.bootstrap, seed=fitting.seed, size=fitting.size,
                    strata=inputs[GROUP])  # fmt: skip
    fits = {one: _of_group(law, whole, one, own, kept, by) for one in names}
    ratios = with_ratios({key: np.array(inputs[key]) for key in law.inputs})
    predictions = [{by: str(row.get(by))} | beside_held_out(fits[_held(row, by, names)], row) for row in held]
    judged = {name: value for name, value in aicc.items() if value is not None}
    above = {name: value - min(judged.values()) for name, value in judged.items()}
    return GroupsReport(
        by=by,
        fits=fits,
        shared=[param.name for param in law.params if param.name not in own],
        sharing=[
            {"shared": name, "parameters": len(one.params) - len(one.fixed),
             "above_least_aicc": above.get(name),
             "error_of_dearer_runs": wrong[name], "taken": name == taken}
            for name, one in found.items()
        ],  # fmt: skip
        reason=reason,
        fitted=[{by: str(row[by])} | beside_fitted(fits[str(row[by])], row) for row in kept],
        predictions=predictions,
        warnings=[*whole.warnings, *missed, *said, *empty, *_few(kept, by, names, own),
                  *unseen(kept, ratios, whole.residuals, (by,)), *doubts(predictions)],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
    )  # fmt: skip


def _names(rows: Sequence[Row], by: str) -> list[str]:
    there = sorted({key for row in rows for key in row})
    without = [row for row in rows if row.get(by) in (None, "")]
    if len(without) == len(rows):
        raise ConfigError(f"--by {by}: there is no such column; the columns are {', '.join(there)}")
    if without:
        raise ConfigError(f'--by {by}: {len(without)} rows have no value; leave them out with --where "{by}!="')
    names = list(dict.fromkeys(str(row[by]) for row in rows))
    if not 2 <= len(names) <= MOST_VALUES:
        raise ConfigError(f"--by {by}: it has {len(names)} values in the fitted rows; groups are 2 to {MOST_VALUES}")
    return names


def _few(rows: Sequence[Row], by: str, names: Sequence[str], own: Collection[str]) -> list[str]:
    counts = [(name, sum(str(row[by]) == name for row in rows)) for name in names]
    few = [f"{name} ({count})" for name, count in counts if count < FEWEST_ROWS] if own else []
    return [f"no intervals for groups of fewer than {FEWEST_ROWS} rows: {', '.join(few)}"] if few else []


def _held(row: Row, by: str, names: Sequence[str]) -> str:
    if str(row.get(by)) not in names:
        there = f"the groups are {', '.join(names)}"
        raise UserError(f"a held-out run has {by}={row.get(by)}, which no fitted run has; {there}")
    return str(row[by])


def _cost(rows: Sequence[Row], law: Law) -> np.ndarray:
    """What orders the runs of a group: the product of the inputs, compute for a law of size and tokens."""
    return np.prod([[float(row[key]) for key in law.inputs] for row in rows], axis=1)


def _halves(groups: np.ndarray, cost: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each group the rows without its dearer half, and that half."""
    tests = []
    for one in np.unique(groups):
        own = groups == one
        tests.append(own & (cost > np.median(cost[own])))
    return [~test for test in tests], tests


def _taken(
    found: Mapping[str, Fit], aicc: Mapping[str, float | None], wrong: Mapping[str, float | None]
) -> tuple[str, str]:
    """The way of sharing that is taken, and why."""
    judged = {name: value for name, value in aicc.items() if value is not None}
    if not judged:
        first = next(iter(found))
        return first, f"{first} shared, the first: there are too few rows to compare ways of sharing"
    best = min(judged, key=judged.__getitem__)
    least = min((one for one in wrong.values() if one is not None), default=None)
    good = [name for name, value in judged.items() if value < judged[best] + EQUAL
            and (least is None or (wrong[name] or math.inf) <= ALIKE * least)]  # fmt: skip
    if not good:
        return best, f"{best} shared has the least AICc; another way has a smaller error on dearer runs"
    taken = min(good, key=lambda name: len(found[name].params))
    error = "" if wrong[taken] is None else f" and an error of {wrong[taken]:.2%} on dearer runs of each group"
    return taken, f"{taken} shared: AICc {judged[taken] - judged[best]:.3g} above the least{error}"


def _of_group(law: Law, whole: Fit, name: str, own: Collection[str], rows: Sequence[Row], by: str) -> Fit:
    """The law of one group. Its residuals are those of all groups, so that a prediction interval has their spread.

    They are multiplied because `Fit.samples` counts only the parameters of one group as free."""
    mine = {param.name: f"{param.name}[{name}]" if param.name in own else param.name for param in law.params}
    n, free, all_free = whole.n_rows, len(law.params) - len(whole.fixed), len(whole.params) - len(whole.fixed)
    factor = math.sqrt((n - free) / (n - all_free)) if n > all_free else 1.0
    mine_rows = [row for row in rows if str(row[by]) == name]
    inputs, _ = columns.values(mine_rows, law)
    told = len(mine_rows) >= FEWEST_ROWS or not own
    seen = with_ratios({key: np.array(values) for key, values in inputs.items()})
    ci95 = whole.ci95 and {short: whole.ci95[long] for short, long in mine.items() if long in whole.ci95}
    return replace(
        whole,
        law=law.name,
        params={short: whole.params[long] for short, long in mine.items()},
        ci95=ci95 if told else None,
        warnings=[],
        optima=[],
        largest={key: float(np.max(values)) for key, values in seen.items()},
        smallest={key: float(np.min(values)) for key, values in seen.items()},
        residuals=[factor * one for one in whole.residuals],
        draws=[{short: draw[long] for short, long in mine.items()} for draw in whole.draws] if told else [],
        fitted_inputs={},
    )


def check_groups(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved record has groups and their column."""
    if not isinstance(record["by"], str) or not isinstance(record["groups"], Mapping) or not record["groups"]:
        raise ValueError("by and groups are damaged")
    if any(one.get("law") not in LAWS for one in record["groups"].values()):
        raise ValueError("groups are damaged")
