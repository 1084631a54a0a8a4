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
from scaling_testbed.commands.options import Json, OutTable, Quiet, Verbose
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.row_files import ENDINGS

if TYPE_CHECKING:
    from scaling_testbed.sweeps.grid import Sweep
    from scaling_testbed.sweeps.plan import PlannedRun
    from scaling_testbed.sweeps.slurm import SlurmConfig
    from scaling_testbed.sweeps.speed import Speed
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

    launcher.nodes= and launcher.gpus_per_node= set the GPUs of a run, for the estimate of memory on each GPU. Without a
    rate and finished runs, a plan for the CPU of this machine takes a probe of one second; not with --json."""
    from rich.text import Text

    from scaling_testbed.sweeps.cpu_precision import bf16_remark
    from scaling_testbed.sweeps.gpu_memory import memory_of_gpu
    from scaling_testbed.sweeps.plan import sweep_folder
    from scaling_testbed.sweeps.speed import is_for_cpu, priced
    from scaling_testbed.sweeps.trunks import saving, without_checkpoint
    from scaling_testbed.sweeps.unusual import unusual_lines
    from scaling_testbed.sweeps.view import detectable_effects, plan_summary, plan_table, too_large
    from scaling_testbed.tables import console

    output.check(out, ENDINGS)
    rate = _positive("--flops-per-second", flops_per_second)
    chosen = asked(words)
    config = launcher_config(launcher, chosen)
    on_cluster = bool(chosen.launcher) or launcher != "slurm"
    runs = planned(chosen, config, None if on_cluster else memory_of_gpu())
    on_gpu = bool(config.gpus) and (on_cluster or not is_for_cpu(runs, stated=rate is not None))
    speed = _speed(runs, rate, on_gpu, on_cluster, probes=not as_json)
    runs = priced(runs, speed) if speed else runs
    records = [one.record() for one in runs]
    written = output.write(out, records)
    if as_json:
        output.print_json(records)
        return
    if chosen.sweep.description:
        print(chosen.sweep.description)
    hours = speed.unit if speed else "GPU-hours"
    if all_runs:
        console().print(plan_table(runs, list(chosen.sweep.rules), hours))
    else:
        console().print(plan_summary(runs, bool(config.gpus), hours, _limits(runs, config)))
    for key, rule in chosen.sweep.rules.items():
        print(f"{key} = {rule}")
    if chosen.sweep.draw:
        print(f"drawn: {chosen.sweep.draw}")
    least, most = (pick(one.processes for one in runs) for pick in (min, max))
    print(
        f"{hours} {speed.words}" if speed else "GPU-hours: give --flops-per-second, e.g. 4e14",
        f"memory on {'one GPU' if most == 1 else f'each of {most} GPUs' if most == least else 'each GPU'}",
        f"records under {sweep_folder(runs)}/",
        sep="; ",
    )
    if chosen.sweep.shared_trunk and (saved := saving(runs)):
        print(saved)
    for line in too_large(runs) if config.gpus else []:
        console().print(Text(line, style="red"), soft_wrap=True)
    for line in bf16_remark(runs) if not chosen.launcher else []:
        print(line)
    for line in [*without_checkpoint(runs), *unusual_lines([(one.label, one.unusual) for one in runs])]:
        print(f"warning: {line}")
    for line in detectable_effects(chosen.sweep, runs):
        print(line)
    output.say_written(written)


def _speed(
    runs: "Sequence[PlannedRun]", rate: float | None, on_gpu: bool, on_cluster: bool, probes: bool
) -> "Speed | None":
    """The speed for a plan: by the `rate` in FLOP/s, by finished runs, or by a probe, if it `probes` and its runs are
    for the CPU of this machine. None: it is not known."""
    from scaling_testbed.processes.interpreter import importing_torch
    from scaling_testbed.sweeps.plan import sweep_folder
    from scaling_testbed.sweeps.speed import measured, of_finished, stated
    from scaling_testbed.sweeps.status import rows

    if rate is not None:
        return stated(rate, on_gpu)
    finished = rows(sweep_folder(runs))
    if found := of_finished(runs, finished, on_gpu):
        return found
    if on_cluster:
        return None
    if on_gpu:  # what was trained elsewhere tells more than nothing
        return measured(finished, False, "of this sweep")
    if not probes:
        return None
    try:
        with importing_torch():
            from scaling_testbed.sweeps.probe import probed

        return probed(runs)
    except (UserError, RuntimeError, MemoryError, OSError, ImportError):  # a plan can be made without it
        return None


def _limits(runs: "Sequence[PlannedRun]", config: "SlurmConfig") -> dict[str, str | None]:
    """The time limit of each run by its id; none where an automatic one needs a speed that is not known."""
    from scaling_testbed.sweeps.sizes import sizes

    if config.has_auto_time and any(one.hours is None for one in runs):
        return {}
    return {one.run_id: size.config.time for size in sizes(runs, config) for one in size.runs}


def run(
    words: Words = (),
    workers: Workers = None,
    gpus: Gpus = None,
    runs_per_gpu: RunsPerGpu = None,
    fresh: Fresh = False,
    stop_hopeless: StopHopeless = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    dry_run: DryRun = False,
) -> int:
    """Run the sweep on this machine.

    Skips finished runs and resumes killed ones. A failed run does not stop the others. A run that --stop-hopeless stops
    saves a checkpoint; the same command without the option continues it. Exit status: 0 if all is done, 1
    if a run failed, 75 if a signal stopped it, 2 for a wrong command."""
    with _verbosity(quiet, verbose):
        return _run(asked(words, False), workers, gpus, runs_per_gpu, fresh, stop_hopeless, dry_run)


def submit(
    words: LauncherWords = (),
    flops_per_second: FlopsPerSecond = None,
    launcher: Launcher = "slurm",
    dry_run: ShowScript = False,
) -> None:
    """Submit the sweep as Slurm job arrays, one for each number of GPUs and time limit.

    Runs that are queued, running or finished are not submitted. If the estimate of memory of a run does not fit a GPU,
    or a time limit the partition, nothing is submitted (exit status 2)."""
    from scaling_testbed.commands.submission import submit_runs

    rate = _positive("--flops-per-second", flops_per_second)
    submit_runs(asked(words), launcher, dry_run, rate)


def retry(
    words: LauncherWords = (),
    workers: Workers = None,
    gpus: Gpus = None,
    runs_per_gpu: RunsPerGpu = None,
    fresh: Fresh = False,
    stop_hopeless: StopHopeless = None,
    launcher: RetryLauncher = None,
    flops_per_second: FlopsPerSecond = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    dry_run: DryRun = False,
) -> int | None:
    """Like run, also for failed runs; with --launcher slurm or launcher.KEY=, like submit."""
    from scaling_testbed.commands.submission import submit_runs

    chosen = asked(words)
    if launcher is None and not chosen.launcher:
        if flops_per_second is not None:
            raise ConfigError("--flops-per-second is for a launcher; add --launcher slurm, or leave it out")
        with _verbosity(quiet, verbose):
            return _run(chosen, workers, gpus, runs_per_gpu, fresh, stop_hopeless, dry_run, failed_too=True)
    local: dict[str, object] = {"--workers": workers, "--gpus": gpus, "--runs-per-gpu": runs_per_gpu}
    local |= {"--quiet": quiet or None, "--verbose": verbose or None}
    local |= {"--fresh": fresh or None, "--stop-hopeless": stop_hopeless}  # the tasks of an array have no driver
    for option, value in local.items():
        if value is not None:
            raise ConfigError(f"{option} applies to this machine only; leave out either it or the launcher")
    rate = _positive("--flops-per-second", flops_per_second)
    submit_runs(chosen, launcher or "slurm", dry_run, rate, failed_too=True)
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
    runs = planned(chosen, shown_only=True)
    if not chosen.narrowed:  # include all runs that were ever started in the folder
        runs = told_apart([*runs, *remembered(sweep_folder(runs))])
    states = with_predictions(states_of(runs))
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
    say_not_compared(states)
    print(f"{counts(states)}; records under {sweep_folder(runs)}/")
    output.say_written(written)


def collect(words: Words = ()) -> None:
    """Collect all rows, or those of the selected runs, in results.jsonl and results.parquet of the sweep's folder."""
    from scaling_testbed.sweeps.plan import remembered, sweep_folder, told_apart
    from scaling_testbed.sweeps.status import collect, grouped, read_states

    chosen = asked(words, False)
    runs = planned(chosen, shown_only=True)
    ids = {run.run_id for run in runs}
    folder = sweep_folder(runs)
    lines, table, found = collect(folder, ids if chosen.narrowed else None)
    known = [one for one in told_apart([*runs, *remembered(folder)]) if one.run_id in found]
    states = read_states(known)
    for line in grouped("changed", ((state.run, state.error) for state in states if state.state == "changed")):
        print(f"warning: {line}; its row is of the data then", file=sys.stderr)
    say_not_compared(states)
    if unknown := len(found) - len(known):
        print(
            f"warning: {unknown} rows are in no plan of this folder, so their data were not compared", file=sys.stderr
        )
    others = len([run_id for run_id in found if run_id not in ids])
    planned_runs = sum(not run.is_part for run in runs)
    print(f"{len(found) - others} of {planned_runs} planned runs, {others} others, in {lines} and {table}")


def planned(
    chosen: Asked,
    launcher: "SlurmConfig | None" = None,
    gpu_memory_gib: float | None = None,
    runs_per_gpu: int | None = None,
    shown_only: bool = False,
) -> "list[PlannedRun]":
    """The planned runs of a selection; prints the number of duplicate runs on stderr.

    launcher: whose GPUs the runs have; None: one process each. gpu_memory_gib, runs_per_gpu: as in sweeps.plan.plan.
    shown_only: whether the runs are not to be started, so that they need not go with a number of processes."""
    from scaling_testbed.sweeps.gpu_memory import ASSUMED_GIB
    from scaling_testbed.sweeps.plan import plan

    processes = None if shown_only else launcher.processes if launcher else 1
    nodes = launcher.nodes if launcher else 1
    fewest = launcher is not None and launcher.has_auto_gpus
    runs, same = plan(chosen.sweep, processes, gpu_memory_gib or ASSUMED_GIB, runs_per_gpu or 1, nodes, fewest)
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
    from scaling_testbed.progress import DETAIL, say
    from scaling_testbed.sweeps.gpu_memory import memory_of_gpu
    from scaling_testbed.sweeps.local import Driver
    from scaling_testbed.sweeps.plan import remember, sweep_folder
    from scaling_testbed.sweeps.status import counts, read_states
    from scaling_testbed.sweeps.view import loss_table, too_large
    from scaling_testbed.tables import console

    places, margin = _places(workers, gpus, runs_per_gpu), _margin(stop_hopeless)
    gib = memory_of_gpu() if gpus else None
    if gib is not None:
        say(f"the smallest GPU here has {gib:.1f} GiB", level=DETAIL)
    runs = planned(chosen, None, gib, runs_per_gpu)
    for line in too_large(runs) if gpus else []:
        print(line, file=sys.stderr)
    if failed_too:
        say_if_none_failed(read_states(runs))
    if dry_run:
        states = states_of(runs)
        print(f"{len(runs)} runs: {counts(states)}; {len(due_runs(states, failed_too, margin))} to start")
        return 0
    remember(runs, chosen.sweep)
    driver = Driver(runs, places, retry=failed_too, warm=not fresh, stop_hopeless=margin)
    found = driver.drive()
    states = list(driver.states.values())
    say_not_compared(states)
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


def say_if_none_failed(states: "Sequence[RunState]") -> None:
    if not any(state.state in ("failed", "changed") for state in states):
        unfinished = "; unfinished runs are started, as with `sweep run`" if due_runs(states, True) else ""
        print(f"no run has failed, so there is nothing to retry{unfinished}")


def due_runs(states: "Sequence[RunState]", failed_too: bool, margin: float | None = None) -> "list[PlannedRun]":
    """The runs to start: pending and stopped ones, hopeless ones unless this `margin` leaves them stopped, and if
    `failed_too` also those that failed or have changed."""
    others = ("failed", "changed") if failed_too else ()
    return [
        state.run
        for state in states
        if state.state in ("pending", "stopped", "hopeless", *others) and not state.stays_stopped(margin)
    ]


def say_not_compared(states: "Sequence[RunState]") -> None:
    from scaling_testbed.sweeps.status import grouped

    unknown = ((state.run, state.not_compared) for state in states if state.not_compared)
    for line in grouped("not compared with its data", unknown):
        print(f"warning: {line}", file=sys.stderr)


def launcher_config(name: str, chosen: Asked) -> "SlurmConfig":
    from scaling_testbed.config.compose import fill
    from scaling_testbed.config.search import choices
    from scaling_testbed.sweeps.slurm import SlurmConfig

    known = choices("launcher", chosen.sweep.configs)
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        raise ConfigError(f"there is no launcher {name!r}; it is one of {', '.join(sorted(known))}, or a .yaml file")
    return fill(SlurmConfig, path, "launcher", chosen.launcher)


def states_of(runs: "Sequence[PlannedRun]", must_know: bool = False) -> "list[RunState]":
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


def _verbosity(quiet: bool, verbose: bool) -> contextlib.AbstractContextManager[None]:
    """Context in which as much is printed as -q or -v asks for. Raises ConfigError for both."""
    from scaling_testbed.progress import verbosity

    if quiet and verbose:
        raise ConfigError("give -q or -v, not both")
    return verbosity("quiet" if quiet else "verbose" if verbose else None)


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
