"""Conditions on rows: `KEY OP VALUE`, joined by `and` and `or`; `and` has precedence over `or`."""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaling_testbed.errors import ConfigError

ORDERS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
PART = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*$")

Condition = Callable[[Mapping[str, Any]], bool]


def parse(option: str, typed: str, rows: Sequence[Mapping[str, Any]] = ()) -> Condition:
    """A function that tells whether a row matches the typed condition.

    Examples: `model.qk_norm=none`, `flops<5e20`, `n_params>=1e6 and seed!=2 or seed=7`. A row without the key matches
    neither an order nor an equality. Raises ConfigError, which names the option, if the text is no condition, if none
    of the `rows` has the key, or if the key holds numbers and the value is not one. The returned function raises
    ConfigError if a row holds a text where an order needs a number.
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
        raise ConfigError(f"{option} {typed!r}: no row has a key {key!r}")
    if sign in ORDERS:
        bound = _read(value)
        if isinstance(bound, str):
            raise ConfigError(f"{option} {typed!r}: {value!r} is not a number")
        return lambda row: _fits_order(option, typed, key, row.get(key), ORDERS[sign], bound)
    values = [row[key] for row in rows if row.get(key) is not None]
    if values and all(map(_is_number, values)) and not _is_number(_read(value)) and value != "null":
        raise ConfigError(f"{option} {typed!r}: {key} holds numbers, but {value!r} is not a number")
    if sign == "!=":
        return lambda row: not same(row.get(key), value)
    return lambda row: same(row.get(key), value)


def _fits_order(option: str, typed: str, key: str, value: Any, order: Callable[[Any, Any], bool], bound: float) -> bool:
    if isinstance(value, str):  # such as 1.3B: to skip the row silently would change all results
        raise ConfigError(f"{option} {typed!r}: a row has {value!r} as its {key}, which is not a number")
    return _is_number(value) and order(value, bound)


def _read(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A configuration value as a user types it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)  # default: e.g. a date of a Parquet file


def same(value: Any, wanted: Any) -> bool:
    """Whether a value equals `wanted`, or one of its elements if it is a tuple. Numbers are compared as numbers."""
    if isinstance(wanted, tuple):
        return any(same(value, one) for one in wanted)
    if _is_number(value):
        try:
            return math.isclose(value, float(wanted), rel_tol=1e-9)
        except (TypeError, ValueError):
            return False
    return text(value) == (wanted if isinstance(wanted, str) else text(wanted))
