"""The runs of a submission by what they need of Slurm: each size is an array job with its own GPUs and time limit."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.slurm import Partition, SlurmConfig, seconds_of

START_SECONDS = 300  # of an automatic limit, for imports, data and compilation
# Up to so many seconds, an automatic limit is a multiple of so many: runs of nearly the same need have one limit.
ROUNDED = ((3600, 600), (6 * 3600, 1800), (24 * 3600, 3600), (math.inf, 12 * 3600))


@dataclass(frozen=True)
class Size:
    """Runs with equal needs. config: with their own nodes, GPUs and time limit."""

    runs: list[PlannedRun]
    config: SlurmConfig

    @property
    def n_gpus(self) -> int:
        """Of a run; 0: CPUs only."""
        return self.config.processes if self.config.gpus else 0

    @property
    def name(self) -> str:
        """The models of the runs."""
        names = dict.fromkeys(str(run.config.get("model.name", "")) for run in self.runs)
        return ", ".join(names) if len(names) < 4 else f"{next(iter(names))} and {len(names) - 1} more"


def sizes(runs: Sequence[PlannedRun], config: SlurmConfig, partition: Partition | None = None) -> list[Size]:
    """The runs by their GPUs and time limit, in the order of the first run of each size.

    With launcher.time=auto the limit of a run is `launcher.time_margin` times its estimate, and START_SECONDS more, and
    never above that of the partition; a run without an estimate then raises ConfigError. With
    launcher.gpus_per_node=auto a run has the GPUs that it was planned for.
    """
    found: dict[tuple[int, int, str | None], list[PlannedRun]] = {}
    for run in runs:
        nodes, gpus = config.nodes, config.gpus
        if config.has_auto_gpus:
            nodes, gpus = run.nodes, run.processes // run.nodes
        found.setdefault((nodes, gpus, time_limit(run, config, partition)), []).append(run)
    return [
        Size(own, dataclasses.replace(config, nodes=nodes, gpus_per_node=gpus, time=limit))
        for (nodes, gpus, limit), own in found.items()
    ]


def time_limit(run: PlannedRun, config: SlurmConfig, partition: Partition | None) -> str | None:
    """The time limit of a run, as sbatch takes it. Raises ConfigError as `sizes` does."""
    if not config.has_auto_time:
        return config.time
    if run.hours is None:
        raise ConfigError(
            "launcher.time=auto needs the speed of the device, and no run of this or another sweep in runs_dir has "
            "finished on such a one; give --flops-per-second, such as 4e14, or a limit, such as launcher.time=8:00:00"
        )
    needed = config.time_margin * hours_of(run) * 3600 + START_SECONDS + config.signal_seconds
    unit = next(unit for most, unit in ROUNDED if needed <= most)
    limit = math.ceil(needed / unit) * unit
    if partition is not None and partition.seconds is not None:
        limit = min(limit, partition.seconds)
    return spelled(limit)


def spelled(seconds: int) -> str:
    """A time limit as sbatch takes it: h:mm:ss, or d-hh:mm:ss from a day on."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{clock:0>8}" if days else clock


def hours_of(run: PlannedRun) -> float:
    """The hours that all GPUs of a run take together."""
    assert run.hours is not None
    return run.hours / run.processes


def check_limit(config: SlurmConfig, partition: Partition | None) -> None:
    """Raise ConfigError if the partition never runs a task as long as the time limit that is typed. A quality of
    service may lift its limit, so with one Slurm decides."""
    limit = seconds_of(config.time)
    if partition is None or partition.seconds is None or limit is None or config.qos is not None:
        return
    if limit > partition.seconds:
        most = spelled(partition.seconds)
        raise ConfigError(
            f"launcher.time={config.time} is above the limit of partition {partition.name}, which is {most}; type "
            f"launcher.time={most}: a run that meets its limit saves a checkpoint and goes on from there"
        )


def short_limits(found: Sequence[Size]) -> list[str]:
    """A line for each size whose limit is shorter than its longest run: what then becomes of the run."""
    lines = []
    for size in found:
        limit, config = seconds_of(size.config.time), size.config
        priced = [run for run in size.runs if run.hours is not None]
        if limit is None or not priced:
            continue
        longest = max(priced, key=hours_of)
        of_a_start = max(1, limit - config.signal_seconds)
        starts = math.ceil(hours_of(longest) * 3600 / of_a_start)
        if starts < 2:
            continue
        takes = f"{size.name}: a run takes about {hours_of(longest):,.1f} hours, more than its limit of {config.time}: "
        if not config.requeue:
            lines.append(f"{takes}it ends there, and the same submit continues it from its last checkpoint")
            continue
        line = (
            f"{takes}it saves a checkpoint before the limit and goes back into the queue, about {starts} starts in all"
        )
        if starts > config.max_restarts:
            line += f"; type launcher.max_restarts={2 * starts}, because {config.max_restarts} are too few"
        lines.append(line)
    return lines
