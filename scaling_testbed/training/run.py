"""One run from its start to its row: claim the folder, build the parts, resume, loop, row.

All that a run computes is a function of its configuration and the step. So a run that was killed and started again by
the same command is bitwise identical at its end to an uninterrupted run. Several processes share each batch, which
changes only rounding. Only rank 0 holds the folder of the run.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from scaling_testbed.config.run import RunConfig, check_planned, flatten, run_folder_path
from scaling_testbed.errors import FAILED, UserError, first_line, is_memory_error
from scaling_testbed.learning.optimizers import take_back
from scaling_testbed.plugins import hashes
from scaling_testbed.processes.compilation import is_compile_error
from scaling_testbed.processes.device import peak_memory_bytes
from scaling_testbed.processes.group import PeerGone, PeerHangs, Processes, RankError
from scaling_testbed.processes.interrupts import Interrupted, Interrupts
from scaling_testbed.processes.world import World, check_world, world_from_environment
from scaling_testbed.progress import WARNING
from scaling_testbed.runs.environment import versions
from scaling_testbed.runs.finished import final_row
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.runs.hopeless import forget_call, read_call
from scaling_testbed.runs.identity import check_same, of_checkpoint
from scaling_testbed.runs.row import FINAL, STOPPED_EARLY, Row
from scaling_testbed.runs.writer import Writer
from scaling_testbed.training import tasks
from scaling_testbed.training.graph import StepGraph
from scaling_testbed.training.groups import evaluate_groups
from scaling_testbed.training.parts import build_parts
from scaling_testbed.training.profile import StepProfile
from scaling_testbed.training.progress import is_evaluated, is_saved, is_scored, resume, save
from scaling_testbed.training.records import Records
from scaling_testbed.training.row import Outcome, make_row
from scaling_testbed.training.scaled import evaluate_scaled
from scaling_testbed.training.start import begin
from scaling_testbed.training.step import (
    Diverged,
    Queue,
    TooLittleMemory,
    inputs,
    make_update,
    poll,
    too_little_memory,
)
from scaling_testbed.training.validation import evaluate, evaluate_average


def train(run: RunConfig, interrupts: Interrupts | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Train or resume the run that `run` describes, and return its row (result.json). A finished run is not repeated.

    interrupts: entered by the caller, or None. quiet: print nothing. The status in the row is finished, diverged
    (stopped before the update that would have used a non-finite loss), preempted (a signal came; a checkpoint of this
    step is saved) or hopeless (preempted by the driver of a sweep, which has written its reason). Raises UserError for
    an error that the user can correct. Any other error is recorded as status failed and raised.
    """
    world = world_from_environment()
    check_world(world, run.parallelism, run.batch.sequences)
    check_planned(run)
    folder = RunFolder(run_folder_path(run))
    with contextlib.ExitStack() as held:
        if interrupts is None or not interrupts.entered:
            interrupts = held.enter_context(Interrupts())
        processes = held.enter_context(Processes(world, run.parallelism, interrupts))
        processes.check_alike(_of_all_processes(run))
        if row := processes.on_main(lambda: final_row(folder, run, quiet=quiet)):
            return row
        if row := processes.on_main(lambda: _hold(folder, held, run, quiet=quiet)):
            return row
        writer = Writer()
        held.enter_context(_failures_recorded(run, folder, processes, writer))
        held.enter_context(writer)
        processes.on_main(lambda: _check_goes_on(folder, run))
        if run.parallelism.is_sharded:
            processes.together(folder.check_here)
        try:
            # Several processes must stop together, which is only possible from the first step on.
            with interrupts.at_once() if world.size == 1 else contextlib.nullcontext():
                quiet = quiet or not world.is_main
                parts = build_parts(run, folder, processes, quiet=quiet)
                progress = resume(parts) or begin(parts)
                records = Records(parts, progress, quiet=quiet)
        except Interrupted as signal:
            row = Row.of(run, status="preempted", error=f"stopped by {signal} before training").as_dict()
            folder.write_result(row)
            return row
        parts.length.clock = progress.clock
        records.start_mirrors()
        outcome, queue = Outcome("finished"), Queue(parts, progress.step)
        graph = StepGraph(parts) if parts.captures else None
        profile = StepProfile(parts, records.say)

        def look() -> None:
            poll(processes, interrupts)

        def needs_host(step: int) -> bool:
            reads_weights = is_evaluated(run, step, parts.steps) or is_scored(run, step, parts.steps)
            return reads_weights or is_saved(run, step)

        try:
            while True:
                try:
                    is_due = queue.is_due if processes.grouped else parts.length.is_due(queue.made)
                    if is_due and (said := parts.length.choose(queue.made)):
                        records.shorten(said)
                    if progress.record is not None:
                        if is_evaluated(run, progress.step, parts.steps):
                            progress.record |= evaluate(parts, look) | evaluate_average(parts, look)
                            progress.record |= evaluate_scaled(parts, look) | evaluate_groups(parts, look)
                            if parts.mixing is not None:
                                losses = progress.record["val_loss_by_set"]
                                progress.record |= parts.mixing.observe(progress.step, losses, parts.steps)
                        if is_scored(run, progress.step, parts.steps):
                            progress.record |= tasks.score(parts, look)
                        records.write(progress)
                        if progress.step < parts.steps and is_saved(run, progress.step):
                            save(parts, progress, writer)
                    if progress.step == parts.steps:
                        break
                    if queue.is_empty:  # else the device has not stopped since the last update
                        progress.clock.begin_step()
                    while queue.has_room(interrupts, needs_host):
                        profile.begin(queue.made)
                        given = inputs(parts, queue.made)
                        if graph is not None:
                            queue.add(graph.make(given, interrupts, progress.micro_batch))
                        else:
                            queue.add(make_update(parts, given, interrupts, progress.micro_batch))
                        parts.averages.add(queue.made, parts.bad)
                        profile.end(queue.made)
                except (TooLittleMemory, Interrupted) as error:
                    # First the updates that are made are read. Then the next one is tried again. A group cannot try
                    # it again: its other processes wait in a collective of the update that failed here.
                    if processes.grouped or not queue.close():
                        if isinstance(error, Interrupted):
                            raise
                        records.say(progress.take_less(parts, error), WARNING)
                        continue
                update = queue.read()
                progress.advance(update, parts)
        except Interrupted as signal:
            outcome = _stopped(folder, signal, progress.step)
        except Diverged as reason:
            take_back(parts.optimizer, queue.made - progress.step)
            parts.averages.take_back(queue.made, progress.step)
            outcome = Outcome("diverged", str(reason), progress.step + 1)
            if progress.summary.evaluation.get("step") != progress.step:
                of_weights = evaluate(parts) | evaluate_average(parts)  # those of the last update
                of_targets = evaluate_scaled(parts) | evaluate_groups(parts)
                progress.record = {"step": progress.step} | of_weights | of_targets
                records.write(progress)
            progress.record = {"step": progress.step + 1} | reason.diagnostics  # of the update that was not made
            records.write(progress)
        finally:
            profile.close()
            records.close()
        if outcome.status in STOPPED_EARLY or (outcome.status == "finished" and run.checkpoint.at_end):
            save(parts, progress, writer)
        processes.on_main(writer.wait)
        peak_bytes = int(processes.largest([peak_memory_bytes(parts.device)])[0])
        return processes.on_main(lambda: records.finish(make_row(parts, progress, records, outcome, peak_bytes)))


OF_ONE_PROCESS = ("runs_dir", "data_dir", "data_workers", "plugins", "configs", "overrides", "compute.threads")


def _of_all_processes(run: RunConfig) -> dict[str, Any]:
    """What must be the same in all processes of `run`, by name: the row records it from rank 0 alone."""
    found: dict[str, Any] = {key: value for key, value in flatten(run).items() if key not in OF_ONE_PROCESS}
    found["the sha256 of the plug-ins"] = sorted(hashes(run.plugins).values())  # not their paths
    return found | {f"the version of {name}": version for name, version in versions().items()}


def _hold(folder: RunFolder, held: contextlib.ExitStack, run: RunConfig, *, quiet: bool) -> dict[str, Any] | None:
    """Claim the folder. Returns the row if another process has finished the run in the meantime, else None."""
    held.enter_context(folder)
    row = final_row(folder, run, quiet=quiet)
    if row is None:
        forget_call(folder.path)
    return row


def _stopped(folder: RunFolder, signal: Interrupted, step: int) -> Outcome:
    call = read_call(folder.path)
    return Outcome("hopeless", str(call)) if call else Outcome("preempted", f"stopped by {signal} at step {step}")


def _check_goes_on(folder: RunFolder, run: RunConfig) -> None:
    """Raise UserError, before data are prepared, if the checkpoint to continue from is of other data or plug-ins."""
    if saved := of_checkpoint(folder.path):
        check_same(saved, run, folder.path)


@contextlib.contextmanager
def _failures_recorded(run: RunConfig, folder: RunFolder, processes: Processes, writer: Writer) -> Iterator[None]:
    """Context manager for the work in a claimed folder. It records an error in the row, reports it to the other
    processes, and raises it: as a UserError if the user can correct it or another process caused it."""

    def end(error: Exception) -> Exception:  # in a thread, before the process ends without its main thread
        writer.settle(run.parallelism.timeout_seconds)
        error = _end_recorded(run, folder, error)
        if processes.world.is_main:
            folder.__exit__()
        return error

    processes.when_ended(end)
    try:
        yield
    except Exception as error:
        mended = _for_a_person(error, run, processes.world)
        cause = processes.first_failure(mended or error) or mended
        told = cause or error
        if processes.world.is_main:
            told = _end_recorded(run, folder, told)
        if told is not error:
            raise told from error
        raise


_PLACE_OF_HANG = re.compile(r"(rank \d+( and \d+ more)?|all ranks) hangs? (at step \d+|before the first step)")


def _end_recorded(run: RunConfig, folder: RunFolder, error: Exception) -> Exception:
    """Write the row of a run that `error` ended, and return the error to raise. A run that hangs may be continued once.
    One that hangs again at the same step has failed: it would hang for ever. On a full disk, or in a folder that is
    gone, the run has no row."""
    before = folder.result() or {"status": None}
    status = "preempted" if isinstance(error, PeerGone) else "failed"
    place, place_before = (_PLACE_OF_HANG.match(text or "") for text in (str(error), before.get("error")))
    if isinstance(error, PeerHangs) and place and place_before and place[0] == place_before[0]:
        status, error = "failed", RankError(f"{error}; it has hung there before", FAILED)
    if before["status"] not in FINAL:  # a row that is there was written by this start
        with contextlib.suppress(UserError):
            folder.write_result(Row.of(run, status=status, error=first_line(error)).as_dict())
    return error


def _for_a_person(error: Exception, run: RunConfig, world: World) -> UserError | None:
    """A UserError with advice if `error` is not a defect of the code, else None."""
    if not isinstance(error, UserError) and is_memory_error(error):
        return too_little_memory(None, run, run.batch.micro_batch or run.batch.sequences // world.size, error)
    if is_compile_error(error):
        return UserError(f"compute.compile=true cannot compile this model: {first_line(error)}; set it to false")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return UserError("no thread can be started here; raise the limit of memory (ulimit -v) or of processes (-u)")
    return None
