"""Whether a run fits the memory of a GPU, and the overrides that make it fit. Does not import torch."""

import dataclasses
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scaling_testbed.config.memory import USABLE, Memory, estimate_memory, largest_micro_batch
from scaling_testbed.config.run import RunConfig, unshardable
from scaling_testbed.model.config import ModelConfig

GIB = 2**30
ASSUMED_GIB = 80.0  # A100 and H100; for a plan on a machine without a GPU
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
    """Whether an estimate of `n_bytes` fits the part of a GPU of `gib` GiB that estimates may fill."""
    return n_bytes <= USABLE["cuda"] * gib * GIB


def planned_memory(run: RunConfig, model: ModelConfig, n_params: int, n_gpus: int, gib: float) -> Memory:
    """The estimate for each of `n_gpus` GPUs of `gib` GiB. For batch.micro_batch_sequences=auto it is that of the
    micro-batch that the run would choose on such a GPU. model: resolved, with `n_params` parameters."""
    precision = run.compute.precision_on_gpu
    if run.batch.is_auto:
        rows = largest_micro_batch(run, model, n_params, precision, n_gpus, int(gib * GIB), "cuda")
        run = _with_micro_batch(run, rows)
    return estimate_memory(run, model, n_params, precision, n_gpus)


@dataclass(frozen=True)
class Fitting:
    """A change that makes a run fit: `words`, the overrides; `run`, the run with those of them that are its own; and
    the `nodes` and all `gpus` that it then has."""

    words: list[str]
    run: RunConfig
    nodes: int
    gpus: int

    @property
    def own_words(self) -> list[str]:
        """The overrides of the run itself, without those of the launcher."""
        return [word for word in self.words if not word.startswith("launcher.")]


def fitting(run: RunConfig, model: ModelConfig, n_params: int, n_gpus: int, gib: float) -> Fitting | None:
    """What makes `run` fit GPUs of `gib` GiB, with the least change. None if none of these is enough:

    a smaller micro-batch, which changes only memory and time; activations that are computed again in the backward pass;
    the model sharded over more GPUs. model: resolved, with `n_params` parameters. n_gpus: of the run.
    """
    for words, changed, nodes, gpus in _variants(run, n_gpus):
        here = max(1, run.batch.sequences // gpus)
        available, precision = int(gib * GIB), run.compute.precision_on_gpu
        rows = largest_micro_batch(changed, model, n_params, precision, gpus, available, "cuda")
        smaller = _with_micro_batch(changed, rows)
        if fits(estimate_memory(smaller, model, n_params, precision, gpus).total, gib):
            # A run that has room for its whole batch, or chooses by itself, needs no word about it.
            needed = not run.batch.is_auto and rows < min(run.batch.micro_batch or here, here)
            typed = [f"batch.micro_batch_sequences={rows}"] if needed else []
            return Fitting([*typed, *words], smaller if needed else changed, nodes, gpus)
    return None


def fitting_overrides(run: RunConfig, model: ModelConfig, n_params: int, n_gpus: int, gib: float) -> list[str] | None:
    """The overrides of `fitting`."""
    found = fitting(run, model, n_params, n_gpus, gib)
    return None if found is None else found.words


def _variants(run: RunConfig, n_gpus: int) -> Iterator[tuple[list[str], RunConfig, int, int]]:
    """Overrides, the run with them, its nodes (1 where the overrides name none) and its GPUs; the least change
    first."""
    recomputed = ["parallelism.activation_checkpointing=1"]
    yield [], run, 1, n_gpus
    yield recomputed, _parallel(run, activation_checkpointing=1), 1, n_gpus
    if unshardable(run):
        return
    for nodes in (n for n in range(1, MOST_NODES + 1) if n & (n - 1) == 0):
        gpus = nodes * GPUS_OF_A_NODE
        if gpus < n_gpus or run.batch.sequences % gpus:
            continue
        words = ["parallelism=fsdp", *([f"launcher.nodes={nodes}"] if nodes > 1 else [])]
        words += [f"launcher.gpus_per_node={GPUS_OF_A_NODE}"]
        sharded = _parallel(run, kind="fsdp", shard_size=None)
        yield words, sharded, nodes, gpus
        yield [*words, *recomputed], _parallel(sharded, activation_checkpointing=1), nodes, gpus


def _parallel(run: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(run, parallelism=dataclasses.replace(run.parallelism, **changes))


def _with_micro_batch(run: RunConfig, rows: int) -> RunConfig:
    return dataclasses.replace(run, batch=dataclasses.replace(run.batch, micro_batch_sequences=rows))
