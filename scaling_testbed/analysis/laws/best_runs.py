"""The best runs for their compute: the law of the best size of each budget, and the ladder of configurations to scale
up."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws import columns, frontier
from scaling_testbed.analysis.laws.checks import mixed_data
from scaling_testbed.analysis.laws.fitted import LEVEL, Fit
from scaling_testbed.analysis.laws.fitting import LSQ, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.study import Rows
from scaling_testbed.analysis.rows.study import Row, name_of
from scaling_testbed.errors import ConfigError, UserError, check_choice

METHODS = ("isoflop", "envelope")
RESAMPLES = 500
NEEDED = ("n_params", "flops", "loss")
Record = dict[str, Any]


def at_best_rates(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The runs at the best rate of their size, batch and number of tokens, and notes on the choice.

    The best rate has the lowest loss in the mean over its runs, such as seeds. Raises UserError if a row lacks one of
    n_params, n_tokens, batch_tokens, the rate (`optimizer.lr` or `lr`) and loss.
    """
    needed = ("n_params", "n_tokens", "batch_tokens", "optimizer.lr", "loss")
    rates = [row.get("optimizer.lr", row.get("lr")) for row in rows]
    read = [{**row, "optimizer.lr": rate} for row, rate in zip(rows, rates, strict=True)]
    columns_of = {key: columns.check(read, key, needed) for key in needed}
    groups: dict[tuple[float, ...], dict[float, list[int]]] = {}
    for place, (*at, lr, _) in enumerate(zip(*columns_of.values(), strict=True)):
        groups.setdefault(tuple(at), {}).setdefault(lr, []).append(place)
    kept, at_end = [], 0
    for rates_of in groups.values():
        best = min(rates_of, key=lambda lr: float(np.mean([columns_of["loss"][place] for place in rates_of[lr]])))
        kept += rates_of[best]
        at_end += len(rates_of) > 1 and best in (min(rates_of), max(rates_of))
    if len(kept) == len(rows):
        return list(rows), []
    said = [f"{len(kept)} of {len(rows)} runs are at the best rate of their size, batch and tokens; only these count"]
    if at_end:
        said.append(f"{at_end} of {len(groups)} best rates are the lowest or the highest that was tried")
    return [rows[place] for place in sorted(kept)], said


@dataclass(frozen=True, kw_only=True)
class FrontierReport:
    """The law N = N0 (C/C0)^p of the best sizes. optima: the best size of each budget. runs: the runs behind them."""

    fit: Fit
    method: str
    optima: list[Record]
    runs: list[Record]
    warnings: list[str]
    origin: str
    where: list[str] = field(default_factory=list)

    def record(self) -> Record:
        """What is kept in a file."""
        typed = {"method": self.method, "rows": self.origin, "where": self.where}
        found = {"warnings": self.warnings, "optima_by_budget": self.optima, "runs": self.runs}
        return {**asdict(self.fit), **typed, **found}


@dataclass(frozen=True, kw_only=True)
class LadderReport:
    """The law through the Pareto frontier of a grid search.

    frontier: the runs of the frontier, each with the law's loss, whether it was fitted and whether it is a rung of the
    ladder.
    """

    fit: Fit
    frontier: list[Record]
    n_runs: int
    warnings: list[str]
    origin: str
    where: list[str] = field(default_factory=list)
    hold_out: list[str] = field(default_factory=list)

    def record(self) -> Record:
        """What is kept in a file."""
        typed = {"rows": self.origin, "where": self.where, "hold_out": self.hold_out}
        found = {"warnings": self.warnings, "n_runs": self.n_runs, "frontier": self.frontier}
        return {**asdict(self.fit), **typed, **found}


def frontier_rows(given: Rows, method: str, *, where: Sequence[str] = (), size: str = "n_params") -> FrontierReport:
    """The size with the lowest loss at each budget of compute, and the power law N = N0 (C/C0)^p through these sizes.

    method: isoflop takes the vertex of a parabola in ln N at each budget (approach 2 of Hoffmann et al. 2022, arXiv
    2203.15556, section 3); envelope takes the envelope of the curves of all sizes (approach 1), or of all runs if the
    rows are points of training curves. If the best size of a
    budget is the largest or the smallest that was trained, the budget gets a note and the law leaves it out. Raises
    UserError if fewer than two budgets, or budgets of one best size, remain.
    """
    check_choice("--method", method, METHODS)
    if given.run and method == "isoflop":
        raise ConfigError("--curves is for --method envelope; isoflop compares runs of one budget")
    rows, said = _checked(given, where)
    if method == "isoflop":
        said = [*said, *frontier.loose([row["flops"] for row in rows], "flops")]
    optima = frontier.isoflop(rows) if method == "isoflop" else frontier.envelope(rows, given.run)
    trusted = [one for one in optima if not one.note]
    if len(trusted) < 2:
        few = f"{method}: {len(trusted)} budgets have a best size inside the trained range; the law needs two"
        raise UserError("; ".join([few, *said]))
    if len({one.n_params for one in trusted}) < 2:
        same = f"{trusted[0].n_params:.4g} is the best size of all {len(trusted)} budgets that count"
        raise UserError("; ".join([f"{method}: {same}; a law of the best size needs two sizes", *said]))
    inputs, observed = {"flops": [one.flops for one in trusted]}, [one.n_params for one in trusted]
    # Neighbours on an envelope come from the same runs: intervals from resamples of them would be too narrow.
    found = fit(LAWS["optimal_n"], inputs, observed, starts=1, bootstrap=0, size=size)
    if method == "isoflop":
        found = _with_draws(found, frontier.resampled(rows, RESAMPLES))
        said = [*said, *frontier.disagreeing(optima)]
    elif given.run:
        found = _with_draws(found, frontier.resampled_envelope(rows, given.run, RESAMPLES))
    left_out = len(optima) - len(trusted)
    noted = [f"{left_out} of {len(optima)} budgets are left out of the law: see their notes"] if left_out else []
    budgets = frontier.by_budget(rows) if method == "isoflop" else [rows]
    named = (*NEEDED, *([given.run] if given.run else []))
    runs = [{**{key: row[key] for key in named}, "budget": frontier.middle(budget)} for budget in budgets
            for row in budget]  # fmt: skip
    return FrontierReport(
        fit=found,
        method=method,
        optima=[one.record() for one in optima],
        runs=runs,
        warnings=[*found.warnings, *noted, *said],
        origin=given.origin,
        where=list(where),
    )


def _with_draws(found: Fit, resamples: Sequence[Sequence[tuple[float, float]]]) -> Fit:
    """The law with intervals over resamples of the runs, each with its own best sizes. A resample with fewer than two
    best sizes has no law, and there are no intervals if most have none."""
    several = [np.log(np.array(one)) for one in resamples if len({best for _, best in one}) > 1]
    if len(several) < len(resamples) / 2:
        return found
    centre = found.params["C0"]
    lines = [np.polyfit(one[:, 0] - np.log(centre), one[:, 1], 1) for one in several]
    draws = [{"N0": float(np.exp(level)), "C0": centre, "p": float(slope)} for slope, level in lines]
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found_ends = {name: np.quantile([draw[name] for draw in draws], ends) for name in ("N0", "p")}
    ci95 = {name: (float(low), float(high)) for name, (low, high) in found_ends.items()}
    warnings = [text for text in found.warnings if "too few for an interval" not in text]
    return replace(found, draws=draws, ci95=ci95, warnings=warnings)


def ladder_rows(
    given: Rows, *, rungs: int = 4, where: Sequence[str] = (), hold_out: Sequence[str] = (), size: str = "n_params"
) -> LadderReport:
    """The configurations of a grid search to scale up.

    Takes the best run of each size, then the Pareto frontier of these in compute. Fits L = E + (C0/C)^alpha to the
    frontier and picks, on each of `rungs` parts of it, the configuration that follows the law most closely. hold_out:
    runs of the frontier that the fit leaves out. Raises ConfigError if `rungs` exceeds the number of configurations.
    """
    rows, said = _checked(given, where)
    front = frontier.pareto(rows)
    kept, _ = columns.select(front, [], hold_out)
    law = LAWS["compute"]
    inputs, observed = columns.values(kept, law)
    found = fit(law, inputs, observed, objective=LSQ, bootstrap=0, size=size)
    predicted = [float(found.predict({"flops": row["flops"]})) for row in kept]
    picked = {id(kept[place]) for place in frontier.rungs(kept, predicted, rungs)}
    return LadderReport(
        fit=found,
        frontier=[_rung(row, found, id(row) in picked, any(row is one for one in kept)) for row in front],
        n_runs=len(rows),
        warnings=[*found.warnings, *said],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
    )


def _rung(row: Row, found: Fit, picked: bool, fitted: bool) -> Record:
    predicted = float(found.predict({"flops": row["flops"]}))
    shown = {"run": name_of(row).removeprefix("run "), **{key: row[key] for key in NEEDED}}
    return {**shown, "law": predicted, "fitted": fitted, "rung": picked}


def _checked(given: Rows, where: Sequence[str]) -> tuple[Sequence[Row], list[str]]:
    """The rows that match `where`, each with N, C and a loss, and notes on them."""
    rows, _ = columns.select(given.rows, where, [])
    said = [*given.said, *columns.check_sizes_and_losses(rows, (*NEEDED, "n_tokens"), given.mapping)]
    rows, empty = columns.without_output(rows, LAWS["compute"])
    for key in NEEDED:
        columns.check(rows, key, NEEDED)
    measured = [row for row in rows if row.get("n_tokens") is not None]
    columns.check(measured, "n_tokens", (*NEEDED, "n_tokens"))
    return rows, [*said, *empty, *mixed_data(rows)]
