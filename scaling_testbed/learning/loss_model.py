"""Model and head loss in one forward pass."""

import torch
from torch import nn

from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.loss import LossTerms, loss_terms
from scaling_testbed.model.transformer import Transformer


class LossModel(nn.Module):
    """Model and head loss in one forward pass, so that a wrapper such as FSDP sees every use of the head's weight."""

    def __init__(self, model: Transformer, loss: CrossEntropyConfig):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens_BS: torch.Tensor) -> LossTerms:
        """The loss terms of token ids [B, T + 1], as sums over the valid targets.

        The first T columns are the inputs and the last T the targets (-100: no target).
        """
        hidden_BTD = self.model(tokens_BS[:, :-1])
        return loss_terms(
            self.loss,
            hidden_BTD.flatten(0, 1),
            self.model.head_weight_VD,
            tokens_BS[:, 1:].flatten(),
            softcap=self.model.config.final_softcap,
        )
