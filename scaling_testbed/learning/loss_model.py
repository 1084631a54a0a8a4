"""Model and head loss in one forward pass."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from scaling_testbed.kernels.cross_entropy.reference import linear_cross_entropy
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.loss import LossTerms, loss_terms
from scaling_testbed.learning.objectives import Given
from scaling_testbed.learning.temperature import ladder_sums
from scaling_testbed.model.transformer import Transformer

AT_ONCE = 1024  # targets whose logits are held at a time


class LossModel(nn.Module):
    """Model and head loss in one forward pass, so that a wrapper such as FSDP sees every use of the head's weight.

    objective: the terms of a micro-batch in training (objectives.Built.terms); None: the cross-entropy.
    """

    def __init__(
        self,
        model: Transformer,
        loss: CrossEntropyConfig,
        objective: Callable[[Given], LossTerms] | None = None,
    ):
        super().__init__()
        self.model, self.loss, self.objective = model, loss, objective

    def forward(
        self,
        tokens_BS: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        begins_BT: torch.Tensor | None = None,
        rows: int | None = None,
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> LossTerms:
        """The loss terms of token ids [B, T + 1], as sums over the valid targets.

        The first T columns are the inputs, and the last T the targets unless targets_BT has them (-100: no target).
        begins_BT: the begins of documents, as for Transformer.forward. rows: pass at least so many sequences through
        the model, of which those after the first B do not count, so that it sees one shape. beside: Batch.beside in
        training, for the objective; None: the terms are those of the cross-entropy.
        """
        inputs_BT, missing = tokens_BS[:, :-1], max(0, (rows or 0) - len(tokens_BS))
        if missing:
            inputs_BT = F.pad(inputs_BT, (0, 0, 0, missing))
            begins_BT = None if begins_BT is None else F.pad(begins_BT, (0, 0, 0, missing))
        hidden_BTD = self.model(inputs_BT, begins_BT)
        if missing:
            hidden_BTD = hidden_BTD[:-missing]
        targets_BT = tokens_BS[:, 1:] if targets_BT is None else targets_BT
        weight_VD, softcap = self.model.head_weight_VD, self.model.config.final_softcap
        if self.objective is None or beside is None:
            return loss_terms(self.loss, hidden_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), softcap=softcap)
        return self.objective(
            Given(
                tokens_BS=tokens_BS,
                targets_BT=targets_BT,
                begins_BT=begins_BT,
                hidden_BTD=hidden_BTD,
                weight_VD=weight_VD,
                softcap=softcap,
                loss=self.loss,
                beside=beside,
            )
        )

    def cross_entropy_at(
        self, tokens_BS: torch.Tensor, scored_BT: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """The cross-entropy [N] in nats of the N targets at which scored_BT [B, T] is true, by rows, with the logits
        divided by `temperature`. tokens_BS: as for `forward`."""
        return self._scores_at(tokens_BS, scored_BT, temperature)[0]

    def greedy_at(self, tokens_BS: torch.Tensor, scored_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`cross_entropy_at`, and whether each target is the likeliest token [N]; the first one of equal logits is."""
        ce_N, hidden_ND, targets_N = self._scores_at(tokens_BS, scored_BT)
        parts = torch.split(hidden_ND, AT_ONCE)
        logits = (F.linear(part_ND, self.model.head_weight_VD) for part_ND in parts)
        likeliest_N = torch.cat([targets_N[:0], *(part_NV.argmax(-1) for part_NV in logits)])
        return ce_N, likeliest_N == targets_N

    def _scores_at(
        self, tokens_BS: torch.Tensor, scored_BT: torch.Tensor, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The cross-entropy of the targets, the hidden states before them, and the targets."""
        hidden_ND = self.model(tokens_BS[:, :-1])[scored_BT]
        targets_N = tokens_BS[:, 1:][scored_BT]
        cap = self.model.config.final_softcap
        if temperature != 1:  # s tanh(z / s) / T is S tanh(Z / S) with Z = z / T and S = s / T
            hidden_ND, cap = hidden_ND / temperature, None if cap is None else cap / temperature
        ce_N, _ = linear_cross_entropy(hidden_ND, self.model.head_weight_VD, targets_N, softcap=cap)
        return ce_N, hidden_ND, targets_N

    def ladder_sums_of(
        self,
        chosen_B: torch.Tensor,
        tokens_BS: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        begins_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`temperature.ladder_sums` [2, K, 3] over the targets of the sequences at which chosen_B is false, and true.
        The others are as for `forward`."""
        hidden_BTD = self.model(tokens_BS[:, :-1], begins_BT)
        targets_BT = tokens_BS[:, 1:] if targets_BT is None else targets_BT
        weight_VD, cap = self.model.head_weight_VD, self.model.config.final_softcap
        halves = [
            ladder_sums(hidden_BTD[here_B].flatten(0, 1), weight_VD, targets_BT[here_B].flatten(), softcap=cap)
            for here_B in (~chosen_B, chosen_B)
        ]
        return torch.stack(halves)
