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
from scaling_testbed.kernels.cross_entropy.triton_kernels import (
    head_forward_kernel,
    head_row_kernel,
    head_weight_kernel,
)
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
    """The `rows` argument of `chunked_gradients`, as one launch of `head_row_kernel`."""
    V, D = weight_VD.shape
    tile = _row_tile(wide, V, want)
    tile = tile | {"BLOCK_D": min(tile["BLOCK_D"], triton.next_power_of_2(D))}
    with support.on_device(logits_CV):
        head_row_kernel[(len(logits_CV),)](
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
            head_forward_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
                *(hidden, weight, targets_N, weights_N, ce_N, log_z_N, grad_hidden_ND, *numbers),
                WANT_GRADIENT=want_hidden,
                **shared,
                **tile,
            )
        if want_weight or into is not None:
            tile = _named(WEIGHT_TILES[key])
            summed_VD, scale = (grad_weight_VD, 1.0) if into is None else into
            head_weight_kernel[(triton.cdiv(V, tile["BLOCK_V"]),)](
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
