"""Norm and rotation of queries and keys in one Triton launch: an optimisation of reference.qk_norm_rope.

The kernels are memory-bound. The forward pass reads and writes each element once. The backward pass reads it twice
(input and gradient) and writes it once. Inputs are read in place through their strides. Results have the shape
[B, heads, T, K] and lie in memory as [B, T, heads, K], like the outputs of the projections, so that neighbouring rows
of a program are neighbours in memory. Arithmetic is fp32, and a result is rounded once. There are no atomics, so
results are bitwise repeatable.

Shapes in names: B sequences, T positions, H query heads, G key heads, K features of a head, R = K/2 rotated pairs,
P programs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from scaling_testbed.kernels import support
from scaling_testbed.kernels.limits import QK_NORM_ROPE_WIDEST_HEAD as WIDEST_HEAD
from scaling_testbed.kernels.limits import QK_NORM_ROPE_WIDEST_ROW as WIDEST_ROW
from scaling_testbed.kernels.limits import padded_row
from scaling_testbed.kernels.qk_norm_rope.triton_kernels import backward_kernel, forward_kernel

KINDS = ("layernorm", "rmsnorm")  # the norms that the kernel supports
# Row numbers have 32 bits, because 64-bit divisions are slow. The limit leaves room for the last tile.
MOST_ROWS = 2**30

# Pairs of a tile, and warps. In bf16 every thread has 64 bytes of loads in flight; in the backward pass half of them
# are gradients. A thread uses few registers (python -m benchmarks.kernel_resources), so the threads of a multiprocessor
# together have 40 KiB or more in flight. An H200 needs this much (4.8 TB/s for about a microsecond). Not yet measured.
# A norm over all heads together needs all heads of a position in a tile. If they have more pairs than these, the tile
# has more warps, so that no thread holds more.
FORWARD_PAIRS, BACKWARD_PAIRS, WARPS = 2048, 1024, 4
# A program of the backward pass processes several tiles, so that there are fewer partial sums of the gains' gradients.
# It takes at most MOST_TILES, and fewer if there would be too few programs to fill a GPU several times. Where each head
# has its own gains, a tile adds fewer rows to a sum, so a program takes more tiles.
MOST_TILES, ENOUGH_PROGRAMS = 8, 2048


def qk_norm_rope(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    q_gain_K: Tensor,
    k_gain_K: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    *,
    kind: str,
    eps: float,
    heads_together: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """reference.qk_norm_rope with the same arguments and result: q and k normed, times their gains, rotated.

    q, k         of one type: fp32, bf16 or fp16; read in place through any strides if the last dimension is contiguous
    gains, cos, sin  fp32; gains have one number for each normed feature: [K], or [heads K] if heads_together; tables
                 [T, R], or [B, 1, T, R] where each sequence has its own
    kind         layernorm | rmsnorm; eps is added to the variance, or to the mean square
    out_dtype    the type of the results; default: the inputs' type

    Differentiable in q, k and the gains. Raises RuntimeError on a CPU outside Triton's interpreter, and ValueError for
    unsupported shapes, types or options.
    """
    support.require(q_BHTK, "qk_norm_impl=triton")
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    out_dtype = out_dtype or q_BHTK.dtype
    _check(q_BHTK, k_BGTK, cos_TR, sin_TR, out_dtype)
    for name, x, gain in (("q_gain", q_BHTK, q_gain_K), ("k_gain", k_BGTK, k_gain_K)):
        if heads_together and (row := padded_row(x.shape[1], x.shape[-1])) > WIDEST_ROW:
            raise ValueError(f"all heads of a position must be at most {WIDEST_ROW} padded features, got {row}")
        _check_vectors((_normed_width(x.shape, heads_together),), x.device, **{name: gain})
    gains_and_tables = q_gain_K, k_gain_K, cos_TR, sin_TR
    return forward_operator(q_BHTK, k_BGTK, *gains_and_tables, kind, float(eps), heads_together, out_dtype)


def rotary(
    q_BHTK: Tensor, k_BGTK: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """reference.apply_rotary of q and of k, without a norm. Arguments, result and errors are as in `qk_norm_rope`."""
    support.require(q_BHTK, "qk_norm_impl=triton")
    out_dtype = out_dtype or q_BHTK.dtype
    _check(q_BHTK, k_BGTK, cos_TR, sin_TR, out_dtype)
    return forward_operator(q_BHTK, k_BGTK, None, None, cos_TR, sin_TR, "none", 0.0, False, out_dtype)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out_dtype: torch.dtype) -> None:
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q [B, H, T, K] and k [B, G, T, K] do not fit: {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype not in support.DTYPES or k.dtype != q.dtype:
        raise ValueError(f"q and k must both be fp32, bf16 or fp16, got {q.dtype} and {k.dtype}")
    if out_dtype not in support.DTYPES:
        raise ValueError(f"out_dtype must be fp32, bf16 or fp16, got {out_dtype}")
    B, H, T, K = q.shape
    if K % 2 or not 2 <= K <= WIDEST_HEAD:
        raise ValueError(f"d_head must be even and at most {WIDEST_HEAD}, got {K}")
    if B * T * max(H, k.shape[1]) > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS} heads x positions can be normed at once, got {tuple(q.shape)}")
    if k.device != q.device:
        raise ValueError(f"q and k are on {q.device} and {k.device}")
    _check_vectors((T, K // 2) if cos.ndim == 2 else (B, 1, T, K // 2), q.device, cos=cos, sin=sin)


def _check_vectors(shape: tuple[int, ...], device: torch.device, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.shape != shape or x.dtype != torch.float32 or x.device != device:
            wanted = f"fp32 {list(shape)} on {device}"
            raise ValueError(f"{name} must be {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")


class _Problem(NamedTuple):
    """The sizes and constants that both launches derive from the shapes."""

    T: int
    q_rows: int
    k_rows: int
    tiles: tuple[int, int]  # of q and of k
    warps: int
    constants: dict[str, int | str]  # all constexpr arguments except the alignment


def _problem(q_shape: torch.Size, k_shape: torch.Size, kind: str, together: bool, pairs: int) -> _Problem:
    (B, H, T, K), G = q_shape, k_shape[1]
    block = triton.next_power_of_2(K // 2)
    spans = [triton.next_power_of_2(heads) if together else 1 for heads in (H, G)]
    N = max(1, pairs // block, *spans)
    tiles = [
        triton.cdiv(B * T, N // span) if span > 1 else triton.cdiv(B * T * heads, N)
        for span, heads in zip(spans, (H, G), strict=True)
    ]
    constants = {"KIND": kind, "H": H, "G": G, "R": K // 2, "BLOCK_R": block, "N": N}
    constants |= dict(zip(("H_SPAN", "G_SPAN"), spans, strict=True))
    return _Problem(T, B * T * H, B * T * G, tuple(tiles), WARPS * max(1, N * block // pairs), constants)


def _normed_width(shape: torch.Size, together: bool) -> int:
    """Features that one norm goes over, which is the number of gains."""
    return shape[1] * shape[3] if together else shape[3]


def _n_gains(*gains: Tensor | None) -> int:
    return sum(0 if x is None else x.numel() for x in gains)


def _empty(shape: torch.Size, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of shape [B, heads, T, K] that lies in memory as [B, T, heads, K]."""
    B, heads, T, K = shape
    return like.new_empty((B, T, heads, K), dtype=dtype).transpose(1, 2)


def _readable(x: Tensor) -> Tensor:
    """`x`, or a copy that lies in memory as [B, T, heads, K] if the rows of `x` are not contiguous."""
    return x if x.stride(-1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)


def _strides(*tensors: Tensor | None) -> list[int]:
    """The b, h and t strides of each tensor in turn; 0 for a dimension of size one, whose stride has no meaning."""
    return [x.stride(dim) if x is not None and x.shape[dim] > 1 else 0 for x in tensors for dim in range(3)]


@torch.library.custom_op("scaling_testbed::qk_norm_rope", mutates_args=())
def forward_operator(
    q: Tensor,
    k: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kind: str,
    eps: float,
    together: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope`, or `rotary` with kind "none", for checked arguments."""
    problem = _problem(q.shape, k.shape, kind, together, FORWARD_PAIRS)
    q, k, cos, sin = _readable(q), _readable(k), cos.contiguous(), sin.contiguous()
    q_gain, k_gain = (x if x is None else x.contiguous() for x in (q_gain, k_gain))
    out = _empty(q.shape, q, out_dtype), _empty(k.shape, k, out_dtype)
    strides = _strides(q, k)
    q_tiles, k_tiles = problem.tiles
    if q_tiles + k_tiles:
        with support.on_device(q):
            forward_kernel[(q_tiles + k_tiles,)](
                *(q, k, *out, q_gain, k_gain, cos, sin, *strides, q_tiles),
                *(problem.q_rows, problem.k_rows, problem.T, eps),
                **problem.constants,
                OWN_TABLES=cos.ndim == 4,
                ALIGNMENT=math.gcd(16, *strides),
                num_warps=problem.warps,
            )
    return out


@torch.library.custom_op("scaling_testbed::qk_norm_rope_backward", mutates_args=())
def backward_operator(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kind: str,
    eps: float,
    together: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `forward_operator`: dq and dk in `dtype`, the inputs' type, and dgain in fp32.

    dgain holds the gradients of q's and then of k's gains, [2 K] or [(H + G) K] ([0] with kind "none"). q and k are
    None if and only if kind is "none".
    """
    problem = _problem(grad_q.shape, grad_k.shape, kind, together, BACKWARD_PAIRS)
    grads = _readable(grad_q), _readable(grad_k)
    inputs = [x if x is None else _readable(x) for x in (q, k)]
    gains = [x if x is None else x.contiguous() for x in (q_gain, k_gain)]
    out = _empty(grad_q.shape, grad_q, dtype), _empty(grad_k.shape, grad_k, dtype)
    strides = _strides(*inputs, *grads)
    # q and k have the same number of programs, so that one sum completes the gradients of both gains. The number
    # depends only on shapes and not on the device, because it determines the order of the sums.
    tiles = problem.tiles
    most = max(1, min(MOST_TILES * problem.constants["H_SPAN"], sum(tiles) // ENOUGH_PROGRAMS))
    parts = triton.cdiv(max(tiles), most)
    partial = grad_q.new_empty((_n_gains(q_gain, k_gain), parts), dtype=torch.float32)
    if parts:
        with support.on_device(grad_q):
            backward_kernel[(2 * parts,)](
                *(*inputs, *grads, *out, partial, *gains, cos.contiguous(), sin.contiguous(), *strides, parts),
                *(triton.cdiv(n, parts) for n in tiles),
                *(problem.q_rows, problem.k_rows, problem.T, eps),
                **problem.constants,
                OWN_TABLES=cos.ndim == 4,
                ALIGNMENT=math.gcd(16, *strides),
                num_warps=problem.warps,
            )
    return *out, partial.sum(-1)


@forward_operator.register_fake
def _(q, k, q_gain, k_gain, cos, sin, kind, eps, together, out_dtype):
    return _empty(q.shape, q, out_dtype), _empty(k.shape, k, out_dtype)


@backward_operator.register_fake
def _(grad_q, grad_k, q, k, q_gain, k_gain, cos, sin, kind, eps, together, dtype):
    dgain = grad_q.new_empty(_n_gains(q_gain, k_gain), dtype=torch.float32)
    return _empty(grad_q.shape, grad_q, dtype), _empty(grad_k.shape, grad_k, dtype), dgain


def _setup_context(ctx, inputs, output):
    q, k, q_gain, k_gain, cos, sin, ctx.kind, ctx.eps, ctx.together, _ = inputs
    ctx.dtype = q.dtype
    kept = (None, None) if ctx.kind == "none" else (q, k)
    ctx.save_for_backward(*kept, q_gain, k_gain, cos, sin)


def _backward(ctx, grad_q, grad_k):
    options = ctx.kind, ctx.eps, ctx.together, ctx.dtype
    saved = ctx.saved_tensors  # once: a recomputed block can unpack them only once
    dq, dk, dgain = backward_operator(grad_q, grad_k, *saved, *options)
    _, _, q_gain, k_gain, *_ = saved
    dgains = (None, None) if ctx.kind == "none" else dgain.split([q_gain.numel(), k_gain.numel()])
    return dq, dk, *dgains, *[None] * 6


forward_operator.register_autograd(_backward, setup_context=_setup_context)
