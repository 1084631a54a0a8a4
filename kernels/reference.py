"""What each kernel computes, in plain PyTorch: the definitions that the fast versions are judged against.

Shapes in names: B sequences, T positions, H query heads, G key and value heads (H is a multiple of G),
K features of a head, R = K/2 rotated pairs, N tokens, D model width, V vocabulary.
"Wide" is fp32, or the input's own type where that is wider (fp64 in tests).
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or untouched where it is fp32 or wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softcap_scores(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Bound `scores` smoothly to (-softcap, softcap): s tanh(x / s) (Gemma 2, arXiv 2408.00118, section 2).
    None leaves them alone."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _softmax(scores_BHTT: torch.Tensor, allowed_TT: torch.Tensor) -> torch.Tensor:
    return scores_BHTT.masked_fill(~allowed_TT, float("-inf")).softmax(dim=-1)


# (scores_BHTT, allowed_TT) -> weights_BHTT, zero where a key is not allowed.
NORMALISERS = {"softmax": _softmax}


def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    normaliser: str = "softmax",
) -> torch.Tensor:
    """Causal attention: scores q.k -> times `scale` -> softcap -> normaliser -> weighted values [B, H, T, K].

    Query head h reads key and value head h // (H / G). Everything is computed wide, whatever autocast says,
    and the result is rounded once to v's type, so a score is never rounded to bf16 before its exponential.
    """
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    with _without_autocast(q_BHTK.device.type):
        # Queries that share a key head are stacked along T: no copy of keys and values for each query head.
        q_BGMK = wide(q_BHTK).reshape(B, G, H // G * T, K)
        scores_BHTT = (q_BGMK @ wide(k_BGTK).transpose(-1, -2)).view(B, H, T, T)
        scores_BHTT = softcap_scores(scores_BHTT * scale, softcap)
        allowed_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).tril()
        weights_BHTT = NORMALISERS[normaliser](scores_BHTT, allowed_TT)
        out_BGMK = weights_BHTT.view(B, G, H // G * T, T) @ wide(v_BGTK)
        return out_BGMK.view(B, H, T, K).to(v_BGTK.dtype)


def _without_autocast(device_type: str):
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def qk_norm(x: torch.Tensor, gain: torch.Tensor | None, kind: str, eps: float) -> torch.Tensor:
    """Normalise queries or keys over their last dimension and multiply by `gain` ([last], or None for one).

    kind "layernorm": (x - mean) / sqrt(var + eps), no bias (Dehghani et al. 2023; Wortsman et al. 2023,
    arXiv 2309.14322, section 3.1.1 and E.8); "rmsnorm": x / sqrt(mean x^2 + eps) (OLMo 2, arXiv 2501.00656).
    The result is wide; the caller rounds after the rotation.
    """
    if kind == "layernorm":
        return F.layer_norm(wide(x), x.shape[-1:], gain, None, eps)
    if kind == "rmsnorm":
        return F.rms_norm(wide(x), x.shape[-1:], gain, eps)
    raise ValueError(f"kind must be layernorm or rmsnorm, got {kind!r}")


def rotary_tables(positions_T: torch.Tensor, d_head: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 cos_TR and sin_TR of the angles position * base^(-2 r / d_head), r = 0 .. d_head/2 - 1
    (RoFormer, arXiv 2104.09864, eq. 15)."""
    pairs_R = torch.arange(0, d_head, 2, dtype=torch.float32, device=positions_T.device)
    angles_TR = positions_T.float()[:, None] * base ** (-pairs_R / d_head)
    return angles_TR.cos(), angles_TR.sin()


def apply_rotary(x_BHTK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[r], x[r + K/2]) by its angle; computed wide, returned in x's type."""
    first_BHTR, second_BHTR = wide(x_BHTK).chunk(2, dim=-1)
    rotated = (first_BHTR * cos_TR - second_BHTR * sin_TR, second_BHTR * cos_TR + first_BHTR * sin_TR)
    return torch.cat(rotated, dim=-1).to(x_BHTK.dtype)


def rotary(x_BHTK: torch.Tensor, base: float, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Rotary position embedding at `positions` ([T], default 0 .. T-1). Feature r is paired with r + K/2."""
    if positions is None:
        positions = torch.arange(x_BHTK.shape[-2], device=x_BHTK.device)
    return apply_rotary(x_BHTK, *rotary_tables(positions, x_BHTK.shape[-1], base))


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each token and log Z = logsumexp of its logits, in nats: (ce_N, log_z_N), both wide
    and both zero where the target is `ignore_index`. A z-loss is coefficient * log_z^2 (PaLM, arXiv
    2204.02311, section 5).

    The product hidden x weight runs in its inputs' type or in autocast's; all that follows is wide.
    """
    logits_NV = softcap_scores(wide(F.linear(hidden_ND, weight_VD)), softcap)
    valid_N = targets_N != ignore_index
    log_z_N = logits_NV.logsumexp(dim=-1)
    target_logit_N = logits_NV.gather(1, torch.where(valid_N, targets_N, 0)[:, None])[:, 0]
    zero = log_z_N.new_zeros(())
    return torch.where(valid_N, log_z_N - target_logit_N, zero), torch.where(valid_N, log_z_N, zero)
