"""One update: batch -> forward -> loss terms -> backward over micro-batches -> one clip -> one optimizer step."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import TrainingBatches
from scaling_testbed.learning.loss import IGNORE
from scaling_testbed.learning.optimizers import clip_coefficient, set_lr
from scaling_testbed.learning.interventions.qk_clip import clip_queries_and_keys, record_logits, take_largest_logits
from scaling_testbed.learning.interventions.spikes import SpikeFilter
from scaling_testbed.processes.device import autocast
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.placement import Replica
from scaling_testbed.training.measurement import Measurement


class Diverged(Exception):
    """The loss or the gradient norm of the next update is not finite; the message says which. diagnostics: what was
    measured of it."""

    def __init__(self, message: str, diagnostics: dict[str, float]):
        super().__init__(message)
        self.diagnostics = diagnostics


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update that was made. Losses are means over the valid tokens of the global batch, in nats; grad_norm is that
    before clipping. skipped: it was left out as a spike. diagnostics: what was measured around it, by name."""

    train_loss: float
    train_z_loss: float
    lr: float
    grad_norm: float
    clip_coefficient: float
    skipped: bool
    diagnostics: dict[str, float] = field(default_factory=dict)


class Updates:
    """Makes the updates of a run that is placed on its devices."""

    def __init__(
        self,
        run: RunConfig,
        placed: Replica,
        optimizer: torch.optim.Optimizer,
        batches: TrainingBatches,
        processes: Processes,
        device: torch.device,
        precision: str,
    ):
        self.run, self.placed, self.optimizer, self.batches = run, placed, optimizer, batches
        self.processes, self.world = processes, processes.world
        self.device, self.precision = device, precision
        self.model = placed.plain.model
        sigmas, window = run.optimizer.skip_spikes_sigmas, run.optimizer.skip_spikes_window
        self._spikes = None if sigmas is None else SpikeFilter(sigmas, window)
        if run.optimizer.qk_clip is not None:
            record_logits(self.model)
        self.measurement = Measurement(run.diagnostics, run.parallelism, placed, processes, device, precision)

    def make(self, step: int, steps: int, interrupts: Interrupts) -> Update:
        """Make update number `step` (from 0) of `steps`, or leave it out as a spike; or raise Interrupted or Diverged
        with the weights untouched."""
        run, measured = self.run, self.run.diagnostics.is_due(step + 1, steps)
        batch_BS = self.batches.batch(step, self.world.rank, self.world.size)
        rows = run.batch.micro_batch_sequences or len(batch_BS)
        found = self.measurement.forward(batch_BS, rows) if measured else {}
        ce, z_loss, n_tokens = self._forward_backward(batch_BS, rows, interrupts)
        if not math.isfinite(ce + z_loss):
            raise Diverged("the training loss is not finite", found)
        if measured:
            found |= self.measurement.gradients()
        grad_norm = self._clip()
        if not math.isfinite(grad_norm):
            raise Diverged("the gradient norm is not finite", found)
        lr = run.schedule.lr(step, steps, run.optimizer.lr)
        set_lr(self.optimizer, lr)
        skipped = self._is_skipped(ce / n_tokens, grad_norm)
        if not skipped:
            self.optimizer.step()
            if measured:
                found |= self.measurement.updates(self.optimizer, found)
        self._after_update(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(
            train_loss=ce / n_tokens,
            train_z_loss=z_loss / n_tokens,
            lr=lr,
            grad_norm=grad_norm,
            clip_coefficient=clip_coefficient(grad_norm, run.optimizer.clip_norm),
            skipped=skipped,
            diagnostics=found,
        )

    @property
    def skipped(self) -> int | None:
        """How many updates were left out as spikes; None where none is looked for."""
        return self._spikes and self._spikes.skipped

    def state(self) -> dict:
        """Plain data from which `restore` goes on with the same decisions."""
        return {"spikes": self._spikes and self._spikes.state()}

    def restore(self, state: dict) -> None:
        if self._spikes is not None:
            self._spikes.restore(state["spikes"])

    def _is_skipped(self, loss: float, grad_norm: float) -> bool:
        """Whether the update at hand is left out as a spike, on all ranks or on none."""
        if self._spikes is None:
            return False
        skipped = bool(self.processes.largest([self._spikes.is_spike(loss, grad_norm)])[0])
        self._spikes.record(loss, grad_norm, skipped=skipped)
        return skipped

    def _after_update(self, skipped: bool) -> None:
        """What else changes with the weights; nothing where they did not."""
        limit = self.run.optimizer.qk_clip
        if limit is not None:
            largest = self.processes.largest(take_largest_logits(self.model))
            if not skipped:
                clip_queries_and_keys(self.model, limit, largest)
        if not skipped:
            self.model.follow_weights()

    def _forward_backward(self, batch_BS: np.ndarray, rows: int, interrupts: Interrupts) -> tuple[float, float, int]:
        """Accumulate the gradient of the mean loss over the batch's valid tokens; returns sums of ce and z-loss.

        Every micro-batch is divided by the valid tokens of the whole batch, so that the split changes nothing.
        """
        n_tokens = int(np.count_nonzero(batch_BS[:, 1:] != IGNORE))
        if self.processes.grouped:
            n_tokens = poll_all(self.processes, interrupts, n_tokens)
        ce = z_loss = torch.zeros((), device=self.device)
        for begin in range(0, len(batch_BS), rows):
            if not self.processes.grouped:
                interrupts.check()
            tokens_BS = torch.from_numpy(batch_BS[begin : begin + rows]).to(self.device)
            with self.placed.accumulating(last=begin + rows >= len(batch_BS)):
                with autocast(self.device, self.precision):
                    terms = self.placed.forward(tokens_BS)
                # Gradients are averaged over ranks, while each rank's loss is its part of a sum.
                (terms.loss / (n_tokens / self.world.size)).backward()
            ce, z_loss = ce + terms.ce, z_loss + terms.z_loss
        return *self.processes.sum([ce.item(), z_loss.item()]), n_tokens

    def _clip(self) -> float:
        """Clip the global gradient norm if a limit is set; returns the norm before."""
        limit = self.run.optimizer.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        return (norm.full_tensor() if self.run.parallelism.kind == "fsdp" else norm).item()


def poll_all(processes: Processes, interrupts: Interrupts, n_tokens: int = 0) -> int:
    """Ask all ranks whether a signal has come, once a step and once a round of an evaluation, so that all stop at the
    same place. Returns the sum of `n_tokens`; raises Interrupted."""
    total, *signals = processes.sum([n_tokens, *interrupts.counts()])
    interrupts.check_counts(signals)
    return int(total)
