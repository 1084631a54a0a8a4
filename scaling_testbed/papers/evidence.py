"""How a claim is judged: the rules, once for all.

A judge is a function from the evidence to a verdict and its number.

- What is planned and missing, or withheld, gives "cannot tell" with its name, and so does a claim about sizes where
  there is one size only.
- A difference counts where the seeds' values do not overlap; with one seed where it is at least RESOLUTION.
- "agrees" needs at least half of the comparisons to count, and none of them the other way; "disagrees" the reverse.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves import lr_sensitivity
from scaling_testbed.analysis.curves.grouping import Curve, curves, grouping_keys
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity
from scaling_testbed.analysis.figures.drawing import compact
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import Row, Study

AGREES, DISAGREES, CANNOT_TELL = "agrees", "disagrees", "cannot tell"
RESOLUTION = 0.01  # nats: what one seed at nano scale cannot resolve
SAME_N = 0.15  # of ln N: widths come in steps, so that two shapes are rarely of one size
FACTOR = 1.1  # the same for quantities compared by their ratio

Verdict = tuple[str, str]
Judge = Callable[["Evidence"], tuple[str, str]]


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

    def having(self, where: dict) -> list[Curve]:
        return [curve for curve in self.curves if curve.fits(where)]

    def scored(self, where: dict) -> list[Sensitivity]:
        return [one for one in self.sensitivities if one.curve.fits(where)]

    def trace(self, row: Row, name: str) -> list[tuple[int, float]]:
        """(step, value) of what a run recorded under a name."""
        return [(step["step"], step[name]) for step in self.study.trace(row) if step.get(name) is not None]


@dataclass(frozen=True)
class Part:
    """One comparison. gain: positive as the paper says. clear: whether it counts."""

    words: str
    gain: float
    clear: bool


def weigh(
    parts: Sequence[Part], gaps: Sequence[str] = (), least: int = 1, unit: str = "sizes", contrary: bool = False
) -> Verdict:
    """The verdict of comparisons. gaps: what is missing. least: how many comparisons it takes. contrary: the claim is
    that there is no such gain, so that too close to tell speaks for it."""
    words = _few([part.words for part in parts], 8)
    if gaps:
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


def pairs(found: Sequence, key: str, one, other, curve_of, by_n: bool = False) -> Iterator[tuple]:
    """What has `one` for a key beside what has `other` and is else the same, at the same shape; by_n: at the same
    number of parameters to within 15 %, and of another shape. curve_of: item -> its curve."""
    for a in found:
        for b in found:
            mine, yours = curve_of(a), curve_of(b)
            near = abs(math.log(mine.n_params / yours.n_params)) < SAME_N
            alike = near and mine.shape != yours.shape if by_n else mine.shape == yours.shape
            values = mine.fits({key: one}) and yours.fits({key: other})
            if alike and values and remaining(mine, key) == remaining(yours, key):
                yield a, b


def by_size_without(key: str, found: Sequence, curve_of) -> list[list]:
    """What differs in a key alone, in lists of one shape and one remaining condition."""
    groups: dict[tuple, list] = {}
    for one in found:
        groups.setdefault((curve_of(one).shape, remaining(curve_of(one), key)), []).append(one)
    return list(groups.values())


def by_condition(found: Sequence[Sensitivity]) -> dict[str, list[Sensitivity]]:
    """Sensitivities of one condition each, from the smallest to the largest size."""
    groups: dict[str, list[Sensitivity]] = {}
    for one in sorted(found, key=lambda one: one.curve.n_params):
        groups.setdefault(one.curve.label, []).append(one)
    return groups


def remaining(curve: Curve, key: str) -> tuple:
    """Its condition without a key."""
    return tuple(item for item in curve.condition.items() if item[0] != key)


def size_name(curve: Curve) -> str:
    """N for a sentence."""
    return f"N={compact(curve.n_params)}"


def _few(names: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(names))
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def apart(a: Sequence[float], b: Sequence[float], floor: float = RESOLUTION) -> bool:
    """Whether two groups of seeds differ: their ranges do not overlap; with one seed, by at least `floor`."""
    if len(a) > 1 and len(b) > 1:
        return max(a) < min(b) or max(b) < min(a)
    return abs(float(np.mean(a) - np.mean(b))) >= floor


def text_of(value) -> str:
    """A wanted value in a sentence."""
    return "/".join(map(text, value)) if isinstance(value, tuple) else text(value)
