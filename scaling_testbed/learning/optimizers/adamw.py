"""AdamW and StableAdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import ADDED_LATER, key
from scaling_testbed.learning.optimizers.base import (
    AS_ADAMW,
    OPTIMIZERS,
    OptimizerConfig,
    Update,
    local_part,
    parameter_groups,
)

if TYPE_CHECKING:
    import torch

    from scaling_testbed.model.transformer import Transformer

MOMENTS_BYTES = 8  # bytes of the two moments of a weight, fp32
RELATIVE_RATE = "about one per step and unit of each tensor's RMS (AdamW with scale_lr_by_param_rms)"


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019)."""

    needs_whole_tensors = None

    name: str = "adamw"
    beta1: float = key(0.9, "The decay of the first moment.")
    beta2: float = key(0.95, "The decay of the second moment.")
    eps: float = key(1e-8, "Added to the root of the second moment.")
    update_clipping: bool = key(
        False,
        "Divide each tensor's rate by max(1, RMS(g / sqrt(second moment))): StableAdamW (Wortsman et al. 2023, Stable "
        "and low-precision training for large-scale vision-language models, algorithm 2).",
    )
    scale_lr_by_param_rms: bool = key(
        False,
        "Multiply each tensor's rate by max(RMS(w), 1e-3) of its weights before the step (Adafactor, arXiv 1804.04235, "
        "algorithm 4; Wortsman et al. 2023, E.14). The decay is not multiplied, as in Optax's Adafactor.",
        identity=ADDED_LATER,
    )
    fused: bool | None = key(
        None,
        "Whether to use PyTorch's fused step. null: where it exists. Not available with update_clipping or "
        "scale_lr_by_param_rms.",
    )

    clip_impl: str = key(
        "separate",
        "Where gradients are clipped. separate: before the step, by a product. fused: in PyTorch's fused step, by a "
        "quotient, which rounds otherwise; it needs fused=true.",
        identity=ADDED_LATER,
        choices=("separate", "fused"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("beta1", "beta2")
        check_positive("eps", self.eps)  # with 0, the update of the embedding of a token that never occurs is 0/0
        for name in ("update_clipping", "scale_lr_by_param_rms"):
            if getattr(self, name) and self.fused:
                raise ConfigError(f"fused cannot be true together with {name}")
        if self.clips_in_step and not self.fused:
            raise ConfigError("clip_impl must be separate unless fused=true, because only PyTorch's fused step clips")

    @property
    def _has_rates_of_tensors(self) -> bool:
        return self.update_clipping or self.scale_lr_by_param_rms

    def build(self, model: Transformer) -> torch.optim.Optimizer:
        import torch

        groups, betas = parameter_groups(self, model), (self.beta1, self.beta2)
        if not self._has_rates_of_tensors:
            fused = self.fused if self.fused is not None else can_fuse(model)
            return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=fused)
        from scaling_testbed.learning.optimizers.tensorwise import TensorwiseAdamW

        return TensorwiseAdamW(
            groups,
            self.lr,
            betas,
            eps=self.eps,
            update_clipping=self.update_clipping,
            scale_lr_by_param_rms=self.scale_lr_by_param_rms,
        )

    def bytes_per_weight(self, role: str) -> int:
        return MOMENTS_BYTES

    def first_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return no_moments(group, parameter)

    @property
    def can_be_captured(self) -> bool:
        """PyTorch's fused step can."""
        return not self._has_rates_of_tensors and self.fused is not False

    @property
    def clips_in_step(self) -> bool:
        return self.clip_impl == "fused"

    @property
    def rate_means(self) -> str:
        """update_clipping does not change the meaning, because it divides the rate by one except after a spike."""
        return RELATIVE_RATE if self.scale_lr_by_param_rms else AS_ADAMW

    def update_of(self, group: dict[str, Any], state: dict[str, Any]) -> Update | None:
        return adam_update(group, state)

    def rate_of(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter
    ) -> float | torch.Tensor | None:
        if not self._has_rates_of_tensors:
            return super().rate_of(optimizer, group, parameter)
        return rate_of_tensor(optimizer, parameter)


@OPTIMIZERS.register("stable_adamw")
@dataclass(frozen=True, kw_only=True)
class StableAdamWConfig(AdamWConfig):
    """AdamW with update_clipping."""

    name: str = "stable_adamw"
    update_clipping: bool = True


def adam_update(group: dict[str, Any], state: dict[str, Any]) -> Update | None:
    """The last update m / (sqrt(v) + eps), bias-corrected (Wortsman et al. 2023, arXiv 2309.14322, section E.13)."""
    if not has_moments(state):
        return None
    first, root = moments(group, state)
    return Update(first / (root + group["eps"]), (root < group["eps"]).sum())


def no_moments(group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of Adam before the first step, as torch.optim creates it. A fused or capturable step counts on the
    device of the parameter, any other on the CPU."""
    import torch

    counts_on = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    return {
        "step": torch.zeros((), dtype=torch.float32, device=counts_on),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def has_moments(state: dict[str, Any]) -> bool:
    """Whether Adam has made a step."""
    return bool(state) and float(state["step"]) > 0


def moments(group: dict[str, Any], state: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's bias-corrected first moment and the root of the second, fp64, for this process's part of a tensor."""
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    root = (local_part(state["exp_avg_sq"]).double() / (1 - beta2**step)).sqrt()
    return local_part(state["exp_avg"]).double() / (1 - beta1**step), root


def rate_of_tensor(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> float | torch.Tensor | None:
    """The last rate of a tensor in an optimizer with a rate for each tensor (tensorwise.TensorwiseAdam)."""
    from scaling_testbed.learning.optimizers.tensorwise import TensorwiseAdam

    assert isinstance(optimizer, TensorwiseAdam)
    return optimizer.rates.get(parameter)


def can_fuse(model: Transformer) -> bool:
    """Whether PyTorch has a fused step on the device of the model."""
    return next(model.parameters()).device.type in ("cpu", "cuda")
