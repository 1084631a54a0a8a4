"""Make the row of a run from its parts and its progress."""

import dataclasses
from typing import Any

from scaling_testbed.config.compute import params_in_use
from scaling_testbed.data.cutting import DOCUMENTS
from scaling_testbed.data.manifest import window_entropy_nats
from scaling_testbed.learning.optimizers import state_bytes
from scaling_testbed.processes.device import device_name
from scaling_testbed.runs.environment import versions
from scaling_testbed.runs.row import STOPPED_EARLY, Row
from scaling_testbed.training import tasks
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.progress import Progress, spent
from scaling_testbed.training.records import Records


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: fields of its row."""

    status: str
    error: str | None = None
    diverged_at_step: int | None = None


def make_row(parts: Parts, progress: Progress, records: Records, outcome: Outcome, peak_bytes: int) -> Row:
    """Make the row that analysis reads. peak_bytes: peak memory of the rank that used most."""
    run, model, n_tokens = parts.run, parts.model, parts.n_tokens(progress.step)
    rate = parts.tokens_per_second(progress.clock, progress.step)
    size, manifest = parts.processes.world.size, parts.data.manifest
    added = {key: value for found in parts.interventions.values() for key, value in found.row().items()}
    summary, last = progress.summary, progress.summary.evaluation
    of_tasks, errors = tasks.of_row(parts, last.get("error_by_task"), outcome.status)
    in_use = params_in_use(run, model.config, parts.steps, progress.step)
    average, final = (None, None) if in_use is None else in_use
    flops = parts.flops(progress.step)
    is_over = outcome.status not in STOPPED_EARLY  # a run that a signal stopped has no final loss
    return dataclasses.replace(
        Row.of(run, status=outcome.status, error=outcome.error),
        **dataclasses.asdict(parts.counts),
        **parts.recorded(),
        **of_tasks,
        **summary.diagnostics(progress.step),
        **of_start(parts, progress),
        **of_sources(parts, progress.step),
        padding_share=padding_share(parts, progress.step),
        n_tokens=n_tokens,
        n_targets=n_targets(parts, progress.step),
        steps=progress.step,
        steps_planned=parts.steps,
        steps_by_clock=parts.length.chosen is not None if parts.length.by_clock else None,
        n_params_average=average,
        n_params_final=final,
        density_by_role=added.get("density_by_role"),
        flops_6nd=float(6 * (parts.counts.n_params if average is None else average) * n_tokens),  # may be over 64 bits
        flops=float(flops),
        val_loss=last.get("val_loss") if is_over else None,
        val_loss_best=summary.val_loss_best,
        val_bpb=last.get("val_bpb") if is_over else None,
        val_bpb_withheld=parts.data.why_no_bits,
        val_loss_by_set=last.get("val_loss_by_set"),
        val_loss_average=last.get("val_loss_average") if is_over else None,
        val_loss_average_by_set=last.get("val_loss_average_by_set"),
        ce_scaled=last.get("ce_scaled") if is_over else None,
        ce_scaled_temperature=last.get("ce_scaled_temperature") if is_over else None,
        ce_scaled_by_set=last.get("ce_scaled_by_set"),
        accuracy_by_group=last.get("accuracy_by_group"),
        ce_scaled_average=last.get("ce_scaled_average") if is_over else None,
        train_loss_last=progress.train_loss_last,
        diverged_at_step=outcome.diverged_at_step,
        skipped_steps=added.get("skipped_steps"),
        reference_sha256=parts.objective.row.get("reference_sha256"),
        unigram_entropy_nats=manifest.get("unigram_entropy_nats"),
        entropy_rate_nats=manifest.get("entropy_rate_nats"),
        entropy_window_nats=window_entropy_nats(manifest, run.batch.sequence_length),
        wall_seconds=progress.clock.wall_seconds,
        tokens_per_second=rate,
        mfu=parts.mfu(progress.step, rate),
        peak_memory_bytes=peak_bytes,
        optimizer_state_bytes=state_bytes(parts.optimizer),
        micro_batch_sequences=progress.micro_batch,
        micro_batch_changes={str(step): rows for step, rows in progress.micro_batches.items()}
        if len(progress.micro_batches) > 1
        else None,
        restarts=progress.restarts,
        attention_impl=model.attention_impl,
        qk_norm_impl=model.qk_norm_impl,
        qkv_impl=model.qkv_impl,
        loss_impl=parts.loss.impl,
        compiled=parts.compiled,
        cuda_graph=parts.captures,
        precision=parts.precision,
        device=device_name(parts.device),
        world_size=size,
        parallelism=run.parallelism.kind,
        git_commit=records.git["commit"],
        git_dirty=records.git["dirty"],
        source_files=records.git.get("files"),
        versions=versions(),
        added=errors | added | dict(parts.objective.row),
    )


def of_start(parts: Parts, progress: Progress) -> dict[str, Any]:
    """What the row says of the lineage of the run, and of what it decides too: passes through the data, and the
    loss at step 0."""
    first = progress.summary.val_loss_initial
    if not (lineage := progress.lineage):
        return {"epochs": parts.batches.epochs(progress.step), "val_loss_initial": first}
    here = spent(parts, progress.step)
    all_of = {key: [*(run[key] for run in lineage), here[key]] for key in ("n_tokens", "flops")}
    known = {key: None if None in values else sum(values) for key, values in all_of.items()}
    same_data = [run["n_tokens"] for run in lineage if run["data_fingerprint"] == parts.data.fingerprint]
    return {
        "lineage": lineage,
        "val_loss_start": first,
        "val_loss_initial": lineage[-1].get("val_loss_initial") if len(same_data) == len(lineage) else None,
        "n_tokens_here": here["n_tokens"],
        "n_tokens_total": known["n_tokens"],
        "flops_here": here["flops"],
        "flops_total": known["flops"],
        "epochs": None if None in same_data else (here["n_tokens"] + sum(same_data)) / parts.batches.n_tokens,
    }


def of_sources(parts: Parts, step: int) -> dict[str, Any]:
    """What the row says of the sources of a mixture: tokens and epochs of this run alone, after `step` updates."""
    if not parts.batches.is_mixture:
        return {}
    first = parts.run.start.first_step
    return {
        "tokens_by_source": parts.batches.tokens_by_source(first, step),
        "epochs_by_source": parts.batches.epochs_by_source(first, step),
        "weights_by_source": None if parts.mixing is None else parts.mixing.weights,
    }


def padding_share(parts: Parts, step: int) -> float | None:
    """The part of the positions of this run's own batches that is padding, after `step` updates; None where no position
    can be, and before the first update."""
    positions = (step - parts.run.start.first_step) * parts.run.batch.tokens
    if parts.run.batch.packing != DOCUMENTS or not positions:
        return None
    return 1 - spent(parts, step)["n_tokens"] / positions


def n_targets(parts: Parts, step: int) -> int | None:
    """The targets of this run's own batches, after `step` updates; None where each token is one."""
    if not parts.batches.is_masked:
        return None
    return parts.batches.n_targets(parts.run.start.first_step, step)
