"""One run: batch -> forward -> loss terms -> backward over micro-batches -> one clip -> one step -> records.

Everything a run computes is a function of its configuration and the step, so a run that was killed anywhere and
started again by the same command ends in the same bits as one that was not.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling_testbed.config.schema import RunConfig, flatten, run_folder_path, run_id
from scaling_testbed.data.batches import TrainingBatches, ValidationBatches
from scaling_testbed.data.preparation import prepare
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.learning.loss import IGNORE, choose_loss_impl, loss_terms
from scaling_testbed.learning.optimizers import build_optimizer, set_lr
from scaling_testbed.model.attention import check_impls
from scaling_testbed.model.counting import count_params, flops_per_token
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.running import checkpoint, records
from scaling_testbed.running.device import (
    autocast,
    choose_device,
    choose_precision,
    configure_torch,
    device_name,
    peak_flops,
    peak_memory_bytes,
)
from scaling_testbed.running.distributed import World, world_from_environment
from scaling_testbed.running.evaluation import bits_per_byte, evaluate
from scaling_testbed.running.interrupts import Interrupted, Interrupts
from scaling_testbed.running.progress import RunProgress

MAIN_SET = "validation"


class Diverged(Exception):
    """The loss or the gradient norm of the next update is not finite; the message says which."""


def train(run: RunConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train, or go on training, or find finished, the run that `run` describes; returns its row (result.json).

    Raises UserError for what a person can mend. Whatever else goes wrong is recorded as status failed and raised.
    """
    world = world_from_environment()
    folder = records.RunFolder(run_folder_path(run))
    if (row := folder.result()) and row["status"] in records.FINAL:
        return row
    with folder:
        try:
            trainer = Trainer(run, folder, world, quiet=quiet)
            with Interrupts() as interrupts:
                return trainer.fit(interrupts)
        except Exception as error:
            message = (str(error) or type(error).__name__).splitlines()[0]
            folder.write_result(empty_row(run) | {"status": "failed", "error": message})
            if isinstance(error, torch.OutOfMemoryError):
                hint = "set batch.micro_batch_sequences lower: it changes the memory, not the global batch"
                raise UserError(f"the device has too little memory for this run; {hint}") from error
            raise


def empty_row(run: RunConfig) -> dict[str, Any]:
    """A row with every field, filled with what is known before anything runs."""
    known = {
        "schema_version": records.SCHEMA_VERSION,
        "run_id": run_id(run),
        "name": run.name,
        "overrides": run.overrides,
        "seed": run.seed,
    }
    return dict.fromkeys(records.ROW_FIELDS) | known | {k: v for k, v in flatten(run).items() if "." in k}


class Trainer:
    """Holds one run's parts; `fit` runs it to its end, its divergence or a signal."""

    def __init__(self, run: RunConfig, folder: records.RunFolder, world: World, *, quiet: bool = False):
        self.run, self.folder, self.world = run, folder, world
        configure_torch(run.compute)
        self.device = choose_device(run.compute, world.local_rank)
        self.precision = choose_precision(run.compute, self.device)
        # What cannot run is refused before data is prepared; `auto` is decided once, and the row records for what.
        self.loss = dataclasses.replace(run.loss, impl=choose_loss_impl(run.loss, self.device))
        check_impls(run.model, self.device)
        data_dir = Path(run.data_dir)
        self.data = open_prepared(
            prepare(run.data, run.tokenizer, data_dir=data_dir, workers=run.data_workers, quiet=quiet)
        )
        self._build_model()
        self.batches = TrainingBatches(
            self.data.train,
            sequence_length=run.batch.sequence_length,
            sequences=run.batch.sequences,
            seed=run.seed,
        )
        self.validation_sets = self._open_validation_sets()
        self.step = 0  # updates made
        self.row: dict[str, Any] | None = {"step": 0}  # this step's record while it is still open
        self.evaluations: list[dict[str, Any]] = []
        self.train_loss_last: float | None = None
        self.wall_seconds = self.timed_seconds = 0.0
        self.timed_steps = 0
        self._resume()
        self._announce(quiet)

    def _build_model(self) -> None:
        run = self.run
        config = run.model.resolved(self.data.vocab_size)
        self.counts = count_params(config)
        self.steps = run.budget.resolve_steps(self.counts, run.batch.tokens)
        self.flops_per_token = flops_per_token(config, run.batch.sequence_length)
        self.model = Transformer(config, run.parametrization, device=self.device)
        self.model.init_weights(run.seed)
        self.optimizer = build_optimizer(run.optimizer, self.model)
        if run.compute.compile:
            self.model.compile()

    def _open_validation_sets(self) -> dict[str, ValidationBatches]:
        run = self.run
        streams = {MAIN_SET: self.data.validation}
        for name, path in run.evaluation.sets.items():
            other = open_prepared(Path(path))
            if name == MAIN_SET:
                raise ConfigError(f"evaluation.sets.{name}: this is the name of the run's own set; choose another")
            if _vocabulary(other) != _vocabulary(self.data):
                raise ConfigError(f"evaluation.sets.{name}: {path} has another tokenizer than {self.data.folder}")
            streams[name] = other.validation
        rows = run.evaluation.rows or run.batch.micro_batch_sequences or run.batch.sequences
        length, tokens = run.batch.sequence_length, int(run.evaluation.tokens)
        return {
            name: ValidationBatches(stream, sequence_length=length, max_tokens=tokens, rows=rows)
            for name, stream in streams.items()
        }

    def _resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one, and cut metrics.jsonl back to it."""
        found = checkpoint.load_latest(self.folder.checkpoints)
        if found is not None:
            self._check_same_data(found.state)
            self.model.load_state_dict(found.tensors["model"])
            self.optimizer.load_state_dict(found.tensors["optimizer"])
            torch.set_rng_state(found.tensors["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in found.tensors["rng"]:
                torch.cuda.set_rng_state(found.tensors["rng"]["cuda"], self.device)
            self.step, self.row = found.step, found.state["row"]
            self.train_loss_last = found.state["train_loss_last"]
            self.wall_seconds = found.state["wall_seconds"]
        else:
            torch.manual_seed(self.run.seed)
        environment = records.environment(device_name(self.device), self.precision)
        self.restarts = self.folder.start(dataclasses.asdict(self.run), environment)
        self.git_commit = environment["git"]["commit"]
        kept = self.folder.open_metrics(keep_before=self.step + (self.row is None))
        self.evaluations = [row for row in kept if "val_loss" in row]

    def _check_same_data(self, state: dict[str, Any]) -> None:
        for key, now in self._fingerprints().items():
            if state[key] != now:
                raise UserError(
                    f"{self.folder.path} was trained on other data: its {key} is {state[key]}, that of "
                    f"{self.data.folder} is {now}; restore the data, or start a run of another name="
                )

    def _fingerprints(self) -> dict[str, Any]:
        return {
            "data_fingerprint": self.data.fingerprint,
            "tokenizer_fingerprint": self.data.tokenizer_fingerprint,
        }

    def _announce(self, quiet: bool) -> None:
        run, config, counts = self.run, self.model.config, self.counts
        self.progress = RunProgress(self.steps, self.step, line_every=run.logging.line_every_steps, quiet=quiet)
        self.progress.say(
            f"run {self.folder.path}: {config.name}, {counts.n_params:,} parameters "
            f"({counts.n_params_non_embedding:,} without embedding and head), on {self.device.type} in {self.precision}"
        )
        self.progress.say(
            f"{self.steps:,} steps of {run.batch.tokens:,} tokens, {self.batches.epochs(self.steps):.2f} epochs of "
            f"{self.data.folder}; attention {self.model.attention_impl}, qk-norm {self.model.qk_norm_impl}, "
            f"loss {self.loss.impl}"
        )
        if self.step:
            self.progress.say(f"resumed at step {self.step:,} (start {self.restarts + 1} of this run)")

    def fit(self, interrupts: Interrupts) -> dict[str, Any]:
        """Train to the end; returns the row, which is also in result.json.

        status: finished | diverged (stopped before the update that would have used a non-finite loss) | preempted (a
        signal came; a checkpoint of this step is saved).
        """
        self.interrupts = interrupts
        self.mirror = records.WandbMirror(
            self.run.logging, self.folder, run_id(self.run), self.run.name, flatten(self.run)
        )
        self._began = time.monotonic()
        outcome: dict[str, Any] = {"status": "finished"}
        try:
            self._loop()
        except Interrupted as signal:
            outcome = {"status": "preempted", "error": f"stopped by {signal} at step {self.step}"}
        except Diverged as reason:
            outcome = {"status": "diverged", "error": str(reason), "diverged_at_step": self.step + 1}
            self._final_evaluation()
        finally:
            self.progress.close()
        if outcome["status"] == "preempted" or (outcome["status"] == "finished" and self.run.checkpoint.at_end):
            self._save()
        row = self._result(outcome)
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
        run, began = self.run, time.monotonic()
        batch_BS = self.batches.batch(self.step, self.world.rank, self.world.size)
        ce, z_loss, n_tokens = self._forward_backward(batch_BS)
        if not math.isfinite(ce + z_loss):
            raise Diverged("the training loss is not finite")
        grad_norm = self._clip()
        if not math.isfinite(grad_norm):
            raise Diverged("the gradient norm is not finite")
        lr = run.schedule.lr(self.step, self.steps, run.optimizer.lr)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.train_loss_last = ce / n_tokens
        self._count_time(time.monotonic() - began)
        self.row = {"step": self.step}
        if self.step % run.logging.every_steps == 0 or self.step in (1, self.steps):
            clip = run.optimizer.clip_norm
            self.row |= {
                "tokens": self.step * run.batch.tokens,
                "train_loss": ce / n_tokens,
                "train_z_loss": z_loss / n_tokens,
                "lr": lr,
                "grad_norm": grad_norm,
                "clip_coefficient": 1.0 if clip is None else min(1.0, clip / (grad_norm + 1e-6)),
                "tokens_per_second": self._tokens_per_second(),
                "seconds": self._wall(),
            }

    def _forward_backward(self, batch_BS: np.ndarray) -> tuple[float, float, int]:
        """Accumulate the gradient of the mean loss over the batch's valid tokens; returns sums of ce and z-loss.

        Every micro-batch is divided by the valid tokens of the whole batch, so that the split changes nothing.
        """
        n_tokens = int(np.count_nonzero(batch_BS[:, 1:] != IGNORE))
        rows = self.run.batch.micro_batch_sequences or len(batch_BS)
        ce = z_loss = torch.zeros((), device=self.device)
        for begin in range(0, len(batch_BS), rows):
            self.interrupts.check()
            tokens_BS = torch.from_numpy(batch_BS[begin : begin + rows]).to(self.device)
            with autocast(self.device, self.precision):
                hidden_BTD = self.model(tokens_BS[:, :-1])
                terms = loss_terms(
                    self.loss,
                    hidden_BTD.flatten(0, 1),
                    self.model.head_weight_VD,
                    tokens_BS[:, 1:].flatten(),
                    softcap=self.model.config.final_softcap,
                )
            (terms.loss / n_tokens).backward()
            ce, z_loss = ce + terms.ce, z_loss + terms.z_loss
        return ce.item(), z_loss.item(), n_tokens

    def _clip(self) -> float:
        """Clip the global gradient norm if a limit is set; returns the norm before."""
        limit = self.run.optimizer.clip_norm
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit).item()

    def _close_row(self) -> None:
        """Evaluate if it is this step's turn, and write the step's record if it says anything."""
        if self.row is None:
            return
        every = self.run.evaluation.every_steps
        if self.step in (0, self.steps) or (every and self.step % every == 0):
            self.row |= self._evaluate(self.interrupts)
        self._write_row()

    def _write_row(self) -> None:
        if len(self.row) > 1:
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

    def _evaluate(self, interrupts: Interrupts | None) -> dict[str, Any]:
        losses = {
            name: evaluate(
                self.model,
                batches,
                self.loss,
                device=self.device,
                precision=self.precision,
                interrupts=interrupts,
            )
            for name, batches in self.validation_sets.items()
        }
        main, stream = losses[MAIN_SET], self.data.validation
        bpb = bits_per_byte(main, stream.n_tokens, stream.n_bytes)
        return {"val_loss": main, "val_bpb": bpb, "val_loss_by_set": losses}

    def _save(self) -> None:
        """Save a checkpoint of this step, with the step's record if it is still open."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "row": self.row,
            "train_loss_last": self.train_loss_last,
            "wall_seconds": self._wall(),
            **self._fingerprints(),
        }
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": rng}
        checkpoint.save(self.folder.checkpoints, self.step, state, tensors, self.run.checkpoint)

    def _wall(self) -> float:
        return self.wall_seconds + time.monotonic() - self._began

    def _count_time(self, seconds: float) -> None:
        self.timed_steps += 1
        if self.timed_steps > 1:  # the first step of a process compiles, allocates and warms caches
            self.timed_seconds += seconds

    def _tokens_per_second(self) -> float | None:
        if self.timed_steps < 2:
            return None
        return (self.timed_steps - 1) * self.run.batch.tokens / self.timed_seconds

    def _result(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """The row that analysis reads."""
        n_tokens = self.step * self.run.batch.tokens
        rate, peak = self._tokens_per_second(), peak_flops(self.device, self.precision)
        last = self.evaluations[-1] if self.evaluations else {}
        losses = [row["val_loss"] for row in self.evaluations]
        manifest = self.data.manifest
        row = empty_row(self.run) | outcome | dataclasses.asdict(self.counts) | self._fingerprints()
        return row | {
            "n_tokens": n_tokens,
            "steps": self.step,
            "steps_planned": self.steps,
            "epochs": self.batches.epochs(self.step),
            "flops_6nd": 6 * self.counts.n_params * n_tokens,
            "flops": self.flops_per_token * n_tokens,
            "val_loss": last.get("val_loss") if outcome["status"] != "preempted" else None,
            "val_loss_initial": self.evaluations[0]["val_loss"] if self.evaluations else None,
            "val_loss_best": min((loss for loss in losses if loss is not None and math.isfinite(loss)), default=None),
            "val_bpb": last.get("val_bpb") if outcome["status"] != "preempted" else None,
            "val_loss_by_set": last.get("val_loss_by_set"),
            "train_loss_last": self.train_loss_last,
            "unigram_entropy_nats": manifest.get("unigram_entropy_nats"),
            "entropy_rate_nats": manifest.get("entropy_rate_nats"),
            "wall_seconds": self._wall(),
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / peak if rate and peak else None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "restarts": self.restarts,
            "attention_impl": self.model.attention_impl,
            "qk_norm_impl": self.model.qk_norm_impl,
            "loss_impl": self.loss.impl,
            "precision": self.precision,
            "device": device_name(self.device),
            "git_commit": self.git_commit,
            "versions": records.versions(),
        }


def _vocabulary(data: PreparedData) -> tuple[str | None, int]:
    """What two corpora must share for one model to be scored on both."""
    return data.tokenizer_fingerprint, data.vocab_size
