"""The kernels of triton.py: rows of stored logits, and a forward and a weight kernel that store none.

The gradients are derived in chunked.py. Shapes in names: N tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def head_row_kernel(
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
def head_forward_kernel(
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
    target_ce = tl.where(inside, log_partition - target_y, float("nan"))  # as in head_row_kernel
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
def head_weight_kernel(
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
