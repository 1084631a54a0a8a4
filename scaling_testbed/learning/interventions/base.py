"""What can be done to the steps of a run beside the update itself. Free of torch, so that a grid can be planned.

An intervention is a class in a file of its own, registered by name:

    @INTERVENTIONS.register("gradient_noise")
    class GradientNoise(Intervention):
        def __init__(self, std: float = 0.01): ...
        def after_backward(self): ...

`+interventions.gradient_noise.std=0.1` switches it on: what is written under its name are the arguments of the class.
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
    """What an intervention can reach of a run, on each of its processes.

    model, optimizer: those that are trained. sum, largest: elementwise over the processes, in float64; every process
    must call them equally often.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer
    sum: Callable[[Sequence[float]], list[float]]
    largest: Callable[[Sequence[float]], list[float]]


class Intervention:
    """Acts at three places of every step, in this order; by itself it does nothing.

    key              the configuration key that switches it on; None: its name under `interventions`
    needs_whole_tensors
                     why it cannot act on a model of which each process holds a part (parallelism=fsdp); None: it can
    follows_weights  whether `after_update` must see the weights as all other interventions leave them
    """

    key: str | None = None
    needs_whole_tensors: str | None = None
    follows_weights = False

    @classmethod
    def asked_by(cls, optimizer: OptimizerConfig, model: ModelConfig) -> Intervention | None:
        """The intervention that `key` asks for, or None where it asks for none. Only for one that has a `key`. Raises
        ConfigError, naming the key, where it cannot act on such a model."""
        return None

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """What it adds to the FLOPs of training on one token, counted as model.counting.flops_per_token counts: every
        matrix product, a multiply-add being two. `model` is resolved."""
        return 0

    def attach(self, context: Context) -> None:
        """Called once, when the model and the optimizer are built and before a checkpoint is taken up."""

    def after_backward(self) -> None:
        """The gradients are complete, the same in every process, and neither measured nor clipped."""

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Whether the update is made, with the same answer in every process.

        loss: nats per token of the global batch. grad_norm: before clipping. Both are finite.
        """
        return True

    def after_update(self, made: bool) -> None:
        """The update was made, or left out because an intervention did not allow it."""

    def state(self) -> dict[str, Any] | None:
        """Plain data from which `restore` goes on to the same bits, the same in every process; None: nothing."""
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned in an earlier start of the run."""

    def row(self) -> dict[str, Any]:
        """Fields that it adds to the run's row."""
        return {}
