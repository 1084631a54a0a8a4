"""Whether runs of a plan would take less time in bf16 on the CPU of this machine. Does not import torch."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed.sweeps.gpu_memory import memory_of_gpu
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.speed import MOST_FLOPS_OF_CPU

PROCESSOR_FILE = Path("/proc/cpuinfo")  # on Linux
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
# From this width and this many tokens in a pass on, bf16 takes less time (docs/runs.md, "Device and precision").
LEAST_D_MODEL, LEAST_TOKENS = 64, 1024


def bf16_remark(runs: Sequence[PlannedRun]) -> list[str]:
    """A line about the runs in fp32 that would take less time in bf16 on this machine's CPU; empty if there are none,
    if the CPU has no such instructions, or if the runs are not for a CPU: there is a GPU here, or they are too many."""
    found = [run for run in runs if _gains(run)]
    if not found or not has_fast_bf16() or sum(run.flops for run in runs) > MOST_FLOPS_OF_CPU:
        return []
    if any(run.config["compute.device"] == "auto" for run in found) and memory_of_gpu() is not None:
        return []
    which = f"all {len(runs)} runs" if len(found) == len(runs) > 1 else f"{len(found)} of {len(runs)} runs"
    return [
        f"{which} would probably take less time on this CPU with compute.precision=bf16, which makes them other runs "
        "(see docs/runs.md)"
    ]


def _gains(run: PlannedRun) -> bool:
    config = run.config
    rows = config["batch.micro_batch_sequences"]
    rows = rows if isinstance(rows, int) else config["batch.sequences"]
    return (
        config["compute.device"] in ("cpu", "auto")
        and config["compute.precision"] != "bf16"
        and config["model.d_model"] >= LEAST_D_MODEL
        and rows * config["batch.sequence_length"] >= LEAST_TOKENS
    )


def has_fast_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 numbers. False where it is not known."""
    with contextlib.suppress(OSError), PROCESSOR_FILE.open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return not BF16_INSTRUCTIONS.isdisjoint(line.split())
    return False
