"""Causal attention and its statistics in plain PyTorch: the definition that the fast paths must match.

Shapes in names: B sequences, T positions, H query heads, G key and value heads (H is a multiple of G), K features of a
head, M queries and N keys of a part. "Wide" is fp32, or the input's own type if that is wider (fp64 in tests).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from scaling_testbed.kernels.reference import softcap_scores, wide, without_autocast

# (scores_BHMN, allowed, n_positions) -> weights_BHMN, zero where a key is not allowed. `allowed` is bool [M, N], or
# [B, 1, M, N] where documents are told apart. n_positions is the length of the whole sequence; the M queries and N keys
# may be a part of it.
Normaliser = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def softmax(scores_BHMN: torch.Tensor, allowed: torch.Tensor, n_positions: int) -> torch.Tensor:
    """The softmax over the allowed keys, as a Normaliser."""
    return scores_BHMN.masked_fill(~allowed, float("-inf")).softmax(dim=-1)


class AttentionStatistics(NamedTuple):
    """Statistics of the scores scale * q.k and of the weights of each head; fp32 [H], without a gradient.

    The scores are those before any softcap, of each query with the keys that it may see. They grow when training
    becomes unstable (Wortsman et al. 2023, arXiv 2309.14322, section 3.1.1).
    """

    largest_H: torch.Tensor  # largest score
    mean_H: torch.Tensor  # mean score
    rms_H: torch.Tensor  # root mean square of the scores
    entropy_H: torch.Tensor  # entropy of the weights, after the softcap: nats, mean over queries


def allowed_keys(
    n_positions: int,
    window: int | None,
    device: torch.device | None = None,
    begins_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bool allowed_TT: whether query i sees key j, that is i - window < j <= i (window None: all of the past).

    begins_BT: for each position the position at which its document begins; the result is then [B, 1, T, T], and a query
    sees no key before the begin of its document.
    """
    position_T = torch.arange(n_positions, device=device)
    return _sees(position_T, position_T, window, begins_BT)


def _sees(
    query_M: torch.Tensor, key_N: torch.Tensor, window: int | None, begins_BM: torch.Tensor | None = None
) -> torch.Tensor:
    """Bool [M, N]: whether the queries at positions query_M see the keys at positions key_N; [B, 1, M, N] with the
    begins_BM of the documents of the queries."""
    distance_MN = query_M[:, None] - key_N[None, :]
    allowed_MN = distance_MN >= 0 if window is None else (distance_MN >= 0) & (distance_MN < window)
    if begins_BM is None:
        return allowed_MN
    return allowed_MN & (key_N >= begins_BM[:, None, :, None])


def _scores(q_BHMK: torch.Tensor, k_BGNK: torch.Tensor, scale: float) -> torch.Tensor:
    """Wide scores_BHMN = scale * q.k of M queries and N keys. Query head h reads key head h // (H / G)."""
    B, H, M, K = q_BHMK.shape
    G, N = k_BGNK.shape[1:3]
    # Queries that share a key head are stacked along M, which avoids a copy of the keys for each query head.
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
    begins_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention: scores q.k -> times `scale` -> softcap -> normaliser -> weighted values [B, H, T, K].

    Query head h reads key and value head h // (H / G). A query sees the last `window` keys, including that of its own
    position (None: all of the past), and none before the begin of its document (begins_BT [B, T]: the position at which
    the document of each position begins, which never falls; None: one document). Everything is computed wide, also
    under autocast, and the result is rounded once to v's type. A score is thus never rounded to bf16 before its
    exponential.
    """
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    with without_autocast(q_BHTK.device.type):
        scores_BHTT = softcap_scores(_scores(q_BHTK, k_BGTK, scale), softcap)
        weights_BHTT = normaliser(scores_BHTT, allowed_keys(T, window, q_BHTK.device, begins_BT), T)
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
    begins_BT: torch.Tensor | None = None,
) -> AttentionStatistics:
    """The AttentionStatistics of `attention` with the same arguments.

    They are taken over the batch and all pairs of a query and a key that it may see. At most SCORES_BYTES of scores are
    held at a time.
    """
    B, H, T, _ = q_BHTK.shape
    n_seen, parts = 0, []
    with without_autocast(q_BHTK.device.type):
        for scores_BHMN, allowed in _scores_in_parts(q_BHTK, k_BGTK, scale, window, begins_BT):
            n_seen += allowed.sum() if allowed.ndim == 4 else B * allowed.sum()
            seen_BHMN = scores_BHMN.masked_fill(~allowed, 0)
            entropy_BHMN = torch.special.entr(normaliser(softcap_scores(scores_BHMN, softcap), allowed, T))
            sums = (x.sum((0, 2, 3)) for x in (seen_BHMN, seen_BHMN.square(), entropy_BHMN))
            parts.append(torch.stack([_largest(scores_BHMN, allowed), *sums]))
        parts_P4H = torch.stack(parts)
        sum_H, squares_H, entropy_H = parts_P4H[:, 1:].sum(0)
        values = parts_P4H[:, 0].amax(0), sum_H / n_seen, (squares_H / n_seen).sqrt(), entropy_H / (B * T)
    return AttentionStatistics(*(value.float() for value in values))


@torch.no_grad()
def largest_scores(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    begins_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Only AttentionStatistics.largest_H, which needs no softmax."""
    with without_autocast(q_BHTK.device.type):
        parts = [_largest(*part) for part in _scores_in_parts(q_BHTK, k_BGTK, scale, window, begins_BT)]
        return torch.stack(parts).amax(0).float()


SCORES_BYTES = 2**26


def _scores_in_parts(
    q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, scale: float, window: int | None, begins_BT: torch.Tensor | None
):
    """Yield scores_BHMN, and which are allowed, of the next M queries and the N keys up to the last of these queries.

    M is chosen so that the scores take at most SCORES_BYTES; it is at least one.
    """
    B, H, T, _ = q_BHTK.shape
    position_T = torch.arange(T, device=q_BHTK.device)
    at_once = max(1, SCORES_BYTES // (B * H * T * torch.promote_types(q_BHTK.dtype, torch.float32).itemsize))
    for begin in range(0, T, at_once):
        end = min(begin + at_once, T)
        scores_BHMN = _scores(q_BHTK[:, :, begin:end], k_BGTK[:, :, :end], scale)
        begins_BM = None if begins_BT is None else begins_BT[:, begin:end]
        yield scores_BHMN, _sees(position_T[begin:end], position_T[:end], window, begins_BM)


def _largest(scores_BHMN: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    return scores_BHMN.masked_fill(~allowed, float("-inf")).amax((0, 2, 3))
