"""Describe a run and its cost from a model on the meta device. Nothing is allocated, read or written."""

import dataclasses
from collections.abc import Mapping

from scaling_testbed.config.compute import pruned_of, steps_of, training_flops
from scaling_testbed.config.memory import Memory
from scaling_testbed.config.run import RunConfig, unshardable
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import count_params
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.sweeps.gpu_memory import ASSUMED_GIB, GIB, fits, fitting_overrides, memory_of_gpu, planned_memory
from scaling_testbed.sweeps.unusual import unusual

GPUS = (1, 8, 64)
# Of Memory; they are shown only in a run that has some.
OF_OPTIONS = ("averages", "objective", "interventions", "checkpoint")


def describe_run(run: RunConfig, vocab_size: int, train_tokens: Mapping[str, int] | None = None) -> str:
    """Parameters, steps, tokens, FLOPs, memory on each of 1, 8 and 64 GPUs, and warnings, for a vocabulary of
    `vocab_size` and prepared train splits of `train_tokens` (None if they are not prepared), as `unusual` takes them.

    On several GPUs a run with parallelism=single is shown as fsdp, or as ddp if it cannot be sharded. Raises
    ConfigError as the run itself would.
    """
    model = run.model.resolved(vocab_size)
    built = Transformer(model.with_auto_paths(), run.parametrization, device="meta")
    n_params = sum(parameter.numel() for parameter in built.parameters())
    counts = count_params(model)
    steps, first = steps_of(run, model), run.start.first_step
    n_tokens = steps * run.batch.tokens
    lines = {
        "model": f"{model.name}, vocabulary {model.vocab_size:,}",
        "parameters": f"{n_params:,} ({counts.n_params_non_embedding:,} without embedding and head)",
        "steps": f"{steps:,} of {run.batch.tokens:,} tokens",
        "tokens": f"{n_tokens:,}",
        "training FLOPs": f"{training_flops(run, model, steps, steps) - training_flops(run, model, steps, first):.3g}",
    }
    if run.start.run is not None:
        there = "" if run.start.checkpoint.is_dir() else ", whose checkpoint is not there yet"
        lines["begins"] = f"at step {first:,}, with step {run.start.number:,} of {run.start.run}{there}"
    if rounding := run.budget.rounding(counts, run.batch.tokens, pruned_of(run, model)):
        lines["rounding"] = rounding
    text = "\n".join(f"{label:<16} {value}" for label, value in lines.items())
    warnings = [f"warning: {line}" for line in unusual(run, model, counts, steps, train_tokens).values()]
    return "\n".join([text, *_memory_table(run, model, n_params), *warnings])


def _memory_table(run: RunConfig, model: ModelConfig, n_params: int) -> list[str]:
    precision = run.compute.precision_on_gpu
    fields = [field.name for field in dataclasses.fields(Memory)]
    alone = planned_memory(_placed(run, 1), model, n_params, 1, ASSUMED_GIB)
    fields = [name for name in fields if name not in OF_OPTIONS or getattr(alone, name)]
    header = f"{'GiB per GPU':<16} {'GPUs':>4}  " + "  ".join(name.replace("_", " ") for name in [*fields, "total"])
    lines = [f"{header}    ({precision}; activations are an estimate)"]
    gib = run.compute.gpu_memory_gib or memory_of_gpu() or ASSUMED_GIB
    for n_gpus in GPUS:
        placed = _placed(run, n_gpus)
        memory = planned_memory(placed, model, n_params, n_gpus, gib)
        cells = [f"{getattr(memory, name) / GIB:>{len(name)}.1f}" for name in [*fields, "total"]]
        notes = []
        if run.batch.sequences % n_gpus:
            notes.append(f"batch.sequences={run.batch.sequences} is not a multiple")
        elif not fits(memory.total, gib):
            words = fitting_overrides(placed, model, n_params, n_gpus, gib)
            same = words and not any(word.startswith("launcher.") for word in words)
            notes.append(f"does not fit {gib:g} GiB" + (f"; {' '.join(words)} fits" if words and same else ""))
        lines.append("  ".join([f"{placed.parallelism.kind:<16} {n_gpus:>4}", *cells, *notes]))
    return lines


def _placed(run: RunConfig, n_gpus: int) -> RunConfig:
    """`run` with a parallelism for `n_gpus`: one GPU has no shards, and several need ddp or fsdp."""
    parallelism = run.parallelism
    if n_gpus == 1:
        parallelism = dataclasses.replace(parallelism, shard_size=None)
    elif parallelism.kind == "single":
        parallelism = dataclasses.replace(parallelism, kind="ddp" if unshardable(run) else "fsdp")
    return dataclasses.replace(run, parallelism=parallelism)
