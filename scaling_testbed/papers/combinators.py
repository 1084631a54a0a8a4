"""Judges of claims: each function returns a judge, a function from the evidence to a verdict.

- If a planned run is missing or a value is withheld, the verdict is "cannot tell" and names it. The verdict is also
  "cannot tell" if a claim is about sizes and there is only one size.
- A difference counts if the ranges of the seeds do not overlap; with one seed, if it is at least RESOLUTION.
- "agrees" needs at least half of the comparisons to count, and none of these to contradict; "disagrees" the reverse.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from scaling_testbed.analysis.curves import instability
from scaling_testbed.analysis.curves.grouping import SCAN, Curve, label
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity, measured, value_of
from scaling_testbed.analysis.curves.lr_sensitivity import diverged
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import Row, number
from scaling_testbed.papers.measures import (
    FACTOR,
    SIZE,
    TOP_RATE,
    Check,
    Evidence,
    Measure,
    Part,
    Place,
    Value,
    best_losses,
    best_lr,
    losses,
    places,
    size_name,
)
from scaling_testbed.papers.paper import AGREES, CANNOT_TELL, DISAGREES, Judge, Verdict
from scaling_testbed.papers.predictions import Numbers

Settings = Mapping[str, object]  # keys and their values; a tuple lists alternatives

RESOLUTION = 0.01  # nats: one seed at nano scale cannot resolve smaller differences
SAME_N = 0.15  # difference of ln N: widths come in steps, so two shapes rarely have exactly one size
SAME = 1.25  # a number that changes by at most this factor counts as unchanged
EACH, LARGEST, HIGHEST, MOST = "each", "largest size", "highest rate", "largest difference"  # where to compare


def weigh(
    parts: Sequence[Part], gaps: Iterable[str] = (), least: int = 1, unit: str = "sizes", contrary: bool = False
) -> Verdict:
    """The verdict of comparisons.

    gaps: missing runs. least: the number of comparisons that a verdict needs. contrary: whether the claim is that there
    is no such gain; comparisons that do not count then support it.
    """
    words = _few([part.words for part in parts], 8)
    if gaps := list(gaps):
        return CANNOT_TELL, "; ".join(filter(None, [f"missing or withheld: {_few(gaps)}", words]))
    if len(parts) < least:
        few = f"only {len(parts)} of {least} {unit}" if parts else f"no {unit} to judge by"
        return CANNOT_TELL, "; ".join(filter(None, [words, few]))
    plus = sum(part.clear and part.gain > 0 for part in parts)
    minus = sum(part.clear and part.gain < 0 for part in parts)
    if contrary and not plus:
        return AGREES, words
    if plus and not minus and 2 * plus >= len(parts):
        return (DISAGREES if contrary else AGREES), words
    if not contrary and minus and not plus and 2 * minus >= len(parts):
        return DISAGREES, words
    return CANNOT_TELL, f"{words}; {plus} for it, {minus} against, {len(parts) - plus - minus} too close"


def _few(names: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(names))
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def apart(a: Sequence[float], b: Sequence[float], floor: float = RESOLUTION) -> bool:
    """Whether two groups of seeds differ: their ranges do not overlap, or, with one seed, means differ by `floor`."""
    if len(a) > 1 and len(b) > 1:
        return max(a) < min(b) or max(b) < min(a)
    return abs(float(np.mean(a) - np.mean(b))) >= floor


def pairs(found: Sequence[Curve], key: str, one: object, other: object) -> Iterator[tuple[Curve, Curve]]:
    """Pairs of curves with `one` and `other` as the value of a key, and equal in all else.

    The curves of a pair have the same shape. For the key `scan` they have different shapes and the same number of
    parameters to within 15 %.
    """
    for a, b in itertools.product(found, found):
        near = abs(math.log(max(a.n_params, 1) / max(b.n_params, 1))) < SAME_N
        alike = near and a.shape != b.shape if key == SCAN else a.shape == b.shape
        if alike and a.fits({key: one}) and b.fits({key: other}) and remaining(a, key) == remaining(b, key):
            yield a, b


def remaining(curve: Curve, key: str) -> tuple[tuple[str, str], ...]:
    """The condition of a curve without a key."""
    return tuple(item for item in curve.condition.items() if item[0] != key)


def _gaps(found: Iterable[Curve]) -> list[str]:
    return [name for curve in found for name in curve.missing]


def missing_of(evidence: Evidence, measure: Measure, found: Iterable[Curve]) -> list[str]:
    """The reasons why these curves cannot be judged by a measure."""
    return [name for curve in found for name in measure.missing(evidence, curve)]


def values_at(
    evidence: Evidence, measure: Measure, curve: Curve
) -> dict[tuple[float | None, int | None], tuple[Place, Value]]:
    """The measured values of a curve, by rate and seed."""
    taken = ((place, measure.of(evidence, place)) for place in places(curve, measure.level))
    return {(place.lr, place.seed): (place, value) for place, value in taken if value is not None}


def gain_of(measure: Measure, one: Value, other: Value) -> tuple[float, bool]:
    """The difference other - one (of logarithms if the measure is compared by ratio), and whether it counts."""
    if measure.ratio:
        gain = math.log(other.number / one.number)
        return gain, abs(gain) > math.log(FACTOR)
    return other.number - one.number, apart(one.seeds, other.seeds)


def up_to_measured(found: Sequence[Curve]) -> list[Curve]:
    """The curves up to the largest measured size."""
    largest = max((curve.n_params for curve in found if curve.runs), default=math.inf)
    return [curve for curve in found if curve.n_params <= largest]


def compare(
    measure: Measure,
    key: str,
    lower: object,
    higher: object,
    where: Settings | None = None,
    at: str = EACH,
    factor: float = FACTOR,
    contrary: bool = False,
) -> Judge:
    """The judge that the measure is lower with one value of a key than with another, with all else equal.

    at: EACH place of a pair, the LARGEST size only, the HIGHEST rate that both have, or the place where they differ
    MOST. factor: the ratio from which on a difference supports the claim, for a measure compared by ratio.
    """

    def judge(evidence: Evidence) -> Verdict:
        scope = evidence.having(where)
        found = list(pairs(scope, key, lower, higher))
        if at == LARGEST:
            top = max((low.n_params for low, _ in found), default=0)
            found = [pair for pair in found if pair[0].n_params == top]
        parts = []
        for low, high in found:
            ours, theirs = (values_at(evidence, measure, curve) for curve in (low, high))
            shared = [one for one in ours if one in theirs]
            for (place, one), (_, other) in ((ours[x], theirs[x]) for x in shared[-1 if at == HIGHEST else 0 :]):
                gain, clear = gain_of(measure, one, other)
                words = f"{one.text} with {_text(lower)}, {other.text} with {_text(higher)}"
                enough = clear and not 0 < gain < math.log(factor) if measure.ratio else clear
                parts.append(Part(f"{place}: {measure.name} {words}", gain, enough))
        if at == MOST and parts:
            parts = [max(parts, key=lambda part: part.gain)]
        per_size = measure.level == SIZE or at == HIGHEST
        unit = "sizes" if per_size else f"pairs of runs with {measure.name}"
        least = 2 if measure.level == SIZE and at == EACH else 1
        gaps = missing_of(evidence, measure, itertools.chain(*found) if found else scope)
        return weigh(parts, gaps, least, unit, contrary)

    return judge


def _text(value: object) -> str:
    """The text of a wanted value in a sentence."""
    return "/".join(map(text, value)) if isinstance(value, tuple) else text(value)


def opposite_at_ends(measure: Measure, key: str, one: object, other: object) -> Judge:
    """The judge that one value of a key gives the lower measure at the smallest size, and the higher at the largest.

    This must hold in each remaining condition, and every difference must be clear.
    """

    def judge(evidence: Evidence) -> Verdict:
        found = [pair for pair in pairs(evidence.curves, key, one, other) if pair[0].runs and pair[1].runs]
        parts, gaps = [], list(evidence.missing)
        for rest in dict.fromkeys(remaining(a, key) for a, _ in found):
            own = sorted((pair for pair in found if remaining(pair[0], key) == rest), key=lambda pair: pair[0].n_params)
            for pair, sign in ((own[0], 1), (own[-1], -1)) if own[0][0].n_params < own[-1][0].n_params else ():
                mine, yours = (measure.of(evidence, Place(curve)) for curve in pair)
                if mine is None or yours is None:
                    gaps += missing_of(evidence, measure, pair) or [f"{measure.name} at {size_name(pair[0])}"]
                    continue
                gain, clear = gain_of(measure, mine, yours)
                both = f"{mine.text} with {_text(one)}, {yours.text} with {_text(other)}"
                words = f"{label(dict(rest))} {size_name(pair[0])}: {measure.name} {both}"
                parts.append(Part(words, sign * gain, clear))
        least = 1 if all(part.clear for part in parts) else len(parts) + 1
        return weigh(parts, gaps, least, "clear differences" if parts else "pairs of sizes")

    return judge


def coincide_below_best(key: str, one: object, other: object, margin: float = 0.05) -> Judge:
    """The judge that two curves agree, in nats or within their seeds, at rates up to the lower of their best rates."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = [], []
        for a, b in pairs(evidence.curves, key, one, other):
            gaps += a.missing + b.missing
            most = min(map(best_lr, (a, b))) if a.runs and b.runs else 0.0
            if shared := [lr for lr in a.lrs if a.rows(lr) and b.rows(lr) and lr <= most]:
                gap = {lr: abs(float(np.mean(losses(a, lr)) - np.mean(losses(b, lr)))) for lr in shared}
                worst = max(gap, key=gap.__getitem__)
                together = gap[worst] <= margin or not apart(losses(a, worst), losses(b, worst))
                words = f"{size_name(a)}: at most {gap[worst]:.3f} nats apart up to lr={max(shared):g}"
                parts.append(Part(words, 1.0 if together else -1.0))
        return weigh(parts, gaps, 2)

    return judge


def loss_beside(
    key: str,
    plain: Settings,
    low: float,
    high: float = math.inf,
    *,
    within: float | None = None,
    above: float | None = None,
) -> Judge:
    """The judge of the loss at the values of a key from low to high.

    With `within`, the loss must be within so many nats of the loss at the smallest value. With `above`, it must be at
    least so many nats above that loss. With neither, it must be above the loss of a model with the settings `plain`, to
    which the key does not apply.
    """

    def judge(evidence: Evidence) -> Verdict:
        short = key.rpartition(".")[2]
        bases = [curve for curve in evidence.having(plain) if curve.runs]
        found = [curve for curve in evidence.curves if curve.runs and not curve.fits(plain)]
        found = [curve for curve in found if curve.settings.get(key) is not None]
        found.sort(key=lambda curve: number(curve.settings, key))
        name = "without layers"
        if above is not None or within is not None:
            name, bases, found = f"at the smallest {short}", found[:1], found[1:]
        parts = []
        for curve in found if bases else ():
            value, ours, base = number(curve.settings, key), best_losses(curve), best_losses(bases[0])
            if low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                gap = float(np.mean(ours) - np.mean(base))
                words = f"{short}={value:g}: loss {np.mean(ours):.3f}, {name} {np.mean(base):.3f}"
                past = gap >= above if above is not None else gap <= within if within is not None else gap > 0
                clear = name != "without layers" or apart(ours, base)
                parts.append(Part(words, 1.0 if past else -1.0, clear))
        some = f"from {low:g} on" if high == math.inf else f"up to {high:g}"
        return weigh(parts, evidence.missing, 1, f"values of {short} {some}")

    return judge


def each(check: Check, where: Settings | None = None, at: str = EACH, typically: bool = False) -> Judge:
    """The judge that a check holds at the places `at`.

    at: EACH place, the LARGEST size only, or the largest size at its HIGHEST rate with a result. typically: whether the
    check may fail at fewer than half of the places.
    """

    def judge(evidence: Evidence) -> Verdict:
        scope = evidence.having(where)
        if at == LARGEST:
            top = max((curve.n_params for curve in scope), default=0)
            scope = [curve for curve in scope if curve.n_params == top]
        asked = [(place, check.of(evidence, place)) for curve in scope for place in places(curve, check.level)]
        made = [(place, part) for place, part in asked if part is not None]
        if at == HIGHEST and made:
            made = [max(made, key=lambda one: (one[0].curve.n_params, one[0].lr or 0.0))]
        parts = [part for _, part in made]
        plus = sum(part.gain > 0 for part in parts)
        if typically and plus not in (0, len(parts)):
            return (AGREES if plus > len(parts) / 2 else CANNOT_TELL), f"true of {plus} of {len(parts)} runs"
        least = 2 if check.level == TOP_RATE and at == EACH else 1
        return weigh(parts, _gaps(scope), least, check.unit)

    return judge


def past_threshold_diverges(quantity: Quantity, where: Settings | None = None) -> Judge:
    """The judge that every run whose quantity passes the threshold diverges.

    If such a run was stopped before the end of its schedule, the verdict is "cannot tell", unless the run diverged.
    """

    def judge(evidence: Evidence) -> Verdict:
        scope = evidence.having(where)
        known = [(row, value) for curve in scope for row in curve.runs.values() if (value := value_of(row, quantity))]
        past = [row for row, value in known if quantity.passes(value)]
        bad = sum(map(diverged, past))
        words = f"{len(past)} of {len(known)} measured runs pass {quantity.threshold:g}, of which {bad} diverged"
        if short := sum(_cut_short(row) and not diverged(row) for row in past):
            return CANNOT_TELL, f"{words} and {short} were stopped before the end of their schedule"
        parts = [Part(words, 1.0 if bad == len(past) else -1.0)] if past else []
        unit = f"runs past {quantity.threshold:g}, of {len(known)} measured"
        return weigh(parts, _gaps(up_to_measured(evidence.curves)), 1, unit)

    return judge


def _cut_short(row: Row) -> bool:
    return (row.get("schedule.steps") or 0) > (row.get("steps_planned") or math.inf)


def largest_foretold(quantity: Quantity) -> Judge:
    """The judge that the fit to the smaller sizes predicts the largest: its value lies in the prediction interval.

    An interval wider than a factor of 100 does not count.
    """

    def judge(evidence: Evidence) -> Verdict:
        _, made = instability.analyse(evidence.study, evidence.group, quantity, hold_out_largest=True)
        parts = []
        for one in made:
            if one.predicted is None or one.low is None or one.high is None or one.measured is None:
                continue
            interval = f"{one.predicted:.3g} [{one.low:.3g}, {one.high:.3g}]"
            words = f"lr={one.series.lr:g}: predicted {interval}, measured {one.measured:.3g}"
            parts.append(Part(words, 1.0 if one.inside else -1.0, one.high / one.low < 100))
        return weigh(parts, _gaps(up_to_measured(evidence.curves)), 1, "rates with three sizes below the largest")

    return judge


def smaller_below_eps(grad: str, update: str) -> Judge:
    """The judge that, of runs that differ in eps, those with a gradient RMS below their eps have smaller updates."""

    def judge(evidence: Evidence) -> Verdict:
        below: list[float] = []
        others: list[float] = []
        for row in (row for curve in evidence.curves for row in curve.runs.values()):
            means = measured(row, LAST_MEAN)
            if means.get(grad) and means.get(update):
                (below if means[grad] < number(row, "optimizer.eps") else others).append(means[update])
        if not below or not others:
            few = f"{len(below)} measured runs have a gradient RMS below their eps, {len(others)} above it"
            return CANNOT_TELL, few
        words = f"median update RMS {np.median(below):.3g} below eps ({len(below)} runs), {np.median(others):.3g} above"
        return weigh([Part(words, float(np.median(others) - np.median(below)))], evidence.missing)

    return judge


def _weigh_laws(evidence: Evidence, parts: Sequence[Part], unit: str = "data sets") -> Verdict:
    """The verdict of comparisons, with the number of runs that were left out of the laws."""
    diverged_runs = sum(row.get("status") == "diverged" for row in evidence.study.rows)
    counts = ((diverged_runs, "diverged"), (len(evidence.study.missing), "without a result"))
    left_out = ", ".join(f"{number} {what}" for number, what in counts if number)
    verdict, words = weigh(parts, unit=unit)
    return verdict, f"{words}; left out: {left_out}" if left_out else words


def within(measure: Numbers, limit: float, reach: float = 0.0, beyond: bool = False) -> Judge:
    """The judge that each number is at most a limit or, with `beyond`, above it.

    reach: a small error counts only if the predicted run has at least this many times the compute of the fitted runs. A
    large error always counts.
    """

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for one in measure(evidence):
            true = one.number <= limit
            parts.append(Part(one.words, 1.0 if true != beyond else -1.0, not true or one.reach >= reach))
        return _weigh_laws(evidence, parts)

    return judge


def same_over(measure: Numbers, factor: float = SAME) -> Judge:
    """The judge that the numbers of all data sets, at least two, lie within a factor of each other."""

    def judge(evidence: Evidence) -> Verdict:
        found = measure(evidence)
        numbers = [one.number for one in found]
        words = "; ".join(one.words for one in found)
        parts = [Part(words, 1.0 if max(numbers) <= factor * min(numbers) else -1.0)] if len(found) > 1 else []
        return _weigh_laws(evidence, parts, "second data set")

    return judge


def less(measure: Numbers, other: Numbers, factor: float = FACTOR) -> Judge:
    """The judge that a number is less than another one of the same data set; it counts from a factor on."""

    def judge(evidence: Evidence) -> Verdict:
        parts = []
        for one, more in zip(measure(evidence), other(evidence), strict=True):
            gain = math.log(max(more.number, 1e-9) / max(one.number, 1e-9))
            parts.append(Part(f"{one.words}, {more.words}", gain, abs(gain) > math.log(factor)))
        return _weigh_laws(evidence, parts)

    return judge
