"""The state of the runs of a sweep, read from their folders alone, and the collection of their rows."""

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import GROUPS, RunConfig
from scaling_testbed.errors import UserError, first_line
from scaling_testbed.plugins import difference, hashes, loaded_plugins
from scaling_testbed.row_files import write_rows
from scaling_testbed.runs.folder import RunFolder, is_record
from scaling_testbed.runs.hopeless import Hopeless, read_call
from scaling_testbed.runs.identity import TO_DO, AtHand, Found, of_checkpoint
from scaling_testbed.runs.lease import Owner, owner_of
from scaling_testbed.runs.row import FINAL
from scaling_testbed.sweeps.plan import PLAN_FILE, PlannedRun

if TYPE_CHECKING:
    from scaling_testbed.analysis.trajectories.final_loss import FinalLoss

LOG_FILE = "log.txt"  # what a run printed when a sweep started it
TAIL_BYTES = 16384

KEYS_OF_DATA = ("data.", "tokenizer.", "evaluation.sets", "evaluation.tasks")
REPLACED = "replaced"  # the subfolder of a sweep for runs whose data or plug-ins have changed, after a retry

# In the order of a table. stopped: the run has started, no process runs it now, and it can be continued. changed: its
# row or its checkpoint is of other data or other plug-ins than those at hand. hopeless: stopped, with its reason.
STATES = ("running", "queued", "pending", "stopped", "changed", "failed", "hopeless", "diverged", "finished")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The current state of one run. steps_planned: of the whole run, as the row of one that is over says; None: as the
    plan does. loss: the last validation loss, else the last training loss, in nats. error: the last line of an error,
    or the reason of a hopeless run. hopeless: the call that it is; None where its file is lost. not_compared: why the
    data of a finished run could not be compared with those at hand. owner: the process that runs it. job: the Slurm
    job that runs it or ran it. final: the predicted final loss of a run that has begun and is not finished, if it was
    asked for."""

    run: PlannedRun
    state: str
    step: int = 0
    steps_planned: int | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    owner: Owner | None = None
    job: str | None = None
    error: str | None = None
    hopeless: Hopeless | None = None
    not_compared: str | None = None
    final: "FinalLoss | None" = None

    def stays_stopped(self, margin: float | None) -> bool:
        """Whether a sweep that stops hopeless runs by this margin, in nats, leaves this one stopped. None: the sweep
        stops none."""
        if self.state != "hopeless" or margin is None:
            return False
        return self.hopeless is None or self.hopeless.excess > margin

    @property
    def steps(self) -> int:
        """The steps of the whole run: those of its plan, unless the clock chose others (budget.hours)."""
        return self.steps_planned or self.run.steps

    def record(self) -> dict[str, Any]:
        """The state as one flat object for --json."""
        return {
            "run_id": self.run.run_id,
            "varied": self.run.varied,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "eta_seconds": self.eta_seconds,
            "owner": str(self.owner) if self.owner else None,
            "job": self.job,
            "error": self.error,
            "hopeless": asdict(self.hopeless) if self.hopeless else None,
            "not_compared": self.not_compared,
            "folder": self.run.folder,
            **(self.final.record() if self.final else {}),
        }


class Comparison:
    """What the runs of a sweep recorded of their data and plug-ins, compared with those at hand. The data of several
    runs are looked at once, so use a new object for each command."""

    def __init__(self) -> None:
        self._at_hand = AtHand()
        self._runs: dict[tuple[str, ...], RunConfig | str] = {}

    def of(self, recorded: Mapping[str, Any], run: PlannedRun) -> Found:
        about = self._about_data(run)
        if isinstance(about, RunConfig):
            return self._at_hand.compare(recorded, about)
        loaded = [plugin.name for plugin in loaded_plugins()]
        if problem := difference(recorded.get("plugins"), hashes(loaded)):
            return Found(f"was made with other code: {problem}")
        return Found(unknown=about)

    def _about_data(self, run: PlannedRun) -> RunConfig | str:
        """A run with the same data as `run`; else why it cannot be composed."""
        # A word may follow another key, as data.seed=${seed} does: then the plan tells the values of each run.
        deciding = tuple(text for text in run.overrides if _may_decide_data(text) or not run.config)
        deciding += tuple(f"{key}={run.config[key]!r}" for key in sorted(run.config) if key.startswith(KEYS_OF_DATA))
        if deciding not in self._runs:
            try:
                (self._runs[deciding],) = compose_many([run.overrides], written_in=Path(run.folder).parent / PLAN_FILE)
            except UserError as error:
                self._runs[deciding] = f"its configuration cannot be composed any more: {first_line(error)}"
        return self._runs[deciding]


def _may_decide_data(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+~")
    if "." in key:
        return key.startswith(KEYS_OF_DATA)
    return key not in {*GROUPS, "seed", "name", "runs_dir"} - {"data", "tokenizer"}


def read_states(runs: Sequence[PlannedRun], comparison: Comparison | None = None) -> list[RunState]:
    """The states of runs from their folders, in the same order. comparison: as for `read_state`."""
    comparison = comparison or Comparison()
    return [read_state(run, comparison) for run in runs]


def read_state(run: PlannedRun, comparison: Comparison | None = None) -> RunState:
    """The state of one run from its folder. comparison: of all runs of a command; None: of this run alone."""
    comparison = comparison or Comparison()
    folder = Path(run.folder)
    row = RunFolder(folder).result()
    if row and row.get("status") in FINAL:  # the common case of a long sweep reads one file
        done = RunState(run=run, state=row["status"], step=row.get("steps") or 0, loss=row.get("val_loss"))
        done = replace(done, steps_planned=row.get("steps_planned"))
        found = comparison.of(row, run)
        if found.changed:
            return replace(done, state="changed", error=found.changed)
        return replace(done, error=row.get("error"), not_compared=found.unknown)
    if obstacle := RunFolder(folder).cannot_be_read():
        return RunState(run=run, state="failed", error=obstacle)
    if stranger := RunFolder(folder).row_of_another():
        return RunState(run=run, state="changed", error=f"holds the records of run {stranger['run_id']}")
    owner = owner_of(folder / "lock")
    last = last_metrics(folder)
    step = last.get("step", 0)
    known = RunState(run=run, state="pending", step=step, loss=last.get("val_loss", last.get("train_loss")))
    if owner:
        rate = None if run.config.get("budget.hours") is not None else last.get("tokens_per_second")
        eta = (run.steps - max(step, run.first_step)) * run.tokens_per_step / rate if rate else None
        return replace(known, state="running", owner=owner, job=owner.job, eta_seconds=eta)
    known = replace(known, job=RunFolder(folder).last_job())
    saved = of_checkpoint(folder)
    if saved and (changed := comparison.of(saved, run).changed):
        return replace(known, state="changed", error=changed)
    if row and row.get("status") == "failed":
        return replace(known, state="failed", error=row.get("error") or last_line(folder))
    if (call := read_call(folder)) or (row and row.get("status") == "hopeless"):
        return replace(known, state="hopeless", hopeless=call, error=str(call or (row or {}).get("error")))
    if row or any(os.path.exists(folder / name) for name in ("environment.json", LOG_FILE)):
        return replace(known, state="stopped", error=row.get("error") if row else last_line(folder))
    return known


def check_none_changed(states: Sequence[RunState]) -> None:
    """Raise UserError if the data or plug-ins of a run have changed: a sweep must not mix runs of both."""
    if changed := grouped("changed", ((state.run, state.error) for state in states if state.state == "changed")):
        again = f"or type `sweep retry`, which trains them again and keeps their old folders in {REPLACED}/"
        raise UserError(f"{'; '.join(changed)}; nothing was started; {TO_DO}, {again}")


def grouped(what: str, reasons: Iterable[tuple[PlannedRun, str | None]]) -> list[str]:
    """One text for each reason, with the number of its runs and the first of them."""
    found: dict[str, list[PlannedRun]] = {}
    for run, reason in reasons:
        found.setdefault(reason or "", []).append(run)
    return [
        f"{len(runs)} {what}: run {runs[0].run_id} {reason}"
        if len(runs) > 1
        else f"{what}: run {runs[0].run_id} {reason}"
        for reason, runs in found.items()
    ]


def set_aside(run: PlannedRun) -> Path:
    """Move the folder of a run to a new folder in REPLACED, so that it can be trained again. Returns the new folder.
    Raises AlreadyRunning if a process runs it."""
    folder, number = Path(run.folder), 1
    while (place := folder.parent / REPLACED / f"{run.run_id}-{number}").exists():
        number += 1
    place.parent.mkdir(exist_ok=True)
    with RunFolder(folder):
        os.rename(folder, place)
    return place


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
            reason = RunFolder(path.parent).cannot_be_read() or f"{path} holds no complete row"
            print(f"warning: {reason}; it is left out", file=sys.stderr)
    return found


def collect(folder: Path, only: Collection[str] | None = None) -> tuple[Path, Path, list[str | None]]:
    """Write results.jsonl and results.parquet into a sweep's folder; returns their paths and the run ids of the rows.

    only: the run ids to take; None: all. In the table, columns with lists or mappings hold JSON text. Raises UserError
    if there is no row, or if rows with the same configuration are of different data."""
    found = [row for row in rows(folder) if only is None or row.get("run_id") in only]
    if not found:
        raise UserError(f"{folder} holds no result of these runs yet; `sweep status` shows how far its runs are")
    check_not_mixed(found)
    lines, table = folder / "results.jsonl", folder / "results.parquet"
    for path in (lines, table):
        write_rows(path, found)
    return lines, table, [row.get("run_id") for row in found]


def check_not_mixed(found: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if rows name the same data, tokenizer, evaluation set, task or plug-in and are of different
    ones."""
    seen: dict[str, tuple[str, Any]] = {}
    for row in found:
        named = {key: value for key, value in sorted(row.items()) if key.startswith(("data.", "tokenizer."))}
        of_row = {f"data_fingerprint of {json.dumps(named)}": row.get("data_fingerprint")}
        of_row |= {
            f"the data of evaluation set {key}": value for key, value in (row.get("evaluation_data") or {}).items()
        }
        of_row |= {f"the documents of task {key}": value for key, value in (row.get("task_data") or {}).items()}
        of_row |= {f"the code of plug-in {key}": value for key, value in (row.get("plugins") or {}).items()}
        for what, value in of_row.items():
            if value is None:
                continue
            run_id, first = seen.setdefault(what, (str(row.get("run_id")), value))
            if first != value:
                raise UserError(
                    f"the rows are not of the same data: {what.partition(' of {')[0]} is {first} in run {run_id} and "
                    f"{value} in run {row.get('run_id')}; `sweep status` names the runs that have changed, `sweep "
                    "retry` trains them again, and overrides select the runs to collect"
                )


def counts(states: Sequence[RunState]) -> str:
    """How many runs are in each state, in words."""
    numbers = {state: sum(found.state == state for found in states) for state in STATES}
    return ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
