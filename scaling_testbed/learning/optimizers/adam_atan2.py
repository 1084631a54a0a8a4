"""Adam-atan2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import check_positive
from scaling_testbed.keys import key
from scaling_testbed.learning.optimizers.adamw import (
    MOMENTS_BYTES,
    RELATIVE_RATE,
    has_moments,
    moments,
    no_moments,
    rate_of_tensor,
)
from scaling_testbed.learning.optimizers.base import AS_ADAMW, OPTIMIZERS, OptimizerConfig, Update, parameter_groups

if TYPE_CHECKING:
    import torch

    from scaling_testbed.model.transformer import Transformer


@OPTIMIZERS.register("adam_atan2")
@dataclass(frozen=True, kw_only=True)
class AdamAtan2Config(OptimizerConfig):
    """Adam-atan2 (Everett et al. 2024, arXiv 2407.05872). It replaces Adam's update m / (sqrt(v) + eps) by
    a atan2(m, b sqrt(v)), with m and v the bias-corrected moments. The update does not change if all gradients of a
    tensor are multiplied by a positive number, so there is no eps. It is at most a pi / 2.
    """

    needs_whole_tensors = None

    name: str = "adam_atan2"
    beta1: float = key(0.9, "The decay of the first moment.")
    beta2: float = key(0.95, "The decay of the second moment.")
    a: float = key(
        4 / math.pi, "The factor a. 4 / pi with b = 1 makes the update of a constant gradient one, as Adam's."
    )
    b: float = key(1.0, "The factor b.")
    scale_lr_by_param_rms: bool = key(False, "As in AdamW: multiply each tensor's rate by max(RMS(w), 1e-3).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("beta1", "beta2")
        check_positive("a", self.a)
        check_positive("b", self.b)

    def build(self, model: Transformer) -> torch.optim.Optimizer:
        from scaling_testbed.learning.optimizers.tensorwise import AdamAtan2

        groups, betas = parameter_groups(self, model), (self.beta1, self.beta2)
        scales = self.scale_lr_by_param_rms
        return AdamAtan2(groups, self.lr, betas, a=self.a, b=self.b, scale_lr_by_param_rms=scales)

    def bytes_per_weight(self, role: str) -> int:
        return MOMENTS_BYTES

    def first_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return no_moments(group, parameter)

    @property
    def rate_means(self) -> str:
        """The meaning of AdamW if the update of a constant gradient is one, as AdamW's is."""
        constant = self.a * math.atan2(1, self.b)
        as_adamw = RELATIVE_RATE if self.scale_lr_by_param_rms else AS_ADAMW
        return as_adamw if math.isclose(constant, 1, rel_tol=1e-6) else f"{constant:.4g} times {as_adamw}"

    def update_of(self, group: dict[str, Any], state: dict[str, Any]) -> Update | None:
        """The last update a atan2(m, b sqrt(v)), which has no eps."""
        if not has_moments(state):
            return None
        first, root = moments(group, state)
        return Update(group["a"] * first.atan2(group["b"] * root), None)

    def rate_of(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter
    ) -> float | torch.Tensor | None:
        if not self.scale_lr_by_param_rms:
            return super().rate_of(optimizer, group, parameter)
        return rate_of_tensor(optimizer, parameter)
