"""Read documents from local files: text, JSON lines, CSV (plain, gzip, zstandard) and parquet.

A `Unit` is the smallest piece of a corpus that can be read separately: a file, a byte range of a .jsonl file, or a
range of row groups of a parquet file. Documents are bytes of UTF-8. `Rows` says how a row becomes a document. A `Tally`
counts what is left out, by reason.
"""

import codecs
import csv
import fnmatch
import functools
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from scaling_testbed.data.sources.marked import Marked
from scaling_testbed.errors import ConfigError, UserError, listed

# Longest suffix first. The .json.gz files of C4 hold JSON lines too.
KINDS = {
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".csv.gz": "csv",
    ".csv.zst": "csv",
    ".txt.gz": "text",
    ".txt.zst": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
}
READ_WHOLE_BYTES = 64 << 20  # longer text files are read as a stream, which bounds the memory
EXAMPLES = 3  # places that a tally keeps for each reason
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CHAT_FIELDS = ("role", "content")
ASSISTANT = "assistant"  # the role whose messages are answers
CHAT_FORMAT = "each message as 'role: content', with an empty line between messages"


@dataclass(frozen=True)
class Unit:
    """One piece of a corpus.

    start, stop: bytes (.jsonl), row groups (parquet), rows or shards (hub). weight: the expected bytes of text. split:
    train or validation if the source itself has these splits, else None.
    """

    path: str
    kind: str
    start: int
    stop: int
    weight: int
    split: str | None = None


class Tally:
    """Counts of what was read and of what was left out, by reason, each with its first places.

    files: files left out. bad_rows: rows left out. noted: files and rows that were taken although something is odd.
    rows: all rows. empty_rows: rows without text. chats: rows whose text was a list of messages.
    """

    def __init__(self) -> None:
        self.rows = self.empty_rows = self.chats = 0
        self.files: dict[str, dict] = {}
        self.bad_rows: dict[str, dict] = {}
        self.noted: dict[str, dict] = {}

    def leave_out(self, reason: str, path: str) -> None:
        """Count a file that is left out."""
        _count(self.files, reason, path)

    def leave_out_row(self, reason: str, place: str) -> None:
        """Count a row that is left out."""
        _count(self.bad_rows, reason, place)

    def note(self, what: str, place: str) -> None:
        """Count a file or row that is taken although something is odd about it."""
        _count(self.noted, what, place)

    @property
    def n_files(self) -> int:
        return sum(entry["count"] for entry in self.files.values())

    @property
    def n_bad_rows(self) -> int:
        return sum(entry["count"] for entry in self.bad_rows.values())

    def as_dict(self) -> dict:
        """The tally as plain JSON."""
        return dict(vars(self))

    def add(self, record: dict) -> None:
        """Add the counts of another tally, as `as_dict` gave them."""
        for name in ("rows", "empty_rows", "chats"):
            setattr(self, name, getattr(self, name) + record[name])
        for name in ("files", "bad_rows", "noted"):
            mine = getattr(self, name)
            for reason, entry in record[name].items():
                merged = mine.setdefault(reason, {"count": 0, "first": []})
                merged["count"] += entry["count"]
                merged["first"] = (merged["first"] + entry["first"])[:EXAMPLES]


def _count(entries: dict[str, dict], reason: str, place: str) -> None:
    entry = entries.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += 1
    if len(entry["first"]) < EXAMPLES:
        # A name that is not UTF-8 would stop every command that prints it.
        entry["first"].append(place.encode("utf-8", "backslashreplace").decode())


# ------------------------------------------------------------------------------------- finding files


def kind_of(path: str) -> str | None:
    """The kind of a file by its name; None for an unknown ending."""
    return next((kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)), None)


def form_of(path: str) -> tuple[str | None, str]:
    """How a file is read, by its name: its kind and its compression."""
    return kind_of(path), _compression(path)


def as_list(value) -> list[str]:
    """The value of a field (None, one glob, or a list of globs) as a list."""
    return [] if value is None else [value] if isinstance(value, str) else [str(item) for item in value]


def check_places(field: str, value) -> None:
    """Raise ConfigError unless `value` is None, a text, or a list of texts, none of them blank.

    A blank text is what an unset variable of the shell leaves.
    """
    items = [value] if isinstance(value, str) else value
    if value is not None and not (isinstance(items, list) and items):
        raise ConfigError(f"{field} must be a glob or a list of globs, got {value!r}")
    for item in items or []:
        if not isinstance(item, str) or not item.strip():
            raise ConfigError(
                f"{field} must name files, got {item!r}; is a variable of the shell not set?"
                if item is None or isinstance(item, str)
                else f"{field} must be a glob or a list of globs, got {value!r}"
            )


def expand(field: str, patterns, tally: Tally | None = None, endings: Iterable[str] = KINDS) -> list[str]:
    """Sorted absolute paths of the files that globs, plain paths or folders name.

    A folder stands for every file below it with one of `endings`. Links to folders are followed, each folder once. A
    file that several paths lead to is taken once. tally: counts what is left out. Raises UserError if a pattern matches
    nothing, ConfigError for a blank pattern.
    """
    check_places(field, patterns)
    look_for_hidden, tally = tally is not None, tally or Tally()
    found: set[str] = set()
    for pattern in as_list(patterns):
        full = os.path.abspath(os.path.expanduser(pattern))
        if os.path.isdir(full):
            there = walk(full, follow=True)
            matches = [path for path in there if path.lower().endswith(tuple(endings))]
            for path in sorted(set(there) - set(matches)):
                tally.leave_out(f"with ending {_ending(path)}", path)
            problem = f"no file in {pattern!r} has a known ending ({_endings(there)}); known: {', '.join(endings)}"
        else:
            matches = [full] if os.path.lexists(full) else sorted(set(_glob(full)))
            for path in sorted(set(_glob(full, include_hidden=True)) - set(matches)) if look_for_hidden else ():
                if os.path.isfile(path):
                    tally.leave_out("hidden", path)
            problem = f"no file matches {pattern!r} (looked in {os.getcwd()})"
            if others := sorted({_what_is(path) for path in matches if not os.path.isfile(path)}):
                problem = f"{pattern!r} matches no file, but a {' and a '.join(others)} ({matches[0]})"
        files = [path for path in matches if os.path.isfile(path)]
        for path in sorted(set(matches) - set(files)):
            if not (os.path.isdir(path) and "**" in pattern):
                tally.leave_out(_what_is(path), path)
        if not files:
            raise UserError(f"{field}: {problem}")
        found.update(files)
    return _each_once(sorted(found), tally)


def _what_is(path: str) -> str:
    """What a path that is no file leads to."""
    return "folder" if os.path.isdir(path) else "link to nowhere" if os.path.islink(path) else "special file"


def _glob(pattern: str, include_hidden: bool = False) -> Iterator[str]:
    """The files that a glob matches, and the folders if it has no `**`. glob.glob does not end where links to folders
    form several cycles: here a link to a folder above it is not followed."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern, include_hidden=include_hidden)
        return
    at = parts.index("**")
    for base in glob.glob(os.sep.join(parts[:at]) or os.sep, include_hidden=include_hidden):
        for path in _walk_links(base, ()) if os.path.isdir(base) else ():
            if _fits(os.path.relpath(path, base).split(os.sep), parts[at:], include_hidden):
                yield path


def _walk_links(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    stat = _stat(folder)
    above = (*above, (stat.st_dev, stat.st_ino))
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        _unreadable(error)
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            yield path
        elif not os.path.islink(path) or ((stat := _stat(path)).st_dev, stat.st_ino) not in above:
            yield from _walk_links(path, above)


def _fits(names: list[str], patterns: list[str], include_hidden: bool) -> bool:
    """Whether the components of a path fit those of a pattern, as glob.glob has it. `**` is any number of folders."""
    if not patterns or not names:
        return not names and all(pattern == "**" for pattern in patterns)
    first, visible = patterns[0], include_hidden or not names[0].startswith(".")
    if first == "**":
        return _fits(names, patterns[1:], include_hidden) or (visible and _fits(names[1:], patterns, include_hidden))
    if not (visible or first.startswith(".")) or not fnmatch.fnmatchcase(names[0], first):
        return False
    return _fits(names[1:], patterns[1:], include_hidden)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()[:20] or "none"


def _endings(paths: list[str]) -> str:
    counts = Counter(map(_ending, paths))
    shown = [f"{ending} {count:,}" for ending, count in counts.most_common(5)]
    return ", ".join(shown + ["..."] * (len(counts) > 5)) or "it is empty"


def _each_once(paths: list[str], tally: Tally) -> list[str]:
    """The paths without those that lead to the same file through a link. Of these the real path is kept, or the
    shortest."""
    same: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path in paths:
        stat = _stat(path)
        same[stat.st_dev, stat.st_ino].append(path)
    dropped: set[str] = set()
    for group in same.values():
        by_target: dict[str, list[str]] = defaultdict(list)
        for path in group if len(group) > 1 else []:  # hard links have other targets: they are files of their own
            by_target[os.path.realpath(path)].append(path)
        for target, names in by_target.items():
            kept = min(names, key=lambda path: (path != target, len(path), path))
            dropped.update(path for path in names if path != kept)
    for path in sorted(dropped):
        tally.leave_out("link to a file that is taken already", path)
    return [path for path in paths if path not in dropped]


def walk(root: str, skip: frozenset[str] = frozenset(), follow: bool = False) -> list[str]:
    """All files below `root` in sorted order, because the order of os.walk differs between machines.

    follow: also those below links to folders, each folder once. Raises UserError for a folder that cannot be read.
    """
    found: list[str] = []
    links, seen = [root], set()
    while links:
        level, links = links, []
        for start in level:  # the links of a level come after all real folders of it, which keep their own paths
            for folder, folders, names in os.walk(start, onerror=_unreadable):
                stat = _stat(folder)
                if (stat.st_dev, stat.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                folders[:] = sorted(name for name in folders if name not in skip)
                if follow:
                    links.extend(path for name in folders if os.path.islink(path := os.path.join(folder, name)))
                found.extend(os.path.join(folder, name) for name in sorted(names))
    return found


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def file_identity(paths: list[str], root: str | None = None) -> list:
    """Relative path, size and modification time of each file, which identify its content without reading it."""
    if root is None and paths:
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    stats = [(path, _stat(path)) for path in paths]
    return [[os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def plan_file(field: str, path: str, chunk_bytes: int, split: str | None = None) -> list[Unit]:
    """The units of one file, in order. Of the content it reads only the footer of a parquet file."""
    kind = kind_of(path)
    if kind is None:
        raise ConfigError(f"{field}: {path} ends in none of {', '.join(KINDS)}")
    size = os.path.getsize(path)
    if kind == "jsonl" and not _compression(path):
        starts = range(0, size, chunk_bytes)
        return [Unit(path, kind, a, min(a + chunk_bytes, size), min(chunk_bytes, size - a), split) for a in starts]
    if kind == "parquet":
        return _plan_parquet(path, chunk_bytes, split)
    expansion = 4 if _compression(path) else 1  # a rough guess of the compression ratio, for the progress bar
    return [Unit(path, kind, 0, size, size * expansion, split)] if size else []


def _plan_parquet(path: str, chunk_bytes: int, split: str | None) -> list[Unit]:
    metadata = _open_parquet(path).metadata
    units, start, weight = [], 0, 0
    if not metadata.num_rows:
        return []
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).total_byte_size
        if weight >= chunk_bytes or group == metadata.num_row_groups - 1:
            units.append(Unit(path, "parquet", start, group + 1, weight, split))
            start, weight = group + 1, 0
    return units


# ------------------------------------------------------------------------------------- rows


class BadRow(ValueError):
    """A row that gives no document. reason: the group in which a tally counts it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Rows:
    """How a row becomes a document.

    text_field: the field with the text; `a.b` is field b inside field a. ids_field: the field with token ids, in place
    of a text. skip_bad: whether a bad row is left out and counted; otherwise it is an error. prompt_field: the field
    with the text in front, which is no target. answers_only: whether only the assistant's messages are targets.
    """

    text_field: str
    ids_field: str | None = None
    skip_bad: bool = False
    prompt_field: str | None = None
    answers_only: bool = False

    @property
    def keys(self) -> dict[str, str]:
        """The fields that are read, each with the key that names it."""
        found = {"data.prompt_field": self.prompt_field, "data.text_field": self.text_field}
        if self.ids_field is not None:
            found = {"data.ids_field": self.ids_field}
        return {field: key for key, field in found.items() if field is not None}

    @property
    def columns(self) -> list[str]:
        """The fields that are read."""
        return list(self.keys)

    def read(self, rows: Iterable[Any], place: Callable[[int], str], tally: Tally) -> Iterator[bytes]:
        """Yield the documents of pairs (number, row), none empty. A row can be a BadRow.

        place: from a row's number to its place, for messages. Raises UserError for a bad row, unless skip_bad.
        """
        for number, row in rows:
            tally.rows += 1
            try:
                document = self._document(row, tally)
            except BadRow as bad:
                if not self.skip_bad:
                    raise UserError(f"{place(number)}: {bad}; data.on_bad=skip leaves such rows out") from None
                tally.leave_out_row(bad.reason, f"{place(number)}: {bad}" if _is_new(tally, bad.reason) else "")
                continue
            if document:
                yield document
            else:
                tally.empty_rows += 1

    def _document(self, row: Any, tally: Tally) -> bytes:
        if isinstance(row, BadRow):
            raise row
        if self.ids_field is not None:
            value = self._value(row, self.ids_field)
            return b"" if value is None else _ids(self.ids_field, value)
        prompt = None if self.prompt_field is None else self._value(row, self.prompt_field)
        value = self._value(row, self.text_field)
        if value is None:
            return b""
        if self.answers_only:
            return self._answers(value, tally)
        text = self._text(self.text_field, value, tally)
        if self.prompt_field is None or prompt is None or not text:
            return text
        return Marked.joined([(self._text(self.prompt_field, prompt, tally), False), (text, True)])

    def _answers(self, value: Any, tally: Tally) -> bytes:
        """A list of messages in CHAT_FORMAT, of which the assistant's content, and the empty line after it, are
        targets."""
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise BadRow("no messages", f"field {self.text_field!r} holds no list of messages for data.answers_only")
        self._text(self.text_field, value, tally)  # the same checks and notes
        parts = []
        for number, message in enumerate(value):
            ends = "" if number == len(value) - 1 else "\n\n"
            parts.append((f"{message['role']}: ", False))
            parts.append((message["content"] + ends, message["role"] == ASSISTANT))
        found = Marked.joined([(text.encode("utf-8", "replace"), is_target) for text, is_target in parts])
        if value and not found.targets:
            tally.note("lists of messages without one of the assistant", found[:40].decode(errors="ignore"))
        return found

    def _text(self, field: str, value: Any, tally: Tally) -> bytes:
        """A text, or a list of messages, as UTF-8."""
        if isinstance(value, list) and all(isinstance(message, dict) for message in value):
            tally.chats += 1
            more = {key for message in value for key in message if message[key] and key not in CHAT_FIELDS}
            value = _chat(field, value)
            if more:
                tally.note("lists of messages without their other fields", ", ".join(sorted(more))[:60])
        if isinstance(value, str):
            try:
                return value.encode()
            except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and UTF-8 cannot
                tally.note("rows with question marks for lone surrogates", value[:40])
                return value.encode("utf-8", "replace")
        if isinstance(value, bytes):
            if not _is_utf8(value):
                raise BadRow("not UTF-8", f"field {field!r} holds bytes that are not UTF-8")
            return value
        hint = "; token ids are read by data.ids_field=" if isinstance(value, list) else ""
        raise BadRow("not text", f"field {field!r} holds {type(value).__name__}, not text{hint}")

    def _value(self, row: Any, field: str) -> Any:
        if field in row:
            return row[field]
        value = row
        for part in field.split("."):
            if value is None:
                return None
            if not isinstance(value, dict) or part not in value:
                raise BadRow("no such field", f"no field {field!r} (fields: {_names(row)}); set {self.keys[field]}")
            value = value[part]
        return value


def _names(fields: Iterable[Any]) -> str:
    """Names of fields in a line of a message."""
    return listed([" ".join(str(name).split())[:40] for name in fields], most=20) or "none"


def _is_new(tally: Tally, reason: str) -> bool:
    """Whether the tally still keeps places of this reason. To name a place may need another look at the file."""
    return tally.bad_rows.get(reason, {"count": 0})["count"] < EXAMPLES


def _chat(field: str, messages: list[dict]) -> str:
    """The text of a list of messages, see CHAT_FORMAT."""
    parts = []
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            wrong = "content" if isinstance(role, str) else "role"
            raise BadRow("not text", f"message {number} of field {field!r} has no text as its {wrong}")
        parts.append(f"{role}: {content}")
    return "\n\n".join(parts)


def _ids(field: str, value: Any) -> bytes:
    """A list of token ids as bytes of int64, little-endian."""
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        ids = np.empty(1, dtype=object)
    if not isinstance(value, list) or ids.ndim != 1 or not (ids.dtype.kind in "iu" or not len(ids)):
        raise BadRow("no token ids", f"field {field!r} holds no list of whole numbers")
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 31):
        raise BadRow("no token ids", f"field {field!r} holds {ids.min() if ids.min() < 0 else ids.max()}, no token id")
    return ids.astype("<i8").tobytes()


def row_of_json(line: bytes | str, fields: Collection[str]) -> dict | BadRow:
    """The object of one JSON line, or what is wrong with it, such as two values of one of `fields`. A byte order mark
    is passed over."""
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"not a JSON line (not UTF-8: {error.reason})")
    try:
        parts = {part for field in fields for part in (field, *field.split("."))}
        twice = any(text.count(json.dumps(part)) > 1 for part in parts)  # a hook takes time, so only then
        row = json.loads(text, object_pairs_hook=functools.partial(_each_once_in, parts) if twice else None)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"not a JSON line ({error})")
    if not isinstance(row, dict):
        return BadRow("not JSON", "a JSON line must be an object with named fields")
    return row


def _each_once_in(names: Collection[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError if one of the names is there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        there = [name for name, _ in pairs]
        if found := [name for name in value if name in names and there.count(name) > 1]:
            raise ValueError(f"{found[0]!r} is there twice")
    return value


# ------------------------------------------------------------------------------------- reading files


def read_unit(unit: Unit, rows: Rows | None, cut_bytes: int | None, tally: Tally) -> Iterator[bytes]:
    """Yield the documents of one unit, none empty.

    rows: None where all units are text. tally: counts what is left out, such as text files that are not UTF-8.
    """
    kind = {".gz": "gzip", ".zst": "zstd"}.get(_compression(unit.path), unit.kind)
    try:
        if unit.kind == "text":
            if rows is not None and (rows.prompt_field is not None or rows.answers_only):
                key = "data.answers_only" if rows.answers_only else "data.prompt_field"
                raise UserError(f"{unit.path}: {key} needs rows with fields, and this is a text file; leave one out")
            yield from _read_text(unit.path, cut_bytes, tally)
            return
        assert rows is not None
        if unit.kind == "parquet":
            pairs, place = _parquet_rows(unit, rows), _place_of_row(unit)
        elif unit.kind == "csv":
            pairs, place = _csv_rows(unit, rows), _place_of_line(unit, rows)
        else:
            pairs, place = _json_rows(unit, rows), _place_of_line(unit, rows)
        n_before = tally.rows
        yield from rows.read(pairs, place, tally)
        whole = unit.kind != "parquet" and unit.start == 0 and unit.stop == os.path.getsize(unit.path)
        if whole and tally.rows == n_before:
            tally.leave_out("empty", unit.path)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{unit.path}: cannot be read ({error.strerror})") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{unit.path}: cannot be read as {kind} ({reason})") from None
    except MemoryError:
        raise UserError(f"{unit.path}: a line or row is too large for the memory of this machine") from None


def _compression(path: str) -> str:
    ending = os.path.splitext(path.lower())[1]
    return ending if ending in (".gz", ".zst") else ""


def _open(path: str) -> BinaryIO:
    """A file's bytes, decompressed."""
    if _compression(path) == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if _compression(path) == ".zst":
        import pyarrow

        # pyarrow contains a zstandard decoder. The standard library has one only from Python 3.14 on.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return open(path, "rb")


def _read_text(path: str, cut_bytes: int | None, tally: Tally) -> Iterator[bytes]:
    with _open(path) as file:
        problem = _look_at(file, path, tally)
    if problem:
        tally.leave_out(problem, path)
        return
    with _open(path) as file:
        if cut_bytes is not None:
            yield from cut(file, cut_bytes)
        elif text := file.read():
            yield text


def _look_at(file: BinaryIO, path: str, tally: Tally) -> str | None:
    """Why a file cannot be taken as text, or None. What is odd about a file that is taken is noted."""
    decoder, n_bytes, n_nuls, start = codecs.getincrementaldecoder("utf-8")(), 0, 0, b""
    try:
        while block := file.read(1 << 20):
            decoder.decode(block)
            start = start or block[: len(LFS_POINTER)]
            n_bytes, n_nuls = n_bytes + len(block), n_nuls + block.count(0)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8"
    if not n_bytes:
        return "empty"
    if n_nuls > n_bytes // 4:
        return "UTF-16 or binary"
    if start == LFS_POINTER and n_bytes < 1024:
        return "pointer of Git LFS in place of the file"
    if n_nuls:
        tally.note("files with NUL bytes", path)
    if start.startswith(codecs.BOM_UTF8):
        tally.note("files with a byte order mark, which is kept", path)
    return None


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def cut(stream, cut_bytes: int) -> Iterator[bytes]:
    """Yield a UTF-8 stream in pieces of at most `cut_bytes`. A piece ends at a line end if it contains one."""
    buffer = b""
    while block := stream.read(max(1 << 20, cut_bytes)):
        buffer, at = buffer + block, 0
        while len(buffer) - at > cut_bytes:
            end = buffer.rfind(b"\n", at, at + cut_bytes) + 1
            if end <= at:  # one long line: cut it between two characters
                end = at + cut_bytes
                while buffer[end] & 0xC0 == 0x80:
                    end -= 1
            yield buffer[at:end]
            at = end
        buffer = buffer[at:]
    if buffer:
        yield buffer


def _json_rows(unit: Unit, rows: Rows) -> Iterator[tuple[int, dict | BadRow]]:
    """Pairs of a line's number from 1 and its row. A line belongs to the byte range in which it starts."""
    with _open(unit.path) as file:
        at, ranged = unit.start, not _compression(unit.path)
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1
        for number, line in enumerate(file, 1):
            if ranged and at >= unit.stop:
                return
            at += len(line)
            if line.strip():
                yield number, row_of_json(line, rows.columns)


def _csv_rows(unit: Unit, rows: Rows) -> Iterator[tuple[int, dict | BadRow]]:
    """Pairs of a line's number from 1 and its row. The first line names the fields."""
    csv.field_size_limit(sys.maxsize)
    with _open(unit.path) as file:
        # Bytes that are not UTF-8 become surrogates, so that one bad row does not stop the file.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        lines = csv.reader(text, strict=True)
        try:
            header = next(lines, [])
        except csv.Error as error:
            raise UserError(f"{unit.path}: cannot be read as csv ({error})") from None
        for field in rows.columns:
            if header.count(field) > 1:
                raise UserError(f"{unit.path}: {header.count(field)} columns have the name {field!r}")
        if any("\udc80" <= character <= "\udcff" for name in header for character in name):
            raise UserError(f"{unit.path}: its first line is not UTF-8; save it as UTF-8")
        for field, key in rows.keys.items():
            if header and field not in header:
                commas = "" if len(header) > 1 or header[0].isidentifier() else "; commas must part the fields"
                raise UserError(f"{unit.path}: no field {field!r} (fields: {_names(header)}); set {key}{commas}")
        while True:
            try:
                row = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # every row after an open quotation mark is part of it
                    raise UserError(f"{unit.path}: a quotation mark is not closed before the end of the file") from None
                yield lines.line_num, BadRow("not CSV", f"not a row of CSV ({error})")
                continue
            if row and len(row) != len(header):
                yield lines.line_num, BadRow("not CSV", f"{len(row)} fields, but the first line names {len(header)}")
            elif any("\udc80" <= character <= "\udcff" for value in row if not value.isascii() for character in value):
                yield lines.line_num, BadRow("not UTF-8", "a field is not UTF-8")
            elif row:
                yield lines.line_num, dict(zip(header, row, strict=True))


def _place_of_line(unit: Unit, rows: Rows) -> Callable[[int], str]:
    if unit.start and rows.skip_bad:  # to count the lines before each bad row would read the file many times
        return lambda number: f"{unit.path}, line {number} after byte {unit.start:,}"
    return lambda number: f"{unit.path}:{number + _lines_before(unit)}"


def _lines_before(unit: Unit) -> int:
    """The number of lines that start before a byte range. It is computed only to name a line in a message."""
    if unit.start == 0:
        return 0
    n_lines, last = 0, b""
    with open(unit.path, "rb") as file:
        for start in range(0, unit.start, READ_WHOLE_BYTES):
            block = file.read(min(READ_WHOLE_BYTES, unit.start - start))
            n_lines, last = n_lines + block.count(b"\n"), block[-1:]
    return n_lines + (last != b"\n")


def _open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: a name of a column that is not UTF-8
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _place_of_row(unit: Unit) -> Callable[[int], str]:
    return lambda number: f"{unit.path}: row {number}"


def _parquet_rows(unit: Unit, rows: Rows) -> Iterator[tuple[int, dict | BadRow]]:
    """Pairs of a row's number from 0 and its row, with the columns of the fields alone."""
    import pyarrow

    file = _open_parquet(unit.path)
    names = file.schema_arrow.names
    for field, key in rows.keys.items():
        if field not in names and field.split(".")[0] not in names:
            raise UserError(f"{unit.path}: no field {field!r} (fields: {_names(names)}); set {key}")
    groups = range(unit.start, unit.stop)
    number = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
    columns = list(dict.fromkeys(field if field in names else field.split(".")[0] for field in rows.columns))
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=columns):
            values = [_python_values(batch.column(batch.schema.get_field_index(column))) for column in columns]
            for row in zip(*values, strict=True):
                bad = next((value for value in row if isinstance(value, BadRow)), None)
                yield number, dict(zip(columns, row, strict=True)) if bad is None else bad
                number += 1
    except (ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{unit.path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _python_values(values) -> list:
    """The values of an arrow array. A text that is not UTF-8 is a BadRow."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        pass
    found: list = []
    for value in values:
        try:
            found.append(value.as_py())
        except UnicodeDecodeError as error:
            found.append(BadRow("not UTF-8", f"not UTF-8 ({error.reason})"))
    return found
