"""Cross-entropy with z-loss over the head. The terms are reported separately.

Legend: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scaling_testbed.errors import ConfigError
from scaling_testbed.kernels import support
from scaling_testbed.kernels.cross_entropy import chunked, reference
from scaling_testbed.learning.config import CrossEntropyConfig

IGNORE = -100  # a target with this value is left out of every term


class LossTerms(NamedTuple):
    """Sums over the valid tokens, as fp32 scalars on the device; divide by the number of valid tokens to report.

    Only `loss` has a gradient: that of the objective plus the z-loss. objective: the value of the objective, without
    the z-loss; None: it is the cross-entropy, `ce`.
    """

    loss: Tensor
    ce: Tensor
    z_loss: Tensor
    n_tokens: Tensor
    objective: Tensor | None = None


def loss_terms(
    config: CrossEntropyConfig, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None
) -> LossTerms:
    """The terms of `cross_entropy`, whose arguments these are."""
    loss, ce_N, log_z_N = cross_entropy(config, hidden_ND, weight_VD, targets_N, softcap=softcap)
    return LossTerms(loss, ce_N.sum(), z_loss_of(config, log_z_N), (targets_N != IGNORE).sum())


def z_loss_of(config: CrossEntropyConfig, log_z: Tensor) -> Tensor:
    """The z-loss of tokens, summed, without a gradient. log_z: 0 for a token that does not count."""
    return config.z_loss * log_z.detach().square().sum()


def cross_entropy(
    config: CrossEntropyConfig,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    softcap: float | None = None,
    weights_N: Tensor | None = None,
) -> chunked.CrossEntropy:
    """Cross-entropy and z-loss of the final hidden states under the head: loss, and without a gradient ce_N and
    log_z_N [N], which are 0 for a token that does not count.

    z-loss is coef * log^2 Z per token with Z = sum_j exp(logit_j) (PaLM, section 5; Wortsman et al. 2023, section
    3.1.2), over the same tokens as the cross-entropy. `softcap` s caps logits to s tanh(logit / s) first. loss is the
    sum of w ce + coef log^2 Z, where weights_N has the weight w of each token; None: 1. The z-loss has no weight:
    reference.summed says why.

    Shapes: hidden_ND [N, D], weight_VD [V, D], targets_N int64 [N] with -100 for a token that does not count,
    weights_N [N], which may have any value at such a token. Under autocast the matrix products run in its dtype. All
    else is fp32 (fp64 for fp64 inputs). Raises ValueError for weights of another type or shape, or with a gradient.
    """
    # A run names its path. To look for Triton in each step takes time, and torch.compile cannot trace it.
    impl = choose_loss_impl(config, hidden_ND.device) if config.impl == "auto" else config.impl
    if impl == "reference":
        ce_N, log_z_N = reference.linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, softcap=softcap, ignore_index=IGNORE
        )
        if weights_N is not None:
            weights_N = reference.valid_weights(weights_N, hidden_ND, targets_N, IGNORE)
        loss = reference.summed(ce_N, log_z_N, config.z_loss, weights_N)
        return chunked.CrossEntropy(loss, ce_N.detach(), log_z_N.detach())
    return _linear_cross_entropy(impl)(
        hidden_ND,
        weight_VD,
        targets_N,
        z_loss=config.z_loss,
        softcap=softcap,
        ignore_index=IGNORE,
        chunk_bytes=None if config.chunk_mib is None else config.chunk_mib * 2**20,
        weights_N=weights_N,
    )


def choose_loss_impl(config: CrossEntropyConfig, device: torch.device) -> str:
    """The named path, or the path of `auto` on this device: triton on a GPU that can run it, else chunked.

    Raises ConfigError if the named path cannot run.
    """
    if config.impl == "auto":
        return "triton" if device.type == "cuda" and support.why_not(device) is None else "chunked"
    if config.impl in ("triton", "recompute") and (reason := support.why_not(device)):
        raise ConfigError(f"loss.impl={config.impl} cannot run: {reason}; use loss.impl=auto")
    return config.impl


def _linear_cross_entropy(impl: str) -> Callable[..., chunked.CrossEntropy]:
    """The kernel of a path. Triton is imported only for the triton path."""
    if impl == "chunked":
        return chunked.linear_cross_entropy
    from scaling_testbed.kernels.cross_entropy import triton

    return partial(triton.linear_cross_entropy, variant="recompute" if impl == "recompute" else "auto")
