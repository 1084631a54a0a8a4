"""Linear cross-entropy with z-loss, a chunk of tokens at a time: all logits are never held at once.

An optimisation of reference.linear_cross_entropy. The gradient of a chunk is formed in the forward pass while its
logits are at hand, so nothing is computed twice. With y_j the (capped) logits, p = softmax(y), c the z-loss
coefficient and t the target, the loss of a token is log Z - y_t + c log^2 Z, and since d log Z / d y_j = p_j

    dL/dy_j = (1 + 2 c log Z) p_j - 1[j = t],      dL/dx_j = dL/dy_j (1 - (y_j/s)^2)   under a cap y = s tanh(x/s)

(PaLM, arXiv 2204.02311, section 5, for the z-loss). Needs no Triton: it is what CPUs use. triton.py has the same
loop with a Triton kernel in the place of `torch_rows`.

Shapes in names: N tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scaling_testbed.kernels.reference import softcap_scores, wide

# Bytes of logits held at once where the caller does not say: on a CPU what about fits its last cache.
DEFAULT_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
# Matrix products on a GPU lose speed with fewer rows than this.
LEAST_GPU_ROWS = 4096


class CrossEntropy(NamedTuple):
    """loss = sum of ce + z_loss * sum of log_z^2, a scalar, differentiable; ce_N and log_z_N are not. All wide:
    fp32, or fp64 where the inputs are. Tokens that are ignored have ce and log_z zero."""

    loss: Tensor
    ce_N: Tensor
    log_z_N: Tensor


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> CrossEntropy:
    """Cross-entropy and z-loss of the final hidden states under the head, in plain PyTorch.

    hidden_ND, weight_VD  floating; the products run in hidden's type, or in autocast's
    targets_N             int64, `ignore_index` where a token does not count
    chunk_bytes           of logits held at once; None: DEFAULT_CHUNK_BYTES

    The head's gradient is accumulated wide. Raises ValueError for shapes that do not fit and
    softcaps that are none.
    """
    return call_operator(
        chunked_operator, hidden_ND, weight_VD, targets_N, z_loss, softcap, ignore_index, chunk_bytes or 0
    )


def call_operator(
    operator, hidden_ND, weight_VD, targets_N, z_loss, softcap, ignore_index, chunk_bytes
) -> CrossEntropy:
    """Call one of `define_operator`'s for the gradients that are wanted, in autocast's type where it is on."""
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not fit: {hidden_ND.shape} and {weight_VD.shape}")
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{hidden_ND.shape[0]}], got {targets_N.dtype} {targets_N.shape}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD)]
    numbers = float(z_loss), softcap, ignore_index, product_dtype(hidden_ND), chunk_bytes
    return CrossEntropy(*operator(hidden_ND, weight_VD, targets_N, *numbers, *wanted)[:3])


def product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """What the products of hidden states run in: autocast's type where that is on, else their own."""
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_ND.dtype


def define_operator(name: str, compute: Callable) -> Callable:
    """Register `compute` as scaling_testbed::<name>, for autograd and torch.compile.

    compute(hidden_ND, weight_VD, targets_N, z_loss, softcap, ignore_index, dtype, chunk_bytes, want_hidden,
    want_weight) -> loss, ce_N, log_z_N, grad_hidden_ND, grad_weight_VD, the gradients those of loss, or empty.
    """
    schema = (
        "(Tensor hidden, Tensor weight, Tensor targets, float z_loss, float? softcap, SymInt ignore_index, "
        "ScalarType dtype, SymInt chunk_bytes, bool want_hidden, bool want_weight) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def run(hidden_ND, weight_VD, targets_N, *arguments):
        # Autocast would act on the products inside; `dtype` has already said what they run in.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return compute(hidden_ND, weight_VD, targets_N.contiguous(), *arguments)

    operator = torch.library.custom_op(f"scaling_testbed::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_setup_context)
    return operator


def _fake(hidden, weight, targets, z_loss, softcap, ignore_index, dtype, chunk_bytes, want_hidden, want_weight):
    ce = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    grads = (x.new_empty(x.shape if wanted else 0) for x, wanted in ((hidden, want_hidden), (weight, want_weight)))
    return ce.new_empty(()), ce, torch.empty_like(ce), *grads


def _setup_context(ctx, inputs, output):
    ctx.wanted = inputs[-2:]
    ctx.save_for_backward(*output[-2:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    """Scale the stored gradients in place, which saves a copy of the head; so it can be done once, and what is stored
    has no derivative. Raises RuntimeError where a second backward pass or a second derivative is asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError("this cross-entropy has no second derivative (create_graph=True); loss.impl=reference has")
    if getattr(ctx, "scaled", False):
        raise RuntimeError("a second backward pass through this cross-entropy; loss.impl=reference allows it")
    ctx.scaled = True
    grads = [
        saved.mul_(grad_loss) if wanted and grad_loss is not None else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return *grads, *[None] * 8


def chunked_gradients(
    rows: Callable,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    dtype: torch.dtype,
    chunk_bytes: int,
    want_hidden: bool,
    want_weight: bool,
):
    """The loop over chunks, for `define_operator`. `rows` turns a chunk's logits into their gradient in place.

    rows(logits_CV, hidden_CD, weight_VD, targets_C, z_loss, softcap, ignore_index, want) -> ce_C, log_z_C.
    Logits are held in `dtype`; wide where no gradient is wanted, so that a validation loss suffers no rounding.
    """
    N, V = len(hidden_ND), len(weight_VD)
    want = want_hidden or want_weight
    ce_N = wide(hidden_ND.new_empty(0)).new_empty(N)
    # CPUs have no product of bf16 inputs with a wide result: there the rounded inputs are widened first.
    product_type = dtype if want or hidden_ND.is_cuda else ce_N.dtype
    hidden, weight = (x.to(dtype).to(product_type).contiguous() for x in (hidden_ND, weight_VD))
    log_z_N = torch.empty_like(ce_N)
    grad_hidden_ND = hidden_ND.new_empty((N, hidden_ND.shape[1]) if want_hidden else 0)
    grad_weight_VD = ce_N.new_empty(weight_VD.shape if want_weight else 0)
    logits_type = dtype if want else ce_N.dtype
    C = chunk_rows(N, V * logits_type.itemsize, chunk_bytes, hidden.device)
    # Rows begin at multiples of 128 bytes, whatever the vocabulary, so that a GPU can read them in whole lines.
    buffer = torch.empty(C, -(-V // 64) * 64, dtype=logits_type, device=hidden.device)[:, :V]
    logits_CV = buffer
    for begin in range(0, N, C):
        chunk = slice(begin, min(begin + C, N))
        logits_CV = buffer[: chunk.stop - begin]
        product(hidden[chunk], weight.T, logits_CV)
        ce_N[chunk], log_z_N[chunk] = rows(
            logits_CV, hidden[chunk], weight, targets_N[chunk], z_loss, softcap, ignore_index, want
        )
        if want_hidden:
            product(logits_CV, weight, grad_hidden_ND[chunk])
        if want_weight:
            product(logits_CV.T, hidden[chunk], grad_weight_VD, add=begin > 0)
    if want_weight and N == 0:
        grad_weight_VD.zero_()
    del buffer, logits_CV  # room for the head's gradient in its own type
    loss = ce_N.sum() + z_loss * log_z_N.square().sum()
    return loss, ce_N, log_z_N, grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype)


def chunk_rows(n_tokens: int, row_bytes: int, chunk_bytes: int, device: torch.device) -> int:
    """Tokens of a chunk: what `chunk_bytes` hold (0: the default), cut into equal chunks, at least one.

    Without a budget, on a GPU, at least LEAST_GPU_ROWS where they take no more than a sixteenth of the card. Nothing
    here depends on what happens to be free: the number of chunks decides the last bits of the head's gradient.
    """
    rows = max(1, (chunk_bytes or DEFAULT_CHUNK_BYTES.get(device.type, 2**28)) // row_bytes)
    if device.type == "cuda" and not chunk_bytes and rows < LEAST_GPU_ROWS:
        most = torch.cuda.get_device_properties(device).total_memory // 16 // row_bytes
        rows = max(rows, min(LEAST_GPU_ROWS, most))
    chunks = max(1, -(-n_tokens // rows))
    even = -(-n_tokens // chunks)
    return max(1, min(rows, -(-even // 128) * 128))


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= left @ right, in `out`'s type. Where it is wider than theirs a GPU rounds nothing; a CPU rounds the
    product to their type before it is added."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        if add:
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.add_(left @ right) if add else out.copy_(left @ right)


def torch_rows(logits_CV, hidden_CD, weight_VD, targets_C, z_loss, softcap, ignore_index, want):
    """`chunked_gradients`' rows in plain PyTorch, in place as far as it goes."""
    valid_C = targets_C != ignore_index
    picked_C1 = torch.where(valid_C, targets_C, 0)[:, None]
    x_CV = wide(logits_CV)
    if x_CV.dtype != logits_CV.dtype:
        # The target's own logit without the rounding of the stored ones.
        exact_C = (wide(hidden_CD) * wide(weight_VD[picked_C1[:, 0]])).sum(-1)
        x_CV.scatter_(1, picked_C1, exact_C[:, None])
    slope_CV = None
    if softcap is not None:
        x_CV = softcap_scores(x_CV, softcap)
        slope_CV = 1 - (x_CV / softcap).square() if want else None
    target_logit_C = x_CV.gather(1, picked_C1)[:, 0]
    largest_C = x_CV.amax(-1)
    x_CV.sub_(largest_C[:, None]).exp_()
    total_C = x_CV.sum(-1)
    log_z_C = largest_C + total_C.log()
    if want:
        x_CV.mul_((torch.where(valid_C, 1 + 2 * z_loss * log_z_C, 0.0) / total_C)[:, None])
        x_CV.scatter_add_(1, picked_C1, -valid_C.to(x_CV.dtype)[:, None])
        if slope_CV is not None:
            x_CV.mul_(slope_CV)
        if x_CV.data_ptr() != logits_CV.data_ptr():
            logits_CV.copy_(x_CV)
    zero = log_z_C.new_zeros(())
    return torch.where(valid_C, log_z_C - target_logit_C, zero), torch.where(valid_C, log_z_C, zero)


def _compute(*arguments):
    return chunked_gradients(torch_rows, *arguments)


chunked_operator = define_operator("chunked_cross_entropy", _compute)
