"""The answers in the validation split of a corpus with a mask: runs of tokens that are targets, after what is none."""

from collections.abc import Iterator

import numpy as np

from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.cutting import NO_TARGET
from scaling_testbed.data.documents import documents
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.multiple_choice import Continuation

MOST = 2000  # answers, spread evenly over those that there are


def answers_of(data: PreparedData, length: int, max_length: int) -> list[tuple[int, Continuation]]:
    """At most MOST answers of the validation split of `data`, each with its number among all, from 1 on.

    Where EOS tokens end documents, the context of an answer is its document from the EOS before it on, and loses its
    beginning if context and answer are longer than `max_length`. Else it is the window of `length` tokens, as in
    training, and answers that a window cuts are left out. Raises UserError if no token is left out of the loss, and for
    an answer that is longer than `max_length`.
    """
    if not data.validation.is_masked:
        raise UserError(
            f"{data.folder} has no answers: each of its tokens is a target of the loss; name a file of a task, or "
            "train on data with prompts (docs/data.md)"
        )
    found = list(_in_documents(data) if data.validation.eos_id is not None else _in_windows(data, length))
    if not found:
        raise UserError(f"{data.folder}: no answer of its validation split lies whole in a sequence of {length} tokens")
    chosen = np.arange(min(MOST, len(found))) * len(found) // min(MOST, len(found))
    return [(place + 1, _continuation(data, *found[place], max_length)) for place in chosen.tolist()]


def _continuation(data: PreparedData, ids: np.ndarray, n_scored: int, max_length: int) -> Continuation:
    if n_scored > max_length:
        raise UserError(
            f"{data.folder}: an answer has {n_scored} tokens, and the model reads {max_length} (--max-length)"
        )
    kept = ids[-(max_length + 1) :]  # the last token is only predicted
    return Continuation(ids=kept, n_scored=n_scored, truncated=len(kept) < len(ids), apart=True)


def _in_documents(data: PreparedData) -> Iterator[tuple[np.ndarray, int]]:
    for document in documents(data, "validation"):
        eos_id = (data.sources().get(document.source) or data).validation.eos_id
        ids = np.concatenate([[eos_id], document.tokens])
        for first, after in _runs(np.ones(len(ids) - 1, bool) if document.counted is None else document.counted):
            yield ids[: after + 1], after - first


def _in_windows(data: PreparedData, length: int) -> Iterator[tuple[np.ndarray, int]]:
    for batch in ValidationBatches(data.validation, sequence_length=length, max_tokens=None, rows=64):
        for tokens, targets in zip(batch.tokens_BS, batch.targets_BT, strict=True):
            for first, after in _runs(targets != NO_TARGET):
                if first > 0 and after < length:  # whole: what is before and after is no target
                    yield tokens[: after + 1], after - first


def _runs(there: np.ndarray) -> Iterator[tuple[int, int]]:
    """First place and place after the last of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(np.int8), [0]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
