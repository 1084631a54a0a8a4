"""Whether a run fits the memory of a GPU, and the overrides that make it fit. Does not import torch."""

import dataclasses
import math
import subprocess
from collections.abc import Iterator

from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.config.run import RunConfig, unshardable
from scaling_testbed.model.config import ModelConfig

GIB = 2**30
ASSUMED_GIB = 80.0  # A100 and H100; for a plan on a machine without a GPU
# The part of a GPU's memory that the estimate may fill. The CUDA context, the fragments of the allocator and NCCL's
# buffers take the rest. It is a margin and was not measured.
USABLE = 0.9
GPUS_OF_A_NODE = 8
MOST_NODES = 8


def memory_of_gpu() -> float | None:
    """The memory in GiB of the smallest NVIDIA GPU of this machine, from nvidia-smi; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(float(line) for line in printed.splitlines() if line.strip()) / 1024
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def fits(n_bytes: int, gib: float) -> bool:
    """Whether an estimate of `n_bytes` fits a GPU of `gib` GiB, with the margin USABLE."""
    return n_bytes <= USABLE * gib * GIB


def fitting_overrides(run: RunConfig, model: ModelConfig, n_params: int, n_gpus: int, gib: float) -> list[str] | None:
    """The overrides that make `run` fit GPUs of `gib` GiB, with the least change. None if none of these is enough:

    a smaller micro-batch, which changes only memory and time; activations that are computed again in the backward pass;
    the model sharded over more GPUs. model: resolved, with `n_params` parameters. n_gpus: of the run.
    """
    for words, changed, gpus in _variants(run, n_gpus):
        for rows in _divisors(max(1, run.batch.sequences // gpus)):
            smaller = dataclasses.replace(changed, batch=dataclasses.replace(run.batch, micro_batch_sequences=rows))
            if fits(estimate_memory(smaller, model, n_params, run.compute.precision_on_gpu, gpus).total, gib):
                return [f"batch.micro_batch_sequences={rows}", *words]
    return None


def _variants(run: RunConfig, n_gpus: int) -> Iterator[tuple[list[str], RunConfig, int]]:
    """Overrides, the run with them, and its number of GPUs; the least change first."""
    recomputed = ["parallelism.activation_checkpointing=1"]
    yield [], run, n_gpus
    yield recomputed, _parallel(run, activation_checkpointing=1), n_gpus
    if unshardable(run):
        return
    for nodes in (n for n in range(1, MOST_NODES + 1) if n & (n - 1) == 0):
        gpus = nodes * GPUS_OF_A_NODE
        if gpus < n_gpus or run.batch.sequences % gpus:
            continue
        words = ["parallelism=fsdp", *([f"launcher.nodes={nodes}"] if nodes > 1 else [])]
        words += [f"launcher.gpus_per_node={GPUS_OF_A_NODE}"]
        sharded = _parallel(run, kind="fsdp", shard_size=None)
        yield words, sharded, gpus
        yield [*words, *recomputed], _parallel(sharded, activation_checkpointing=1), gpus


def _parallel(run: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(run, parallelism=dataclasses.replace(run.parallelism, **changes))


def _divisors(rows: int) -> Iterator[int]:
    """The divisors of `rows`, the largest first: a micro-batch divides the batch."""
    small = [k for k in range(1, math.isqrt(rows) + 1) if rows % k == 0]
    return iter(sorted({*small, *(rows // k for k in small)}, reverse=True))
