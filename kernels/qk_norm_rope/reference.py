"""Norm and rotation of queries and keys in plain PyTorch: the definition that the fast paths must match.

Shapes in names: B sequences, T positions, H query heads, G key heads, K features of a head, R = K/2 rotated pairs.
"Wide" is fp32, or the input's own type if that is wider (fp64 in tests).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scaling_testbed.kernels.reference import wide


def layer_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, times `gain`, without bias; wide.

    gain: [last], or None for one (Dehghani et al. 2023; Wortsman et al. 2023, arXiv 2309.14322, section 3.1.1 and E.8).
    """
    return F.layer_norm(wide(x), x.shape[-1:], gain, None, eps)


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension, times `gain` ([last], or None for one); wide (OLMo 2, arXiv
    2501.00656)."""
    return F.rms_norm(wide(x), x.shape[-1:], gain, eps)


KINDS = {"layernorm": layer_norm, "rmsnorm": rms_norm}


def qk_norm(x: torch.Tensor, gain: torch.Tensor | None, kind: str, eps: float) -> torch.Tensor:
    """Queries or keys after the norm `kind`, one of KINDS. The result is wide; the caller rounds after the rotation.

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](x, gain, eps)


def rotary_tables(positions_T: torch.Tensor, d_head: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 cos_TR and sin_TR of the angles position * base^(-2 r / d_head), r = 0 .. d_head/2 - 1
    (RoFormer, arXiv 2104.09864, eq. 15). Where sequences have positions of their own, all functions here take tables
    [B, 1, T, R]."""
    pairs_R = torch.arange(0, d_head, 2, dtype=torch.float32, device=positions_T.device)
    angles_TR = positions_T.float()[:, None] * base ** (-pairs_R / d_head)
    return angles_TR.cos(), angles_TR.sin()


def apply_rotary(x_BHTK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[r], x[r + K/2]) by its angle. The rotation is computed wide and returned in x's type."""
    first_BHTR, second_BHTR = wide(x_BHTK).chunk(2, dim=-1)
    rotated = (first_BHTR * cos_TR - second_BHTR * sin_TR, second_BHTR * cos_TR + first_BHTR * sin_TR)
    return torch.cat(rotated, dim=-1).to(x_BHTK.dtype)


def qk_norm_rope(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    q_gain_K: torch.Tensor | None,
    k_gain_K: torch.Tensor | None,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    *,
    kind: str,
    eps: float,
    heads_together: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (q_BHTK, k_BGTK): queries and keys after `qk_norm` with their gains and then `apply_rotary`.

    heads_together: the norm goes over all heads of a position, and the gains are [heads K]; otherwise it goes over each
    head, and all heads share the gains [K]. Both results are computed wide and rounded once to `out_dtype` (default:
    each input's own type).
    """

    def prepare(x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        if heads_together:
            normed = qk_norm(x.transpose(1, 2).flatten(2), gain, kind, eps)
            normed = normed.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)
        else:
            normed = qk_norm(x, gain, kind, eps)
        return apply_rotary(normed, cos_TR, sin_TR).to(out_dtype or x.dtype)

    return prepare(q_BHTK, q_gain_K), prepare(k_BGTK, k_gain_K)


def rotary(x_BHTK: torch.Tensor, base: float, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Rotary position embedding at `positions` ([T], default 0 .. T-1). Feature r is paired with r + K/2."""
    if positions is None:
        positions = torch.arange(x_BHTK.shape[-2], device=x_BHTK.device)
    return apply_rotary(x_BHTK, *rotary_tables(positions, x_BHTK.shape[-1], base))
