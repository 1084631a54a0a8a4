"""Files that are there whole or not at all, also after a power cut."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from scaling_testbed.errors import ConfigError, UserError

YAMLError = yaml.YAMLError  # what others' readers of YAML raise, too


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step. Raises UserError naming it when the disk refuses, or it is a device, say."""
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is there already, and no file")
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
    """`write_text` of a JSON value, one entry per line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which a key that is given twice is an error: PyYAML would drop the first."""

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
    """Scalars stay texts, but for null: to YAML 1.1 8:00:00 is the number 28800, and 007 is 7."""

    _NULL = ("tag:yaml.org,2002:null", re.compile("(~|null)?$"))
    yaml_implicit_resolvers = {"": [_NULL], "~": [_NULL], "n": [_NULL]}


def read_yaml(path: Path, *, as_written: bool = False) -> Any:
    """What a YAML file holds; as_written: with scalars as text. Raises FileNotFoundError, and ConfigError naming the
    file that cannot be read."""
    try:
        return yaml.load(path.read_text(), _AsWritten if as_written else _Loader)
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
