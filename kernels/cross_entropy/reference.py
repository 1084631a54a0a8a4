"""Linear cross-entropy in plain PyTorch: the definition that the fast paths must match.

Shapes in names: N tokens, D model width, V vocabulary. "Wide" is fp32, or the input's own type if that is wider (fp64
in tests).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scaling_testbed.kernels.reference import softcap_scores, wide


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ce_N, log_z_N): the cross-entropy of each token, and log Z = logsumexp of its logits, in nats.

    Both are wide, and zero where the target is `ignore_index`. A z-loss is coefficient * log_z^2 (PaLM, arXiv
    2204.02311, section 5). The product hidden x weight runs in the type of its inputs, or in autocast's type. All
    later steps are wide.
    """
    logits_NV = softcap_scores(wide(F.linear(hidden_ND, weight_VD)), softcap)
    valid_N = targets_N != ignore_index
    log_z_N = logits_NV.logsumexp(dim=-1)
    target_logit_N = logits_NV.gather(1, torch.where(valid_N, targets_N, 0)[:, None])[:, 0]
    zero = log_z_N.new_zeros(())
    return torch.where(valid_N, log_z_N - target_logit_N, zero), torch.where(valid_N, log_z_N, zero)


def summed(
    ce_N: torch.Tensor, log_z_N: torch.Tensor, z_loss: float, weights_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of all tokens: sum of w ce + z_loss * sum of log_z^2, with w = weights_N, or 1 without them.

    The z-loss is not weighted. It bounds log Z, which the cross-entropy leaves free, whatever the objective makes of
    the cross-entropy: with a negative weight, as in gradient ascent, it would reward a large log Z, and with a weight
    of 0 log Z would be free. weights_N is as `valid_weights` returns it.
    """
    ce_N = ce_N if weights_N is None else weights_N * ce_N
    return ce_N.sum() + z_loss * log_z_N.square().sum()


def valid_weights(
    weights_N: torch.Tensor, hidden_ND: torch.Tensor, targets_N: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """The weights, contiguous, and zero where the target is `ignore_index`, whatever stands there: 0 times infinity
    would be NaN. Raises ValueError unless they are wide, [N], and without a gradient."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    if weights_N.shape != targets_N.shape or weights_N.dtype != dtype:
        raise ValueError(f"weights must be {dtype} [{len(targets_N)}], got {weights_N.dtype} {list(weights_N.shape)}")
    if weights_N.requires_grad:
        raise ValueError("weights are factors without a gradient, but these require one: give weights.detach()")
    return torch.where(targets_N != ignore_index, weights_N, 0.0)
