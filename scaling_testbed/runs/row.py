"""The row that a run leaves in result.json, which is all that analysis reads."""

from pathlib import Path
from typing import Any

from scaling_testbed.config.run import RunConfig, flatten, rate_means, run_id
from scaling_testbed.plugins import hashes

SCHEMA_VERSION = 1
FINAL = ("finished", "diverged")  # a run with one of these statuses is a result and is not run again

# Every field of a row, always present, null where unknown; losses in nats per token. The flattened configuration
# follows them under dotted keys.
ROW_FIELDS = (
    "schema_version", "run_id", "name", "status", "error", "overrides", "seed",
    "n_params", "n_params_non_embedding", "n_params_no_input_embedding", "n_params_no_qk_gains",
    "n_tokens", "steps", "steps_planned", "epochs", "flops_6nd", "flops",
    "rate_means", "val_loss", "val_loss_initial", "val_loss_best", "val_bpb", "val_loss_by_set",
    "train_loss_last", "diverged_at_step", "skipped_steps",
    "max_attention_logit", "diagnostics_at_step", "diagnostics_last_mean",
    "unigram_entropy_nats", "entropy_rate_nats",
    "wall_seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "restarts",
    "attention_impl", "qk_norm_impl", "loss_impl", "precision", "device", "world_size", "parallelism",
    "data_fingerprint", "tokenizer_fingerprint", "git_commit", "versions", "plugins",
)  # fmt: skip


def empty_row(run: RunConfig) -> dict[str, Any]:
    """A row with every field, filled with what is known before anything runs."""
    known = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id(run),
        "name": run.name,
        "overrides": run.overrides,
        "seed": run.seed,
        "rate_means": rate_means(run),
        "plugins": hashes(run.plugins),
    }
    return dict.fromkeys(ROW_FIELDS) | known | {k: v for k, v in flatten(run).items() if "." in k}


def describe_row(row: dict[str, Any], folder: Path) -> str:
    """The row for a person: what the run came to, and where its records lie."""
    shown = {
        "status": row["status"] if row["error"] is None else f"{row['status']}: {row['error']}",
        "validation loss": _nats(row["val_loss"]),
        "  at step 0": _nats(row["val_loss_initial"]),
        "  bits per byte": _number(row["val_bpb"], ".4f"),
        "unigram entropy": _nats(row["unigram_entropy_nats"]),
        "entropy rate": _nats(row["entropy_rate_nats"]),
        "parameters": _number(row["n_params"], ",d"),
        "tokens": _number(row["n_tokens"], ",d"),
        "training FLOPs": _number(row["flops"], ".3g"),
        "tokens/s": _number(row["tokens_per_second"], ",.0f"),
        "wall seconds": _number(row["wall_seconds"], ".1f"),
        "records": f"{folder}/ (result.json, metrics.jsonl, config.yaml, checkpoints/)",
    }
    return "\n".join(f"{label:<16} {text}" for label, text in shown.items() if text is not None)


def _nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f} nats per token"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
