"""The columns of a sweep file: a key, and the values that it has in the runs.

A value is spelled as on the command line. None among the values of keys that move together: the row does not set the
key.
"""

from collections.abc import Collection, Sequence
from typing import Any

from scaling_testbed.config.words import has_several, read, slot_of
from scaling_testbed.errors import ConfigError


def spelled(value: Any) -> str:
    """A value of a sweep file, whose scalars are read as text, as it is typed after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spelled(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (bytes, set)):
        raise ConfigError(f"a key cannot have the value {value!r}")
    return str(value)


def check_column(what: str, key: str, values: Sequence[str | None]) -> None:
    """Raise ConfigError unless each value, after `key=`, is a word that sets this key to one value."""
    if "=" in key:
        raise ConfigError(f"{what}.{key} is no key that can be set")
    for value in values:
        if value is None:
            continue
        text = f"{key}={value}"
        if read(text).is_delete():
            raise ConfigError(f"{what}.{key} is no key that can be set")
        if has_several(text):
            raise ConfigError(f"{what}.{key}: {value} stands for several values; write each as an item of the list")


def columns_of(what: str, entry: Any, scalars: bool = False) -> dict[str, list[str]]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{what} takes mappings of keys to lists of values; got {entry!r}")
    columns = {}
    for key, values in entry.items():
        if scalars and not isinstance(values, list):
            values = [values]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{what}.{key} must be a list of values; got {values!r}")
        columns[str(key)] = [spelled(value) for value in values]
        check_column(what, str(key), columns[str(key)])
    return columns


def tied_columns(entry: Any) -> dict[str, list[str | None]]:
    """Keys that move together as columns, from columns or from a list of rows. Each row has the leading key."""
    if not isinstance(entry, list):
        return {key: [*values] for key, values in columns_of("together", entry).items()}
    if not entry or not all(isinstance(row, dict) and row for row in entry):
        raise ConfigError(f"together takes mappings of keys to lists of values, or lists of rows; got {entry!r}")
    lead = next(iter(entry[0]))
    if without := [row for row in entry if lead not in row]:
        raise ConfigError(f"every row of keys that move together needs the leading key {lead}; got {without[0]!r}")
    keys = dict.fromkeys(str(key) for row in entry for key in row)
    columns: dict[str, list[str | None]]
    columns = {key: [spelled(row[key]) if key in row else None for row in entry] for key in keys}
    for key, values in columns.items():
        check_column("together", key, values)
    return columns


def row_of(entry: dict[str, list[str | None]], values: Sequence[str | None]) -> dict[str, str]:
    return {key: value for key, value in zip(entry, values, strict=True) if value is not None}


def telling_apart(entry: dict[str, list[str | None]]) -> list[str]:
    """The keys that tell the rows of keys that move together apart: the leading one and, where rows have the same value
    of it, others in their order."""

    def kinds(keys: Sequence[str]) -> int:
        return len(set(zip(*(entry[key] for key in keys), strict=True)))

    found: list[str] = []
    for key in entry:
        if not found or kinds([*found, key]) > kinds(found):
            found.append(key)
    return found


def column_slot(key: str, values: Sequence[str | None]) -> tuple[str, bool]:
    """What a column of values sets, as slot_of."""
    return slot_of(f"{key}={next(value for value in values if value is not None)}")


def without_columns(entry: dict[str, list[str | None]], slots: Collection[tuple[str, bool]]) -> dict:
    """Keys that move together without those that do not lead and set one of `slots`."""
    return {
        key: values
        for at, (key, values) in enumerate(entry.items())
        if at == 0 or column_slot(key, values) not in slots
    }
