"""QK-clip: after an update, queries and keys of heads whose attention logits grew too large are shrunk."""

from collections.abc import Sequence

import torch

from scaling_testbed.model.transformer import Transformer


def record_logits(model: Transformer) -> None:
    """Let every attention find the largest logits of its heads in each forward pass that has a gradient."""
    for block in model.blocks:
        block.attention.records_logits = True


def take_largest_logits(model: Transformer) -> list[float]:
    """The largest causal logit since the last call of every head, layer after layer."""
    taken = [block.attention.take_largest_logits() for block in model.blocks]
    return torch.cat(taken).tolist() if taken else []


@torch.no_grad()
def clip_queries_and_keys(model: Transformer, limit: float, largest: Sequence[float]) -> None:
    """Scale the weights of q and k so that a head's logits become gamma = min(1, limit / largest) times what they were
    (Kimi K2, arXiv 2507.20534, algorithm 1).

    With a key head for each query head both are multiplied by sqrt(gamma). A key head that several share is multiplied
    by the largest sqrt(gamma) of them, which is that of the head in least need, and each query head by what is left of
    its gamma: a head within the limit keeps its logits, and no weight grows.
    """
    largest_LH = torch.tensor(largest).view(len(model.blocks), model.config.n_heads)
    for block, largest_H in zip(model.blocks, largest_LH, strict=True):
        attention = block.attention
        gamma_H = torch.where(largest_H > limit, limit / largest_H, 1.0).to(attention.q.weight.device)
        heads_per_key = attention.n_heads // attention.n_kv_heads
        key_G = gamma_H.view(-1, heads_per_key).amax(1).sqrt()
        query_H = gamma_H / key_G.repeat_interleave(heads_per_key)
        for weight, factor in ((attention.q.weight, query_H), (attention.k.weight, key_G)):
            weight.mul_(factor.repeat_interleave(attention.d_head)[:, None])
