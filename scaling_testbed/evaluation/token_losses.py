"""The cross-entropy of each token of some windows, without holding all logits at once.

Shapes in names: B windows, T positions, N tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from scaling_testbed.kernels.reference import softcap_scores, wide
from scaling_testbed.model.transformer import Transformer

LOGITS_BYTES = 2**26  # of logits that are held at once
PASS_TOKENS = 4096  # in a forward pass, or one window


def logits_in_parts(
    model: Transformer, hidden_ND: torch.Tensor, targets_N: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the wide logits, with the softcap of the model, and the targets of the next tokens."""
    weight_VD, softcap = model.head_weight_VD, model.config.final_softcap
    rows = max(1, LOGITS_BYTES // (4 * len(weight_VD)))
    for part_ND, part_N in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        yield softcap_scores(wide(F.linear(part_ND, weight_VD)), softcap), part_N


@torch.no_grad()
def token_losses(model: Transformer, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The cross-entropy [B, T] of the targets, in nats: fp64 on the CPU. tokens_BS: token ids [B, T + 1], of which the
    first T columns are read and the last T predicted."""
    hidden_ND = model(tokens_BS[:, :-1]).flatten(0, 1)
    parts = logits_in_parts(model, hidden_ND, tokens_BS[:, 1:].flatten())
    losses = [F.cross_entropy(logits_NV, targets_N, reduction="none") for logits_NV, targets_N in parts]
    return torch.cat(losses).view(len(tokens_BS), -1).double().cpu()
