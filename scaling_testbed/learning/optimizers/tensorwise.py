"""AdamW, Adam-atan2 and SGD, one tensor at a time, for features that need a whole tensor or are not in torch.optim.

They work on whole and on sharded tensors (DTensors). Their state has the form of the state of torch.optim. Their steps
change nothing while the scalar tensor `found_inf` is 1.0, as those of PyTorch's fused optimizers.
"""

from collections.abc import Iterable
from typing import Any

import torch

from scaling_testbed.learning.optimizers.adamw import no_moments
from scaling_testbed.learning.optimizers.base import kept_where, local_part

SMALLEST_RMS = 1e-3  # the smallest factor on a rate, so that a tensor of zeros learns


class TensorwiseAdam(torch.optim.Optimizer):
    """The base class: the moments of Adam and decoupled decay.

    A subclass computes the update from the moments in `_update`. It may also define `_rate`, the rate of a tensor. The
    decay always uses the rate of the group.

    scale_lr_by_param_rms: multiply the rate by max(RMS(w), 1e-3) (Adafactor, arXiv 1804.04235, algorithm 4).
    rates: tensor -> rate of its last update, a number or a scalar tensor. It is not part of the state.
    """

    _step_supports_amp_scaling = True
    found_inf: torch.Tensor | None = None

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
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(no_moments(group, parameter))
                    with kept_where(self.found_inf, parameter, state["exp_avg"], state["exp_avg_sq"]):
                        self._step_of(parameter, parameter.grad, group)

    def take_back(self, n: int) -> None:
        """Take the last `n` steps, which `found_inf` has left out, out of the counts of steps."""
        for state in self.state.values():
            state["step"] -= n

    def _step_of(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
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
    """AdamW, or StableAdamW with update_clipping.

    StableAdamW divides the rate by max(1, RMS) with RMS^2 = mean(g^2 / max(v, eps^2)). v is the bias-corrected second
    moment, including the gradient of this step (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2, which corrects the
    bias by a step-dependent beta). The decay is not divided, so that the clipping changes only the update.
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
    """Adam-atan2 (Everett et al. 2024, arXiv 2407.05872): the update is a atan2(m, b sqrt(v)), zero if m = v = 0."""

    def _update(self, first: torch.Tensor, second: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        a: float = group["a"]
        return a * torch.atan2(first, group["b"] * second.sqrt())


class DecoupledSGD(torch.optim.Optimizer):
    """SGD with momentum, bitwise equal to torch.optim.SGD on a CPU, after a decay that does not enter the momentum.

    PyTorch's own weight_decay adds the weights to the gradient, and so to the momentum.
    """

    _step_supports_amp_scaling = True
    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float,
        nesterov: bool,
        decoupled_decay: float = 0.0,
    ):
        options = {"momentum": momentum, "nesterov": nesterov, "decoupled_decay": decoupled_decay}
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, group)

    def _step_of(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        momentum, state = group["momentum"], self.state[parameter]
        if momentum and not state:
            state["momentum_buffer"] = no_momentum(parameter)
        weights, gradient = local_part(parameter), local_part(gradient)
        buffers = [local_part(state["momentum_buffer"])] if momentum else []
        with kept_where(self.found_inf, weights, *buffers):
            weights.mul_(1 - group["lr"] * group["decoupled_decay"])
            for buffer in buffers:
                buffer.mul_(momentum).add_(gradient)
                gradient = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
            weights.add_(gradient, alpha=-group["lr"])


def no_momentum(parameter: torch.Tensor) -> torch.Tensor:
    """The momentum of SGD before the first step: -0.0. The momentum after a first gradient g is then g, as in
    torch.optim.SGD, also where g is -0.0: with 0.0 it would be 0.0."""
    return torch.full_like(parameter, -0.0, memory_format=torch.preserve_format)


def _mean_of_whole(here: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mean over a whole tensor. `here` is this process's part of it, sharded as `like` is."""
    if not hasattr(like, "to_local"):
        return here.mean()
    from torch.distributed.tensor import DTensor  # takes half a second, so only sharded runs import it

    assert isinstance(like, DTensor)
    whole = DTensor.from_local(
        here, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    # Not whole.mean(), because the parts may have different sizes.
    total = whole.sum()
    assert isinstance(total, DTensor)
    mean: torch.Tensor = total.full_tensor() / like.numel()
    return mean
