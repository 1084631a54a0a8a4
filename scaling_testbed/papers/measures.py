"""Quantities of a study that claims are judged by, as one number for each seed.

A Measure gives a Value for a place: a condition at one size or, at the level RATE, at one of its learning rates. It
gives None if the place was not measured, and UNDEFINED where the records do not have such a number.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scaling_testbed.analysis.curves import lr_sensitivity
from scaling_testbed.analysis.curves.grouping import Curve, curves, grouping_keys
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity, measured, value_of
from scaling_testbed.analysis.curves.lr_sensitivity import (
    Sensitivity,
    at_an_end,
    best_by_seed,
    capped,
    diverged,
    final_loss,
)
from scaling_testbed.analysis.figures.panel import compact, merged
from scaling_testbed.analysis.figures.words import in_sentence
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.names import number_in
from scaling_testbed.analysis.rows.study import LR, Row, Study, claims_of, number, several_origins
from scaling_testbed.analysis.trajectories.equal_loss import curvatures_of
from scaling_testbed.papers.declaration import Declaration, of_study, recorded_in
from scaling_testbed.papers.predictions import DataSet, data_sets

SIZE, RATE, TOP_RATE = "size", "rate", "top rate"  # the level at which a measure is taken
NATS = "nats"
OF_ORIGIN = ("data.", "tokenizer.", "evaluation.", "compute.")  # settings that choose the data and the precision
HOW_TO_DECLARE = "docs/grids.md tells how a sweep file declares how it is judged"

Trace = Sequence[tuple[int, float]]  # (step, value)


class Evidence:
    """A study and the results that judges use; each is computed once. Raises as the analyses do.

    study: without the rows outside of its declared grid. declaration: the one that counts. remarks: of all verdicts, on
    what does not count.
    """

    def __init__(self, study: Study, preferred: Sequence[str] = (), lr_range: tuple[float, float] | None = None):
        self.declaration, self.is_declared = of_study(study)
        self.study, left_out = _of_declared_grid(study, self.declaration.rates) if self.is_declared else (study, [])
        self.remarks = [*_later(recorded_in(study)), *left_out]
        study = self.study
        self.lr_range = lr_range or self.declaration.lr_range
        self.group = grouping_keys(study, preferred=preferred)

    def undeclared(self, measure: str | None = None) -> str | None:
        """The reason why no verdict can be given, or None. measure: whose margin must be declared."""
        if not self.is_declared:
            return f"nothing was declared before the runs ({HOW_TO_DECLARE})"
        if self.declaration.results:
            return f"it was declared when {self.declaration.results} runs had a result"
        if self.study.drawn:
            return f"runs of its folder have drawn values of {', '.join(self.study.drawn)}; verdicts are about a grid"
        judged, meant = claims_of(vars(self.study)), self.declaration.experiment
        if judged != meant:
            other = f"it declares those of {meant}" if meant else "it declares none"
            return f"the claims of {judged or 'this experiment'} were not declared before the runs: {other}"
        if self.lr_range != self.declaration.lr_range:
            low, high = self.declaration.lr_range
            return f"--lr-range is not the declared range, {low:g} to {high:g}"
        if self.study.left_out:
            return f"--where {' and '.join(self.study.left_out)} leaves out runs of what was declared"
        runs = [*self.study.rows, *self.study.missing]
        seeds = {row.get("seed") or 0 for row in runs}
        if self.declaration.seeds and seeds != set(self.declaration.seeds):
            here, declared = (", ".join(sorted(map(text, some))) for some in (seeds, self.declaration.seeds))
            return f"its seeds are {here}, and {declared} were declared"
        rates = [number(row, LR) for row in runs if row.get(LR) is not None]
        if absent := [lr for lr in self.declaration.rates if not any(math.isclose(lr, own) for own in rates)]:
            return f"no run has {', '.join(f'{lr:g}' for lr in absent)} of the declared learning rates"
        if measure is not None and self.declaration.margin(measure) is None:
            return f"no margin of {measure} was declared ({HOW_TO_DECLARE})"
        return None

    @functools.cached_property
    def incomparable(self) -> str | None:
        """Why the rows cannot be compared, None if they can. Their data and precision may differ only as a key says
        that tells conditions apart; a claim then compares rows of one value, or is about this key."""
        keys = [key for key in self.group if key.startswith(OF_ORIGIN)]
        alike: dict[tuple[str, ...], list[Row]] = {}
        for row in self.study.rows:
            alike.setdefault(tuple(text(row.get(key)) for key in keys), []).append(row)
        found = next((said for rows in alike.values() if (said := several_origins(rows))), None)
        return found and f"the compared rows {found}"

    @functools.cached_property
    def curves(self) -> list[Curve]:
        """The curves. One shape has one shown size, without the gains of a norm that only some conditions have."""
        found = curves(self.study, self.group)
        sizes: dict[tuple[object, ...], set[float]] = {}
        for curve in found:
            sizes.setdefault(curve.shape, set()).add(curve.n_params)
        kept = {shape: merged(sorted(own)) for shape, own in sizes.items()}
        return [replace(curve, shown_size=max(n for n in kept[curve.shape] if n <= curve.n_params)) for curve in found]

    @functools.cached_property
    def sensitivities(self) -> list[Sensitivity]:
        return lr_sensitivity.analyse(
            self.study,
            self.group,
            lr_range=self.lr_range,
            excess=self.declaration.critical_excess,
            rates=self.declaration.rates if self.is_declared else (),
        )

    @functools.cached_property
    def missing(self) -> list[str]:
        return list(dict.fromkeys(name for curve in self.curves for name in curve.missing))

    def having(self, where: Mapping[str, object] | None = None) -> list[Curve]:
        """The curves whose settings have the values of `where`."""
        return [curve for curve in self.curves if curve.fits(where or {})]

    def sensitivity(self, curve: Curve) -> Sensitivity:
        """The sensitivity S of a curve."""
        return self.sensitivities[[id(one) for one in self.curves].index(id(curve))]  # both are in one order

    @functools.cached_property
    def data_sets(self) -> list[DataSet]:
        return data_sets(self.study)

    @functools.cached_property
    def curvatures(self) -> dict[str, list[Row]]:
        """Run id -> the records of its checkpoints in the study's table of `analyze curvature`."""
        return curvatures_of(self.study)

    def trace(self, row: Row, name: str) -> Trace:
        """The values that a run recorded under a name."""
        return [(step["step"], step[name]) for step in self.study.trace(row) if step.get(name) is not None]


def _of_declared_grid(study: Study, rates: Sequence[float]) -> tuple[Study, list[str]]:
    """The study without rows that its plan does not list, or at rates that were not declared, and a remark on each."""
    planned = [row for row in study.rows if str(row.get("run_id")) not in study.unplanned]
    rows, missing = (
        [row for row in some if not rates or _is_at(row.get(LR), rates)] for some in (planned, study.missing)
    )
    counts = (
        (len(study.rows) - len(planned), "that the plan does not list"),
        (len(planned) - len(rows), "at rates that were not declared"),
    )
    remarks = [f"left out: {count} {'row' if count == 1 else 'rows'} {which}" for count, which in counts if count]
    return replace(study, rows=rows, missing=missing, unplanned=frozenset()), remarks


def _is_at(lr: object, rates: Sequence[float]) -> bool:
    """Whether a rate is one of some; also true of what is no number, which the analyses name."""
    number = number_in(lr)
    return number is None or any(math.isclose(number, own, rel_tol=1e-6) for own in rates)


def _later(found: Declaration | None) -> list[str]:
    """A remark on a declaration that was changed after the first result and so does not count."""
    if found is None or found.counted.judges_as(found):
        return []
    return [f"what was declared after {found.results} runs had a result is not used"]


@dataclass(frozen=True)
class Place:
    """A condition at one size; with `lr`, at one learning rate."""

    curve: Curve
    lr: float | None = None

    @property
    def rate(self) -> float:
        """The learning rate. Raises ValueError if the place is not at one rate."""
        if self.lr is None:
            raise ValueError(f"{self} is not at one learning rate")
        return self.lr

    @property
    def rows(self) -> dict[int, Row]:
        """The rows at its rate by seed."""
        return {
            seed: self.curve.runs[self.rate, seed] for seed in self.curve.seeds if (self.rate, seed) in self.curve.runs
        }

    def __str__(self) -> str:
        return size_name(self.curve) + (f" at lr={self.lr:g}" if self.lr is not None else "")


def size_name(curve: Curve) -> str:
    """The text of the N that names a curve's size."""
    return f"N={compact(curve.n_params if curve.shown_size is None else curve.shown_size)}"


def places(curve: Curve, level: str) -> list[Place]:
    """The places of a level: the curve, its rates that were run, or the highest of these."""
    if level == SIZE:
        return [Place(curve)]
    rates = [Place(curve, lr) for lr in curve.lrs if curve.rows(lr)]
    return rates[-1:] if level == TOP_RATE else rates


@dataclass(frozen=True)
class Value:
    """One number of each seed; of a quantity that is compared by its ratio, the logarithm.

    censored: the seeds whose number is only known to be larger than this. text: the mean in its own unit. capped:
    whether all numbers are losses at initialisation, because no run ended lower. notes: warnings about the number,
    which a verdict counts. critical: of an S, the critical rate of its curve, which is shown and not judged.
    """

    by_seed: Mapping[int, float]
    text: str = ""
    censored: frozenset[int] = frozenset()
    capped: bool = False
    notes: Sequence[str] = ()
    critical: str = ""


UNDEFINED = Value({}, "not defined")  # a remark of the verdict names the place


@dataclass(frozen=True)
class Measure:
    """A quantity of places.

    name: its name in a sentence. of: the value at a place. margin: the name of its margin in a declaration. level: the
    level of its places. ratio: whether values are compared by their ratio, not by their difference. missing: the
    reasons why a curve cannot be judged. errors: whether values are signed errors, compared without their sign.
    """

    name: str
    of: Callable[[Evidence, Place], Value | None]
    margin: str
    level: str = SIZE
    ratio: bool = False
    missing: Callable[[Evidence, Curve], list[str]] = field(default=lambda evidence, curve: curve.missing)
    errors: bool = False


def losses(curve: Curve, lr: float) -> dict[int, float]:
    """The final losses of a curve at a rate by seed, each capped at the loss at initialisation."""
    rows = Place(curve, lr).rows
    values = capped([final_loss(r) for r in rows.values()], [number(r, "val_loss_initial") for r in rows.values()])
    return dict(zip(rows, values.tolist(), strict=True))


def critical_rates(values: Sequence[Value]) -> str:
    """The critical rates of values of S, to stand behind these in a sentence; empty if they have none."""
    if not (rates := [value.critical for value in values if value.critical]):
        return ""
    *others, last = rates
    return f" (critical rate {', '.join(others)}{' and ' * bool(others)}{last})"


def best_lr(curve: Curve) -> float:
    """The rate of a curve with the lowest mean loss over seeds."""
    return min((lr for lr in curve.lrs if curve.rows(lr)), key=lambda lr: np.mean(list(losses(curve, lr).values())))


def _value(by_seed: Mapping[int, float], form: str = "{:.4f}") -> Value | None:
    return Value(by_seed, form.format(np.mean(list(by_seed.values())))) if by_seed else None


def _loss(evidence: Evidence, place: Place) -> Value | None:
    found = _value(losses(place.curve, place.rate))
    return found and replace(found, capped=all(map(diverged, place.rows.values())))


def _whole(curve: Curve) -> tuple[list[int], list[float], np.ndarray] | None:
    """The seeds and rates of a curve, and its losses [seeds, rates]; None if a run is missing."""
    if not curve.runs or any((lr, seed) not in curve.runs for lr in curve.lrs for seed in curve.seeds):
        return None
    table = [losses(curve, lr) for lr in curve.lrs]
    return curve.seeds, curve.lrs, np.array([[own[seed] for own in table] for seed in curve.seeds])


def _best_loss(evidence: Evidence, place: Place) -> Value | None:
    """The loss of each seed at the rate that is best in the mean over seeds, less the bias of that choice."""
    if (found := _whole(place.curve)) is None:
        return None
    seeds, lrs, losses_SL = found
    note = at_an_end(best_lr(place.curve), lrs) if len(lrs) > 1 else None
    return _noted(_value(best_by_seed(losses_SL, seeds)), note)


def _noted(value: Value | None, *notes: str | None) -> Value | None:
    return value and replace(value, notes=tuple(note for note in notes if note))


def _end_of(one: Sensitivity) -> str | None:
    return None if one.best_lr is None else at_an_end(one.best_lr, one.curve.lrs)


def _s(evidence: Evidence, place: Place) -> Value | None:
    one = evidence.sensitivity(place.curve)
    below = "more than half of S is from rates below the best one" if one.share_below > 0.5 else None
    value = _noted(_value(one.by_seed, "{:.3f}"), _end_of(one), below)
    return value and replace(value, critical=_bare(one))


def _bare(one: Sensitivity) -> str:
    """The critical rate without its interval; empty where it is withheld."""
    if one.critical is None:
        return ""
    return f">{one.critical.top:g}" if one.critical.rate is None else f"{one.critical.rate:.3g}"


def _withheld(evidence: Evidence, curve: Curve) -> list[str]:
    one = evidence.sensitivity(curve)
    return [] if one.s is not None else [f"S at {size_name(curve)}: {one.withheld}"]


def _critical_lr(evidence: Evidence, place: Place) -> Value | None:
    one = evidence.sensitivity(place.curve)
    if (critical := one.critical) is None:
        return None
    over = frozenset(seed for seed, value in critical.by_seed.items() if value == math.inf)
    by_seed = {seed: math.log(critical.top) if seed in over else value for seed, value in critical.by_seed.items()}
    return _noted(Value(by_seed, str(critical), over), _end_of(one))


def _best_lr(evidence: Evidence, place: Place) -> Value | None:
    """The rate at the vertex of the parabola, in log rate, through the lowest loss of each seed and its neighbours."""
    if (found := _whole(place.curve)) is None:
        return None
    seeds, lrs, losses_SL = found
    by_seed = {}
    for seed, own_L in zip(seeds, losses_SL, strict=True):
        at = int(own_L.argmin())
        if at in (0, len(lrs) - 1):
            return None
        x, y = np.log(lrs[at - 1 : at + 2]), own_L[at - 1 : at + 2]
        a, b, _ = np.polyfit(x - x[1], y, 2)
        by_seed[seed] = float(x[1] - (b / (2 * a) if a > 0 else 0.0))
    return Value(by_seed, f"{math.exp(np.mean(list(by_seed.values()))):.3g}")


def _at_an_end(evidence: Evidence, curve: Curve) -> list[str]:
    if curve.missing or (found := _whole(curve)) is None:
        return curve.missing
    seeds, lrs, losses_SL = found
    ends = {int(own_L.argmin()) for own_L in losses_SL} & {0, len(lrs) - 1}
    return [f"best rate at {size_name(curve)}: at an end of the grid, {lrs[end]:g}" for end in sorted(ends)]


S = Measure("S", _s, "S", missing=_withheld)
CRITICAL_LR = Measure("critical rate", _critical_lr, "critical_lr", ratio=True, missing=_withheld)
BEST_LOSS = Measure("best loss", _best_loss, "loss")
BEST_LR = Measure("best rate", _best_lr, "best_lr", ratio=True, missing=_at_an_end)
LOSS = Measure("loss", _loss, "loss", RATE)


def kept_gain(lr: float | None = None) -> Measure:
    """The measure of the share of the loss reduction at the best rate that is kept at another one, less one half.

    lr: that rate; None: the highest that was run. A run that diverged keeps nothing. The share is negative where at
    least half is lost.
    """

    def of(evidence: Evidence, place: Place) -> Value | None:
        curve, best = place.curve, best_lr(place.curve) if place.curve.runs else None
        asked = [at for at in curve.lrs if curve.rows(at) and (lr is None or math.isclose(at, lr, rel_tol=1e-6))]
        if best is None or not asked:
            return None
        at_best, at_asked, rows = losses(curve, best), losses(curve, asked[-1]), Place(curve, asked[-1]).rows
        shares = {
            seed: (number(rows[seed], "val_loss_initial") - at_asked[seed])
            / max(number(rows[seed], "val_loss_initial") - at_best[seed], 1e-9)
            for seed in sorted(set(at_best) & set(at_asked))
        }
        return _value({seed: share - 0.5 for seed, share in shares.items()}, "{:.2f}")

    where = "the highest rate" if lr is None else f"lr={lr:g}"
    return Measure(f"share of the gain kept at {where}, less one half", of, "share")


def measured_as(quantity: Quantity) -> Measure:
    """The measure of a recorded quantity at each rate."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        values = {seed: value for seed, row in place.rows.items() if (value := value_of(row, quantity)) is not None}
        return _logarithms(values)

    return Measure(in_sentence(quantity.name), of, "recorded", RATE, ratio=True)


def _logarithms(values: Mapping[int, float]) -> Value | None:
    by_seed = {seed: math.log(value) for seed, value in values.items()}
    return Value(by_seed, f"{math.exp(float(np.mean(list(by_seed.values())))):.3g}") if by_seed else None


def headroom(quantity: Quantity, within: float) -> Measure:
    """The measure of `within` thresholds divided by the quantity: above one if it has come that close. Its text is the
    quantity."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        values = {seed: value for seed, row in place.rows.items() if (value := value_of(row, quantity)) is not None}
        found = _logarithms({seed: within * quantity.threshold / value for seed, value in values.items()})
        measured = _logarithms(values)
        return found and measured and replace(found, text=measured.text)

    times = "" if within == 1 else f"{within:g} x "
    name = f"limit of {times}{quantity.threshold:g} over the {in_sentence(quantity.name)}"
    return Measure(name, of, "recorded", RATE, ratio=True)


def traced(reduce: Callable[..., float | None], *names: str, ratio: bool = True, margin: str = "") -> Measure:
    """The measure of recorded quantities of each run, reduced by `reduce`: traces [(step, value)] -> number or None.

    ratio: whether the numbers are positive and compared by their ratio. margin: by default "recorded", or "share" for
    numbers that are not compared by their ratio.
    """

    def of(evidence: Evidence, place: Place) -> Value | None:
        found = {seed: [evidence.trace(row, name) for name in names] for seed, row in place.rows.items()}
        reduced = {seed: reduce(*traces) for seed, traces in found.items() if all(traces)}
        values = {seed: value for seed, value in reduced.items() if value is not None}
        if reduced and not values:
            return UNDEFINED
        if ratio:
            return _logarithms({seed: max(value, 1e-30) for seed, value in values.items()})
        return _value(values, "{:.3g}")

    name = f"{reduce.__name__.replace('_', ' ')} of {', '.join(map(in_sentence, names))}"
    return Measure(name, of, margin or ("recorded" if ratio else "share"), RATE, ratio)


def peak(trace: Trace) -> float:
    """The largest absolute value."""
    return max(abs(value) for _, value in trace)


def drift(trace: Trace) -> float:
    """The absolute difference of the last value and the first."""
    return abs(trace[-1][1] - trace[0][1])


def growth(trace: Trace) -> float:
    """The absolute value of the last value divided by that of the first."""
    return max(abs(trace[-1][1]), 1e-30) / max(abs(trace[0][1]), 1e-30)


def depth_below_zero(trace: Trace) -> float:
    """How far the last value lies below zero and below the first value."""
    return min(trace[0][1], 0.0) - trace[-1][1]


def lateness_of_drift(trace: Trace) -> float | None:
    """The share of a run after which half of the drift has happened, less one half.

    None if the drift is at most 0.1 or the trace has fewer than four records.
    """
    if len(trace) < 4 or drift(trace) <= 0.1:
        return None
    first, last = trace[0][1], trace[-1][1]
    half = next(step for step, value in trace if abs(value - first) >= abs(last - first) / 2)
    return (half - trace[0][0]) / (trace[-1][0] - trace[0][0]) - 0.5


def growth_of_norms_over_cosine(q_rms: Trace, k_rms: Trace, cosine: Trace) -> float:
    """The growth of the product of two norms, divided by the growth of the absolute value of their cosine."""
    return growth(q_rms) * growth(k_rms) / growth(cosine)


def update_far_from_eps_over_near(grads: Trace, updates: Trace, eps: float = 1e-8) -> float | None:
    """The median RMS of the update while the gradient's is at least ten times eps, divided by that while it is below.

    None if the gradient is never, or always, below ten times eps.
    """
    grad_at, update_at = dict(grads), dict(updates)
    steps = sorted(set(grad_at) & set(update_at))
    near = [update_at[step] for step in steps if grad_at[step] < 10 * eps]
    far = [update_at[step] for step in steps if grad_at[step] >= 10 * eps]
    return float(np.median(far) / max(np.median(near), 1e-30)) if near and far else None


def first_block_over_others(prefix: str) -> Measure:
    """The measure of the peak of a per-block quantity in block 0, divided by its largest peak in another block."""

    def one(evidence: Evidence, row: Row, names: set[str]) -> float | None:
        blocks = sorted(int(block) for name in names if (block := name.rpartition("/")[2]).isdigit())
        peaks = {n: max(value for _, value in evidence.trace(row, f"{prefix}/{n}")) for n in blocks}
        others = [value for block, value in peaks.items() if block]
        return peaks[0] / max(others) if 0 in peaks and others and max(others) > 0 < peaks[0] else None

    def of(evidence: Evidence, place: Place) -> Value | None:
        recorded = {
            seed: {key for step in evidence.study.trace(row)[:50] for key in step if key.startswith(f"{prefix}/")}
            for seed, row in place.rows.items()
        }
        values = {seed: one(evidence, place.rows[seed], names) for seed, names in recorded.items() if names}
        if values and not any(values.values()):
            return UNDEFINED
        return _logarithms({seed: value for seed, value in values.items() if value is not None})

    return Measure(f"{in_sentence(prefix)} of block 0 over the others", of, "recorded", RATE, ratio=True)


def last_block_over_first(prefix: str) -> Measure:
    """The measure of a per-block mean over the last steps in the last block, divided by that in the first."""

    def one(means: Row) -> float | None:
        blocks = sorted(int(k[len(prefix) + 1 :]) for k in means if k.startswith(f"{prefix}/") and means[k])
        return means[f"{prefix}/{blocks[-1]}"] / means[f"{prefix}/{blocks[0]}"] if len(blocks) > 1 else None

    def of(evidence: Evidence, place: Place) -> Value | None:
        recorded = {seed: measured(row, LAST_MEAN) for seed, row in place.rows.items()}
        values = {seed: one(means) for seed, means in recorded.items() if means}
        if values and not any(values.values()):
            return UNDEFINED
        return _logarithms({seed: value for seed, value in values.items() if value is not None})

    return Measure(f"{in_sentence(prefix)} of the last block over the first", of, "recorded", RATE, ratio=True)
