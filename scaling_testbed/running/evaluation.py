"""Validation loss: plain cross-entropy per token over the same batches every time."""

import math
from collections.abc import Callable

import torch

from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.running.device import autocast
from scaling_testbed.running.distributed import Processes
from scaling_testbed.running.parallel import Replica


@torch.no_grad()
def evaluate(
    placed: Replica,
    batches: ValidationBatches,
    *,
    device: torch.device,
    precision: str,
    processes: Processes,
    poll: Callable[[], object] | None = None,
) -> float:
    """Sum of cross-entropy over all tokens divided by their number, in nats; z-loss is never inside.

    The ranks take batches in turn; sums are float64. `poll` is called before each batch, on every rank equally often,
    and may raise Interrupted.
    """
    total, n_tokens = 0.0, 0
    with placed.scoring():
        for first in range(0, len(batches), processes.world.size):
            if poll is not None:
                poll()
            number = first + processes.world.rank
            # Sharded ranks must all come along: one without a batch of its own computes the last one and drops it.
            tokens_BS = torch.from_numpy(batches.batch(min(number, len(batches) - 1))).to(device)
            with autocast(device, precision):
                terms = placed.plain(tokens_BS)
            if number < len(batches):
                total += terms.ce.item()
                n_tokens += terms.n_tokens.item()
    total, n_tokens = processes.sum([total, n_tokens])
    return total / n_tokens


def bits_per_byte(loss_nats: float, n_tokens: int, n_bytes: int) -> float | None:
    """Loss per token as bits per byte of text; None for a source that has no text (n_bytes = 0).

    n_tokens and n_bytes are those of the whole validation split.
    """
    return loss_nats / math.log(2) * n_tokens / n_bytes if n_bytes else None
