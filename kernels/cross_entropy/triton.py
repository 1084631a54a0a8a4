"""Linear cross-entropy with z-loss on a GPU, in Triton. An optimisation of reference.linear_cross_entropy.

Three variants. All are bitwise repeatable (no atomics), and all compute the gradients in the forward pass:

chunked    The loop of chunked.py, with one kernel that replaces a chunk's logits by their gradient. Per token it takes
           6 V D FLOPs in the GPU library's matrix products, and 12 V bytes of memory traffic.
wide_rows  The same with four times as many threads for a row. A row of up to 16,384 columns stays in registers, and
           the kernel reads it once. It reads a longer row twice, and with fewer rows at a time the second read finds
           the row in the GPU's cache. It takes 10 V bytes.
recompute  Logits exist only as tiles. It is an attention over the vocabulary: hidden states are the queries, and the
           rows of the head are keys and values. It takes 8 V D FLOPs, no such traffic and no buffer. It is for narrow
           models.

The gradients are derived in chunked.py. Shapes in names: N tokens, C tokens of a chunk, D model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaling_testbed.kernels import support
from scaling_testbed.kernels.cross_entropy.chunked import (
    AddInto,
    CrossEntropy,
    call_operator,
    chunked_gradients,
    define_operator,
    product_dtype,
)
from scaling_testbed.kernels.cross_entropy.reference import summed
from scaling_testbed.kernels.limits import RECOMPUTED_HEAD_WIDEST_MODEL as WIDEST_RECOMPUTE
from scaling_testbed.kernels.reference import wide

# Vocabulary columns and features that one step of the row kernel reads, and its warps. By its registers
# (python -m benchmarks.kernel_resources) a multiprocessor processes 5 rows at a time, or 2 wide ones. With 132
# multiprocessors and 50,304 columns in bf16 these are 63 or 25 MiB, and the L2 cache of an H100 or H200 has 50 MiB. A
# row that fits one tile stays in registers. Longer rows do not: a tile of 32,768 columns spills.
ROW_TILE = {"BLOCK_V": 4096, "BLOCK_D": 1024, "num_warps": 8}
WIDE_ROW_TILE = {"BLOCK_V": 8192, "BLOCK_D": 1024, "num_warps": 32}
WIDEST_ROW_TILE = 16384
# (Padded width, bytes per number) -> tokens and vocabulary columns of a tile, warps, stages. No kernel spills registers
# (python -m benchmarks.kernel_resources). The fp32 products do not use tensor cores; they are for checks.
FORWARD_TILES = {
    (64, 2): (128, 64, 8, 3),
    (128, 2): (128, 32, 8, 3),
    (64, 4): (32, 32, 8, 1),
    (128, 4): (16, 16, 8, 1),
}
WEIGHT_TILES = {
    (64, 2): (64, 64, 4, 3),
    (128, 2): (64, 64, 4, 3),
    (64, 4): (32, 32, 8, 1),
    (128, 4): (32, 16, 8, 1),
}
# A model of bytes and FLOPs predicts that recompute is faster at every width that it supports, and wide_rows at all
# others. This is not yet measured on a GPU, so `auto` takes the simplest variant. benchmarks/head.py times all.
AUTO_VARIANT = "chunked"


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    weights_N: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    into: AddInto | None = None,
    variant: str = "auto",
) -> CrossEntropy:
    """chunked.linear_cross_entropy in Triton, with the same arguments and result.

    variant: chunked | wide_rows | recompute (D at most 128) | auto (chunked, until another is measured to be faster).
    The products run in fp32 or bf16. In fp16, small gradients would underflow before any scaling of the loss. In
    training, chunked and wide_rows hold logits in bf16, so log Z includes their rounding error. The target's logit does
    not, and neither does an evaluation. A target outside the vocabulary makes the loss NaN.

    Raises RuntimeError on a CPU outside Triton's interpreter, and ValueError for unsupported shapes, types or options.
    """
    support.require(hidden_ND, "loss.impl=triton")
    if variant == "auto":
        variant = AUTO_VARIANT
    if variant not in OPERATORS:
        raise ValueError(f"variant must be auto, {', '.join(OPERATORS)}; got {variant!r}")
    if variant == "recompute" and weight_VD.shape[1] > WIDEST_RECOMPUTE:
        raise ValueError(f"variant=recompute needs a width of at most {WIDEST_RECOMPUTE}, got {weight_VD.shape[1]}")
    for dtype in (hidden_ND.dtype, weight_VD.dtype, product_dtype(hidden_ND)):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"loss.impl=triton computes in fp32 or bf16, got {dtype}")
    numbers = z_loss, softcap, ignore_index, chunk_bytes or 0
    operator, compute = OPERATORS[variant], COMPUTE[variant]
    return call_operator(operator, compute, hidden_ND, weight_VD, targets_N, weights_N, *numbers, into)


@triton.jit
def _capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return y = s tanh(x / s) and dy/dx = 1 - (y / s)^2; without a softcap, x and 1."""
    if HAS_SOFTCAP:
        # tanh through exp, because the interpreter has no tanh. The result saturates to +-1 and does not overflow.
        tanh = 1 - 2 / (1 + tl.exp(2 * (x / softcap)))
        return softcap * tanh, 1 - tanh * tanh
    return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _logits(logits, v, V, target_v, target_logit, softcap, HAS_SOFTCAP: tl.constexpr):
    """Load the columns v of a row: capped logits y, -inf from column V on, and dy/dx. The target's is target_logit."""
    x = tl.load(logits + v, mask=v < V, other=0.0).to(tl.float32)
    y, slope = _capped(tl.where(v == target_v, target_logit, x), softcap, HAS_SOFTCAP)
    return tl.where(v < V, y, float("-inf")), slope


@triton.jit
def _row_kernel(
    logits,
    logits_stride,
    hidden,
    weight,
    targets,
    weights,
    ce,
    log_z,
    V,
    D,
    z_loss,
    softcap,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute ce and log Z of one token (reference.linear_cross_entropy), and replace its logits [V] by their gradient.

    logits are bf16 or fp32, with rows `logits_stride` apart; hidden [C, D] and weight [V, D] are contiguous; weights
    (None: 1), ce and log_z are fp32 [C]. There are two passes. The first computes log Z from a running maximum and sum.
    The second replaces each logit by ((w + 2 c log Z) p_j - w 1[j = t]) times the softcap's slope. With ONE_TILE, V is
    at most BLOCK_V, and the second pass takes the logits of the first one, which are still in registers. The target's
    logit is an fp32 dot product and not the rounded logit, whose rounding error would be the largest part of the loss's
    error.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    valid = target != ignore_index
    inside = (target >= 0) & (target < V)
    picked = tl.where(inside, target, 0)
    target_x = tl.zeros([BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        target_x += h * tl.load(weight + picked * D + d, mask=d < D, other=0.0).to(tl.float32)
    target_logit = tl.sum(target_x, 0)
    target_v = picked.to(tl.int32)  # 64 bits would double the work of every comparison below

    logits += row * logits_stride
    if ONE_TILE:
        v = tl.arange(0, BLOCK_V)
        y, slope = _logits(logits, v, V, target_v, target_logit, softcap, HAS_SOFTCAP)
        largest = tl.max(y, 0)
        total = tl.sum(tl.exp(y - largest), 0)
    else:
        largest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for v0 in range(0, V, BLOCK_V):
            y, _ = _logits(logits, v0 + tl.arange(0, BLOCK_V), V, target_v, target_logit, softcap, HAS_SOFTCAP)
            larger = tl.maximum(largest, tl.max(y, 0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(y - larger), 0)
            largest = larger
    log_partition = largest + tl.log(total)
    target_y, _ = _capped(tl.zeros([1], tl.float32) + target_logit, softcap, HAS_SOFTCAP)
    # The loss of a target outside the vocabulary is NaN, which ends the run. A number would hide a wrong vocabulary.
    target_ce = tl.where(inside, log_partition - tl.sum(target_y, 0), float("nan"))
    tl.store(ce + row, tl.where(valid, target_ce, 0.0))
    tl.store(log_z + row, tl.where(valid, log_partition, 0.0))

    if WANT_GRADIENT:
        token_w = tl.load(weights + row) if HAS_WEIGHTS else 1.0
        factor = token_w + 2 * z_loss * log_partition
        if ONE_TILE:
            grad = (factor * tl.exp(y - log_partition) - tl.where(v == target_v, token_w, 0.0)) * slope
            tl.store(logits + v, tl.where(valid, grad, 0.0).to(logits.dtype.element_ty), mask=v < V)
        else:
            for v0 in range(0, V, BLOCK_V):
                v = v0 + tl.arange(0, BLOCK_V)
                y, slope = _logits(logits, v, V, target_v, target_logit, softcap, HAS_SOFTCAP)
                grad = (factor * tl.exp(y - log_partition) - tl.where(v == target_v, token_w, 0.0)) * slope
                tl.store(logits + v, tl.where(valid, grad, 0.0).to(logits.dtype.element_ty), mask=v < V)


def triton_rows(
    logits_CV,
    hidden_CD,
    weight_VD,
    targets_C,
    weights_C,
    ce_C,
    log_z_C,
    z_loss,
    softcap,
    ignore_index,
    want,
    wide=False,
) -> None:
    """The `rows` argument of `chunked_gradients`, as one launch of `_row_kernel`."""
    V, D = weight_VD.shape
    tile = _row_tile(wide, V, want)
    tile = tile | {"BLOCK_D": min(tile["BLOCK_D"], triton.next_power_of_2(D))}
    with support.on_device(logits_CV):
        _row_kernel[(len(logits_CV),)](
            logits_CV,
            logits_CV.stride(0),
            hidden_CD,
            weight_VD,
            targets_C,
            weights_C,
            ce_C,
            log_z_C,
            V,
            D,
            z_loss,
            softcap or 1.0,
            ignore_index,
            HAS_WEIGHTS=weights_C is not None,
            HAS_SOFTCAP=softcap is not None,
            WANT_GRADIENT=want,
            ONE_TILE=tile["BLOCK_V"] >= V,
            **tile,
        )


def _row_tile(wide: bool, columns: int, want: bool) -> dict[str, int]:
    """The tile of a row. A wide one holds a row of up to WIDEST_ROW_TILE columns, if its gradient is wanted."""
    if not wide:
        return ROW_TILE
    once = want and WIDE_ROW_TILE["BLOCK_V"] < columns <= WIDEST_ROW_TILE
    return WIDE_ROW_TILE | {"BLOCK_V": WIDEST_ROW_TILE} if once else WIDE_ROW_TILE


@triton.jit
def _tile(base, rows, n_rows, D, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows `rows` of a contiguous [n_rows, D], zero outside. UPCAST: the interpreter's bf16 products are wrong."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < n_rows) & (d[None, :] < D)
    tile = tl.load(base + rows[:, None].to(tl.int64) * D + d[None, :], mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _token_weights(weights, n, N, HAS_WEIGHTS: tl.constexpr):
    """The fp32 weights of tokens `n`, zero outside; without any, ones, by which the compiler does not multiply."""
    if HAS_WEIGHTS:
        return tl.load(weights + n, mask=n < N, other=0.0)
    return tl.full(n.shape, 1.0, tl.float32)


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    targets,
    weights,
    ce,
    log_z,
    grad_hidden,
    N,
    V,
    D,
    z_loss,
    softcap,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute ce, log Z and the gradient of hidden for BLOCK_N tokens in one pass over the vocabulary.

    No logits are stored in memory. hidden [N, D] and weight [V, D] are contiguous and have one type; weights (None: 1),
    ce and log_z are fp32 [N]; grad_hidden is [N, D]. With W the head and w the token's weight,
        dL/dh = (w + 2 c log Z) sum_j p_j slope_j W_j - w slope_t W_t.
    The sum over j is computed as in flash attention (arXiv 2205.14135, algorithm 1): the loop accumulates
    exp(y_j - running maximum) slope_j W_j, and the result is divided by the total of the exponentials at the end.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = _tile(hidden, n, N, D, BLOCK_D, UPCAST)
    target = tl.load(targets + n, mask=n < N, other=ignore_index)
    valid = target != ignore_index
    inside = (target >= 0) & (target < V)
    picked = tl.where(inside, target, 0).to(tl.int32)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    target_y = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        w = _tile(weight, v, V, D, BLOCK_D, UPCAST)
        y, slope = _capped(tl.dot(h, tl.trans(w), input_precision="ieee"), softcap, HAS_SOFTCAP)
        y = tl.where(v[None, :] < V, y, float("-inf"))
        target_y += tl.sum(tl.where(v[None, :] == picked[:, None], y, 0.0), 1)
        larger = tl.maximum(largest, tl.max(y, 1))
        shrink = tl.exp(largest - larger)
        p = tl.exp(y - larger[:, None])
        total = total * shrink + tl.sum(p, 1)
        if WANT_GRADIENT:
            if HAS_SOFTCAP:
                p *= slope
            weighted = tl.dot(p.to(w.dtype), w, weighted * shrink[:, None], input_precision="ieee")
        largest = larger
    log_partition = largest + tl.log(total)
    target_ce = tl.where(inside, log_partition - target_y, float("nan"))  # as in _row_kernel
    tl.store(ce + n, tl.where(valid, target_ce, 0.0), mask=n < N)
    tl.store(log_z + n, tl.where(valid, log_partition, 0.0), mask=n < N)
    if WANT_GRADIENT:
        token_w = _token_weights(weights, n, N, HAS_WEIGHTS)
        factor = (token_w + 2 * z_loss * log_partition) / total
        target_w = _tile(weight, picked, V, D, BLOCK_D, UPCAST).to(tl.float32)
        if HAS_SOFTCAP:
            target_w *= (1 - (target_y / softcap) * (target_y / softcap))[:, None]
        grad = weighted * factor[:, None] - target_w * token_w[:, None]
        d = tl.arange(0, BLOCK_D)
        tl.store(
            grad_hidden + n[:, None].to(tl.int64) * D + d[None, :],
            tl.where(valid[:, None], grad, 0.0).to(grad_hidden.dtype.element_ty),
            mask=(n[:, None] < N) & (d[None, :] < D),
        )


@triton.jit
def _weight_kernel(
    hidden,
    weight,
    targets,
    weights,
    log_z,
    grad_weight,
    N,
    V,
    D,
    z_loss,
    softcap,
    ignore_index,
    scale,
    ADD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the fp32 gradient of BLOCK_V rows of the head [V, D]. One program sums over all tokens, in order.

    With ADD, scale times the gradient is added to what grad_weight holds.

    Each tile of logits is computed again and replaced by its gradient with the known log Z. The gradient is rounded to
    the inputs' type and multiplied with the hidden states: dL/dW_j = sum_n dL/dx_nj h_n.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    w = _tile(weight, v, V, D, BLOCK_D, UPCAST)
    summed = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        h = _tile(hidden, n, N, D, BLOCK_D, UPCAST)
        target = tl.load(targets + n, mask=n < N, other=ignore_index)
        valid = target != ignore_index
        target = tl.where(valid, target, -1).to(tl.int32)
        log_partition = tl.load(log_z + n, mask=n < N, other=0.0)
        y, slope = _capped(tl.dot(w, tl.trans(h), input_precision="ieee"), softcap, HAS_SOFTCAP)
        y = tl.where(valid[None, :], y, float("-inf"))
        token_w = _token_weights(weights, n, N, HAS_WEIGHTS)
        factor = token_w + 2 * z_loss * log_partition
        p = tl.exp(y - log_partition[None, :])
        grad = factor[None, :] * p - tl.where(v[:, None] == target[None, :], token_w[None, :], 0.0)
        if HAS_SOFTCAP:
            grad *= slope
        summed = tl.dot(grad.to(h.dtype), h, summed, input_precision="ieee")
    d = tl.arange(0, BLOCK_D)
    mask = (v[:, None] < V) & (d[None, :] < D)
    grad_weight += v[:, None].to(tl.int64) * D + d[None, :]
    if ADD:
        summed = tl.load(grad_weight, mask=mask, other=0.0) + scale * summed
    tl.store(grad_weight, summed, mask=mask)


def _recompute(
    hidden_ND,
    weight_VD,
    targets_N,
    weights_N,
    z_loss,
    softcap,
    ignore_index,
    dtype,
    chunk_bytes,
    want_hidden,
    want_weight,
    into=None,
):
    """The recompute variant, for `define_operator`. It does not use `chunk_bytes`."""
    (N, D), V = hidden_ND.shape, len(weight_VD)
    hidden, weight = (x.to(dtype).contiguous() for x in (hidden_ND, weight_VD))
    ce_N = wide(hidden_ND.new_empty(0)).new_empty(N)
    log_z_N = torch.empty_like(ce_N)
    grad_hidden_ND = hidden_ND.new_empty((N, D) if want_hidden else 0)
    grad_weight_VD = ce_N.new_empty((V, D) if want_weight else 0)
    key = max(64, triton.next_power_of_2(D)), dtype.itemsize
    shared = {"HAS_WEIGHTS": weights_N is not None, "HAS_SOFTCAP": softcap is not None}
    shared |= {"UPCAST": support.INTERPRETED, "BLOCK_D": key[0]}
    numbers = (N, V, D, z_loss, softcap or 1.0, ignore_index)
    with support.on_device(hidden):
        if N:
            tile = _named(FORWARD_TILES[key])
            _forward_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
                *(hidden, weight, targets_N, weights_N, ce_N, log_z_N, grad_hidden_ND, *numbers),
                WANT_GRADIENT=want_hidden,
                **shared,
                **tile,
            )
        if want_weight or into is not None:
            tile = _named(WEIGHT_TILES[key])
            summed_VD, scale = (grad_weight_VD, 1.0) if into is None else into
            _weight_kernel[(triton.cdiv(V, tile["BLOCK_V"]),)](
                *(hidden, weight, targets_N, weights_N, log_z_N, summed_VD, *numbers, scale),
                ADD=into is not None,
                **shared,
                **tile,
            )
    loss = summed(ce_N, log_z_N, z_loss, weights_N)
    return loss, ce_N, log_z_N, grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype)


def _named(tile: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("BLOCK_N", "BLOCK_V", "num_warps", "num_stages"), tile, strict=True))


COMPUTE: dict[str, Callable] = {
    "chunked": partial(chunked_gradients, triton_rows),
    "wide_rows": partial(chunked_gradients, partial(triton_rows, wide=True)),
    "recompute": _recompute,
}
OPERATORS = {
    "chunked": define_operator("triton_cross_entropy", COMPUTE["chunked"]),
    "wide_rows": define_operator("triton_wide_cross_entropy", COMPUTE["wide_rows"]),
    "recompute": define_operator("recomputed_cross_entropy", COMPUTE["recompute"]),
}
