"""Muon's step, for all matrices of one shape together.

Shapes in names: N matrices, A outputs, B inputs.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from scaling_testbed.learning.optimizers.base import kept_where

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration of Jordan et al. 2024
SMALLEST_NORM = 1e-7
LARGEST_BATCH = 2**26  # weights, so that the bf16 copies need few times 128 MiB


class BatchedMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), bitwise equal to torch.optim.Muon on a CPU, with the same state.

    torch.optim.Muon makes 15 small products for each matrix. Here the matrices of one shape are one batch of products,
    which saves most of the launches. adjust_lr_fn: MuonConfig.lr_adjustment. found_inf: a scalar on the device; a step
    changes nothing while it is 1.0. The groups have the keys of torch.optim.Muon, so that checkpoints of earlier
    versions can be continued.
    """

    _step_supports_amp_scaling = True
    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: str,
        weight_decay: float = 0.0,
    ):
        options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, alike in by_shape.items():
                count = max(1, LARGEST_BATCH // shape.numel())
                for first in range(0, len(alike), count):
                    self._step_of(alike[first : first + count], group)

    def _step_of(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = no_momentum(parameter)
        buffers = [state["momentum_buffer"] for state in states]
        with kept_where(self.found_inf, *parameters, *buffers):
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            directions = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
            update_NAB = orthogonalised(torch.stack([x.bfloat16() for x in directions]), group["ns_steps"]).float()
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            factor = rate_factor(parameters[0].shape, group["adjust_lr_fn"])
            torch._foreach_add_(parameters, list(update_NAB.unbind()), alpha=-rate * factor)


def no_momentum(parameter: torch.Tensor) -> torch.Tensor:
    """Muon's momentum before the first step."""
    return torch.zeros_like(parameter)


def orthogonalised(x_NAB: torch.Tensor, steps: int) -> torch.Tensor:
    """Each bf16 matrix U S V^T as U S' V^T with singular values S' near one, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = x_NAB.shape[1] > x_NAB.shape[2]
    x_NAB = x_NAB.mT if tall else x_NAB  # the product of the shorter side with itself is the smaller one
    x_NAB = x_NAB / torch.linalg.matrix_norm(x_NAB, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram_NAA = x_NAB @ x_NAB.mT
        polynomial_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, polynomial_NAA, x_NAB, beta=a)
    return x_NAB.mT if tall else x_NAB


def rate_factor(shape: torch.Size, adjustment: str) -> float:
    """The factor on the rate of a matrix [A, B]; see MuonConfig.lr_adjustment."""
    outputs, inputs = shape
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    return math.sqrt(max(1, outputs / inputs))
