"""What can be measured in a study, for the judges: of a condition at a size, at each of its rates, or of each run.

A Measure answers for one place with a number, what tells it from another, and its words; None where it was not
measured. A Check says of a place whether it is as the paper says.
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

FACTOR = 1.1  # quantities that are compared by their ratio differ from here on
SIZE, RATE, TOP_RATE, RUN = "size", "rate", "top rate", "run"  # what a measure is of

Trace = Sequence[tuple[int, float]]  # (step, value)


class Evidence:
    """A study with what the judges ask of it, each computed once. Raises what the analyses raise."""

    def __init__(self, study: Study, preferred: Sequence[str] = ()):
        self.study = study
        self.group = grouping_keys(study, preferred=preferred)

    @functools.cached_property
    def curves(self) -> list[Curve]:
        return curves(self.study, self.group)

    @functools.cached_property
    def sensitivities(self) -> list[Sensitivity]:
        return lr_sensitivity.analyse(self.study, self.group)

    @functools.cached_property
    def missing(self) -> list[str]:
        return list(dict.fromkeys(name for curve in self.curves for name in curve.missing))

    def having(self, where: Mapping[str, object] | None = None) -> list[Curve]:
        """The curves whose settings have these values."""
        return [curve for curve in self.curves if curve.fits(where or {})]

    def sensitivity(self, curve: Curve) -> Sensitivity:
        """S of one of the curves."""
        return self.sensitivities[[id(one) for one in self.curves].index(id(curve))]  # both are in one order

    @functools.cached_property
    def data_sets(self) -> list[DataSet]:
        return data_sets(self.study)

    def trace(self, row: Row, name: str) -> Trace:
        """What a run recorded under a name."""
        return [(step["step"], step[name]) for step in self.study.trace(row) if step.get(name) is not None]


@dataclass(frozen=True)
class Place:
    """A condition at a size; with lr at one rate, over its seeds; with seed too, one run."""

    curve: Curve
    lr: float | None = None
    seed: int | None = None

    @property
    def rate(self) -> float:
        """The learning rate. Raises ValueError where the place is not at one rate."""
        if self.lr is None:
            raise ValueError(f"{self} is not at one learning rate")
        return self.lr

    @property
    def rows(self) -> list[Row]:
        """The rows at its rate, one for each seed that has one."""
        return self.curve.rows(self.rate)

    @property
    def row(self) -> Row:
        """The row of its run. Raises ValueError where the place is not one run."""
        if self.seed is None:
            raise ValueError(f"{self} is not one run")
        return self.curve.runs[self.rate, self.seed]

    def __str__(self) -> str:
        return size_name(self.curve) + (f" at lr={self.lr:g}" if self.lr is not None else "")


def size_name(curve: Curve) -> str:
    """N for a sentence."""
    return f"N={compact(curve.n_params)}"


def places(curve: Curve, level: str) -> list[Place]:
    """Where a measure of this level is taken: the curve, its rates that were run, the highest of them, or its runs."""
    if level == SIZE:
        return [Place(curve)]
    if level == RUN:
        return [Place(curve, *at) for at in sorted(curve.runs)]
    rates = [Place(curve, lr) for lr in curve.lrs if curve.rows(lr)]
    return rates[-1:] if level == TOP_RATE else rates


@dataclass(frozen=True)
class Value:
    """number: what is compared. text: it for a sentence. seeds: values, or the ends of an interval, whose range tells
    it from another."""

    number: float
    text: str
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class Measure:
    """name: for a sentence. missing: what keeps a curve from being judged. ratio: compared by its ratio, not by its
    difference."""

    name: str
    of: Callable[[Evidence, Place], Value | None]
    level: str = SIZE
    ratio: bool = False
    missing: Callable[[Evidence, Curve], list[str]] = field(default=lambda evidence, curve: curve.missing)


def losses(curve: Curve, lr: float) -> list[float]:
    """The final losses of a curve's seeds at a rate, capped at their loss at initialisation."""
    rows = curve.rows(lr)
    return list(capped([final_loss(r) for r in rows], [number(r, "val_loss_initial") for r in rows]))


def best_lr(curve: Curve) -> float:
    """The rate of a curve with the lowest mean loss over seeds."""
    return min((lr for lr in curve.lrs if curve.rows(lr)), key=lambda lr: np.mean(losses(curve, lr)))


def best_losses(curve: Curve) -> list[float]:
    """The losses at the best rate, one for each seed."""
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
    """The loss at the best rate, in nats, said to so many digits."""
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
FIRST_DIVERGING_LR = Measure("first diverging lr", _first_diverging_lr, ratio=True)  # above all rates where none does
DIVERGED = Measure("run", _diverged, RUN)


def measured_as(quantity: Quantity) -> Measure:
    """A recorded quantity at each rate: the geometric mean over the seeds that have it."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        values = [value for row in place.rows if (value := value_of(row, quantity)) is not None]
        mean = math.exp(float(np.mean(np.log(values)))) if values else 0.0
        return Value(mean, f"{mean:.3g}") if values else None

    return Measure(quantity.name, of, RATE, ratio=True)


def traced(name: str, reduce: Callable[[Trace], float]) -> Measure:
    """What `reduce` makes of a quantity that each run recorded, [(step, value)] -> number."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        trace = evidence.trace(place.row, name)
        value = max(reduce(trace), 1e-30) if trace else 0.0
        return Value(value, f"{value:.3g}") if trace else None

    return Measure(f"{reduce.__name__} of {name}", of, RUN, ratio=True)


def peak(trace: Trace) -> float:
    """The largest absolute value."""
    return max(abs(value) for _, value in trace)


def drift(trace: Trace) -> float:
    """How far the last value lies from the first."""
    return abs(trace[-1][1] - trace[0][1])


def growth(trace: Trace) -> float:
    """The last absolute value over the first."""
    return max(abs(trace[-1][1]), 1e-30) / max(abs(trace[0][1]), 1e-30)


@dataclass(frozen=True)
class Part:
    """One comparison. gain: positive as the paper says. clear: whether it counts."""

    words: str
    gain: float
    clear: bool = True


@dataclass(frozen=True)
class Check:
    """of: whether a place is as the paper says, None where that was not measured. unit: what such places are called."""

    of: Callable[[Evidence, Place], Part | None]
    unit: str
    level: str = RUN


def _is(words: str, true: bool) -> Part:
    return Part(words, 1.0 if true else -1.0)


def trains_at(lr: float) -> Check:
    """No seed diverges at this rate."""

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


# At the highest rate a seed diverged, or half of what training gains at the best rate is lost.
UNSTABLE_AT_TOP = Check(_unstable, "sizes", TOP_RATE)


def comes_to(quantity: Quantity, within: float) -> Check:
    """The quantity is past its threshold from above, or within a factor of it."""
    measure = measured_as(quantity)

    def of(evidence: Evidence, place: Place) -> Part | None:
        value = measure.of(evidence, place)
        words = f"{place}: {value.text}, to be compared with {quantity.threshold:g}" if value else ""
        return _is(words, value.number <= within * quantity.threshold) if value else None

    return Check(of, f"runs that recorded {quantity.name}", RATE)


def rises_with_block(prefix: str) -> Check:
    """A per-block mean over the last steps is larger in the last block than in the first."""

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
    """The largest value of a per-block quantity over a run is that of block 0."""

    def of(evidence: Evidence, place: Place) -> Part | None:
        names = {key for step in evidence.study.trace(place.row)[:50] for key in step if key.startswith(f"{prefix}/")}
        blocks = sorted(int(block) for name in names if (block := name.rpartition("/")[2]).isdigit())
        peaks = {n: max(value for _, value in evidence.trace(place.row, f"{prefix}/{n}")) for n in blocks}
        top = max(peaks, key=peaks.__getitem__, default=0)
        words = f"{place}: largest in block {top} of {len(peaks)}"
        return _is(f"{words} ({peaks[top]:.3g})", top == 0) if len(peaks) > 1 else None

    return Check(of, f"runs that recorded {prefix} of several blocks")


def recorded(judge: Callable[..., tuple[str, float, bool] | None], *names: str) -> Check:
    """What a function says of the traces of these quantities in a run: words, gain and whether it is clear; or None."""

    def of(evidence: Evidence, place: Place) -> Part | None:
        traces = [evidence.trace(place.row, name) for name in names]
        said = judge(*traces) if all(traces) else None
        return Part(f"{place}: {said[0]}", *said[1:]) if said else None

    return Check(of, f"runs that recorded {', '.join(names)}")


def falls_below_zero(trace: Trace) -> tuple[str, float, bool]:
    """It ends below where it began, and below zero."""
    first, last = trace[0][1], trace[-1][1]
    return f"{first:.3g} to {last:.3g}", 1.0 if last < min(first, 0) else -1.0, abs(last - first) > 0.1


def drifts_late(trace: Trace) -> tuple[str, float, bool] | None:
    """Half of its drift, from first to last record, happens after half of the run. None where that is less than 0.1."""
    if len(trace) < 4 or drift(trace) <= 0.1:
        return None
    first, last = trace[0][1], trace[-1][1]
    half = next(step for step, value in trace if abs(value - first) >= abs(last - first) / 2)
    share = (half - trace[0][0]) / (trace[-1][0] - trace[0][0])
    return f"half of {drift(trace):.3g} after {share:.0%} of the run", share - 0.5, True


def norms_outgrow(q_rms: Trace, k_rms: Trace, cosine: Trace) -> tuple[str, float, bool]:
    """The product of two norms grows by a larger factor than the absolute value of their cosine."""
    norms, other = growth(q_rms) * growth(k_rms), growth(cosine)
    return f"norms x{norms:.3g}, cosine x{other:.3g}", math.log(norms / other), norms > 1.5


def shrinks_near_eps(grads: Trace, updates: Trace, eps: float = 1e-8) -> tuple[str, float, bool] | None:
    """Where the gradient's RMS is within ten times eps, that of the update is smaller than before. None where it does
    not come so near, or begins there."""
    grad_at, update_at = dict(grads), dict(updates)
    steps = sorted(set(grad_at) & set(update_at))
    near = [update_at[step] for step in steps if grad_at[step] < 10 * eps]
    far = [update_at[step] for step in steps if grad_at[step] >= 10 * eps]
    if not near or not far:
        return None
    said = f"update RMS {np.median(near):.3g} near eps, {np.median(far):.3g} before"
    return said, float(np.median(far) - np.median(near)), True
