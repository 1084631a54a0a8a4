"""QK-clip: after an update, it shrinks the queries and keys of heads whose attention logits are too large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.interventions.base import INTERVENTIONS, Context, Intervention
from scaling_testbed.model.parts import LINEARS

if TYPE_CHECKING:
    from scaling_testbed.learning.optimizers import OptimizerConfig
    from scaling_testbed.model.config import ModelConfig
    from scaling_testbed.model.transformer import Transformer


@INTERVENTIONS.register("qk_clip")
class QkClip(Intervention):
    """Shrinks the queries and keys of heads whose largest logit in the step's batch exceeds `limit`, after an update.

    See `clip_queries_and_keys` (Kimi K2, arXiv 2507.20534, algorithm 1). To find the logits, it computes the scores a
    second time. Like any recomputation, this does not count in the FLOPs.
    """

    key = "optimizer.qk_clip"
    needs_whole_tensors = "it scales the rows of whole heads"

    def __init__(self, limit: float):
        self.limit = limit

    @classmethod
    def asked_by(cls, optimizer: OptimizerConfig, model: ModelConfig) -> QkClip | None:
        if optimizer.qk_clip is None:
            return None
        norm = f"model.qk_norm={model.qk_norm}" if model.kappa is None else f"model.kappa={model.kappa}"
        keeps = {
            norm: model.query_key_norm.keeps_logits,
            f"model.linear={model.linear}": LINEARS[model.linear].keeps_logits,
        }
        for key in (key for key, does in keeps.items() if does):
            raise ConfigError(
                f"optimizer.qk_clip must be null with {key}, which keeps attention logits constant when the weights of "
                "queries and keys shrink"
            )
        return cls(optimizer.qk_clip)

    def attach(self, context: Context) -> None:
        self._model, self._largest = context.model, context.largest
        record_logits(self._model)

    def after_update(self, made: bool) -> None:
        largest = self._largest(take_largest_logits(self._model))
        if made:
            clip_queries_and_keys(self._model, self.limit, largest)


def record_logits(model: Transformer) -> None:
    """Make every attention record the largest logit of each head in each forward pass that has a gradient."""
    for block in model.typed_blocks:
        block.attention.records_logits = True


def take_largest_logits(model: Transformer) -> list[float]:
    """The largest causal logit of every head since the last call, layer after layer."""
    import torch

    taken = [block.attention.take_largest_logits() for block in model.typed_blocks]
    return torch.cat(taken).tolist() if taken else []


def clip_queries_and_keys(model: Transformer, limit: float, largest: Sequence[float]) -> None:
    """Scale the weights of q and k so that the logits of each head are multiplied by gamma = min(1, limit / largest).

    Kimi K2, arXiv 2507.20534, algorithm 1. largest: the largest logit of every head, layer after layer.

    If each query head has its own key head, both are multiplied by sqrt(gamma). A key head that several query heads
    share is multiplied by the largest sqrt(gamma) among them, and each query head by its gamma divided by that factor.
    A head within the limit thus keeps its logits, and no weight grows.
    """
    import torch

    largest_LH = torch.tensor(largest).view(len(model.blocks), model.config.n_heads)
    for block, largest_H in zip(model.typed_blocks, largest_LH, strict=True):
        attention = block.attention
        gamma_H = torch.where(largest_H > limit, limit / largest_H, 1.0).to(attention.q.weight.device)
        heads_per_key = attention.n_heads // attention.n_kv_heads
        key_G = gamma_H.view(-1, heads_per_key).amax(1).sqrt()
        query_H = gamma_H / key_G.repeat_interleave(heads_per_key)
        with torch.no_grad():
            for weight, factor in ((attention.q.weight, query_H), (attention.k.weight, key_G)):
                weight.mul_(factor.repeat_interleave(attention.d_head)[:, None])
