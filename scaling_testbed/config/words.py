"""The words of a command: what one `key=value` means in Hydra's override grammar, and which words are refused.

Everything that reads a word reads it here: composition, sweep files, plans and the command line. Files that hold words
of other people (sweep files, run folders) pass the same checks.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString, RangeSweep, Sweep
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

from scaling_testbed.config.search import choices, search_path
from scaling_testbed.errors import ConfigError

LARGEST = 2**63  # whole numbers lie below it, because PyTorch, NumPy and parquet have 64 bits
MOST_VALUES = 10_000  # of one axis that a function of Hydra's grammar makes
NOT_HERE = {
    "shuffle": "its order is random, and a plan is the same each time",
    "tag": "nothing reads a tag",
    "interval": "a grid has single values; write them as a,b,c or as range(start,stop,step)",
}


def read(text: str, *, for_hydra: bool = False) -> Override:
    """Parse one word. Raises ConfigError, one line that holds the word, if Hydra cannot read it or if it is refused.

    A word is refused if it calls a resolver (`${oc.env:NAME}`), a function in NOT_HERE, or has no key. for_hydra: keep
    the functions of NOT_HERE, which sweepers of Hydra's --multirun understand.
    """
    if not isinstance(text, str):
        raise ConfigError(f"an override is a text key=value; got {text!r}")
    check_text("the override", text)
    return _read(text, for_hydra)


@functools.lru_cache(maxsize=16384)
def _read(text: str, for_hydra: bool) -> Override:
    try:
        override = _parser(for_hydra).parse_override(text)
    except Exception as error:  # of Hydra, of ANTLR, of a cast such as int(x), or of Python, such as too many digits
        if isinstance(error.__cause__, ConfigError):  # of NOT_HERE
            raise ConfigError(f"cannot use {text!r}: {error.__cause__}") from None
        raise ConfigError(_unreadable(text, error)) from None
    if not override.key_or_group:
        raise ConfigError(_unreadable(text))
    for part in _texts(override.value()):
        if name := resolver_in(part):
            raise ConfigError(f"cannot use {text!r}: {_of_resolver(name)}")
    return override


@functools.cache
def _parser(for_hydra: bool) -> OverridesParser:
    parser = OverridesParser.create()
    for name in () if for_hydra else NOT_HERE:
        parser.functions.functions[name] = functools.partial(_refuse, _not_here(name))
    return parser


def _not_here(name: str) -> str:
    return f"{name}() is not for a run: {NOT_HERE[name]}"


def _refuse(message: str, *_: object, **__: object) -> NoReturn:
    raise ConfigError(message)


def _unreadable(text: str, error: Exception | None = None) -> str:
    if text.rstrip().endswith(","):
        return f"cannot read the override {text!r}: a value is missing after the last comma"
    if (called := re.search(r"=\s*(\w+)\(", text)) and called[1] in NOT_HERE:
        return f"cannot use {text!r}: {_not_here(called[1])}"
    if found := re.match(r"\w+ while evaluating '.*?': (Unknown function[^\n]*)", str(error)):
        return f"cannot read the override {text!r}: {found[1]}; put a text with brackets in quotes"
    key, _, value = text.partition("=")
    in_quotes = re.sub(r"[^][{}(),\s'\"]+=[^][{}(),\s'\"]+", r'"\g<0>"', value)
    if in_quotes != value and "'" not in value and '"' not in value:  # as a pinned package: a==1.0
        with contextlib.suppress(ConfigError):
            read(f"{key}={in_quotes}")
            return f"cannot read the override {text!r}: a text with = in it needs quotes; type '{key}={in_quotes}'"
    hint = """and put a value with spaces, quotes or letters like ä in both kinds of quotes: 'key="value"'"""
    return f"cannot read the override {text!r}; write key=value, {hint}"


def check_text(what: str, text: str) -> None:
    """Raise ConfigError if a text cannot stand in a file or in a path: NUL, or a character without UTF-8 bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} {ascii(text)} has a character that UTF-8 cannot write; rename it") from None
    if "\0" in text:
        raise ConfigError(f"{what} {ascii(text)} has a NUL character, which no path can have")


def resolver_in(text: str) -> str | None:
    """The name of the first resolver that an interpolation in `text` calls, such as oc.env; None if there is none."""
    if "${" not in text:
        return None
    try:
        tree = parse(text)
    except OmegaConfBaseException:
        return None  # OmegaConf cannot read it, so it resolves nothing; it says so when it is asked to
    for node in _nodes(tree):
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            name: Any = node.resolverName()  # type: ignore[no-untyped-call]
            return str(name.getText())
    return None


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for child in getattr(tree, "children", None) or ():
        yield from _nodes(child)


def check_no_resolver(where: str, value: Any) -> None:
    """Raise ConfigError that begins with `where` if a text inside `value`, plain data, calls a resolver."""
    for text in _texts(value):
        if name := resolver_in(text):
            raise ConfigError(f"{where}: {text!r} cannot be used: {_of_resolver(name)}")


def _of_resolver(name: str) -> str:
    why = "reads the environment" if name.startswith("oc.env") else "is a function, which could read the environment"
    return f"${{{name}:...}} {why}, and the records of a run would keep the result; write the value itself"


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, also the keys of mappings."""
    if isinstance(value, QuotedString):
        yield value.text
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_texts, itertools.chain(value.keys(), value.values())))
    elif isinstance(value, (list, tuple, set)):
        yield from itertools.chain.from_iterable(map(_texts, value))
    elif isinstance(value, (Sweep, Glob)):
        yield from _texts([getattr(value, field.name) for field in dataclasses.fields(value)])


def key_of(text: str) -> str:
    """The key of a word, or a key, without the signs + and ~. The word need not be readable."""
    return text.partition("=")[0].strip().lstrip("+~").strip()


def has_several(text: str) -> bool:
    """Whether a word stands for several values: `key=a,b`, or a function such as range(...). Raises ConfigError as
    `read` does."""
    return read(text).is_sweep_override()


def check_single(text: str) -> None:
    """Raise ConfigError, which names the ways out, if a word stands for several values."""
    if has_several(text):
        key, _, value = text.partition("=")
        hint = f"; a list is {key}=[{value}], a text with a comma '{key}=\"...\"'" if "(" not in value else ""
        raise ConfigError(
            f"{text} stands for several values, and a run takes one; for a run of each, type it after "
            f"`sweep run sweep=NAME`, or add --multirun{hint}"
        )


def override_values(text: str, configs: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The key of a word, without signs, and its values as they are typed.

    `key=a,b`, choice(...), range(...), sort(...) and glob(...) have several. configs: folders in which glob(...) finds
    choices, beside those of the package. Raises ConfigError as `read` does, and for a function without values.
    """
    override = read(text)
    if not override.is_sweep_override():
        return key_of(text), [text.partition("=")[2]]
    asked: Any = override.value()
    if isinstance(asked, Glob):
        known = sorted(choices(override.key_or_group, configs))
        if not (found := asked.filter(known)):
            there = f"; it has {', '.join(known)}" if known else f"; {override.key_or_group} has no choices at all"
            raise ConfigError(f"{text} finds no choice{there}")
        return key_of(text), found
    if isinstance(asked, RangeSweep):
        _check_range(text, asked)
    try:
        found = list(itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1))
    except Exception as error:  # of the arithmetic in range(...)
        raise ConfigError(f"cannot read the override {text!r}: {error}") from None
    if not 0 < len(found) <= MOST_VALUES:
        raise ConfigError(f"{text} stands for {len(found)} values or more; an axis has 1 to {MOST_VALUES:,}")
    return key_of(text), found


def _check_range(text: str, asked: RangeSweep) -> None:
    """An end at infinity or a step of zero would never end."""
    try:
        count = (float(asked.stop or 0) - float(asked.start or 0)) / float(asked.step)
    except (ZeroDivisionError, OverflowError):
        count = float("nan")
    if not 0 < count <= MOST_VALUES:
        raise ConfigError(f"{text} stands for no value, or for more than {MOST_VALUES:,}; write range(start,stop,step)")


def paths_of(text: str) -> set[str]:
    """The keys that a word sets: of `optimizer={lr: 1}` optimizer.lr, else the key itself."""

    def walk(prefix: str, value: Any) -> Iterator[str]:
        if isinstance(value, dict) and value:
            for key, entry in value.items():
                yield from walk(f"{prefix}.{key}", entry)
        else:
            yield prefix

    return set(walk(key_of(text), read(text).value()))


def slot_of(text: str) -> tuple[str, bool]:
    """What a word sets: its key, and whether it merges a mapping, {a: 1}, into what is there. `optimizer=sgd` and
    `optimizer={lr: 1}` do not replace each other."""
    value: Any = read(text).value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return key_of(text), all(isinstance(one, dict) for one in values)


def same_value(a: str, b: str) -> bool:
    """Whether two spellings mean one value: 1e-3 and 0.001, true and True, x and 'x'."""
    return a == b or _meaning(a) == _meaning(b)


@functools.lru_cache(maxsize=16384)
def _meaning(text: str) -> str:
    try:
        value: Any = read(f"x={text}").value()
    except ConfigError:
        return text

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return list(map(plain, value))
        try:
            return value if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return value if value is None or isinstance(value, str) else repr(value)

    return json.dumps(plain(value), sort_keys=True)


@functools.lru_cache(maxsize=16384)
def _is_group(key: str, configs: tuple[str, ...]) -> bool:
    inside = key.partition("/")[0] in ("hydra", "schema")
    return inside or "\0" not in key and any((root / key).is_dir() for root in search_path(configs))


def chooses(text: str, configs: Sequence[str] = ()) -> bool:
    """Whether Hydra takes a word for the choice of a group, from a file, and not for the value of a key."""
    override = read(text)
    named = override.package is not None or _is_group(override.key_or_group, tuple(configs))
    return named and not isinstance(override.value(), dict)


def check_choice_of_group(text: str, configs: Sequence[str] = ()) -> None:
    """Raise ConfigError for a word that names a group and no choice of it: `model=1`, `model=null`, `++model=a`."""
    if not chooses(text, configs):
        return
    override = read(text, for_hydra=True)
    key, value = override.key_or_group, override.value()
    if override.is_delete() and (value is None or isinstance(value, str)):
        return
    if value is None:
        raise ConfigError(f"{text}: a group cannot be null; --help lists its choices")
    if not isinstance(value, (str, list, Sweep, Glob)):
        quote = f"; a file called {value} is chosen by {key}=\"'{value}'\"" if not override.is_delete() else ""
        raise ConfigError(f"{text}: {key} takes the name of a choice, and --help lists them{quote}")
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{text}: {key} takes the name of a choice and no reference; --help lists them")
    if override.is_force_add():
        raise ConfigError(f"{text}: a group has a choice already; type {text.lstrip('+')}, without a plus")


def quoted(value: str) -> str:
    """Write a text as the value of an override, in quotes if it needs them."""
    plain = re.fullmatch(r"[A-Za-z0-9_./@%+-]+", value) and read(f"x={value}").value() == value
    return value if plain else QuotedString(value, Quote.double).with_quotes()


def in_quotes(value: str) -> str:
    """Write a text as the value of an override, always in quotes, so that it is read as a text whatever it is."""
    return QuotedString(value, Quote.single).with_quotes()
