"""The files of a run: config.yaml, environment.json, metrics.jsonl and result.json.

metrics.jsonl is the primary record. It has one line for each recorded step. A line is given to the operating system
when it is written, and the disk has it before a checkpoint of its step gets its name.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, Self, TypedDict

import yaml

from scaling_testbed.errors import UserError
from scaling_testbed.files import cannot_write, check_version, read_json, reason_of, write_bytes, write_json, write_text
from scaling_testbed.progress import say
from scaling_testbed.runs.environment import record_start
from scaling_testbed.runs.lease import Lease
from scaling_testbed.runs.row import SCHEMA_VERSION, is_number, problem_of

METRICS, RESULT = "metrics.jsonl", "result.json"
BY_NAME = (
    "val_loss_by_set",
    "val_loss_average_by_set",
    "ce_scaled_by_set",
    "accuracy_by_group",
    "error_by_task",
    "weights_by_source",
)  # in a record: names with numbers
ONE_FOLDER = (
    "with parallelism=fsdp every process writes into the folder of the run, so it must be the same for all: put it on "
    "a file system that all machines share, and give runs_dir= as an absolute path"
)


class Written(TypedDict):
    """The lines of metrics.jsonl at the moment of a checkpoint: their number, the hash of their bytes, and whether none
    was lost before."""

    lines: int
    sha256: str
    whole: bool


class RunFolder:
    """The files of one run. As a context manager it holds the folder, and a second process is refused."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics: int | None = None  # the open file
        self._written = hashlib.sha256()
        self._lines, self._whole = 0, True
        self._held: int | None = None  # the open folder
        self._lease = Lease(path / "lock")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held = os.open(self.path, os.O_RDONLY)
                undo.callback(os.close, held)
                self._lease.__enter__()
            except OSError as error:
                raise UserError(f"cannot write the run folder {self.path}: {reason_of(error)}; set runs_dir=") from None
            undo.push(self._lease.__exit__)
            _, problem = self._read_row()
            undo.pop_all()
        self._held = held
        if problem:
            say(f"warning: {self.path / RESULT} holds no row of this run ({problem}); the run goes on", errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is None:
            return
        os.close(self._held)
        if self._metrics is not None:
            os.close(self._metrics)
        self._metrics = self._held = None
        self._lease.__exit__()

    def result(self) -> dict[str, Any] | None:
        """The row of this run, or None if it has no row or what is there is no row of this run. Raises UserError if a
        newer version has written the row."""
        row, problem = self._read_row()
        return row if problem is None else None

    def row_of_another(self) -> dict[str, Any] | None:
        """The row of another run that lies in this folder, as after a renaming; else None."""
        row, problem = self._read_row()
        return row if problem is not None else None

    def cannot_be_read(self) -> str | None:
        """Why the row that may be here cannot be read, as in a folder of another user; None if there is no obstacle."""
        path = self.path / RESULT
        try:
            path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"{path} cannot be read: {reason_of(error)}"
        return None

    def _read_row(self) -> tuple[dict[str, Any] | None, str | None]:
        """The row that is here, or None, and what is wrong with it or with what is in its place."""
        path = self.path / RESULT
        try:
            row = json.loads(path.read_text())
        except FileNotFoundError:
            return None, None
        except (OSError, ValueError, RecursionError) as error:
            return None, reason_of(error) if isinstance(error, OSError) else "it is no JSON"
        if isinstance(row, dict) and type(row.get("schema_version")) is int:
            check_version(path, row["schema_version"], SCHEMA_VERSION)
        problem = problem_of(row)
        if problem is None and self.path.name not in ("", row["run_id"]):
            return row, f"it is of the run {row['run_id']}"
        return (row, None) if problem is None else (None, problem)

    def last_job(self) -> str | None:
        """The Slurm job of the last start of this run, or None."""
        with contextlib.suppress(UserError, LookupError, TypeError, AttributeError):
            job = read_json(self.path / "environment.json")["starts"][-1].get("job")
            return job if isinstance(job, str) else None
        return None

    def check_held(self) -> None:
        """Raise AlreadyRunning, before anything is written, if another process has taken over the folder, and UserError
        if the folder or a file that this process holds was deleted or moved, or if the folder was replaced by another:
        nothing is written in its place, also while `rm -r` is at work in it."""
        if self._held is None:
            return
        files = [self._lease.path] + ([] if self._metrics is None else [self.path / METRICS])
        lost = (
            self.path if not _is_at(self.path, self._held) else next((path for path in files if _is_gone(path)), None)
        )
        if lost:
            raise UserError(
                f"{lost} was deleted, moved or replaced during the run; the run stops and writes nothing more; move it "
                "back to continue, or type the same command to start again"
            )
        self._lease.check()

    def check_here(self) -> None:
        """Raise UserError if the folder that rank 0 holds is not at this path of this process."""
        if not self._lease.path.exists():
            raise UserError(f"{self.path.absolute()} is not the folder that rank 0 holds; {ONE_FOLDER}")

    def write_result(self, row: dict[str, Any]) -> None:
        """Replace the row. Raises AlreadyRunning as `check_held` does."""
        self.check_held()
        self.sync_metrics()
        write_json(self.path / RESULT, _plain(row))

    def start(self, config: dict[str, Any], environment: dict[str, Any]) -> int:
        """Record the configuration and the environment of this start. Returns the number of earlier starts."""
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        return record_start(self.path, environment)

    def open_metrics(self, keep_before: int, known: Written | None = None) -> tuple[list[dict[str, Any]], bool]:
        """Open metrics.jsonl for appending. Returns its rows before step `keep_before`, and whether they are all that
        the run wrote before this step.

        Later rows are dropped and written again: if a run was killed, the file may be ahead of the checkpoint that the
        run resumes from. known: what the checkpoint says of the file; None if it says nothing. A file that has lost
        lines or was changed is reported on stderr.
        """
        path = self.path / METRICS
        there = read_bytes(path) if path.exists() else b""
        lines = [(row, line) for row, line in _read_lines(path, there) if row["step"] < keep_before]
        kept = b"".join(line for _, line in lines)
        if kept != there or not path.exists():
            write_bytes(path, kept)
        self._open_metrics()
        self._written = hashlib.sha256(kept)
        self._lines, self._whole = len(lines), known is None or known["whole"]
        if known is not None and self._written.hexdigest() != known["sha256"]:
            what = f"{self._lines:,} of {known['lines']:,} lines" if self._lines != known["lines"] else "changed lines"
            say(
                f"warning: {path} has {what} before step {keep_before:,}; the row of the run does not need them, but "
                "curves of the run are drawn from what is left",
                errors=True,
            )
            self._whole = False
        return [row for row, _ in lines], self._whole

    def _open_metrics(self) -> None:
        path = self.path / METRICS
        try:
            self._metrics = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from None

    def write_metrics(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append one line, and return it as written: without NaN and infinity. Raises UserError if writing fails, and
        the errors of `check_held`. No part of a line stays if the disk is full."""
        self.check_held()
        path = self.path / METRICS
        if self._metrics is None:
            raise RuntimeError("metrics.jsonl is not open: call open_metrics first")
        if not _is_at(path, self._metrics):
            self.check_held()  # the whole folder may just have been replaced
            say(f"warning: {path} was replaced by another file; earlier lines may be lost", errors=True)
            self._whole = False
            os.close(self._metrics)
            self._open_metrics()
        plain: dict[str, Any] = _plain(row)
        line = json.dumps(plain).encode() + b"\n"
        try:
            size = os.fstat(self._metrics).st_size
            try:
                _write_all(self._metrics, line)
            except OSError:
                os.ftruncate(self._metrics, size)
                raise
        except OSError as error:
            raise cannot_write(path, error, len(line)) from None
        self._written.update(line)
        self._lines += 1
        return plain

    def sync_metrics(self) -> None:
        """Write the lines of metrics.jsonl to the disk. Raises UserError if this fails."""
        if self._metrics is None:
            return
        try:
            os.fsync(self._metrics)
        except OSError as error:
            raise cannot_write(self.path / METRICS, error) from None

    def written(self) -> Written:
        """What a checkpoint says of metrics.jsonl, which is then on the disk (`sync_metrics`)."""
        return {"lines": self._lines, "sha256": self._written.hexdigest(), "whole": self._whole}


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in .gz. Raises UserError if it cannot be read."""
    try:
        content = path.read_bytes()
        if path.suffix != ".gz":
            return content
        if not content:
            raise EOFError("it is empty")
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} cannot be read: {reason}; restore it, or delete it to go on without it") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or .jsonl.gz. Incomplete lines (the run was killed, the disk was full) are reported
    on stderr and left out. Raises UserError if the file cannot be read or is no gzip."""
    return [row for row, _ in _read_lines(path, read_bytes(path))] if path.exists() else []


def _read_lines(path: Path, content: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Each record with its line, which ends in a newline."""
    found, odd = [], []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if is_record(row):
                found.append((row, line.rstrip(b"\r\n") + b"\n"))
                continue
        odd.append(f"{path}:{number}")
    if odd:
        shown = ", ".join(odd[:4]) + (f" and {len(odd) - 4:,} more" if len(odd) > 4 else "")
        are = "is not a complete record and is" if len(odd) == 1 else "are not complete records and are"
        say(f"warning: {shown} {are} left out", errors=True)
    return found


def is_record(row: Any) -> bool:
    """Whether a value of JSON is a line of metrics.jsonl: names with numbers, and a step."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return False
    named = {key: row[key] for key in BY_NAME if isinstance(row.get(key), dict)}
    values = [value for key, value in row.items() if key not in named]
    values += [value for by_name in named.values() for value in by_name.values()]
    return all(value is None or is_number(value) for value in values)


def _is_at(path: Path, opened: int) -> bool:
    """Whether the open file or folder is the one at `path`. A file server that does not answer does not decide it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _is_gone(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return not path.exists()  # False too where the file server does not answer
    return False


def _write_all(opened: int, content: bytes) -> None:
    while content:
        content = content[os.write(opened, content) :]


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
