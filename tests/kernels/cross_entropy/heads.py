"""The loss heads, inputs for them, and their truth: the definition in float64 on the same, already rounded inputs.

Tolerances are relative, by norm, for (losses, gradients):
  fp32  (2e-6, 5e-6): sums of up to 50257 terms in another order, 6e-8 each.
  bf16  (1.5e-3, 1.2e-2): stored logits keep 8 bits, 2^-9 of about 5, in log Z; the target's own is exact. Gradients
        have that and 2^-9 of their own; in the interpreter a cast to bf16 truncates instead of rounding, which is 2.5
        times worse.
"""

from functools import partial

import pytest
import torch

from scaling_testbed.kernels.cross_entropy import chunked, reference
from scaling_testbed.kernels.cross_entropy import triton as cross_entropy
from tests.conftest import KERNEL_DEVICE

IGNORE = -100
PATHS = {
    "torch": chunked.linear_cross_entropy,
    "triton": partial(cross_entropy.linear_cross_entropy, variant="chunked"),
    "recompute": partial(cross_entropy.linear_cross_entropy, variant="recompute"),
    "wide_rows": partial(cross_entropy.linear_cross_entropy, variant="wide_rows"),
}
OPERATORS = {"torch": chunked.chunked_operator, **cross_entropy.OPERATORS}
FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: (2e-6, 5e-6), BF16: (1.5e-3, 1.2e-2)}
# wide_rows is the kernel of triton with another tile.
each_path = pytest.mark.parametrize(
    "path", ["torch", "triton", "recompute", pytest.param("wide_rows", marks=pytest.mark.slow)]
)


def inputs(n=37, d=24, v=300, dtype=FP32, ignored=5, scale=1.0):
    """Logits of standard deviation 5 * scale; the first `ignored` tokens do not count."""
    generator = torch.Generator().manual_seed(n + v)
    hidden = torch.randn(n, d, generator=generator) * scale * 5 / d**0.5
    weight = torch.randn(v, d, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    targets[:ignored] = IGNORE
    hidden, weight = (x.to(KERNEL_DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(KERNEL_DEVICE)


def outputs(path, hidden, weight, targets, z_loss=1e-2, **options):
    """loss, ce_N, log_z_N, and the gradients of 3 loss."""
    found = PATHS[path](hidden, weight, targets, z_loss=z_loss, **options)
    return *found, *torch.autograd.grad(3.0 * found.loss, (hidden, weight))


def truth(hidden, weight, targets, z_loss=1e-2, softcap=None, weights_N=None):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    ce_N, log_z_N = reference.linear_cross_entropy(hidden, weight, targets, softcap=softcap)
    weights_N = 1.0 if weights_N is None else torch.where(targets == IGNORE, 0, weights_N.double())
    loss = (weights_N * ce_N).sum() + z_loss * log_z_N.square().sum()
    return loss, ce_N, log_z_N, *torch.autograd.grad(3.0 * loss, (hidden, weight))


def assert_near(found, expected, values, gradients):
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = (one.double() - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= (values if index < 3 else gradients), f"output {index} is off by {error:.1e}"
