"""Compose overrides into a RunConfig. Only this module and words.py import Hydra and OmegaConf.

The dataclasses in GROUPS are registered as Hydra's schemas, so every key has one default and one type. A file in
configs/ names the schema of its group (`/schema/optimizer/adamw@_here_`) and holds only values that differ from it.
plugins= and configs= are read before Hydra composes, so that their choices are available like all others.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from scaling_testbed.config.run import GROUPS, RunConfig, changes, outcome_of, run_id
from scaling_testbed.config.search import (
    CONFIG_DIR,
    check_no_doubles,
    choices,
    config_folder,
    files_of,
    search_path,
)
from scaling_testbed.config.start import StartConfig
from scaling_testbed.config.words import (
    LARGEST,
    check_choice_of_group,
    check_no_resolver,
    check_single,
    check_text,
    chooses,
    has_several,
    in_quotes,
    key_of,
    override_values,
    read,
)
from scaling_testbed.errors import ConfigError, UserError, first_line
from scaling_testbed.files import YAMLError, read_json, read_yaml
from scaling_testbed.keys import changed_from_default
from scaling_testbed.learning.objectives import Objective
from scaling_testbed.plugins import check_unchanged, hashes_in, load_named_in, load_plugins, loaded_plugins

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Filled = TypeVar("Filled", bound="DataclassInstance")

CANNOT_COMPOSE = (HydraException, OmegaConfBaseException, YAMLError)
# Hydra and OmegaConf check little of what a file holds.
LOADS_ANYTHING = (OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError)


def compose(overrides: Sequence[str], config_name: str = "train", *, written_in: Path | None = None) -> RunConfig:
    """Return the run that `overrides` describe (Hydra's grammar: key=value, group=choice, +key=value).

    written_in: the file that contains the overrides; None if a person typed them, including the plug-ins. Raises
    ConfigError, one or two lines that name the key, for an unknown key or choice, a wrong type or a bad value. Raises
    UserError for plug-ins that a file must not name (see plugins.py).
    """
    words, configs = _of_one_run(overrides, written_in)
    return to_run_config(_compose_dict(words, configs, config_name), words)


def compose_many(override_lists: Sequence[Sequence[str]], *, written_in: Path | None = None) -> list[RunConfig]:
    """Compose each list. This takes about a tenth of the time of `compose` if the lists choose the same groups.

    Hydra composes once for each choice of groups. The other words are applied to copies of the result, in their order
    and by the function of Hydra that does it in `compose` too. Raises ConfigError as `compose` does.
    """
    bases: dict[tuple[str, ...], DictConfig] = {}
    runs = []
    for overrides in override_lists:
        words, configs = _of_one_run(overrides, written_in)
        chosen = tuple(word for word in words if key_of(word) in OUTSIDE or chooses(word, configs))
        try:
            if chosen not in bases:
                bases[chosen] = _compose_dict(chosen, configs)
            composed = copy.deepcopy(bases[chosen])
            ConfigLoaderImpl._apply_overrides_to_config([read(word) for word in words if word not in chosen], composed)
            runs.append(to_run_config(composed, words))
        except (*CANNOT_COMPOSE, ConfigError):
            runs.append(compose(overrides, written_in=written_in))  # its errors name the key
    return runs


def _of_one_run(overrides: Sequence[str], written_in: Path | None) -> tuple[list[str], list[str]]:
    """The words with the absolute names of plug-ins and folders, and the folders. Raises ConfigError for words that
    Hydra accepts and a run does not."""
    if isinstance(overrides, (str, bytes, dict)) or not isinstance(overrides, Iterable):
        raise ConfigError(f"overrides are a list of texts, ['key=value', ...]; got {overrides!r}")
    words, configs = _from_outside(list(overrides), written_in)
    for word in words:
        check_single(word)
        check_choice_of_group(word, configs)
        if re.match(r"hydra\b", key := key_of(word)):
            raise ConfigError(f"{key} is a key of Hydra and not of a run; configs=DIR adds a folder of choices")
    return words, configs


OUTSIDE = ("plugins", "configs")


def outside_of(overrides: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split `overrides` into the names in plugins= and in configs=, both as typed, and the other overrides. Raises
    ConfigError if a value of these two keys is neither a name nor a list of names."""
    named: dict[str, list[str]] = {key: [] for key in OUTSIDE}
    others = []
    for text in overrides:
        if (key := key_of(text)) in named:
            named[key] += _names(key, text)
        else:
            others.append(text)
    return named["plugins"], named["configs"], others


def check_no_code(overrides: Sequence[str], file: str | Path) -> None:
    """Raise ConfigError if overrides from a file would load code. A sweep file names plug-ins in its own key `plugins`,
    and keys of Hydra itself, such as its search path, can import any module."""
    for text in overrides:
        if (key := key_of(text)) in OUTSIDE or re.match(r"hydra\b", key):
            raise ConfigError(f"{file}: no override in a file may set {key}; a sweep file has keys plugins and configs")


def _names(key: str, text: str) -> list[str]:
    override = read(text)
    value: object = None if override.is_sweep_override() else override.value()
    names = [value] if isinstance(value, str) else value
    if not _is_list_of_texts(names) or "" in names:
        raise ConfigError(f"{key} takes a name or a list of names, {key}=[a,b], for all runs; got {text!r}")
    return names


def outside_overrides(plugins: Sequence[str], configs: Sequence[str]) -> list[str]:
    """The overrides that name these plug-ins and folders; an empty list if there are none."""
    named = zip(OUTSIDE, (plugins, configs), strict=True)
    return [f"{key}=[{','.join(map(in_quotes, dict.fromkeys(names)))}]" for key, names in named if names]


def _from_outside(overrides: Sequence[str], written_in: Path | None) -> tuple[list[str], list[str]]:
    """Load plug-ins and register all schemas. Returns overrides with absolute names, and the folders of configs=."""
    for text in overrides:
        read(text, for_hydra=True)
    plugins, configs, others = outside_of(overrides)
    if written_in is None:
        loaded = load_plugins(plugins)
    else:
        check_no_code(others, written_in)
        loaded = load_named_in(written_in, plugins, "--plugins ")
    configs = list(dict.fromkeys(map(config_folder, configs)))
    if configs:
        check_no_doubles(configs)
        for file in files_of(configs):  # Hydra resolves the names in defaults lists itself
            check_no_resolver(str(file), _defaults_list(file))
    _register_schemas()
    return [*outside_overrides([plugin.name for plugin in loaded], configs), *others], configs


def _defaults_list(file: Path) -> Any:
    """The defaults list of a configuration; None if it has none, or if it cannot be read, which Hydra says where it is
    chosen."""
    with contextlib.suppress(*LOADS_ANYTHING, *CANNOT_COMPOSE):
        found: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        return found["defaults"]
    return None


def fill(cls: type[Filled], path: Path, prefix: str, overrides: Sequence[str]) -> Filled:
    """Fill a dataclass that is no part of RunConfig from a YAML file and overrides `prefix.key=value`.

    A scalar is read as text, including commas and `${}`, and then converted to the type of its field: YAML 1.1 would
    read 8:00:00 as the number 28800. Raises ConfigError, which names the file and key.
    """
    try:
        content = read_yaml(path, as_written=True) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    config, known = _unlocked(cls), [f"{prefix}.{field.name}" for field in dataclasses.fields(cls)]
    given = [(f"{path}: ", f"{prefix}.{key}", value) for key, value in content.items()]
    given += [("", text.partition("=")[0], text) for text in overrides]
    for where, full_key, value in given:
        if full_key not in known:
            hint = _close_to(full_key, known) or f"it has {', '.join(known)}"
            raise ConfigError(f"{where}there is no key {full_key}; {hint}")
        key = full_key.removeprefix(f"{prefix}.")
        node = config._get_node(key)
        value = value if where else _as_typed(value, isinstance(node, ListConfig))
        if isinstance(node, ListConfig) and not _is_list_of_texts(value):
            raise ConfigError(f"{where}{full_key} must be a list of texts, such as ['a b','c']; got {value!r}")
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}{full_key}: {_uncapitalized(str(error).splitlines()[0])}") from None
        if OmegaConf.is_interpolation(config, key) and not isinstance(node, StringNode):
            raise ConfigError(f"{where}{full_key} must be a value and no interpolation; got {value!r}")
    values: Any = OmegaConf.to_container(config, resolve=False)  # a mapping, as `config` is one
    try:
        return cls(**values)
    except ConfigError as error:  # names the key alone
        raise ConfigError(str(error) if overrides else f"{path}: {error}") from None


def _is_list_of_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _as_typed(text: str, is_list: bool) -> str | list[Any] | None:
    """The value in `key=value`: for a list as Hydra parses it, else the text as it is, including commas."""
    value = text.partition("=")[2]
    if is_list:
        with contextlib.suppress(ConfigError):
            parsed = read(text).value()
            return parsed if isinstance(parsed, list) else value
    return None if value == "null" else value


def _compose_dict(
    overrides: Sequence[str], configs: Sequence[str], config_name: str = "train", *, with_hydra: bool = False
) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            found = [*overrides, *_search_override(configs)]
            return hydra.compose(config_name, overrides=found, return_hydra_config=with_hydra)
    except CANNOT_COMPOSE as error:
        raise ConfigError(_one_line(error, configs)) from None
    except LOADS_ANYTHING as error:
        raise ConfigError(f"Hydra cannot compose {' '.join(overrides)}: {first_line(error)}") from None


def _search_override(configs: Sequence[str]) -> list[str]:
    places = ",".join(in_quotes(f"file://{folder}") for folder in configs)
    return [f"hydra.searchpath=[{places}]"] if configs else []


def to_run_config(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Freeze a composed config into dataclasses, group by group. Raises ConfigError naming the group and key."""
    try:
        return _frozen(composed, overrides)
    except InterpolationResolutionError as error:
        typed = ", ".join(word for word in overrides if "${" in word)
        raise ConfigError(f"{typed or 'a configuration file'}: {_uncapitalized(first_line(error))}") from None
    except CANNOT_COMPOSE as error:
        raise ConfigError(_one_line(error)) from None
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply, or its references form a circle") from None


def _frozen(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    written = _plain(composed)
    _check_no_resolver(written)
    if unset := next(_missing("", written), None):
        typed = "".join(f"{word}: " for word in overrides if key_of(word) == unset and "???" in word)
        raise ConfigError(f"{typed}{unset} has no value; type {unset}=VALUE")
    OmegaConf.resolve(composed)
    for word in overrides:
        _check_text_as_typed(word, composed)
    _fill_settings(composed)
    fields = [field.name for field in dataclasses.fields(RunConfig)]
    if unknown := [str(key) for key in composed if key not in fields]:
        raise ConfigError(_unknown_key(unknown[0]))
    resolved = _plain(composed)
    absent = {key for key, value in resolved.items() if key in GROUPS and value is None}
    if missing := [key for key in fields if key not in composed or key in absent]:
        raise ConfigError(f"a run needs {missing[0]}: leave out ~{missing[0]}, or type another value for it")
    for key, named in zip(OUTSIDE, outside_of(overrides)[:2], strict=True):
        if list(composed[key]) != named:
            raise ConfigError(f"{key} is set in a config file; type {key}=[...], or set it in a sweep file")
    if composed["overrides"]:
        raise ConfigError("overrides is the record of what was typed; it cannot be set")
    for key, value in resolved.items():
        _check_value(key, value)
    values = {}
    for key in map(str, composed):
        node = composed._get_node(key)
        if key in GROUPS and not dataclasses.is_dataclass(OmegaConf.get_type(node)):
            chosen = ", ".join(text for text in overrides if key_of(text) == key) or "its default"
            raise ConfigError(f"{key} has no schema; its file must name one in its defaults list ({chosen})")
        values[key] = _freeze(node, key) if isinstance(node, DictConfig) and not node._is_none() else composed[key]
    looked_up = []
    for section in ("start", "objective"):
        typed = values[section]
        values[section] = typed.resolved()
        looked_up += words_looked_up(section, values[section]) if typed != values[section] else []
    lists = {key: list(composed[key]) for key in OUTSIDE} | {"overrides": [*overrides, *looked_up]}
    return RunConfig(**values | lists)


def words_looked_up(section: str, found: StartConfig | Objective) -> list[str]:
    """The words that give the keys of a resolved section that are looked up in files the values that they have now."""
    values = {name: getattr(found, name) for name in found.looked_up}
    texts = {name: in_quotes(value) if isinstance(value, str) else value for name, value in values.items()}
    return [f"{section}.{name}={value}" for name, value in texts.items() if value is not None]


def _missing(key: str, value: object) -> Iterator[str]:
    """The keys inside a value that have OmegaConf's sign for a missing value."""
    if value == "???":
        yield key
    for name, entry in value.items() if isinstance(value, dict) else ():
        yield from _missing(f"{key}.{name}".lstrip("."), entry)


def _check_text_as_typed(word: str, composed: DictConfig) -> None:
    """Raise ConfigError if a word gives a key that takes a text a number or truth value in another spelling: 007 would
    become 7, and the commit 12e3456 would become inf."""
    key, _, typed = word.partition("=")
    value: Any = read(word).value()
    if not isinstance(value, (bool, int, float)) or str(value) == typed.strip():
        return
    if OmegaConf.select(composed, key_of(word)) == str(value):
        raise ConfigError(f"{word} is read as {value}; for the text, type {key}=\"'{typed.strip()}'\"")


def _check_no_resolver(content: dict[str, Any]) -> None:
    for key, value in content.items():
        check_no_resolver(f"{key} in a configuration file", value)


def _plain(composed: DictConfig) -> dict[str, Any]:
    """The content as plain data, with references as they are written."""
    found: Any = OmegaConf.to_container(composed, resolve=False)
    return {str(key): value for key, value in found.items()}


def _check_value(key: str, value: object) -> None:
    """Raise ConfigError that names the key unless a value can be recorded in a row and read again from there."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{key} has the key {name!r}; the keys of a mapping are texts")
            check_text(f"a key of {key},", name)
            _check_value(f"{key}.{name}", entry)
    elif isinstance(value, list):
        for at, entry in enumerate(value):
            _check_value(f"{key}[{at}]", entry)
    elif isinstance(value, str):
        check_text(f"{key}:", value)
        if "${" in value:
            raise ConfigError(f"{key} may have '${{' only in a reference, such as ${{model.d_model}}; got {value!r}")
    elif isinstance(value, int):
        if not -LARGEST <= value < LARGEST:
            raise ConfigError(f"{key} must lie between -2^63 and 2^63; got {_short(value)}")
    elif not (value is None or isinstance(value, float)):
        raise ConfigError(f"{key} must be a number, a text, a truth value, a list or a mapping; got {value!r}")


def _short(number: int) -> str:
    """A whole number, or its first digits if it is long."""
    digits = len(hex(number)) * 1.2
    return str(number) if digits < 40 else f"a number of some {digits:.0f} digits"


def _freeze(node: DictConfig, group: str) -> Any:
    """Convert the node of one group to its dataclass. An error message starts with the name of the group."""
    cls: Any = OmegaConf.get_type(node)
    if cls is dict:
        return OmegaConf.to_container(node)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := [str(key) for key in node if key not in known]:
        raise ConfigError(_unknown_key(f"{group}.{unknown[0]}"))
    try:
        return OmegaConf.to_object(node)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if f"{group}." in message else f"{group}.{message}") from None


def _fill_settings(composed: DictConfig) -> None:
    """Replace the settings in each key with `settings_of` (keys.py) by the kind of the choice that they name, and the
    keys that differ from the default. Raises ConfigError that names the key."""
    for section in map(str, composed):
        node: Any = composed._get_node(section)
        kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if (group := field.metadata.get("settings_of")) and field.name in node:
                for name, settings in dict(node[field.name]).items():
                    where, configs = f"{section}.{field.name}.{name}", list(composed["configs"])
                    node[field.name][name] = _filled_settings(where, group, settings, configs)


def _filled_settings(where: str, group: str, settings: Any, configs: Sequence[str]) -> dict[str, Any]:
    given: Any = OmegaConf.to_container(settings) if isinstance(settings, DictConfig) else settings
    if not isinstance(given, dict) or not isinstance(chosen := given.pop("name", None), str):
        raise ConfigError(f"{where} must be {{name: CHOICE, KEY: VALUE}}, with a choice of {group}=; got {given!r}")
    if (file := choices(group, configs).get(chosen)) is None:
        raise ConfigError(f"{where}: {_no_choice(f'{group}/{chosen}', configs)}")
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    schema = content.pop("defaults", [])
    kind = str(schema[0]).removeprefix(f"/schema/{group}/").removesuffix("@_here_") if len(schema) == 1 else ""
    if kind not in GROUPS[group]:
        raise ConfigError(f"{where}: {file} must have one entry in its defaults list, the schema, to be chosen here")
    node = _unlocked(GROUPS[group][kind])
    for key, value in {**content, **given}.items():
        try:
            OmegaConf.update(node, key, value)
        except CANNOT_COMPOSE as error:
            if key in node:
                raise ConfigError(f"{where}.{key}: {_uncapitalized(str(error).splitlines()[0])}") from None
            known = [str(key) for key in node]
            hint = _close_to(key, known) or f"it has {', '.join(known)}"
            raise ConfigError(f"there is no key {where}.{key}; {hint}") from None
    return {"kind": kind, **changed_from_default(_freeze(node, where))}


def get_ready() -> None:
    """Do what the first `compose` of a process does in addition: register the schemas, and load Hydra's own plug-ins.
    For a process whose forks compose."""
    _register_schemas()
    _compose_dict([], [])


def _register_schemas() -> None:
    """Register the schemas that are not registered yet."""
    _register_schema("schema", "run", _run_schema())
    for group, kinds in GROUPS.items():
        for kind, cls in kinds.items():
            _register_schema(f"schema/{group}" if kind else "schema", kind or group, cls)


@functools.cache
def _run_schema() -> type:
    """RunConfig with open types for groups and interventions: Hydra fills a group with the schema of the chosen kind,
    and OmegaConf has no type for the options of an intervention."""
    fields = [
        (f.name, Any, dataclasses.field(default=None))
        if f.name in GROUPS
        else (
            f.name,
            dict[str, Any] if f.name == "interventions" else f.type,
            dataclasses.field(default=f.default, default_factory=f.default_factory),
        )
        for f in dataclasses.fields(RunConfig)
    ]
    return dataclasses.make_dataclass("RunConfig", fields, frozen=True, kw_only=True)


@functools.cache
def _register_schema(group: str, name: str, cls: "type[DataclassInstance]") -> None:
    ConfigStore.instance().store(group=group, name=name, node=_unlocked(cls))


def _unlocked(cls: type[Any]) -> DictConfig:
    """A structured config that can still be overridden although its dataclass is frozen."""
    config: DictConfig = OmegaConf.structured(cls)
    config._set_flag("readonly", None)
    for child in map(config._get_node, config):
        if isinstance(child, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(child)):
            child._set_flag("readonly", None)
    for field in dataclasses.fields(cls):
        if field.metadata.get("free_names"):
            mapping: Any = config._get_node(field.name)
            mapping._set_flag("struct", False)
    return config


def _known_keys() -> list[str]:
    keys = [field.name for field in dataclasses.fields(RunConfig)]
    sections = [(name, [cls]) for name, cls in _plain_sections()]
    sections += [(group, list(kinds.values())) for group, kinds in GROUPS.items()]
    for section, classes in sections:
        keys += [f"{section}.{field.name}" for cls in classes for field in dataclasses.fields(cls)]
    return sorted(set(keys))


def _plain_sections() -> list[tuple[str, type[Any]]]:
    """The sections of RunConfig that are dataclasses of one kind and no config groups."""
    found = [(field.name, field.type) for field in dataclasses.fields(RunConfig)]
    return [(name, kind) for name, kind in found if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def _unknown_key(key: str) -> str:
    group, _, field = key.partition(".")
    if group == "interventions" and field:
        return f"{key} must be typed with a plus, which adds it: +{key}.KEY=VALUE"
    if key.startswith("start.grow."):
        return f"{key} must be typed with a plus, which adds it: +{key}=VALUE"
    if group in ("sweep", "scale", "launcher"):
        return f"{group} is for the commands of a sweep, such as `sweep run sweep=NAME`; a run has no key {key}"
    kinds = [kind for kind, cls in GROUPS.get(group, {}).items() if field in {f.name for f in dataclasses.fields(cls)}]
    if kinds:
        return f"{key} belongs to {group}={' or '.join(kinds)}, not to the {group} that was chosen"
    return f"there is no key {key}; {_close_to(key, _known_keys()) or '`--cfg job` prints every key'}"


def _close_to(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _no_yaml(configs: Sequence[str]) -> str:
    """The first file in these folders that is no YAML, which an error of Hydra does not name."""
    for file in files_of(configs):
        with contextlib.suppress(*LOADS_ANYTHING):
            try:
                OmegaConf.load(file)
            except YAMLError:
                return str(file)
    return "a file"


def _one_line(error: Exception, configs: Sequence[str] = ()) -> str:
    """Describe an error of Hydra or OmegaConf in one or two lines that name the key."""
    if isinstance(error, YAMLError):
        return f"{_no_yaml(configs)} cannot be read as YAML: {' '.join(str(error).split())}"
    inner = error.__cause__ or error.__context__
    cause = inner if isinstance(inner, OmegaConfBaseException) else None
    key = getattr(cause or error, "full_key", None)
    message = (getattr(cause, "msg", None) or str(cause or error)).strip()
    if re.search(r"not in (struct|')|not in struct", message) and key:
        file = re.match(r"In '[^']+': ", str(error))
        return (file[0] if file else "") + _unknown_key(key)
    if missing := re.search(r"Could not find '([^']+)'", message):
        return _no_choice(missing[1], configs)
    if missing := re.search(r"In '([^']+)/([^']+)': Could not load 'schema/", message):
        group, choice = missing.groups()
        return f"{group}={choice} comes from a plug-in that is not loaded; type plugins=NAME, its module or .py file"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}"  # not seen by `read`
    first = message.splitlines()[0]
    if unmatched := re.search(r"Could not override '([^']+)'", first):
        return _unknown_key(unmatched.group(1))
    if gone := re.search(r"Could not delete (?:from config\. )?'([^']+)'(?: does not exist|\. No match)", first):
        return f"~{gone[1]}: there is no {gone[1]} to take away"
    if there := re.search(r"An item is already at '([^']+)'", first):
        return f"{there[1]} exists already; type it without the plus, {there[1]}=VALUE"
    if twice := re.search(r"Multiple values for (\w+)\.", first):
        return f"{twice[1]} has a choice already; type {twice[1]}=NAME, without a plus"
    if key and "does not support deletion" in first:
        return f"{key} cannot be taken away with ~; type {key}=VALUE"
    if key and "is not a ListConfig" in first:
        return f"{key} must be a list; type '{key}=[{getattr(cause or error, 'value', 'A,B')}]'"
    if key and re.match(r"[Cc]annot assign \w+ to Dict", first):
        return f"{key} must be a mapping; type +{key}.KEY=VALUE"
    if key and (wrong := re.search(r"[Vv]alue '(.*)' of type '\w+' is incompatible with type hint '(.+)'", first)):
        return f"{key} must be {_in_words(wrong[2])}; got {wrong[1]}"
    if key and isinstance(cause or error, OmegaConfBaseException):
        return f"{key}: {_uncapitalized(first)}"
    return first


def _in_words(hint: str) -> str:
    """The text of a type hint of several types, e.g. "true or false or text" of Union[bool, str]."""
    words = {"bool": "true or false", "str": "text", "int": "a whole number", "float": "a number", "NoneType": "null"}
    inside = re.findall(r"\w+", hint.removeprefix("Optional").removeprefix("Union")) + ["null"] * ("Optional" in hint)
    return " or ".join(words.get(name, name) for name in inside if name != "Union")


def _no_choice(path: str, configs: Sequence[str]) -> str:
    """path: GROUP/CHOICE as Hydra looks for it. CHOICE may be the path of a file, which is no choice."""
    group, _, choice = path.partition("/")
    if group not in GROUPS and group != "experiment":
        group, _, choice = path.rpartition("/")
    known = sorted(choices(group, configs))
    if "/" in choice or choice.endswith((".yaml", ".yml")):
        name = Path(choice).stem
        return (
            f"{group} takes a name and no path; got {choice!r}. Put the file into DIR/{group}/ and type configs=DIR "
            f"{group}={name}"
        )
    close = _close_to(choice, known)
    return f"{group} has no choice {choice!r}; {close and f'{close} '}it has {', '.join(known)}"


def _uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def recorded_run(folder: Path) -> RunConfig:
    """Return the run of a run folder, composed from the overrides in its config.yaml. Its device is the best one of
    this machine, not the one that it ran on.

    Raises UserError if the folder has no readable config.yaml, if this version of the project composes another run from
    it, or if a plug-in of the run is not allowed or has changed.
    """
    file = folder / "config.yaml"
    try:
        recorded = read_yaml(file)
        here = [f"data_dir={in_quotes(recorded['data_dir'] or '.')}", "compute.device=auto"]
        plugins, configs, others = outside_of(recorded["overrides"])
        overrides = [*others, *here]
    except (OSError, KeyError, TypeError, AttributeError, ConfigError):
        if outcome := outcome_of(folder):  # it ended before it wrote its configuration
            raise UserError(f"{folder} holds no checkpoint: {outcome}") from None
        raise UserError(f"{folder} is no run folder: it has no readable config.yaml") from None
    was = _hashes_of_last_start(folder)
    plugins = [_stand_in(name, was.get(name)) for name in plugins]
    try:
        run = compose([*outside_overrides(plugins, configs), *overrides], written_in=file)
    except ConfigError as error:
        raise UserError(f"{file} cannot be composed any more: {error}") from None
    if run_id(run) != folder.resolve().name:
        changed = "; ".join(changes(recorded, run)[:3])
        why = f"has another configuration in config.yaml ({changed})"
        why = why if changed else "was renamed, or made by another version"
        raise UserError(f"{folder} {why}: its overrides now mean run {run_id(run)}")
    check_unchanged(was, run.plugins, folder)
    return run


def _hashes_of_last_start(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the plug-ins, and of what they import, at the last start of a run."""
    with contextlib.suppress(UserError, LookupError, TypeError, AttributeError):
        return hashes_in(read_json(folder / "environment.json")["starts"][-1]["plugins"])
    return {}


def _stand_in(name: str, sha256: str | None) -> str:
    """The name of a loaded plug-in with the same source, else `name`: the file may have had another path in the run."""
    return next((plugin.name for plugin in loaded_plugins() if plugin.sha256 == sha256), name)


def run_config_files(configs: Sequence[str] = ()) -> list[Path]:
    """The files that are choices of a run. Files of sweep/ and launcher/ are not among them."""
    files = [path for root in search_path(configs) for path in root.glob("*/*.yaml")]
    of_runs = [path for path in files if path.parent.name in {*GROUPS, "experiment"}]
    return sorted(of_runs, key=lambda path: (path.parent.name, path.name))


FULL_ERROR = "HYDRA_FULL_ERROR"
RUNS_CODE = ("callbacks", "job_logging", "hydra_logging", "launcher", "sweeper")  # keys of hydra that name classes


def _check_hydra_untouched(overrides: Sequence[str], configs: Sequence[str]) -> None:
    """Raise ConfigError if a file in configs= sets a key of Hydra that names code to import and call. Such a folder may
    come from another person, and only plugins= may name code. Typed overrides may set these keys."""

    def of_hydra(overrides: Sequence[str], configs: Sequence[str]) -> dict[str, Any]:
        found = _plain(_compose_dict(overrides, configs, with_hydra=True))
        own = found.pop("hydra")
        _check_no_resolver(found)  # --cfg job --resolve would print what it returns
        return {key: own[key] for key in RUNS_CODE}

    single = [text for text in overrides if not has_several(text)]
    typed = of_hydra([text for text in single if re.match(r"hydra\b", key_of(text))], ())
    swept = [override_values(text, configs) for text in overrides if text not in single and chooses(text, configs)]
    first = {key: values[0] for key, values in swept}  # other keys may exist only with a choice
    for key, value in [("", ""), *((key, value) for key, values in swept for value in values[1:])]:
        choices_of_run = first | ({key: value} if key else {})
        found = of_hydra([*(f"{group}={choice}" for group, choice in choices_of_run.items()), *single], configs)
        if changed := [key for key in RUNS_CODE if found[key] != typed[key]]:
            raise ConfigError(f"a file in configs= sets hydra.{changed[0]}, which names code; type it, or remove it")


ONE_OF = ("run", "multirun", "cfg", "info", "hydra_help")
# Options of Hydra that would compose other things than the words of a run say.
NOT_OPTIONS = ("config_path", "config_name", "config_dir", "experimental_rerun")


def _options(argv: Sequence[str]) -> dict[str, Any]:
    """The options of Hydra in `argv`, and under `overrides` its other words. Raises ConfigError for a wrong option."""
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        known = "it has -q, -v, --dry-run, --help, --cfg job, --info, --multirun and --hydra-help"
        raise ConfigError(f"{message}; {known}")

    parser.error = refuse  # type: ignore[method-assign]
    found = vars(parser.parse_intermixed_args(list(argv)))
    if len(asked := [f"--{name.replace('_', '-')}" for name in ONE_OF if found[name]]) > 1:
        raise ConfigError(f"{' and '.join(asked)} cannot be typed together")
    if found["shell_completion"]:
        raise ConfigError("--shell-completion is not for a run; `python -m scaling_testbed --show-completion` has it")
    if found["hydra_help"] and found["overrides"]:
        raise ConfigError(f"--hydra-help takes no words; got {found['overrides'][0]}")
    if wrong := [name for name in NOT_OPTIONS if found[name] is not None]:
        raise ConfigError(f"--{wrong[0].replace('_', '-')} is not for a run; configs=DIR adds a folder of choices")
    return {name: value for name, value in found.items() if value or name == "overrides"}


def through_hydra(action: Callable[[Callable[[], RunConfig]], int], argv: Sequence[str]) -> int:
    """Let Hydra parse `argv`, including its own options, and call `action` for each run. `action` gets a function that
    composes the run, and returns an exit status. Returns the largest status."""
    options = _options(argv)
    words: list[str] = options.pop("overrides")
    if "multirun" in options and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "--multirun cannot run under torchrun, where every rank would start its own sweep: start one run, "
            "`torchrun ... -m scaling_testbed.train parallelism=ddp key=value`, or a grid without torchrun, "
            "`python -m scaling_testbed.sweep run sweep=NAME`"
        )
    overrides, configs = _from_outside(words, None)
    for word in overrides:
        check_choice_of_group(word, configs)
        if key_of(word) == "hydra.searchpath":
            raise ConfigError("hydra.searchpath is not for a run; configs=DIR adds a folder of choices")
        if "multirun" not in options:
            check_single(word)
    if configs:
        _check_hydra_untouched([word for word in overrides if key_of(word) not in OUTSIDE], configs)
    typed = [f"--{name.replace('_', '-')}{'' if value is True else f'={value}'}" for name, value in options.items()]
    statuses: list[int] = []

    def task(composed: DictConfig) -> None:
        overrides = HydraConfig.get().overrides.task
        statuses.append(action(lambda: to_run_config(composed, overrides)))

    main = hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="train")
    saved, sys.argv = sys.argv, [sys.argv[0], *typed, *overrides, *_search_override(configs)]
    full = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors, and does not print them in its own way
    try:
        main(task)()
    except CANNOT_COMPOSE as error:
        raise ConfigError(_one_line(error, configs)) from None
    finally:
        sys.argv = saved
        os.environ.pop(FULL_ERROR)
        os.environ |= {} if full is None else {FULL_ERROR: full}
    return max(statuses, default=0)
