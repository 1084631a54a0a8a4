"""Judges of claims about what was measured inside the models: at a named step, over the last steps, or over time."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from scaling_testbed.analysis.curves import instability
from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.curves.instability import Quantity, measured, value_of
from scaling_testbed.analysis.curves.lr_sensitivity import diverged
from scaling_testbed.analysis.figures.drawing import compact
from scaling_testbed.analysis.rows.study import Row, number
from scaling_testbed.errors import UserError
from scaling_testbed.papers.evidence import (
    CANNOT_TELL,
    FACTOR,
    Evidence,
    Judge,
    Part,
    Verdict,
    pairs,
    size_name,
    text_of,
    weigh,
)


def quantity_moves(quantity: Quantity, along: str, rising: bool, where: dict | None = None) -> Judge:
    """A measured quantity rises, or falls, from end to end along N at each rate, or along the rate at each size."""

    def judge(evidence: Evidence) -> Verdict:
        lines: dict[tuple, list[tuple[float, float]]] = {}
        for curve in evidence.having(where or {}):
            for lr in curve.lrs:
                if values := quantities(curve, lr, quantity):
                    at, place = (curve.n_params, lr) if along == "N" else (lr, curve.n_params)
                    mean = math.exp(float(np.mean(np.log(values))))
                    lines.setdefault((curve.label, place), []).append((at, mean))
        parts = []
        for (_, place), points in lines.items():
            (_, first), (_, last) = min(points), max(points)
            if len(points) > 1:
                name = f"lr={place:g}" if along == "N" else f"N={compact(place)}"
                gain = math.log(last / first) * (1 if rising else -1)
                parts.append(Part(f"{name}: {first:.3g} to {last:.3g}", gain, abs(gain) > math.log(FACTOR)))
        return weigh(parts, _missing_within(evidence), 1, f"lines along {along} with two measured points")

    return judge


def reaches(quantity: Quantity, within: float) -> Judge:
    """At the largest size and its highest measured rate the quantity is past the threshold, or within a factor."""

    def judge(evidence: Evidence) -> Verdict:
        points = [
            ((curve.n_params, lr), values)
            for curve in evidence.curves
            for lr in curve.lrs
            if (values := quantities(curve, lr, quantity))
        ]
        if not points:
            return weigh([], evidence.missing, 1, f"runs that recorded {quantity.name}")
        (n_params, lr), values = max(points, key=lambda point: point[0])
        value = float(np.median(values))
        words = f"N={compact(n_params)} lr={lr:g}: {value:.3g}, to be compared with {quantity.threshold:g}"
        return weigh([Part(words, 1.0 if value <= within * quantity.threshold else -1.0, True)], evidence.missing)

    return judge


def steady_in_n(name: str, factor: float) -> Judge:
    """A mean over the last steps stays within a factor over all sizes at each rate."""

    def judge(evidence: Evidence) -> Verdict:
        quantity = Quantity(name=name, field=instability.LAST_MEAN)
        by_lr: dict[float, list[float]] = {}
        for curve in evidence.curves:
            for lr in curve.lrs:
                if values := quantities(curve, lr, quantity):
                    by_lr.setdefault(lr, []).append(float(np.mean(values)))
        parts = [
            Part(f"lr={lr:g}: {min(v):.3g} to {max(v):.3g}", 1.0 if max(v) <= factor * min(v) else -1.0, True)
            for lr, v in by_lr.items()
            if len(v) > 1
        ]
        return weigh(parts, evidence.missing, 1, f"rates with {name} at two sizes")

    return judge


def rises_with_block(prefix: str) -> Judge:
    """A per-block mean over the last steps is larger in the last block than in the first, in each run."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for curve in evidence.curves:
            for (lr, _), row in curve.runs.items():
                means = measured(row, instability.LAST_MEAN)
                blocks = sorted(int(k[len(prefix) + 1 :]) for k in means if k.startswith(f"{prefix}/") and means[k])
                if len(blocks) > 1:
                    first, last = means[f"{prefix}/{blocks[0]}"], means[f"{prefix}/{blocks[-1]}"]
                    words = f"{size_name(curve)} lr={lr:g}: {first:.3g} to {last:.3g}"
                    parts.append(Part(words, math.log(last / first), abs(math.log(last / first)) > math.log(FACTOR)))
        return weigh(parts, evidence.missing, 1, f"runs with {prefix} of two blocks")

    return judge


def larger_at_step(quantity: Quantity, key: str, larger, smaller, factor: float, where: dict) -> Judge:
    """The quantity is larger by a factor with one value of a key than with another, at the size and rate where the
    difference is largest: scores grow at high rates only."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for a, b in pairs(evidence.having(where), key, larger, smaller, lambda curve: curve):
            for lr in a.lrs:
                high, low = quantities(a, lr, quantity), quantities(b, lr, quantity)
                if high and low:
                    ratio = float(np.median(high) / np.median(low))
                    both = f"{np.median(high):.3g} with {text_of(larger)}, {np.median(low):.3g} with {text_of(smaller)}"
                    parts.append(
                        Part(
                            f"{size_name(a)} lr={lr:g}: {both}", math.log(ratio), ratio >= factor or ratio <= 1 / FACTOR
                        )
                    )
        top = max(parts, key=lambda part: part.gain, default=None)
        return weigh([top] if top else [], evidence.missing, 1, f"pairs of runs that recorded {quantity.name}")

    return judge


def falls(name: str, where: dict | None = None) -> Judge:
    """A recorded quantity ends below where it began, and below zero."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for curve in evidence.having(where or {}):
            for (lr, _), row in curve.runs.items():
                if trace := evidence.trace(row, name):
                    first, last = trace[0][1], trace[-1][1]
                    words = f"{size_name(curve)} lr={lr:g}: {first:.3g} to {last:.3g}"
                    parts.append(Part(words, 1.0 if last < min(first, 0) else -1.0, abs(last - first) > 0.1))
        return weigh(parts, evidence.missing, 1, f"runs that recorded {name}")

    return judge


def crossing_diverges(quantity: Quantity, where: dict | None = None) -> Judge:
    """Every run whose quantity passes the threshold diverges. One that was stopped before the end of its schedule has
    not shown whether it would."""

    def judge(evidence: Evidence) -> Verdict:
        rows = [row for curve in evidence.having(where or {}) for row in curve.runs.values()]
        past = [row for row in rows if (v := value_of(row, quantity)) is not None and quantity.passes(v)]
        bad, known = sum(map(diverged, past)), sum(value_of(row, quantity) is not None for row in rows)
        words = f"{len(past)} of {known} measured runs pass {quantity.threshold:g}, of which {bad} diverged"
        short = sum(_cut_short(row) and not diverged(row) for row in past)
        if short:
            return CANNOT_TELL, f"{words} and {short} were stopped before the end of their schedule"
        parts = [Part(words, 1.0 if bad == len(past) else -1.0, True)] if past else []
        return weigh(parts, _missing_within(evidence), least=1,
                     unit=f"runs past {quantity.threshold:g}, of {known} measured")  # fmt: skip

    return judge


def largest_predicted(quantity: Quantity, where: dict | None = None) -> Judge:
    """The fit to the smaller sizes foretells the largest: its value lies in the prediction interval. An interval wider
    than a factor of 100 foretells nothing and does not count."""

    def judge(evidence: Evidence) -> Verdict:
        try:
            _, made = instability.analyse(evidence.study, evidence.group, quantity, hold_out_largest=True)
        except UserError as error:
            return CANNOT_TELL, str(error)
        held = [one for one in made if one.predicted is not None and one.measured is not None]
        parts = []
        for one in held:
            interval = f"{one.predicted:.3g} [{one.low:.3g}, {one.high:.3g}]"
            words = f"lr={one.series.lr:g}: predicted {interval}, measured {one.measured:.3g}"
            parts.append(Part(words, 1.0 if one.inside else -1.0, one.high / one.low < 100))
        return weigh(parts, _missing_within(evidence), 1, "rates with three sizes below the largest")

    return judge


def trace_larger(name: str, reduce: Callable, key: str, larger, smaller, factor: float) -> Judge:
    """What `reduce` makes of a recorded quantity, [(step, value)] -> number, is larger by a factor with one value of a
    key than with another, in each pair of runs at the same size, rate and seed."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], list(evidence.missing)
        for a, b in pairs(evidence.curves, key, larger, smaller, lambda curve: curve):
            for at in sorted(set(a.runs) & set(b.runs)):
                both = [evidence.trace(curve.runs[at], name) for curve in (a, b)]
                if all(both):
                    high, low = (reduce(trace) for trace in both)
                    both_ways = f"{high:.3g} with {text_of(larger)}, {low:.3g} with {text_of(smaller)}"
                    words = f"{size_name(a)} lr={at[0]:g}: {both_ways}"
                    gain = math.log(max(high, 1e-30) / max(low, 1e-30))
                    parts.append(Part(words, gain, gain >= math.log(factor) or gain <= -math.log(FACTOR)))
        return weigh(parts, gaps, 1, f"pairs of runs that recorded {name}")

    return judge


def diverges_only_with(key: str, unstable, stable) -> Judge:
    """Runs diverge with one value of a key and not with the other, at the same size, rate and seed."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for a, b in pairs(evidence.curves, key, unstable, stable, lambda curve: curve):
            for at in sorted(set(a.runs) & set(b.runs)):
                bad, good = diverged(a.runs[at]), diverged(b.runs[at])
                both_ways = f"{_word(bad)} with {text_of(unstable)}, {_word(good)} with {text_of(stable)}"
                words = f"{size_name(a)} lr={at[0]:g}: {both_ways}"
                parts.append(Part(words, float(bad) - float(good), True))
        if parts and not any(part.gain for part in parts):
            return CANNOT_TELL, "; ".join(part.words for part in parts)
        return weigh(parts, evidence.missing, 1, "pairs of runs")

    return judge


def first_block_largest(prefix: str, where: dict | None = None) -> Judge:
    """The largest value of a per-block quantity over a run is that of block 0."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for curve in evidence.having(where or {}):
            for (lr, _), row in curve.runs.items():
                blocks = _blocks(evidence, row, prefix)
                peaks = {n: max(value for _, value in evidence.trace(row, f"{prefix}/{n}")) for n in blocks}
                if len(peaks) > 1:
                    top = max(peaks, key=peaks.get)
                    words = f"{size_name(curve)} lr={lr:g}: largest in block {top} of {len(peaks)} ({peaks[top]:.3g})"
                    parts.append(Part(words, 1.0 if top == 0 else -1.0, True))
        plus = sum(part.gain > 0 for part in parts)
        if parts and plus not in (0, len(parts)):
            typical = "agrees" if plus > len(parts) / 2 else CANNOT_TELL
            return typical, f"block 0 in {plus} of {len(parts)} runs"
        return weigh(parts, evidence.missing, 1, f"runs that recorded {prefix} of several blocks")

    return judge


def late(name: str, where: dict | None = None) -> Judge:
    """Half of a quantity's drift, from first to last record, happens after half of the run."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for curve in evidence.having(where or {}):
            for (lr, _), row in curve.runs.items():
                trace = evidence.trace(row, name)
                if len(trace) >= 4 and drift(trace) > 0.1:
                    share = half_drift_at(trace)
                    words = f"{size_name(curve)} lr={lr:g}: half of {drift(trace):.3g} after {share:.0%} of the run"
                    parts.append(Part(words, share - 0.5, True))
        return weigh(parts, evidence.missing, 1, f"runs in which {name} drifts by more than 0.1")

    return judge


def growth_is_in(grows: Sequence[str], not_: str, where: dict | None = None) -> Judge:
    """Over a run the product of some quantities grows by a larger factor than another one's absolute value does."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for curve in evidence.having(where or {}):
            for (lr, _), row in curve.runs.items():
                own, other = [evidence.trace(row, name) for name in grows], evidence.trace(row, not_)
                if all(own) and other:
                    norms = math.prod(growth(trace) for trace in own)
                    words = f"{size_name(curve)} lr={lr:g}: norms x{norms:.3g}, {not_} x{growth(other):.3g}"
                    parts.append(Part(words, math.log(norms / growth(other)), norms > 1.5))
        return weigh(parts, evidence.missing, 1, f"runs that recorded {', '.join([*grows, not_])}")

    return judge


def updates_shrink_below(grad: str, update: str) -> Judge:
    """Among runs that differ in eps, those whose gradient RMS lies below their eps have the smaller updates."""

    def judge(evidence: Evidence) -> Verdict:
        below, others = [], []
        for curve in evidence.curves:
            for row in curve.runs.values():
                means = measured(row, instability.LAST_MEAN)
                if means.get(grad) and means.get(update):
                    (below if means[grad] < number(row, "optimizer.eps") else others).append(means[update])
        if not below or not others:
            return (
                CANNOT_TELL,
                f"{len(below)} measured runs have a gradient RMS below their eps, {len(others)} above it",
            )
        words = f"median update RMS {np.median(below):.3g} below eps ({len(below)} runs), {np.median(others):.3g} above"
        return weigh([Part(words, float(np.median(others) - np.median(below)), True)], evidence.missing)

    return judge


def update_follows_gradient(grad: str, update: str, eps: float = 1e-8) -> Judge:
    """In a run whose gradient RMS comes within ten times eps the update RMS is smaller there than before."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for curve in evidence.curves:
            for (lr, _), row in curve.runs.items():
                grads, updates = dict(evidence.trace(row, grad)), dict(evidence.trace(row, update))
                steps = sorted(set(grads) & set(updates))
                near = [updates[step] for step in steps if grads[step] < 10 * eps]
                far = [updates[step] for step in steps if grads[step] >= 10 * eps]
                if near and far:
                    medians = f"{np.median(near):.3g} near eps, {np.median(far):.3g} before"
                    words = f"{size_name(curve)} lr={lr:g}: update RMS {medians}"
                    parts.append(Part(words, float(np.median(far) - np.median(near)), True))
        return weigh(parts, evidence.missing, 1, f"runs whose {grad} comes within ten times eps={eps:g}")

    return judge


def peak(trace: Sequence[tuple[int, float]]) -> float:
    """The largest absolute value."""
    return max(abs(value) for _, value in trace)


def drift(trace: Sequence[tuple[int, float]]) -> float:
    """How far the last value lies from the first."""
    return abs(trace[-1][1] - trace[0][1])


def growth(trace: Sequence[tuple[int, float]]) -> float:
    """The last absolute value over the first."""
    return max(abs(trace[-1][1]), 1e-30) / max(abs(trace[0][1]), 1e-30)


def half_drift_at(trace: Sequence[tuple[int, float]]) -> float:
    """The share of the run after which half of the drift has happened."""
    first, last = trace[0][1], trace[-1][1]
    step = next(step for step, value in trace if abs(value - first) >= abs(last - first) / 2)
    return (step - trace[0][0]) / (trace[-1][0] - trace[0][0])


def quantities(curve: Curve, lr: float, quantity: Quantity) -> list[float]:
    """The quantity of each seed that has it."""
    return [value for row in curve.rows(lr) if (value := value_of(row, quantity)) is not None]


def _blocks(evidence: Evidence, row: Row, prefix: str) -> list[int]:
    names = {key for step in evidence.study.trace(row)[:50] for key in step if key.startswith(f"{prefix}/")}
    return sorted(int(name.rpartition("/")[2]) for name in names if name.rpartition("/")[2].isdigit())


def _missing_within(evidence: Evidence) -> list[str]:
    """Missing runs up to the largest size that was measured: larger ones are planned to be foretold."""
    largest = max((curve.n_params for curve in evidence.curves if curve.runs), default=math.inf)
    return [name for curve in evidence.curves if curve.n_params <= largest for name in curve.missing]


def _cut_short(row: Row) -> bool:
    return (row.get("schedule.steps") or 0) > (row.get("steps_planned") or math.inf)


def _word(bad: bool) -> str:
    return "diverged" if bad else "finished"
