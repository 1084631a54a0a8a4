"""Statistics of gradients, parameters and updates of each tensor. names.py defines each statistic."""

import math
from collections.abc import Callable, Sequence

import torch

from scaling_testbed.learning.optimizers import OptimizerConfig, local_part

Sum = Callable[[Sequence[float]], Sequence[float]]  # elementwise sum over the shards of a tensor


@torch.no_grad()
def gradient_statistics(model: torch.nn.Module, sum_over_shards: Sum) -> dict[str, float]:
    """grad_rms and grad_norm of every tensor that has a gradient."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    found = {}
    for (name, grad), total in zip(named, _squares([grad for _, grad in named], sum_over_shards), strict=True):
        found[f"grad_rms/{name}"] = math.sqrt(total / grad.numel())
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
    model: torch.nn.Module,
    config: OptimizerConfig,
    optimizer: torch.optim.Optimizer,
    before: dict[str, float],
    sum_over_shards: Sum,
) -> dict[str, float]:
    """update_rms, update_ratio and below_eps of the last update by `optimizer`, which `config` built.

    before: the param_rms of `parameter_statistics` before the update.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    measured, sums = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            update = config.update_of(group, optimizer.state.get(parameter, {}))
            if update is None:
                continue
            squares, below = update.direction.square().sum(), update.n_below_eps
            sums += [squares, torch.zeros_like(squares) if below is None else below.double()]
            measured.append((parameter, config.rate_of(optimizer, group, parameter), below is not None))
    totals = sum_over_shards(torch.stack(sums).tolist()) if sums else []
    found = {}
    for (parameter, rate, has_eps), total, n_below in zip(measured, totals[::2], totals[1::2], strict=True):
        name = names[parameter]
        update_rms = math.sqrt(total / parameter.numel())
        found[f"update_rms/{name}"] = update_rms
        param_rms = before.get(f"param_rms/{name}")
        if param_rms and rate is not None:
            found[f"update_ratio/{name}"] = float(rate) * update_rms / param_rms
        if has_eps:
            found[f"below_eps/{name}"] = n_below / parameter.numel()
    return found


def _squares(tensors: Sequence[torch.Tensor], sum_over_shards: Sum) -> Sequence[float]:
    """The sum of squares of each tensor, in float64: the square of a gradient of 1e-23 underflows in fp32."""
    if not tensors:
        return []
    return sum_over_shards(torch.stack([local_part(x).double().square().sum() for x in tensors]).tolist())
