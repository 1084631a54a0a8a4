"""Cross-entropy against the probabilities of a teacher, beside that against the targets, a chunk of tokens at a time.

With y the (capped) logits of a token, t its target, q the probabilities of the teacher at temperature T, p = softmax(y)
and r = softmax(y / T), the loss of a token is

    (1 - a) (-log p_t) + a T^2 S + c log^2 Z,        S = -sum_j q_j log r_j

(Hinton et al. 2015, arXiv 1503.02531, section 2; c is the coefficient of the z-loss, log Z that of y). S is the
Kullback-Leibler divergence plus the entropy of q, which has no gradient. Of stored targets only K of the q_j are known.
The other tokens are then one bucket with the probability u = 1 - sum_K q:

    S = -sum_K q_k log r_k - u log(1 - sum_K r_k)

With R = sum q + u, which is 1 but for the rounding of stored q, the gradients are

    dS/dy_j = (R r_j - q_j) / T,     and for a token of the bucket     dS/dy_j = (R r_j - u r_j / (1 - sum_K r_k)) / T

The gradient of a chunk is computed while its logits are in memory, as in kernels/cross_entropy/chunked.py.

Shapes in names: N tokens, C tokens of a chunk, D model width, V vocabulary, K stored tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from scaling_testbed.kernels.cross_entropy.chunked import chunk_rows, product, product_dtype
from scaling_testbed.kernels.reference import softcap_scores, wide
from scaling_testbed.learning.loss import IGNORE

BUFFERS = 5  # tensors of the size of a chunk's logits that are held at once


class SoftTerms(NamedTuple):
    """Sums over the valid tokens. loss: with a gradient, value: (1 - a) CE + a T^2 S without the z-loss. ce_sum,
    log_z_N [N], which is 0 for a token that does not count: without a gradient."""

    loss: Tensor
    value: Tensor
    ce_sum: Tensor
    log_z_N: Tensor


class Soft(NamedTuple):
    """S of each token of a chunk, and its gradient with respect to y / T."""

    s_C: Tensor
    grad_CV: Tensor


# (chunk, y / T [C, V]) -> Soft
Teach = Callable[[slice, Tensor], Soft]


class Numbers(NamedTuple):
    """a, T, c, and the softcap of the logits."""

    alpha: float
    temperature: float
    z_loss: float
    softcap: float | None


@dataclass(frozen=True)
class Full:
    """The probabilities of a teacher from its final hidden states [N, D'] under its head [V, D']."""

    hidden_ND: Tensor
    weight_VD: Tensor
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None, temperature: float) -> Self:
        """With hidden states and head in the type of the products."""
        dtype = product_dtype(hidden_ND)
        return cls(hidden_ND.to(dtype).contiguous(), weight_VD.to(dtype).contiguous(), softcap, temperature)

    def __call__(self, chunk: slice, scaled_CV: Tensor) -> Soft:
        logits_CV = torch.empty_like(scaled_CV)
        product(self.hidden_ND[chunk], self.weight_VD.T, logits_CV)
        q_CV = (softcap_scores(logits_CV, self.softcap) / self.temperature).softmax(-1)
        log_r_CV = scaled_CV.log_softmax(-1)
        s_C = -(q_CV * log_r_CV).sum(-1)
        return Soft(s_C, log_r_CV.exp_().sub_(q_CV))


@dataclass(frozen=True)
class Stored:
    """K token ids [N, K] and their log-probabilities [N, K] at the temperature of the loss; the rest is one bucket."""

    ids_NK: Tensor
    log_q_NK: Tensor

    def __call__(self, chunk: slice, scaled_CV: Tensor) -> Soft:
        ids_CK = self.ids_NK[chunk].long()
        q_CK = self.log_q_NK[chunk].to(scaled_CV.dtype).exp()
        u_C = (1 - q_CK.sum(-1)).clamp_min(0)  # the sum of rounded q may be above 1
        log_z_C = scaled_CV.logsumexp(-1)
        log_r_CK = scaled_CV.gather(1, ids_CK) - log_z_C[:, None]
        # A sum of what is left, because 1 - sum r has no digits where it is small.
        rest_CV = scaled_CV.scatter(1, ids_CK, -torch.inf)
        log_rest_C = rest_CV.logsumexp(-1)
        s_C = -(q_CK * log_r_CK).sum(-1) - u_C * (log_rest_C - log_z_C)
        total_C1 = (q_CK.sum(-1) + u_C)[:, None]
        grad_CV = (scaled_CV - log_z_C[:, None]).exp_().mul_(total_C1)
        grad_CV.sub_((rest_CV - log_rest_C[:, None]).exp_().mul_(u_C[:, None])).scatter_add_(1, ids_CK, -q_CK)
        return Soft(s_C, grad_CV)


def soft_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    teach: Teach,
    *,
    alpha: float,
    temperature: float,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> SoftTerms:
    """The loss of this module for the final hidden states under the head; alpha is a, z_loss c, temperature T.

    Shapes: hidden_ND [N, D], weight_VD [V, D], targets_N int64 [N] with -100 for a token that does not count. Under
    autocast the matrix products run in its dtype. All else is fp32 (fp64 for fp64 inputs). There is no second
    derivative.
    """
    wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    with torch.no_grad():
        dtype = product_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            numbers = Numbers(alpha, temperature, z_loss, softcap)
            (value, ce_sum), log_z_N, *grads = _chunks(
                hidden_ND, weight_VD, targets_N, teach, numbers, dtype, chunk_bytes or 0, wanted
            )
    loss = value + z_loss * log_z_N.square().sum()
    if wanted:
        loss = _WithGradients.apply(hidden_ND, weight_VD, loss, *grads)  # type: ignore[no-untyped-call]
    return SoftTerms(loss, value, ce_sum, log_z_N)


def _chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    teach: Teach,
    numbers: Numbers,
    dtype: torch.dtype,
    chunk_bytes: int,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of value and CE, log Z of each token, and the gradients of hidden states and head."""
    N, V = len(hidden_ND), len(weight_VD)
    empty = wide(hidden_ND.new_empty(0))
    log_z_N, grad_weight_VD = empty.new_zeros(N), empty.new_zeros(weight_VD.shape if wanted else 0)
    grad_hidden_ND = torch.zeros_like(hidden_ND) if wanted else empty
    hidden, weight = hidden_ND.to(dtype).contiguous(), weight_VD.to(dtype).contiguous()
    sums = empty.new_zeros(2)
    C = chunk_rows(N, BUFFERS * V * empty.element_size(), chunk_bytes, hidden.device)
    for begin in range(0, N, C):
        chunk = slice(begin, min(begin + C, N))
        logits_CV = empty.new_empty(chunk.stop - begin, V)
        product(hidden[chunk], weight.T, logits_CV)
        value_C, ce_C, log_z_N[chunk], grad_CV = _rows(logits_CV, targets_N[chunk], teach, chunk, numbers)
        sums += torch.stack([value_C.sum(), ce_C.sum()])
        if wanted:
            grad_CV = grad_CV.to(dtype)
            product(grad_CV, weight, grad_hidden_ND[chunk])
            product(grad_CV.T, hidden[chunk], grad_weight_VD, add=True)
    return sums, log_z_N, grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype) if wanted else empty


def _rows(
    logits_CV: Tensor, targets_C: Tensor, teach: Teach, chunk: slice, numbers: Numbers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, CE and log Z of each token, 0 where it does not count, and the gradient of the logits."""
    alpha, temperature, z_loss, softcap = numbers
    valid_C = targets_C != IGNORE
    picked_C1 = torch.where(valid_C, targets_C, 0)[:, None]
    y_CV = softcap_scores(logits_CV, softcap)
    soft = teach(chunk, y_CV / temperature)
    log_z_C = y_CV.logsumexp(-1)
    ce_C = log_z_C - y_CV.gather(1, picked_C1)[:, 0]
    value_C = (1 - alpha) * ce_C + alpha * temperature**2 * soft.s_C
    grad_CV = (y_CV - log_z_C[:, None]).exp_().mul_((1 - alpha + 2 * z_loss * log_z_C)[:, None])
    grad_CV.scatter_add_(1, picked_C1, torch.full_like(grad_CV[:, :1], alpha - 1))
    grad_CV.add_(soft.grad_CV, alpha=alpha * temperature)
    if softcap is not None:
        grad_CV.mul_(1 - (y_CV / softcap).square())
    value_C, ce_C, log_z_C = (torch.where(valid_C, x_C, 0.0) for x_C in (value_C, ce_C, log_z_C))
    return value_C, ce_C, log_z_C, torch.where(valid_C[:, None], grad_CV, 0.0)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known when it is computed."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, loss: Tensor, grad_hidden_ND: Tensor, grad_weight_VD: Tensor
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * grad_loss for grad in ctx.saved_tensors), None, None, None
