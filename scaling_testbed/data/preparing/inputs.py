"""The files that a corpus was prepared from, and whether the files of now have the same bytes.

The manifest of a prepared folder has a summary of them, and `inputs.json` beside it has a line for each file. A file
whose size and time are as recorded is not read. A file with another time is hashed once, and `.inputs_seen.json` keeps
the result. No document is read.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_testbed.data.manifest import fingerprint_of, read_manifest
from scaling_testbed.data.shards import SCHEMA_VERSION
from scaling_testbed.data.sources.reading import form_of, kind_of
from scaling_testbed.errors import UserError
from scaling_testbed.files import read_json, sha256_of_input, write_text
from scaling_testbed.plugins import source_hash

LIST_FILE, SEEN_FILE = "inputs.json", ".inputs_seen.json"
HASH_THREADS = 8


@dataclass(frozen=True)
class File:
    """A file as it is now. role: what it is for, such as a split. label: its path below the folder that all files of
    its role are in."""

    role: str
    label: str
    path: str
    size: int
    mtime_ns: int
    place: tuple[int, int, int]  # device, inode and ctime: they change if the file is edited and its time is set back


@dataclass(frozen=True)
class Inputs:
    """What decides the tokens of a corpus. settings: a hash of the settings of source and tokenizer, without the places
    of files. files: in the order in which they are read; None if they are not on this machine, as for a dataset of the
    hub."""

    settings: str
    files: list[File] | None

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files or ())

    def summary(self, sha256s: Sequence[str | None]) -> dict[str, Any]:
        """The summary for the manifest and the row. sha256s: of the files in order; None: of a file that was not
        read."""
        files = self.files or []
        content = [_content(file, sha256) for file, sha256 in zip(files, sha256s, strict=True)]
        return {
            "files": len(files),
            "bytes": self.n_bytes,
            "settings": self.settings,
            "sha256": fingerprint_of([self.settings, content]),
        }


def _content(file: File, sha256: str | None) -> list[Any]:
    """What of a file decides the tokens. The place and the name decide nothing, except by the ending."""
    return [file.role, kind_of(file.path), sha256 or [file.size, file.mtime_ns]]


def inputs_of(source, tokenizer) -> Inputs:
    """The inputs of a corpus as they are now. Raises UserError or ConfigError if a file is missing."""
    settings = {"schema": SCHEMA_VERSION, "source": source.settings()}
    parts, groups = [source, *source.parts().values()], source.inputs()
    if source.uses_tokenizer:
        parts.append(tokenizer)
        settings["tokenizer"] = tokenizer.settings()
        groups = None if groups is None else {**groups, "tokenizer": tokenizer.inputs()}
    settings["plugins"] = [code for part in parts if (code := source_hash(type(part)))]
    if groups is None or not all(_tells_all(type(part)) for part in parts):
        return Inputs(fingerprint_of(settings), None)
    files = [file for role, paths in groups.items() for file in _stat(role, paths)]
    return Inputs(fingerprint_of(settings), files)


def _tells_all(cls: type) -> bool:
    """Whether `inputs` of a source or tokenizer names all that its identity depends on. A subclass that adds something
    to the identity, such as another file, and inherits `inputs`, does not."""

    def defined(name: str) -> int:
        return next((at for at, ancestor in enumerate(cls.__mro__) if name in vars(ancestor)), len(cls.__mro__))

    return defined("inputs") <= min(defined("identity"), defined("content"))


def _stat(role: str, paths: Sequence[str]) -> list[File]:
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    files = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        place = (stat.st_dev, stat.st_ino, stat.st_ctime_ns)
        files.append(File(role, os.path.relpath(path, root), path, stat.st_size, stat.st_mtime_ns, place))
    return files


def hashes(files: Sequence[File]) -> list[str]:
    """The sha256 of each file."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing releases the interpreter lock
        return list(pool.map(sha256_of_input, [file.path for file in files]))


def record(inputs: Inputs, work: Path, known: Mapping[str, str], read: Collection[str] | None = None) -> dict[str, Any]:
    """Write the list of the files into the folder of a corpus, and return the summary for its manifest.

    known: sha256 by path, of files that were hashed already. read: the paths that the tokens come from; None: all. The
    others are recorded by size and time alone, because a limit can leave out most of a large source.
    """
    files = inputs.files or []
    todo = [file for file in files if file.path not in known and (read is None or file.path in read)]
    found = {**known, **dict(zip((file.path for file in todo), hashes(todo), strict=True))}
    rows = [[file.role, file.label, file.path, file.size, file.mtime_ns, found.get(file.path)] for file in files]
    write_text(work / LIST_FILE, "[" + ",\n".join(map(json.dumps, rows)) + "]\n")
    _remember(work, {file.path: _seen_row(file, found[file.path]) for file in files if file.path in found})
    return inputs.summary([found.get(file.path) for file in files])


def recorded_hashes(folder: Path, inputs: Inputs) -> dict[str, str]:
    """Path -> sha256 of the files of now, from the list of a corpus that was prepared from files with the same bytes.
    Files that a limit left out have none."""
    rows = _read_list(folder, read_manifest(folder)) or []
    return {file.path: row[5] for file, row in zip(inputs.files or (), rows, strict=False) if row[5] is not None}


def differences(folder: Path, manifest: dict[str, Any], inputs: Inputs) -> list[str] | None:
    """How the files of now differ from those that the corpus in `folder` was prepared from, one text for each file.

    Empty if they have the same bytes in the same order, under any name in any folder. None if the folder has no list.
    """
    then = _read_list(folder, manifest)
    if then is None or inputs.files is None:
        return None
    now = inputs.files
    if [(role, form_of(label), size) for role, label, _, size, *_ in then] == [
        (file.role, form_of(file.label), file.size) for file in now
    ]:
        sha256s = _sha256s(folder, then, now)
        changed = [
            f"{file.path} has other bytes now" + ("" if file.path == row[2] else f" than {row[2]} had")
            for row, file, sha256 in zip(then, now, sha256s, strict=True)
            if sha256 != row[5]
        ]
        return changed
    return _by_name(then, now)


def _by_name(then: list[list], now: Sequence[File]) -> list[str]:
    """The differences of two lists of files that are not alike in number, endings and sizes."""
    were, are = {(row[0], row[1]): row for row in then}, {(file.role, file.label): file for file in now}
    changed = [
        f"{file.path} has {file.size:,} bytes, and {'it' if row[2] == file.path else row[2]} had {row[3]:,}"
        for key, file in are.items()
        if (row := were.get(key)) and row[3] != file.size
    ]
    added = [f"{file.path} was not there" for key, file in are.items() if key not in were]
    gone = [f"{row[2]} is gone" for key, row in were.items() if key not in are]
    return [*changed, *added, *gone] or ["the files are read in another order"]


def _sha256s(folder: Path, then: list[list], now: Sequence[File]) -> list[str | None]:
    """The sha256 of each file of now, which is hashed only if nothing else tells it."""
    seen, found, todo = _read_seen(folder), {}, []
    for row, file in zip(then, now, strict=True):
        known = seen.get(file.path)
        if known and known[:5] == _seen_row(file, "")[:5]:
            found[file.path] = known[5]
        elif row[5] is None:  # it was not read when the corpus was prepared: only size and time can tell
            found[file.path] = None if row[4] == file.mtime_ns else "other"
        elif row[4] == file.mtime_ns and (not known or known[2] != file.place[0]):
            found[file.path] = row[5]
        else:
            todo.append(file)
    found |= dict(zip((file.path for file in todo), hashes(todo), strict=True))
    fresh = {file.path: _seen_row(file, sha256) for file in now if (sha256 := found[file.path]) not in (None, "other")}
    if any(seen.get(path) != row for path, row in fresh.items()):
        _remember(folder, {**seen, **fresh})
    return [found[file.path] for file in now]


def _seen_row(file: File, sha256: str) -> list[Any]:
    return [file.size, file.mtime_ns, *file.place, sha256]


def _read_list(folder: Path, manifest: dict[str, Any]) -> list[list] | None:
    """The list of a corpus; None if it has none, or another one than its manifest says."""
    with suppress(UserError, ValueError, TypeError, KeyError):
        rows: list[list] = read_json(folder / LIST_FILE, expect=list)
        files = [File(role, label, path, size, mtime_ns, (0, 0, 0)) for role, label, path, size, mtime_ns, _ in rows]
        if Inputs(manifest["inputs"]["settings"], files).summary([row[5] for row in rows]) == manifest["inputs"]:
            return rows
    return None


def _read_seen(folder: Path) -> dict[str, list]:
    with suppress(UserError, TypeError):
        rows = read_json(folder / SEEN_FILE)
        return {path: row for path, row in rows.items() if len(row) == 6}
    return {}


def _remember(folder: Path, seen: Mapping[str, list]) -> None:
    with suppress(UserError):  # the files of a read-only folder are hashed at each look
        write_text(folder / SEEN_FILE, json.dumps(seen))
