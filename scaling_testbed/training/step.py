"""One update: batch -> forward -> loss terms -> backward over micro-batches -> one clip -> one optimizer step.

On a GPU the loss and the gradient norm of an update are read some updates later (Parts.ahead), so that the GPU does not
wait for the host. From the first update on whose loss or norm is not finite, no update changes a weight or a moment
(Parts.bad).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from scaling_testbed.config.memory import divisors
from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.cutting import Batch
from scaling_testbed.errors import UserError, bytes_asked_for, is_memory_error
from scaling_testbed.learning.optimizers import clip_coefficient, clip_divisor, set_lr
from scaling_testbed.processes.device import HostCopy, autocast, free_memory_bytes, in_fp64, to_device
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
    norm before clipping. train_objective: None if the objective is the cross-entropy. skipped: whether an intervention
    did not allow the update, so that it was left out. diagnostics: the values measured before and after it, by name."""

    train_loss: float
    train_z_loss: float
    train_objective: float | None
    lr: float
    grad_norm: float
    clip_coefficient: float
    skipped: bool
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an update starts from. step: its number, from 0. batch: this process's slice of the batch, on the device.
    n_tokens: the targets of the global batch. lr: the rate of the schedule; a scalar tensor on the device if the step
    is captured in a graph."""

    step: int
    batch: Batch
    n_tokens: int
    lr: float | torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Made:
    """An update that is made, or queued on the device.

    values: the sums over the global batch of cross-entropy, z-loss and objective (_n_sums), then in a group what its
    processes tell each other (_of_group), then the gradient norm; fp64. n_tokens: the targets of the global batch.
    """

    values: torch.Tensor
    n_tokens: int
    skipped: bool
    diagnostics: dict[str, float]


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


def rate(parts: Parts, step: int) -> float:
    """The learning rate of update number `step` (from 0)."""
    run = parts.run
    share = run.start.share_of_rate(step)
    return share * run.schedule.lr(step, parts.steps, run.optimizer.lr, run.batch.tokens)


def inputs(parts: Parts, step: int) -> Inputs:
    """The inputs of update number `step` (from 0)."""
    world = parts.processes.world
    batch = parts.batches.batch(step, world.rank, world.size).map(lambda x: to_device(x, parts.device))
    return Inputs(step=step, batch=batch, n_tokens=parts.batches.targets(step), lr=rate(parts, step))


def make_update(parts: Parts, given: Inputs, interrupts: Interrupts, rows: int) -> Made:
    """Make an update, or leave it out if an intervention does not allow it.

    rows: sequences in a micro-batch of this process. The host waits for the values of the update only if the update is
    measured, or if parts.bad is None. Raises Interrupted, Diverged or TooLittleMemory; the weights are then unchanged.
    The loop over micro-batches is in this function, so that the model comes directly below it in a traceback or a
    profile.
    """
    run, optimizer, processes = parts.run, parts.optimizer, parts.processes
    processes.step = given.step
    interventions = list(parts.interventions.values())
    measured = is_measured(parts, given.step)
    at_once = measured or parts.bad is None
    n_tokens = given.n_tokens
    divisor = parts.objective.divisor or n_tokens
    ce = z_loss = objective = torch.zeros((), device=parts.device)
    for intervention in interventions:
        intervention.before_update(given.step, parts.steps)
    try:
        found = parts.measurement.forward(given.batch, rows) if measured else {}
        micro_batches = given.batch.split(rows)
        for number, micro_batch in enumerate(micro_batches, 1):
            if not processes.grouped:
                interrupts.check()
            with parts.placed.accumulating(last=number == len(micro_batches)):
                with autocast(parts.device, parts.precision):
                    terms = parts.placed.forward(*micro_batch.tensors, beside=micro_batch.beside)
                # Gradients are averaged over ranks, while each rank's loss is its part of a sum.
                (terms.loss / (divisor / processes.world.size)).backward()
            ce, z_loss = ce + terms.ce, z_loss + terms.z_loss
            objective = objective + (terms.ce if terms.objective is None else terms.objective.detach())
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_memory_error(error):
            raise
        optimizer.zero_grad(set_to_none=True)
        raise too_little_memory(parts, run, rows, error) from None
    here = [ce, z_loss, objective][: _n_sums(run)]
    sums = processes.sum_here(torch.stack(here), _of_group(parts, given.step, interrupts))
    if at_once:
        ce_sum, *others = sums[: len(here)].tolist()
        check_finite(ce_sum + sum(others), 0.0, found)

    for intervention in interventions:
        intervention.after_backward()
    if measured:
        found |= parts.measurement.gradients()
    norm = clip_gradients(parts)
    made = True
    if at_once:
        grad_norm = norm.item()
        check_finite(0.0, grad_norm, found)
        # All interventions are asked, even after a refusal, because each updates its state.
        made = all([intervention.allows(ce_sum / n_tokens, grad_norm) for intervention in interventions])
    if parts.bad is not None:
        parts.bad.copy_(torch.maximum(parts.bad, (~torch.isfinite(sums.sum() + norm)).float()))
    set_lr(optimizer, given.lr)
    if made:
        optimizer.step()
        if measured:
            found |= parts.measurement.updates(run.optimizer, optimizer, found)
    for intervention in interventions:
        intervention.after_update(made)
    optimizer.zero_grad(set_to_none=True)
    values = torch.cat([sums, in_fp64(norm).reshape(1)])
    return Made(values=values, n_tokens=n_tokens, skipped=not made, diagnostics=found)


def _n_sums(run: RunConfig) -> int:
    """How many sums of a step the host reads: those of cross-entropy and z-loss, and that of another objective."""
    return 2 if run.objective.is_cross_entropy else 3


def _of_group(parts: Parts, step: int, interrupts: Interrupts) -> list[int]:
    """What a process of a group tells the others in update number `step`: its signals, and in a run with budget.hours
    last whether rank 0 has to end it by its clock."""
    if not parts.processes.grouped:
        return []
    is_due = [int(parts.processes.world.is_main and parts.length.is_due(step))] if parts.length.by_clock else []
    return [*interrupts.counts(), *is_due]


def check_finite(loss: float, grad_norm: float, diagnostics: dict[str, float]) -> None:
    """Raise Diverged if the sum of the loss terms or the gradient norm of an update is not finite."""
    for what, value in (("training loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise Diverged(f"the {what} is not finite", diagnostics)


def is_measured(parts: Parts, step: int) -> bool:
    """Whether the diagnostics of update number `step` (from 0) are measured."""
    return parts.run.diagnostics.is_due(step + 1, parts.steps)


def clip_gradients(parts: Parts) -> torch.Tensor:
    """Clip the global gradient norm if a limit is set, or let the optimizer's step clip it (OptimizerConfig.
    clips_in_step). Returns the norm before clipping, a scalar on the device."""
    config = parts.run.optimizer
    if not config.clips_in_step:
        limit = math.inf if config.clip_norm is None else config.clip_norm
        return _whole(parts, torch.nn.utils.clip_grad_norm_(parts.parameters, limit))
    gradients = [parameter.grad for parameter in parts.parameters if parameter.grad is not None]
    norm = _whole(parts, torch.nn.utils.get_total_norm(gradients))
    parts.optimizer.grad_scale = clip_divisor(norm, config.clip_norm)  # type: ignore[attr-defined]  # as GradScaler does
    return norm


def _whole(parts: Parts, norm: torch.Tensor) -> torch.Tensor:
    """The norm over the shards of all processes."""
    if not parts.run.parallelism.is_sharded:
        return norm
    from torch.distributed.tensor import DTensor

    assert isinstance(norm, DTensor)
    return norm.full_tensor()


class Queue:
    """The updates of a start that are made, the oldest first, and whose values the host has not read.

    made: the number of updates made, over all starts. is_due: whether rank 0 of a group has to end the run by its
    clock, as the values say that were read last.
    """

    def __init__(self, parts: Parts, made: int):
        self.made = made
        self.is_due = False
        self._parts = parts
        self._waiting: deque[tuple[Made, HostCopy]] = deque()
        self._closed = False
        self._signals: Sequence[float] = ()

    @property
    def is_empty(self) -> bool:
        """Whether every value is read."""
        return not self._waiting

    def has_room(self, interrupts: Interrupts, needs_host: Callable[[int], bool]) -> bool:
        """Whether the next update can be made before a value is read.

        needs_host: number of updates -> whether the host works with the weights after so many. Raises Interrupted when
        every value is read, if a signal came to a process of the group.
        """
        if self.is_empty:
            self._closed = False
            if self._signals:
                interrupts.check_counts(self._signals)
            return True
        free = len(self._waiting) <= self._parts.ahead and not self._closed
        return free and not needs_host(self.made) and not is_measured(self._parts, self.made)

    def add(self, made: Made) -> None:
        """Add the next update. Its values travel to the host when they are computed."""
        self._waiting.append((made, HostCopy(made.values)))
        self.made += 1

    def close(self) -> bool:
        """Have no room until every value is read. Returns whether there is one to read."""
        self._closed = not self.is_empty
        return self._closed

    def read(self) -> Update:
        """Wait for the values of the oldest update and return them. Raises Diverged if one is not finite."""
        made, copy = self._waiting.popleft()
        *values, grad_norm = copy.read()
        n_sums = _n_sums(self._parts.run)
        (ce_sum, z_loss_sum, *objective), signals = values[:n_sums], values[n_sums:]
        check_finite(sum(values[:n_sums]), grad_norm, made.diagnostics)
        if signals and self._parts.length.by_clock:
            self.is_due = bool(signals.pop())
        if any(signals):  # all processes of the group read them here, and stop after the same update
            self._signals = signals
            self.close()
        step = self.made - len(self._waiting) - 1
        return Update(
            train_loss=ce_sum / made.n_tokens,
            train_z_loss=z_loss_sum / made.n_tokens,
            train_objective=objective[0] / (self._parts.objective.divisor or made.n_tokens) if objective else None,
            lr=rate(self._parts, step),
            grad_norm=grad_norm,
            clip_coefficient=clip_coefficient(grad_norm, self._parts.run.optimizer.clip_norm),
            skipped=made.skipped,
            diagnostics=made.diagnostics,
        )


def poll(processes: Processes, interrupts: Interrupts) -> None:
    """Raise Interrupted if a signal has come to this process, or to any process of the group, which all stop at the
    same place. Called in each round of an evaluation."""
    if processes.grouped:
        interrupts.check_counts(processes.sum(interrupts.counts()))
    else:
        interrupts.check()
