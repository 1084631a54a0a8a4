"""Read JSON and YAML, hash files, and write files atomically: complete or absent, also after a power failure."""

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from scaling_testbed.errors import ConfigError, UserError

CANNOT_WRITE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would be larger than this process may write (`ulimit -f`)",
}
MOST_NODES = 1_000_000  # of a YAML file
YAMLError = yaml.YAMLError  # the error of YAML readers in other packages too


class MissingFile(UserError, FileNotFoundError):
    """There is no such file. A caller for whom that is no error catches FileNotFoundError."""


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically.

    Raises UserError that names the file if it cannot be written or is not a regular file.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        what = text[error.start : error.end]
        raise UserError(f"cannot write {path}: the text holds {what!a}, which is no character") from None
    write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically by `content`. Raises UserError as `write_text` does."""
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it exists and is not a regular file")
        with open(work, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink()
        raise cannot_write(path, error, len(content)) from None


def cannot_write(path: Path, error: OSError, needed: int | None = None) -> UserError:
    """The UserError for a failed write of `path`. needed: the bytes of the whole file or folder, if they are known."""
    return UserError(f"cannot write {path}: {reason_of(error)}{space(path, needed, error)}")


def reason_of(error: OSError) -> str:
    """Why the operating system refused to read or write, in words of this project where it has some."""
    return CANNOT_WRITE.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def os_error_in(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system that caused `error`, or None. torch.save raises RuntimeError after it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def space(path: Path, needed: int | None, error: OSError) -> str:
    """The bytes that a file or folder needs and those that are free on its disk, as the end of the message of `error`;
    empty unless the error is a lack of space."""
    if needed is None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    with contextlib.suppress(OSError):
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        disk = os.statvfs(there)
        return f" ({needed:,} bytes are needed, and {disk.f_bavail * disk.f_frsize:,} are free on this disk)"
    return f" ({needed:,} bytes are needed)"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value with `write_text`, one entry per line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, *, expect: type = dict, advice: str = "") -> Any:
    """The value in a JSON file that this project wrote.

    expect: the type that the value must have. advice: what to do about a damaged file, at the end of the message.
    Raises MissingFile if there is no such file, and UserError that names the file if it cannot be read.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}){_then(advice)}") from None
    return parse_json(text, path, expect=expect, advice=advice)


def parse_json(text: str | bytes, where: str | Path, *, expect: type = dict, advice: str = "") -> Any:
    """The value of JSON text that this project wrote, such as one line of a .jsonl file.

    where: the file, or file and line, for messages. expect, advice: as in `read_json`. Raises UserError if the text
    is no JSON, if an object has a key twice, or if the value has another type.
    """
    try:
        value = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8, and a number of too many digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} cannot be read as JSON ({reason}); it is damaged{_then(advice)}") from None
    if not isinstance(value, expect):
        found = f"{type(value).__name__} in place of {expect.__name__}"
        raise UserError(f"{where} cannot be read ({found}); it is damaged{_then(advice)}")
    return value


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these pairs. Raises ValueError if a key is there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


def _then(advice: str) -> str:
    return f"; {advice}" if advice else ""


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
    """A loader that keeps each scalar except null and << as text. YAML 1.1 reads 8:00:00 as 28800 and 007 as 7."""

    _NULL = ("tag:yaml.org,2002:null", re.compile("(~|null)?$"))
    _MERGE = ("tag:yaml.org,2002:merge", re.compile("<<$"))
    yaml_implicit_resolvers = {"": [_NULL], "~": [_NULL], "n": [_NULL], "<": [_MERGE]}


def read_yaml(path: Path, *, as_written: bool = False) -> Any:
    """The content of a YAML file. as_written: keep scalars as text.

    Raises FileNotFoundError if there is no such file, and ConfigError that names the file if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    return _yaml(text, str(path), _AsWritten if as_written else _Loader)


def yaml_in(text: str, where: str) -> Any:
    """The value of a text in YAML, with scalars kept as text. Raises ConfigError that begins with `where`."""
    return _yaml(text, where, _AsWritten)


def _yaml(text: str, where: str, loader: type[yaml.SafeLoader]) -> Any:
    try:
        content = yaml.load(text, loader)
        _check_size(content)
        return content
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99, 10,000 digits
        raise ConfigError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}") from None


def check_version(path: Path, version: Any, known: int) -> None:
    """Raise UserError if the file at `path` has a newer version of its fields than `known`, or no version that can be
    read. Files of versions that had none have None."""
    if version is None or (type(version) is int and 0 < version <= known):
        return
    if type(version) is int and version > known:
        raise UserError(
            f"{path} was written by a newer version of scaling-testbed (schema_version {str(version)[:20]}; this one "
            f"reads {known}); install the newer version"
        )
    raise UserError(f"{path} is damaged: its schema_version is {str(version)[:20]!a}; restore it")


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


def sha256_of_input(path: str | Path) -> str:
    """sha256 of a file that a user gave. Raises UserError that names the file if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
