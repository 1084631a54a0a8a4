"""The documents of a prepared corpus: the tokens up to and with each end-of-document token (EOS)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scaling_testbed.data.manifest import SPLITS
from scaling_testbed.data.shards import PreparedData, TokenStream
from scaling_testbed.errors import UserError, check_choice

READ_TOKENS = 1 << 20  # that are read at once


class Document(NamedTuple):
    """A document of a prepared corpus. source: the name of its source. tokens: with its EOS. counted: whether each of
    them is a target of the loss; None: all are."""

    source: str
    tokens: np.ndarray
    counted: np.ndarray | None


def eos_of(data: PreparedData) -> int:
    """The EOS of a corpus. Raises UserError, which names the folder, if none ends its documents."""
    eos_id: int | None = data.manifest["eos_id"]
    if eos_id is None:
        raise UserError(
            f"{data.folder}: no token ends a document there, so its documents are not known; use a corpus of texts, or "
            "tokenizer=pretrained for token ids"
        )
    return eos_id


def documents(data: PreparedData, split: str = "train") -> Iterator[Document]:
    """Yield each document of a split, in the order of the shards. Those of a mixture come source by source, in the
    order of their names; otherwise the name of the source is that of the corpus. Tokens after the last EOS are a
    document too.

    Raises UserError if the corpus has no EOS.
    """
    check_choice("split", split, SPLITS)
    for name, source in (data.sources() or {str(data.manifest["name"]): data}).items():
        stream, start = getattr(source, split), 0
        for tokens in _of_stream(stream, eos_of(source)):
            yield Document(name, tokens, stream.counted(start, len(tokens)) if stream.is_masked else None)
            start += len(tokens)


def _of_stream(stream: TokenStream, eos_id: int) -> Iterator[np.ndarray]:
    before: list[np.ndarray] = []
    for start in range(0, stream.n_tokens, READ_TOKENS):
        tokens = np.asarray(stream.read(start, min(READ_TOKENS, stream.n_tokens - start)), np.int64)
        *whole, rest = np.split(tokens, np.flatnonzero(tokens == eos_id) + 1)
        for part in whole:
            yield np.concatenate([*before, part]) if before else part
            before = []
        if len(rest):
            before.append(rest)
    if before:
        yield np.concatenate(before)
