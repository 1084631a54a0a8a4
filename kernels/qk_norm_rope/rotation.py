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
    return _Rotation.apply(wide(x_BHTK), *whole_tables(cos_TR, sin_TR)).to(x_BHTK.dtype)


def whole_tables(cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tables (cos, cos), (-sin, sin) and (sin, -sin) over whole heads.

    On a CPU those of the last tables are kept, because all layers of a pass have the same.
    """
    global _kept
    if _kept and _kept[0] is cos_TR and _kept[1] is sin_TR:
        return _kept[2:]
    negative_TR = -sin_TR
    halves = ((cos_TR, cos_TR), (negative_TR, sin_TR), (sin_TR, negative_TR))
    cos_TK, sin_TK, back_TK = (torch.cat(pair, dim=-1) for pair in halves)
    if cos_TR.device.type == "cpu":
        _kept = (cos_TR, sin_TR, cos_TK, sin_TK, back_TK)
    return cos_TK, sin_TK, back_TK


_kept: tuple = ()  # the last tables of a CPU, and those made of them


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) over whole heads: x (cos, cos) + (b, a) (-sin, sin).

    The operations of the definition work on halves of a head, in runs of R numbers. These run over T K numbers. The
    derivative is the rotation by the negative angle, so that autograd does not take the definition apart again.
    """

    @staticmethod
    def forward(ctx, x_BHTK, cos_TK, sin_TK, back_TK):
        ctx.save_for_backward(cos_TK, sin_TK, back_TK)
        return _rotated(x_BHTK, cos_TK, sin_TK)

    @staticmethod
    def backward(ctx, grad_BHTK):
        cos_TK, sin_TK, back_TK = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return _Rotation.apply(grad_BHTK, cos_TK, back_TK, sin_TK), None, None, None
        return _rotated(grad_BHTK, cos_TK, back_TK), None, None, None


def _rotated(x_BHTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    swapped_BHTK = x_BHTK.roll(x_BHTK.shape[-1] // 2, -1)
    return swapped_BHTK.mul_(sin_TK).add_(x_BHTK * cos_TK)
