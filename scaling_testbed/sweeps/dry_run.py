"""Describe a run and its cost from a model on the meta device. Nothing is allocated, read or written."""

import dataclasses

from scaling_testbed.config.memory import Memory, estimate_memory
from scaling_testbed.config.run import RunConfig, flops_per_token, unshardable
from scaling_testbed.model.counting import count_params
from scaling_testbed.model.transformer import Transformer

GPUS = (1, 8, 64)
GIB = 2**30


def describe_run(run: RunConfig, vocab_size: int) -> str:
    """Parameters, steps, tokens, FLOPs, and memory on each of 1, 8 and 64 GPUs, for a vocabulary of `vocab_size`.

    On several GPUs a run with parallelism=single is shown as fsdp, or as ddp if it cannot be sharded. Raises
    ConfigError as the run itself would.
    """
    model = run.model.resolved(vocab_size)
    anywhere = dataclasses.replace(model, attention_impl="auto", qk_norm_impl="auto")
    built = Transformer(anywhere, run.parametrization, device="meta")
    n_params = sum(parameter.numel() for parameter in built.parameters())
    counts = count_params(model)
    steps = run.budget.resolve_steps(counts, run.batch.tokens)
    n_tokens = steps * run.batch.tokens
    lines = {
        "model": f"{model.name}, vocabulary {model.vocab_size:,}",
        "parameters": f"{n_params:,} ({counts.n_params_non_embedding:,} without embedding and head)",
        "steps": f"{steps:,} of {run.batch.tokens:,} tokens",
        "tokens": f"{n_tokens:,}",
        "training FLOPs": f"{flops_per_token(run, model) * n_tokens:.3g}",
    }
    if rounding := run.budget.rounding(counts, run.batch.tokens):
        lines["rounding"] = rounding
    text = "\n".join(f"{label:<16} {value}" for label, value in lines.items())
    return f"{text}\n{_memory_table(run, model, n_params)}"


def _memory_table(run: RunConfig, model, n_params: int) -> str:
    precision = run.compute.precision_on_gpu
    fields = [field.name for field in dataclasses.fields(Memory)]
    header = f"{'GiB per GPU':<16} {'GPUs':>4}  " + "  ".join(name.replace("_", " ") for name in [*fields, "total"])
    lines = [f"{header}    ({precision}; activations are an estimate)"]
    for n_gpus in GPUS:
        placed = _placed(run, n_gpus)
        memory = estimate_memory(placed, model, n_params, precision, n_gpus)
        cells = [f"{getattr(memory, name) / GIB:>{len(name)}.1f}" for name in [*fields, "total"]]
        note = f"    batch.sequences={run.batch.sequences} is not a multiple" if run.batch.sequences % n_gpus else ""
        lines.append(f"{placed.parallelism.kind:<16} {n_gpus:>4}  " + "  ".join(cells) + note)
    return "\n".join(lines)


def _placed(run: RunConfig, n_gpus: int) -> RunConfig:
    """`run` with a parallelism for `n_gpus`: one GPU has no shards, and several need ddp or fsdp."""
    parallelism = run.parallelism
    if n_gpus == 1:
        parallelism = dataclasses.replace(parallelism, shard_size=None)
    elif parallelism.kind == "single":
        parallelism = dataclasses.replace(parallelism, kind="ddp" if unshardable(run) else "fsdp")
    return dataclasses.replace(run, parallelism=parallelism)
