"""The commands about grids of runs: plan, run, submit, retry, status, collect.

Words define the runs: sweep=NAME, scale=NAME, overrides, launcher.KEY=VALUE. Options define what the command does.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import Json, OutTable
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.row_files import ENDINGS

if TYPE_CHECKING:
    from scaling_testbed.sweeps.grid import Sweep
    from scaling_testbed.sweeps.plan import PlannedRun
    from scaling_testbed.sweeps.slurm import SlurmConfig
    from scaling_testbed.sweeps.status import RunState

Given = TypeVar("Given", int, float)
PLACES = ("name", "runs_dir", "data_dir")
Words = Annotated[
    Sequence[str],
    typer.Argument(
        metavar="sweep=NAME KEY=VALUE",
        help="sweep=: a name from configs/sweep/, or the path of a .yaml file; scale=: one of the file's scales, if it "
        "has any (default: the first); any other key=value applies to every run; key=a,b replaces an axis or adds "
        "one; rules.KEY=EXPRESSION computes a value for each run; draw.samples=N and draw.axes.KEY={KIND: [...]} draw "
        "values",
    ),
]
LauncherWords = Annotated[
    Sequence[str],
    typer.Argument(
        metavar="sweep=NAME KEY=VALUE",
        help="sweep=: a name from configs/sweep/, or the path of a .yaml file; scale=: one of the file's scales, if it "
        "has any (default: the first); launcher.KEY=VALUE: a setting of the Slurm job; any other key=value applies to "
        "every run; key=a,b replaces an axis or adds one; rules.KEY=EXPRESSION computes a value for each run; "
        "draw.samples=N and draw.axes.KEY={KIND: [...]} draw values",
    ),
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="number of runs at a time (default: 1)")]
Gpus = Annotated[str | None, typer.Option("--gpus", metavar="0,1", help="run on these GPUs, one run on each")]
RunsPerGpu = Annotated[
    int | None, typer.Option("--runs-per-gpu", metavar="N", help="number of runs that share a GPU (default: 1)")
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="start a new Python interpreter for each run (default: on Linux without a GPU, runs are forks of one "
        "process that has imported PyTorch, which saves 3 s for each; with --gpus, one process runs several in turn)",
    ),
]
FlopsPerSecond = Annotated[
    float | None,
    typer.Option(
        "--flops-per-second", metavar="X",
        help="the rate for estimates of GPU-hours, e.g. 4e14 (default: the median rate of the sweep's finished runs)",
    ),
]  # fmt: skip
AllRuns = Annotated[bool, typer.Option("--all", help="show each run (default: one line for each model)")]
Launcher = Annotated[
    str,
    typer.Option(
        "--launcher", metavar="NAME", show_default=True, help="a name from configs/launcher/, or the path of a copy"
    ),
]
RetryLauncher = Annotated[
    str | None, typer.Option("--launcher", metavar="NAME", help="submit to Slurm, and do not run on this machine")
]
StopHopeless = Annotated[
    float | None,
    typer.Option(
        "--stop-hopeless", metavar="MARGIN",
        help="stop each run whose predicted final loss, at the low end of its 95 % interval, is more than MARGIN nats "
        "above the lowest of the finished runs with the same size, tokens and data (default: stop none)",
    ),
]  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="only count the runs that would start")]
ShowScript = Annotated[bool, typer.Option("--dry-run", help="only show the job script")]


@dataclass(frozen=True)
class Asked:
    """The runs that the words of a command select. typed: the overrides. launcher: the words launcher.KEY=VALUE."""

    sweep: "Sweep"
    typed: list[str]
    launcher: list[str]

    @property
    def narrowed(self) -> bool:
        """Whether an override selects runs, and does not only name their folder."""
        from scaling_testbed.config.words import key_of

        return any(key_of(text) not in PLACES for text in self.typed)


def asked(words: Sequence[str], verb_with_launcher: bool = True) -> Asked:
    """Sort the words of a command.

    Raises ConfigError if a word is not key=value, if there is no sweep=, or if there is a launcher.KEY and
    `verb_with_launcher` is false.
    """
    from scaling_testbed.config.compose import outside_of
    from scaling_testbed.sweeps.grid import load_sweep, narrowed

    plugins, configs, others = outside_of(words)
    named: dict[str, str] = {}
    typed, launcher = [], []
    for text in others:
        key, equals, value = text.partition("=")
        if not equals and not key.startswith("~"):
            raise ConfigError(f"cannot read {text!r}; write key=value")
        if key in ("sweep", "scale"):
            if named.setdefault(key, value) != value:
                raise ConfigError(f"give {key}= once; got {key}={named[key]} and {text}")
        elif key.lstrip("+~").startswith("launcher."):
            launcher.append(text)
        else:
            typed.append(text)
    if not named.get("sweep"):
        raise ConfigError("give sweep=NAME, a file in configs/sweep/ or the path of one")
    if launcher and not verb_with_launcher:
        raise ConfigError(f"this command does not take {launcher[0]}; plan, submit and retry do")
    sweep = load_sweep(named["sweep"], named.get("scale"), plugins=plugins, configs=configs)
    return Asked(narrowed(sweep, typed), typed, launcher)


def plan(
    words: LauncherWords = (),
    flops_per_second: FlopsPerSecond = None,
    launcher: Launcher = "slurm",
    all_runs: AllRuns = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """Show the runs of each model and their cost, without starting any.

    launcher.nodes= and launcher.gpus_per_node= set the GPUs of a run, for the estimate of memory on each GPU."""
    from rich.text import Text

    from scaling_testbed.sweeps.cpu_precision import bf16_remark
    from scaling_testbed.sweeps.plan import measured_rate, priced, sweep_folder
    from scaling_testbed.sweeps.status import rows
    from scaling_testbed.sweeps.trunks import saving, without_checkpoint
    from scaling_testbed.sweeps.unusual import unusual_lines
    from scaling_testbed.sweeps.view import detectable_effects, plan_summary, plan_table, too_large
    from scaling_testbed.tables import console

    output.check(out, ENDINGS)
    rate, source = _positive("--flops-per-second", flops_per_second), "stated"
    chosen = asked(words)
    config = _launcher(launcher, chosen)
    processes = config.processes
    runs = planned(chosen, processes)
    if rate is None:
        rate, source = measured_rate(rows(sweep_folder(runs))), "the median of this sweep's finished runs"
    runs = priced(runs, rate) if rate else runs
    records = [one.record() for one in runs]
    written = output.write(out, records)
    if as_json:
        output.print_json(records)
        return
    if chosen.sweep.description:
        print(chosen.sweep.description)
    summary = plan_summary(runs, processes if config.gpus_per_node else 0, config.time)
    console().print(plan_table(runs, list(chosen.sweep.rules)) if all_runs else summary)
    for key, rule in chosen.sweep.rules.items():
        print(f"{key} = {rule}")
    if chosen.sweep.draw:
        print(f"drawn: {chosen.sweep.draw}")
    print(
        f"GPU-hours at {rate:.3g} FLOP/s ({source})" if rate else "GPU-hours: give --flops-per-second, e.g. 4e14",
        f"memory on {'one GPU' if processes == 1 else f'each of {processes} GPUs'}",
        f"records under {sweep_folder(runs)}/",
        sep="; ",
    )
    if chosen.sweep.shared_trunk and (saved := saving(runs)):
        print(saved)
    for line in too_large(runs) if config.gpus_per_node else []:
        console().print(Text(line, style="red"), soft_wrap=True)
    for line in bf16_remark(runs) if not chosen.launcher else []:
        print(line)
    for line in [*without_checkpoint(runs), *unusual_lines([(one.label, one.unusual) for one in runs])]:
        print(f"warning: {line}")
    for line in detectable_effects(chosen.sweep, runs):
        print(line)
    output.say_written(written)


def run(
    words: Words = (),
    workers: Workers = None,
    gpus: Gpus = None,
    runs_per_gpu: RunsPerGpu = None,
    fresh: Fresh = False,
    stop_hopeless: StopHopeless = None,
    dry_run: DryRun = False,
) -> int:
    """Run the sweep on this machine.

    Skips finished runs and resumes killed ones. A failed run does not stop the others. A run that --stop-hopeless stops
    saves a checkpoint; the same command without the option continues it. Exit status: 0 if all is done, 1
    if a run failed, 75 if a signal stopped it, 2 for a wrong command."""
    return _run(asked(words, False), workers, gpus, runs_per_gpu, fresh, stop_hopeless, dry_run)


def submit(words: LauncherWords = (), launcher: Launcher = "slurm", dry_run: ShowScript = False) -> None:
    """Submit the sweep as Slurm job arrays.

    Runs that are queued, running or finished are not submitted. If the estimate of memory of a run does not fit a GPU,
    nothing is submitted."""
    _submit(asked(words), launcher, dry_run)


def retry(
    words: LauncherWords = (),
    workers: Workers = None,
    gpus: Gpus = None,
    runs_per_gpu: RunsPerGpu = None,
    fresh: Fresh = False,
    stop_hopeless: StopHopeless = None,
    launcher: RetryLauncher = None,
    dry_run: DryRun = False,
) -> int | None:
    """Like run, also for failed runs; with --launcher slurm or launcher.KEY=, like submit."""
    chosen = asked(words)
    if launcher is None and not chosen.launcher:
        return _run(chosen, workers, gpus, runs_per_gpu, fresh, stop_hopeless, dry_run, failed_too=True)
    local: dict[str, object] = {"--workers": workers, "--gpus": gpus, "--runs-per-gpu": runs_per_gpu}
    local |= {"--fresh": fresh or None, "--stop-hopeless": stop_hopeless}  # the tasks of an array have no driver
    for option, value in local.items():
        if value is not None:
            raise ConfigError(f"{option} applies to this machine only; leave out either it or the launcher")
    _submit(chosen, launcher or "slurm", dry_run, failed_too=True)
    return None


def status(words: Words = (), as_json: Json = False, out: OutTable = ()) -> None:
    """Show the state of each run.

    A run that has begun has a predicted final loss with a 95 % interval, if five finished runs of its schedule have
    evaluations in mid-run."""
    from scaling_testbed.analysis.rows.study import about_hopeless
    from scaling_testbed.sweeps.plan import remembered, sweep_folder, told_apart
    from scaling_testbed.sweeps.predicted import with_predictions, withheld
    from scaling_testbed.sweeps.status import counts, grouped
    from scaling_testbed.sweeps.view import status_table
    from scaling_testbed.tables import console

    output.check(out, ENDINGS)
    chosen = asked(words, False)
    runs = planned(chosen, None)
    if not chosen.narrowed:  # include all runs that were ever started in the folder
        runs = told_apart([*runs, *remembered(sweep_folder(runs))])
    states = with_predictions(_states(runs))
    records = [state.record() for state in states]
    written = output.write(out, records)
    if as_json:
        output.print_json(records)
        return
    console().print(status_table(states))
    for line in withheld(states):
        print(line)
    for line in grouped("changed", ((state.run, state.error) for state in states if state.state == "changed")):
        print(line)
    for line in about_hopeless({"status": state.state} for state in states):
        print(f"{line}; `sweep run` without --stop-hopeless continues")
    _say_not_compared(states)
    print(f"{counts(states)}; records under {sweep_folder(runs)}/")
    output.say_written(written)


def collect(words: Words = ()) -> None:
    """Collect all rows, or those of the selected runs, in results.jsonl and results.parquet of the sweep's folder."""
    from scaling_testbed.sweeps.plan import remembered, sweep_folder, told_apart
    from scaling_testbed.sweeps.status import collect, grouped, read_states

    chosen = asked(words, False)
    runs = planned(chosen, None)
    ids = {run.run_id for run in runs}
    folder = sweep_folder(runs)
    lines, table, found = collect(folder, ids if chosen.narrowed else None)
    known = [one for one in told_apart([*runs, *remembered(folder)]) if one.run_id in found]
    states = read_states(known)
    for line in grouped("changed", ((state.run, state.error) for state in states if state.state == "changed")):
        print(f"warning: {line}; its row is of the data then", file=sys.stderr)
    _say_not_compared(states)
    if unknown := len(found) - len(known):
        print(
            f"warning: {unknown} rows are in no plan of this folder, so their data were not compared", file=sys.stderr
        )
    others = len([run_id for run_id in found if run_id not in ids])
    planned_runs = sum(not run.is_part for run in runs)
    print(f"{len(found) - others} of {planned_runs} planned runs, {others} others, in {lines} and {table}")


def planned(
    chosen: Asked, processes: int | None = 1, gpu_memory_gib: float | None = None, runs_per_gpu: int | None = None
) -> "list[PlannedRun]":
    """The planned runs of a selection; prints the number of duplicate runs on stderr. processes, gpu_memory_gib,
    runs_per_gpu: as in sweeps.plan.plan."""
    from scaling_testbed.sweeps.gpu_memory import ASSUMED_GIB
    from scaling_testbed.sweeps.plan import plan

    runs, same = plan(chosen.sweep, processes, gpu_memory_gib or ASSUMED_GIB, runs_per_gpu or 1)
    if same:
        print(f"{same} combinations are the same run as an earlier one and count once", file=sys.stderr)
    return runs


def _run(
    chosen: Asked,
    workers: int | None,
    gpus: str | None,
    runs_per_gpu: int | None,
    fresh: bool,
    stop_hopeless: float | None,
    dry_run: bool,
    failed_too: bool = False,
) -> int:
    from scaling_testbed.sweeps.gpu_memory import memory_of_gpu
    from scaling_testbed.sweeps.local import Driver
    from scaling_testbed.sweeps.plan import remember, sweep_folder
    from scaling_testbed.sweeps.status import counts, read_states
    from scaling_testbed.sweeps.view import loss_table, too_large
    from scaling_testbed.tables import console

    places, margin = _places(workers, gpus, runs_per_gpu), _margin(stop_hopeless)
    runs = planned(chosen, 1, memory_of_gpu() if gpus else None, runs_per_gpu)
    for line in too_large(runs) if gpus else []:
        print(line, file=sys.stderr)
    if failed_too:
        _say_if_none_failed(read_states(runs))
    if dry_run:
        states = _states(runs)
        print(f"{len(runs)} runs: {counts(states)}; {len(_due(states, failed_too, margin))} to start")
        return 0
    remember(runs, chosen.sweep)
    driver = Driver(runs, places, retry=failed_too, warm=not fresh, stop_hopeless=margin)
    found = driver.drive()
    states = list(driver.states.values())
    _say_not_compared(states)
    console().print(loss_table(states))
    print(f"{counts(states)}; validation loss in nats per token; records under {sweep_folder(runs)}/")
    return found


def _places(workers: int | None, gpus: str | None, runs_per_gpu: int | None) -> list[dict[str, str]]:
    """The environment of each of the simultaneous runs. Raises ConfigError if options contradict each other."""
    from scaling_testbed.sweeps.local import slots

    names = [gpu for gpu in (gpus or "").split(",") if gpu]
    if gpus is not None and not names:
        raise ConfigError("--gpus names no GPU; write --gpus 0,1,... or leave it out")
    if workers is not None and names:
        raise ConfigError("give --workers or --gpus, not both; --runs-per-gpu sets how many runs share a GPU")
    if runs_per_gpu is not None and not names:
        raise ConfigError("--runs-per-gpu needs --gpus 0,1,...")
    return slots(_positive("--workers", workers), names, _positive("--runs-per-gpu", runs_per_gpu) or 1)


def _submit(chosen: Asked, launcher: str, dry_run: bool, failed_too: bool = False) -> None:
    from scaling_testbed.sweeps import slurm
    from scaling_testbed.sweeps.plan import alone_in, measured_rate, priced, remember, sweep_folder
    from scaling_testbed.sweeps.status import check_none_changed, counts, rows, set_aside
    from scaling_testbed.sweeps.view import submission_line, too_large

    config = _launcher(launcher, chosen)
    runs = planned(chosen, config.processes)
    states = _states(runs, must_know=True)
    due = _due(states, failed_too)
    if failed_too:
        _say_if_none_failed(states)
    _say_not_compared(states)
    print(f"{len(runs)} runs: {counts(states)}; {len(due)} to submit")
    if not failed_too:
        check_none_changed(states)
    for one in due:
        slurm.task_line(one, config)  # raises before any submission if a line cannot be written
    if not due:
        return
    n_gpus, rate = (config.processes if config.gpus_per_node else 0), measured_rate(rows(sweep_folder(runs)))
    print(submission_line(priced(due, rate) if rate else due, n_gpus, config.partition, config.time))
    if lines := too_large(due) if config.gpus_per_node else []:
        print(*lines, sep="\n", file=sys.stderr)
        if not dry_run:
            raise ConfigError(
                "nothing was submitted: runs do not fit the memory of a GPU (above); type the overrides that make them "
                "fit, or the size of your GPUs, compute.gpu_memory_gib="
            )
    if dry_run:
        largest = slurm.DEFAULT_MAX_ARRAY_SIZE
        with contextlib.suppress(UserError):  # the script can be shown without a cluster
            largest = slurm.max_array_size()
        first, *later = slurm.generations(due)
        print(slurm.job_script(sweep_folder(runs) / "slurm" / "NNN", first[: largest - 1], config), end="")
        if later:
            counted = ", ".join(str(len(group)) for group in later)
            print(f"then {counted} tasks, each group in an array job after the one before", file=sys.stderr)
        return
    largest = slurm.max_array_size()
    remember(runs, chosen.sweep)
    with alone_in(sweep_folder(runs)):
        states = _states(runs, must_know=True)
        due = _due(states, failed_too)
        for state in states:
            if state.state == "changed" and state.run in due:
                print(f"{state.run.label}: the old run is in {set_aside(state.run)}")
        if not due:
            print("another process has submitted these runs in the meantime")
            return
        due = with_a_parent(due, states)
        jobs = {state.run.run_id: state.job for state in states if state.state in ("queued", "running")}
        for group in slurm.generations(due):
            after = sorted({job for run in group if (job := jobs.get(run.after or ""))})
            for submission in slurm.write_submissions(group, config, largest, after):
                done = slurm.submit(submission)
                jobs |= {run.run_id: done.job_id for run in done.runs}
                waits = f", after job {', '.join(after)}" if after else ""
                print(f"job {done.job_id}: {len(done.runs)} tasks{waits}, script and output in {done.folder}/")


def with_a_parent(due: "list[PlannedRun]", states: "Sequence[RunState]") -> "list[PlannedRun]":
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


def _say_if_none_failed(states: "Sequence[RunState]") -> None:
    if not any(state.state in ("failed", "changed") for state in states):
        unfinished = "; unfinished runs are started, as with `sweep run`" if _due(states, True) else ""
        print(f"no run has failed, so there is nothing to retry{unfinished}")


def _due(states: "Sequence[RunState]", failed_too: bool, margin: float | None = None) -> "list[PlannedRun]":
    """The runs to start: pending and stopped ones, hopeless ones unless this `margin` leaves them stopped, and if
    `failed_too` also those that failed or have changed."""
    others = ("failed", "changed") if failed_too else ()
    return [
        state.run
        for state in states
        if state.state in ("pending", "stopped", "hopeless", *others) and not state.stays_stopped(margin)
    ]


def _say_not_compared(states: "Sequence[RunState]") -> None:
    from scaling_testbed.sweeps.status import grouped

    unknown = ((state.run, state.not_compared) for state in states if state.not_compared)
    for line in grouped("not compared with its data", unknown):
        print(f"warning: {line}", file=sys.stderr)


def _launcher(name: str, chosen: Asked) -> "SlurmConfig":
    from scaling_testbed.config.compose import fill
    from scaling_testbed.config.search import choices
    from scaling_testbed.sweeps.slurm import SlurmConfig

    known = choices("launcher", chosen.sweep.configs)
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        raise ConfigError(f"there is no launcher {name!r}; it is one of {', '.join(sorted(known))}, or a .yaml file")
    return fill(SlurmConfig, path, "launcher", chosen.launcher)


def _states(runs: "Sequence[PlannedRun]", must_know: bool = False) -> "list[RunState]":
    """The states of runs, from their folders and from Slurm's queue if there is one.

    A waiting job counts as queued, whatever its folder records of an earlier start. If the queue cannot be read, this
    prints a warning; with `must_know` it raises UserError.
    """
    from scaling_testbed.sweeps import slurm
    from scaling_testbed.sweeps.plan import sweep_folder
    from scaling_testbed.sweeps.status import read_states

    queue = {}
    if slurm.has_slurm():
        try:
            queue = slurm.queued(sweep_folder(runs))
        except UserError as error:
            if must_know:
                raise
            print(f"warning: {error}; runs that wait in the queue are not shown as queued", file=sys.stderr)
    found = []
    for state in read_states(runs):
        job, _ = queue.get(str(Path(state.run.folder).resolve()), (None, None))
        waits = job and state.state in ("pending", "stopped", "hopeless", "changed", "failed")
        found.append(dataclasses.replace(state, job=job or state.job, state="queued" if waits else state.state))
    return found


def _margin(stop_hopeless: float | None) -> float | None:
    if stop_hopeless is not None and not 0 <= stop_hopeless < math.inf:
        raise ConfigError(
            f"--stop-hopeless must be a margin in nats of at least 0, such as 0.05; got {stop_hopeless:g}"
        )
    return stop_hopeless


def _positive(option: str, value: Given | None) -> Given | None:
    if value is not None and not value > 0:
        raise ConfigError(f"{option} must be a number greater than zero; got {value:g}")
    return value
