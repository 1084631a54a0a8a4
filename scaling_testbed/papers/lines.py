"""Judges of a measure along the size N, the learning rate or a key, with all other settings equal."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import number
from scaling_testbed.papers.combinators import (
    RESOLUTION,
    SAME,
    Settings,
    apart,
    gain_of,
    missing_of,
    remaining,
    up_to_measured,
    values_at,
    weigh,
)
from scaling_testbed.papers.measures import SIZE, Evidence, Measure, Part, Place, Value, size_name
from scaling_testbed.papers.paper import Judge, Verdict


@dataclass(frozen=True)
class Line:
    """A measure along N, the rate or a key, with all other settings equal.

    points: (x, text of x, value), sorted by x, at least two. name: distinguishes it from other lines; empty if there
    are none.
    """

    measure: Measure
    name: str
    curve: Curve
    points: list[tuple[float, str, Value]]

    @property
    def numbers(self) -> list[float]:
        return [value.number for _, _, value in self.points]

    @property
    def said(self) -> str:
        return ", ".join(f"{value.text} at {place}" for _, place, value in self.points)

    def part(self, words: str, gain: float, clear: bool = True) -> Part:
        """A comparison whose words start with the name of the line, if it has one."""
        return Part(": ".join(filter(None, (self.name, words))), gain, clear)


def _lines(evidence: Evidence, measure: Measure, key: str, where: Settings | None) -> tuple[list[Line], list[str]]:
    """The lines of a measure, and the missing runs.

    For a measure at each rate, only runs up to the largest measured size count as missing: larger sizes may be planned
    only to be predicted.
    """
    found: dict[tuple[object, ...], list[tuple[float, str, Value, Place]]] = {}
    scope = sorted(evidence.having(where), key=lambda curve: curve.n_params if key == "N" else 0)
    for curve in scope:
        for place, value in values_at(evidence, measure, curve).values():
            line: tuple[object, ...]
            if key == "N":
                line, x = (curve.label, place.lr), (curve.n_params, size_name(curve))
            elif key == "lr":
                line, x = (curve.label, curve.n_params), (place.rate, f"lr={place.rate:g}")
            else:
                line = (curve.shape, remaining(curve, key), place.lr)
                x = (number(curve.settings, key), text(curve.settings[key]))
            found.setdefault(line, []).append((*x, value, place))
    several = len({curve.label for curve in scope}) > 1
    lines = []
    for points in (sorted(points, key=lambda point: point[0]) for points in found.values() if len(points) > 1):
        first = points[0][3]
        at_rate = f"lr={first.lr:g}" if first.lr is not None else first.curve.label if several else ""
        name = at_rate if key == "N" else size_name(first.curve)
        lines.append(Line(measure, name, first.curve, [point[:3] for point in points]))
    return lines, missing_of(evidence, measure, scope if measure.level == SIZE else up_to_measured(scope))


Rule = Callable[[Line], Part | None]


def along(measure: Measure, key: str, rule: Rule, where: Settings | None = None, unit: str = "") -> Judge:
    """The judge of a rule on each line of the measure along N, the rate (lr) or a key.

    unit: the name, in a sentence, of the lines to which the rule applies.
    """

    def judge(evidence: Evidence) -> Verdict:
        lines, gaps = _lines(evidence, measure, key, where)
        parts = [part for line in lines if (part := rule(line))]
        of_sizes = key not in ("N", "lr")
        lines_of = "sizes" if of_sizes else f"lines of {measure.name} along {key} with two points"
        return weigh(parts, gaps, 2 if of_sizes else 1, unit or lines_of)

    return judge


def rises(line: Line) -> Part:
    """The rule that the measure rises from the first point to the last."""
    (_, start, first), (_, end, last) = line.points[0], line.points[-1]
    gain, clear = gain_of(line.measure, first, last)
    at_ends = f"{line.measure.name} {first.text} at {start}, {last.text} at {end}"
    return line.part(at_ends if line.measure.level == SIZE else f"{first.text} to {last.text}", gain, clear)


def falls(line: Line) -> Part:
    """The rule that the measure falls from the first point to the last."""
    part = rises(line)
    return Part(part.words, -part.gain, part.clear)


def _goes(sign: int, line: Line) -> Part | None:
    if min(line.numbers) == math.inf:
        return None
    steps = [0.0 if a == b else sign * (math.log(b) - math.log(a)) for a, b in itertools.pairwise(line.numbers)]
    shown = ", ".join(f"{place}: {value.text}" for _, place, value in line.points)
    gain = max(steps) if min(steps) >= 0 else min(steps)
    return line.part(f"{line.measure.name} at {shown}", gain)


only_rises: Rule = functools.partial(_goes, 1)  # rises at least once and never falls
only_falls: Rule = functools.partial(_goes, -1)


def steady(factor: float = SAME, slack: float = 0.0) -> Rule:
    """The rule that all values agree within a factor, within a slack, or within the intervals of their seeds."""

    def rule(line: Line) -> Part:
        values = sorted((value for _, _, value in line.points), key=lambda value: value.number)
        low, high = values[0], values[-1]
        same = high.number <= factor * low.number or high.number - low.number <= slack
        same = same or (len(low.seeds) > 1 and not apart(low.seeds, high.seeds))
        return line.part(f"{line.measure.name} {line.said}", 1.0 if same else -1.0)

    return rule


def more_at_largest(measure: Measure, key: str, rule: Rule) -> Judge:
    """The judge that the gain of a rule along a key is larger at the largest size than at the smallest."""

    def judge(evidence: Evidence) -> Verdict:
        lines, gaps = _lines(evidence, measure, key, None)
        by_size = sorted(lines, key=lambda line: line.curve.n_params)
        parts = [part for line in by_size if (part := rule(line))]
        if gaps or len(parts) < 2:
            return weigh(parts, gaps, 2)
        more = parts[-1].gain - parts[0].gain
        return weigh([Part(f"{parts[0].words}; {parts[-1].words}", more, abs(more) >= RESOLUTION)])

    return judge


@dataclass(frozen=True)
class Reduction:
    """A reduction of a line to one value.

    of: the value of a line. template: the sentence about two lines, with their values {a} and {b} and their conditions
    {one} and {other}. clear: the smallest difference that counts, or the smallest logarithm of the ratio if `ratio`.
    """

    of: Callable[[Line], Value | None]
    template: str
    clear: float
    ratio: bool = False


def _slope(line: Line) -> Value:
    x = [point[0] for point in line.points]
    slope = float(np.polyfit(np.log(x), np.log(np.maximum(line.numbers, 1e-6)), 1)[0])
    return Value(slope, f"N^{slope:.2f}")


def _spread(line: Line) -> Value:
    return Value(max(line.numbers) / min(line.numbers), f"{line.measure.name} {line.said}")


def _miss(line: Line) -> Value | None:
    if len(line.points) < 4:
        return None
    x, y = np.log([(point[0], point[2].number) for point in line.points]).T
    error = abs(math.exp(np.polyval(np.polyfit(x[:-1], y[:-1], 1), x[-1])) - line.numbers[-1])
    return Value(error, f"{error:.4f}")


# The exponent of a power law; values are at least 1e-6, because S may be zero.
SLOPE = Reduction(_slope, "S grows as {b} along {other}, {a} along {one}", 0.05)
SPREAD = Reduction(_spread, "{a}; in comparison {b}", 0.1, ratio=True)  # the largest value divided by the smallest
# The error at the largest size of a power law in N that is fitted to all other sizes.
MISS_AT_LARGEST = Reduction(_miss, "error at the largest size: {a} {one}, {b} {other}", RESOLUTION)


def differ(measure: Measure, reduce: Reduction, key: str, lower: object, higher: object) -> Judge:
    """The judge that the reduced line of the measure along N is lower with one value of a key than with another.

    higher: the other value, or a tuple of values, each of which is compared.
    """

    def judge(evidence: Evidence) -> Verdict:
        lines, gaps = _lines(evidence, measure, "N", None)
        reduced = [(line.curve, value) for line in lines if (value := reduce.of(line))]
        parts = []
        for (a, low), (b, high) in itertools.product(reduced, reduced):
            if a.fits({key: lower}) and b.fits({key: higher}) and remaining(a, key) == remaining(b, key):
                gain = math.log(high.number / low.number) if reduce.ratio else high.number - low.number
                words = reduce.template.format(a=low.text, b=high.text, one=a.condition[key], other=b.condition[key])
                parts.append(Part(words, gain, abs(gain) >= reduce.clear))
        return weigh(parts, gaps, 1, f"pairs of lines of {measure.name} along N with enough sizes each")

    return judge
