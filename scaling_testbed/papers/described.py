"""How a judge judges, in one line of text that a declaration records.

A judge can say it itself, as a text `described`. Of any other one it is its estimand, if it has one, its name and the
plain values that it was made with. The line holds no address in memory, so it is the same in another process. Defaults
are among the values: a claim is judged otherwise when they change.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from scaling_testbed.analysis.rows.conditions import text

Made = ParamSpec("Made")


def described(judge: Any) -> str:
    """How a judge judges."""
    said = getattr(judge, "described", None)
    parts = [said] if isinstance(said, str) else [getattr(judge, "estimand", ""), in_words(judge)]
    return " ".join("; ".join(filter(None, parts)).split())


def in_words(value: Any) -> str:
    """A setting, a function or an object in words: its name and the values that it was made with."""
    if isinstance(said := getattr(value, "described", None), str):
        return said
    if _is_plain(value):
        return _plain(value)
    if isinstance(value, (list, tuple)):
        return "/".join(map(in_words, value))
    if isinstance(value, Mapping):
        return _settings(value)
    if isinstance(value, functools.partial):
        return _call(in_words(value.func), {str(place): one for place, one in enumerate(value.args)} | value.keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _call(_name(type(value)), {one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    if inspect.isfunction(value):
        return _call(_name(value), _only_plain(inspect.getclosurevars(value).nonlocals))
    if hasattr(value, "__qualname__"):
        return _name(value)
    return _call(_name(type(value)), _only_plain(getattr(value, "__dict__", {})))


@dataclasses.dataclass(frozen=True)
class Described:
    """A function of the evidence, and how it was made in words."""

    described: str
    made: Callable[..., Any]

    def __call__(self, evidence: Any) -> Any:
        return self.made(evidence)


def by_its_call(make: Callable[Made, Callable[..., Any]]) -> Callable[Made, Callable[..., Any]]:
    """Decorator of a function that makes functions of the evidence: each is described by the call that made it."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: Made.args, **kwargs: Made.kwargs) -> Callable[..., Any]:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return Described(_call(make.__name__, given.arguments), make(*args, **kwargs))

    return made


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _plain(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else text(value)


def _only_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values, and the lists of them: others could lead back to where they are from."""
    return {
        key: value
        for key, value in values.items()
        if _is_plain(value) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))
    }


def _settings(values: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key}={in_words(value)}" for key, value in values.items())


def _call(name: str, values: Mapping[str, Any]) -> str:
    return f"{name}({_settings(values)})" if values else name


def _name(function: Any) -> str:
    """The name of a function or class, with that of the function that made it."""
    parts = [part for part in function.__qualname__.split(".") if not part.startswith("<")]
    return ".".join(parts) or "a function without a name"
