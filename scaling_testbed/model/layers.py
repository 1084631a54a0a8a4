"""The modules of a block: linear layers, norms, MLPs. parts.py holds the name and the facts of each.

Shapes in names: B sequences, T positions, D model width, F MLP width.
Parameters are fp32. Under autocast, matrix products run in its type; norms stay fp32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from scaling_testbed.kernels.reference import wide, without_autocast
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parts import LINEARS
from scaling_testbed.registry import resolve


class Linear(nn.Linear):
    """x @ weight.T without bias.

    The weight is NaN until Transformer.init_weights draws it. A missing initialisation thus shows at once, and building
    a model consumes no random numbers.
    """

    def __init__(self, d_in: int, d_out: int, *, role: str, device=None):
        super().__init__(d_in, d_out, bias=False, device=device, dtype=torch.float32)
        self.role = role
        self.fan_in = d_in

    def effective_weight(self) -> torch.Tensor:
        """The matrix [d_out, d_in] that multiplies the inputs."""
        return self.weight

    def start(self) -> None:
        """Set the tensors that depend on freshly drawn weights."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))


class Embedding(nn.Embedding):
    """Token embedding; NaN until initialised, like Linear.

    gradient_scale: a factor on the gradient of the look-up. It does not change the result of the look-up
    (ModelConfig.embedding_gradient_scale).
    """

    role = "embedding"

    def __init__(self, vocab_size: int, d_model: int, *, gradient_scale: float | None = None, device=None):
        super().__init__(vocab_size, d_model, device=device, dtype=torch.float32)
        self.fan_in = d_model
        self.gradient_scale = gradient_scale

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = super().forward(tokens_BT)
        if self.gradient_scale is None:
            return x_BTD
        fixed_BTD = x_BTD.detach()
        return fixed_BTD + self.gradient_scale * (x_BTD - fixed_BTD)  # bitwise equal to x_BTD

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))


class SigmaReparamLinear(Linear):
    """x @ W_hat.T with W_hat = gamma W / sigma, sigma = left.W.right (Zhai et al. 2023, arXiv 2303.06296, section 3.1).

    left and right are buffers with unit vectors. They approximate W's leading singular vectors by one power iteration
    after each update (`follow`). The gradient treats them as constants and goes through W in sigma.

    As in apple/ml-sigma-reparam, gamma starts at sigma, so that the first forward pass equals that of the plain model
    (the paper's text starts gamma at one). In apple/ml-sigma-reparam each forward pass makes an iteration. Here a
    forward pass changes nothing, so that it may be split or repeated.
    """

    STARTING_ITERATIONS = 32
    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, d_in: int, d_out: int, *, role: str, device=None):
        super().__init__(d_in, d_out, role=role, device=device)
        self.gamma = Scalar(device=device)
        self.register_buffer("left", torch.full((d_out,), float("nan"), dtype=torch.float32, device=device))
        self.register_buffer("right", torch.full((d_in,), float("nan"), dtype=torch.float32, device=device))

    def sigma(self) -> torch.Tensor:
        """The estimate of W's largest singular value. It is never above the true value."""
        return self.left @ (self.weight @ self.right)

    def effective_weight(self) -> torch.Tensor:
        with without_autocast(self.weight.device.type):
            return self.weight * (self.gamma.weight / self.sigma())

    @torch.no_grad()
    def follow(self) -> None:
        """Make one power iteration."""
        self.left.copy_(F.normalize(self.weight @ self.right, dim=0))
        self.right.copy_(F.normalize(self.weight.T @ self.left, dim=0))

    @torch.no_grad()
    def start(self) -> None:
        """Compute left and right for freshly drawn weights, and set gamma to sigma."""
        self.right.fill_(self.fan_in**-0.5)
        for _ in range(self.STARTING_ITERATIONS):
            self.follow()
        self.gamma.weight.copy_(self.sigma())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.effective_weight())


class Scalar(nn.Module):
    """One learned factor. The optimizer treats it as a gain."""

    role = "norm"
    fan_in = 1

    def __init__(self, *, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), float("nan"), dtype=torch.float32, device=device))


class Gain(nn.Module):
    """The base of norms with a learned gain and no bias. Subclasses normalise."""

    role = "norm"
    fan_in = 1

    def __init__(self, width: int, eps: float, *, device=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), float("nan"), dtype=torch.float32, device=device))


class LayerNorm(Gain):
    """LayerNorm with a gain and no bias. Statistics and result are fp32 for every input type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(wide(x), self.weight.shape, self.weight, None, self.eps)


class RMSNorm(Gain):
    """x / RMS(x) times a gain. Statistics and result are fp32 for every input type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(wide(x), self.weight.shape, self.weight, self.eps)


def cast_for_matmul(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type that autocast will use for products.

    Autocast converts an activation again for each product that reads it. This function converts it once for several
    products.
    """
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


class MLP(nn.Module):
    """out(activation(in(x)))."""

    def __init__(self, config: ModelConfig, *, activation, device=None):
        super().__init__()
        self.activation, linear = activation, resolve(LINEARS[config.linear].make)
        self.mlp_in = linear(config.d_model, config.d_ff, role="mlp_in", device=device)
        self.mlp_out = linear(config.d_ff, config.d_model, role="mlp_out", device=device)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.mlp_out(self.activation(self.mlp_in(x_BTD)))


class GatedMLP(nn.Module):
    """out(activation(gate(x)) * in(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, activation, device=None):
        super().__init__()
        self.activation, linear = activation, resolve(LINEARS[config.linear].make)
        self.mlp_gate = linear(config.d_model, config.d_ff, role="mlp_gate", device=device)
        self.mlp_in = linear(config.d_model, config.d_ff, role="mlp_in", device=device)
        self.mlp_out = linear(config.d_ff, config.d_model, role="mlp_out", device=device)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = cast_for_matmul(x_BTD)
        return self.mlp_out(self.activation(self.mlp_gate(x_BTD)) * self.mlp_in(x_BTD))


gelu_mlp = partial(MLP, activation=_gelu_tanh)
relu2_mlp = partial(MLP, activation=_relu_squared)
swiglu_mlp = partial(GatedMLP, activation=F.silu)
