"""Describe a run and its cost from a model on the meta device. Nothing is allocated, read or written."""

import dataclasses

from scaling_testbed.config.memory import Memory
from scaling_testbed.config.run import RunConfig, flops_per_token, unshardable
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import ParamCounts, count_params
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.sweeps.gpu_memory import ASSUMED_GIB, GIB, fits, fitting_overrides, memory_of_gpu, planned_memory

GPUS = (1, 8, 64)
LARGE = 100_000_000  # parameters without embedding and head
LARGEST_VOCABULARY, LARGEST_BATCH = 2**19, 2**24  # tokens; 262,144 in Gemma 3 and 16 million in Llama 3 are published


def describe_run(run: RunConfig, vocab_size: int, train_tokens: int | None = None) -> str:
    """Parameters, steps, tokens, FLOPs, memory on each of 1, 8 and 64 GPUs, and warnings, for a vocabulary of
    `vocab_size` and a prepared train split of `train_tokens` (None if it is not prepared).

    On several GPUs a run with parallelism=single is shown as fsdp, or as ddp if it cannot be sharded. Raises
    ConfigError as the run itself would.
    """
    model = run.model.resolved(vocab_size)
    built = Transformer(model.with_auto_paths(), run.parametrization, device="meta")
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
    warnings = [f"warning: {line}" for line in unusual(run, model, counts, steps, train_tokens)]
    return "\n".join([text, *_memory_table(run, model, n_params), *warnings])


def unusual(
    run: RunConfig, model: ModelConfig, counts: ParamCounts, steps: int, train_tokens: int | None = None
) -> list[str]:
    """Settings that published runs of this size do not have, each in a line with the keys to type. steps: of the run.
    train_tokens: of the prepared train split; None if it is not prepared.

    The bounds are wide. Those of the vocabulary, batch and sequence length apply to models from LARGE parameters up, of
    which the published runs have vocabularies of 32,000 and more, batches of 131,072 tokens and more, and sequences of
    512 tokens and more (Wortsman et al. 2023, section 2.1; Gadre et al. 2024, table 1; Biderman et al. 2023, table 1).
    """
    found, n_tokens, large = [], steps * run.batch.tokens, counts.n_params_non_embedding >= LARGE
    size = f"a model of {counts.n_params:,} parameters"
    if large and model.known_vocab_size < 4096:
        found.append(
            f"a vocabulary of {model.known_vocab_size:,} is small for {size}; choose data= and tokenizer=, such as "
            "data=c4 tokenizer=gpt_neox"
        )
    share = 1 - counts.n_params_non_embedding / counts.n_params
    if share > 0.95:
        found.append(
            f"{share:.0%} of the parameters are embedding and head: a vocabulary of {model.known_vocab_size:,} is "
            f"large for model={model.name}; choose tokenizer= or a larger model="
        )
    if large and run.batch.tokens < 32_768:
        found.append(
            f"a batch of {run.batch.tokens:,} tokens is small for {size}; set batch.sequences= and "
            "batch.sequence_length=, such as 256 and 512"
        )
    if model.known_vocab_size > LARGEST_VOCABULARY:
        found.append(f"a vocabulary of {model.known_vocab_size:,} is larger than any that is published; set tokenizer=")
    if run.batch.tokens > LARGEST_BATCH:
        found.append(
            f"a batch of {run.batch.tokens:,} tokens, for {steps:,} steps, is larger than any that is published; set a "
            "smaller batch.sequences= or batch.sequence_length="
        )
    if large and run.batch.sequence_length < 256:
        found.append(f"batch.sequence_length={run.batch.sequence_length} is short for {size}")
    if steps > 1_000_000:
        found.append(f"{steps:,} steps are many; set a larger batch.sequences= or a smaller budget")
    if large and not 1 <= n_tokens / counts.n_params <= 10_000:
        found.append(
            f"{n_tokens / counts.n_params:.2g} tokens per parameter is an unusual budget; set "
            "budget.tokens_per_param=, such as 20"
        )
    if (warmup := run.schedule.warmup_steps(steps, run.batch.tokens)) > steps / 2:
        found.append(f"the warm-up of {warmup:,} steps is more than half of the {steps:,} steps; set schedule.warmup=")
    if train_tokens and (epochs := n_tokens / train_tokens) > 4:
        found.append(
            f"the run reads the train split {epochs:,.1f} times; beyond some 4 times, repeated text is worth less than "
            "new text (Muennighoff et al. 2023)"
        )
    return found


def _memory_table(run: RunConfig, model: ModelConfig, n_params: int) -> list[str]:
    precision = run.compute.precision_on_gpu
    fields = [field.name for field in dataclasses.fields(Memory)]
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
