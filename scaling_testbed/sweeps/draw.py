"""Drawn keys of a sweep: random and quasi-random search beside the grid of the axes.

    draw:
      samples: 20
      seed: 0                   # the default
      method: sobol             # the default, or random
      axes:
        optimizer.lr: {log_uniform: [1e-4, 1e-1]}
        optimizer.weight_decay: {log_uniform: [1e-3, 1]}
        schedule.warmup: {int_log_uniform: [10, 1000]}
        batch.sequences: {choice: [16, 32]}

Each sample is one value of every drawn key. It is run with every combination of the axes and seeds. Sample i depends on
`seed`, i and the drawn keys in their alphabetical order alone, so more samples leave the earlier ones as they are.

sobol: points of Sobol's sequence with the direction numbers of Joe and Kuo (2008, SIAM J. Sci. Comput. 30, 2635-2654;
the first dimensions of new-joe-kuo-6.21201), with a digital shift from `seed`. random: independent points. Both come
from whole numbers of 32 bits, and values are computed in decimal numbers, so every machine draws the same.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Context, Decimal, InvalidOperation
from typing import Any

from scaling_testbed.config.words import LARGEST, key_of
from scaling_testbed.errors import ConfigError, check_choice
from scaling_testbed.files import yaml_in
from scaling_testbed.sweeps.columns import check_column, column_slot, spelled

PREFIX = "draw."  # of a part of a draw on the command line
OF_AXES = "axes."
METHODS = ("sobol", "random")
BITS = 32
NO_SAMPLE = 2**BITS - 1  # in the place of a sample, for the shift of all
DIGITS = Context(prec=4)  # of a drawn value that is no whole number
EXACT = Context(prec=28)
# Dimensions 2, 3, ... of Sobol's sequence: the coefficients a of its primitive polynomial, and the first direction
# numbers m, as many as the degree of the polynomial. All numbers m of dimension 1 are 1.
DIRECTIONS = (
    (0, (1,)),
    (1, (1, 3)),
    (1, (1, 3, 1)),
    (2, (1, 1, 1)),
    (1, (1, 1, 3, 3)),
    (4, (1, 3, 5, 13)),
    (2, (1, 1, 5, 5, 17)),
    (4, (1, 1, 5, 5, 5)),
    (7, (1, 1, 7, 11, 19)),
)
SMALLEST = Decimal("1e-100")  # an end is zero or above it, without its sign
EXAMPLE = "optimizer.lr: {log_uniform: [1e-4, 1e-1]}"


@dataclass(frozen=True)
class DrawnAxis:
    """One drawn key: a name in KINDS, and its two ends or its choices, spelled as on the command line."""

    kind: str
    values: tuple[str, ...]

    def value(self, place: Decimal) -> str:
        """The value at a place in (0, 1)."""
        return KINDS[self.kind](place, self.values)

    def __str__(self) -> str:
        return f"{self.kind} {', '.join(self.values) if self.kind == 'choice' else ' to '.join(self.values)}"


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The drawn keys of a sweep. samples: None until a layer or a word gives it."""

    axes: Mapping[str, DrawnAxis] = field(default_factory=dict)
    samples: int | None = None
    seed: int = 0
    method: str = METHODS[0]

    def points(self) -> list[dict[str, str]]:
        """The samples in order, as {key: value}."""
        words = (_sobol if self.method == "sobol" else _random)(self.samples or 0, len(self.axes), self.seed)
        return [
            {key: self.axes[key].value(_place(word)) for key, word in zip(sorted(self.axes), row, strict=True)}
            for row in words
        ]

    def columns(self) -> list[tuple[str, list[str]]]:
        """Each key with values of its kind."""
        return [(key, list(axis.values)) for key, axis in self.axes.items()]

    def check(self) -> None:
        """Raise ConfigError if the number of samples or all axes are missing, or if Sobol's sequence has fewer
        dimensions."""
        if not self.axes:
            raise ConfigError(f"draw has no axes; write draw: {{samples: 20, axes: {{{EXAMPLE}}}}}")
        if self.samples is None:
            raise ConfigError(f"draw has no samples, the number of points of {', '.join(self.axes)}; write samples: 20")
        if self.method == "sobol" and len(self.axes) > len(DIRECTIONS) + 1:
            raise ConfigError(
                f"draw.axes has {len(self.axes)} keys, and method: sobol takes at most {len(DIRECTIONS) + 1}; write "
                "method: random"
            )

    def record(self) -> dict[str, Any]:
        """The draw as sweep.json keeps it, in the form of a sweep file."""
        axes = {key: {axis.kind: list(axis.values)} for key, axis in self.axes.items()}
        return {"samples": self.samples, "seed": self.seed, "method": self.method, "axes": axes}

    def __str__(self) -> str:
        drawn = "; ".join(f"{key} {axis}" for key, axis in self.axes.items())
        return f"{self.samples} samples ({self.method}, seed {self.seed}): {drawn}"


def checked(entry: Any) -> dict[str, Any]:
    """The keys of Draw that one layer of a sweep file sets; an axis is None where the layer leaves it out. Raises
    ConfigError, which names the key."""
    if not isinstance(entry, dict):
        raise ConfigError(f"draw must be a mapping, {{samples: 20, axes: {{{EXAMPLE}}}}}; got {entry!r}")
    if unknown := [key for key in entry if key not in ("samples", "seed", "method", "axes")]:
        raise ConfigError(f"draw has no key {unknown[0]}; it has samples, seed, method, axes")
    found = {key: value for key, value in entry.items() if value is not None}
    for key, least in (("samples", 1), ("seed", 0)):
        if key in found:
            found[key] = _whole(f"draw.{key}", found[key], least)
    if "method" in found:
        check_choice("draw.method", found["method"], METHODS)
    if "axes" in found:
        if not isinstance(found["axes"], dict):
            raise ConfigError(f"draw.axes must be a mapping of keys, {{{EXAMPLE}}}; got {found['axes']!r}")
        found["axes"] = {str(key): _axis(str(key), axis) for key, axis in found["axes"].items()}
    return found


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the keys of Draw that two layers or words set. An axis that is None in `above` is left out. The result is
    empty if neither sets a key, or if no axis is left."""
    axes = {**below.get("axes", {}), **above.get("axes", {})}
    return _unless_empty({**below, **above}, {key: axis for key, axis in axes.items() if axis is not None}, axes)


def without(parts: Mapping[str, Any], slots: Collection[tuple[str, bool]]) -> dict[str, Any]:
    """The keys of Draw without the axes that set one of `slots`. Empty if no axis is left."""
    axes = parts.get("axes", {})
    kept = {key: axis for key, axis in axes.items() if axis is None or column_slot(key, axis.values) not in slots}
    return _unless_empty(parts, kept, axes)


def _unless_empty(parts: Mapping[str, Any], axes: Mapping, before: Mapping) -> dict[str, Any]:
    return {} if before and not axes else {**parts, "axes": axes} if parts else {}


def typed(text: str) -> dict[str, Any] | None:
    """What a word draw.NAME=VALUE or draw.axes.KEY={KIND: [...]} gives, as `checked`; None if it is no such word."""
    name, equals, value = text.partition("=")
    if not name.startswith(PREFIX):
        return None
    if not equals or not value.strip():
        raise ConfigError(f"{text}: write draw.samples=20, or 'draw.axes.optimizer.lr={{log_uniform: [1e-4, 1e-1]}}'")
    name, content = name.removeprefix(PREFIX), yaml_in(value, text)
    if name.startswith(OF_AXES):
        return checked({"axes": {name.removeprefix(OF_AXES): content}})
    if name == "axes" or content is None:
        raise ConfigError(f"{text}: type draw.axes.KEY={{KIND: [...]}} for each key; null leaves a key out")
    return checked({name: content})


def _axis(key: str, entry: Any) -> DrawnAxis | None:
    """Raises ConfigError, one line that names the key, unless the entry is {KIND: [values]} with values of its kind."""
    if entry is None:
        return None
    name = f"draw.axes.{key}"
    if key_of(key) == "seed":
        raise ConfigError(f"{name}: a seed is not drawn; write seeds: [0, 1]")
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise ConfigError(f"{name} must be one of {', '.join(KINDS)}, as in {EXAMPLE}; got {spelled(entry)}")
    ((kind, values),) = entry.items()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}: {kind} takes a list of values; got {spelled(values)}")
    texts = tuple(map(spelled, values))
    if kind != "choice":
        _check_ends(f"{name}: {kind}", kind, texts)
    check_column("draw.axes", key, texts)
    return DrawnAxis(kind, texts)


def _check_ends(name: str, kind: str, texts: tuple[str, ...]) -> None:
    said = f"[{', '.join(texts)}]"
    try:
        ends = [Decimal(text) for text in texts]
    except InvalidOperation:
        ends = []
    if len(ends) != 2 or not all(map(_is_usual, ends)) or not ends[0] < ends[1]:
        raise ConfigError(f"{name} takes two numbers [LOW, HIGH] with LOW < HIGH; got {said}")
    if "log" in kind and ends[0] <= 0:
        raise ConfigError(f"{name} takes numbers above zero; got {said}")
    if kind.startswith("int") and any(end != end.to_integral_value() for end in ends):
        raise ConfigError(f"{name} takes whole numbers; got {said}")


def _is_usual(end: Decimal) -> bool:
    """Whether a number is finite, and neither so large nor so small that nobody means it."""
    return end.is_finite() and (end == 0 or SMALLEST < abs(end) < LARGEST)


def _whole(name: str, value: Any, least: int) -> int:
    text = spelled(value)
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) < NO_SAMPLE):
        raise ConfigError(f"{name} must be a whole number from {least} to {NO_SAMPLE - 1}; got {text}")
    return int(text)


def _place(word: int) -> Decimal:
    """The middle of the interval in (0, 1) that a word of BITS bits stands for."""
    return EXACT.divide(Decimal(2 * word + 1), Decimal(2 ** (BITS + 1)))


def _between(place: Decimal, low: Decimal, high: Decimal) -> Decimal:
    return EXACT.fma(place, EXACT.subtract(high, low), low)


def _log_between(place: Decimal, low: Decimal, high: Decimal) -> Decimal:
    return EXACT.multiply(low, EXACT.power(EXACT.divide(high, low), place))


Between = Callable[[Decimal, Decimal, Decimal], Decimal]


def _number(between: Between, place: Decimal, ends: tuple[str, ...]) -> str:
    low, high = map(Decimal, ends)
    value = DIGITS.plus(between(place, low, high))
    if not low <= value <= high:  # by its rounding
        return ends[0] if value < low else ends[1]
    return f"{float(value):.{DIGITS.prec}g}"


def _whole_number(between: Between, place: Decimal, ends: tuple[str, ...]) -> str:
    """A whole number; both ends are among them."""
    low, high = map(Decimal, ends)
    value = between(place, low, high + 1).to_integral_value(ROUND_FLOOR)
    return str(int(min(max(value, low), high)))


def _chosen(place: Decimal, choices: tuple[str, ...]) -> str:
    return choices[int(place * len(choices))]


# Kind of a drawn key -> its value at a place in (0, 1), from its two ends or its choices.
KINDS: dict[str, Callable[[Decimal, tuple[str, ...]], str]] = {
    "uniform": functools.partial(_number, _between),
    "log_uniform": functools.partial(_number, _log_between),
    "int_uniform": functools.partial(_whole_number, _between),
    "int_log_uniform": functools.partial(_whole_number, _log_between),
    "choice": _chosen,
}


def _random(samples: int, dimensions: int, seed: int) -> list[list[int]]:
    return [_words(dimensions, seed, sample) for sample in range(samples)]


def _words(number: int, seed: int, sample: int) -> list[int]:
    """Random words of BITS bits; seed and sample have as many. The stream of a bit generator is the same in every
    version of NumPy."""
    import numpy as np

    words = np.random.Philox(np.random.SeedSequence((seed, sample))).random_raw(number)
    return [int(word) >> (64 - BITS) for word in words]


def _sobol(samples: int, dimensions: int, seed: int) -> list[list[int]]:
    """Points of Sobol's sequence in the order of the Gray code; each dimension is xored with a word from the seed."""
    directions = [_directions(dimension) for dimension in range(dimensions)]
    point, found = _words(dimensions, seed, NO_SAMPLE), []
    for sample in range(samples):
        found.append(list(point))
        zero = (~sample & (sample + 1)).bit_length() - 1  # the lowest bit of `sample` that is zero
        point = [word ^ own[zero] for word, own in zip(point, directions, strict=True)]
    return found


def _directions(dimension: int) -> list[int]:
    """The direction numbers of a dimension from 0 on, as words: m_k 2^(BITS - k) for k = 1, 2, ..."""
    if dimension == 0:
        return [1 << (BITS - k) for k in range(1, BITS + 1)]
    coefficients, first = DIRECTIONS[dimension - 1]
    degree, numbers = len(first), list(first)
    for k in range(degree, BITS):
        number = numbers[k - degree] ^ (numbers[k - degree] << degree)
        for i in range(1, degree):
            if coefficients >> (degree - 1 - i) & 1:
                number ^= numbers[k - i] << i
        numbers.append(number)
    return [number << (BITS - k) for k, number in enumerate(numbers, 1)]
