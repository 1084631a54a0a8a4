"""Read documents from local files: plain text, JSON lines (plain, gzip, zstandard) and parquet.

A `Unit` is the smallest piece of a corpus that can be read separately: a file, a byte range of a .jsonl file, or a
range of row groups of a parquet file. Documents are bytes of UTF-8.
"""

import codecs
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError, UserError

# Longest suffix first, because ".jsonl.gz" also ends in ".gz". The .json.gz files of C4 hold JSON lines too.
KINDS = {
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".json.zst": "zstd",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
}
READ_WHOLE_BYTES = 64 << 20  # longer text files are read as a stream, which bounds the memory


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


def kind_of(path: str) -> str | None:
    """The kind of a file by its name; None for an unknown ending."""
    return next((kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)), None)


def as_list(value) -> list[str]:
    """The value of a field (None, one glob, or a list of globs) as a list."""
    return [] if value is None else [value] if isinstance(value, str) else [str(item) for item in value]


def expand(field: str, patterns) -> list[str]:
    """Sorted absolute paths of the files that globs, plain paths or folders name.

    A folder stands for every file below it with a known ending. Raises UserError if a pattern matches nothing.
    """
    found = set()
    for pattern in as_list(patterns):
        full = os.path.abspath(os.path.expanduser(pattern))
        if os.path.isdir(full):
            matches = [path for path in walk(full) if kind_of(path)]
        else:
            matches = [full] if os.path.isfile(full) else glob.glob(full, recursive=True)
        matches = [path for path in matches if os.path.isfile(path)]
        if not matches:
            raise UserError(f"{field}: no file matches {pattern!r} (looked in {os.getcwd()})")
        found.update(matches)
    return sorted(found)


def walk(root: str, skip: frozenset[str] = frozenset()) -> list[str]:
    """All files below `root` in sorted order, because the order of os.walk differs between machines."""
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skip)
        found.extend(os.path.join(folder, name) for name in sorted(names))
    return found


def file_identity(paths: list[str], root: str | None = None) -> list:
    """Relative path, size and modification time of each file, which identify its content without reading it."""
    if root is None and paths:
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    rows = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        rows.append([os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns])
    return rows


def plan_file(field: str, path: str, chunk_bytes: int, split: str | None = None) -> list[Unit]:
    """The units of one file, in order. Of the content it reads only the footer of a parquet file."""
    kind = kind_of(path)
    if kind is None:
        raise ConfigError(f"{field}: {path} ends in none of {', '.join(KINDS)}")
    size = os.path.getsize(path)
    if kind == "jsonl":
        starts = range(0, size, chunk_bytes)
        return [Unit(path, kind, a, min(a + chunk_bytes, size), min(chunk_bytes, size - a), split) for a in starts]
    if kind == "parquet":
        return _plan_parquet(path, chunk_bytes, split)
    expansion = 1 if kind == "text" else 4  # a rough guess of the compression ratio, for the progress bar
    return [Unit(path, kind, 0, size, size * expansion, split)] if size else []


def _plan_parquet(path: str, chunk_bytes: int, split: str | None) -> list[Unit]:
    metadata = _open_parquet(path).metadata
    units, start, weight = [], 0, 0
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).total_byte_size
        if weight >= chunk_bytes or group == metadata.num_row_groups - 1:
            units.append(Unit(path, "parquet", start, group + 1, weight, split))
            start, weight = group + 1, 0
    return units


def read_unit(unit: Unit, text_field: str, cut_bytes: int | None, skipped: list[str]) -> Iterator[bytes]:
    """Yield the documents of one unit, none empty. Text files that are not UTF-8 are added to `skipped`."""
    try:
        if unit.kind == "text":
            yield from _read_text(unit.path, cut_bytes, skipped)
        elif unit.kind == "parquet":
            yield from _read_parquet(unit, text_field)
        else:
            yield from _read_json_lines(unit, text_field)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{unit.path}: cannot be read ({error.strerror})") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{unit.path}: cannot be read as {unit.kind} ({reason})") from None


def _read_text(path: str, cut_bytes: int | None, skipped: list[str]) -> Iterator[bytes]:
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read()) if os.path.getsize(path) <= READ_WHOLE_BYTES else file
        if not _is_utf8(stream):
            skipped.append(path)
            return
        stream.seek(0)
        if cut_bytes is not None:
            yield from cut(stream, cut_bytes)
        elif text := stream.read():
            yield text


def _is_utf8(stream) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := stream.read(1 << 20):
            decoder.decode(block)
        decoder.decode(b"", final=True)
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


def _read_json_lines(unit: Unit, text_field: str) -> Iterator[bytes]:
    for number, line in _numbered_lines(unit):
        if line.strip():
            try:
                yield from text_of_json(line, text_field)
            except ValueError as error:
                number += _lines_before(unit)
                raise UserError(f"{unit.path}:{number}: {error}") from None


def text_of_json(line: bytes | str, text_field: str) -> Iterator[bytes]:
    """Yield the text of one JSON line, or nothing if it is empty. Raises ValueError with a readable reason."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON line ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON line must be an object with a field {text_field!r}")
    if text := text_of_row(row, text_field):
        yield text


def text_of_row(row: dict, text_field: str) -> bytes:
    """The text of one row as UTF-8; empty for null. Lone surrogates, which UTF-8 cannot encode, become question marks.

    Raises ValueError with a readable reason.
    """
    if text_field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise ValueError(f"no field {text_field!r} (fields: {fields}); set data.text_field")
    if row[text_field] is None:
        return b""
    if not isinstance(row[text_field], str):
        raise ValueError(f"field {text_field!r} holds {type(row[text_field]).__name__}, not text")
    return row[text_field].encode("utf-8", "replace")


def _numbered_lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a unit with their number from 1. A line belongs to the byte range in which it starts."""
    if unit.kind == "jsonl":
        with open(unit.path, "rb") as file:
            at = unit.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1
            for number, line in enumerate(file, 1):
                if at >= unit.stop:
                    return
                at += len(line)
                yield number, line
    elif unit.kind == "gzip":
        with gzip.open(unit.path, "rb") as file:
            yield from enumerate(file, 1)
    else:
        import pyarrow

        # pyarrow contains a zstandard decoder. The standard library has one only from Python 3.14 on.
        with pyarrow.input_stream(unit.path, compression="zstd") as stream:
            yield from enumerate(io.BufferedReader(stream, 1 << 20), 1)


def _lines_before(unit: Unit) -> int:
    """The number of lines that start before a byte range. It is computed only to name a line in an error."""
    if unit.kind != "jsonl" or unit.start == 0:
        return 0
    with open(unit.path, "rb") as file:
        before = file.read(unit.start)
    return before.count(b"\n") + (not before.endswith(b"\n"))


def _open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _read_parquet(unit: Unit, text_field: str) -> Iterator[bytes]:
    import pyarrow

    file = _open_parquet(unit.path)
    names = file.schema_arrow.names
    if text_field not in names:
        raise UserError(f"{unit.path}: no field {text_field!r} (fields: {', '.join(names)}); set data.text_field")
    groups = range(unit.start, unit.stop)
    row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=[text_field]):
            for value in batch.column(0).to_pylist():
                try:
                    text = text_of_row({text_field: value}, text_field)
                except ValueError as error:
                    raise UserError(f"{unit.path}: row {row}: {error}") from None
                if text:
                    yield text
                row += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{unit.path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
