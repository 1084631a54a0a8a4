"""Validation loss: plain cross-entropy per token over the same batches every time."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.loss import loss_terms
from scaling_testbed.running.device import autocast
from scaling_testbed.running.interrupts import Interrupts


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[np.ndarray],
    loss: CrossEntropyConfig,
    *,
    device: torch.device,
    precision: str,
    interrupts: Interrupts | None = None,
) -> float:
    """Sum of cross-entropy over all tokens divided by their number, in nats; z-loss is never inside.

    batches: int64 arrays [rows, T + 1]. Raises Interrupted between batches when a signal has come.
    """
    total, n_tokens = 0.0, 0
    for batch_BS in batches:
        if interrupts is not None:
            interrupts.check()
        tokens_BS = torch.from_numpy(batch_BS).to(device)
        with autocast(device, precision):
            hidden_BTD = model(tokens_BS[:, :-1])
            terms = loss_terms(
                loss,
                hidden_BTD.flatten(0, 1),
                model.head_weight_VD,
                tokens_BS[:, 1:].flatten(),
                softcap=model.config.final_softcap,
            )
        total += terms.ce.item()
        n_tokens += terms.n_tokens.item()
    return total / n_tokens


def bits_per_byte(loss_nats: float, n_tokens: int, n_bytes: int) -> float | None:
    """Loss per token as bits per byte of text; None for a source that has no text (n_bytes = 0).

    n_tokens and n_bytes are those of the whole validation split.
    """
    return loss_nats / math.log(2) * n_tokens / n_bytes if n_bytes else None
