"""What every configuration key means, from its declaration: for `train --help TOPIC` and docs/reference/keys.md."""

import dataclasses
import difflib
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling_testbed.config.run import GROUPS, RunConfig
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import about

UNEXPLAINED = "Its declaration does not explain it."


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One key of a section.

    key: with its section, "optimizer.lr". type: in words. defaults: as they are typed -> the kinds of the section that
    have it, the most usual one first. kinds: those that have the key; empty where all have it. identity: as in
    keys.key. choices: empty where any value of the type is possible.
    """

    key: str
    type: str
    defaults: dict[str, list[str]]
    kinds: tuple[str, ...]
    help: str
    identity: bool | str
    choices: tuple[str, ...]

    @property
    def default(self) -> str:
        """The defaults in words."""
        usual, *others = self.defaults
        deviating = "; ".join(f"{other} with {', '.join(self.defaults[other])}" for other in others)
        return f"{usual} ({deviating})" if deviating else usual


def sections() -> dict[str, Mapping[str, type]]:
    """Name of each section of a run's configuration -> its dataclasses by kind; "" for the keys above all sections, and
    for the kind where there is one only."""
    found: dict[str, Mapping[str, type]] = {"": {"": RunConfig}}
    for field in dataclasses.fields(RunConfig):
        if field.name in GROUPS:
            found[field.name] = GROUPS[field.name]
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found[field.name] = {"": field.type}
    return found


def explain(section: str, kinds: Mapping[str, type]) -> list[Explained]:
    """Every key of a section in the order of declaration, those first that all kinds share."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    fields: dict[tuple[str, str, str], tuple[type, dataclasses.Field[Any]]] = {}
    for kind, cls in kinds.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if section == "" and field.name in sections() or kind and field.name == "name":
                continue  # a section of its own; the kind itself
            meaning = field.name, _type(hints[field.name]), about(cls, field.name).get("help", UNEXPLAINED)
            found.setdefault(meaning, {}).setdefault(typed(_default(field)), []).append(kind)
            fields.setdefault(meaning, (cls, field))
    explained = []
    for (name, kind_of_value, text), defaults in found.items():
        cls, field = fields[name, kind_of_value, text]
        having = tuple(kind for some in defaults.values() for kind in some)
        explained.append(
            Explained(
                key=f"{section}.{name}" if section else name,
                type=kind_of_value,
                defaults=dict(sorted(defaults.items(), key=lambda entry: -len(entry[1]))),
                kinds=() if len(having) == len(kinds) else having,
                help=text,
                identity=field.metadata.get("identity", True),
                choices=tuple(about(cls, name).get("choices") or ()),
            )
        )
    return sorted(explained, key=lambda entry: bool(entry.kinds))


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def help_on(topics: Sequence[str], more: Mapping[str, Mapping[str, type]] | None = None) -> str:
    """The help of `--help TOPIC ...`, each a section or a key.

    more: further sections by name, each with its dataclasses by kind, as in `sections`. Raises ConfigError for a topic
    that is neither a section nor a key.
    """
    return "\n\n".join(_help_on(topic, sections() | dict(more or {})) for topic in topics)


def _help_on(topic: str, known: Mapping[str, Mapping[str, type]]) -> str:
    if topic in known and topic:
        return _section_text(topic, known[topic])
    entries = [entry for section, kinds in known.items() for entry in explain(section, kinds)]
    if found := [entry for entry in entries if topic in (entry.key, entry.key.rpartition(".")[2])]:
        return "\n".join(_entry_text(entry) for entry in found)
    close = difflib.get_close_matches(topic, [*known, *(entry.key for entry in entries)], n=1)
    hint = f"did you mean --help {close[0]}?" if close else f"sections are {', '.join(filter(None, known))}"
    raise ConfigError(f"there is no section or key {topic}; {hint}")


def _section_text(section: str, kinds: Mapping[str, type]) -> str:
    meaning = about(RunConfig, section).get("help") or summary(next(iter(kinds.values())))
    lines = [f"{section}: {meaning}"]
    lines += [_wrapped(f"{section}={kind}: {summary(cls)}", 2) for kind, cls in kinds.items() if kind]
    return "\n".join([*lines, "", *(_entry_text(entry) for entry in explain(section, kinds))])


def _entry_text(entry: Explained) -> str:
    lines = [f"  {entry.key}: {entry.type}, default {entry.default}", _wrapped(entry.help, 6)]
    if entry.choices:
        lines.append(_wrapped(f"Choices: {', '.join(entry.choices)}.", 6))
    if entry.kinds:
        lines.append(_wrapped(f"Only with {entry.key.partition('.')[0]}={', '.join(entry.kinds)}.", 6))
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> str:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    space = " " * indent
    return textwrap.fill(text, max(40, width), initial_indent=space, subsequent_indent=space)


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is dataclasses.MISSING:
        return "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{typed(entry)}' for key, entry in value.items())}}}"
    return str(value) if value != "" else "''"


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _type(hint: Any) -> str:
    """A type in words: `float | None` is "number or null"."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type(part) for part in typing.get_args(hint))
    words = {int: "integer", float: "number", bool: "true or false", str: "text", types.NoneType: "null"}
    if hint in words:
        return words[hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"list of {_plural(_type(parts[0]))}"
    if origin is dict:
        return f"mapping of names to {_plural(_type(parts[1]))}"
    return "text or list of texts" if hint is Any else "section"


def _plural(word: str) -> str:
    return "values" if " " in word else f"{word}s"
