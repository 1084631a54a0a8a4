"""How long the runs of a plan take: by a rate that is typed, by finished runs, or by a probe. Does not import torch."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_testbed.runs.row import is_number
from scaling_testbed.sweeps.gpu_memory import memory_of_gpu
from scaling_testbed.sweeps.plan import PlannedRun, sweep_folder

MOST_FLOPS_OF_CPU = 1e17  # a plan with more is none for a CPU: two cores take six days
MOST_TIMES_LONGER = 100  # a run than those that tell its speed, in tokens; of a shorter one the start tells
# Names that CUDA gives to GPUs; a row records no kind of device. Everything else is a processor.
NAMES_OF_GPUS = re.compile(r"nvidia|tesla|geforce|quadro|titan|instinct|radeon", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """The seconds that one device takes for a token of a model that takes `flops` for it. device: its name. n_tokens:
    of the longest run that says so; infinite for a probe, whose start is not in its seconds."""

    flops: float
    seconds: float
    device: str
    n_tokens: float = math.inf


@dataclass(frozen=True)
class Speed:
    """What is known of the speed of a device. on_gpu: whether it is a GPU, else a processor. words: where this is
    known from. Either `flops_per_second` is given, or `points`."""

    on_gpu: bool
    words: str
    flops_per_second: float | None = None
    points: tuple[Point, ...] = ()

    @property
    def unit(self) -> str:
        return "GPU-hours" if self.on_gpu else "CPU-hours"

    def seconds(self, run: PlannedRun) -> float:
        """The seconds of one device that a run takes, all of its devices together.

        Of the points that of the nearest size counts. A larger model is taken to reach the same FLOP/s, and a smaller
        one to take as long for a token: both are more than is needed where devices use larger models better. Points of
        much fewer tokens than the run are passed over where there are others: their starts took most of their time.
        """
        if (hours := run.config.get("budget.hours")) is not None:
            return 3600 * float(hours) * run.processes
        if self.flops_per_second is not None:
            return run.flops / self.flops_per_second
        flops = run.flops / (n_tokens := run.n_tokens - run.first_step * run.tokens_per_step)
        long = [one for one in self.points if one.n_tokens >= n_tokens / MOST_TIMES_LONGER]
        near = min(long or self.points, key=lambda point: max(point.flops / flops, flops / point.flops))
        return n_tokens * near.seconds * max(1.0, flops / near.flops)


def priced(runs: Sequence[PlannedRun], speed: Speed) -> list[PlannedRun]:
    """The runs with the hours of their devices."""
    if speed.on_gpu:
        return [replace(run, gpu_hours=speed.seconds(run) / 3600) for run in runs]
    return [replace(run, cpu_hours=speed.seconds(run) / 3600) for run in runs]


def stated(flops_per_second: float, on_gpu: bool) -> Speed:
    """The speed that --flops-per-second names."""
    return Speed(on_gpu, f"at {flops_per_second:.3g} FLOP/s (stated)", flops_per_second)


def measured(rows: Iterable[Mapping[str, Any]], on_gpu: bool, where: str) -> Speed | None:
    """The speed of the finished runs with these rows, on GPUs or on processors; None without any.

    where: what the runs are, for the words. Runs of one size on one device count by their median. Of several devices,
    such as two kinds of GPU, the slowest counts.
    """
    found: dict[tuple[float, str], list[Point]] = {}
    for row in rows:
        if (point := _point(row)) is not None and _is_on_gpu(row) == on_gpu:
            found.setdefault((float(f"{point.flops:.2g}"), point.device), []).append(point)
    if not found:
        return None
    most: dict[float, float] = {}
    for (flops, _), points in found.items():
        most[flops] = max([most.get(flops, 0.0), *(point.n_tokens for point in points)])
    slowest: dict[float, Point] = {}
    for (flops, device), points in found.items():
        if not (long := [one for one in points if one.n_tokens >= most[flops] / MOST_TIMES_LONGER]):
            continue  # trials alone, whose starts took most of their time
        seconds = statistics.median(one.seconds for one in long)
        point = Point(flops, seconds, device, max(one.n_tokens for one in long))
        if flops not in slowest or slowest[flops].seconds < point.seconds:
            slowest[flops] = point
    devices = list(dict.fromkeys(point.device for point in slowest.values()))
    count, n_sizes = sum(map(len, found.values())), len(slowest)
    runs = f"{count} finished run{'s' * (count > 1)} of {n_sizes} size{'s' * (n_sizes > 1)} {where}"
    return Speed(on_gpu, f"by {runs} on {' and '.join(devices)}", points=tuple(slowest.values()))


def of_finished(runs: Sequence[PlannedRun], rows: Sequence[Mapping[str, Any]], on_gpu: bool) -> Speed | None:
    """The speed of the finished runs of a sweep, whose rows are given, else of those of the sweeps beside it; None
    where none has finished on such a device, unless the clock ends all runs (budget.hours)."""
    folder = sweep_folder(runs)
    if found := measured(rows, on_gpu, "of this sweep"):
        return found
    if found := measured(_rows_beside(folder), on_gpu, f"in other folders of {folder.parent}/"):
        return found
    by_clock = all(run.config.get("budget.hours") is not None for run in runs)
    return Speed(on_gpu, "by budget.hours") if by_clock else None


def is_for_cpu(runs: Sequence[PlannedRun], stated: bool = False) -> bool:
    """Whether a plan without a launcher is for the processor of this machine: its runs ask for no other device, there
    is no GPU here, and they are not too many for a processor. A `stated` rate is that of a GPU, unless all runs ask for
    a processor."""
    devices = {run.config.get("compute.device") for run in runs}
    if devices == {"cpu"} or stated:
        return devices == {"cpu"}
    few = sum(run.flops for run in runs) <= MOST_FLOPS_OF_CPU
    return devices <= {"cpu", "auto"} and few and memory_of_gpu() is None


def _point(row: Mapping[str, Any]) -> Point | None:
    """What a row says of the speed of its device; None if it is not finished, or says nothing."""
    found: list[Any] = [row.get("flops_here") or row.get("flops"), row.get("n_tokens_here") or row.get("n_tokens")]
    found += [row.get("wall_seconds"), row.get("world_size") or 1]
    if row.get("status") != "finished" or not all(is_number(one) and one > 0 for one in found):
        return None
    flops, n_tokens, wall, world = found
    return Point(flops / n_tokens, wall * world / n_tokens, str(row.get("device") or "an unknown device"), n_tokens)


def _is_on_gpu(row: Mapping[str, Any]) -> bool:
    asked = row.get("compute.device")
    return asked == "cuda" or (asked != "cpu" and NAMES_OF_GPUS.search(str(row.get("device"))) is not None)


def _rows_beside(folder: Path) -> Iterable[Mapping[str, Any]]:
    """The rows of other sweeps and runs in the same runs_dir. What cannot be read is passed over."""
    for path in folder.parent.glob("*/*/result.json"):
        if path.parent.parent != folder:
            try:
                row = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
