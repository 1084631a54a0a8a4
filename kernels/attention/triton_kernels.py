"""The kernels of triton.py: causal attention with a running softmax, forward and backward.

Shapes in names: B sequences, T positions, H query heads, G key and value heads, K features of a head, M queries of a
tile, N keys of a tile. x is a score that becomes an exponent of two when it is multiplied by a factor: q.k, or
tanh(scale q.k / softcap) with a softcap.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# The start of a running maximum. It is below every score, and finite: in a tile in which a query sees no key,
# exp2(-inf - LOWEST) is 0, but exp2(-inf + inf) would be NaN.
LOWEST = tl.constexpr(-1e30)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load(
    base,
    first,
    stride,
    n_rows,
    ROWS: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BOUNDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load rows first .. first + ROWS of a [n_rows, D_HEAD] matrix, padded to BLOCK_K columns with zeros.

    With BOUNDED, rows that do not exist are zeros too. Without it, all rows must exist.
    """
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_K)
    # Only the tile's corner needs 64 bits. Offsets in it fit in 32 bits (triton._addressable), which saves registers.
    pointers = base + tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + columns[None, :]
    if BOUNDED and D_HEAD < BLOCK_K:
        tile = tl.load(pointers, mask=(rows[:, None] < n_rows) & (columns[None, :] < D_HEAD), other=0.0)
    elif BOUNDED:
        tile = tl.load(pointers, mask=rows[:, None] < n_rows, other=0.0)
    elif D_HEAD < BLOCK_K:
        tile = tl.load(pointers, mask=columns[None, :] < D_HEAD, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _store(base, first, stride, n_rows, tile, ROWS: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inverse of _load: round `tile` to the matrix's type and store the elements that exist."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_K)
    pointers = base + tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + columns[None, :]
    inside = (rows[:, None] < n_rows) & (columns[None, :] < D_HEAD)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _allowed(queries, begins, keys, window, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Whether each query may see each key. Queries, and the begins of their documents, are a row and keys a column, or
    the other way round, so that they broadcast."""
    allowed = keys <= queries
    if WINDOW:
        allowed = allowed & (keys > queries - window)
    if DOCUMENTS:
        allowed = allowed & (keys >= begins)
    return allowed


@triton.jit
def _load_begins(BEGINS, b, query_M, T, DOCUMENTS: tl.constexpr):
    """The begins of the documents of queries; the queries themselves where documents are not told apart."""
    begin_M = query_M
    if DOCUMENTS:
        begin_M = tl.load(BEGINS + b * T + query_M, mask=query_M < T, other=0)
    return begin_M


@triton.jit
def _tanh(x, doubled):
    """tanh(x * doubled / (2 log2 e)) = 1 - 2 / (1 + 2^(x doubled)), which has the right limits if the power overflows.

    The error is absolute: one fp32 rounding of 1. After the product with `softcap` it is the rounding error of a score
    of about `softcap`.
    """
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * doubled))


@triton.jit
def _keys_of_queries(
    first_query, BEGINS, b, T, window, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Return (start, edge, stop), the range of keys of a tile of queries. start and edge are multiples of N.

    In the tiles from start to edge, all queries see all keys, and all keys exist. The tiles from edge to stop need a
    mask. With a window or documents all tiles are masked, because a third loop for the other edge would cost more
    registers than it would save work. Tiles before the document of the first query are left out: begins never fall.
    """
    stop = tl.minimum(first_query + M, T)
    start = 0
    edge = (first_query + 1) // N * N
    if WINDOW:
        start = tl.maximum(first_query + 1 - window, 0)
    if DOCUMENTS:
        start = tl.maximum(start, tl.load(BEGINS + b * T + first_query))
    if WINDOW or DOCUMENTS:
        start = start // N * N
        edge = start
    return start, edge, stop


@triton.jit
def _attend(
    accumulator_MK,
    largest_M,
    total_M,
    seen_M4,
    q_MK,
    k_base,
    v_base,
    stride_kt,
    stride_vt,
    start,
    stop,
    query_M,
    begin_M,
    T,
    window,
    exponent,
    doubled,
    N: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STATISTICS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add keys start .. stop to the running softmax of a tile of queries (FlashAttention-2, algorithm 1).

    Afterwards accumulator = sum 2^(e - largest) v and total = sum 2^(e - largest), with e the exponents and `largest`
    the largest of them. seen_M4 = (largest q.k, sum of q.k, sum of squares, sum 2^(e - largest) (e - largest)).
    """
    highest_M, sum_M, squares_M, weighted_M = seen_M4
    for first_key in range(start, stop, N):
        k_NK = _load(k_base, first_key, stride_kt, T, N, D_HEAD, BLOCK_K, MASKED, UPCAST)
        x_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="ieee")
        if MASKED:
            key_N = first_key + tl.arange(0, N)
            allowed_MN = _allowed(query_M[:, None], begin_M[:, None], key_N[None, :], window, WINDOW, DOCUMENTS)
        raw_MN = x_MN
        if SOFTCAP:
            x_MN = _tanh(x_MN, doubled)
        if MASKED:
            x_MN = tl.where(allowed_MN, x_MN, float("-inf"))
        new_largest_M = tl.maximum(largest_M, tl.max(x_MN, 1) * exponent)
        shifted_MN = x_MN * exponent - new_largest_M[:, None]
        p_MN = tl.exp2(shifted_MN)
        shrink_M = tl.exp2(largest_M - new_largest_M)
        v_NK = _load(v_base, first_key, stride_vt, T, N, D_HEAD, BLOCK_K, MASKED, UPCAST)
        if STATISTICS:
            if MASKED:
                highest_M = tl.maximum(highest_M, tl.max(tl.where(allowed_MN, raw_MN, float("-inf")), 1))
                seen_MN = tl.where(allowed_MN, raw_MN, 0.0)
            else:
                highest_M = tl.maximum(highest_M, tl.max(raw_MN, 1))
                seen_MN = raw_MN
            sum_M += tl.sum(seen_MN, 1)
            squares_M += tl.sum(seen_MN * seen_MN, 1)
        accumulator_MK = accumulator_MK * shrink_M[:, None]
        accumulator_MK = tl.dot(p_MN.to(v_NK.dtype), v_NK, accumulator_MK, input_precision="ieee")
        if STATISTICS:
            if MASKED:
                shifted_MN = tl.maximum(shifted_MN, LOWEST)
            weighted_M = shrink_M * (weighted_M + (largest_M - new_largest_M) * total_M)
            weighted_M += tl.sum(p_MN * shifted_MN, 1)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        largest_M = new_largest_M
    return accumulator_MK, largest_M, total_M, (highest_M, sum_M, squares_M, weighted_M)


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    PARTIALS,
    BEGINS,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_vb,
    stride_vg,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    T,
    heads_per_group,
    window,
    exponent,
    doubled,
    scale,
    per_score,
    per_query,
    M: tl.constexpr,
    N: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STATISTICS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The output of reference.attention for M queries of one head, and reference.attention_statistics over them.

    Q and OUT [B, H, T, D_HEAD] and K and V [B, G, T, D_HEAD] have one type and contiguous rows. LSE fp32 [B, H, T] is
    the log-sum-exp in base 2. PARTIALS fp32 [4, B, H, programs] is used with STATISTICS only. It holds the largest
    score, the sums of the scores and of their squares times `per_score`, and the sum of the entropies times
    `per_query`. BEGINS int32 [B, T], contiguous, is used with DOCUMENTS only: the position at which the document of
    each position begins, which never falls. Grid: (tiles of queries, H, B).

    FlashAttention-2 (arXiv 2307.08691), algorithm 1. The entropy of a query's weights p = 2^(e - largest) / total is
    -sum p ln p = ln 2 (log2 total - sum 2^(e - largest) (e - largest) / total). This equals lse - sum p s, but does not
    lose digits if s is large.
    """
    # The last queries see the most keys. They start first, so that no long program runs alone at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first_query = tile * M
    g = (h // heads_per_group).to(tl.int64)
    k_base = K + b * stride_kb + g * stride_kg
    v_base = V + b * stride_vb + g * stride_vg
    q_base = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    q_MK = _load(q_base, first_query, stride_qt, T, M, D_HEAD, BLOCK_K, True, UPCAST)
    query_M = first_query + tl.arange(0, M)
    begin_M = _load_begins(BEGINS, b, query_M, T, DOCUMENTS)

    accumulator_MK = tl.zeros([M, BLOCK_K], tl.float32)
    largest_M = tl.full([M], LOWEST, tl.float32)
    total_M = tl.zeros([M], tl.float32)
    seen_M4 = (tl.full([M], float("-inf"), tl.float32), total_M, total_M, total_M)
    start, edge, stop = _keys_of_queries(first_query, BEGINS, b, T, window, M, N, WINDOW, DOCUMENTS)
    if not (WINDOW or DOCUMENTS):
        accumulator_MK, largest_M, total_M, seen_M4 = _attend(
            accumulator_MK, largest_M, total_M, seen_M4, q_MK, k_base, v_base, stride_kt, stride_vt, start, edge,
            query_M, begin_M, T, window, exponent, doubled, N, D_HEAD, BLOCK_K, False, SOFTCAP, WINDOW, DOCUMENTS,
            STATISTICS, UPCAST,
        )  # fmt: skip
    accumulator_MK, largest_M, total_M, seen_M4 = _attend(
        accumulator_MK, largest_M, total_M, seen_M4, q_MK, k_base, v_base, stride_kt, stride_vt, edge, stop,
        query_M, begin_M, T, window, exponent, doubled, N, D_HEAD, BLOCK_K, True, SOFTCAP, WINDOW, DOCUMENTS,
        STATISTICS, UPCAST,
    )  # fmt: skip

    exists_M = query_M < T
    total_M = tl.where(exists_M, total_M, 1.0)
    out_base = OUT + b * stride_ob + h.to(tl.int64) * stride_oh
    _store(out_base, first_query, stride_ot, T, accumulator_MK / total_M[:, None], M, D_HEAD, BLOCK_K)
    row = b * tl.num_programs(1) + h
    tl.store(LSE + row * T + query_M, largest_M + tl.log2(total_M), mask=exists_M)
    if STATISTICS:
        highest_M, sum_M, squares_M, weighted_M = seen_M4
        entropy_M = LN_2 * (tl.log2(total_M) - weighted_M / total_M)
        apart = tl.num_programs(2) * tl.num_programs(1) * tl.num_programs(0)
        here = PARTIALS + row * tl.num_programs(0) + tile
        # A query that does not exist is all zeros. It adds nothing to the sums, but its score 0 could be the largest.
        highest = tl.max(tl.where(exists_M, highest_M, float("-inf")), 0)
        score = tl.sum(sum_M, 0)
        # The maximum on a GPU ignores NaN. A sum does not; it is also NaN for infinities of both signs.
        tl.store(here, scale * tl.where(score == score, highest, score))
        tl.store(here + apart, scale * score * per_score)
        tl.store(here + 2 * apart, scale * (scale * (tl.sum(squares_M, 0) * per_score)))
        tl.store(here + 3 * apart, tl.sum(entropy_M, 0) * per_query)


@triton.jit
def delta_kernel(
    OUT,
    GRAD,
    DELTA,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_db,
    stride_dh,
    stride_dt,
    T,
    M: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """DELTA = sum over features of OUT * GRAD, fp32 [B, H, T], for M queries of one head.

    It is the part of the softmax's gradient that is the same for all keys, sum_j p_j dp_j (FlashAttention-2, arXiv
    2307.08691, section 2.3.2). OUT and its gradient GRAD are [B, H, T, D_HEAD] with contiguous rows. Grid: (tiles of
    queries, H, B).
    """
    first_query = tl.program_id(0) * M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    out_base = OUT + b * stride_ob + h * stride_oh
    grad_base = GRAD + b * stride_db + h * stride_dh
    out_MK = _load(out_base, first_query, stride_ot, T, M, D_HEAD, BLOCK_K, True, True)
    grad_MK = _load(grad_base, first_query, stride_dt, T, M, D_HEAD, BLOCK_K, True, True)
    query_M = first_query + tl.arange(0, M)
    to = DELTA + (b * tl.num_programs(1) + h) * T + query_M
    tl.store(to, tl.sum(out_MK * grad_MK, 1), mask=query_M < T)


@triton.jit
def _weights(x, lse, exponent, doubled, SOFTCAP: tl.constexpr):
    """Return the weights p = 2^(e - lse) of the products x = q.k, and the slope of the softcap at x.

    With s = softcap tanh(scale q.k / softcap), the slope is ds / d(scale q.k) = 1 - tanh^2. Without a softcap it is 1.
    """
    slope = 1.0
    if SOFTCAP:
        x = _tanh(x, doubled)
        slope = 1.0 - x * x
    return tl.exp2(x * exponent - lse), slope


@triton.jit
def keys_values_kernel(
    Q,
    K,
    V,
    GRAD,
    LSE,
    DELTA,
    DK,
    DV,
    BEGINS,
    LASTS,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_vb,
    stride_vg,
    stride_vt,
    stride_db,
    stride_dh,
    stride_dt,
    stride_gb,
    stride_gg,
    stride_gt,
    T,
    heads_per_group,
    window,
    scale,
    exponent,
    doubled,
    M: tl.constexpr,
    N: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradients of reference.attention in N keys and values of one group, summed over its query heads in order.

    Q and GRAD [B, H, T, D_HEAD] and K, V, DK and DV [B, G, T, D_HEAD] have one type and contiguous rows; DK and DV have
    the same strides. LSE and DELTA fp32 [B, H, T] come from the kernels above. With DOCUMENTS, BEGINS is that of
    forward_kernel, and LASTS int32 [B, T] the last position of the document of each position. Grid: (tiles of keys, G,
    B).

    FlashAttention-2 (arXiv 2307.08691), algorithm 2, the outer loop over keys: dv = p^T grad, dp = grad v^T,
    ds = p (dp - delta) (times 1 - tanh^2 with a softcap), dk = scale ds^T q.
    """
    first_key = tl.program_id(0) * N
    g = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    k_base = K + b * stride_kb + g.to(tl.int64) * stride_kg
    v_base = V + b * stride_vb + g.to(tl.int64) * stride_vg
    k_NK = _load(k_base, first_key, stride_kt, T, N, D_HEAD, BLOCK_K, True, UPCAST)
    v_NK = _load(v_base, first_key, stride_vt, T, N, D_HEAD, BLOCK_K, True, UPCAST)
    key_N = first_key + tl.arange(0, N)

    dk_NK = tl.zeros([N, BLOCK_K], tl.float32)
    dv_NK = tl.zeros([N, BLOCK_K], tl.float32)
    start = first_key // M * M
    stop = T
    if WINDOW:
        stop = tl.minimum(T, first_key + N - 1 + window)
    if DOCUMENTS:  # no query after the document of the last key sees a key of this tile
        stop = tl.minimum(stop, tl.load(LASTS + b * T + tl.minimum(first_key + N, T) - 1) + 1)
    n_tiles = tl.cdiv(stop - start, M)
    # One loop goes over the tiles of all heads of the group, and all tiles are masked. Nested loops, or an extra loop
    # for tiles that need no mask, would need more registers. The mask costs little compared with the four products.
    for index in range(0, heads_per_group * n_tiles):
        h = (g * heads_per_group + index // n_tiles).to(tl.int64)
        first_query = start + index % n_tiles * M
        # A query that does not exist is all zeros. Its p = 2^0 multiplies a gradient and a dp - delta that are zero.
        q_MK = _load(Q + b * stride_qb + h * stride_qh, first_query, stride_qt, T, M, D_HEAD, BLOCK_K, True, UPCAST)
        query_M = first_query + tl.arange(0, M)
        exists_M = query_M < T
        row = (b * tl.num_programs(1) * heads_per_group + h) * T
        lse_M = tl.load(LSE + row + query_M, mask=exists_M, other=0.0)
        x_NM = tl.dot(k_NK, tl.trans(q_MK), input_precision="ieee")
        p_NM, slope_NM = _weights(x_NM, lse_M[None, :], exponent, doubled, SOFTCAP)
        begin_M = _load_begins(BEGINS, b, query_M, T, DOCUMENTS)
        allowed_NM = _allowed(query_M[None, :], begin_M[None, :], key_N[:, None], window, WINDOW, DOCUMENTS)
        p_NM = tl.where(allowed_NM, p_NM, 0.0)
        grad_base = GRAD + b * stride_db + h * stride_dh
        grad_MK = _load(grad_base, first_query, stride_dt, T, M, D_HEAD, BLOCK_K, True, UPCAST)
        dv_NK = tl.dot(p_NM.to(grad_MK.dtype), grad_MK, dv_NK, input_precision="ieee")
        dp_NM = tl.dot(v_NK, tl.trans(grad_MK), input_precision="ieee")
        delta_M = tl.load(DELTA + row + query_M, mask=exists_M, other=0.0)
        ds_NM = p_NM * (dp_NM - delta_M[None, :]) * slope_NM
        dk_NK = tl.dot(ds_NM.to(q_MK.dtype), q_MK, dk_NK, input_precision="ieee")
    to = b * stride_gb + g.to(tl.int64) * stride_gg
    _store(DK + to, first_key, stride_gt, T, dk_NK * scale, N, D_HEAD, BLOCK_K)
    _store(DV + to, first_key, stride_gt, T, dv_NK, N, D_HEAD, BLOCK_K)


@triton.jit
def _gather_queries(
    dq_MK,
    q_MK,
    grad_MK,
    lse_M,
    delta_M,
    k_base,
    v_base,
    stride_kt,
    stride_vt,
    start,
    stop,
    query_M,
    begin_M,
    T,
    window,
    exponent,
    doubled,
    N: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the contribution of keys start .. stop to the dq of a tile of queries. The caller scales dq afterwards."""
    for first_key in range(start, stop, N):
        k_NK = _load(k_base, first_key, stride_kt, T, N, D_HEAD, BLOCK_K, MASKED, UPCAST)
        x_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="ieee")
        p_MN, slope_MN = _weights(x_MN, lse_M[:, None], exponent, doubled, SOFTCAP)
        if MASKED:
            key_N = first_key + tl.arange(0, N)
            allowed_MN = _allowed(query_M[:, None], begin_M[:, None], key_N[None, :], window, WINDOW, DOCUMENTS)
            p_MN = tl.where(allowed_MN, p_MN, 0.0)
        v_NK = _load(v_base, first_key, stride_vt, T, N, D_HEAD, BLOCK_K, MASKED, UPCAST)
        dp_MN = tl.dot(grad_MK, tl.trans(v_NK), input_precision="ieee")
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * slope_MN
        dq_MK = tl.dot(ds_MN.to(k_NK.dtype), k_NK, dq_MK, input_precision="ieee")
    return dq_MK


@triton.jit
def queries_kernel(
    Q,
    K,
    V,
    GRAD,
    LSE,
    DELTA,
    DQ,
    BEGINS,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_vb,
    stride_vg,
    stride_vt,
    stride_db,
    stride_dh,
    stride_dt,
    stride_gb,
    stride_gh,
    stride_gt,
    T,
    heads_per_group,
    window,
    scale,
    exponent,
    doubled,
    M: tl.constexpr,
    N: tl.constexpr,
    D_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradient of reference.attention in M queries of one head: dq = scale ds k, with the ds of keys_values_kernel.

    The arguments are those of keys_values_kernel, with DQ [B, H, T, D_HEAD] in place of DK and DV. Grid: (tiles of
    queries, H, B).

    FlashAttention-2 (arXiv 2307.08691), algorithm 2. dq has a kernel of its own, so that it needs no atomic additions.
    """
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    g = (h // heads_per_group).to(tl.int64)
    k_base = K + b * stride_kb + g * stride_kg
    v_base = V + b * stride_vb + g * stride_vg
    q_base = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    grad_base = GRAD + b * stride_db + h.to(tl.int64) * stride_dh
    q_MK = _load(q_base, first_query, stride_qt, T, M, D_HEAD, BLOCK_K, True, UPCAST)
    grad_MK = _load(grad_base, first_query, stride_dt, T, M, D_HEAD, BLOCK_K, True, UPCAST)
    query_M = first_query + tl.arange(0, M)
    begin_M = _load_begins(BEGINS, b, query_M, T, DOCUMENTS)
    row = (b * tl.num_programs(1) + h) * T
    lse_M = tl.load(LSE + row + query_M, mask=query_M < T, other=0.0)
    delta_M = tl.load(DELTA + row + query_M, mask=query_M < T, other=0.0)

    dq_MK = tl.zeros([M, BLOCK_K], tl.float32)
    start, edge, stop = _keys_of_queries(first_query, BEGINS, b, T, window, M, N, WINDOW, DOCUMENTS)
    if not (WINDOW or DOCUMENTS):
        dq_MK = _gather_queries(
            dq_MK, q_MK, grad_MK, lse_M, delta_M, k_base, v_base, stride_kt, stride_vt, start, edge,
            query_M, begin_M, T, window, exponent, doubled, N, D_HEAD, BLOCK_K, False, SOFTCAP, WINDOW, DOCUMENTS,
            UPCAST,
        )  # fmt: skip
    dq_MK = _gather_queries(
        dq_MK, q_MK, grad_MK, lse_M, delta_M, k_base, v_base, stride_kt, stride_vt, edge, stop,
        query_M, begin_M, T, window, exponent, doubled, N, D_HEAD, BLOCK_K, True, SOFTCAP, WINDOW, DOCUMENTS,
        UPCAST,
    )  # fmt: skip
    dq_base = DQ + b * stride_gb + h.to(tl.int64) * stride_gh
    _store(dq_base, first_query, stride_gt, T, dq_MK * scale, M, D_HEAD, BLOCK_K)
