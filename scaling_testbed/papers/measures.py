"""Quantities of a study that claims are judged by: of a condition at one size, at each of its rates, or of each run.

A Measure gives a Value for a place: a number, its text, and the values that decide whether it differs from another
one. It gives None if the place was not measured. A Check tells whether a place behaves as the paper says.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaling_testbed.analysis.curves import lr_sensitivity
from scaling_testbed.analysis.curves.grouping import Curve, curves, grouping_keys
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity, measured, value_of
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity, capped, diverged, final_loss
from scaling_testbed.analysis.figures.drawing import compact
from scaling_testbed.analysis.rows.study import Row, Study, number
from scaling_testbed.papers.predictions import DataSet, data_sets

FACTOR = 1.1  # quantities compared by their ratio differ if the ratio is larger than this
SIZE, RATE, TOP_RATE, RUN = "size", "rate", "top rate", "run"  # the level at which a measure is taken

Trace = Sequence[tuple[int, float]]  # (step, value)


class Evidence:
    """A study and the results that judges use; each is computed once. Raises as the analyses do."""

    def __init__(self, study: Study, preferred: Sequence[str] = (), lr_range: tuple[float, float] | None = None):
        self.study = study
        self.lr_range = lr_range or lr_sensitivity.DEFAULT_RANGE
        self.group = grouping_keys(study, preferred=preferred)

    @functools.cached_property
    def curves(self) -> list[Curve]:
        return curves(self.study, self.group)

    @functools.cached_property
    def sensitivities(self) -> list[Sensitivity]:
        return lr_sensitivity.analyse(self.study, self.group, lr_range=self.lr_range)

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

    def trace(self, row: Row, name: str) -> Trace:
        """The values that a run recorded under a name."""
        return [(step["step"], step[name]) for step in self.study.trace(row) if step.get(name) is not None]


@dataclass(frozen=True)
class Place:
    """A condition at one size; with `lr`, its seeds at one rate; with `lr` and `seed`, one run."""

    curve: Curve
    lr: float | None = None
    seed: int | None = None

    @property
    def rate(self) -> float:
        """The learning rate. Raises ValueError if the place is not at one rate."""
        if self.lr is None:
            raise ValueError(f"{self} is not at one learning rate")
        return self.lr

    @property
    def rows(self) -> list[Row]:
        """The rows at its rate, one for each seed that has one."""
        return self.curve.rows(self.rate)

    @property
    def row(self) -> Row:
        """The row of its run. Raises ValueError if the place is not one run."""
        if self.seed is None:
            raise ValueError(f"{self} is not one run")
        return self.curve.runs[self.rate, self.seed]

    def __str__(self) -> str:
        return size_name(self.curve) + (f" at lr={self.lr:g}" if self.lr is not None else "")


def size_name(curve: Curve) -> str:
    """The text of a curve's N."""
    return f"N={compact(curve.n_params)}"


def places(curve: Curve, level: str) -> list[Place]:
    """The places of a level: the curve, its rates that were run, the highest of these, or its runs."""
    if level == SIZE:
        return [Place(curve)]
    if level == RUN:
        return [Place(curve, *at) for at in sorted(curve.runs)]
    rates = [Place(curve, lr) for lr in curve.lrs if curve.rows(lr)]
    return rates[-1:] if level == TOP_RATE else rates


@dataclass(frozen=True)
class Value:
    """A measured value.

    number: the number to compare. text: its text in a sentence. seeds: the values of the seeds, or the ends of an
    interval; two values differ if these ranges do not overlap.
    """

    number: float
    text: str
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class Measure:
    """A quantity of places.

    name: its name in a sentence. of: the value at a place. level: the level of its places. ratio: whether values are
    compared by their ratio, not by their difference. missing: the reasons why a curve cannot be judged.
    """

    name: str
    of: Callable[[Evidence, Place], Value | None]
    level: str = SIZE
    ratio: bool = False
    missing: Callable[[Evidence, Curve], list[str]] = field(default=lambda evidence, curve: curve.missing)


def losses(curve: Curve, lr: float) -> list[float]:
    """The final losses of a curve's seeds at a rate, each capped at the loss at initialisation."""
    rows = curve.rows(lr)
    return list(capped([final_loss(r) for r in rows], [number(r, "val_loss_initial") for r in rows]))


def best_lr(curve: Curve) -> float:
    """The rate of a curve with the lowest mean loss over seeds."""
    return min((lr for lr in curve.lrs if curve.rows(lr)), key=lambda lr: np.mean(losses(curve, lr)))


def best_losses(curve: Curve) -> list[float]:
    """The final losses at the best rate, one for each seed."""
    return losses(curve, best_lr(curve))


def _s(evidence: Evidence, place: Place) -> Value | None:
    one = evidence.sensitivity(place.curve)
    if one.s is None:
        return None
    interval = [end for end in (one.low, one.high) if end is not None]
    return Value(
        one.s, f"{one.s:.3f}" + (" [{:.3f}, {:.3f}]".format(*interval) if interval else ""), interval or [one.s]
    )


def _withheld(evidence: Evidence, curve: Curve) -> list[str]:
    one = evidence.sensitivity(curve)
    return [] if one.s is not None else [f"S at {size_name(curve)}: {one.withheld}"]


def _loss(values: Sequence[float], digits: int = 4) -> Value:
    return Value(float(np.mean(values)), f"{np.mean(values):.{digits}f}", values)


def best_loss(digits: int = 4) -> Measure:
    """The measure of the loss at the best rate, in nats, with its text rounded to `digits`."""
    return Measure("best loss", lambda _, at: _loss(best_losses(at.curve), digits) if at.curve.runs else None)


def _first_diverging_lr(evidence: Evidence, place: Place) -> Value:
    first = next((at.rate for at in places(place.curve, RATE) if any(map(diverged, at.rows))), math.inf)
    return Value(first, f"{first:g}" if first < math.inf else "none")


def _best_lr(evidence: Evidence, place: Place) -> Value | None:
    return Value(best_lr(place.curve), f"{best_lr(place.curve):g}") if place.curve.runs else None


def _diverged(evidence: Evidence, place: Place) -> Value:
    bad = diverged(place.row)
    return Value(float(bad), "diverged" if bad else "finished", [float(bad)])


S = Measure("S", _s, missing=_withheld)
BEST_LOSS = best_loss()
LOSS = Measure("loss", lambda _, at: _loss(losses(at.curve, at.rate)), RATE)
BEST_LR = Measure("best lr", _best_lr, ratio=True)
FIRST_DIVERGING_LR = Measure("first diverging lr", _first_diverging_lr, ratio=True)  # inf if no rate diverges
DIVERGED = Measure("run", _diverged, RUN)


def measured_as(quantity: Quantity) -> Measure:
    """The measure of a recorded quantity at each rate: the geometric mean over the seeds that have it."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        values = [value for row in place.rows if (value := value_of(row, quantity)) is not None]
        mean = math.exp(float(np.mean(np.log(values)))) if values else 0.0
        return Value(mean, f"{mean:.3g}") if values else None

    return Measure(quantity.name, of, RATE, ratio=True)


def traced(name: str, reduce: Callable[[Trace], float]) -> Measure:
    """The measure of a recorded quantity of each run, reduced by `reduce`: [(step, value)] -> number."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        trace = evidence.trace(place.row, name)
        value = max(reduce(trace), 1e-30) if trace else 0.0
        return Value(value, f"{value:.3g}") if trace else None

    return Measure(f"{reduce.__name__} of {name}", of, RUN, ratio=True)


def peak(trace: Trace) -> float:
    """The largest absolute value."""
    return max(abs(value) for _, value in trace)


def drift(trace: Trace) -> float:
    """The absolute difference of the last value and the first."""
    return abs(trace[-1][1] - trace[0][1])


def growth(trace: Trace) -> float:
    """The absolute value of the last value divided by that of the first."""
    return max(abs(trace[-1][1]), 1e-30) / max(abs(trace[0][1]), 1e-30)


@dataclass(frozen=True)
class Part:
    """One comparison. gain: positive if the result is as the paper says. clear: whether the comparison counts."""

    words: str
    gain: float
    clear: bool = True


@dataclass(frozen=True)
class Check:
    """A test of places.

    of: the comparison at a place, None if it was not measured. unit: the name of such places in a sentence. level: the
    level of the places.
    """

    of: Callable[[Evidence, Place], Part | None]
    unit: str
    level: str = RUN


def _is(words: str, true: bool) -> Part:
    return Part(words, 1.0 if true else -1.0)


def trains_at(lr: float) -> Check:
    """The check that no seed diverges at this rate."""

    def of(evidence: Evidence, place: Place) -> Part | None:
        rows = [row for at in place.curve.lrs if math.isclose(at, lr, rel_tol=1e-6) for row in place.curve.rows(at)]
        if not rows:
            return None
        bad, initial = sum(map(diverged, rows)), number(rows[0], "val_loss_initial")
        change = f"loss {np.mean([final_loss(row) for row in rows]):.3f} from {initial:.3f}"
        return _is(f"{Place(place.curve, lr)}: {change}, {bad} of {len(rows)} diverged", not bad)

    return Check(of, f"runs of the largest size at lr={lr:g}", SIZE)


def _unstable(evidence: Evidence, place: Place) -> Part:
    rows, best = place.rows, float(np.mean(best_losses(place.curve)))
    initial, last = number(rows[0], "val_loss_initial"), float(np.mean(losses(place.curve, place.rate)))
    bad = any(map(diverged, rows)) or last - best >= (initial - best) / 2
    return _is(f"{place}: loss {last:.3f}, best {best:.3f}, initial {initial:.3f}", bad)


# At the highest rate a seed diverged, or at least half of the loss reduction at the best rate is lost.
UNSTABLE_AT_TOP = Check(_unstable, "sizes", TOP_RATE)


def comes_to(quantity: Quantity, within: float) -> Check:
    """The check that the quantity is at most its threshold times the factor `within`."""
    measure = measured_as(quantity)

    def of(evidence: Evidence, place: Place) -> Part | None:
        value = measure.of(evidence, place)
        words = f"{place}: {value.text}, to be compared with {quantity.threshold:g}" if value else ""
        return _is(words, value.number <= within * quantity.threshold) if value else None

    return Check(of, f"runs that recorded {quantity.name}", RATE)


def rises_with_block(prefix: str) -> Check:
    """The check that a per-block mean over the last steps is larger in the last block than in the first."""

    def of(evidence: Evidence, place: Place) -> Part | None:
        means = measured(place.row, LAST_MEAN)
        blocks = sorted(int(k[len(prefix) + 1 :]) for k in means if k.startswith(f"{prefix}/") and means[k])
        if len(blocks) < 2:
            return None
        first, last = means[f"{prefix}/{blocks[0]}"], means[f"{prefix}/{blocks[-1]}"]
        gain = math.log(last / first)
        return Part(f"{place}: {first:.3g} to {last:.3g}", gain, abs(gain) > math.log(FACTOR))

    return Check(of, f"runs with {prefix} of two blocks")


def largest_in_first_block(prefix: str) -> Check:
    """The check that block 0 has the largest value of a per-block quantity over a run."""

    def of(evidence: Evidence, place: Place) -> Part | None:
        names = {key for step in evidence.study.trace(place.row)[:50] for key in step if key.startswith(f"{prefix}/")}
        blocks = sorted(int(block) for name in names if (block := name.rpartition("/")[2]).isdigit())
        peaks = {n: max(value for _, value in evidence.trace(place.row, f"{prefix}/{n}")) for n in blocks}
        top = max(peaks, key=peaks.__getitem__, default=0)
        words = f"{place}: largest in block {top} of {len(peaks)}"
        return _is(f"{words} ({peaks[top]:.3g})", top == 0) if len(peaks) > 1 else None

    return Check(of, f"runs that recorded {prefix} of several blocks")


def recorded(judge: Callable[..., tuple[str, float, bool] | None], *names: str) -> Check:
    """The check that `judge` makes of the traces of these quantities in a run.

    judge: traces -> (words, gain, whether it is clear), or None.
    """

    def of(evidence: Evidence, place: Place) -> Part | None:
        traces = [evidence.trace(place.row, name) for name in names]
        said = judge(*traces) if all(traces) else None
        return Part(f"{place}: {said[0]}", *said[1:]) if said else None

    return Check(of, f"runs that recorded {', '.join(names)}")


def falls_below_zero(trace: Trace) -> tuple[str, float, bool]:
    """Judge whether the last value is below the first, and below zero."""
    first, last = trace[0][1], trace[-1][1]
    return f"{first:.3g} to {last:.3g}", 1.0 if last < min(first, 0) else -1.0, abs(last - first) > 0.1


def drifts_late(trace: Trace) -> tuple[str, float, bool] | None:
    """Judge whether half of the drift, from the first record to the last, happens after half of the run.

    None if the drift is at most 0.1 or the trace has fewer than four records.
    """
    if len(trace) < 4 or drift(trace) <= 0.1:
        return None
    first, last = trace[0][1], trace[-1][1]
    half = next(step for step, value in trace if abs(value - first) >= abs(last - first) / 2)
    share = (half - trace[0][0]) / (trace[-1][0] - trace[0][0])
    return f"half of {drift(trace):.3g} after {share:.0%} of the run", share - 0.5, True


def norms_outgrow(q_rms: Trace, k_rms: Trace, cosine: Trace) -> tuple[str, float, bool]:
    """Judge whether the product of two norms grows by a larger factor than the absolute value of their cosine."""
    norms, other = growth(q_rms) * growth(k_rms), growth(cosine)
    return f"norms x{norms:.3g}, cosine x{other:.3g}", math.log(norms / other), norms > 1.5


def shrinks_near_eps(grads: Trace, updates: Trace, eps: float = 1e-8) -> tuple[str, float, bool] | None:
    """Judge whether the RMS of the update is smaller while the RMS of the gradient is below ten times eps.

    None if the gradient is never, or always, below ten times eps.
    """
    grad_at, update_at = dict(grads), dict(updates)
    steps = sorted(set(grad_at) & set(update_at))
    near = [update_at[step] for step in steps if grad_at[step] < 10 * eps]
    far = [update_at[step] for step in steps if grad_at[step] >= 10 * eps]
    if not near or not far:
        return None
    said = f"update RMS {np.median(near):.3g} near eps, {np.median(far):.3g} before"
    return said, float(np.median(far) - np.median(near)), True
