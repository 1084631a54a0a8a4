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
