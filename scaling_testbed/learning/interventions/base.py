"""Interventions act on the steps of a run in addition to the update. No torch here, so that a grid can be planned.

An intervention is a class in its own file, registered by name:

    @INTERVENTIONS.register("gradient_noise")
    class GradientNoise(Intervention):
        def __init__(self, std: float = 0.01): ...
        def after_backward(self): ...

`+interventions.gradient_noise.std=0.1` switches it on. The keys under its name are the arguments of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_testbed.registry import Registry

if TYPE_CHECKING:
    import torch

    from scaling_testbed.learning.optimizers import OptimizerConfig
    from scaling_testbed.model.config import ModelConfig
    from scaling_testbed.model.transformer import Transformer

INTERVENTIONS: Registry[type[Intervention]] = Registry("intervention")


@dataclass(frozen=True, kw_only=True)
class Context:
    """The parts of a run that an intervention can use, in each process.

    model, optimizer: the model and optimizer in training. sum, largest: elementwise reductions over the processes, in
    float64. Every process must call them the same number of times.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer
    sum: Callable[[Sequence[float]], list[float]]
    largest: Callable[[Sequence[float]], list[float]]


class Intervention:
    """The base of all interventions, which does nothing.

    Every step calls `before_update`, `after_backward`, `allows` and `after_update`, in this order.

    key              the configuration key that switches it on; None: its name under `interventions`
    needs_whole_tensors
                     the reason why it cannot act on a sharded model (parallelism=fsdp); None: it can
    not_averaged     the reason why the weights of different steps cannot be averaged with it; None: they can
    follows_weights  whether its `after_update` must run after that of all other interventions
    """

    key: str | None = None
    needs_whole_tensors: str | None = None
    not_averaged: str | None = None
    follows_weights = False

    @classmethod
    def asked_by(cls, optimizer: OptimizerConfig, model: ModelConfig) -> Intervention | None:
        """The intervention that `key` switches on in this configuration, or None. It is defined only with a `key`.

        Raises ConfigError that names the key if the intervention cannot act on such a model.
        """
        return None

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError that names the key if it cannot act on such a model, whose vocabulary may be unknown."""

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError that names the key if it cannot act in a run of `steps` updates."""

    def pruned(self, model: ModelConfig, steps: int) -> Sequence[tuple[int, int]]:
        """(step, n) in the order of steps: from update number `step` (from 0) of `steps` on, n weights of matrices take
        no part. Budget, FLOPs and the counts of parameters in the row follow from it. `model` is resolved.

        It must be defined for every number of steps, and more steps must not make the training cheaper.
        """
        return ()

    @property
    def prunes(self) -> bool:
        """Whether it prunes weights, at steps that depend on the number of all steps."""
        return type(self).pruned is not Intervention.pruned

    @property
    def needs_steps(self) -> bool:
        """Whether what it does can depend on the number of all steps: it prunes, or has a `before_update`, which gets
        this number. Then runs of other lengths share no steps, and no clock can end the run."""
        return self.prunes or type(self).before_update is not Intervention.before_update

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """The FLOPs that it adds to training on one token, counted as in model.counting.flops_per_token.

        All matrix products count; a multiply-add is two FLOPs. `model` is resolved.
        """
        return 0

    def bytes_kept(self, model: ModelConfig) -> int:
        """Bytes of the tensors that it keeps between steps for the whole `model`, which is resolved. They are sharded
        like its weights."""
        return 0

    def attach(self, context: Context) -> None:
        """Called once, after the model and the optimizer are built and before a checkpoint is loaded."""

    def before_update(self, step: int, steps: int) -> None:
        """Called before the forward pass of update number `step` (from 0) of `steps`. It is called again if the update
        is tried again, so a second call must change nothing."""

    def after_backward(self) -> None:
        """Called when the gradients are complete, equal in every process, and not yet measured or clipped."""

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Whether the update is made. The answer must be the same in every process.

        loss: nats per token of the global batch. grad_norm: before clipping. Both are finite.
        """
        return True

    def after_update(self, made: bool) -> None:
        """Called after the update. made: False if an intervention did not allow the update."""

    def state(self) -> dict[str, Any] | None:
        """Plain data, the same in every process, from which `restore` continues bitwise identically; None: no data."""
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from data that `state` returned in an earlier start of the run."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of its state by name, whole and on the CPU. Every process calls it."""
        return {}

    def restore_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from tensors that `tensors` returned in an earlier start of the run. Raises KeyError or ValueError
        if they are others."""

    def row(self) -> dict[str, Any]:
        """The fields that it adds to the run's row."""
        return {}
