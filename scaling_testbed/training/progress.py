"""The progress of a run: the values that change during training, and how a checkpoint stores them."""

import gc
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scaling_testbed.config.run import RunConfig, run_id
from scaling_testbed.diagnostics.summary import Summary
from scaling_testbed.errors import UserError
from scaling_testbed.learning.interventions.base import Intervention
from scaling_testbed.plugins import check_unchanged, hashes
from scaling_testbed.processes.device import peak_memory_bytes
from scaling_testbed.progress import Clock
from scaling_testbed.runs import checkpoint, state
from scaling_testbed.runs.folder import Written
from scaling_testbed.runs.writer import Writer, on_host
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.step import TooLittleMemory, Update, smaller_micro_batch


@dataclass(kw_only=True)
class Progress:
    """Everything that changes during training, besides weights, moments and states of interventions.

    step: number of updates, including those that were left out. record: the line of this step in metrics.jsonl until it
    is written, then None. train_loss_last: of the last update, in nats. summary: what the row needs of the records of
    all starts. micro_batches: step -> sequences in a pass of a process from this step on. clock: wall seconds over all
    starts. restarts: the starts before this one. metrics: what the checkpoint from which the run continues says of
    metrics.jsonl, or None. compiled_before: whether the model was compiled in the start that this one continues; None
    if there is none, or if its checkpoint does not say it. captured_before: the same for a step as one CUDA graph.
    lineage: the runs in whose state this one began, the oldest first; see `Row.lineage`.
    """

    summary: Summary
    micro_batches: dict[int, int]

    step: int = 0
    record: dict[str, Any] | None = field(default_factory=lambda: {"step": 0})
    train_loss_last: float | None = None
    clock: Clock = field(default_factory=Clock)
    restarts: int = 0
    metrics: Written | None = None
    compiled_before: bool | None = None
    captured_before: bool | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)

    @property
    def micro_batch(self) -> int:
        """Sequences in a pass of a process now."""
        return list(self.micro_batches.values())[-1]

    def take_less(self, parts: Parts, error: TooLittleMemory) -> str:
        """Make the micro-batch smaller after `error`, so that the same step is tried again, and return what to say.

        Raises `error` unless the run chooses its micro-batch itself, has one process, and can make it smaller. Several
        processes cannot go on: the others wait in a collective that this one has not reached.
        """
        before, fewer = self.micro_batch, smaller_micro_batch(self.micro_batch)
        if not parts.run.batch.is_auto or parts.processes.grouped or fewer is None:
            raise error
        self.micro_batches[self.step] = fewer
        parts.evaluate_as(fewer)
        gc.collect()
        if parts.device.type == "cuda":
            torch.cuda.empty_cache()
        return f"too little memory at step {self.step}: micro-batches of {fewer} sequences in place of {before}"

    def advance(self, update: Update, parts: Parts) -> None:
        """Count `update`, and open the record of its step."""
        run = parts.run
        self.step += 1
        self.train_loss_last = update.train_loss
        self.clock.end_step()
        marks = {"skipped": True} if update.skipped else {}
        objective = {} if update.train_objective is None else {"train_objective": update.train_objective}
        self.record = {"step": self.step} | update.diagnostics | marks
        if update.diagnostics or marks or self.step % run.logging.every_steps == 0 or self.step in (1, parts.steps):
            rate = parts.tokens_per_second(self.clock, self.step)
            self.record |= {
                "tokens": parts.n_tokens(self.step),
                "train_loss": update.train_loss,
                "train_z_loss": update.train_z_loss,
                **objective,
                "lr": update.lr,
                "grad_norm": update.grad_norm,
                "clip_coefficient": update.clip_coefficient,
                "tokens_per_second": rate,
                "ms_per_step": self.clock.take_ms_per_step(),
                "mfu": parts.mfu(self.step, rate),
                "peak_memory_bytes": peak_memory_bytes(parts.device),
                "seconds": self.clock.wall_seconds,
            }


def is_evaluated(run: RunConfig, step: int, steps: int) -> bool:
    """Whether the weights after `step` updates of `steps` are evaluated."""
    every, rule = run.evaluation.every_steps, run.data.online_rule
    due = bool(every) and step % every == 0 or rule is not None and step % rule.every_steps == 0
    return due or step in (run.start.first_step, steps)


def is_scored(run: RunConfig, step: int, steps: int) -> bool:
    """Whether the weights after `step` updates of `steps` are scored on the tasks, if there are any."""
    every = run.evaluation.tasks_every_steps
    return step == steps or bool(every) and step % every == 0


def is_saved(run: RunConfig, step: int) -> bool:
    """Whether a checkpoint is saved after `step` updates, for any step but the last."""
    every = run.checkpoint.every_steps
    due = bool(every) and step % every == 0 or step in run.checkpoint.keep_steps
    return step > run.start.first_step and due


def spent(parts: Parts, step: int) -> dict[str, Any]:
    """Steps, tokens and FLOPs of this run alone, after `step` updates."""
    first = parts.run.start.first_step
    flops, n_tokens = parts.flops(step) - parts.flops(first), parts.n_tokens(step) - parts.n_tokens(first)
    return {"steps": step - first, "n_tokens": n_tokens, "flops": float(flops)}


def save(parts: Parts, progress: Progress, writer: Writer) -> None:
    """Save a checkpoint of this step, with the step's record if it is still open. Every rank calls this.

    The lines of metrics.jsonl up to this step are on the disk before. With checkpoint.asynchronous `writer` writes it
    from a copy, after it has written the one before; an error of the one before is raised here.
    """
    metrics = parts.processes.on_main(lambda: _sync(parts, writer))
    plain = {
        "schema_version": checkpoint.SCHEMA_VERSION,
        "run_id": run_id(parts.run),
        "shapes": state.shapes(parts.model),
        "precision": parts.precision,
        "compiled": parts.compiled,
        "cuda_graph": parts.captures,
        "row": progress.record,
        "summary": progress.summary.state(),
        "metrics": metrics,
        "restarts": progress.restarts,
        "micro_batches": progress.micro_batches,
        "train_loss_last": progress.train_loss_last,
        "wall_seconds": progress.clock.wall_seconds,
        "steps_by_clock": parts.length.chosen,
        "updates": states_of(parts.interventions),
        "averaged": parts.averages.n,
        "lineage": progress.lineage,
        "mixing": None if parts.mixing is None else parts.mixing.state(),
        "spent": spent(parts, progress.step),
        **parts.recorded(),
        "plugins": hashes(parts.run.plugins),
    }
    if parts.run.parallelism.is_sharded:
        tensors, shards = state.sharded_state(parts.model, parts.optimizer)
    else:
        tensors, shards = state.whole_state(parts.model, parts.optimizer, parts.device), None
    if kept := tensors_of(parts.interventions):
        tensors["interventions"] = kept
    if parts.averages.tensors and shards is None:
        tensors["averages"] = parts.averages.tensors
    elif shards is not None:
        shards |= {f"averages/{name}": tensor for name, tensor in parts.averages.tensors.items()}
    where, keep = parts.folder.checkpoints, parts.run.checkpoint
    if not keep.asynchronous:
        checkpoint.save(where, progress.step, plain, tensors, keep, shards=shards, processes=parts.processes)
        return

    def start() -> None:
        copied_plain, copied_tensors = on_host((plain, tensors))
        writer.start(partial(checkpoint.save, where, progress.step, copied_plain, copied_tensors, keep))

    parts.processes.on_main(start)


def _sync(parts: Parts, writer: Writer) -> Written:
    writer.wait()  # before a second copy of the state is made
    parts.folder.check_held()
    parts.folder.sync_metrics()
    return parts.folder.written()


def resume(parts: Parts) -> Progress | None:
    """Restore the newest complete checkpoint and return its progress; None if there is none. Every rank calls this.

    Raises UserError if every checkpoint is damaged, if the newest is of another run or of a step that this run does not
    have, or if the data or a plug-in differs from that of the run.
    """
    found, config = parts.processes.on_main(lambda: _find_checkpoint(parts)), parts.run.diagnostics
    if found is None:
        return None
    path, plain = Path(found[0]), found[1]
    with state.refused_in_one_line(path):
        kept = plain.get("summary")  # earlier versions took the summary from metrics.jsonl alone
        progress = Progress(
            step=plain["step"],
            record=plain["row"],
            summary=Summary(config) if kept is None else Summary.of_state(config, kept),
            metrics=plain.get("metrics"),
            micro_batches=_micro_batches(parts, plain),
            train_loss_last=plain["train_loss_last"],
            clock=Clock(before=plain["wall_seconds"]),
            restarts=plain.get("restarts", 0) + 1,
            compiled_before=plain.get("compiled"),
            captured_before=plain.get("cuda_graph"),
            lineage=plain.get("lineage", []),
        )
        parts.length.restore(plain.get("steps_by_clock"))
        restore_states(parts.interventions, plain.get("updates", {}))
        restore_tensors(parts.interventions, path)
        parts.averages.n = plain.get("averaged", 0)
        if parts.mixing is not None:
            parts.mixing.restore(plain["mixing"])
    sharded = parts.run.parallelism.is_sharded
    state.restore(path, parts.model, parts.optimizer, parts.device, sharded=sharded, averages=parts.averages.tensors)
    return progress


def _micro_batches(parts: Parts, plain: dict[str, Any]) -> dict[int, int]:
    """The micro-batches of a run that is continued. One that chooses by itself keeps its choice, if there is memory."""
    found = {int(step): int(rows) for step, rows in plain.get("micro_batches", {}).items()}
    if not found:  # an earlier version did not record them
        return {plain["step"]: parts.micro_batch}
    last, now = list(found.values())[-1], parts.micro_batch
    here = parts.run.batch.sequences // parts.processes.world.size
    if last != now and not (parts.run.batch.is_auto and last < now and here % last == 0):
        found[plain["step"]] = now
    if parts.run.batch.is_auto:
        parts.evaluate_as(list(found.values())[-1])
    return found


def _find_checkpoint(parts: Parts) -> tuple[str, dict[str, Any]] | None:
    path = checkpoint.latest(parts.folder.checkpoints)
    if path is None:
        return None
    plain = checkpoint.read_state(path)
    checkpoint.check_run(path, plain, [run_id(parts.run)])
    checkpoint.check_same_data(plain, parts.data, parts.folder.path)
    check_unchanged(plain.get("plugins"), parts.run.plugins, parts.folder.path)
    checkpoint.check_precision(plain, parts.precision, parts.folder.path)
    if plain["step"] > parts.steps:
        raise UserError(
            f"checkpoint {path} is of step {plain['step']:,}, and this run has {parts.steps:,} steps; "
            f"{checkpoint.WAY_OUT}"
        )
    if plain.get("shapes", state.shapes(parts.model)) != state.shapes(parts.model):
        raise UserError(f"checkpoint {path} is of a model with other parameters; {checkpoint.WAY_OUT}")
    return str(path), plain


def states_of(interventions: dict[str, Intervention]) -> dict[str, Any]:
    """Name -> state of the interventions that have one."""
    states = {name: intervention.state() for name, intervention in interventions.items()}
    return {name: found for name, found in states.items() if found is not None}


def tensors_of(interventions: dict[str, Intervention]) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> tensors of the interventions that have some. Every process calls it."""
    found = {name: intervention.tensors() for name, intervention in interventions.items()}
    return {name: tensors for name, tensors in found.items() if tensors}


def restore_states(interventions: dict[str, Intervention], states: dict[str, Any]) -> None:
    """Restore the result of `states_of`. In older checkpoints the state of a disabled intervention is None."""
    for name, intervention in interventions.items():
        if states.get(name) is not None:
            intervention.restore(states[name])


def restore_tensors(interventions: dict[str, Intervention], path: Path) -> None:
    """Restore the result of `tensors_of` from the checkpoint at `path`, whose hashes agree."""
    kept = checkpoint.read_tensors(path, "interventions")
    for name, intervention in interventions.items():
        intervention.restore_tensors(kept.get(name, {}))
