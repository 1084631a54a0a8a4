"""The kernels of triton.py: norm and rotation of rows, forward and backward.

N is the number of rows of a tile. A row is one head at one position; its number is (b T + t) heads + h. A tile consists
of two [N, R] halves, first and second, because feature r is rotated with feature r + R.

SPAN is the number of neighbouring rows of a tile that are normed as one: 1 for a norm of each head, and the heads of a
position, padded to a power of two, for a norm over all heads together.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(tile, n_rows, HEADS: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr):
    """The numbers of the rows of a tile, and whether each row exists."""
    n = tl.arange(0, N)
    if SPAN == 1:
        row_N = tile * N + n
        exists_N = row_N < n_rows
    else:
        # Some heads of a position are padding if the number of heads is no power of two.
        h_N = n % SPAN
        row_N = (tile * (N // SPAN) + n // SPAN) * HEADS + h_N
        exists_N = (h_N < HEADS) & (row_N < n_rows)
    return row_N, exists_N


@triton.jit
def _locate(
    row_N,
    n_rows,
    T,
    stride_b,
    stride_h,
    stride_t,
    HEADS: tl.constexpr,
    OWN_TABLES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The offsets of rows in a tensor with these strides (64 bits; multiples of ALIGNMENT), and the rows of the tables
    of angles that are theirs: t, or b T + t with OWN_TABLES (64 bits)."""
    token_N = row_N // HEADS
    b_N = token_N // T
    t_N = token_N % T
    h_N = row_N % HEADS
    offset_N = b_N.to(tl.int64) * stride_b + t_N.to(tl.int64) * stride_t + h_N.to(tl.int64) * stride_h
    angle_N = t_N
    if OWN_TABLES:
        angle_N = tl.minimum(token_N, n_rows // HEADS - 1).to(tl.int64)
    return tl.multiple_of(offset_N, ALIGNMENT), angle_N


@triton.jit
def _load_halves(base, offset_N, exists_N, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Load both halves of the rows at `offset_N` in fp32, zero outside. Bf16 arithmetic is wrong in the interpreter."""
    r = tl.arange(0, BLOCK_R)[None, :]
    pointers = base + offset_N[:, None] + r
    exists_NR = exists_N[:, None] & (r < R)
    first_NR = tl.load(pointers, mask=exists_NR, other=0.0).to(tl.float32)
    second_NR = tl.load(pointers + R, mask=exists_NR, other=0.0).to(tl.float32)
    return first_NR, second_NR


@triton.jit
def _store_halves(base, row_N, exists_N, first_NR, second_NR, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Round two halves to the type of `base`, whose rows are contiguous in memory, and store the rows that exist."""
    r = tl.arange(0, BLOCK_R)[None, :]
    pointers = base + row_N.to(tl.int64)[:, None] * (2 * R) + r
    exists_NR = exists_N[:, None] & (r < R)
    tl.store(pointers, first_NR.to(base.dtype.element_ty), mask=exists_NR)
    tl.store(pointers + R, second_NR.to(base.dtype.element_ty), mask=exists_NR)


@triton.jit
def _load_angles(COS, SIN, angle_N, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Load cos and sin of each row's position. Heads of the same position read the same values, from a cache."""
    r = tl.arange(0, BLOCK_R)[None, :]
    at = angle_N[:, None] * R + r
    return tl.load(COS + at, mask=r < R, other=0.0), tl.load(SIN + at, mask=r < R, other=0.0)


@triton.jit
def _load_gains(GAIN, HEADS: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr):
    """Load the gains of both halves: [1, BLOCK_R] each, or [N, BLOCK_R] if each head has its own."""
    r = tl.arange(0, BLOCK_R)[None, :]
    if SPAN == 1:
        pointers = GAIN + r
        exists = r < R
    else:
        h_N1 = (tl.arange(0, N) % SPAN)[:, None]
        pointers = GAIN + h_N1 * (2 * R) + r
        exists = (h_N1 < HEADS) & (r < R)
    return tl.load(pointers, mask=exists, other=0.0), tl.load(pointers + R, mask=exists, other=0.0)


@triton.jit
def _mean(sum_N, HEADS: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr):
    """The mean over what is normed as one, for each row, from the sums over the rows."""
    if SPAN == 1:
        mean_N = sum_N / (2 * R)
    else:
        total = tl.sum(tl.reshape(sum_N, [N // SPAN, SPAN]), 1)[:, None] / (2 * R * HEADS)
        mean_N = tl.reshape(tl.broadcast_to(total, [N // SPAN, SPAN]), [N])
    return mean_N


@triton.jit
def _store_partial(
    PARTIAL,
    part,
    n_parts,
    sum_NR,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPAN: tl.constexpr,
    N: tl.constexpr,
):
    """Store the sums over a program's rows for one half of the gains.

    PARTIAL is [features, P], so that the later sum over P adds neighbours in memory, which is much faster in torch.
    """
    r = tl.arange(0, BLOCK_R)
    if SPAN == 1:
        tl.store(PARTIAL + r * n_parts + part, tl.sum(sum_NR, 0), mask=r < R)
    else:
        h = tl.arange(0, SPAN)[:, None]
        feature_HR = h * (2 * R) + r[None, :]
        sum_HR = tl.sum(tl.reshape(sum_NR, [N // SPAN, SPAN, BLOCK_R]), 0)
        tl.store(PARTIAL + feature_HR * n_parts + part, sum_HR, mask=(h < HEADS) & (r[None, :] < R))


@triton.jit
def _normalise(
    first_NR,
    second_NR,
    exists_N,
    eps,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPAN: tl.constexpr,
    N: tl.constexpr,
):
    """Return the two halves of xhat = reference.qk_norm without the gain, and scale_N = 1 / deviation or 1 / rms."""
    if KIND == "layernorm":
        mean_N1 = _mean(tl.sum(first_NR + second_NR, 1), HEADS, R, SPAN, N)[:, None]
        # Heads that pad a position and features that pad a half must stay zero.
        inside = exists_N[:, None] & (tl.arange(0, BLOCK_R)[None, :] < R)
        first_NR = tl.where(inside, first_NR - mean_N1, 0.0)
        second_NR = tl.where(inside, second_NR - mean_N1, 0.0)
    square_N = _mean(tl.sum(first_NR * first_NR + second_NR * second_NR, 1), HEADS, R, SPAN, N)
    # A row that does not exist is all zeros. With eps = 0 it would give 0 / 0, which would enter the gains' gradients.
    scale_N = tl.rsqrt(tl.where(exists_N, square_N + eps, 1.0))
    return first_NR * scale_N[:, None], second_NR * scale_N[:, None], scale_N


@triton.jit
def _forward_tile(
    X,
    OUT,
    GAIN,
    COS,
    SIN,
    stride_b,
    stride_h,
    stride_t,
    tile,
    n_rows,
    T,
    eps,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPAN: tl.constexpr,
    N: tl.constexpr,
    OWN_TABLES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Process N rows of q or of k for `forward_kernel`."""
    row_N, exists_N = _rows(tile, n_rows, HEADS, SPAN, N)
    offset_N, angle_N = _locate(row_N, n_rows, T, stride_b, stride_h, stride_t, HEADS, OWN_TABLES, ALIGNMENT)
    first_NR, second_NR = _load_halves(X, offset_N, exists_N, R, BLOCK_R)
    cos_NR, sin_NR = _load_angles(COS, SIN, angle_N, R, BLOCK_R)
    if KIND != "none":
        first_gain, second_gain = _load_gains(GAIN, HEADS, R, BLOCK_R, SPAN, N)
        first_NR, second_NR, _ = _normalise(first_NR, second_NR, exists_N, eps, KIND, HEADS, R, BLOCK_R, SPAN, N)
        first_NR *= first_gain
        second_NR *= second_gain
    turned_first_NR = first_NR * cos_NR - second_NR * sin_NR
    turned_second_NR = second_NR * cos_NR + first_NR * sin_NR
    _store_halves(OUT, row_N, exists_N, turned_first_NR, turned_second_NR, R, BLOCK_R)


@triton.jit
def forward_kernel(
    Q,
    K,
    Q_OUT,
    K_OUT,
    Q_GAIN,
    K_GAIN,
    COS,
    SIN,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_kt,
    n_q_tiles,
    n_q_rows,
    n_k_rows,
    T,
    eps,
    KIND: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    H_SPAN: tl.constexpr,
    G_SPAN: tl.constexpr,
    N: tl.constexpr,
    OWN_TABLES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """reference.qk_norm_rope, or reference.apply_rotary of q and k if KIND is "none".

    Q [B, H, T, 2 R] and K [B, G, T, 2 R] are fp32, bf16 or fp16 with contiguous rows. Q_OUT and K_OUT have the same
    shapes, lie in memory as [B, T, heads, 2 R], and have any of those types. The gains are fp32 [2 R], or [heads 2 R]
    for a norm over all heads together, or None. COS and SIN are fp32 [T, R], or [B, T, R] with OWN_TABLES,
    contiguous. Grid: the tiles of N rows of q, then those of k.
    """
    program = tl.program_id(0)
    if program < n_q_tiles:
        _forward_tile(
            Q, Q_OUT, Q_GAIN, COS, SIN, stride_qb, stride_qh, stride_qt, program, n_q_rows, T, eps,
            KIND, H, R, BLOCK_R, H_SPAN, N, OWN_TABLES, ALIGNMENT,
        )  # fmt: skip
    else:
        _forward_tile(
            K, K_OUT, K_GAIN, COS, SIN, stride_kb, stride_kg, stride_kt, program - n_q_tiles, n_k_rows, T, eps,
            KIND, G, R, BLOCK_R, G_SPAN, N, OWN_TABLES, ALIGNMENT,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    X,
    GRAD,
    DX,
    PARTIAL,
    GAIN,
    COS,
    SIN,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_gb,
    stride_gh,
    stride_gt,
    part,
    n_parts,
    n_tiles,
    n_rows,
    T,
    eps,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPAN: tl.constexpr,
    N: tl.constexpr,
    OWN_TABLES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Process `n_tiles` tiles of N rows of q or of k for `backward_kernel`, from tile part * n_tiles on."""
    if KIND != "none":
        first_gain, second_gain = _load_gains(GAIN, HEADS, R, BLOCK_R, SPAN, N)
        first_sum_NR = tl.zeros([N, BLOCK_R], tl.float32)
        second_sum_NR = tl.zeros([N, BLOCK_R], tl.float32)
    for step in range(0, n_tiles):
        row_N, exists_N = _rows(part * n_tiles + step, n_rows, HEADS, SPAN, N)
        offset_N, angle_N = _locate(row_N, n_rows, T, stride_gb, stride_gh, stride_gt, HEADS, OWN_TABLES, ALIGNMENT)
        first_grad_NR, second_grad_NR = _load_halves(GRAD, offset_N, exists_N, R, BLOCK_R)
        if KIND != "none":
            offset_N, angle_N = _locate(row_N, n_rows, T, stride_xb, stride_xh, stride_xt, HEADS, OWN_TABLES, ALIGNMENT)
            first_NR, second_NR = _load_halves(X, offset_N, exists_N, R, BLOCK_R)
        cos_NR, sin_NR = _load_angles(COS, SIN, angle_N, R, BLOCK_R)
        first_dx_NR = first_grad_NR * cos_NR + second_grad_NR * sin_NR
        second_dx_NR = second_grad_NR * cos_NR - first_grad_NR * sin_NR
        if KIND != "none":
            first_NR, second_NR, scale_N = _normalise(
                first_NR, second_NR, exists_N, eps, KIND, HEADS, R, BLOCK_R, SPAN, N
            )
            first_sum_NR += first_dx_NR * first_NR
            second_sum_NR += second_dx_NR * second_NR
            first_dx_NR *= first_gain
            second_dx_NR *= second_gain
            along_N = _mean(tl.sum(first_dx_NR * first_NR + second_dx_NR * second_NR, 1), HEADS, R, SPAN, N)
            if KIND == "layernorm":
                mean_N = _mean(tl.sum(first_dx_NR + second_dx_NR, 1), HEADS, R, SPAN, N)
                first_dx_NR -= mean_N[:, None]
                second_dx_NR -= mean_N[:, None]
            first_dx_NR = scale_N[:, None] * (first_dx_NR - first_NR * along_N[:, None])
            second_dx_NR = scale_N[:, None] * (second_dx_NR - second_NR * along_N[:, None])
        _store_halves(DX, row_N, exists_N, first_dx_NR, second_dx_NR, R, BLOCK_R)
    if KIND != "none":
        _store_partial(PARTIAL, part, n_parts, first_sum_NR, HEADS, R, BLOCK_R, SPAN, N)
        _store_partial(PARTIAL + R * n_parts, part, n_parts, second_sum_NR, HEADS, R, BLOCK_R, SPAN, N)


@triton.jit
def backward_kernel(
    Q,
    K,
    Q_GRAD,
    K_GRAD,
    DQ,
    DK,
    PARTIAL,
    Q_GAIN,
    K_GAIN,
    COS,
    SIN,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    stride_dkb,
    stride_dkg,
    stride_dkt,
    n_parts,
    n_q_tiles,
    n_k_tiles,
    n_q_rows,
    n_k_rows,
    T,
    eps,
    KIND: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    H_SPAN: tl.constexpr,
    G_SPAN: tl.constexpr,
    N: tl.constexpr,
    OWN_TABLES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The gradients of reference.qk_norm_rope, or of reference.apply_rotary if KIND is "none".

    Q and K are those of `forward_kernel`, or None if KIND is "none", because no gradient depends on them then. Q_GRAD
    and K_GRAD, the gradients of the results, have the same shapes. DQ and DK lie in memory as [B, T, heads, 2 R].
    PARTIAL is fp32 [q's and k's gains, n_parts]: for the gradients of the gains, the sums over each program's rows.
    Grid: n_parts programs for q, then n_parts for k. Each program processes n_q_tiles or n_k_tiles tiles of N rows.

    The transpose of a rotation is the rotation by the negative angle. With z = xhat gain, rotated to y,
        dz_first = dy_first cos + dy_second sin,   dz_second = dy_second cos - dy_first sin,   dgain = sum dz xhat.
    LayerNorm has xhat = s (x - mean x) with s = 1 / sqrt(var + eps). With d xhat = dz gain and means over what is
    normed as one,
        dx = s (d xhat - mean(d xhat) - xhat mean(d xhat xhat)).
    The second term comes from the mean, the third from the deviation, ds/dx = -s^2 xhat / K. RMSNorm does not subtract
    the mean, so it has no second term. s and xhat are computed again, which is cheaper than reading them.
    """
    program = tl.program_id(0)
    if program < n_parts:
        _backward_tiles(
            Q, Q_GRAD, DQ, PARTIAL, Q_GAIN, COS, SIN, stride_qb, stride_qh, stride_qt,
            stride_dqb, stride_dqh, stride_dqt, program, n_parts, n_q_tiles, n_q_rows, T, eps,
            KIND, H, R, BLOCK_R, H_SPAN, N, OWN_TABLES, ALIGNMENT,
        )  # fmt: skip
    else:
        q_gains: tl.constexpr = 2 * R * (1 if H_SPAN == 1 else H)
        _backward_tiles(
            K, K_GRAD, DK, PARTIAL + q_gains * n_parts, K_GAIN, COS, SIN, stride_kb, stride_kg, stride_kt,
            stride_dkb, stride_dkg, stride_dkt, program - n_parts, n_parts, n_k_tiles, n_k_rows, T, eps,
            KIND, G, R, BLOCK_R, G_SPAN, N, OWN_TABLES, ALIGNMENT,
        )  # fmt: skip
