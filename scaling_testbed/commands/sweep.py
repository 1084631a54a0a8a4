"""The verbs of `python -m scaling_testbed.sweep`: what was typed, sorted, and what each verb does with it."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console

from scaling_testbed.config.compose import OUTSIDE, fill, outside_of
from scaling_testbed.config.search import choices
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps import slurm
from scaling_testbed.sweeps.grid import Sweep, load_sweep, narrowed
from scaling_testbed.sweeps.local import Driver, slots
from scaling_testbed.sweeps.plan import (
    PlannedRun,
    alone_in,
    measured_rate,
    plan,
    priced,
    remember,
    remembered,
    sweep_folder,
    told_apart,
)
from scaling_testbed.sweeps.status import RunState, collect, counts, read_state, rows
from scaling_testbed.sweeps.view import loss_table, plan_table, status_table

VERBS = ("plan", "run", "submit", "retry", "status", "collect")
OPTIONS = {
    "plan": {"flops_per_second", "launcher"},
    "run": {"workers", "gpus", "runs_per_gpu"},
    "submit": {"launcher"},
    "retry": {"workers", "gpus", "runs_per_gpu", "launcher"},
    "status": set(),
    "collect": set(),
}
FLAGS = {"--json": {"plan", "status"}, "--dry-run": {"run", "submit", "retry"}}
PLACES = ("name", "runs_dir", "data_dir")
EVERY_OPTION = set().union(*OPTIONS.values())


@dataclass
class Command:
    """What was typed, sorted."""

    verb: str
    sweep: Sweep
    typed: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    launcher: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)

    @property
    def narrowed(self) -> bool:
        """Whether what was typed says which runs are meant, and not only where they lie."""
        return any(text.partition("=")[0] not in PLACES for text in self.typed)

    def number(self, key: str, kind, default=None):
        """An option as a positive number."""
        if key not in self.options:
            return default
        try:
            value = kind(self.options[key])
        except ValueError:
            value = 0
        if not value > 0:
            raise ConfigError(f"{key} must be a number greater than zero; got {self.options[key]!r}")
        return value


def parse(argv: Sequence[str]) -> Command:
    """Sort what was typed. Raises ConfigError for an unknown verb, flag, or an option that the verb does not take."""
    verb, name, scale, command = (argv[0] if argv else ""), None, None, Command("", Sweep(name=""))
    outside: list[str] = []
    if verb not in VERBS:
        raise ConfigError(f"say one of {', '.join(VERBS)} first, got {verb!r}; --help explains them")
    command.verb = verb
    for text in argv[1:]:
        key, equals, value = text.partition("=")
        if text.startswith("-"):
            if verb not in FLAGS.get(text, set()):
                raise ConfigError(f"{verb} does not take {text}; --help lists what there is")
            command.flags.add(text)
        elif not equals:
            raise ConfigError(f"cannot read {text!r}; write key=value")
        elif key == "sweep":
            name = value
        elif key == "scale":
            scale = value
        elif key in OUTSIDE:
            outside.append(text)
        elif key.startswith("launcher."):
            command.launcher.append(text)
        elif key in EVERY_OPTION:
            if key not in OPTIONS[verb]:
                raise ConfigError(f"{verb} does not take {key}=; --help says which verb does")
            command.options[key] = value
        else:
            command.typed.append(text)
    if not name:
        raise ConfigError("give sweep=NAME, a file in configs/sweep/ or the path of one")
    if command.launcher and "launcher" not in OPTIONS[verb]:
        raise ConfigError(f"{verb} does not take {command.launcher[0]}; plan and submit do")
    plugins, configs, _ = outside_of(outside)
    command.sweep = narrowed(load_sweep(name, scale, plugins=plugins, configs=configs), command.typed)
    return command


def planned(command: Command, processes: int | None = 1) -> list[PlannedRun]:
    """The runs that were asked for, as `plan` makes them; says on stderr when some were the same."""
    runs, same = plan(command.sweep, processes)
    if same:
        print(f"{same} combinations are the same run as an earlier one and count once", file=sys.stderr)
    return runs


def known(command: Command) -> list[PlannedRun]:
    """The runs to look at: those asked for, and without any override all that were ever started in that folder."""
    runs = planned(command, None)
    return runs if command.narrowed else told_apart([*runs, *_earlier(runs)])


def _earlier(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    return remembered(sweep_folder(runs))


def do_plan(command: Command) -> int:
    processes = _launcher(command).processes
    runs, rate, source = planned(command, processes), command.number("flops_per_second", float), "stated"
    if rate is None:
        rate, source = measured_rate(rows(sweep_folder(runs))), "the median of this sweep's finished runs"
    runs = priced(runs, rate) if rate else runs
    if "--json" in command.flags:
        for run in runs:
            print(json.dumps(asdict(run)))
        return 0
    if command.sweep.description:
        print(command.sweep.description)
    _console().print(plan_table(runs))
    print(
        f"GPU-hours at {rate:.3g} FLOP/s ({source})" if rate else "GPU-hours: give flops_per_second=, say 4e14",
        f"memory on {'one GPU' if processes == 1 else f'each of {processes} GPUs'}",
        f"records under {sweep_folder(runs)}/",
        sep="; ",
    )
    return 0


def do_run(command: Command, retry: bool = False) -> int:
    gpus = [gpu for gpu in command.options.get("gpus", "").split(",") if gpu]
    if "gpus" in command.options and not gpus:
        raise ConfigError("gpus= names no GPU; write gpus=0,1,... or leave it out")
    per_gpu = command.number("runs_per_gpu", int, 1)
    if "workers" in command.options and gpus:
        raise ConfigError("give workers= or gpus=, not both; runs_per_gpu= sets how many share a GPU")
    if "runs_per_gpu" in command.options and not gpus:
        raise ConfigError("runs_per_gpu= goes with gpus=0,1,...")
    places = slots(command.number("workers", int), gpus, per_gpu)
    runs = planned(command)
    if "--dry-run" in command.flags:
        states = _states(runs)
        print(f"{len(runs)} runs: {counts(states)}; {len(_due(states, retry))} to start")
        return 0
    remember(runs, command.sweep)
    driver = Driver(runs, places, retry=retry)
    status = driver.drive()
    states = list(driver.states.values())
    _console().print(loss_table(states))
    print(f"{counts(states)}; validation loss in nats per token; records under {sweep_folder(runs)}/")
    return status


def do_submit(command: Command, retry: bool = False) -> int:
    config = _launcher(command)
    dry = "--dry-run" in command.flags
    runs = planned(command, config.processes)
    states = _states(runs, must_know=True)
    due = _due(states, retry)
    print(f"{len(runs)} runs: {counts(states)}; {len(due)} to submit")
    for run in due:
        slurm.task_line(run, config)  # what cannot be written is refused before anything is sent
    if not due:
        return 0
    if dry:
        largest = slurm.DEFAULT_MAX_ARRAY_SIZE
        with contextlib.suppress(UserError):  # a script can be seen without a cluster
            largest = slurm.max_array_size()
        print(slurm.job_script(sweep_folder(runs) / "slurm" / "NNN", due[: largest - 1], config), end="")
        return 0
    largest = slurm.max_array_size()
    remember(runs, command.sweep)
    with alone_in(sweep_folder(runs)):
        due = _due(_states(runs, must_know=True), retry)
        if not due:
            print("another submitter has sent them meanwhile")
            return 0
        for submission in slurm.write_submissions(due, config, largest):
            done = slurm.submit(submission)
            print(f"job {done.job_id}: {len(done.runs)} tasks, script and output in {done.folder}/")
    return 0


def _due(states: Sequence[RunState], retry: bool) -> list[PlannedRun]:
    """The runs that nobody has in hand and that have an end to come to."""
    return [s.run for s in states if s.state in ("pending", "stopped") or (retry and s.state == "failed")]


def _launcher(command: Command) -> slurm.SlurmConfig:
    name = command.options.get("launcher", "slurm")
    known = choices("launcher", command.sweep.configs)
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        raise ConfigError(f"there is no launcher {name!r}; it is one of {', '.join(sorted(known))}, or a .yaml file")
    return fill(slurm.SlurmConfig, path, "launcher", command.launcher)


def do_retry(command: Command) -> int:
    if "launcher" in command.options or command.launcher:
        return do_submit(command, retry=True)
    return do_run(command, retry=True)


def do_status(command: Command) -> int:
    runs = known(command)
    states = _states(runs)
    if "--json" in command.flags:
        for state in states:
            print(json.dumps(state.record()))
        return 0
    _console().print(status_table(states))
    print(f"{counts(states)}; records under {sweep_folder(runs)}/")
    return 0


def _states(runs: Sequence[PlannedRun], must_know: bool = False) -> list[RunState]:
    """From the folders and, where there is one, Slurm's queue: what waits there is queued, whatever its folder says of
    an earlier start. A queue that cannot be read is one warning, or with must_know a UserError."""
    queue = {}
    if slurm.has_slurm():
        try:
            queue = slurm.queued(sweep_folder(runs))
        except UserError as error:
            if must_know:
                raise
            print(f"warning: {error}; what waits in the queue is not shown as queued", file=sys.stderr)
    found = []
    for state in map(read_state, runs):
        job, _ = queue.get(str(Path(state.run.folder).resolve()), (None, None))
        waits = job and state.state in ("pending", "stopped", "failed")
        found.append(replace(state, job=job or state.job, state="queued" if waits else state.state))
    return found


def do_collect(command: Command) -> int:
    runs = planned(command, None)
    ids = {run.run_id for run in runs}
    lines, table, found = collect(sweep_folder(runs), ids if command.narrowed else None)
    others = len([run_id for run_id in found if run_id not in ids])
    print(f"{len(found) - others} of {len(runs)} planned runs, {others} others, in {lines} and {table}")
    return 0


def _console() -> Console:
    """Tables are as wide as they need to be where no terminal limits them."""
    return Console() if sys.stdout.isatty() else Console(width=400, soft_wrap=True)


DO = dict(zip(VERBS, (do_plan, do_run, do_submit, do_retry, do_status, do_collect), strict=True))


def execute(argv: Sequence[str]) -> int:
    """Do what was typed; returns the exit status. Raises ConfigError for a wrong command."""
    command = parse(argv)
    return DO[command.verb](command)
