"""One run: batch -> forward -> loss terms -> backward over micro-batches -> one clip -> one step -> records.

Everything a run computes is a function of its configuration and the step, so a run that was killed anywhere and
started again by the same command ends in the same bits as one that was not. Several processes take parts of each
batch and change nothing but rounding; rank 0 alone holds the run's folder.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scaling_testbed.config.run import RunConfig, flatten, run_folder_path, run_id
from scaling_testbed.data.batches import TrainingBatches
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.diagnostics.summary import summarize
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.learning.loss import choose_loss_impl
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.learning.optimizers import build_optimizer
from scaling_testbed.model.attention import check_impls
from scaling_testbed.model.counting import count_params, flops_per_token
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.plugins import check_unchanged, hashes
from scaling_testbed.processes.device import (
    choose_device,
    choose_precision,
    configure_torch,
    device_name,
    peak_flops,
    peak_memory_bytes,
)
from scaling_testbed.processes.group import PeerGone, Processes
from scaling_testbed.processes.interrupts import Interrupted, Interrupts
from scaling_testbed.processes.placement import parallelize
from scaling_testbed.processes.world import check_world, world_from_environment
from scaling_testbed.progress import Clock, RunProgress
from scaling_testbed.runs import checkpoint, state
from scaling_testbed.runs.environment import environment as start_environment
from scaling_testbed.runs.environment import versions
from scaling_testbed.runs.folder import RunFolder, read_metrics
from scaling_testbed.runs.row import FINAL, empty_row
from scaling_testbed.runs.wandb import WandbMirror
from scaling_testbed.training.step import Diverged, Updates, poll_all
from scaling_testbed.training.validation import MAIN_SET, bits_per_byte, evaluate, open_validation_sets


def train(run: RunConfig, interrupts: Interrupts | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Train, or go on training, or find finished, the run that `run` describes; returns its row (result.json).

    interrupts: those that the caller has entered. Raises UserError for what a person can mend. Whatever else goes wrong
    is recorded as status failed and raised.
    """
    world = world_from_environment()
    check_world(world, run.parallelism, run.batch.sequences)
    folder = RunFolder(run_folder_path(run))
    with contextlib.ExitStack() as held:
        if interrupts is None or not interrupts.entered:
            interrupts = held.enter_context(Interrupts())
        processes = held.enter_context(Processes(world, run.parallelism))
        if row := processes.on_main(lambda: _final_row(folder, run)):
            return row
        if row := processes.on_main(lambda: _hold(folder, held, run)):
            return row
        try:
            # Several processes have to stop together, which they can from the first step on.
            with interrupts.at_once() if world.size == 1 else contextlib.nullcontext():
                trainer = Trainer(run, folder, processes, quiet=quiet or not world.is_main)
            return trainer.fit(interrupts)
        except Interrupted as signal:
            row = empty_row(run) | {"status": "preempted", "error": f"stopped by {signal} before training"}
            folder.write_result(row)
            return row
        except Exception as error:
            mended = _for_a_person(error)
            cause = processes.first_failure(mended or error) or mended
            if world.is_main:
                message = (str(cause or error) or type(error).__name__).splitlines()[0]
                status = "preempted" if isinstance(cause, PeerGone) else "failed"
                folder.write_result(empty_row(run) | {"status": status, "error": message})
            if cause is not None:
                raise cause from error
            raise


def _final_row(folder: RunFolder, run: RunConfig) -> dict[str, Any] | None:
    row = folder.result()
    if not row or row["status"] not in FINAL:
        return None
    check_unchanged(row.get("plugins"), run.plugins, folder.path)
    return row


def _hold(folder: RunFolder, held: contextlib.ExitStack, run: RunConfig) -> dict[str, Any] | None:
    """Take the folder; returns the row if its owner of a moment ago has finished it."""
    held.enter_context(folder)
    return _final_row(folder, run)


def _for_a_person(error: Exception) -> UserError | None:
    """What to do about an error that is nobody's defect."""
    if isinstance(error, torch.OutOfMemoryError):
        hint = "set batch.micro_batch_sequences lower: it changes the memory, not the global batch"
        return UserError(f"the device has too little memory for this run; {hint}")
    return None


class Trainer:
    """Holds one run's parts; `fit` runs it to its end, its divergence or a signal."""

    def __init__(self, run: RunConfig, folder: RunFolder, processes: Processes, *, quiet: bool = False):
        self.run, self.folder, self.processes, self.world = run, folder, processes, processes.world
        configure_torch(run.compute)
        processes.together(self._choose_paths)
        # Rank 0 prepares, which may take hours; the others find it done.
        prepared = Path(processes.on_main(lambda: str(self._prepare(quiet))))
        processes.together(lambda: self._open(prepared))
        processes.connect(self.device)
        self._build_model()
        self.step = 0  # updates made
        self.row: dict[str, Any] | None = {"step": 0}  # this step's record while it is still open
        self.evaluations: list[dict[str, Any]] = []
        self.train_loss_last: float | None = None
        self.clock = Clock()
        self._resume()
        self._announce(quiet)

    def _choose_paths(self) -> None:
        """What cannot run is refused before data is prepared; `auto` is decided once, and the row records for what."""
        run = self.run
        self.device = choose_device(run.compute, self.world.local_rank)
        self.precision = choose_precision(run.compute, self.device)
        self.loss = dataclasses.replace(run.loss, impl=choose_loss_impl(run.loss, self.device))
        check_impls(run.model, self.device)
        if run.compute.compile and run.parallelism.kind == "fsdp":
            raise ConfigError("compute.compile=true has not been tried with parallelism=fsdp; set it to false")

    def _prepare(self, quiet: bool) -> Path:
        run = self.run
        return prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir), workers=run.data_workers, quiet=quiet)

    def _open(self, prepared: Path) -> None:
        batch, self.data = self.run.batch, open_prepared(prepared)
        self.batches = TrainingBatches(
            self.data.train,
            sequence_length=batch.sequence_length,
            sequences=batch.sequences,
            seed=self.run.seed,
        )
        self.validation_sets = open_validation_sets(self.run, self.data)

    def _build_model(self) -> None:
        run, sharded = self.run, self.run.parallelism.kind == "fsdp"
        config = run.model.resolved(self.data.vocab_size)
        self.counts = count_params(config)
        self.steps = run.budget.resolve_steps(self.counts, run.batch.tokens)
        self.flops_per_token = flops_per_token(config, run.batch.sequence_length)
        where = torch.device("meta") if sharded else self.device
        self.model = Transformer(config, run.parametrization, device=where, run_on=self.device)
        self.model.recompute_every = run.parallelism.activation_checkpointing
        self.placed = parallelize(
            LossModel(self.model, self.loss), run.parallelism, self.device, self.precision, run.seed
        )
        self.optimizer = build_optimizer(run.optimizer.for_length(run.schedule.length(self.steps)), self.model)
        self.updates = Updates(
            run, self.placed, self.optimizer, self.batches, self.processes, self.device, self.precision
        )
        if run.compute.compile:
            self.model.compile()

    def _resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one, and cut metrics.jsonl back to it."""
        found = self.processes.on_main(self._find_checkpoint)
        if found is not None:
            path, plain = found
            sharded = self.run.parallelism.kind == "fsdp"
            state.restore(Path(path), self.model, self.optimizer, self.device, sharded=sharded)
            self.step, self.row = plain["step"], plain["row"]
            self.train_loss_last = plain["train_loss_last"]
            self.clock = Clock(before=plain["wall_seconds"])
            self.updates.restore(plain["updates"])
        else:
            torch.manual_seed(self.run.seed)
        self.restarts, self.git_commit, self.evaluations = self.processes.on_main(self._open_records)

    def _find_checkpoint(self) -> tuple[str, dict[str, Any]] | None:
        path = checkpoint.latest(self.folder.checkpoints)
        if path is None:
            return None
        plain = checkpoint.read_state(path)
        checkpoint.check_same_data(plain, self.data, self.folder.path)
        check_unchanged(plain.get("plugins"), self.run.plugins, self.folder.path)
        return str(path), plain

    def _open_records(self) -> tuple[int, str | None, list[dict[str, Any]]]:
        environment = start_environment(device_name(self.device), self.precision)
        restarts = self.folder.start(dataclasses.asdict(self.run), environment)
        kept = self.folder.open_metrics(keep_before=self.step + (self.row is None))
        return restarts, environment["git"]["commit"], [row for row in kept if "val_loss" in row]

    def _announce(self, quiet: bool) -> None:
        run, config, counts = self.run, self.model.config, self.counts
        self.progress = RunProgress(self.steps, self.step, line_every=run.logging.line_every_steps, quiet=quiet)
        self.progress.say(
            f"run {self.folder.path}: {config.name}, {counts.n_params:,} parameters "
            f"({counts.n_params_non_embedding:,} without embedding and head), on {self._devices()} in {self.precision}"
        )
        self.progress.say(
            f"{self.steps:,} steps of {run.batch.tokens:,} tokens, {self.batches.epochs(self.steps):.2f} epochs of "
            f"{self.data.folder}; attention {self.model.attention_impl}, qk-norm {self.model.qk_norm_impl}, "
            f"loss {self.loss.impl}"
        )
        if (run.diagnostics.at_step or 0) > self.steps:
            self.progress.say(
                f"diagnostics.at_step={run.diagnostics.at_step} lies past the last step, and is not measured"
            )
        if self.step:
            self.progress.say(f"resumed at step {self.step:,} (start {self.restarts + 1} of this run)")

    def _devices(self) -> str:
        if not self.processes.grouped:
            return self.device.type
        return f"{self.world.size} x {self.device.type} ({self.run.parallelism.kind})"

    def fit(self, interrupts: Interrupts) -> dict[str, Any]:
        """Train to the end; returns the row, which is also in result.json.

        status: finished | diverged (stopped before the update that would have used a non-finite loss) | preempted (a
        signal came; a checkpoint of this step is saved).
        """
        self.interrupts = interrupts
        logging = self.run.logging
        if not self.world.is_main:
            logging = dataclasses.replace(logging, wandb=False)
        self.mirror = WandbMirror(logging, self.folder, run_id(self.run), self.run.name, flatten(self.run))
        outcome: dict[str, Any] = {"status": "finished"}
        try:
            self._loop()
        except Interrupted as signal:
            outcome = {"status": "preempted", "error": f"stopped by {signal} at step {self.step}"}
        except Diverged as reason:
            outcome = {"status": "diverged", "error": str(reason), "diverged_at_step": self.step + 1}
            self._final_evaluation()
            self.row = {"step": self.step + 1} | reason.diagnostics  # what the update that was not made looked like
            self._write_row()
        finally:
            self.progress.close()
        if outcome["status"] == "preempted" or (outcome["status"] == "finished" and self.run.checkpoint.at_end):
            self._save()
        peak_bytes = int(self.processes.largest([peak_memory_bytes(self.device)])[0])
        return self.processes.on_main(lambda: self._end(self._result(outcome, peak_bytes)))

    def _end(self, row: dict[str, Any]) -> dict[str, Any]:
        self.folder.write_result(row)
        self.mirror.finish(row)
        return row

    def _loop(self) -> None:
        every = self.run.checkpoint.every_steps
        while True:
            self._close_row()
            if self.step == self.steps:
                return
            if self.step and (every and self.step % every == 0 or self.step in self.run.checkpoint.keep_steps):
                self._save()
            self._train_step()

    def _train_step(self) -> None:
        """Make one update, or raise Interrupted or Diverged with the weights untouched."""
        logging, batch = self.run.logging, self.run.batch
        self.clock.begin_step()
        update = self.updates.make(self.step, self.steps, self.interrupts)
        self.step += 1
        self.train_loss_last = update.train_loss
        self.clock.end_step()
        marks = {"skipped": True} if update.skipped else {}
        self.row = {"step": self.step} | update.diagnostics | marks
        if update.diagnostics or marks or self.step % logging.every_steps == 0 or self.step in (1, self.steps):
            self.row |= {
                "tokens": self.step * batch.tokens,
                "train_loss": update.train_loss,
                "train_z_loss": update.train_z_loss,
                "lr": update.lr,
                "grad_norm": update.grad_norm,
                "clip_coefficient": update.clip_coefficient,
                "tokens_per_second": self.clock.tokens_per_second(batch.tokens),
                "seconds": self.clock.wall_seconds,
            }

    def _close_row(self) -> None:
        """Evaluate if it is this step's turn, and write the step's record if it says anything."""
        if self.row is None:
            return
        every = self.run.evaluation.every_steps
        if self.step in (0, self.steps) or (every and self.step % every == 0):
            self.row |= self._evaluate(self._poll)
        self._write_row()

    def _poll(self) -> None:
        if self.processes.grouped:
            poll_all(self.processes, self.interrupts)
        else:
            self.interrupts.check()

    def _write_row(self) -> None:
        if len(self.row) > 1 and self.world.is_main:
            self.folder.write_metrics(self.row)
            self.progress.update(self.row)
            self.mirror.log(self.row)
        if "val_loss" in self.row:
            self.evaluations.append(self.row)
        self.row = None

    def _final_evaluation(self) -> None:
        """After a divergence: score the weights of the last update once more, if this step was not scored yet."""
        if not self.evaluations or self.evaluations[-1]["step"] != self.step:
            self.row = {"step": self.step} | self._evaluate(None)
            self._write_row()

    def _evaluate(self, poll: Callable[[], object] | None) -> dict[str, Any]:
        options = {"device": self.device, "precision": self.precision, "processes": self.processes, "poll": poll}
        losses = {name: evaluate(self.placed, sets, **options) for name, sets in self.validation_sets.items()}
        main, stream = losses[MAIN_SET], self.data.validation
        bpb = bits_per_byte(main, stream.n_tokens, stream.n_bytes)
        return {"val_loss": main, "val_bpb": bpb, "val_loss_by_set": losses}

    def _save(self) -> None:
        """Save a checkpoint of this step, with the step's record if it is still open."""
        self.processes.on_main(self.folder.check_held)
        plain = {
            "row": self.row,
            "train_loss_last": self.train_loss_last,
            "wall_seconds": self.clock.wall_seconds,
            "updates": self.updates.state(),
            **checkpoint.fingerprints(self.data),
            "plugins": hashes(self.run.plugins),
        }
        if self.run.parallelism.kind == "fsdp":
            tensors, shards = state.sharded_state(self.model, self.optimizer)
        else:
            tensors, shards = state.whole_state(self.model, self.optimizer, self.device), None
        where, keep = self.folder.checkpoints, self.run.checkpoint
        checkpoint.save(where, self.step, plain, tensors, keep, shards=shards, processes=self.processes)

    def _result(self, outcome: dict[str, Any], peak_bytes: int) -> dict[str, Any]:
        """The row that analysis reads."""
        n_tokens = self.step * self.run.batch.tokens
        rate, peak = self.clock.tokens_per_second(self.run.batch.tokens), peak_flops(self.device, self.precision)
        last = self.evaluations[-1] if self.evaluations else {}
        losses = [row["val_loss"] for row in self.evaluations]
        manifest = self.data.manifest
        row = empty_row(self.run) | outcome | dataclasses.asdict(self.counts) | checkpoint.fingerprints(self.data)
        return row | {
            "n_tokens": n_tokens,
            "steps": self.step,
            "steps_planned": self.steps,
            "epochs": self.batches.epochs(self.step),
            "flops_6nd": float(6 * self.counts.n_params * n_tokens),  # past 64 bits for large runs
            "flops": float(self.flops_per_token * n_tokens),
            "val_loss": last.get("val_loss") if outcome["status"] != "preempted" else None,
            "val_loss_initial": self.evaluations[0]["val_loss"] if self.evaluations else None,
            "val_loss_best": min((loss for loss in losses if loss is not None and math.isfinite(loss)), default=None),
            "val_bpb": last.get("val_bpb") if outcome["status"] != "preempted" else None,
            "val_loss_by_set": last.get("val_loss_by_set"),
            "train_loss_last": self.train_loss_last,
            "skipped_steps": self.updates.skipped,
            "unigram_entropy_nats": manifest.get("unigram_entropy_nats"),
            "entropy_rate_nats": manifest.get("entropy_rate_nats"),
            **summarize(self.run.diagnostics, read_metrics(self.folder.path / "metrics.jsonl"), self.step),
            "wall_seconds": self.clock.wall_seconds,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / (peak * self.world.size) if rate and peak else None,
            "peak_memory_bytes": peak_bytes,
            "restarts": self.restarts,
            "attention_impl": self.model.attention_impl,
            "qk_norm_impl": self.model.qk_norm_impl,
            "loss_impl": self.loss.impl,
            "precision": self.precision,
            "device": device_name(self.device),
            "world_size": self.world.size,
            "parallelism": self.run.parallelism.kind,
            "git_commit": self.git_commit,
            "versions": versions(),
        }
