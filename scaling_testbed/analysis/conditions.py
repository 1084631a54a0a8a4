"""Conditions on rows as they are typed: `KEY OP VALUE`, joined by `and` and `or`; `and` binds closer."""

import json
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from scaling_testbed.errors import ConfigError

ORDERS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
PART = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*$")

Condition = Callable[[Mapping[str, Any]], bool]


def parse(option: str, typed: str, known: Collection[str] | None = None) -> Condition:
    """Whether a row fits: `model.qk_norm=none`, `flops<5e20`, `n_params>=1e6 and seed!=2 or seed=7`. A row without the
    key does not fit an order, nor an equality. Raises ConfigError, naming the option, for what is no condition and for
    a key that is not among those `known`; the condition itself does for a text where an order needs a number."""
    ways = [
        [_part(option, part, known) for part in re.split(r"\s+and\s+", way)] for way in re.split(r"\s+or\s+", typed)
    ]
    return lambda row: any(all(part(row) for part in parts) for parts in ways)


def _part(option: str, typed: str, known: Collection[str] | None) -> Condition:
    match = PART.match(typed)
    if not match:
        raise ConfigError(f"{option} {typed!r}: write KEY=VALUE, or one of != < <= > >= between them")
    key, sign, value = match.groups()
    if known is not None and key not in known:
        raise ConfigError(f"{option} {typed!r}: no row has a key {key!r}")
    if sign in ORDERS:
        try:
            bound = float(value)
        except ValueError:
            raise ConfigError(f"{option} {typed!r}: {value!r} is no number to compare with") from None
        return lambda row: _fits_order(option, typed, key, row.get(key), ORDERS[sign], bound)
    if sign == "!=":
        return lambda row: not same(row.get(key), value)
    return lambda row: same(row.get(key), value)


def _fits_order(option: str, typed: str, key: str, value: Any, order: Callable[[Any, Any], bool], bound: float) -> bool:
    if isinstance(value, str):  # such as 1.3B: left out without a word, it would change every number after it
        raise ConfigError(f"{option} {typed!r}: a row has {value!r} as its {key}, which is no number to compare")
    return _is_number(value) and order(value, bound)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A configuration value as a person types it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def same(value: Any, wanted: Any) -> bool:
    """Whether a value is `wanted`, or one of it where that is a tuple; numbers are compared as numbers."""
    if isinstance(wanted, tuple):
        return any(same(value, one) for one in wanted)
    if _is_number(value):
        try:
            return math.isclose(value, float(wanted), rel_tol=1e-9)
        except (TypeError, ValueError):
            return False
    return text(value) == (wanted if isinstance(wanted, str) else text(wanted))
