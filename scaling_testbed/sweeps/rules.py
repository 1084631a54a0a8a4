"""Rules of a sweep: keys whose value is computed for each run from its size and length.

    rules:
      optimizer.lr: 0.0047*(n_params/108e6)**(-1/3)
      batch.sequences: 8*round((n_tokens/1e9)**0.5)
      schedule.warmup_tokens: n_params

A rule is arithmetic: numbers, + - * / **, brackets, the names in NAMES and the functions in FUNCTIONS. A value is
rounded to six significant digits, and that of a key of whole numbers to the nearest one (halves upwards), so that it is
the same on every machine. `8*round(x/8)` is the nearest multiple of 8. Rules are evaluated when a sweep is planned, in
the order in which they need each other. A run has the values, and its run_id depends on the values alone.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaling_testbed.analysis.rows.expressions import OPERATORS
from scaling_testbed.config.budget import CONVENTIONS
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.compute import pruned_of
from scaling_testbed.config.run import RunConfig
from scaling_testbed.config.words import key_of
from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import count_params

PREFIX = "rules."  # of a rule on the command line, rules.optimizer.lr=EXPRESSION
LONGEST = 500  # characters: a longer expression is none that a person wrote
SIZE, LENGTH = ("model.", "tokenizer.", "data."), ("batch.",)
# Name -> the keys that it depends on. n_tokens is what the budget asks for, before it is rounded to whole steps, and
# also depends on the batch where the budget is given in steps.
NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CONVENTIONS, SIZE),
    **dict.fromkeys(("d_model", "n_layers"), ("model.",)),
    "n_tokens": (*SIZE, "budget.", "interventions."),
    "batch_tokens": LENGTH,
    "sequence_length": ("batch.sequence_length",),
    "steps": (*SIZE, *LENGTH, "budget.", "interventions."),
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "log": math.log,
    "round": lambda value: float(math.floor(_settled(value) + 0.5)),
}


def checked(rules: Any) -> dict[str, str | None]:
    """The rules of a layer of a sweep file: key -> expression, or None, which removes the rule of an earlier layer.
    Raises ConfigError, which names the rule."""
    if not isinstance(rules, dict):
        raise ConfigError("rules must be a mapping of keys to expressions, {optimizer.lr: 0.01*(n_params/1e6)**(-1/3)}")
    for key, text in rules.items():
        if text is not None:
            names_in(str(key), text)
    return {str(key): text for key, text in rules.items()}


def typed(text: str) -> tuple[str, str | None] | None:
    """The key and the expression of a word rules.KEY=EXPRESSION, None for null; None if the word is no rule. Raises
    ConfigError for an expression that cannot be read."""
    key, equals, expression = text.partition("=")
    if not key.startswith(PREFIX):
        return None
    if not equals or not expression.strip():
        raise ConfigError(f"{text}: write rules.KEY=EXPRESSION, or rules.KEY=null to leave the rule out")
    ((name, rule),) = checked({key.removeprefix(PREFIX): None if expression.strip() == "null" else expression}).items()
    return name, rule


def names_in(key: str, text: str) -> set[str]:
    """The names that an expression uses. Raises ConfigError, which names the rule, if it is no arithmetic of NAMES."""
    found = set()
    for node in ast.walk(_parsed(key, text)):
        if isinstance(node, ast.Name) and node.id not in FUNCTIONS:
            found.add(node.id)
    return found


def _parsed(key: str, text: Any) -> ast.expr:
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ConfigError(
            f"{PREFIX}{key} must be an expression of at most {LONGEST} characters; got {str(text)[:60]!r}"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"{PREFIX}{key}: cannot read {text!r}; write arithmetic such as {_EXAMPLE}") from None
    _check(key, tree)
    return tree


_EXAMPLE = "0.01*(n_params/1e6)**(-1/3)"


def _check(key: str, node: ast.expr) -> None:
    """Raise ConfigError unless a node and all inside it are arithmetic."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        parts = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        parts = [node.operand]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in FUNCTIONS:
            raise ConfigError(f"{PREFIX}{key}: there is no function {node.func.id}; there are {', '.join(FUNCTIONS)}")
        parts = node.args
        least, most = (2, LONGEST) if node.func.id in ("min", "max") else (1, 1)
        if not least <= len(parts) <= most:
            many = "two values or more" if least == 2 else "one value"
            raise ConfigError(f"{PREFIX}{key}: {ast.unparse(node)}: {node.func.id} takes {many}")
    elif isinstance(node, ast.Name):
        if node.id not in NAMES:
            raise ConfigError(f"{PREFIX}{key}: there is no name {node.id}; there are {', '.join(NAMES)}")
        parts = []
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        parts = []
    else:
        raise ConfigError(f"{PREFIX}{key}: {ast.unparse(node)} is no arithmetic; write e.g. {_EXAMPLE}")
    for part in parts:
        _check(key, part)


def with_values(
    rules: Mapping[str, str], lists: Sequence[list[str]], resolved: Callable[[RunConfig], ModelConfig]
) -> list[list[str]]:
    """The overrides of each run, followed by those that its rules give. resolved: the resolved model of a run.

    Raises ConfigError for rules that need each other, and for a rule without a finite value.
    """
    found = [list(overrides) for overrides in lists]
    left = [dict(rules) for _ in lists]
    while any(left):
        for overrides, waiting, run in zip(found, left, compose_many(found), strict=True):
            blocked = {key: _blocker(key, waiting, run) for key in waiting}
            ready = [key for key, blocker in blocked.items() if blocker is None]
            if waiting and not ready:
                raise ConfigError(_circle({key: blocker for key, blocker in blocked.items() if blocker}))
            names = _names(run, resolved(run)) if ready else {}
            for key in ready:
                overrides.append(f"{key}={_spelled(key, waiting.pop(key), names, run)}")
    return found


def _circle(blocked: Mapping[str, tuple[str, str]]) -> str:
    """The message about rules of which each waits for another one, or for itself."""
    keys, seen = {key_of(key): key for key in blocked}, list[str]()
    key = next(iter(blocked))
    while key not in seen:
        seen.append(key)
        key = keys[blocked[key][1]]
    name, other = blocked[key]
    waits = " itself" if other == key_of(key) else f", whose rule waits for that of {key_of(key)}"
    return f"{PREFIX}{key} needs {name}, which depends on {other}{waits}; leave {name} out of it"


def _blocker(key: str, waiting: Mapping[str, str], run: RunConfig) -> tuple[str, str] | None:
    """A name that a rule uses, and the key with a rule that waits on which this name depends; None without one."""
    in_steps = run.budget.steps is not None or any(key_of(other) == "budget.steps" for other in waiting)
    for name in sorted(names_in(key, waiting[key])):
        prefixes = NAMES[name] + (LENGTH if name == "n_tokens" and in_steps else ())
        for other in waiting:
            if key_of(other).startswith(prefixes):
                return name, key_of(other)
    return None


def _names(run: RunConfig, model: ModelConfig) -> dict[str, float]:
    """The value of each name."""
    counts, batch, pruned = count_params(model), run.batch.tokens, pruned_of(run, model)
    return {
        **{name: float(getattr(counts, name)) for name in CONVENTIONS},
        "d_model": float(model.d_model),
        "n_layers": float(model.n_layers),
        "n_tokens": run.budget.exact_tokens(counts, batch, pruned),
        "batch_tokens": float(batch),
        "sequence_length": float(run.batch.sequence_length),
        "steps": float(run.budget.resolve_steps(counts, batch, pruned)),
    }


def _spelled(key: str, text: str, names: Mapping[str, float], run: RunConfig) -> str:
    """The value of a rule, as it is typed after `key=`."""
    try:
        value = _value(_parsed(key, text), names)
        fine = isinstance(value, float) and math.isfinite(value)
    except (ArithmeticError, ValueError):
        fine = False
    if not fine:
        used = ", ".join(f"{name}={names[name]:g}" for name in sorted(names_in(key, text)))
        raise ConfigError(f"{PREFIX}{key}: {text} has no finite value{f' at {used}' if used else ''}")
    settled = _settled(value)
    return str(math.floor(settled + 0.5)) if _is_whole(key_of(key), run) else f"{settled:.6g}"


def _value(node: ast.expr, names: Mapping[str, float]) -> float:
    """The value of an expression that `_check` has passed. All numbers are floats, so that no power takes long."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.UnaryOp):
        return OPERATORS[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return FUNCTIONS[node.func.id](*(_value(part, names) for part in node.args))
    if isinstance(node, ast.Name):
        return names[node.id]
    assert isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
    return float(node.value)


def _settled(value: float) -> float:
    """A value to twelve digits: mathematical libraries differ in the last ones, which must not decide a rounding."""
    return float(f"{value:.12g}")


def _is_whole(key: str, run: RunConfig) -> bool:
    """Whether a key takes whole numbers only, by the type of its field."""
    place: Any = run
    *groups, name = key.split(".")
    for group in groups:
        place = getattr(place, group, None)
    fields = dataclasses.fields(place) if dataclasses.is_dataclass(place) else ()
    kinds = {word for field in fields if field.name == name for word in re.findall(r"\w+", str(field.type))}
    return "int" in kinds and "float" not in kinds
