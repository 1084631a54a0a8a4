"""Run a sweep on this machine: one process for each run, several at a time, with the output of each in log.txt.

Each run owns its folder, and its state is read from there. The driver only starts runs and can be killed at any moment:
the runs that it started continue, and the next driver waits for them and starts the rest.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.live import Live

from scaling_testbed.analysis.rows.study import about_hopeless
from scaling_testbed.config.compose import OUTSIDE
from scaling_testbed.config.run import PLANNED_RUN
from scaling_testbed.config.words import key_of
from scaling_testbed.errors import STOPPED, UserError, check_positive
from scaling_testbed.files import reason_of
from scaling_testbed.processes.interrupts import handle, restore
from scaling_testbed.processes.serial import SerialRun, SerialStarter
from scaling_testbed.processes.warm import Starter, WarmProcess
from scaling_testbed.progress import DETAIL, LINE, LOGGER, clock, for_workers, say
from scaling_testbed.runs.lease import owner_of
from scaling_testbed.runs.row import FINAL
from scaling_testbed.sweeps.hopeless import Judge
from scaling_testbed.sweeps.plan import PlannedRun, on_gpus, remembered, sweep_folder
from scaling_testbed.sweeps.status import (
    LOG_FILE,
    Comparison,
    RunState,
    check_none_changed,
    last_line,
    read_state,
    read_states,
    set_aside,
)
from scaling_testbed.sweeps.view import live_table

ENDED = (*FINAL, "hopeless")
POLL_SECONDS = 0.05  # a free slot waits half of it
REFRESH_SECONDS = 2.0
JUDGE_SECONDS = 1.0  # between looks for new evaluations of the runs that train
OWNER_SECONDS = 1.0  # between looks at runs of other processes: for one of another machine each look makes a file
ENOUGH_RUNS, ENOUGH_SECONDS = 2, 60.0  # one of both before the time left is estimated
PRELOADED = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]  # the first update imports them
PRELOADED += ["scaling_testbed.training.run", "scaling_testbed.config.compose:get_ready"]
PRELOADED += ["scaling_testbed.commands.doors"]
COMPILER = ["torch._inductor.compile_fx"]  # a second of imports, for runs that compile their model
# Runs that share a process have the same values in OF_PROCESS. Compiled code is kept while OF_SHAPE is the same too.
OF_PROCESS, OF_SHAPE = ("compute.",), ("compute.", "model.", "batch.", "loss.", "parallelism.")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Started: TypeAlias = "subprocess.Popen[bytes] | WarmProcess | SerialRun"


def slots(workers: int | None, gpus: Sequence[str], runs_per_gpu: int) -> list[dict[str, str]]:
    """The environment of each slot for a run, as changes to the environment of this process. Raises ConfigError if
    `workers` or `runs_per_gpu` is not positive."""
    check_positive("workers", workers)
    check_positive("runs_per_gpu", runs_per_gpu)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(runs_per_gpu) for gpu in gpus]
    workers = workers or 1
    if "OMP_NUM_THREADS" in os.environ or workers == 1:
        return [{}] * workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(1, cores // workers))}] * workers


@dataclass
class Driver:
    """Runs `runs` in `slots`, those with the most FLOPs first; see `drive`. warm: whether several runs start as forks
    of one process that has imported PyTorch, and on GPUs one after another in one process, where this is possible.
    stop_hopeless: the margin, in nats, by which runs are called hopeless and stopped; None: no run is."""

    runs: Sequence[PlannedRun]
    slots: list[dict[str, str]]
    retry: bool = False
    warm: bool = True
    stop_hopeless: float | None = None
    children: dict[str, tuple[Started, PlannedRun, dict]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    states: dict[str, RunState] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)  # runs of other processes that were reported
    stopping: str | None = None

    def __post_init__(self) -> None:
        common = dict(set.intersection(*(set(slot.items()) for slot in self.slots)))
        compiles = any(run.config.get("compute.compile") is True for run in self.runs)
        modules = PRELOADED + COMPILER if compiles else PRELOADED
        self._starter = Starter(modules, common, warm=self.warm and len(self.runs) > 1)
        self._serial = SerialStarter()

    def drive(self) -> int:
        """Run all unfinished runs. Returns the exit status: 0, 1 if a run failed, or 75 if a signal asked to stop. The
        runs have then saved checkpoints, and the next call continues them. Raises UserError, before anything is
        started, if the data or plug-ins of a run have changed and this is no retry."""
        self._comparison = Comparison()
        self.states = {state.run.run_id: state for state in read_states(self.runs, self._comparison)}
        if not self.retry:
            check_none_changed(list(self.states.values()))
        chain = with_followers(self.runs)
        self.waiting = sorted((run for run in self.runs if self._is_due(run)), key=lambda run: -chain[run.run_id])
        self._skipped = [run for run in self.runs if self.states[run.run_id].state == "failed" and not self.retry]
        self.failures = {run.run_id: self.states[run.run_id].error or "failed" for run in self._skipped}
        self._judge = self._judge_of_sweep()
        self._due, self._began = list(self.waiting), time.monotonic()
        self._done_before = {run.run_id: self._share_done(run) for run in self._due}
        if not self.waiting:
            return self._conclude()
        free, previous = list(self.slots), handle(_SIGNALS, self._stop)
        try:
            self._loop(free)
        except BaseException:
            self._send(signal.SIGTERM)  # after an error of the driver its runs save and end
            raise
        finally:
            self._starter.close()
            self._serial.close()
            restore(previous)
        return self._conclude()

    def _is_due(self, run: PlannedRun) -> bool:
        state = self.states[run.run_id].state
        if state == "hopeless":
            return not self.states[run.run_id].stays_stopped(self.stop_hopeless)
        return state in ("pending", "stopped", "running") or (state in ("failed", "changed") and self.retry)

    def _judge_of_sweep(self) -> Judge | None:
        """Who calls runs hopeless, by these runs and by all others that the folder of the sweep remembers."""
        if self.stop_hopeless is None:
            return None
        others = [run for run in remembered(sweep_folder(self.runs)) if run.run_id not in self.states]
        return Judge(self.stop_hopeless, read_states(others, self._comparison))

    def _loop(self, free: list[dict[str, str]]) -> None:
        console = Console()
        self._looked = -OWNER_SECONDS
        shows = console.is_terminal and LOGGER.isEnabledFor(LINE)
        live = Live(console=console, auto_refresh=False, transient=True) if shows else None
        refreshed = judged = 0.0
        if live:
            live.start()
        try:
            while self.children or (self.waiting and not self.stopping):
                self._fill(free)
                for run_id, (process, run, slot) in list(self.children.items()):
                    if (status := process.poll()) is not None:
                        del self.children[run_id]
                        free.append(slot)
                        self._ended(run, status, live is None)
                if time.monotonic() - judged > JUDGE_SECONDS:
                    judged = time.monotonic()
                    self._stop_hopeless_runs()
                if live and time.monotonic() - refreshed > REFRESH_SECONDS:
                    refreshed = time.monotonic()
                    self._refresh([*(run for _, run, _ in self.children.values()), *self.waiting])
                    rows = shutil.get_terminal_size().lines
                    live.update(live_table(list(self.states.values()), self._seconds_left(), rows), refresh=True)
                time.sleep(POLL_SECONDS)
        finally:
            if live:
                live.stop()

    def _stop_hopeless_runs(self) -> None:
        """Ask the runs of this driver that are hopeless by a new evaluation to save and end. The reason is written
        first: without it the run would count as interrupted."""
        if self._judge is None or self.stopping:
            return
        for process, run, _ in self.children.values():
            if call := self._judge.call(run, list(self.states.values())):
                try:
                    call.write(Path(run.folder))
                except UserError as error:
                    say(f"warning: {run.label} is hopeless and goes on: {error}", errors=True)
                    continue
                process.send_signal(signal.SIGTERM)

    def _fill(self, free: list[dict[str, str]]) -> None:
        """Start waiting runs in free slots. A run that another process owns waits without a slot."""
        if look := time.monotonic() - self._looked >= OWNER_SECONDS:
            self._looked = time.monotonic()
        for run in list(self.waiting):
            if not free or self.stopping:
                return
            if run.run_id in self.awaited and not look:
                continue
            if not self._can_begin(run):
                continue
            if owner := owner_of(Path(run.folder) / "lock"):
                if run.run_id not in self.awaited:
                    self.awaited.add(run.run_id)
                    say(f"{run.label} is being run by {owner}; waiting for it", errors=True)
                continue
            self.waiting.remove(run)
            self.states[run.run_id] = self._read(run)
            if self._is_due(run):
                self._begin(run, free)
            else:  # it ended in the other process
                self._note_failure(run, "failed")
                self._say(run)

    def _can_begin(self, run: PlannedRun) -> bool:
        """Whether the run that this one begins after, if there is one, has finished. If that one has ended otherwise,
        this one has failed."""
        before = self.states.get(run.after or "")
        if before is None or before.state == "finished" or self._is_trained_whole(run):
            return True
        there = before.run.run_id in self.children or before.run in self.waiting
        if not there:
            self.waiting.remove(run)
            self.states[run.run_id] = replace(self.states[run.run_id], state="failed")
            why = f"it begins where {before.run.label} ({before.run.run_id}) ends, and that run is {before.state}"
            self.failures[run.run_id] = why
            self._say(run)
        return False

    def _is_trained_whole(self, run: PlannedRun) -> bool:
        """Whether a run with a shared trunk begins at step 0, because its trunk has diverged: so will the run, and then
        it has a row."""
        before = self.states.get(run.after or "")
        return before is not None and before.state == "diverged" and bool(run.config.get("start.same_run"))

    def _begin(self, run: PlannedRun, free: list[dict[str, str]]) -> None:
        """Start a run in a free slot. If its folder cannot be written, it has failed, and the others continue."""
        try:
            if self.states[run.run_id].state == "changed":
                print(f"{run.label}: the old run is in {set_aside(run)}", flush=True)
            if self._judge:
                self._judge.begin(run)
            process = self._start(run, free[-1])
        except OSError as error:
            self.states[run.run_id] = replace(self.states[run.run_id], state="failed")
            no_process = error.filename in (None, sys.executable)  # e.g. a limit on processes (ulimit -u)
            what = f"cannot start {sys.executable}" if no_process else f"cannot write {run.folder}"
            self.failures[run.run_id] = f"{what}: {reason_of(error)}{'' if no_process else '; set runs_dir='}"
            self._say(run)
            return
        self.children[run.run_id] = (process, run, free.pop())
        if self.stopping:  # the signal came during the start
            process.send_signal(signal.SIGTERM)

    def _start(self, run: PlannedRun, slot: dict[str, str]) -> Started:
        folder = Path(run.folder)
        overrides = run.overrides
        if self._is_trained_whole(run):
            overrides = [text for text in overrides if not key_of(text).startswith("start.")]
        overrides = on_gpus(overrides) if "CUDA_VISIBLE_DEVICES" in slot else overrides
        folder.mkdir(parents=True, exist_ok=True)
        say(f"starts {run.label} in {run.folder}{self._place(slot)}", level=DETAIL)
        with open(folder / LOG_FILE, "a") as log:
            # In a session of its own: Ctrl-C reaches the driver, which asks the runs to save.
            words, planned = ["scaling_testbed.train", *overrides], {PLANNED_RUN: run.run_id} | for_workers()
            if self.warm and _shares_process(run, slot):
                kind, shape = (json.dumps(_part(run, sections)) for sections in (OF_PROCESS, OF_SHAPE))
                return self._serial.start(words, planned, log, place=slot, kind=kind, shape=shape)
            return self._starter.start(words, slot | planned, log)

    @staticmethod
    def _place(slot: dict[str, str]) -> str:
        """The variables of a slot, in words."""
        return f" with {' '.join(f'{name}={value}' for name, value in slot.items())}" if slot else ""

    def _read(self, run: PlannedRun) -> RunState:
        """The state of a run. The data are looked at again only where they seem to have changed: to compose a run and
        to look at its data takes as long as to start it. `_conclude` looks at the data of all runs."""
        state = read_state(run, self._comparison)
        if state.state == "changed":
            self._comparison = Comparison()
            state = read_state(run, self._comparison)
        return state

    def _ended(self, run: PlannedRun, status: int, speak: bool) -> None:
        state = self._read(run)
        self.states[run.run_id] = state
        if state.state == "running" and not self.stopping:  # another process claimed it first
            self.waiting.append(run)
            return
        if not self.stopping:
            self._note_failure(run, f"ended with status {status}", _killed(status))
        if speak:
            self._say(run)

    def _note_failure(self, run: PlannedRun, otherwise: str, killed: str | None = None) -> None:
        """Record why a run has no result: that a signal killed it, else its own reason, else `otherwise`."""
        state = self.states[run.run_id]
        if state.state not in ENDED:
            said = state.error or last_line(Path(run.folder)) or otherwise
            self.failures[run.run_id] = killed if killed and state.state != "failed" else said

    def _say(self, run: PlannedRun) -> None:
        state = self.states[run.run_id]
        done = len(self._due) - len(self.waiting) - len(self.children)
        which = "val_loss" if state.state in ("finished", "diverged") else "last loss"
        loss = f"{which} {state.loss:.4f}" if state.loss is not None else ""
        self._refresh([run for _, run, _ in self.children.values()])
        left = self._seconds_left()
        time_left = f"about {clock(left)} left" if left else ""
        parts = (f"{done}/{len(self._due)}", f"{state.state:9}", run.label, loss, time_left)
        say("  ".join(part for part in parts if part))

    def _refresh(self, runs: Sequence[PlannedRun]) -> None:
        for run in runs:
            state = self._read(run)
            starting = run.run_id in self.children and state.state in ("pending", "stopped", "hopeless")
            self.states[run.run_id] = replace(state, state="running", error=None) if starting else state

    def _share_done(self, run: PlannedRun) -> float:
        state = self.states[run.run_id]
        if state.state == "changed":  # it is trained again from its first step on
            return 0.0
        return max(0, state.step - run.first_step) / (run.steps - run.first_step)

    def _seconds_left(self) -> float | None:
        """Estimate from the FLOPs of the steps that were trained since this driver began. None until ENOUGH_RUNS runs
        have ended or ENOUGH_SECONDS have passed, because the first run alone gives a poor estimate."""
        seconds = time.monotonic() - self._began
        ended = sum(self.states[run.run_id].state in ENDED for run in self._due)
        if ended < min(ENOUGH_RUNS, len(self._due)) and seconds < ENOUGH_SECONDS:
            return None
        open_runs = [*(run for _, run, _ in self.children.values()), *self.waiting]
        left = sum(run.flops * (1 - self._share_done(run)) for run in open_runs)
        done = sum(run.flops * (self._share_done(run) - self._done_before[run.run_id]) for run in self._due)
        return seconds / done * left if done > 0 else None

    def _stop(self, number, _frame) -> None:
        """Ask every run to save and end. A second signal kills the runs that still exist."""
        again, self.stopping = self.stopping is not None, signal.Signals(number).name
        self._send(signal.SIGKILL if again else signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for process, _, _ in self.children.values():
            process.send_signal(number)

    def _conclude(self) -> int:
        if self.stopping:
            left = len(self.waiting)
            say(f"stopped by {self.stopping}; {left} runs not started; the same command continues", errors=True)
            return STOPPED
        for state in read_states(self.runs):  # the data may have changed since a run has finished
            self.states[state.run.run_id] = state
            if state.state == "changed":
                self.failures[state.run.run_id] = state.error or "changed"
        for run in self.runs:
            if run.run_id in self.failures:
                say(f"failed: {run.label}: {self.failures[run.run_id]} ({run.folder}/{LOG_FILE})", errors=True)
        if self._skipped:
            say(f"{len(self._skipped)} failed before and were not run again; `sweep retry` runs them", errors=True)
        for line in about_hopeless({"status": state.state} for state in self.states.values()):
            say(f"{line}; without --stop-hopeless the same command continues", errors=True)
        return 1 if self.failures else 0


def with_followers(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """run_id -> the FLOPs of a run and of the longest chain of runs that begin after it, one after the other."""
    chain = {run.run_id: run.flops for run in runs}
    known = {run.run_id: run for run in runs}
    for last in runs:
        run, total = last, last.flops
        while (before := known.get(run.after or "")) is not None:
            total += before.flops
            if chain[before.run_id] >= total:
                break
            chain[before.run_id] = total
            run = before
    return chain


def _shares_process(run: PlannedRun, slot: dict[str, str]) -> bool:
    """Whether a run leaves a process as other runs need it. Plug-ins register parts, and mirrors keep
    threads."""
    outside = any(key_of(word) in OUTSIDE for word in run.overrides)
    on_cpu = run.config.get("compute.device") == "cpu"  # its peak memory would be that of all runs of the process
    mirrored = any(run.config.get(f"logging.{mirror}") is not False for mirror in ("tensorboard", "wandb"))
    return "CUDA_VISIBLE_DEVICES" in slot and not outside and not on_cpu and not mirrored


def _part(run: PlannedRun, sections: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a run in these sections, by key."""
    return {key: value for key, value in sorted(run.config.items()) if key.startswith(sections)}


def _killed(status: int) -> str | None:
    """What to say of a process that a signal has killed, which could not say anything itself; None for any other."""
    if status >= 0:
        return None
    hint = ", which the kernel sends where memory runs out" if -status == signal.SIGKILL else ""
    return f"killed by signal {-status}{hint}; the same command continues it"
