"""Compose overrides into a RunConfig. Only this module imports Hydra and OmegaConf.

The dataclasses in GROUPS are registered as Hydra's schemas, so every key has one default and one type. A file in
configs/ names the schema of its group (`/schema/optimizer/adamw@_here_`) and holds only values that differ from it.
plugins= and configs= are read before Hydra composes, so that their choices are available like all others.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from scaling_testbed.config.run import GROUPS, RunConfig, outcome_of, run_id
from scaling_testbed.config.search import CONFIG_DIR, check_no_doubles, choices, config_folder, search_path
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import YAMLError, read_yaml
from scaling_testbed.plugins import check_unchanged, load_named_in, load_plugins, loaded_plugins

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Filled = TypeVar("Filled", bound="DataclassInstance")

CANNOT_COMPOSE = (HydraException, OmegaConfBaseException, YAMLError)


def compose(overrides: Sequence[str], config_name: str = "train", *, written_in: Path | None = None) -> RunConfig:
    """Return the run that `overrides` describe (Hydra's grammar: key=value, group=choice, +key=value).

    written_in: the file that contains the overrides; None if a person typed them, including the plug-ins. Raises
    ConfigError, one or two lines that name the key, for an unknown key or choice, a wrong type or a bad value. Raises
    UserError for plug-ins that a file must not name (see plugins.py).
    """
    overrides, configs = _from_outside(overrides, written_in)
    try:
        return to_run_config(_compose_dict(overrides, configs, config_name), overrides)
    except CANNOT_COMPOSE as error:
        raise ConfigError(_one_line(error, configs)) from None


def compose_many(override_lists: Sequence[Sequence[str]], *, written_in: Path | None = None) -> list[RunConfig]:
    """Compose each list. This takes about a tenth of the time of `compose` if the lists differ only in plain values.

    Hydra composes once for each choice of groups, and the values are set on copies of the result. Raises ConfigError as
    `compose` does.
    """
    parsed = functools.cache(OverridesParser.create().parse_override)
    bases: dict[tuple[str, ...], DictConfig] = {}
    runs = []
    for overrides in override_lists:
        overrides, configs = _from_outside(overrides, written_in)
        values = [text for text in overrides if _sets_plain_value(text)]
        chosen = tuple(text for text in overrides if not _sets_plain_value(text))
        try:
            if chosen not in bases:
                bases[chosen] = _compose_dict(chosen, configs)
            composed = copy.deepcopy(bases[chosen])
            for override in map(parsed, values):
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
            runs.append(to_run_config(composed, overrides))
        except (*CANNOT_COMPOSE, ConfigError):
            runs.append(compose(overrides, written_in=written_in))  # its errors name the key
    return runs


def _sets_plain_value(text: str) -> bool:
    """Whether an override only sets the value of a key: it chooses no group, and adds or deletes no key."""
    key = text.partition("=")[0]
    return "." in key and key[0].isalpha() and "@" not in key and "/" not in key or key in _TOP_LEVEL


OUTSIDE = ("plugins", "configs")
_TOP_LEVEL = {f.name for f in dataclasses.fields(RunConfig)} - {*GROUPS, *OUTSIDE, "overrides"}


def outside_of(overrides: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split `overrides` into the names in plugins= and in configs=, both as typed, and the other overrides. Raises
    ConfigError if a value of these two keys is neither a name nor a list of names."""
    named: dict[str, list[str]] = {key: [] for key in OUTSIDE}
    others = []
    for text in overrides:
        if (key := _key(text)) in named:
            named[key] += _names(key, text)
        else:
            others.append(text)
    return named["plugins"], named["configs"], others


def check_no_code(overrides: Sequence[str], file: str | Path) -> None:
    """Raise ConfigError if overrides from a file would load code. A sweep file names plug-ins in its own key `plugins`,
    and keys of Hydra itself, such as its search path, can import any module."""
    for text in overrides:
        if (key := _key(text)) in OUTSIDE or re.match(r"hydra\b", key):
            raise ConfigError(f"{file}: no override in a file may set {key}; a sweep file has keys plugins and configs")


def _key(text: str) -> str:
    return text.partition("=")[0].strip().lstrip("+~").strip()


def _names(key: str, text: str) -> list[str]:
    override = _parsed(text)
    value: object = None if override.is_sweep_override() else override.value()
    names = [value] if isinstance(value, str) else value
    if not _is_list_of_texts(names) or "" in names:
        raise ConfigError(f"{key} takes a name or a list of names, {key}=[a,b], for all runs; got {text!r}")
    return names


def outside_overrides(plugins: Sequence[str], configs: Sequence[str]) -> list[str]:
    """The overrides that name these plug-ins and folders; an empty list if there are none."""
    named = zip(OUTSIDE, (plugins, configs), strict=True)
    return [f"{key}=[{','.join(map(_quoted, dict.fromkeys(names)))}]" for key, names in named if names]


def _from_outside(overrides: Sequence[str], written_in: Path | None) -> tuple[list[str], list[str]]:
    """Load plug-ins and register all schemas. Returns overrides with absolute names, and the folders of configs=."""
    plugins, configs, others = outside_of(overrides)
    if written_in is None:
        loaded = load_plugins(plugins)
    else:
        check_no_code(others, written_in)
        loaded = load_named_in(written_in, plugins, "--plugins ")
    configs = list(dict.fromkeys(map(config_folder, configs)))
    if configs:
        check_no_doubles(configs)
    _register_schemas()
    return [*outside_overrides([plugin.name for plugin in loaded], configs), *others], configs


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
    return cls(**values)


def _is_list_of_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _as_typed(text: str, is_list: bool) -> str | list[Any] | None:
    """The value in `key=value`: for a list as Hydra parses it, else the text as it is, including commas."""
    value = text.partition("=")[2]
    if is_list:
        with contextlib.suppress(HydraException):
            parsed = OverridesParser.create().parse_override(text).value()
            return parsed if isinstance(parsed, list) else value
    return None if value == "null" else value


def override_values(text: str) -> tuple[str, list[str]]:
    """The key in `key=value` and its values, as they are typed. `key=a,b` and key=range(...) (Hydra's sweeps) have
    several. Raises ConfigError if Hydra cannot parse the text."""
    override = _parsed(text)
    try:
        if not override.is_sweep_override():
            return override.get_key_element(), [text.partition("=")[2]]
        return override.get_key_element(), list(override.sweep_string_iterator())
    except HydraException as error:
        raise ConfigError(_one_line(error)) from None


def _parsed(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(_unreadable(text)) from None


def _unreadable(override: str) -> str:
    hint = """and put a value with spaces, quotes or letters like ä in both kinds of quotes: 'key="value"'"""
    return f"cannot read the override {override!r}; write key=value, {hint}"


def _compose_dict(
    overrides: Sequence[str], configs: Sequence[str], config_name: str = "train", *, with_hydra: bool = False
) -> DictConfig:
    for key, _, value in (text.partition("=") for text in overrides):
        if key in GROUPS and value.strip().lower() == "null":
            raise ConfigError(f"{key}={value}: a group cannot be null; --help lists its choices")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
        found = [*overrides, *_search_override(configs)]
        return hydra.compose(config_name, overrides=found, return_hydra_config=with_hydra)


def _search_override(configs: Sequence[str]) -> list[str]:
    places = ",".join(_quoted(f"file://{folder}") for folder in configs)
    return [f"hydra.searchpath=[{places}]"] if configs else []


def to_run_config(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Freeze a composed config into dataclasses, group by group. Raises ConfigError naming the group and key."""
    OmegaConf.resolve(composed)
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    if unknown := [str(key) for key in composed if key not in fields]:
        raise ConfigError(_unknown_key(unknown[0]))
    for key, named in zip(OUTSIDE, outside_of(overrides)[:2], strict=True):
        if list(composed[key]) != named:
            raise ConfigError(f"{key} is set in a config file; type {key}=[...], or set it in a sweep file")
    values = {}
    for key in map(str, composed):
        node = composed._get_node(key)
        if key in GROUPS and not dataclasses.is_dataclass(OmegaConf.get_type(node)):
            raise ConfigError(f"{key} has no schema; its file must name one in its defaults list")
        values[key] = _freeze(node, key) if isinstance(node, DictConfig) and not node._is_none() else composed[key]
    lists = {key: list(composed[key]) for key in OUTSIDE} | {"overrides": list(overrides)}
    return RunConfig(**values | lists)


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
    kinds = [kind for kind, cls in GROUPS.get(group, {}).items() if field in {f.name for f in dataclasses.fields(cls)}]
    if kinds:
        return f"{key} belongs to {group}={' or '.join(kinds)}, not to the {group} that was chosen"
    return f"there is no key {key}; {_close_to(key, _known_keys()) or '`--cfg job` prints every key'}"


def _close_to(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _one_line(error: Exception, configs: Sequence[str] = ()) -> str:
    """Describe an error of Hydra or OmegaConf in one or two lines that name the key."""
    if isinstance(error, YAMLError):
        return f"a file cannot be read as YAML: {' '.join(str(error).split())}"
    inner = error.__cause__ or error.__context__
    cause = inner if isinstance(inner, OmegaConfBaseException) else None
    key = getattr(cause or error, "full_key", None)
    message = (getattr(cause, "msg", None) or str(cause or error)).strip()
    if re.search(r"not in (struct|')|not in struct", message) and key:
        file = re.match(r"In '[^']+': ", str(error))
        return (file[0] if file else "") + _unknown_key(key)
    if missing := re.search(r"Could not find '([^']+)'", message):
        group, _, choice = missing.group(1).rpartition("/")
        return f"{group} has no choice {choice!r}; it has {', '.join(sorted(choices(group, configs)))}"
    if missing := re.search(r"In '([^']+)/([^']+)': Could not load 'schema/", message):
        group, choice = missing.groups()
        return f"{group}={choice} comes from a plug-in that is not loaded; type plugins=NAME, its module or .py file"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    first = message.splitlines()[0]
    if unmatched := re.search(r"Could not override '([^']+)'", first):
        return _unknown_key(unmatched.group(1))
    if key and cause:
        return f"{key}: {_uncapitalized(first)}"
    return first


def _uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def quoted(value: str) -> str:
    """Write a text as the value of an override, in quotes if it needs them."""
    if re.fullmatch(r"[A-Za-z0-9_./@%+-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def recorded_run(folder: Path) -> RunConfig:
    """Return the run of a run folder, composed from the overrides in its config.yaml. Its device is the best one of
    this machine, not the one that it ran on.

    Raises UserError if the folder has no readable config.yaml, if this version of the project composes another run from
    it, or if a plug-in of the run is not allowed or has changed.
    """
    file = folder / "config.yaml"
    try:
        recorded = read_yaml(file)
        here = [f"data_dir={_quoted(recorded['data_dir'])}", "compute.device=auto"]
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
        raise UserError(f"{folder} was renamed, or made by another version: its overrides now mean run {run_id(run)}")
    check_unchanged(was, run.plugins, folder)
    return run


def _hashes_of_last_start(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the plug-ins at the last start of a run."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        last = json.loads((folder / "environment.json").read_text())["starts"][-1]
        return {plugin["name"]: plugin["sha256"] for plugin in last["plugins"]}
    return {}


def _stand_in(name: str, sha256: str | None) -> str:
    """The name of a loaded plug-in with the same source, else `name`: the file may have had another path in the run."""
    return next((plugin.name for plugin in loaded_plugins() if plugin.sha256 == sha256), name)


def _quoted(text: str) -> str:
    """Quote a text so that Hydra reads back the same text, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def run_config_files(configs: Sequence[str] = ()) -> list[Path]:
    """The files that are choices of a run. Files of sweep/ and launcher/ are not among them."""
    files = [path for root in search_path(configs) for path in root.glob("*/*.yaml")]
    of_runs = [path for path in files if path.parent.name in {*GROUPS, "experiment"}]
    return sorted(of_runs, key=lambda path: (path.parent.name, path.name))


RUNS_CODE = ("callbacks", "job_logging", "hydra_logging", "launcher", "sweeper")  # keys of hydra that name classes


def _check_hydra_untouched(overrides: Sequence[str], configs: Sequence[str]) -> None:
    """Raise ConfigError if a file in configs= sets a key of Hydra that names code to import and call. Such a folder may
    come from another person, and only plugins= may name code. Typed overrides may set these keys."""

    def of_hydra(overrides: Sequence[str], configs: Sequence[str]) -> dict[str, Any]:
        try:
            composed = _compose_dict(overrides, configs, with_hydra=True).hydra
        except CANNOT_COMPOSE as error:
            raise ConfigError(_one_line(error, configs)) from None
        found: Any = OmegaConf.to_container(composed, resolve=False)
        return {key: found[key] for key in RUNS_CODE}

    single = [text for text in overrides if not _parsed(text).is_sweep_override()]
    typed = of_hydra([text for text in single if re.match(r"hydra\b", _key(text))], ())
    swept = [override_values(text) for text in overrides if text not in single and not _sets_plain_value(text)]
    first = {key: values[0] for key, values in swept}  # other keys may exist only with a choice
    for key, value in [("", ""), *((key, value) for key, values in swept for value in values[1:])]:
        choices_of_run = first | ({key: value} if key else {})
        found = of_hydra([*(f"{group}={choice}" for group, choice in choices_of_run.items()), *single], configs)
        if changed := [key for key in RUNS_CODE if found[key] != typed[key]]:
            raise ConfigError(f"a file in configs= sets hydra.{changed[0]}, which names code; type it, or remove it")


def through_hydra(action: Callable[[Callable[[], RunConfig]], int], argv: Sequence[str]) -> int:
    """Let Hydra parse `argv`, including its own options, and call `action` for each run. `action` gets a function that
    composes the run, and returns an exit status. Returns the largest status."""
    multirun = {"-m", "--multirun"} & set(argv)
    if multirun and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "--multirun cannot run under torchrun, where every rank would start its own sweep: start one run, "
            "`torchrun ... -m scaling_testbed.train parallelism=ddp key=value`, or a grid without torchrun, "
            "`python -m scaling_testbed.sweep run sweep=NAME`"
        )
    overrides, configs = _from_outside(argv, None)
    others = outside_of(argv)[2]
    if configs:
        _check_hydra_untouched([text for text in others if "=" in text and not text.startswith("-")], configs)
    at = next((at for at, (typed, other) in enumerate(zip(argv, others, strict=False)) if typed != other), len(others))
    named = overrides[: len(overrides) - len(others)]
    argv = [*others[:at], *named, *_search_override(configs), *others[at:]]  # argparse needs the old order
    statuses: list[int] = []

    def task(composed: DictConfig) -> None:
        overrides = HydraConfig.get().overrides.task
        statuses.append(action(lambda: to_run_config(composed, overrides)))

    main = hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="train")
    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        main(task)()
    finally:
        sys.argv = saved
    return max(statuses, default=0)
