"""One update: batch -> forward -> loss terms -> backward over micro-batches -> one clip -> one optimizer step."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from scaling_testbed.config.memory import divisors
from scaling_testbed.config.run import RunConfig
from scaling_testbed.errors import UserError, bytes_asked_for, is_memory_error
from scaling_testbed.learning.loss import IGNORE
from scaling_testbed.learning.optimizers import clip_coefficient, set_lr
from scaling_testbed.processes.device import autocast, free_memory_bytes
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.training.parts import Parts

MIB = 2**20


class Diverged(Exception):
    """The loss or the gradient norm of the next update is not finite; the message says which. diagnostics: the values
    measured for this update."""

    def __init__(self, message: str, diagnostics: dict[str, float]):
        super().__init__(message)
        self.diagnostics = diagnostics


@dataclass(frozen=True, kw_only=True)
class Update:
    """The result of one update. Losses are means over the valid tokens of the global batch, in nats; grad_norm is the
    norm before clipping. skipped: whether an intervention did not allow the update, so that it was left out.
    diagnostics: the values measured before and after it, by name."""

    train_loss: float
    train_z_loss: float
    lr: float
    grad_norm: float
    clip_coefficient: float
    skipped: bool
    diagnostics: dict[str, float] = field(default_factory=dict)


class TooLittleMemory(UserError):
    """A forward or backward pass found too little memory. The weights are unchanged. The message has the micro-batch to
    try."""


def too_little_memory(parts: Parts | None, run: RunConfig, rows: int, error: BaseException) -> TooLittleMemory:
    """The error for a person, where `error` came with micro-batches of `rows` sequences. parts: None if they are not
    built yet."""
    asked, where = bytes_asked_for(error), "the device"
    free = None
    if parts is not None:
        where = "the GPU" if parts.device.type == "cuda" else "this machine (or the limit of this process)"
        free = free_memory_bytes(parts.device)
    told = [f"{asked / MIB:,.0f} MiB more were asked for"] if asked is not None else []
    told += [f"{free / MIB:,.0f} MiB are free"] if free is not None else []
    said = f"{where} has too little memory for micro-batches of {rows} sequences"
    said += f" ({', '.join(told)})" if told else ""
    if (fewer := smaller_micro_batch(rows)) is not None:
        return TooLittleMemory(
            f"{said}; try batch.micro_batch_sequences={fewer}, which changes the memory and not the global batch"
        )
    recompute = "" if run.parallelism.activation_checkpointing else "parallelism.activation_checkpointing=1, "
    return TooLittleMemory(f"{said}; try {recompute}a smaller batch.sequence_length, or a smaller model")


def smaller_micro_batch(rows: int) -> int | None:
    """Half of a micro-batch of `rows` sequences, or the next smaller one that divides it; None if there is none."""
    return next((fewer for fewer in divisors(rows) if fewer <= rows // 2), None)


def make_update(parts: Parts, step: int, interrupts: Interrupts, rows: int) -> Update:
    """Make update number `step` (from 0) of a run, or leave it out if an intervention does not allow it.

    rows: sequences in a micro-batch of this process. Raises Interrupted, Diverged or TooLittleMemory; the weights are
    then unchanged. The loop over micro-batches is in this function, so
    that the model comes directly below it in a traceback or a profile.
    """
    run, optimizer, processes = parts.run, parts.optimizer, parts.processes
    processes.step = step
    interventions = list(parts.interventions.values())
    measured = run.diagnostics.is_due(step + 1, parts.steps)
    batch_BS = parts.batches.batch(step, processes.world.rank, processes.world.size)
    # The loss of every micro-batch is divided by the valid tokens of the whole batch, so the split changes nothing.
    n_tokens = int(np.count_nonzero(batch_BS[:, 1:] != IGNORE))
    if processes.grouped:
        n_tokens = poll_all(processes, interrupts, n_tokens)
    ce = z_loss = torch.zeros((), device=parts.device)
    try:
        found = parts.measurement.forward(batch_BS, rows) if measured else {}
        for begin in range(0, len(batch_BS), rows):
            if not processes.grouped:
                interrupts.check()
            tokens_BS = torch.from_numpy(batch_BS[begin : begin + rows]).to(parts.device)
            with parts.placed.accumulating(last=begin + rows >= len(batch_BS)):
                with autocast(parts.device, parts.precision):
                    terms = parts.placed.forward(tokens_BS)
                # Gradients are averaged over ranks, while each rank's loss is its part of a sum.
                (terms.loss / (n_tokens / processes.world.size)).backward()
            ce, z_loss = ce + terms.ce, z_loss + terms.z_loss
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_memory_error(error):
            raise
        optimizer.zero_grad(set_to_none=True)
        raise too_little_memory(parts, run, rows, error) from None
    ce_sum, z_loss_sum = processes.sum([ce.item(), z_loss.item()])
    if not math.isfinite(ce_sum + z_loss_sum):
        raise Diverged("the training loss is not finite", found)

    for intervention in interventions:
        intervention.after_backward()
    if measured:
        found |= parts.measurement.gradients()
    grad_norm = clip_gradients(parts)
    if not math.isfinite(grad_norm):
        raise Diverged("the gradient norm is not finite", found)
    lr = run.schedule.lr(step, parts.steps, run.optimizer.lr)
    set_lr(optimizer, lr)
    # All interventions are asked, even after a refusal, because each updates its state.
    made = all([intervention.allows(ce_sum / n_tokens, grad_norm) for intervention in interventions])
    if made:
        optimizer.step()
        if measured:
            found |= parts.measurement.updates(run.optimizer, optimizer, found)
    for intervention in interventions:
        intervention.after_update(made)
    optimizer.zero_grad(set_to_none=True)
    return Update(
        train_loss=ce_sum / n_tokens,
        train_z_loss=z_loss_sum / n_tokens,
        lr=lr,
        grad_norm=grad_norm,
        clip_coefficient=clip_coefficient(grad_norm, run.optimizer.clip_norm),
        skipped=not made,
        diagnostics=found,
    )


def clip_gradients(parts: Parts) -> float:
    """Clip the global gradient norm if a limit is set. Returns the norm before clipping."""
    limit = parts.run.optimizer.clip_norm
    norm = torch.nn.utils.clip_grad_norm_(parts.model.parameters(), math.inf if limit is None else limit)
    if parts.run.parallelism.is_sharded:
        from torch.distributed.tensor import DTensor

        assert isinstance(norm, DTensor)
        norm = norm.full_tensor()
    return norm.item()


def poll(processes: Processes, interrupts: Interrupts) -> None:
    """Raise Interrupted if a signal has come to this process, or to any process of the group."""
    if processes.grouped:
        poll_all(processes, interrupts)
    else:
        interrupts.check()


def poll_all(processes: Processes, interrupts: Interrupts, n_tokens: int = 0) -> int:
    """Raise Interrupted on all ranks if a signal has come to any, else return the sum of `n_tokens`. Called in each
    step and in each round of an evaluation, so that all ranks stop at the same place."""
    total, *signals = processes.sum([n_tokens, *interrupts.counts()])
    interrupts.check_counts(signals)
    return int(total)
