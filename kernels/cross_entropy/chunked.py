"""Linear cross-entropy with z-loss, one chunk of tokens at a time, so that memory never holds all logits at once.

An optimisation of reference.linear_cross_entropy. The gradient of a chunk is computed in the forward pass, while its
logits are in memory, so nothing is computed twice. With y_j the (capped) logits, p = softmax(y), c the z-loss
coefficient and t the target, the loss of a token is log Z - y_t + c log^2 Z. Since d log Z / d y_j = p_j,

    dL/dy_j = (1 + 2 c log Z) p_j - 1[j = t],      dL/dx_j = dL/dy_j (1 - (y_j/s)^2)   under a cap y = s tanh(x/s)

(PaLM, arXiv 2204.02311, section 5, for the z-loss). A weight w of a token multiplies its cross-entropy, and not its
z-loss (reference.summed says why): then dL/dy_j = (w + 2 c log Z) p_j - w 1[j = t]. This module does not need Triton;
CPUs use it. triton.py has the same loop, with a Triton kernel in place of `torch_rows`.

Shapes in names: N tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scaling_testbed.kernels.cross_entropy.reference import summed, valid_weights
from scaling_testbed.kernels.reference import softcap_scores, wide

# Bytes of logits held at once by default. The value for a CPU is about the size of its last-level cache.
DEFAULT_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
# Matrix products on a GPU are slower with fewer rows than this. `cached_chunk_bytes` is the other way to choose.
LEAST_GPU_ROWS = 4096


class CrossEntropy(NamedTuple):
    """The scalar loss = sum of w ce + z_loss * sum of log_z^2, and ce_N and log_z_N of each token, without weights w.

    Only loss is differentiable. All are wide: fp32, or fp64 for fp64 inputs. ce and log_z of an ignored token are zero.
    """

    loss: Tensor
    ce_N: Tensor
    log_z_N: Tensor


class AddInto(NamedTuple):
    """A sum of gradients of the head, such as its .grad after an earlier micro-batch.

    grad_VD is wide and contiguous, [V, D]. scale is the factor by which the backward pass will scale the loss. Only the
    backward pass knows it, and the head's gradient is added in the forward pass: with another factor the sum is wrong,
    and so it is without a backward pass. Hooks on the head do not see what is added.
    """

    grad_VD: Tensor
    scale: float = 1.0


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
) -> CrossEntropy:
    """Cross-entropy and z-loss of the final hidden states under the head, in plain PyTorch.

    hidden_ND, weight_VD  floating point; the products run in hidden's type, or in autocast's type
    targets_N             int64; `ignore_index` excludes a token
    weights_N             None: 1. Else the factor of each token's cross-entropy, wide and without a gradient; of any
                          sign, and of any value where the token is excluded
    chunk_bytes           bytes of logits held at once; None: DEFAULT_CHUNK_BYTES
    into                  None: autograd gets the head's gradient. Else the forward pass adds it to into.grad_VD

    The head's gradient is accumulated wide. Raises ValueError if shapes do not match, if weights are not wide or take a
    gradient, if softcap is not positive and finite, or if nothing can be added to `into`.
    """
    direct = hidden_ND.device.type == "cpu" and not torch.compiler.is_compiling()
    operator = partial(DirectCrossEntropy.apply, _compute) if direct else chunked_operator
    numbers = z_loss, softcap, ignore_index, chunk_bytes or 0
    return call_operator(operator, _compute, hidden_ND, weight_VD, targets_N, weights_N, *numbers, into)


def call_operator(
    operator, compute, hidden_ND, weight_VD, targets_N, weights_N, z_loss, softcap, ignore_index, chunk_bytes, into
) -> CrossEntropy:
    """Check the arguments and call an operator of `define_operator` for the gradients that autograd needs.

    compute is what the operator computes. With `into` it is called without the operator, which may change no argument.
    """
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not fit: {hidden_ND.shape} and {weight_VD.shape}")
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{hidden_ND.shape[0]}], got {targets_N.dtype} {targets_N.shape}")
    if weights_N is not None:
        weights_N = valid_weights(weights_N, hidden_ND, targets_N, ignore_index)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD)]
    numbers = float(z_loss), softcap, ignore_index, product_dtype(hidden_ND), chunk_bytes
    if into is not None:
        _check_into(into, weight_VD, wanted[1])
        operator = partial(DirectCrossEntropy.apply, partial(compute, into=into))
        wanted[1] = False
    return CrossEntropy(*operator(hidden_ND, weight_VD, targets_N, weights_N, *numbers, *wanted)[:3])


def _check_into(into: AddInto, weight_VD: Tensor, wanted: bool) -> None:
    grad_VD, dtype = into.grad_VD, torch.promote_types(weight_VD.dtype, torch.float32)
    if not wanted:
        raise ValueError("into: the head takes no gradient here")
    if grad_VD.shape != weight_VD.shape or grad_VD.dtype != dtype or not grad_VD.is_contiguous():
        raise ValueError(
            f"into: the sum must be contiguous {dtype} {list(weight_VD.shape)}, got {grad_VD.dtype} "
            f"{list(grad_VD.shape)} with strides {grad_VD.stride()}"
        )


def product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The type in which products of hidden states run: autocast's type if autocast is on, else their own."""
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_ND.dtype


def define_operator(name: str, compute: Callable) -> Callable:
    """Register `compute` as scaling_testbed::<name>, for autograd and torch.compile.

    compute(hidden_ND, weight_VD, targets_N, weights_N, z_loss, softcap, ignore_index, dtype, chunk_bytes, want_hidden,
    want_weight) -> loss, ce_N, log_z_N, grad_hidden_ND, grad_weight_VD. The last two are gradients of loss; a gradient
    that is not wanted is an empty tensor. weights_N is None, or as `valid_weights` returns it.
    """
    schema = (
        "(Tensor hidden, Tensor weight, Tensor targets, Tensor? weights, float z_loss, float? softcap, "
        "SymInt ignore_index, ScalarType dtype, SymInt chunk_bytes, bool want_hidden, bool want_weight) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    operator = torch.library.custom_op(
        f"scaling_testbed::{name}", partial(_computed, compute), mutates_args=(), schema=schema
    )
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_setup_context)
    return operator


def _computed(compute: Callable, hidden_ND, weight_VD, targets_N, weights_N, *arguments):
    # Autocast would change the type of the products inside, which `dtype` already determines.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return compute(hidden_ND, weight_VD, targets_N.contiguous(), weights_N, *arguments)


def _fake(hidden, weight, targets, weights, z_loss, softcap, ignore, dtype, chunk_bytes, want_hidden, want_weight):
    ce = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    grads = (x.new_empty(x.shape if wanted else 0) for x, wanted in ((hidden, want_hidden), (weight, want_weight)))
    return ce.new_empty(()), ce, torch.empty_like(ce), *grads


def _setup_context(ctx, inputs, output):
    ctx.wanted = inputs[-2:]
    ctx.save_for_backward(*output[-2:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    """Scale the stored gradients in place, which saves a copy of the head.

    The stored gradients can thus be used only once, and they have no derivative. Raises RuntimeError for a second
    backward pass and for a second derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("this cross-entropy has no second derivative (create_graph=True); loss.impl=reference has")
    if getattr(ctx, "scaled", False):
        raise RuntimeError("a second backward pass through this cross-entropy; loss.impl=reference allows it")
    ctx.scaled = True
    grads = [
        saved.mul_(grad_loss) if wanted and grad_loss is not None else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return *grads, *[None] * 9


def chunked_gradients(
    rows: Callable,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    dtype: torch.dtype,
    chunk_bytes: int,
    want_hidden: bool,
    want_weight: bool,
    into: AddInto | None = None,
):
    """The loop over chunks, for `define_operator`. `rows` replaces a chunk's logits by their gradient.

    rows(logits_CV, hidden_CD, weight_VD, targets_C, weights_C, ce_C, log_z_C, z_loss, softcap, ignore_index, want)
    fills ce_C and log_z_C. Logits are held in `dtype`. If no gradient is wanted they are held wide, so that a
    validation loss has no rounding of logits.
    """
    N, V = len(hidden_ND), len(weight_VD)
    want = want_hidden or want_weight or into is not None
    ce_N = wide(hidden_ND.new_empty(0)).new_empty(N)
    # A CPU has no product of bf16 inputs with a wide result, so the rounded inputs are widened first.
    product_type = dtype if want or hidden_ND.is_cuda else ce_N.dtype
    hidden, weight = (x.to(dtype).to(product_type).contiguous() for x in (hidden_ND, weight_VD))
    log_z_N = torch.empty_like(ce_N)
    grad_hidden_ND = hidden_ND.new_empty((N, hidden_ND.shape[1]) if want_hidden else 0)
    grad_weight_VD = ce_N.new_empty(weight_VD.shape if want_weight else 0)
    logits_type = dtype if want else ce_N.dtype
    C = chunk_rows(N, V * logits_type.itemsize, chunk_bytes, hidden.device)
    # Rows begin at multiples of 128 bytes for every vocabulary, so that a GPU reads whole cache lines.
    padded = torch.empty(C, -(-V // 64) * 64, dtype=logits_type, device=hidden.device)
    if not padded.is_cuda and logits_type != ce_N.dtype:
        # oneDNN's bf16 products by AMX read what follows a row of the left factor, and multiply it by zero: a NaN that
        # memory happens to hold there would be one in the gradient.
        padded[:, V:] = 0
    buffer = padded[:, :V]
    logits_CV = buffer
    for begin in range(0, N, C):
        chunk = slice(begin, min(begin + C, N))
        logits_CV = buffer[: chunk.stop - begin]
        product(hidden[chunk], weight.T, logits_CV)
        weights_C = None if weights_N is None else weights_N[chunk]
        of_tokens = hidden[chunk], weight, targets_N[chunk], weights_C, ce_N[chunk], log_z_N[chunk]
        rows(logits_CV, *of_tokens, z_loss, softcap, ignore_index, want)
        if want_hidden:
            product(logits_CV, weight, grad_hidden_ND[chunk])
        if want_weight:
            product(logits_CV.T, hidden[chunk], grad_weight_VD, add=begin > 0)
        if into is not None:
            product(logits_CV.T, hidden[chunk], into.grad_VD, add=True, scale=into.scale)
    if want_weight and N == 0:
        grad_weight_VD.zero_()
    del padded, buffer, logits_CV  # frees memory for the head's gradient in its own type
    loss = summed(ce_N, log_z_N, z_loss, weights_N)
    return loss, ce_N, log_z_N, grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype)


def chunk_rows(n_tokens: int, row_bytes: int, chunk_bytes: int, device: torch.device) -> int:
    """Number of tokens in a chunk, at least one: all chunks together hold `n_tokens`, in about equal parts.

    The logits of a chunk take at most `chunk_bytes` (0: the default). With the default, a chunk on a GPU has at least
    LEAST_GPU_ROWS tokens, as far as their logits take at most a sixteenth of the GPU's memory. The result does not
    depend on the free memory, because the number of chunks determines the last bits of the head's gradient.
    """
    rows = max(1, (chunk_bytes or DEFAULT_CHUNK_BYTES.get(device.type, 2**28)) // row_bytes)
    if device.type == "cuda" and not chunk_bytes and rows < LEAST_GPU_ROWS:
        most = torch.cuda.get_device_properties(device).total_memory // 16 // row_bytes
        rows = max(rows, min(LEAST_GPU_ROWS, most))
    chunks = max(1, -(-n_tokens // rows))
    even = -(-n_tokens // chunks)
    return max(1, min(rows, -(-even // 128) * 128))


def cached_chunk_bytes(cache_bytes: int) -> int:
    """Bytes of logits that stay in a cache from the product that writes them to the products that read their gradient:
    half of it. Hidden states and the head go through the other half.

    On a GPU it is a value of chunk_bytes for narrow models. With C tokens in a chunk, the head's gradient is read and
    written in memory once a chunk, which is 8 V D / C bytes per token. A chunk that is larger than the cache moves
    12 V bytes of bf16 logits per token instead. So small chunks move fewer bytes where D < 1.5 C. Half of the 50 MiB
    of an H100 or H200 are 260 tokens for V = 50,304, which pays up to D = 390 or so. What more launches and products of
    so few rows cost was not measured, so this is not the default.
    """
    return cache_bytes // 2


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """Set out to left @ right, or add scale * left @ right to it, in out's type.

    If out's type is wider than the inputs' type, a GPU does not round the product. A CPU rounds the product to the
    inputs' type before it is stored or added.
    """
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, alpha=scale, out=out) if add else torch.mm(left, right, out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        if add:
            torch.addmm(out, left, right, alpha=scale, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.add_(left @ right, alpha=scale) if add else out.copy_(left @ right)


def torch_rows(
    logits_CV, hidden_CD, weight_VD, targets_C, weights_C, ce_C, log_z_C, z_loss, softcap, ignore_index, want
) -> None:
    """The `rows` argument of `chunked_gradients` in plain PyTorch. It works in place where it can."""
    valid_C = targets_C != ignore_index
    picked_C1 = torch.where(valid_C, targets_C, 0)[:, None]
    x_CV = wide(logits_CV)
    if x_CV.dtype != logits_CV.dtype:
        # The target's logit without the rounding of the stored logits.
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
    log_partition_C = largest_C + total_C.log()
    if want:
        factor_C = (1 if weights_C is None else weights_C) + 2 * z_loss * log_partition_C
        x_CV.mul_((torch.where(valid_C, factor_C, 0.0) / total_C)[:, None])
        x_CV.scatter_add_(1, picked_C1, -(valid_C.to(x_CV.dtype) if weights_C is None else weights_C)[:, None])
        if slope_CV is not None:
            x_CV.mul_(slope_CV)
        if x_CV.data_ptr() != logits_CV.data_ptr():
            logits_CV.copy_(x_CV)
    zero = log_partition_C.new_zeros(())
    ce_C.copy_(torch.where(valid_C, log_partition_C - target_logit_C, zero))
    log_z_C.copy_(torch.where(valid_C, log_partition_C, zero))


_compute = partial(chunked_gradients, torch_rows)
chunked_operator = define_operator("chunked_cross_entropy", _compute)


class DirectCrossEntropy(torch.autograd.Function):
    """What an operator of `define_operator` does, without its wrapper. That takes 0.2 ms, which is 4% of a step of 256
    tokens on a CPU; only a compiler needs it."""

    @staticmethod
    def forward(ctx, compute, *arguments):
        output = _computed(compute, *arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, *_backward(ctx, *grads)
