"""AdamW and Adam-atan2 a tensor at a time, for what depends on a whole tensor or is not in torch.optim.

They work on whole and on sharded tensors (DTensors) and keep the state of torch.optim.AdamW.
"""

from collections.abc import Iterable
from typing import Any

import torch

from scaling_testbed.learning.optimizers.base import local_part

SMALLEST_RMS = 1e-3  # that a rate is multiplied by, so that a tensor of zeros learns


class TensorwiseAdam(torch.optim.Optimizer):
    """The moments of Adam and decoupled decay. A subclass says in `_update` what is made of the moments, and in
    `_rate` what a tensor's rate is; the decay keeps to the group's.

    scale_lr_by_param_rms: max(RMS(w), 1e-3) is a factor of the rate (Adafactor, arXiv 1804.04235, algorithm 4).
    rates: that of each tensor's last update, a number or a scalar tensor; no part of the state.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        *,
        scale_lr_by_param_rms: bool = False,
        weight_decay: float = 0.0,
        **defaults: float,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **defaults})
        self.scale_lr_by_param_rms = scale_lr_by_param_rms
        self.rates: dict[torch.Tensor, float | torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, group)

    def _step_of(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        weights, gradient, exp_avg, exp_avg_sq = (local_part(x) for x in tensors)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
        rate = self.rates[parameter] = self._rate(parameter, gradient, second, group)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.sub_(self._update(first, second, group) * rate)

    def _update(self, first: torch.Tensor, second: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError

    def _rate(
        self, parameter: torch.Tensor, gradient: torch.Tensor, second: torch.Tensor, group: dict[str, Any]
    ) -> float | torch.Tensor:
        lr: float = group["lr"]
        if not self.scale_lr_by_param_rms:
            return lr
        return lr * _mean_of_whole(local_part(parameter).square(), parameter).sqrt().clamp(min=SMALLEST_RMS)


class TensorwiseAdamW(TensorwiseAdam):
    """AdamW, and with update_clipping StableAdamW.

    StableAdamW divides the rate by max(1, RMS) with RMS^2 = mean(g^2 / max(v, eps^2)). v is the bias-corrected second
    moment, this step's gradient included (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2, which corrects the bias
    through a step-dependent beta). The decay is not divided, so that the clipping of an update changes nothing else.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        *,
        eps: float,
        update_clipping: bool = False,
        scale_lr_by_param_rms: bool = False,
        weight_decay: float = 0.0,
    ):
        scales = scale_lr_by_param_rms
        super().__init__(params, lr, betas, scale_lr_by_param_rms=scales, weight_decay=weight_decay, eps=eps)
        self.update_clipping = update_clipping

    def _update(self, first: torch.Tensor, second: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        eps: float = group["eps"]
        return first / (second.sqrt() + eps)

    def _rate(
        self, parameter: torch.Tensor, gradient: torch.Tensor, second: torch.Tensor, group: dict[str, Any]
    ) -> float | torch.Tensor:
        rate = super()._rate(parameter, gradient, second, group)
        if not self.update_clipping:
            return rate
        rms = _mean_of_whole(gradient.square() / second.clamp(min=group["eps"] ** 2), parameter).sqrt()
        return rate / rms.clamp(min=1)


class AdamAtan2(TensorwiseAdam):
    """Adam-atan2 (Everett et al. 2024, arXiv 2407.05872): the update is a atan2(m, b sqrt(v)), zero where both are."""

    def _update(self, first: torch.Tensor, second: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        a: float = group["a"]
        return a * torch.atan2(first, group["b"] * second.sqrt())


def _mean_of_whole(here: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mean over the whole tensor of which `here` is this process's part, as `like` is sharded."""
    if not hasattr(like, "to_local"):
        return here.mean()
    from torch.distributed.tensor import DTensor  # half a second that an unsharded run need not spend

    assert isinstance(like, DTensor)
    whole = DTensor.from_local(
        here, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    # Not its mean: the parts need not be of one size.
    total = whole.sum()
    assert isinstance(total, DTensor)
    mean: torch.Tensor = total.full_tensor() / like.numel()
    return mean
