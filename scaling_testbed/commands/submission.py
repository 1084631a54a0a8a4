"""Send the runs of a sweep to Slurm: what is shown and checked before, and the array jobs."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed.commands.sweep import (
    Asked,
    due_runs,
    launcher_config,
    planned,
    say_if_none_failed,
    say_not_compared,
    states_of,
)
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps import slurm
from scaling_testbed.sweeps.plan import PlannedRun, alone_in, remember, sweep_folder
from scaling_testbed.sweeps.sizes import Size, check_limit, short_limits, sizes
from scaling_testbed.sweeps.speed import Speed, of_finished, priced, stated
from scaling_testbed.sweeps.status import RunState, check_none_changed, counts, rows, set_aside
from scaling_testbed.sweeps.view import sizes_table, submission_line, too_large
from scaling_testbed.tables import console


def submit_runs(
    chosen: Asked, launcher: str, dry_run: bool, flops_per_second: float | None, failed_too: bool = False
) -> None:
    """Send the unfinished runs of a selection, if all of them fit; with `dry_run` only show what would be sent.

    failed_too: whether failed and changed runs are sent too. Raises ConfigError, before anything is sent, for a run
    that cannot fit, and UserError if Slurm does not answer or refuses a job.
    """
    config = launcher_config(launcher, chosen)
    runs = planned(chosen, config)
    states = states_of(runs, must_know=True)
    due = due_runs(states, failed_too)
    if failed_too:
        say_if_none_failed(states)
    say_not_compared(states)
    print(f"{len(runs)} runs: {counts(states)}; {len(due)} to submit")
    if not failed_too:
        check_none_changed(states)
    for one in due:
        slurm.task_line(one, config)  # raises before any submission if a line cannot be written
    if not due:
        return
    folder = sweep_folder(runs)
    speed = speed_of(due, bool(config.gpus), flops_per_second)
    partition = slurm.partition(config.partition) if slurm.has_slurm() else None
    check_limit(config, partition)
    if lines := too_large(due) if config.gpus else []:
        print(*lines, sep="\n", file=sys.stderr)
        if not dry_run:
            raise ConfigError(
                "nothing was submitted: runs do not fit the memory of a GPU (above); type the overrides that make them "
                "fit, or the size of your GPUs, compute.gpu_memory_gib="
            )
    largest = _largest_array(dry_run)
    due = priced(due, speed) if speed else due
    jobs = jobs_of(due, config, partition)
    _show(jobs, largest, speed)
    if dry_run:
        _show_scripts(jobs, largest, folder)
        return
    remember(runs, chosen.sweep)
    with alone_in(folder):
        states = states_of(runs, must_know=True)
        again = {run.run_id for run in due_runs(states, failed_too)}
        due = [run for run in due if run.run_id in again]
        for state in states:
            if state.state == "changed" and state.run.run_id in again:
                print(f"{state.run.label}: the old run is in {set_aside(state.run)}")
        if not due:
            print("another process has submitted these runs in the meantime")
            return
        _send(jobs_of(with_a_parent(due, states), config, partition), states, largest)


def speed_of(runs: Sequence[PlannedRun], on_gpu: bool, flops_per_second: float | None) -> Speed | None:
    """The speed that is typed, else that of finished runs; None where neither is there."""
    if flops_per_second is not None:
        return stated(flops_per_second, on_gpu)
    return of_finished(runs, rows(sweep_folder(runs)), on_gpu)


def jobs_of(runs: Sequence[PlannedRun], config: slurm.SlurmConfig, partition: slurm.Partition | None) -> list[Size]:
    """The array jobs, each of runs with equal needs and none of which begins in the state of another. A job comes after
    those in whose runs its own begin. One that is larger than an array may be becomes several."""
    return [size for group in slurm.generations(runs) for size in sizes(group, config, partition)]


def with_a_parent(due: list[PlannedRun], states: Sequence[RunState]) -> list[PlannedRun]:
    """The runs that can begin: the run in whose state each begins has finished, is at work or is submitted too. The
    others are counted on stderr."""
    there = {state.run.run_id for state in states if state.state in ("finished", "queued", "running")}
    planned_ids, kept = {state.run.run_id for state in states}, list(due)
    while True:
        ids = there | {run.run_id for run in kept}
        lost = [run for run in kept if run.after in planned_ids and run.after not in ids]
        if not lost:
            break
        kept = [run for run in kept if run not in lost]
    if len(kept) < len(due):
        print(
            f"{len(due) - len(kept)} runs are not submitted, because the runs in whose state they begin have not "
            "finished; see `sweep status`",
            file=sys.stderr,
        )
    return kept


def _largest_array(dry_run: bool) -> int:
    """The cluster's MaxArraySize. A dry run needs no cluster, and then takes Slurm's default."""
    if not dry_run:
        return slurm.max_array_size()
    with contextlib.suppress(UserError):
        return slurm.max_array_size()
    return slurm.DEFAULT_MAX_ARRAY_SIZE


def _show(jobs: Sequence[Size], largest: int, speed: Speed | None) -> None:
    """Print what is about to be sent: a line for each size where there are several, the sums, and what short time
    limits mean."""
    if len(jobs) > 1:
        console().print(sizes_table(jobs, speed))
    n_jobs = sum(-(-len(job.runs) // (largest - 1)) for job in jobs)
    print(submission_line(jobs, n_jobs, speed))
    for line in short_limits(jobs):
        print(f"note: {line}")


def _show_scripts(jobs: Sequence[Size], largest: int, folder: Path) -> None:
    """Print the script of the first array job, and of each further one the options in which it differs."""
    scripts = [slurm.job_script(folder / "slurm" / "NNN", job.runs[: largest - 1], job.config) for job in jobs]
    print(scripts[0], end="")
    ids = {run.run_id: number for number, job in enumerate(jobs, 1) for run in job.runs}
    for number, (job, script) in enumerate(zip(jobs[1:], scripts[1:], strict=True), 2):
        before = sorted({ids[run.after] for run in job.runs if run.after in ids})
        waits = f", after job {', '.join(map(str, before))}" if before else ""
        print(f"# array job {number} of {len(jobs)}{waits}: the same script with")
        for line in script.splitlines():
            if line.startswith("#SBATCH") and line not in scripts[0].splitlines():
                print(line)


def _send(jobs: Sequence[Size], states: Sequence[RunState], largest: int) -> None:
    """Hand each job to sbatch, after the jobs of the runs in whose state its own runs begin."""
    job_of = {state.run.run_id: state.job for state in states if state.state in ("queued", "running")}
    for job in jobs:
        after = sorted({before for run in job.runs if (before := job_of.get(run.after or ""))})
        for submission in slurm.write_submissions(job.runs, job.config, largest, after):
            done = slurm.submit(submission)
            job_of |= {run.run_id: done.job_id for run in done.runs}
            waits = f", after job {', '.join(after)}" if after else ""
            print(f"job {done.job_id}: {len(done.runs)} tasks{waits}, script and output in {done.folder}/")
