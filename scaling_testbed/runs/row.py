"""The row of a run in result.json. Analysis reads only this row."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from scaling_testbed.config.run import RunConfig, flatten, rate_means, run_id
from scaling_testbed.plugins import hashes

SCHEMA_VERSION = 1
FINAL = ("finished", "diverged")  # a run with one of these statuses is a result and is not run again
STOPPED_EARLY = ("preempted", "hopeless")  # with a checkpoint, from which the same command continues
STATUSES = (*FINAL, *STOPPED_EARLY, "failed")


def fact(meaning: str, unit: str = "") -> Any:
    """A field of Row that is None until it is known. unit: empty where it has none."""
    return field(default=None, metadata={"meaning": meaning, "unit": unit})


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a run. Every field is in result.json, null where it is unknown.

    The keys of the configuration follow the fields, as `model.d_model`, and after them `error/NAME`, the top-1 error on
    each of evaluation.tasks, and what plug-ins add.
    """

    schema_version: int | None = fact("The version of these fields.")
    run_id: str | None = fact("The hash of what the run computes, which is the name of its folder.")
    name: str | None = fact("The configuration key name: the folder that the run is filed in.")
    status: str | None = fact(
        "finished; diverged (a loss or gradient norm was not finite); preempted (stopped before the end); "
        "hopeless (stopped by `sweep run --stop-hopeless`, as its predicted final loss was too high); failed."
    )
    error: str | None = fact("Why a run was stopped, diverged or failed, in one line.")
    overrides: list[str] | None = fact("The overrides as they were typed.")
    seed: int | None = fact("The configuration key seed.")
    n_params: int | None = fact("All parameters.", "parameters")
    n_params_non_embedding: int | None = fact("Parameters without embedding and head.", "parameters")
    n_params_no_input_embedding: int | None = fact(
        "Parameters without the embedding; the head is counted, also where it is tied.", "parameters"
    )
    n_params_no_qk_gains: int | None = fact("Parameters without the gains of the qk-norm.", "parameters")
    n_params_average: float | None = fact(
        "n_params without pruned weights, the mean over the steps made; null where the run prunes none.", "parameters"
    )
    n_params_final: int | None = fact("The same in the last step made.", "parameters")
    density_by_role: dict[str, float] | None = fact(
        "Role of a matrix that is pruned -> the part of its weights that is left; null where the run prunes none."
    )
    n_tokens: int | None = fact(
        "Training tokens seen: steps times tokens in a batch, without padding. Tokens that are no targets count.",
        "tokens",
    )
    n_targets: int | None = fact(
        "Those of this run's own tokens that are targets of the loss; null where a mask leaves none out.", "tokens"
    )
    padding_share: float | None = fact(
        "The part of the positions of this run's own batches that is padding; null without batch.packing=documents."
    )
    steps: int | None = fact("Steps made. With step in start.take, those of the parent are among them.", "steps")
    steps_planned: int | None = fact("Steps of the whole budget; with budget.hours as the clock chose them.", "steps")
    steps_by_clock: bool | None = fact(
        "Whether the clock chose steps_planned, so that another machine would choose another number; null without "
        "budget.hours."
    )
    epochs: float | None = fact("Passes through the train split, those of its lineage included.", "epochs")
    tokens_by_source: dict[str, int] | None = fact(
        "Training tokens of this run alone from each source of a mixture; null without data=mixture.", "tokens"
    )
    epochs_by_source: dict[str, float] | None = fact(
        "Passes of this run alone through the train split of each source of a mixture; null without one.", "epochs"
    )
    weights_by_source: dict[str, float] | None = fact(
        "The last weights of the sources of a mixture, which follow from the losses; null without data.online."
    )
    flops_6nd: float | None = fact("6 n_params n_tokens, with n_params_average in a run that prunes weights.", "FLOPs")
    flops: float | None = fact(
        "Training FLOPs counted from matrix products, attention and interventions included, pruned weights left out.",
        "FLOPs",
    )
    lineage: list[dict[str, Any]] | None = fact(
        "The runs in whose state this one began, the oldest first: run_id, folder, step, the sha256 of the weights, "
        "data_fingerprint, val_loss_initial, and what the run itself had spent: steps, n_tokens, flops. null without "
        "start.run."
    )
    n_tokens_here: int | None = fact("Training tokens of this run alone; null without start.run.", "tokens")
    n_tokens_total: int | None = fact("Those of this run and its lineage; null without start.run.", "tokens")
    flops_here: float | None = fact("Training FLOPs of this run alone; null without start.run.", "FLOPs")
    flops_total: float | None = fact(
        "Those of this run and its lineage; null without start.run, and where a run of an earlier version is in it.",
        "FLOPs",
    )
    rate_means: str | None = fact(
        "The meaning of one unit of the learning rate. Sensitivities are compared only where it is the same."
    )
    val_loss: float | None = fact(
        "Cross-entropy of the last evaluation, without z-loss; null where the run was stopped early.", "nats per token"
    )
    val_loss_initial: float | None = fact(
        "Cross-entropy at step 0. With start.run, that of the first run of the lineage; null if a run of it had other "
        "data.",
        "nats per token",
    )
    val_loss_start: float | None = fact(
        "Cross-entropy of the weights that this run began with; null without start.run.", "nats per token"
    )
    val_loss_best: float | None = fact("The lowest cross-entropy of all evaluations.", "nats per token")
    val_bpb: float | None = fact(
        "val_loss for each byte of text; null where the data are no text, or where the tokenizer loses text.",
        "bits per byte",
    )
    val_bpb_withheld: str | None = fact(
        "How the tokenizer loses text, or how many validation tokens are no targets; null where val_bpb is not "
        "withheld."
    )
    val_loss_by_set: dict[str, float] | None = fact("Name of each validation set -> its last loss.", "nats per token")
    val_loss_average: float | None = fact(
        "As val_loss, with the average of the weights (averaging=ema or latest) in place of the last ones; null where "
        "there is none.",
        "nats per token",
    )
    val_loss_average_by_set: dict[str, float] | None = fact(
        "As val_loss_by_set, with the average of the weights; null without one.", "nats per token"
    )
    ce_scaled: float | None = fact(
        "Cross-entropy of the odd windows of the last evaluation after one temperature that is fitted on the even "
        "ones; null unless evaluation.ce_scaled=true or the objective is no cross-entropy, and where val_loss is null.",
        "nats per token",
    )
    ce_scaled_temperature: float | None = fact("This temperature, by which the logits are divided.")
    ce_scaled_by_set: dict[str, float] | None = fact("Name of each validation set -> its ce_scaled.", "nats per token")
    ce_scaled_average: float | None = fact("As ce_scaled, with the average of the weights.", "nats per token")
    accuracy_by_group: dict[str, float] | None = fact(
        "Name of each group of targets that the data tell apart -> the share of them that are the likeliest token, at "
        "the last evaluation; null where the data tell none apart."
    )
    task_error: float | None = fact(
        "The unweighted mean of the errors of the final weights on evaluation.tasks; null without tasks, and where the "
        "run diverged or was stopped early. Laws read it as `error`."
    )
    task_error_chance: float | None = fact("The same mean of a model that guesses.")
    task_error_withheld: str | None = fact("Why a run with evaluation.tasks has no error; null where it has one.")
    task_documents: dict[str, int] | None = fact("Name of each task -> the number of its documents.", "documents")
    train_loss_last: float | None = fact("Cross-entropy of the last training batch.", "nats per token")
    diverged_at_step: int | None = fact("The step whose loss or gradient norm was not finite.", "steps")
    skipped_steps: int | None = fact("Updates left out by optimizer.skip_spikes_sigmas; null without it.", "steps")
    max_attention_logit: float | None = fact("The largest attention logit of all measured steps.", "logits")
    diagnostics_at_step: dict[str, Any] | None = fact("Diagnostics of step diagnostics.at_step, by name.")
    diagnostics_last_mean: dict[str, Any] | None = fact(
        "Means of the diagnostics over the measured steps among the last diagnostics.last_steps, by name."
    )
    unigram_entropy_nats: float | None = fact(
        "Entropy of the token frequencies of the train split: the loss of a model that knows only these.",
        "nats per token",
    )
    entropy_rate_nats: float | None = fact(
        "Entropy rate of a synthetic source, which no model can beat on average; null for text.", "nats per token"
    )
    entropy_window_nats: float | None = fact(
        "The lowest mean loss of any model on windows of batch.sequence_length tokens of a synthetic source. It is "
        "above the entropy rate, because the first tokens of a window have few before them. null where it is not "
        "known.",
        "nats per token",
    )
    wall_seconds: float | None = fact("Time of training and evaluation, over all starts.", "seconds")
    tokens_per_second: float | None = fact("Training tokens in a second, of all processes together.", "tokens/s")
    mfu: float | None = fact(
        "Model FLOPs utilisation: FLOPs in a second divided by the peak of all devices; null where the peak is unknown."
    )
    peak_memory_bytes: int | None = fact("The largest memory of a process.", "bytes")
    optimizer_state_bytes: int | None = fact(
        "The tensors in the optimizer's state after the last update, all shards of a copy of the model together. "
        "Counts of steps are left out.",
        "bytes",
    )
    micro_batch_sequences: int | None = fact(
        "Sequences in the last forward and backward pass of a process. It changes losses by rounding.", "sequences"
    )
    micro_batch_changes: dict[str, int] | None = fact(
        "Where it changed during the run: step -> sequences in a pass from this step on; null where it did not."
    )
    restarts: int | None = fact("How often the run was started again.")
    attention_impl: str | None = fact("The path that computed attention.")
    qk_norm_impl: str | None = fact("The path that normed and rotated queries and keys.")
    qkv_impl: str | None = fact("The path that made queries, keys and values.")
    loss_impl: str | None = fact("The path that computed the loss.")
    compiled: bool | None = fact(
        "Whether the blocks of the model were compiled in the last start. It changes losses by rounding."
    )
    cuda_graph: bool | None = fact("Whether a step was one CUDA graph, at the last start.")
    precision: str | None = fact("fp32 or bf16.")
    device: str | None = fact("The name of the device.")
    world_size: int | None = fact("The number of processes of the last start.", "processes")
    parallelism: str | None = fact("single, ddp or fsdp.")
    data_fingerprint: str | None = fact("A hash of the prepared tokens.")
    tokenizer_fingerprint: str | None = fact("A hash of how text becomes tokens.")
    data_folder: str | None = fact("The name of the prepared corpus, which ends in a hash of what decides its tokens.")
    data_inputs: dict[str, Any] | None = fact(
        "The files that the corpus was prepared from: their number, their size, and a hash of settings and bytes; "
        "null where they are unknown, as for a dataset of the hub."
    )
    evaluation_data: dict[str, str] | None = fact("Name in evaluation.sets -> data_fingerprint of the set.")
    task_data: dict[str, str] | None = fact(
        "Name of each task -> the sha256 of its file, or of the file that `analyze tasks` makes of the corpus."
    )
    teacher: dict[str, Any] | None = fact(
        "The finished run that taught this one (objective=distill): run_id, step, weights_sha256, val_loss, n_params, "
        "and n_tokens and flops of its training with its lineage. With stored targets top_k too, and pass_flops of the "
        "pass that made them. null without a teacher."
    )
    reference_sha256: str | None = fact(
        "The sha256 of the losses at the start that objective=npo compares with, which are in reference_losses.bin; "
        "null with other objectives."
    )
    git_commit: str | None = fact("The commit of the source, where it is known.")
    git_dirty: str | None = fact(
        "The hash of the uncommitted changes to the source, which are in uncommitted-HASH.diff; null without changes."
    )
    source_files: str | None = fact(
        "The hash of the files of the package, which are in source-HASH.tar.gz; null where the source is under git."
    )
    versions: dict[str, str] | None = fact("The versions of Python and of the libraries that decide numbers.")
    plugins: dict[str, str] | None = fact("Plug-in -> hash of its source.")

    config: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunConfig, *, status: str | None = None, error: str | None = None) -> Row:
        """The row of `run` with the fields that are known before training."""
        return cls(
            schema_version=SCHEMA_VERSION,
            run_id=run_id(run),
            name=run.name,
            status=status,
            error=error,
            overrides=run.overrides,
            seed=run.seed,
            rate_means=rate_means(run),
            plugins=hashes(run.plugins),
            config={key: value for key, value in flatten(run).items() if "." in key},
        )

    def as_dict(self) -> dict[str, Any]:
        """The row as it is in result.json. No name in `added` replaces a field or a key."""
        known = {name: getattr(self, name) for name in ROW_FIELDS} | self.config
        return known | {key: value for key, value in self.added.items() if key not in known}


ROW_FIELDS = tuple(f.name for f in fields(Row) if "meaning" in f.metadata)


def problem_of(row: Any) -> str | None:
    """Why a value of JSON is not the row of a run, or None. Rows of earlier versions have fewer fields."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    if row.get("status") not in STATUSES:
        return f"its status is none of {', '.join(STATUSES)}"
    if not isinstance(row.get("run_id"), str):
        return "it has no run_id"
    hints = get_type_hints(Row)
    odd = next((name for name in ROW_FIELDS if name in row and not _fits(row[name], get_args(hints[name]))), None)
    return odd and f"its {odd} is {shortened(row[odd])}"


def _fits(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a value of JSON is of one of the types `kinds` of a field, or null."""
    if value is None:
        return True
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, (int, float)):
        return is_number(value) and (float in kinds or type(value) in kinds)
    kind = next((kind for kind in kinds if (get_origin(kind) or kind) is type(value)), None)
    if kind is None or not (inner := get_args(kind)) or inner[-1] is Any:
        return kind is not None
    return all(_fits(entry, inner[-1:]) for entry in (value.values() if isinstance(value, dict) else value))


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold. A truth value counts as one."""
    with contextlib.suppress(OverflowError):
        return isinstance(value, (int, float)) and float(value) is not None
    return False


def shortened(value: Any) -> str:
    """A value of JSON for a message, in ASCII and at most 40 characters long."""
    with contextlib.suppress(ValueError):  # an integer of thousands of digits
        text = ascii(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return "a huge number"


def describe_row(row: dict[str, Any], folder: Path) -> str:
    """The row as printed text: the result of the run, and the folder of its records."""
    shown = {
        "status": row["status"] if row.get("error") is None else f"{row['status']}: {row['error']}",
        "validation loss": _nats(row.get("val_loss")),
        "  of the average": _nats(row.get("val_loss_average")),
        "  scaled": _nats(row.get("ce_scaled")),
        "  temperature": _number(row.get("ce_scaled_temperature"), ".4f"),
        "  at step 0": _nats(row.get("val_loss_initial")),
        "  at the start": _nats(row.get("val_loss_start")),
        "  bits per byte": _number(row.get("val_bpb"), ".4f") or _withheld(row.get("val_bpb_withheld")),
        "task error": _number(row.get("task_error"), ".4f") or _withheld(row.get("task_error_withheld")),
        "  of a guess": _number(row.get("task_error_chance"), ".4f"),
        "unigram entropy": _nats(row.get("unigram_entropy_nats")),
        "entropy rate": _nats(row.get("entropy_rate_nats")),
        "  of windows": _nats(row.get("entropy_window_nats")),
        "parameters": _number(row.get("n_params"), ",d"),
        "tokens": _number(row.get("n_tokens"), ",d"),
        "training FLOPs": _number(row.get("flops"), ".3g"),
        "tokens/s": _number(row.get("tokens_per_second"), ",.0f"),
        "wall seconds": _number(row.get("wall_seconds"), ".1f"),
        "records": f"{folder}/ (result.json, metrics.jsonl, config.yaml, checkpoints/)",
    }
    return "\n".join(f"{label:<16} {text}" for label, text in shown.items() if text is not None)


def _withheld(reason: str | None) -> str | None:
    return None if reason is None else f"withheld: {reason}"


def _nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f} nats per token"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
