"""Conditions on rows: `KEY OP VALUE`, joined by `and` and `or`; `and` has precedence over `or`."""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scaling_testbed.analysis.rows.names import nearest_first, number_in
from scaling_testbed.errors import ConfigError

ORDERS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
PART = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*$")

Condition = Callable[[Mapping[str, Any]], bool]


def parse(option: str, typed: str, rows: Sequence[Mapping[str, Any]] = ()) -> Condition:
    """A function that tells whether a row matches the typed condition.

    Examples: `model.qk_norm=none`, `flops<5e20`, `n_params>=1e6 and seed!=2 or seed=7`. A row without the key matches
    neither an order nor an equality. true and false are compared without regard to case and quotes. Raises ConfigError,
    which names the option, if the text is no condition, if none of the `rows` has the key, if the key holds numbers and
    the value is not one, or if no row has the value of an equality. A number that no row has may be excluded by `!=`.
    The returned function raises ConfigError if a row holds a text where an order needs a number.
    """
    ways = [[_part(option, part, rows) for part in _split(way, "and")] for way in _split(typed, "or")]
    return lambda row: any(all(part(row) for part in parts) for parts in ways)


def _split(typed: str, word: str) -> list[str]:
    """Split at `word` where a comparison follows it, so that a value may contain the word."""
    return re.split(rf"\s+{word}\s+(?=[^\s<>=!]+\s*[<>=!])", typed, flags=re.IGNORECASE)


def _part(option: str, typed: str, rows: Sequence[Mapping[str, Any]]) -> Condition:
    match = PART.match(typed)
    if not match:
        raise ConfigError(f"{option} {typed!r}: write KEY=VALUE, or one of != < <= > >= between them")
    key, sign, value = match.groups()
    if rows and not any(key in row for row in rows):
        there = nearest_first(key, (name for row in rows for name in row))
        raise ConfigError(f"{option} {typed!r}: no row has a key {key!r}; the keys are {there}")
    values = [row[key] for row in rows if row.get(key) is not None]
    if sign in ORDERS:
        bound = number_in(value)
        if bound is None:
            raise ConfigError(f"{option} {typed!r}: {value!r} is not a number")
        numbers = [number for one in values if (number := number_in(one)) is not None]
        if rows and len(numbers) == len(values) and not any(ORDERS[sign](one, bound) for one in numbers):
            raise ConfigError(
                f"{option} {typed!r}: no row matches {key}{sign}{value}; {key} is {there_are(value, values)}"
            )
        return lambda row: _fits_order(option, typed, key, row.get(key), ORDERS[sign], bound)
    in_numbers = bool(values) and all(map(_is_number, values))
    if in_numbers and number_in(value) is None and value != "null":
        raise ConfigError(f"{option} {typed!r}: {key} holds numbers, but {value!r} is not a number")
    if rows and not any(same(row.get(key), value) for row in rows) and not (sign == "!=" and in_numbers):
        raise ConfigError(f"{option} {typed!r}: no row matches {key}={value}; {key} is {there_are(value, values)}")
    if sign == "!=":
        return lambda row: not same(row.get(key), value)
    return lambda row: same(row.get(key), value)


def there_are(value: str, values: Iterable[Any]) -> str:
    """The distinct values of a key for a message: numbers by size, texts with the most similar to `value` first."""
    distinct = list({text(one): one for one in values}.values())
    if not distinct:
        return "empty in every row"
    if all(map(_is_number, distinct)):
        ordered = sorted(one for one in distinct if one == one)
        shown = ", ".join(map(text, ordered))
        return shown if len(ordered) <= 10 else f"from {text(ordered[0])} to {text(ordered[-1])}"
    return nearest_first(value, map(text, distinct))


def _fits_order(option: str, typed: str, key: str, value: Any, order: Callable[[Any, Any], bool], bound: float) -> bool:
    number = number_in(value)
    if isinstance(value, str) and number is None:  # to skip the row silently would change all results
        raise ConfigError(f"{option} {typed!r}: a row has {value!r} as its {key}, which is not a number")
    return number is not None and order(number, bound)


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and number_in(value) is not None


def text(value: Any) -> str:
    """A configuration value as a user types it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)  # default: e.g. a date of a Parquet file


def same(value: Any, wanted: Any) -> bool:
    """Whether a value equals `wanted`, or one of its elements if it is a tuple.

    Numbers are compared as numbers, also where one is written as a text such as `70M`, and true and false without
    regard to case and quotes.
    """
    if isinstance(wanted, tuple):
        return any(same(value, one) for one in wanted)
    if _is_number(value):
        number = number_in(wanted)
        return number is not None and math.isclose(value, number, rel_tol=1e-9)
    said = wanted if isinstance(wanted, str) else text(wanted)
    if isinstance(value, bool):
        return said.strip(" \"'").lower() == text(value)
    if {text(value), text(value).strip('"')} & {said, said.strip("\"'")}:
        return True
    one, other = (number_in(each) if isinstance(each, str) else None for each in (value, said))
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9) and math.isfinite(one)
