"""Cross-entropy with z-loss over the head, its terms kept apart.

Legend: N tokens, D d_model, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scaling_testbed.kernels import reference
from scaling_testbed.learning.config import CrossEntropyConfig

IGNORE = -100  # a target with this value is left out of every term


class LossTerms(NamedTuple):
    """Sums over the valid tokens, as fp32 scalars on the device; divide by the number of valid tokens to report.

    loss = ce + z_loss is what is differentiated; ce and z_loss are detached.
    """

    loss: Tensor
    ce: Tensor
    z_loss: Tensor
    n_tokens: Tensor


def loss_terms(
    config: CrossEntropyConfig, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None
) -> LossTerms:
    """Cross-entropy and z-loss of the final hidden states under the head.

    z-loss is coef * log^2 Z per token with Z = sum_j exp(logit_j) (PaLM, section 5; Wortsman et al. 2023, section
    3.1.2), over the same tokens as the cross-entropy. `softcap` s caps logits to s tanh(logit / s) first.

    Shapes: hidden_ND [N, D], weight_VD [V, D], targets_N int64 [N] with -100 where a token does not count.
    Under autocast the matrix products run in its dtype; everything else is fp32 (fp64 for fp64 inputs).
    """
    if resolve_impl(config) == "reference":
        ce_N, log_z_N = reference.linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, softcap=softcap, ignore_index=IGNORE
        )
        ce, z_loss = ce_N.sum(), config.z_loss * log_z_N.square().sum()
        loss = ce + z_loss
    else:
        rows = max(1, config.chunk_mib * 2**20 // (4 * weight_VD.shape[0]))
        loss, ce, z_loss = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, config.z_loss, softcap, rows)
    return LossTerms(loss, ce.detach(), z_loss.detach(), (targets_N != IGNORE).sum())


def resolve_impl(config: CrossEntropyConfig) -> str:
    """The path that `auto` stands for on this machine, or the one that was named."""
    return "chunked" if config.impl == "auto" else config.impl


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy + z-loss that never holds more than `rows` x V logits.

    Each chunk's gradient is formed in the forward pass while its logits are at hand, so nothing is computed twice:
        dL/dlogit_j = (1 + 2 coef log Z) p_j - 1[j = target],   times 1 - (y/s)^2 under a softcap y = s tanh(x/s).
    Only the first output is differentiable; its incoming gradient is a scalar that scales the stored ones.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, z_coefficient, softcap, rows):
        product_dtype = hidden_ND.dtype
        if torch.is_autocast_enabled(hidden_ND.device.type):
            product_dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        ctx.needs = hidden_ND.requires_grad, weight_VD.requires_grad
        with torch.autocast(hidden_ND.device.type, enabled=False):
            ce_N, log_z_N, grad_hidden_ND, grad_weight_VD = _chunked_terms_and_gradients(
                hidden_ND, weight_VD, targets_N, z_coefficient, softcap, rows, product_dtype, ctx.needs
            )
        ctx.save_for_backward(*(grad for grad in (grad_hidden_ND, grad_weight_VD) if grad is not None))
        ce, z_loss = ce_N.sum(), z_coefficient * log_z_N.square().sum()
        loss = ce + z_loss
        ctx.mark_non_differentiable(ce, z_loss)
        return loss, ce, z_loss

    @staticmethod
    def backward(ctx, grad_loss, _grad_ce, _grad_z_loss):
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) * grad_loss if needed else None for needed in ctx.needs]
        return grads[0], grads[1], None, None, None, None


def _chunked_terms_and_gradients(hidden_ND, weight_VD, targets_N, z_coefficient, softcap, rows, product_dtype, needs):
    """Per-token ce and log Z (fp32, zero where ignored) and, where needed, the gradients of sum(ce + z-loss)."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    ce_N = hidden_ND.new_zeros(len(targets_N), dtype=wide)
    log_z_N = torch.zeros_like(ce_N)
    grad_hidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None
    weight = weight_VD.to(product_dtype)
    for begin in range(0, len(targets_N), rows):
        chunk = slice(begin, begin + rows)
        hidden, targets = hidden_ND[chunk].to(product_dtype), targets_N[chunk]
        logits = (hidden @ weight.T).to(wide)
        slope = None
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
            slope = 1 - (logits / softcap).square()
        valid = targets != IGNORE
        picked = targets.clamp(min=0)[:, None]
        log_z = torch.logsumexp(logits, dim=-1)
        ce_N[chunk] = torch.where(valid, log_z - logits.gather(1, picked)[:, 0], 0.0)
        log_z_N[chunk] = torch.where(valid, log_z, 0.0)
        if not any(needs):
            continue
        scale = torch.where(valid, 1 + 2 * z_coefficient * log_z, 0.0)
        grad = logits.sub_(log_z[:, None]).exp_().mul_(scale[:, None])
        grad.scatter_add_(1, picked, -valid.to(wide)[:, None])
        if slope is not None:
            grad.mul_(slope)
        grad = grad.to(product_dtype)
        if needs[0]:
            grad_hidden_ND[chunk] = grad @ weight
        if needs[1]:
            grad_weight_VD += grad.T @ hidden
    if needs[1]:
        grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
    return ce_N, log_z_N, grad_hidden_ND, grad_weight_VD
