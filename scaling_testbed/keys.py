"""How a configuration key is declared: `lr: float = key(1e-2, "The peak learning rate.")`.

The help text is what `train --help GROUP` and docs/reference/keys.md show. It is plain text of one or more sentences,
and says `null` for None, as it is typed.
"""

import copy
import dataclasses
from collections.abc import Collection
from typing import Any, Literal, TypeVar

from scaling_testbed.errors import check_choice

T = TypeVar("T")
Identity = bool | Literal["if_set"]

REQUIRED: Any = dataclasses.MISSING  # the `default` of a key that has none
# The key says how a run is executed, not what it computes. Another value finds the same run folder again.
EXECUTION_ONLY: Identity = False
# The key came after the first runs. It is part of the run_id only where it differs from its default.
ADDED_LATER: Identity = "if_set"


def key(
    default: T,
    help: str,
    *,
    identity: Identity = True,
    choices: Collection[str] | None = None,
    settings_of: str | None = None,
    free_names: bool = False,
) -> T:
    """A field of a configuration dataclass.

    default: REQUIRED if there is none. identity: whether the key is part of the run_id: True, EXECUTION_ONLY or
    ADDED_LATER. choices: the allowed texts; `check_choices` refuses all others. settings_of: a config group. The key is
    then a mapping of names to settings: `name`, a choice of the group, and keys of this choice. In the dataclass they
    are `kind`, the choice's schema, and the keys that differ from their default. free_names: whether a mapping takes
    its names without a plus.
    """
    metadata = {"help": help, "identity": identity, "choices": choices}
    metadata |= {"settings_of": settings_of, "free_names": free_names}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def identifies(field: dataclasses.Field[Any], value: Any, *, defaults: bool = False) -> bool:
    """Whether the field is part of the identity of a dataclass. It is not if it is EXECUTION_ONLY, or unless `defaults`
    if it is ADDED_LATER and has its default."""
    rule = field.metadata.get("identity", True)
    if rule != ADDED_LATER or defaults:
        return bool(rule)
    return bool(value != default_of(field))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_choices(config: Any) -> None:
    """Raise ConfigError unless each key of `config` that has choices holds one of them."""
    for field in dataclasses.fields(config):
        choices = about(type(config), field.name).get("choices")
        if choices is not None:
            check_choice(field.name, getattr(config, field.name), choices)


def changed_from_default(config: Any) -> dict[str, Any]:
    """The fields of a configuration that count and differ from their default, so that a key that is added later is not
    there."""
    found = {}
    for field in dataclasses.fields(config):
        if not field.metadata.get("identity", True):
            continue
        if (value := getattr(config, field.name)) != default_of(field):
            found[field.name] = value
    return found


def about(cls: type, name: str) -> dict[str, Any]:
    """The metadata that `key` stored for the field `name`. A subclass that only sets another default inherits it."""
    for ancestor in cls.__mro__:
        field = ancestor.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None and "help" in field.metadata:
            return dict(field.metadata)
    return {}
