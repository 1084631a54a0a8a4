"""Settings of a run that published runs of its size do not have. Does not import torch."""

from collections.abc import Mapping, Sequence

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.interleaving import Interleaving
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import ParamCounts

LARGE = 100_000_000  # parameters without embedding and head
LARGEST_VOCABULARY, LARGEST_BATCH = 2**19, 2**24  # tokens; 262,144 in Gemma 3 and 16 million in Llama 3 are published


def unusual(
    run: RunConfig, model: ModelConfig, counts: ParamCounts, steps: int, train_tokens: Mapping[str, int] | None = None
) -> dict[str, str]:
    """What is unusual about a run, by reason: a line with the keys to type. steps: of the run. train_tokens: of the
    prepared train split of each source of a mixture by its name, or of the only source; None if it is not prepared.

    The bounds are wide. Those of the vocabulary, batch and sequence length apply to models from LARGE parameters up, of
    which the published runs have vocabularies of 32,000 and more, batches of 131,072 tokens and more, and sequences of
    512 tokens and more (Wortsman et al. 2023, section 2.1; Gadre et al. 2024, table 1; Biderman et al. 2023, table 1).
    """
    n_tokens, large = steps * run.batch.tokens, counts.n_params_non_embedding >= LARGE
    found = _of_vocabulary(model, counts, large) | _of_batch(run, counts, steps, large)
    if run.budget.hours is not None:
        found["hours"] = (
            f"budget.hours={run.budget.hours:g} may end the run before its {steps:,} steps: how many it makes is "
            "unknown until it has run, and differs between machines"
        )
    if remark := run.averaging.remark(run.start.first_step, steps):
        found["no average"] = remark
    if (rule := run.data.online_rule) is not None and rule.next_change(run.start.first_step) >= steps:
        found["no change of weights"] = (
            f"data.online.every_steps={rule.every_steps} changes no weights before the end at step {steps:,}; set it "
            "lower"
        )
    if steps > 1_000_000:
        found["many steps"] = f"{steps:,} steps are many; set a larger batch.sequences= or a smaller budget"
    if large and not 1 <= n_tokens / counts.n_params <= 10_000:
        found["budget"] = (
            f"{n_tokens / counts.n_params:.2g} tokens per parameter is an unusual budget; set "
            "budget.tokens_per_param=, such as 20"
        )
    key = "schedule.warmup=" if run.schedule.warmup_tokens is None else "schedule.warmup_tokens="
    if (warmup := run.schedule.warmup_steps(steps, run.batch.tokens)) > steps:
        found["warm-up longer than the run"] = (
            f"the warm-up of {warmup:,} steps is longer than the run of {steps:,} steps, so the rate never reaches "
            f"optimizer.lr; set {key}"
        )
    elif warmup > steps / 2:
        found["long warm-up"] = f"the warm-up of {warmup:,} steps is more than half of the {steps:,} steps; set {key}"
    return found | (_of_epochs(run, steps, train_tokens) if train_tokens else {})


def _of_epochs(run: RunConfig, steps: int, train_tokens: Mapping[str, int]) -> dict[str, str]:
    found, size = {}, run.batch.sequences
    first = "" if run.data.online_rule is None else "with its first weights "
    rows = Interleaving(run.data.weights_by_step(train_tokens), size).counts(steps * size)
    for name, there in train_tokens.items():
        if (epochs := rows[name] * run.batch.sequence_length / there) > 4:
            found[f"epochs {name}".strip()] = (
                f"{first}the run reads the train split{name and f' of data.sources.{name}'} {epochs:,.1f} times; "
                "beyond some 4 times, repeated text is worth less than new text (Muennighoff et al. 2023)"
            )
    return found


def _of_vocabulary(model: ModelConfig, counts: ParamCounts, large: bool) -> dict[str, str]:
    found, size = {}, model.known_vocab_size
    if large and size < 4096:
        found["small vocabulary"] = (
            f"a vocabulary of {size:,} is small for a model of {counts.n_params:,} parameters; choose data= and "
            "tokenizer=, such as data=c4 tokenizer=gpt_neox"
        )
    share = 1 - counts.n_params_non_embedding / counts.n_params
    if share > 0.95:
        found["share of the embedding"] = (
            f"{share:.0%} of the parameters are embedding and head: a vocabulary of {size:,} is large for "
            f"model={model.name}; choose tokenizer= or a larger model="
        )
    if size > LARGEST_VOCABULARY:
        found["vocabulary"] = f"a vocabulary of {size:,} is larger than any that is published; set tokenizer="
    return found


def _of_batch(run: RunConfig, counts: ParamCounts, steps: int, large: bool) -> dict[str, str]:
    found, size = {}, f"a model of {counts.n_params:,} parameters"
    if large and run.batch.tokens < 32_768:
        found["small batch"] = (
            f"a batch of {run.batch.tokens:,} tokens is small for {size}; set batch.sequences= and "
            "batch.sequence_length=, such as 256 and 512"
        )
    if run.batch.tokens > LARGEST_BATCH:
        found["large batch"] = (
            f"a batch of {run.batch.tokens:,} tokens, for {steps:,} steps, is larger than any that is published; set a "
            "smaller batch.sequences= or batch.sequence_length="
        )
    if large and run.batch.sequence_length < 256:
        found["sequence length"] = f"batch.sequence_length={run.batch.sequence_length} is short for {size}"
    return found


def unusual_lines(named: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """One line for each reason, with the number of runs that have it and the first of them. named: the label of each
    run, and what is unusual about it."""
    runs: dict[str, list[tuple[str, str]]] = {}
    for label, found in named:
        for reason, text in found.items():
            runs.setdefault(reason, []).append((label, text))
    return [f"{len(own)} of {len(named)} runs, first {own[0][0]}: {own[0][1]}" for own in runs.values()]
