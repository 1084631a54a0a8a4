"""Causal attention in Triton: `attention` is an optimisation of reference.attention and reference.attention_statistics.

The algorithm is FlashAttention-2 (arXiv 2307.08691), which stores no T x T matrix. The forward pass keeps the
log-sum-exp of each query. The backward pass computes the weights again from it, once for the keys and values and once
for the queries. So every sum has a fixed order without atomics, and results are bitwise repeatable. Scores, weights and
sums are fp32, and a result is rounded once.

Shapes in names: B sequences, T positions, H query heads, G key and value heads, K features of a head, M queries of a
tile, N keys of a tile, S statistics.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
import triton

from scaling_testbed.kernels import support
from scaling_testbed.kernels.attention.reference import AttentionStatistics
from scaling_testbed.kernels.attention.triton_kernels import (
    delta_kernel,
    forward_kernel,
    keys_values_kernel,
    queries_kernel,
)
from scaling_testbed.kernels.limits import ATTENTION_D_HEADS

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """The tile sizes of a kernel (queries, keys), the warps of a program, and the pipeline stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# (kernel, padded d_head) -> tiles, for compute capability 9. "statistics" is the forward kernel with statistics. It has
# the same number of keys, so that the output is bitwise the same. Its loads are not pipelined if registers are scarce.
# With these tiles and those below, no kernel spills registers on 8.0, 9.0 and 10.0
# (python -m benchmarks.kernel_resources) if rows begin at multiples of 16 bytes, as they do in the model.
TILES = {
    ("forward", 32): Tiles(128, 64, 8, 3),
    ("forward", 64): Tiles(128, 64, 8, 3),
    ("forward", 128): Tiles(128, 64, 8, 2),
    ("statistics", 32): Tiles(128, 64, 8, 3),
    ("statistics", 64): Tiles(128, 64, 8, 3),
    ("statistics", 128): Tiles(128, 64, 8, 1),
    ("keys_values", 32): Tiles(64, 128, 8, 2),
    ("keys_values", 64): Tiles(64, 128, 8, 2),
    ("keys_values", 128): Tiles(32, 128, 8, 2),
    ("queries", 32): Tiles(128, 64, 8, 2),
    ("queries", 64): Tiles(128, 64, 8, 2),
    ("queries", 128): Tiles(128, 64, 8, 2),
}
TILES_BLACKWELL = TILES | {  # capability 10
    ("forward", 64): Tiles(64, 64, 4, 3),
    ("statistics", 128): Tiles(64, 64, 8, 2),
}
# Capability 8.0, whose matrix products read their operands from registers.
TILES_AMPERE = TILES | {
    ("forward", 128): Tiles(64, 64, 8, 3),
    ("statistics", 128): Tiles(64, 64, 8, 3),
    ("keys_values", 128): Tiles(64, 64, 8, 3),
    ("queries", 128): Tiles(64, 64, 8, 2),
}
TILES_SMALL = TILES_AMPERE | {("keys_values", 128): Tiles(64, 64, 8, 2)}  # all others: 99 KiB of shared memory
TILES_BY_CAPABILITY = {80: TILES_AMPERE, 90: TILES, 100: TILES_BLACKWELL, 103: TILES_BLACKWELL}
# Inputs of four bytes take twice the shared memory. Their products do not use tensor cores, and the operands fill
# registers.
TILES_FP32 = {
    ("forward", 32): Tiles(32, 32, 4, 2),
    ("forward", 64): Tiles(32, 32, 4, 2),
    ("forward", 128): Tiles(32, 32, 8, 1),
    ("statistics", 32): Tiles(32, 32, 4, 2),
    ("statistics", 64): Tiles(32, 32, 4, 2),
    ("statistics", 128): Tiles(32, 32, 8, 2),
    ("keys_values", 32): Tiles(32, 32, 4, 2),
    ("keys_values", 64): Tiles(32, 32, 8, 2),
    ("keys_values", 128): Tiles(32, 32, 8, 1),
    ("queries", 32): Tiles(64, 32, 4, 2),
    ("queries", 64): Tiles(32, 32, 4, 2),
    ("queries", 128): Tiles(32, 32, 4, 2),
}
DELTA_ELEMENTS = 2048  # elements of a tile of outputs
LARGEST_TILE = 128  # most rows of any tile in this file
LARGEST_GRID = 65535  # most programs along the second and the third axis (CUDA C Programming Guide, table 30)


@overload
def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    begins_BT: torch.Tensor | None = None,
    return_statistics: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    begins_BT: torch.Tensor | None = None,
    return_statistics: Literal[True],
) -> tuple[torch.Tensor, AttentionStatistics]: ...


def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    begins_BT: torch.Tensor | None = None,
    return_statistics: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, AttentionStatistics]:
    """reference.attention with the softmax: causal attention [B, H, T, K] over the last `window` keys (None: all).

    The inputs are all fp32, all bf16 or all fp16, on a GPU (or on a CPU in Triton's interpreter). d_head is one of
    ATTENTION_D_HEADS. The output and the gradients lie in memory as [B, T, H, K]. Views whose last dimension is
    contiguous are read in place. begins_BT: as of the definition; tiles of keys that no query of a tile sees are left
    out. return_statistics: also return reference.attention_statistics, which changes no other result.

    Raises ValueError for unsupported shapes, types or options, and RuntimeError on a CPU outside Triton's interpreter.
    """
    support.require(q_BHTK, "attention_impl=triton")
    _check(q_BHTK, k_BGTK, v_BGTK, scale, softcap, window)
    if begins_BT is not None:
        if begins_BT.shape != (q_BHTK.shape[0], q_BHTK.shape[2]) or begins_BT.device != q_BHTK.device:
            raise ValueError(f"begins must be [B, T] on {q_BHTK.device}, got {tuple(begins_BT.shape)}")
        begins_BT = begins_BT.to(torch.int32).contiguous()
    if window is not None and window >= q_BHTK.shape[2]:
        window = None  # the same result without masks for a window; also avoids overflow of 32 bits in sums with it
    out_BHTK, _, statistics_SH = _attention(
        q_BHTK, k_BGTK, v_BGTK, begins_BT, scale, softcap, window, return_statistics
    )
    if not return_statistics:
        return out_BHTK
    return out_BHTK, AttentionStatistics(*statistics_SH.unbind())


def _check(q, k, v, scale: float, softcap: float | None, window: int | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"attention takes q [B, H, T, K] and k, v [B, G, T, K], got {shapes}")
    if q.numel() == 0 or k.numel() == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention needs non-empty dimensions, and query heads a multiple of key heads, got {shapes}")
    if max(q.shape[:2]) > LARGEST_GRID:
        raise ValueError(f"attention takes at most {LARGEST_GRID} sequences and heads at once, got {shapes}")
    if q.shape[3] not in ATTENTION_D_HEADS:
        widths = ", ".join(map(str, ATTENTION_D_HEADS))
        raise ValueError(f"d_head must be one of {widths} for triton attention, got {q.shape[3]}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in support.DTYPES):
        raise ValueError(f"q, k, v must all be fp32, bf16 or fp16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    # The kernel takes the largest score of a tile before it multiplies by the scale, so the scale must be positive.
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


@torch.library.custom_op("scaling_testbed::attention", mutates_args=())
def _attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    begins_BT: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out_BHTK, the log-sum-exp lse_BHT in base 2, and statistics_SH: AttentionStatistics as rows, or no row."""
    q, k, v = (_addressable(x) for x in (q_BHTK, k_BGTK, v_BGTK))
    out, lse, statistics_SH = _allocate_forward(q, k, v, begins_BT, scale, softcap, window, statistics)
    B, H, T, d_head = q.shape
    partials = None
    with support.on_device(q):
        tiles, block_k = _tiles("statistics" if statistics else "forward", q)
        grid = (triton.cdiv(T, tiles.queries), H, B)
        if statistics:
            partials = torch.empty(4, *reversed(grid), dtype=torch.float32, device=q.device)
        forward_kernel[grid](
            *(q, k, v, out, lse, partials, begins_BT),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
            *(T, H // k.shape[1], window or 0, *_factors(scale, softcap)),
            *(scale, 1 / (B * _seen_keys(T, window)), 1 / (B * T)),
            **_constants(tiles, d_head, block_k, softcap, window, begins_BT),
            STATISTICS=statistics,
        )
        if partials is not None:  # as few operations as possible: each may cost a percent of the kernel's time
            torch.amax(partials[0], (0, 2), out=statistics_SH[0])
            statistics_SH[1:].copy_(partials[1:].sum((1, 3), dtype=torch.float64))
            if begins_BT is not None:  # the kernel divided by the pairs of one document
                statistics_SH[1:3] *= B * _seen_keys(T, window) / _seen_in_documents(begins_BT, window)
            statistics_SH[2].sqrt_()
    return out, lse, statistics_SH


@_attention.register_fake
def _allocate_forward(q, k, v, begins_BT, scale, softcap, window, statistics):
    B, H, T, _ = q.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    return _empty_like(q), lse, torch.empty(4 if statistics else 0, H, dtype=torch.float32, device=q.device)


def _seen_keys(T: int, window: int | None) -> int:
    """Number of pairs of a query and a key that it sees: query i sees min(i + 1, window) keys."""
    reach = min(window or T, T)
    return reach * (reach + 1) // 2 + (T - reach) * reach


def _seen_in_documents(begins_BT: torch.Tensor, window: int | None) -> torch.Tensor:
    """_seen_keys over all sequences, where documents are told apart."""
    seen_BT = torch.arange(1, begins_BT.shape[1] + 1, device=begins_BT.device) - begins_BT
    return (seen_BT if window is None else seen_BT.clamp(max=window)).sum()


def _lasts(begins_BT: torch.Tensor) -> torch.Tensor:
    """The last position of the document of each position, int32."""
    T = begins_BT.shape[1]
    position_T = torch.arange(T, dtype=torch.int32, device=begins_BT.device)
    begins_next_BT = torch.nn.functional.pad(begins_BT[:, 1:] == position_T[1:], (0, 1), value=True)
    return torch.where(begins_next_BT, position_T, T).flip(1).cummin(1).values.flip(1).to(torch.int32).contiguous()


@torch.library.custom_op("scaling_testbed::attention_backward", mutates_args=())
def _attention_backward(
    grad_BHTK: torch.Tensor,
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    out_BHTK: torch.Tensor,
    lse_BHT: torch.Tensor,
    begins_BT: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq_BHTK, dk_BGTK and dv_BGTK, from the gradient of out and the results of `_attention`."""
    grad, q, k, v, out = (_addressable(x) for x in (grad_BHTK, q_BHTK, k_BGTK, v_BGTK, out_BHTK))
    lse, delta = lse_BHT.contiguous(), torch.empty(lse_BHT.shape, dtype=torch.float32, device=q.device)
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    B, H, T, d_head = q.shape
    G = k.shape[1]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    options = (T, H // G, window or 0, scale, *_factors(scale, softcap))
    lasts_BT = None if begins_BT is None else _lasts(begins_BT)
    with support.on_device(q):
        _, block_k = _tiles("queries", q)
        rows = DELTA_ELEMENTS // block_k
        delta_kernel[(triton.cdiv(T, rows), H, B)](
            *(out, grad, delta, *out.stride()[:3], *grad.stride()[:3], T), M=rows, D_HEAD=d_head, BLOCK_K=block_k
        )
        tiles, block_k = _tiles("keys_values", q)
        keys_values_kernel[(triton.cdiv(T, tiles.keys), G, B)](
            *(q, k, v, grad, lse, delta, dk, dv, begins_BT, lasts_BT, *strides, *dk.stride()[:3], *options),
            **_constants(tiles, d_head, block_k, softcap, window, begins_BT),
        )
        tiles, block_k = _tiles("queries", q)
        queries_kernel[(triton.cdiv(T, tiles.queries), H, B)](
            *(q, k, v, grad, lse, delta, dq, begins_BT, *strides, *dq.stride()[:3], *options),
            **_constants(tiles, d_head, block_k, softcap, window, begins_BT),
        )
    return dq, dk, dv


@_attention_backward.register_fake
def _allocate_backward(grad, q, k, v, out, lse, begins, scale, softcap, window):
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, begins, ctx.scale, ctx.softcap, ctx.window, _ = inputs
    out, lse, statistics_SH = output
    ctx.save_for_backward(q, k, v, out, lse, begins)
    ctx.mark_non_differentiable(lse, statistics_SH)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_BHTK, _lse, _statistics):
    if grad_BHTK is None:
        return (None,) * 8
    gradients = _attention_backward(grad_BHTK, *ctx.saved_tensors, ctx.scale, ctx.softcap, ctx.window)
    return (*gradients, *[None] * 5)


_attention.register_autograd(_backward, setup_context=_setup_context)


def _addressable(x_BHTK: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy if its rows are not contiguous, or if offsets in a tile of rows exceed 32 bits."""
    near = (LARGEST_TILE + 1) * x_BHTK.stride(2) < 2**31
    return x_BHTK if near and x_BHTK.stride(3) == 1 else x_BHTK.contiguous()


def _empty_like(x_BHTK: torch.Tensor) -> torch.Tensor:
    """An empty tensor with x's shape and type that lies in memory as [B, T, H, K], so that joining heads is a view."""
    B, H, T, K = x_BHTK.shape
    return torch.empty(B, T, H, K, dtype=x_BHTK.dtype, device=x_BHTK.device).transpose(1, 2)


def _tiles(kernel: str, q: torch.Tensor) -> tuple[Tiles, int]:
    """The tiles of `kernel` on the current device, and d_head padded to a power of two."""
    block_k = triton.next_power_of_2(q.shape[-1])
    if q.dtype == torch.float32:
        return TILES_FP32[kernel, block_k], block_k
    # The capability comes from Triton and not from torch, so that one can compile for a device without having it.
    capability = 90 if support.INTERPRETED else triton.runtime.driver.active.get_current_target().arch
    return TILES_BY_CAPABILITY.get(capability, TILES_SMALL)[kernel, block_k], block_k


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(exponent, doubled): the factor that makes q.k, or its tanh, an exponent of two, and the argument of _tanh."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return softcap * LOG2_E, 2 * LOG2_E * scale / softcap


def _constants(
    tiles: Tiles,
    d_head: int,
    block_k: int,
    softcap: float | None,
    window: int | None,
    begins_BT: torch.Tensor | None = None,
) -> dict:
    return {
        "M": tiles.queries,
        "N": tiles.keys,
        "D_HEAD": d_head,
        "BLOCK_K": block_k,
        "SOFTCAP": softcap is not None,
        "WINDOW": window is not None,
        "DOCUMENTS": begins_BT is not None,
        "UPCAST": support.INTERPRETED,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
