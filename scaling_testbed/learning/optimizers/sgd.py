"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import key
from scaling_testbed.learning.optimizers.base import OPTIMIZERS, OptimizerConfig, Update, local_part, parameter_groups

if TYPE_CHECKING:
    import torch

    from scaling_testbed.model.transformer import Transformer


@OPTIMIZERS.register("sgd")
@dataclass(frozen=True, kw_only=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, "On the importance of initialization and
    momentum in deep learning"), in PyTorch's form and without dampening.

    With g the gradient after clipping, the update is b <- momentum b + g; with nesterov it is g + momentum b. The decay
    acts on the weights and does not enter b, as in SGDW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 1).
    """

    needs_whole_tensors = None

    name: str = "sgd"
    momentum: float = key(0.9, "The momentum. 0: the update is the gradient, and no moment is kept.")
    nesterov: bool = key(False, "Whether the momentum is Nesterov's.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("momentum")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov must be false with momentum=0; set momentum, to 0.9 for example")

    def build(self, model: Transformer) -> torch.optim.Optimizer:
        from scaling_testbed.learning.optimizers.tensorwise import DecoupledSGD

        # Earlier versions have PyTorch's SGD, and their checkpoints have these names.
        groups = [
            {**group, "weight_decay": 0.0, "decoupled_decay": group["weight_decay"]}
            for group in parameter_groups(self, model)
        ]
        return DecoupledSGD(groups, self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def bytes_per_weight(self, role: str) -> int:
        """Bytes of optimizer state for each weight of a role: one moment, fp32."""
        return 4 if self.momentum else 0

    def first_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        from scaling_testbed.learning.optimizers.tensorwise import no_momentum

        return {"momentum_buffer": no_momentum(parameter)} if self.momentum else {}

    @property
    def rate_means(self) -> str:
        """The meaning includes momentum, which multiplies the effect of a constant gradient by 1 / (1 - momentum)."""
        return f"one per step and unit of gradient, summed with momentum={self.momentum:g} (SGD)"

    def update_of(self, group: dict[str, Any], state: dict[str, Any]) -> Update | None:
        """The momentum; None if the update also depends on the gradient, which is not in the state."""
        if self.nesterov or "momentum_buffer" not in state:
            return None
        return Update(local_part(state["momentum_buffer"]).double(), None)
