"""Judges of a measure along the size N, the learning rate or a key, with all other settings equal.

A trend is the slope of a straight line, by least squares for each seed, in the logarithm of N, of the rate or of the
key (linear, if the key has values of zero). Along N and the rate it is the change for a factor of ten, along a key that
from its smallest value to its largest.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.figures.words import in_sentence, setting
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import number
from scaling_testbed.papers.combinators import (
    Settings,
    alternatives,
    among,
    by_keys,
    missing_of,
    of_varying,
    remaining,
    said,
    up_to_measured,
    values_at,
    varying,
)
from scaling_testbed.papers.effects import (
    AT_MOST,
    DIFFERENCE,
    EQUALITY,
    Asked,
    Question,
    Terms,
    each_of,
    farther,
    pooled,
)
from scaling_testbed.papers.measures import SIZE, Evidence, Measure, Place, Value, critical_rates, size_name
from scaling_testbed.papers.paper import Judge

RISES, FALLS, STEADY = 1, -1, 0


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
    key: str

    @property
    def said(self) -> str:
        shown = ", ".join(f"{value.text} at {place}" for _, place, value in self.points)
        shown += critical_rates([value for _, _, value in self.points])
        return f"{self.name}: {shown}" if self.name else shown

    @property
    def x(self) -> np.ndarray:
        x = np.array([point[0] for point in self.points], float)
        return np.log(x) if (x > 0).all() else x

    def trend(self, sign: float = 1.0) -> Terms:
        """The slope as a sum of the values with coefficients."""
        x = self.x - self.x.mean()
        reach = math.log(10) if self.key in ("N", "lr") else float(x[-1] - x[0])
        factors = sign * reach * x / float(x @ x)
        return [(float(factor), value) for factor, (_, _, value) in zip(factors, self.points, strict=True)]


def _lines(evidence: Evidence, measure: Measure, key: str, where: Settings | None) -> tuple[list[Line], list[str]]:
    """The lines of a measure, and the missing runs.

    For a measure at each rate, only runs up to the largest measured size count as missing: larger sizes may be planned
    only to be predicted.
    """
    found: dict[tuple[object, ...], list[tuple[float, str, Value, Place]]] = {}
    scope = sorted(evidence.having(where), key=lambda curve: curve.n_params if key == "N" else 0)
    if key == "N":
        scope = [curve for curve in scope if curve.n_params]  # a model without layers has N = 0, so no ln N
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
    vary = varying(remaining(curve, key) for curve in scope)
    lines = []
    for points in (sorted(points, key=lambda point: point[0]) for points in found.values() if len(points) > 1):
        place = points[0][3]
        names = [] if key == "N" else [size_name(place.curve)]
        names += [f"lr={place.lr:g}"] if place.lr is not None and key != "lr" else []
        name = ", ".join([*names, *of_varying(place.curve, vary)])
        shown = [point[:3] for point in points]
        if key not in ("N", "lr"):  # the first one says what is counted
            shown[0] = (shown[0][0], setting(key, shown[0][1]), shown[0][2])
        if points[0][0] < points[-1][0]:
            lines.append(Line(measure, name, place.curve, shown, key))
    return lines, missing_of(evidence, measure, scope if measure.level == SIZE else up_to_measured(scope))


def along(
    measure: Measure,
    key: str,
    way: int,
    where: Settings | None = None,
    margin: float | None = None,
    factor: float | None = None,
    contrary: bool = False,
) -> Judge:
    """The judge that the measure RISES, FALLS or is STEADY along N, the rate (lr) or a key, in the mean over lines.

    margin, or factor for a ratio: the least trend that counts, where it is not the declared margin. contrary: the claim
    is that there is no such rise or fall.
    """

    def ask(evidence: Evidence) -> Asked:
        lines, gaps = _lines(evidence, measure, key, where)
        effects, remarks = pooled([(line.said, line.trend(way or 1)) for line in lines], measure.ratio)
        return Asked(effects, gaps, remarks)

    per = f"per tenfold {in_sentence(key)}" if key in ("N", "lr") else ""
    reach = per or f"from the least {in_sentence(key)} to the greatest"
    estimand = f"{'fall' if way == FALLS else 'change' if way == STEADY else 'rise'} of {measure.name} {reach}"
    kind = EQUALITY if way == STEADY else AT_MOST if contrary else DIFFERENCE
    least = math.log(factor) if factor else margin
    return Question(estimand, measure.margin, ask, kind, least, measure.ratio, per=per, scope=among(where))


def more_at_largest(measure: Measure, key: str, way: int) -> Judge:
    """The judge that the trend along a key is stronger at the largest size than at the smallest."""

    def ask(evidence: Evidence) -> Asked:
        lines, gaps = _lines(evidence, measure, key, None)
        by_size = sorted(lines, key=lambda line: line.curve.n_params)
        if gaps or len(by_size) < 2 or by_size[0].curve.n_params == by_size[-1].curve.n_params:
            return Asked(gaps=gaps)
        small, large = by_size[0], by_size[-1]
        effects, remarks = pooled(
            [(f"{small.said}; {large.said}", [*large.trend(way), *small.trend(-way)])], measure.ratio
        )
        return Asked(effects, (), remarks)

    way_of = "fall" if way == FALLS else "rise"
    estimand = f"{way_of} of {measure.name} along the {in_sentence(key)} at the largest size, less that at the smallest"
    return Question(estimand, measure.margin, ask, ratio=measure.ratio)


def _trend(line: Line) -> Terms:
    return line.trend()


def _miss(line: Line) -> Terms | None:
    """The signed error at the largest size of a power law in N that is fitted to all other sizes, for each seed."""
    values = [value for _, _, value in line.points]
    if len(line.points) < 4 or any(value.censored for value in values):
        return None
    errors = {}
    for seed in sorted(set.intersection(*(set(value.by_seed) for value in values))):
        y = np.log([value.by_seed[seed] for value in values])
        errors[seed] = math.exp(np.polyval(np.polyfit(line.x[:-1], y[:-1], 1), line.x[-1])) - math.exp(y[-1])
    return [(1.0, Value(errors))] if errors else None


TREND, MISS_AT_LARGEST = _trend, _miss


def _less(high: Terms, low: Terms) -> Terms:
    return [*high, *((-factor, value) for factor, value in low)]


def _farther(high: Terms, low: Terms) -> Terms:
    (_, one), (_, other) = *high, *low
    return farther(one, other)


def differ(measure: Measure, reduce: Callable[[Line], Terms | None], key: str, lower: object, higher: object) -> Judge:
    """The judge that the TREND along N, or MISS_AT_LARGEST, is lower with one value of a key than with another.

    higher: the other value, or several, each of which must be higher. Errors are compared without their sign.
    """

    def ask(evidence: Evidence) -> Asked:
        lines, gaps = _lines(evidence, measure, "N", None)
        found: dict[str, list[tuple[str, Terms]]] = {}
        for value in (one[key] for one in alternatives({key: higher}, evidence.curves)):
            compared = [
                (a, b)
                for a, b in itertools.product(lines, lines)
                if a.curve.fits({key: lower})
                and b.curve.fits({key: value})
                and remaining(a.curve, key) == remaining(b.curve, key)
            ]
            ways = f"{setting(key, said(value))} beside {said(lower)}"
            names = [f"{what} with {ways} ({a.said}; {b.said})" for a, b in compared]
            for name, (a, b) in zip(names, compared, strict=True):
                low, high = reduce(a), reduce(b)
                found[name] = [(f"{a.said}; {b.said}", less(high, low))] if low and high else []
            if not names:
                found[f"{what} with {ways}"] = []
        return each_of(found, measure.ratio, gaps)

    less = _less if reduce is TREND else _farther
    what = (
        f"{'trend per tenfold N' if reduce is TREND else 'error at the largest size of a power law'} of {measure.name}"
    )
    over = "over" if measure.ratio else "less"
    estimand = f"{what} with {setting(key, said(higher))} {over} that with {said(lower)}"
    per = "per tenfold N" if reduce is TREND else ""
    scope = by_keys({key: lower}, {key: higher})
    return Question(estimand, measure.margin, ask, ratio=measure.ratio, per=per, scope=scope)
