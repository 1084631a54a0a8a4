"""Judges of claims about final losses and learning-rate sensitivity."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from scaling_testbed.analysis.curves.grouping import SCAN, Curve
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity, capped, diverged, final_loss
from scaling_testbed.analysis.rows.study import number
from scaling_testbed.papers.evidence import (
    Evidence,
    Judge,
    Part,
    Verdict,
    apart,
    by_condition,
    by_size_without,
    pairs,
    size_name,
    text_of,
    weigh,
)

SAME_S = 1.25  # S within this factor, or 0.02 nats, is called unchanged
GRID_STEP = 3.4  # neighbouring rates of the grid differ by 3 or 3.33


def lower_s(key: str, better, worse, where: dict | None = None, largest: bool = False, contrary: bool = False) -> Judge:
    """S is lower with one value of a key than with another, at each size. largest: at the largest size only."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], []
        found = list(pairs(evidence.scored(where or {}), key, better, worse, _curve_of))
        top = max((low.curve.n_params for low, _ in found), default=0) if largest else 0
        for low, high in (pair for pair in found if pair[0].curve.n_params >= top):
            if low.s is None or high.s is None:
                gaps.append(f"S at {size_name(low.curve)}: {low.withheld or high.withheld}")
                continue
            words = f"{size_name(low.curve)}: S {_s(low)} with {text_of(better)}, {_s(high)} with {text_of(worse)}"
            parts.append(Part(words, high.s - low.s, _s_apart(low, high)))
        return weigh(parts, gaps, 1 if largest else 2, contrary=contrary)

    return judge


def s_rises(where: dict | None = None, faster: tuple[str, str, str] | None = None) -> Judge:
    """S grows from the smallest to the largest size of each condition. faster: (key, a, b): more for a than for b."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps, slopes = [], [], {}
        for name, found in by_condition(evidence.scored(where or {})).items():
            gaps += [f"S at {size_name(one.curve)}: {one.withheld}" for one in found if one.s is None]
            if len(found) < 2 or gaps:
                continue
            small, large = found[0], found[-1]
            words = f"{name}: S {_s(small)} at {size_name(small.curve)}, {_s(large)} at {size_name(large.curve)}"
            parts.append(Part(words, large.s - small.s, _s_apart(small, large)))
            slopes[name] = _slope([one.curve.n_params for one in found], [one.s for one in found])
        if faster is None or gaps:
            return weigh(parts, gaps, 1, "conditions with two sizes")
        key, quick, slow = faster
        a, b = slopes.get(f"{key}={quick}"), slopes.get(f"{key}={slow}")
        if a is None or b is None:
            return weigh([], [], 1, f"pairs of {quick} and {slow} with two sizes each")
        words = f"S grows as N^{a:.2f} along {quick}, N^{b:.2f} along {slow}"
        return weigh([Part(words, a - b, abs(a - b) > 0.05)])

    return judge


def s_unchanged(key: str) -> Judge:
    """S of the values of a key stays within a factor SAME_S at each size, or their seeds' intervals overlap."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], []
        for found in by_size_without(key, evidence.sensitivities, _curve_of):
            withheld = [f"S at {size_name(one.curve)}: {one.withheld}" for one in found if one.s is None]
            gaps += withheld
            if not withheld and len(found) > 1:
                low, high = min(found, key=lambda one: one.s), max(found, key=lambda one: one.s)
                same = high.s <= SAME_S * low.s or high.s - low.s <= 0.02 or (low.low and not _s_apart(low, high))
                shown = ", ".join(f"{_s(one)} with {one.curve.condition.get(key)}" for one in found)
                parts.append(Part(f"{size_name(low.curve)}: S {shown}", 1.0 if same else -1.0, True))
        return weigh(parts, gaps, 2)

    return judge


def lower_best_loss(
    key: str, better, worse, where: dict | None = None, largest: bool = False, contrary: bool = False
) -> Judge:
    """The loss at the best rate is lower with one value of a key. largest: at the largest size only."""

    def judge(evidence: Evidence) -> Verdict:
        found = list(pairs(evidence.having(where or {}), key, better, worse, _itself, by_n=key == SCAN))
        if largest and found:
            top = max(low.n_params for low, _ in found)
            found = [pair for pair in found if pair[0].n_params == top]
        parts = []
        for low, high in (pair for pair in found if pair[0].runs and pair[1].runs):
            both = (best_losses(low), best_losses(high))
            parts.append(_lower(f"{size_name(low)}: best loss", *both, better, worse))
        return weigh(parts, _missing(found), 1 if largest else 2, contrary=contrary)

    return judge


def lower_loss_at_top(key: str, better, worse) -> Judge:
    """At the highest rate that both have, the loss is lower with one value of a key than with another, at each size."""

    def judge(evidence: Evidence) -> Verdict:
        found = list(pairs(evidence.curves, key, better, worse, _itself))
        parts = []
        for low, high in found:
            if shared := [lr for lr in low.lrs if low.rows(lr) and high.rows(lr)]:
                lr = max(shared)
                words = f"{size_name(low)} at lr={lr:g}: loss"
                parts.append(_lower(words, losses(low, lr), losses(high, lr), better, worse))
        return weigh(parts, _missing(found))

    return judge


def _lower(words: str, low: list[float], high: list[float], better, worse) -> Part:
    """One comparison of losses, one for each seed."""
    both = f"{np.mean(low):.4f} with {text_of(better)}, {np.mean(high):.4f} with {text_of(worse)}"
    return Part(f"{words} {both}", float(np.mean(high) - np.mean(low)), apart(low, high))


def _missing(found: Sequence[tuple[Curve, Curve]]) -> list[str]:
    return [name for pair in found for curve in pair for name in curve.missing]


def coincide_below_best(key: str, one, other, where: dict | None = None) -> Judge:
    """Two curves agree within 0.05 nats, or within their seeds, at the rates up to the lower of their best rates."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], []
        for a, b in pairs(evidence.having(where or {}), key, one, other, _itself):
            gaps += a.missing + b.missing
            if not (a.runs and b.runs):
                continue
            shared = [lr for lr in a.lrs if a.rows(lr) and b.rows(lr) and lr <= min(best_lr(a), best_lr(b))]
            if not shared:
                continue
            gap = {lr: abs(float(np.mean(losses(a, lr)) - np.mean(losses(b, lr)))) for lr in shared}
            worst = max(gap, key=gap.get)
            together = gap[worst] <= 0.05 or not apart(losses(a, worst), losses(b, worst))
            words = f"{size_name(a)}: at most {gap[worst]:.3f} nats apart up to lr={max(shared):g}"
            parts.append(Part(words, 1.0 if together else -1.0, True))
        return weigh(parts, gaps, 2)

    return judge


def trains_at(lr: float, where: dict | None = None) -> Judge:
    """The largest model trains at a rate: no seed diverges. It must have been tried."""

    def judge(evidence: Evidence) -> Verdict:
        found = evidence.having(where or {})
        largest = max((curve.n_params for curve in found), default=None)
        parts, gaps = [], []
        for curve in (curve for curve in found if curve.n_params == largest):
            gaps += curve.missing
            rows = [row for at in curve.lrs if math.isclose(at, lr, rel_tol=1e-6) for row in curve.rows(at)]
            if rows:
                bad, initial = sum(map(diverged, rows)), number(rows[0], "val_loss_initial")
                loss = np.mean([final_loss(row) for row in rows])
                change = f"loss {loss:.3f} from {initial:.3f}, {bad} of {len(rows)} diverged"
                words = f"{size_name(curve)} at lr={lr:g}: {change}"
                parts.append(Part(words, -1.0 if bad else 1.0, True))
        return weigh(parts, gaps, 1, f"runs of the largest size at lr={lr:g}")

    return judge


def unstable_at_top(where: dict | None = None, largest: bool = False) -> Judge:
    """At its highest rate each size is unstable: a seed diverged, or half of what training gains at the best rate is
    lost. largest: the largest size only."""

    def judge(evidence: Evidence) -> Verdict:
        found = [curve for curve in evidence.having(where or {}) if curve.runs]
        top = max((curve.n_params for curve in found), default=0) if largest else 0
        parts, gaps = [], []
        for curve in (curve for curve in found if curve.n_params >= top):
            gaps += curve.missing
            lr = max(at for at in curve.lrs if curve.rows(at))
            rows, best = curve.rows(lr), float(np.mean(best_losses(curve)))
            initial, last = number(rows[0], "val_loss_initial"), float(np.mean(losses(curve, lr)))
            bad = any(map(diverged, rows)) or last - best >= (initial - best) / 2
            words = f"{size_name(curve)} at lr={lr:g}: loss {last:.3f}, best {best:.3f}, initial {initial:.3f}"
            parts.append(Part(words, 1.0 if bad else -1.0, True))
        return weigh(parts, gaps, 1 if largest else 2)

    return judge


def first_divergence_falls(where: dict | None = None) -> Judge:
    """The lowest rate that diverges falls as N grows. A size that never diverges counts as a rate above all."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], []
        for name, found in by_condition(evidence.scored(where or {})).items():
            gaps += [missing for one in found for missing in one.curve.missing]
            first = [one.first_diverging_lr or math.inf for one in found]
            if len(found) < 2 or min(first) == math.inf:
                continue
            said = [
                f"{size_name(o.curve)} {f'{lr:g}' if lr < math.inf else 'none'}"
                for o, lr in zip(found, first, strict=True)
            ]
            falls = all(b <= a for a, b in zip(first, first[1:], strict=False))
            gain = 0.0 if first[0] == first[-1] else 1.0 if falls else -1.0
            parts.append(Part(f"{name}: first diverging lr {', '.join(said)}", gain, True))
        return weigh(parts, gaps, 1, "conditions in which a run diverged at one of two or more sizes")

    return judge


def best_lr_steady(where: dict | None = None, against: dict | None = None) -> Judge:
    """The best rate stays within one step of the grid over the sizes; or it moves less than in the runs `against`."""

    def judge(evidence: Evidence) -> Verdict:
        own, gaps, words = _lr_ratio(evidence.having(where or {}))
        if against is None:
            return weigh([] if own is None else [Part(words, 1.0 if own <= GRID_STEP else -1.0, True)], gaps)
        other, more, said = _lr_ratio(evidence.having(against))
        if own is None or other is None:
            return weigh([], gaps + more, 1, "pairs of conditions with two sizes each")
        clear = abs(math.log(own / other)) > 0.1
        return weigh([Part(f"{words}; in comparison {said}", other - own, clear)], gaps + more)

    return judge


def best_lr_moves_up(key: str) -> Judge:
    """The best rate falls nowhere, and rises somewhere, as the key's value grows."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], []
        for found in by_size_without(key, evidence.curves, _itself):
            found = sorted(found, key=lambda curve: number(curve.settings, key))
            gaps += [name for curve in found for name in curve.missing]
            rates = {curve.condition.get(key): best_lr(curve) for curve in found if curve.runs}
            if len(rates) > 1:
                shown = ", ".join(f"{value}: {lr:g}" for value, lr in rates.items())
                steps = [math.log(b / a) for a, b in itertools.pairwise(rates.values())]
                gain = max(steps) if min(steps) >= 0 else min(steps)
                parts.append(Part(f"{size_name(found[0])}: best lr at {shown}", gain, True))
        return weigh(parts, gaps, 2)

    return judge


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


def _curve_of(one: Sensitivity) -> Curve:
    return one.curve


def _itself(curve: Curve) -> Curve:
    return curve


def _s(one: Sensitivity) -> str:
    return f"{one.s:.3f}" + (f" [{one.low:.3f}, {one.high:.3f}]" if one.low is not None else "")


def _s_apart(a: Sensitivity, b: Sensitivity) -> bool:
    """Whether two S differ: their seeds' intervals do not overlap, or, with one seed, by RESOLUTION."""
    ends = [[value for value in (one.low, one.high) if value is not None] or [one.s] for one in (a, b)]
    return apart(*ends)


def _slope(n_params: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of a power law through values, which may not be zero."""
    return float(np.polyfit(np.log(n_params), np.log(np.maximum(values, 1e-6)), 1)[0])


def _lr_ratio(found: Sequence[Curve]) -> tuple[float | None, list[str], str]:
    """Largest over smallest best rate over the sizes, None with fewer than two; what is missing; it in words."""
    found = sorted((curve for curve in found if curve.runs), key=lambda curve: curve.n_params)
    gaps = [name for curve in found for name in curve.missing]
    if len({curve.n_params for curve in found}) < 2:
        return None, gaps, ""
    rates = [best_lr(curve) for curve in found]
    shown = ", ".join(f"{lr:g} at {size_name(curve)}" for curve, lr in zip(found, rates, strict=True))
    return max(rates) / min(rates), gaps, f"best lr {shown}"
