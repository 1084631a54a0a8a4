"""The files of a run: config.yaml, environment.json, metrics.jsonl and result.json.

metrics.jsonl is the primary record. It has one line for each recorded step, which is flushed when it is written.
"""

import contextlib
import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any, Self, TextIO

import yaml

from scaling_testbed.errors import UserError
from scaling_testbed.files import write_json, write_text
from scaling_testbed.runs.environment import record_start
from scaling_testbed.runs.lease import Lease


class RunFolder:
    """The files of one run. As a context manager it holds the folder, and a second process is refused."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics: TextIO | None = None
        self._held = False
        self._lease = Lease(path / "lock")

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lease.__enter__()
            self._held = True
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror}; set runs_dir=") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._lease.__exit__()

    def result(self) -> dict[str, Any] | None:
        """The row of this run, or None if it has no readable row with a status."""
        with contextlib.suppress(OSError, ValueError):
            row = json.loads((self.path / "result.json").read_text())
            return row if isinstance(row, dict) and isinstance(row.get("status"), str) else None
        return None

    def last_job(self) -> str | None:
        """The Slurm job of the last start of this run, or None."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            job: str | None = json.loads((self.path / "environment.json").read_text())["starts"][-1].get("job")
            return job
        return None

    def check_held(self) -> None:
        """Raise AlreadyRunning, before anything is written, if another process has taken over the folder."""
        if self._held:
            self._lease.check()

    def write_result(self, row: dict[str, Any]) -> None:
        """Replace the row. Raises AlreadyRunning as `check_held` does."""
        self.check_held()
        write_json(self.path / "result.json", _plain(row))

    def start(self, config: dict[str, Any], environment: dict[str, Any]) -> int:
        """Record the configuration and the environment of this start. Returns the number of earlier starts."""
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        return record_start(self.path, environment)

    def open_metrics(self, keep_before: int) -> list[dict[str, Any]]:
        """Open metrics.jsonl for appending and return its rows. Rows of step `keep_before` and later are dropped.

        They are written again: if a run was killed, the file may be ahead of the checkpoint that the run resumes from.
        """
        path = self.path / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] < keep_before]
        write_text(path, "".join(_line(row) for row in rows))
        self._metrics = open(path, "a")  # noqa: SIM115 (held as long as the folder)
        return rows

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Append one line and flush it. Raises UserError if writing fails, and AlreadyRunning as `check_held` does."""
        self.check_held()
        if self._metrics is None:
            raise RuntimeError("metrics.jsonl is not open: call open_metrics first")
        try:
            self._metrics.write(_line(row))
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or .jsonl.gz. An incomplete line (the run was killed, the disk was full) is reported
    on stderr and left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path}:{number} is not a complete record and is left out", file=sys.stderr)
            continue
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row)) + "\n"


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
