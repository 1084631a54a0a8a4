"""The state of the runs of a sweep, read from their folders alone, and the collection of their rows."""

import contextlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_testbed.errors import UserError
from scaling_testbed.plugins import difference, loaded_plugins
from scaling_testbed.row_files import write_rows
from scaling_testbed.runs.folder import RunFolder, is_record
from scaling_testbed.runs.lease import Owner, owner_of
from scaling_testbed.runs.row import FINAL
from scaling_testbed.sweeps.plan import PlannedRun

LOG_FILE = "log.txt"  # what a run printed when a sweep started it
TAIL_BYTES = 16384

# In the order of a table. stopped: the run has started, no process runs it now, and it can be continued.
STATES = ("running", "queued", "pending", "stopped", "failed", "diverged", "finished")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The current state of one run. loss: the last validation loss, else the last training loss, in nats. error: the
    last line of an error. owner: the process that runs it. job: the Slurm job that runs it or ran it."""

    run: PlannedRun
    state: str
    step: int = 0
    loss: float | None = None
    eta_seconds: float | None = None
    owner: Owner | None = None
    job: str | None = None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """The state as one flat object for --json."""
        return {
            "run_id": self.run.run_id,
            "varied": self.run.varied,
            "state": self.state,
            "step": self.step,
            "steps": self.run.steps,
            "loss": self.loss,
            "eta_seconds": self.eta_seconds,
            "owner": str(self.owner) if self.owner else None,
            "job": self.job,
            "error": self.error,
            "folder": self.run.folder,
        }


def read_state(run: PlannedRun) -> RunState:
    """The state of one run from its folder."""
    folder = Path(run.folder)
    row = RunFolder(folder).result()
    if row and row.get("status") in FINAL:  # the common case of a long sweep reads one file
        done = RunState(run=run, state=row["status"], step=row.get("steps") or 0, loss=row.get("val_loss"))
        now = {plugin.name: plugin.sha256 for plugin in loaded_plugins()}
        if problem := difference(row.get("plugins"), now):
            return replace(done, state="failed", error=problem)
        return replace(done, error=row.get("error"))
    owner = owner_of(folder / "lock")
    last = last_metrics(folder)
    step = last.get("step", 0)
    known = RunState(run=run, state="pending", step=step, loss=last.get("val_loss", last.get("train_loss")))
    if owner:
        rate = last.get("tokens_per_second")
        eta = (run.steps - step) * run.tokens_per_step / rate if rate else None
        return replace(known, state="running", owner=owner, job=owner.job, eta_seconds=eta)
    known = replace(known, job=RunFolder(folder).last_job())
    if row and row.get("status") == "failed":
        return replace(known, state="failed", error=row.get("error") or last_line(folder))
    if row or any(os.path.exists(folder / name) for name in ("environment.json", LOG_FILE)):
        return replace(known, state="stopped", error=row.get("error") if row else last_line(folder))
    return known


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last complete record of metrics.jsonl with the last validation loss, or {}. Reads only the end of the
    file."""
    found: dict[str, Any] = {}
    for line in reversed(_tail(folder / "metrics.jsonl")):
        with contextlib.suppress(ValueError, RecursionError):  # an incomplete line
            record = json.loads(line)
            if not is_record(record):
                continue
            if found and record.get("step") == 0:  # before training, so no result of the run
                record.pop("val_loss", None)
            found = {**record, **found}
            if "val_loss" in found and "train_loss" in found:
                break
    return found


def last_line(folder: Path) -> str | None:
    """The last line of a run's output that is not empty."""
    lines = [line for line in _tail(folder / LOG_FILE) if line.strip()]
    return lines[-1].strip() if lines else None


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > TAIL_BYTES else lines


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every row in a sweep's folder, ordered by run id. A file without a row is reported on stderr and left out."""
    found = []
    for path in sorted(folder.glob("*/result.json")):
        if row := RunFolder(path.parent).result():
            found.append(row)
        else:
            print(f"warning: {path} holds no complete row and is left out", file=sys.stderr)
    return found


def collect(folder: Path, only: Collection[str] | None = None) -> tuple[Path, Path, list[str | None]]:
    """Write results.jsonl and results.parquet into a sweep's folder; returns their paths and the run ids of the rows.

    only: the run ids to take; None: all. In the table, columns with lists or mappings hold JSON text. Raises UserError
    if there is no row."""
    found = [row for row in rows(folder) if only is None or row.get("run_id") in only]
    if not found:
        raise UserError(f"{folder} holds no result of these runs yet; `sweep status` shows how far its runs are")
    lines, table = folder / "results.jsonl", folder / "results.parquet"
    for path in (lines, table):
        write_rows(path, found)
    return lines, table, [row.get("run_id") for row in found]


def counts(states: Sequence[RunState]) -> str:
    """How many runs are in each state, in words."""
    numbers = {state: sum(found.state == state for found in states) for state in STATES}
    return ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
