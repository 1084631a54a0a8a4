"""From overrides to a RunConfig. The only importer of Hydra and OmegaConf.

The dataclasses of schema.py are registered as Hydra's schemas, so that every key has one default and one type, and a
file in configs/ that names a group's schema (`/schema/optimizer/adamw@_here_`) says only what deviates.
"""

import copy
import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scaling_testbed.config.run import GROUPS, RunConfig, run_id
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import read_yaml

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Sequence[str], config_name: str = "train") -> RunConfig:
    """The run that `overrides` (Hydra's grammar: key=value, group=choice, +key=value) ask for.

    Raises ConfigError, one or two lines naming the key, for an unknown key or choice, a wrong type or a bad value.
    """
    _register_schemas()
    try:
        return to_run_config(_compose_dict(overrides, config_name), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, overrides)) from None


def compose_many(override_lists: Sequence[Sequence[str]]) -> list[RunConfig]:
    """`compose` of each list, in about a tenth of the time where lists differ in plain values only: Hydra composes once
    for each choice of groups, and values are set on copies of that. Raises ConfigError as `compose` does.
    """
    _register_schemas()
    parsed = functools.cache(OverridesParser.create().parse_override)
    bases: dict[tuple[str, ...], DictConfig] = {}
    runs = []
    for overrides in override_lists:
        values = [text for text in overrides if _sets_plain_value(text)]
        choices = tuple(text for text in overrides if not _sets_plain_value(text))
        try:
            if choices not in bases:
                bases[choices] = _compose_dict(choices)
            composed = copy.deepcopy(bases[choices])
            for override in map(parsed, values):
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
            runs.append(to_run_config(composed, overrides))
        except (HydraException, OmegaConfBaseException, ConfigError):
            runs.append(compose(overrides))  # it knows how to say what is wrong
    return runs


def _sets_plain_value(text: str) -> bool:
    """Whether an override only sets a key: it chooses no group, adds and deletes nothing."""
    key = text.partition("=")[0]
    return "." in key and key[0].isalpha() and "@" not in key and "/" not in key or key in _TOP_LEVEL


_TOP_LEVEL = {f.name for f in dataclasses.fields(RunConfig)} - set(GROUPS) - {"overrides"}


def fill(cls: type, path: Path, prefix: str, overrides: Sequence[str]):
    """A dataclass outside of RunConfig from a YAML file and overrides `prefix.key=value`. Raises ConfigError naming
    the file or key."""
    kinds = {f"{prefix}.{f.name}": f.type for f in dataclasses.fields(cls)}
    try:
        content = read_yaml(path, as_written=True) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    given = [(f"{prefix}.{key}", value, f"{path}: ") for key, value in content.items()]
    given += [(*_typed_entry(text, kinds), "") for text in overrides]
    values = {}
    for key, value, where in given:
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(kinds)}"
            raise ConfigError(f"{where}there is no key {key}; {hint}")
        try:
            values[key.removeprefix(f"{prefix}.")] = _as_kind(value, kinds[key])
        except ValueError as error:
            raise ConfigError(f"{where}{key} must be {error}; got {value!r}") from None
    return cls(**values)


def _typed_entry(text: str, kinds: dict[str, Any]) -> tuple[str, Any]:
    """Key and value of `key=value`: of a list as Hydra reads it, else whatever is written, commas and all."""
    key, _, value = text.partition("=")
    if kinds.get(key) != list[str]:
        return key, value
    try:
        parsed = OverridesParser.create().parse_override(text).value()
    except HydraException:
        return key, value
    return key, parsed if isinstance(parsed, list) else value


def _as_kind(value: Any, kind: Any) -> Any:
    """A text, a list of texts or None as the type of a field. Raises ValueError with what it must be."""
    kinds = get_args(kind) or (kind,)
    if kind == list[str]:
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return [str(entry) for entry in value]
        raise ValueError("a list of texts, such as ['a b','c']")
    if value in (None, "null"):
        if type(None) in kinds:
            return None
        raise ValueError("given")
    if not isinstance(value, str):
        raise ValueError("one value")
    if int in kinds:
        if not re.fullmatch(r"[+-]?\d+", value.strip()):
            raise ValueError("a whole number")
        return int(value)
    if bool in kinds:
        if value.lower() not in _BOOLEANS:
            raise ValueError("true or false")
        return _BOOLEANS[value.lower()]
    return value


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def override_values(text: str) -> tuple[str, list[str]]:
    """The key of `key=value` and its values, more than one for `key=a,b` or key=range(...) (Hydra's sweeps), as they
    would be typed. Raises ConfigError for what Hydra cannot read."""
    try:
        override = OverridesParser.create().parse_override(text)
        if not override.is_sweep_override():
            return override.get_key_element(), [text.partition("=")[2]]
        return override.get_key_element(), list(override.sweep_string_iterator())
    except HydraException as error:
        raise ConfigError(_one_line(error, [text])) from None


def _compose_dict(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    for key, _, value in (text.partition("=") for text in overrides):
        if key in GROUPS and value.strip().lower() == "null":
            raise ConfigError(f"{key}={value}: a group cannot be null; --help lists its choices")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
        return hydra.compose(config_name, overrides=list(overrides))


def to_run_config(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Freeze a composed config into dataclasses, group by group. Raises ConfigError naming the group and key."""
    OmegaConf.resolve(composed)
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    if unknown := [str(key) for key in composed if key not in fields]:
        raise ConfigError(_unknown_key(unknown[0]))
    values = {}
    for key in composed:
        node = composed._get_node(key)
        values[key] = _freeze(node, key) if isinstance(node, DictConfig) and not node._is_none() else composed[key]
    return RunConfig(**values | {"overrides": list(overrides)})


def _freeze(node: DictConfig, group: str):
    """One group's node as its dataclass, with the group's name in front of whatever is wrong."""
    cls = OmegaConf.get_type(node)
    if cls is dict:
        return OmegaConf.to_container(node)
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{group} has no schema; its file must name one in its defaults list")
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := [str(key) for key in node if key not in known]:
        raise ConfigError(_unknown_key(f"{group}.{unknown[0]}"))
    try:
        return OmegaConf.to_object(node)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if f"{group}." in message else f"{group}.{message}") from None


def _register_schemas() -> None:
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=_unlocked(RunConfig))
    for group, kinds in GROUPS.items():
        for kind, cls in kinds.items():
            if kind:
                store.store(group=f"schema/{group}", name=kind, node=_unlocked(cls))
            else:
                store.store(group="schema", name=group, node=_unlocked(cls))


def _unlocked(cls) -> DictConfig:
    """A structured config that can still be overridden although its dataclass is frozen."""
    config = OmegaConf.structured(cls)
    config._set_flag("readonly", None)
    for child in config._content.values():
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


def _plain_sections():
    """The parts of RunConfig that are dataclasses of one kind and no config group."""
    return [(field.name, field.type) for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)]


def _unknown_key(key: str) -> str:
    group, _, field = key.partition(".")
    if group == "interventions" and field:
        return f"{key} must be typed with a plus, which adds it: +{key}.KEY=VALUE"
    kinds = [kind for kind, cls in GROUPS.get(group, {}).items() if field in {f.name for f in dataclasses.fields(cls)}]
    if kinds:
        return f"{key} belongs to {group}={' or '.join(kinds)}, not to the {group} that was chosen"
    close = difflib.get_close_matches(key, _known_keys(), n=1)
    hint = f"did you mean {close[0]}?" if close else "`--cfg job` prints every key"
    return f"there is no key {key}; {hint}"


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's errors in one or two lines that name the key."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    key = getattr(cause or error, "full_key", None)
    message = (getattr(cause, "msg", None) or str(cause or error)).strip()
    if re.search(r"not in (struct|')|not in struct", message) and key:
        return _unknown_key(key)
    if missing := re.search(r"Could not find '([^']+)'", message):
        group, _, choice = missing.group(1).rpartition("/")
        options = [path.stem for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]
        return f"{group} has no choice {choice!r}; it has {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        hint = """in both kinds of quotes where the value has spaces or letters like ä: 'key="value"'"""
        return f"cannot read the override {error.override!r}; write key=value, {hint}"
    first = message.splitlines()[0]
    if unmatched := re.search(r"Could not override '([^']+)'", first):
        return _unknown_key(unmatched.group(1))
    if key and cause:
        return f"{key}: {first[0].lower()}{first[1:]}"
    return first


def quoted(value: str) -> str:
    """A text as the value of an override."""
    if re.fullmatch(r"[A-Za-z0-9_./@%+-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def recorded_run(folder: Path) -> RunConfig:
    """The run of a run folder, by the overrides that its config.yaml keeps. Raises UserError where there is none, or
    where they mean another run to this version of the project. Its device is the best one here, not where it ran."""
    file = folder / "config.yaml"
    try:
        recorded = read_yaml(file)
        here = [f"data_dir={_quoted(recorded['data_dir'])}", "compute.device=auto"]
        overrides = [*recorded["overrides"], *here]
    except (OSError, KeyError, TypeError, AttributeError, ConfigError):
        raise UserError(f"{folder} is no run folder: it has no readable config.yaml") from None
    try:
        run = compose(overrides)
    except ConfigError as error:
        raise UserError(f"{file} cannot be composed any more: {error}") from None
    if run_id(run) != folder.resolve().name:
        raise UserError(f"{folder} was renamed, or made by another version: its overrides now mean run {run_id(run)}")
    return run


def _quoted(text: str) -> str:
    """A value as Hydra reads it back, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def run_config_files() -> list[Path]:
    """The files that are choices of a run; those of sweep/ and launcher/ are none."""
    return sorted(path for path in CONFIG_DIR.glob("*/*.yaml") if path.parent.name in {*GROUPS, "experiment"})


def through_hydra(action: Callable[[Callable[[], RunConfig]], int], argv: Sequence[str]) -> int:
    """Let Hydra read `argv`, its own options among it, and call `action` for each run with what composes it. Returns
    the largest status."""
    multirun = {"-m", "--multirun"} & set(argv)
    if multirun and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "--multirun cannot run under torchrun, where every rank would start its own sweep: start one run, "
            "`torchrun ... -m scaling_testbed.train parallelism=ddp key=value`, or a grid without torchrun, "
            "`python -m scaling_testbed.sweep run sweep=NAME`"
        )
    _register_schemas()
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
