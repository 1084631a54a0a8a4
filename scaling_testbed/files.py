"""Read YAML, hash files, and write files atomically: a file is complete or absent, also after a power failure."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from scaling_testbed.errors import ConfigError, UserError

MOST_NODES = 1_000_000  # of a YAML file
YAMLError = yaml.YAMLError  # the error of YAML readers in other packages too


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically.

    Raises UserError that names the file if it cannot be written or is not a regular file.
    """
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it exists and is not a regular file")
        with open(work, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value with `write_text`, one entry per line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.1 that refuses a duplicate key. PyYAML keeps the last one silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _AsWritten(_Loader):
    """A loader that keeps each scalar except null as text. YAML 1.1 reads 8:00:00 as 28800 and 007 as 7."""

    _NULL = ("tag:yaml.org,2002:null", re.compile("(~|null)?$"))
    yaml_implicit_resolvers = {"": [_NULL], "~": [_NULL], "n": [_NULL]}


def read_yaml(path: Path, *, as_written: bool = False) -> Any:
    """The content of a YAML file. as_written: keep scalars as text.

    Raises FileNotFoundError if there is no such file, and ConfigError that names the file if it cannot be read.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _AsWritten if as_written else _Loader)
        _check_size(content)
        return content
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99, 10,000 digits
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None


def _check_size(content: Any) -> None:
    """Raise ValueError if YAML's aliases make a circle, or repeat a part so often that nobody could use the whole."""
    left, waiting = MOST_NODES, [content]
    while waiting:
        node = waiting.pop()
        left -= 1
        if left < 0:
            raise ValueError(f"it has more than {MOST_NODES:,} values, or an alias that contains itself")
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def fsync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, so that renames inside it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
