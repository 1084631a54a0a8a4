"""Causal attention and its statistics in plain PyTorch: the definition that the fast paths are judged against.

Shapes in names: B sequences, T positions, H query heads, G key and value heads (H is a multiple of G), K features of a
head, M queries and N keys of a part. "Wide" is fp32, or the input's own type where that is wider (fp64 in tests).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from scaling_testbed.kernels.reference import softcap_scores, wide, without_autocast

# (scores_BHMN, allowed_MN, n_positions) -> weights_BHMN, zero where a key is not allowed. n_positions is the length of
# the whole sequence, of which the M queries and N keys may be a part.
Normaliser = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def softmax(scores_BHMN: torch.Tensor, allowed_MN: torch.Tensor, n_positions: int) -> torch.Tensor:
    """The softmax over the allowed keys, a Normaliser."""
    return scores_BHMN.masked_fill(~allowed_MN, float("-inf")).softmax(dim=-1)


class AttentionStatistics(NamedTuple):
    """What the scores scale * q.k and the weights of each head are like; fp32 [H], no gradient.

    Scores are taken before any softcap and where a query may look: they are what grows when training becomes
    unstable (Wortsman et al. 2023, arXiv 2309.14322, section 3.1.1).
    """

    largest_H: torch.Tensor  # score
    mean_H: torch.Tensor  # score
    rms_H: torch.Tensor  # root of the mean squared score
    entropy_H: torch.Tensor  # of the weights, after the softcap: nats, mean over queries


def allowed_keys(n_positions: int, window: int | None, device: torch.device | None = None) -> torch.Tensor:
    """Bool allowed_TT: whether query i sees key j, that is i - window < j <= i (None: all of the past)."""
    position_T = torch.arange(n_positions, device=device)
    return _sees(position_T, position_T, window)


def _sees(query_M: torch.Tensor, key_N: torch.Tensor, window: int | None) -> torch.Tensor:
    """Bool allowed_MN for queries and keys at these positions."""
    distance_MN = query_M[:, None] - key_N[None, :]
    return distance_MN >= 0 if window is None else (distance_MN >= 0) & (distance_MN < window)


def _scores(q_BHMK: torch.Tensor, k_BGNK: torch.Tensor, scale: float) -> torch.Tensor:
    """Wide scores_BHMN, scale * q.k, of M queries and N keys. Query head h reads key head h // (H / G)."""
    B, H, M, K = q_BHMK.shape
    G, N = k_BGNK.shape[1:3]
    # Queries that share a key head are stacked along M: no copy of keys and values for each query head.
    q_BGMK = wide(q_BHMK).reshape(B, G, H // G * M, K)
    return scale * (q_BGMK @ wide(k_BGNK).transpose(-1, -2)).view(B, H, M, N)


def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    normaliser: Normaliser = softmax,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention: scores q.k -> times `scale` -> softcap -> normaliser -> weighted values [B, H, T, K].

    Query head h reads key and value head h // (H / G), and of its keys the last `window`, its own among them
    (None: all of the past). Everything is computed wide, whatever autocast says, and the result is rounded once to
    v's type, so a score is never rounded to bf16 before its exponential.
    """
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    with without_autocast(q_BHTK.device.type):
        scores_BHTT = softcap_scores(_scores(q_BHTK, k_BGTK, scale), softcap)
        weights_BHTT = normaliser(scores_BHTT, allowed_keys(T, window, q_BHTK.device), T)
        out_BGMK = weights_BHTT.view(B, G, H // G * T, T) @ wide(v_BGTK)
        return out_BGMK.view(B, H, T, K).to(v_BGTK.dtype)


@torch.no_grad()
def attention_statistics(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    normaliser: Normaliser = softmax,
    window: int | None = None,
) -> AttentionStatistics:
    """The AttentionStatistics of `attention` with the same arguments: over the batch and all pairs of a query and a
    key that it may see. Of the scores only SCORES_BYTES are held at a time."""
    B, H, T, _ = q_BHTK.shape
    n_seen, parts = 0, []
    with without_autocast(q_BHTK.device.type):
        for scores_BHMN, allowed_MN in _scores_in_parts(q_BHTK, k_BGTK, scale, window):
            n_seen += B * allowed_MN.sum()
            seen_BHMN = scores_BHMN.masked_fill(~allowed_MN, 0)
            entropy_BHMN = torch.special.entr(normaliser(softcap_scores(scores_BHMN, softcap), allowed_MN, T))
            sums = (x.sum((0, 2, 3)) for x in (seen_BHMN, seen_BHMN.square(), entropy_BHMN))
            parts.append(torch.stack([_largest(scores_BHMN, allowed_MN), *sums]))
        parts_P4H = torch.stack(parts)
        sum_H, squares_H, entropy_H = parts_P4H[:, 1:].sum(0)
        values = parts_P4H[:, 0].amax(0), sum_H / n_seen, (squares_H / n_seen).sqrt(), entropy_H / (B * T)
    return AttentionStatistics(*(value.float() for value in values))


@torch.no_grad()
def largest_scores(
    q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """AttentionStatistics.largest_H alone, which takes no softmax."""
    with without_autocast(q_BHTK.device.type):
        parts = [_largest(*part) for part in _scores_in_parts(q_BHTK, k_BGTK, scale, window)]
        return torch.stack(parts).amax(0).float()


SCORES_BYTES = 2**26


def _scores_in_parts(q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, scale: float, window: int | None):
    """Yield scores_BHMN and allowed_MN of M queries after the other and the N keys up to the last of them, M so that
    the scores take at most SCORES_BYTES (or M is one)."""
    B, H, T, _ = q_BHTK.shape
    position_T = torch.arange(T, device=q_BHTK.device)
    at_once = max(1, SCORES_BYTES // (B * H * T * torch.promote_types(q_BHTK.dtype, torch.float32).itemsize))
    for begin in range(0, T, at_once):
        end = min(begin + at_once, T)
        scores_BHMN = _scores(q_BHTK[:, :, begin:end], k_BGTK[:, :, :end], scale)
        yield scores_BHMN, _sees(position_T[begin:end], position_T[:end], window)


def _largest(scores_BHMN: torch.Tensor, allowed_MN: torch.Tensor) -> torch.Tensor:
    return scores_BHMN.masked_fill(~allowed_MN, float("-inf")).amax((0, 2, 3))
