"""The rotation of queries or keys in fewer and longer operations than its definition, with the same bits.

Shapes in names: B sequences, T positions, H heads, K features of a head, R = K/2 rotated pairs.
"""

from __future__ import annotations

import torch

from scaling_testbed.kernels.qk_norm_rope.reference import apply_rotary
from scaling_testbed.kernels.reference import wide


def rotate(x_BHTK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """reference.apply_rotary: the same bits and layout of the result and of the gradient of x; the tables have none.

    torch.compile gets the definition, which it fuses by itself.
    """
    if torch.compiler.is_compiling():
        return apply_rotary(x_BHTK, cos_TR, sin_TR)
    return _Rotation.apply(wide(x_BHTK), cos_TR, sin_TR).to(x_BHTK.dtype)


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) over whole heads: x (cos, cos) + (b, a) (-sin, sin).

    The operations of the definition work on halves of a head, in runs of R numbers. These run over T K numbers. The
    derivative is the rotation by the negative angle, so that autograd does not take the definition apart again.
    """

    @staticmethod
    def forward(ctx, x_BHTK, cos_TR, sin_TR):
        ctx.save_for_backward(cos_TR, sin_TR)
        swapped_BHTK = x_BHTK.roll(x_BHTK.shape[-1] // 2, -1)
        swapped_BHTK.mul_(torch.cat((-sin_TR, sin_TR), dim=-1))
        return swapped_BHTK.add_(x_BHTK * torch.cat((cos_TR, cos_TR), dim=-1))

    @staticmethod
    def backward(ctx, grad_BHTK):
        cos_TR, sin_TR = ctx.saved_tensors
        return _Rotation.apply(grad_BHTK, cos_TR, -sin_TR), None, None
