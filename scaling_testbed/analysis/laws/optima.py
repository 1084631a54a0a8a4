"""The best learning rate and batch of each size and number of tokens, at the vertex of a quadratic in their logarithms.

The best value that was tried is off by up to half a step of the grid, and noise between seeds moves it by whole steps.
A quadratic through the losses near the best one uses all of them, and tells how well they determine its vertex; see
quadratic.py. Its interval is of the noise, and not of losses that are no quadratic. So the settings near the best one
are taken, and where repetitions show that these losses are no quadratic, the worst of them are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.forms import Law
from scaling_testbed.analysis.laws.frontier import budget_starts
from scaling_testbed.analysis.laws.quadratic import Quadratic, Vertex, t_factor, through
from scaling_testbed.analysis.laws.settings import alike, in_blocks, setting_columns, varied
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError

AXES = ("lr", "batch_tokens")
NO_SETTING = (*AXES, *columns.OWN.values(), "batch.sequences", "batch.sequence_length")
NUMBERS = ("n_params", "loss")
NEAR = 0.01  # relative: settings whose mean loss is at most this above the least one are near it
LEAST = (4, 9)  # settings in a quadratic of one and of two variables, if so many were tried; one more without seeds
NEEDED = (3, 7)  # settings below which there is no quadratic in one and in two variables
NORMAL = 1.96  # half the 95 % interval of a normal distribution, in standard deviations
ALPHA = 0.01  # of the test whether the losses are a quadratic
WIDE = 0.05  # relative: where losses in the quadratic rise by more, its form is an assumption, and a note says so


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The optimum of one variable.

    tried: the best value that was tried, by the mean loss over seeds. best: the vertex; None if it is withheld, and
    `withheld` is then the reason. low, high: its 95 % interval. error: the standard error of ln(best), with `freedom`
    degrees of freedom. twice: the rise of the loss, in nats, where this variable alone is wrong by a factor of two;
    twice_low, twice_high: its 95 % interval.
    """

    tried: float
    best: float | None = None
    low: float | None = None
    high: float | None = None
    error: float = math.nan
    freedom: int = 0
    twice: float | None = None
    twice_low: float | None = None
    twice_high: float | None = None
    withheld: str = ""

    def record(self, name: str) -> dict[str, Any]:
        """Flat columns for a table."""
        found = {"": self.best, "_low": self.low, "_high": self.high, "_tried": self.tried, "_twice": self.twice}
        ends = {"_twice_low": self.twice_low, "_twice_high": self.twice_high}
        return {f"{name}{end}": value for end, value in (found | ends).items()}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The optimum of one size, number of tokens and setting.

    row: a run of the best setting that was tried. setting: the keys that tell this optimum from others, with their
    values. loss: the mean loss of the best setting. n_runs: in the quadratic. rise: the largest relative rise of a mean
    loss in it above the least one. axes: the variables that were tried, by name.
    """

    row: Row
    setting: dict[str, Any]
    loss: float
    n_runs: int
    rise: float
    axes: dict[str, Axis]

    def record(self) -> dict[str, Any]:
        """The optimum as one flat row."""
        size = {key: self.row[key] for key in ("n_params", "n_tokens") if self.row.get(key) is not None}
        found = {key: value for name, axis in self.axes.items() for key, value in axis.record(name).items()}
        reasons = dict.fromkeys(axis.withheld for axis in self.axes.values() if axis.withheld)
        return {**self.setting, **size, **found, "n_runs": self.n_runs, "withheld": "; ".join(reasons)}


def tuned(rows: Sequence[Row], near: float = NEAR) -> tuple[list[Tuned], list[str]]:
    """The optimum of each size, number of tokens and setting with several learning rates or batches, and notes.

    near: the relative rise of the mean loss up to which a setting is near the best one. Tokens within a tenth count as
    one number, because steps are whole. Raises ConfigError for a wrong `near`, and UserError if a row lacks a number.
    """
    if not 0 < near < 1:
        raise ConfigError(f"--near must be a number between 0 and 1; got {near:g}")
    names = [name for name in AXES if any(row.get(name) is not None for row in rows)]
    places = [key for key in ("n_params", "n_tokens") if any(row.get(key) is not None for row in rows)]
    for key in (*places, *names, "loss"):
        columns.check(rows, key, (*places, *names, "loss"))
    groups = [group for size in alike(rows, places[:1]) for group in _of_one_length(size, places)]
    keys = setting_columns(rows, NO_SETTING)
    kept = [key for key in keys if any(varied(same, [key]) for group in groups for same in alike(group, names))]
    groups = [one for group in groups for one in alike(group, kept)]
    follow = [key for key in keys if any(varied(group, [key]) for group in groups)]
    said = (
        [f"{', '.join(follow)} changes with the rate or batch: an optimum is that of both together"] if follow else []
    )
    found = [_tuned(group, names, {key: group[0].get(key) for key in kept}, near) for group in groups
             if varied(group, names)]  # fmt: skip
    wide = [one for one in found if one.rise > WIDE and any(axis.best for axis in one.axes.values())]
    if wide:
        most = max(one.rise for one in wide)
        said.append(
            f"in {len(wide)} of {len(found)} quadratics losses rise by up to {most:.0%}: a loss is no quadratic so far "
            "from its least, and no interval knows of it; try values that lie closer together"
        )
    return sorted(found, key=lambda one: ([str(value) for value in one.setting.values()], *_size(one.row))), said


def _size(row: Row) -> list[float]:
    return [float(row[key]) for key in ("n_params", "n_tokens") if row.get(key) is not None]


def _of_one_length(rows: Sequence[Row], places: Sequence[str]) -> list[list[Row]]:
    """The rows of one size in groups of one number of tokens."""
    if "n_tokens" not in places:
        return [list(rows)]
    starts = budget_starts([row["n_tokens"] for row in rows])
    return [[row for row in rows if starts[row["n_tokens"]] == start] for start in dict.fromkeys(starts.values())]


def _tuned(rows: Sequence[Row], names: Sequence[str], setting: dict[str, Any], near: float) -> Tuned:
    names = varied(rows, names)
    settings = alike(rows, names)
    losses = [fmean(row["loss"] for row in one) for one in settings]
    best = settings[int(np.argmin(losses))][0]
    found: dict[str, Axis] = {}
    n_runs, rise = 0, 0.0
    if len(names) == 2 and not any(_at_end(rows, name, best) for name in names):
        found, n_runs, rise = _optimum(settings, losses, names, near)
    for name in [name for name in names if name not in found]:  # at the best value of the other variable
        others = [other for other in names if other != name]
        line = [at for at, one in enumerate(settings) if all(one[0][other] == best[other] for other in others)]
        own = [settings[at] for at in line]
        if reason := _at_end([one[0] for one in own], name, best):
            found[name] = Axis(tried=best[name], withheld=reason)
            continue
        alone, count, most = _optimum(own, [losses[at] for at in line], [name], near)
        found, n_runs, rise = found | alone, max(n_runs, count), max(rise, most)
    axes = {name: found[name] for name in names}
    return Tuned(row=best, setting=setting, loss=min(losses), n_runs=n_runs, rise=rise, axes=axes)


def _at_end(rows: Sequence[Row], name: str, best: Row) -> str:
    """Why the optimum is not between values that were tried; empty if it is."""
    values = sorted({row[name] for row in rows})
    if len(values) < 3:
        return f"{len(values)} values of {name} were tried: a quadratic needs three"
    if best[name] in (values[0], values[-1]):
        end, way = ("lowest", "lower") if best[name] == values[0] else ("highest", "higher")
        return f"the best {name} is the {end} that was tried: try {way} ones"
    return ""


def _optimum(
    settings: Sequence[Sequence[Row]], losses: Sequence[float], names: Sequence[str], near: float
) -> tuple[dict[str, Axis], int, float]:
    """The optimum of the variables `names` by a quadratic, the number of its runs, and the largest relative rise in it.

    Nothing if there is no quadratic in two variables: each is then taken alone.
    """
    best, two = int(np.argmin(losses)), len(names) - 1
    x_SK = np.log([[one[0][name] for name in names] for one in settings])
    offsets_SK = _offsets(x_SK, best)
    kept = _near(offsets_SK, np.array(losses), near, LEAST[two] + all(len(one) == 1 for one in settings))
    while True:
        runs = [(x_SK[at] - x_SK[best], row["loss"], row.get("seed")) for at in kept for row in settings[at]]
        found = through(np.array([u for u, *_ in runs]), [loss for _, loss, _ in runs], [seed for *_, seed in runs])
        spare = [at for at in kept if np.max(np.abs(offsets_SK[at])) > 1]
        if found is None or found.p_value >= ALPHA or len(kept) <= NEEDED[two] or not spare:
            break
        kept.remove(max(spare, key=losses.__getitem__))
    rise = max(losses[at] for at in kept) / losses[best] - 1
    reason = _no_optimum(found, len(kept), x_SK[kept] - x_SK[best], names)
    tried = [settings[best][0][name] for name in names]
    if found is None or reason:
        return ({} if two else {names[0]: Axis(tried=tried[0], withheld=reason)}), 0, 0.0
    axes = [_axis(found, one, value, name) for one, value, name in zip(found.coordinates(), tried, names, strict=True)]
    return dict(zip(names, axes, strict=True)), len(runs), rise


def _offsets(x_SK: np.ndarray, best: int) -> np.ndarray:
    """How many tried values each setting lies above the best one, in each variable."""
    ranks_SK = np.stack([np.unique(column, return_inverse=True)[1] for column in x_SK.T], axis=1)
    return ranks_SK - ranks_SK[best]


def _near(offsets_SK: np.ndarray, losses_S: np.ndarray, near: float, least: int) -> list[int]:
    """The settings near the best one: its neighbours, those of nearly its loss with all between them and the best one,
    and the nearest ones up to `least`. A choice by the loss alone would take settings whose noise is low."""
    low_LK = offsets_SK[losses_S <= losses_S.min() * (1 + near)]
    between = (np.minimum(low_LK, 0) <= offsets_SK[:, None]) & (offsets_SK[:, None] <= np.maximum(low_LK, 0))
    steps_S = np.max(np.abs(offsets_SK), axis=1)
    inside = (steps_S <= 1) | between.all(axis=2).any(axis=1)
    order = sorted(range(len(losses_S)), key=lambda at: (not inside[at], steps_S[at], losses_S[at]))
    return order[: max(least, int(np.sum(inside)))]


def _no_optimum(found: Quadratic | None, n_settings: int, u_SK: np.ndarray, names: Sequence[str]) -> str:
    """Why there is no optimum; empty if there is one."""
    if n_settings < NEEDED[len(names) - 1] or found is None:
        return "too few runs to tell a quadratic from noise: add values or seeds"
    if not found.is_convex:
        return "the losses near the best one do not rise on both sides"
    vertex_K = found.vertex()
    if (vertex_K < u_SK.min(axis=0)).any() or (vertex_K > u_SK.max(axis=0)).any():
        return "the vertex of the quadratic lies outside of the values near the best one"
    return ""


def _axis(found: Quadratic, vertex: Vertex, tried: float, name: str) -> Axis:
    """The optimum of a variable, or why it is withheld."""
    if vertex.low is None or vertex.high is None:
        return Axis(tried=tried, withheld=f"noise leaves the best {name} open: add seeds, or values between")
    twice, reach = vertex.rise * math.log(2) ** 2, t_factor(found.freedom) * vertex.rise_error * math.log(2) ** 2
    return Axis(
        tried=tried,
        best=tried * math.exp(vertex.at),
        low=tried * math.exp(vertex.low),
        high=tried * math.exp(vertex.high),
        error=vertex.error,
        freedom=found.freedom,
        twice=twice,
        twice_low=max(twice - reach, 0.0),
        twice_high=twice + reach,
    )


def of_law(rows: Sequence[Row], law: Law, least: int | None = None) -> tuple[list[Row], list[float], list[str]]:
    """For a law of the best rate or batch: an optimum at each value of its inputs, as a row with the law's columns, the
    error of each one's logarithm, and notes. The error is that of a normal distribution with the interval of the
    optimum: standard errors of few degrees of freedom are too uncertain to be weights.

    Of several settings at one value of the inputs, that of the least loss counts. An optimum that is withheld is left
    out. No rows if no rates or batches were tried, or if fewer than `least` optima remain, by default one more than the
    law has free parameters: the law is then one of the best values that were tried.
    """
    least = sum(param.centre is None for param in law.params) + 1 if least is None else least
    tokens = {row.get("n_tokens") is None for row in rows}
    if law.output not in AXES or len(tokens) > 1 or any(row.get(key) is None for row in rows for key in NUMBERS):
        return [], [], []
    found, said = tuned(rows)
    places = [[one for one in found if id(one.row) in same] for same in _alike_in(rows, law)]
    chosen = [min(several, key=lambda one: one.loss) for several in places if several]
    axes = [(one, one.axes[law.output]) for one in chosen if law.output in one.axes]
    if not axes:
        return [], [], []
    good = [(one, axis) for one, axis in axes if axis.best is not None]
    at = f"{len(good)} of {len(places)} {law.output} are vertices of quadratics"
    reasons = dict.fromkeys(axis.withheld for _, axis in axes if axis.withheld)
    alone = [f"one {law.output} was tried"] if len(axes) < len(places) else []
    why = f" ({'; '.join([*reasons, *alone])})" if reasons or alone else ""
    if len(good) < least:
        return [], [], [f"{at}{why}, fewer than {least}: the best values that were tried are used"]
    others = f"; {len(places) - len(good)} are left out{why}" if why else ""
    differ = list(dict.fromkeys(key for several in places for key in _differing(several)))
    taken = f"; each at its best {', '.join(differ)}: choose others with --where" if differ else ""
    words = f"{law.name} is about the best {law.output}: {at} through their runs, weighted by their errors"
    mixed = _interleaved([one.row for one, _ in good], rows, law)
    mixed = (
        [f"the optima differ in {', '.join(mixed)} too: the law describes all; choose with --where"] if mixed else []
    )
    errors = [math.log(axis.high / axis.low) / (2 * NORMAL) for _, axis in good if axis.low and axis.high]
    return [_as_row(one, axis, law) for one, axis in good], errors, [f"{words}{others}{taken}", *mixed, *said]


def _interleaved(chosen: Sequence[Row], rows: Sequence[Row], law: Law) -> list[str]:
    """The settings in which the chosen rows differ, and that do not grow with an input of the law."""
    found = []
    for key in varied(chosen, setting_columns(rows, NO_SETTING)):
        code = np.unique([repr(row.get(key)) for row in chosen], return_inverse=True)[1].ravel()
        if not any(in_blocks(code, [row[name] for row in chosen]) for name in law.inputs):
            found.append(key)
    return found


def _differing(several: Sequence[Tuned]) -> list[str]:
    """The settings, and the tokens, in which optima differ."""
    settings = [{**one.setting, "n_tokens": one.row.get("n_tokens")} for one in several]
    return varied(settings, list(settings[0])) if settings else []


def _alike_in(rows: Sequence[Row], law: Law) -> list[set[int]]:
    """The rows, by identity, in groups of one value of the law's inputs."""
    places = [columns.places([row[key] for row in rows], key) for key in law.inputs]
    groups: dict[tuple[float, ...], set[int]] = {}
    for row, place in zip(rows, zip(*places, strict=True), strict=True):
        groups.setdefault(place, set()).add(id(row))
    return list(groups.values())


def _as_row(one: Tuned, axis: Axis, law: Law) -> Row:
    named = {"run_id": None, "label": None, "name": f"optimum of {one.n_runs} runs"}
    return {**one.row, law.output: axis.best, **named}
