"""Gradients and updates, tensor by tensor.

Names: QUANTITY/TENSOR.
    grad_rms, grad_norm   before clipping
    param_rms             before the update
    update_rms            RMS of Adam's update m / (sqrt(v) + eps), bias-corrected, before the learning rate and without
                          the decay (Wortsman et al. 2023, arXiv 2309.14322, section E.13); of Adam-atan2
                          a atan2(m, b sqrt(v))
    update_ratio          the tensor's learning rate x update_rms / param_rms
    below_eps             share of coordinates with sqrt(v) < eps (section 3.4)
The last three only of tensors whose optimizer keeps Adam's two moments; below_eps only where there is an eps.
"""

import math
from collections.abc import Callable, Sequence

import torch

from scaling_testbed.learning.tensorwise_adam import local_part

Sum = Callable[[Sequence[float]], Sequence[float]]  # adds up what the shards of a tensor contribute


@torch.no_grad()
def gradient_statistics(model: torch.nn.Module, sum_over_shards: Sum) -> dict[str, float]:
    """grad_rms and grad_norm of every tensor that has a gradient."""
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    found = {}
    for (name, p), total in zip(named, _squares([p.grad for _, p in named], sum_over_shards), strict=True):
        found[f"grad_rms/{name}"] = math.sqrt(total / p.numel())
        found[f"grad_norm/{name}"] = math.sqrt(total)
    return found


@torch.no_grad()
def parameter_statistics(model: torch.nn.Module, sum_over_shards: Sum) -> dict[str, float]:
    """param_rms of every tensor."""
    named = list(model.named_parameters())
    totals = _squares([p for _, p in named], sum_over_shards)
    return {f"param_rms/{name}": math.sqrt(total / p.numel()) for (name, p), total in zip(named, totals, strict=True)}


@torch.no_grad()
def update_statistics(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, float], sum_over_shards: Sum
) -> dict[str, float]:
    """update_rms, update_ratio and below_eps of the update that `optimizer` has just made; `before` holds param_rms."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    adam = [
        (names[parameter], parameter, group, optimizer.state[parameter])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "exp_avg_sq" in optimizer.state[parameter]
    ]
    sums = [total for _, _, group, state in adam for total in _update_sums(group, state)]
    totals = sum_over_shards(torch.stack(sums).tolist()) if sums else []
    found = {}
    rates = getattr(optimizer, "rates", {})  # of an optimizer that gives each tensor its own
    for (name, parameter, group, _), squares, below in zip(adam, totals[::2], totals[1::2], strict=True):
        update_rms = math.sqrt(squares / parameter.numel())
        found[f"update_rms/{name}"] = update_rms
        if param_rms := before.get(f"param_rms/{name}"):
            found[f"update_ratio/{name}"] = float(rates.get(parameter, group["lr"])) * update_rms / param_rms
        if "eps" in group:
            found[f"below_eps/{name}"] = below / parameter.numel()
    return found


def _update_sums(group, state) -> tuple[torch.Tensor, torch.Tensor]:
    """Of this process's part: the sum of squared updates, and how many coordinates are below eps."""
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    root = (local_part(state["exp_avg_sq"]).double() / (1 - beta2**step)).sqrt()
    first = local_part(state["exp_avg"]).double() / (1 - beta1**step)
    if "eps" not in group:
        return (group["a"] * torch.atan2(first, group["b"] * root)).square().sum(), torch.zeros_like(first.sum())
    return (first / (root + group["eps"])).square().sum(), (root < group["eps"]).sum().double()


def _squares(tensors: Sequence[torch.Tensor], sum_over_shards: Sum) -> Sequence[float]:
    """The sum of squares of each tensor, in float64: a squared gradient of 1e-23 is no fp32 number."""
    if not tensors:
        return []
    return sum_over_shards(torch.stack([local_part(x).double().square().sum() for x in tensors]).tolist())
