"""Validation loss: plain cross-entropy per token over the same batches every time."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.errors import ConfigError
from scaling_testbed.processes.device import autocast
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.placement import Replica

MAIN_SET = "validation"


def open_validation_sets(run: RunConfig, data: PreparedData) -> dict[str, ValidationBatches]:
    """The validation split of the run's own `data`, as MAIN_SET, and of every corpus in evaluation.sets.

    Raises ConfigError for a set with that name, or with another tokenizer.
    """
    streams = {MAIN_SET: data.validation}
    for name, path in run.evaluation.sets.items():
        other = open_prepared(Path(path))
        if name == MAIN_SET:
            raise ConfigError(f"evaluation.sets.{name}: this is the name of the run's own set; choose another")
        if _vocabulary(other) != _vocabulary(data):
            raise ConfigError(f"evaluation.sets.{name}: {path} has another tokenizer than {data.folder}")
        streams[name] = other.validation
    rows = run.evaluation.rows or run.batch.micro_batch_sequences or run.batch.sequences
    length, tokens = run.batch.sequence_length, int(run.evaluation.tokens)
    return {
        name: ValidationBatches(stream, sequence_length=length, max_tokens=tokens, rows=rows)
        for name, stream in streams.items()
    }


def _vocabulary(data: PreparedData) -> tuple[str | None, int]:
    """What two corpora must share for one model to be scored on both."""
    return data.tokenizer_fingerprint, data.vocab_size


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
