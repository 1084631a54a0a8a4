"""New columns of a table by arithmetic over its columns: `gap=loss_small-loss_large`.

An expression has numbers, + - * / **, brackets, names of columns and the functions in FUNCTIONS. It is evaluated over
all rows at once, so that a rank can be a part of it. No code is executed.
"""

import ast
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scaling_testbed.analysis.rows.names import nearest_first, number_in
from scaling_testbed.errors import ConfigError

LONGEST = 2000  # characters
OPERATORS: dict[type[ast.operator] | type[ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def rank(values: Any) -> np.ndarray:
    """The share of rows with a smaller value, plus half of the others with the same one: from 0 to 1."""
    values = np.asarray(values, np.float64)
    low, high = (np.searchsorted(np.sort(values), values, side=side) for side in ("left", "right"))
    return (low + (high - 1)) / 2 / max(1, len(values) - 1)


def ordered(*values: Any) -> Any:
    """The share of pairs of the values, in the order in which they are given, of which the later is smaller; an equal
    pair counts one half. With the losses of models from the weakest to the strongest it is the score of PreSelect
    (Shum et al. 2025, arXiv 2503.00808): how well a document tells the models apart."""
    pairs = list(itertools.combinations(values, 2))
    return sum((np.sign(np.asarray(a) - np.asarray(b)) + 1) / 2 for a, b in pairs) / len(pairs)


def draw(values: Any) -> np.ndarray:
    """A number in [0, 1) for each value, by the hash of its bits (the finaliser of splitmix64, Steele, Lea and Flood,
    OOPSLA 2014): draw(document) < 0.5 is a random half, the same on every machine."""
    x = np.ascontiguousarray(np.asarray(values, np.float64) + 0.0).view(np.uint64)  # + 0: -0.0 is 0.0
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


FUNCTIONS: Mapping[str, tuple[Callable[..., Any], int, int | None]] = {  # name -> function, fewest and most values
    "rank": (rank, 1, 1),
    "ordered": (ordered, 2, None),
    "draw": (draw, 1, 1),
    "log": (np.log, 1, 1),
    "exp": (np.exp, 1, 1),
    "sqrt": (np.sqrt, 1, 1),
    "abs": (np.abs, 1, 1),
    "min": (lambda *values: np.minimum.reduce(np.broadcast_arrays(*values)), 2, None),
    "max": (lambda *values: np.maximum.reduce(np.broadcast_arrays(*values)), 2, None),
}


def with_columns(option: str, typed: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a column for each NAME=EXPRESSION of `typed`, in this order; a later one may use an earlier one.

    Raises ConfigError, which names the option, for what is no expression, for an unknown column or function, for a
    column that is there already or has a cell without a number, and for a result that is not finite.
    """
    found = [dict(row) for row in rows]
    for word in typed:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ConfigError(f"{option} {word!r}: write NAME=EXPRESSION, such as gap=loss_small-loss_large")
        if any(name in row for row in found):
            raise ConfigError(f"{option} {word!r}: there is a column {name} already; choose another name")
        try:
            if len(text) > LONGEST:
                raise ValueError
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ConfigError(f"{option} {word!r}: cannot read the expression {text[:60]!r}") from None
        with np.errstate(all="ignore"):
            values = np.broadcast_to(_value(f"{option} {word!r}", tree, found), len(found))
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ConfigError(f"{option} {word!r}: the value of row {place + 1} is not finite")
        for row, value in zip(found, values.tolist(), strict=True):
            row[name] = value
    return found


def _value(what: str, node: ast.expr, rows: Sequence[Mapping[str, Any]]) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(what, node.left, rows), _value(what, node.right, rows))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(what, node.operand, rows))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in FUNCTIONS:
            raise ConfigError(f"{what}: there is no function {node.func.id}; there are {', '.join(FUNCTIONS)}")
        function, fewest, most = FUNCTIONS[node.func.id]
        if len(node.args) < fewest or (most is not None and len(node.args) > most):
            many = f"{fewest} values or more" if most is None else "one value"
            raise ConfigError(f"{what}: {node.func.id} takes {many}; got {len(node.args)}")
        return function(*(np.broadcast_to(_value(what, part, rows), len(rows)) for part in node.args))
    if isinstance(node, ast.Name):
        return _column(what, node.id, rows)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return np.float64(node.value)
    raise ConfigError(f"{what}: {ast.unparse(node)[:60]} is no arithmetic over columns")


def _column(what: str, name: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    if not any(name in row for row in rows):
        known = nearest_first(name, (key for row in rows for key in row))
        raise ConfigError(f"{what}: no row has a column {name!r}; the columns are {known}")
    values = [number_in(row.get(name)) for row in rows]
    if None in values:
        raise ConfigError(f"{what}: row {values.index(None) + 1} has no number as its {name}")
    return np.array(values, np.float64)
