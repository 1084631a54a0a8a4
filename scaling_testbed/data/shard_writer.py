"""Write the tokens of a split as shards, and beside them the mask that says which of them count as targets."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scaling_testbed.data.manifest import MASK, numpy_dtype, smallest_dtype
from scaling_testbed.data.shards import HEADER_BYTES, header_bytes
from scaling_testbed.errors import UserError
from scaling_testbed.files import sha256_of

MAX_SHARD_TOKENS = 1 << 30  # the header counts tokens in an int32


class ShardWriter:
    """Writes one stream of tokens to `<stem>.bin`, and to `<stem>.1.bin` ... after each MAX_SHARD_TOKENS tokens.

    masked: write `<stem>.mask` too. A file has a temporary name until it is complete. `close` returns the manifest
    entries, none if there are no tokens. n_targets: the tokens so far that count as targets.
    """

    def __init__(self, folder: Path, stem: str, vocab_size: int, *, masked: bool = False):
        self.folder, self.stem, self.vocab_size, self.masked = folder, stem, vocab_size, masked
        self.dtype = smallest_dtype(vocab_size)
        self.entries: list[dict] = []
        self.n_targets = 0
        self._file: BinaryIO | None = None
        self._mask: BinaryIO | None = None
        self._n_tokens = 0

    def write(self, tokens: np.ndarray, origin: str, counted: np.ndarray | None = None) -> None:
        """Append token ids. counted: whether each counts as a target (None: all do); only for a masked stream.

        Raises UserError that names `origin` if an id is outside the vocabulary.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            worst = int(tokens.max()) if tokens.max() >= self.vocab_size else int(tokens.min())
            raise UserError(f"{origin}: token id {worst} is outside the vocabulary of {self.vocab_size}")
        assert self.masked or counted is None
        self.n_targets += len(tokens) if counted is None else int(np.count_nonzero(counted))
        if self.masked and counted is None:
            counted = np.ones(len(tokens), dtype=bool)
        while len(tokens):
            if self._file is None:
                self._file = self._open(".bin", header=True)
                self._mask = self._open(".mask") if self.masked else None
            part = tokens[: MAX_SHARD_TOKENS - self._n_tokens]
            self._file.write(part.astype(numpy_dtype(self.dtype)).tobytes())
            if self._mask is not None and counted is not None:
                self._mask.write(counted[: len(part)].astype(np.uint8).tobytes())
                counted = counted[len(part) :]
            self._n_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._n_tokens == MAX_SHARD_TOKENS:
                self._finish()

    def _name(self, ending: str) -> str:
        return f"{self.stem}{ending}" if not self.entries else f"{self.stem}.{len(self.entries)}{ending}"

    def _temporary(self, ending: str) -> Path:
        return self.folder / f"{self._name(ending)}.{os.getpid()}.tmp"

    def _open(self, ending: str, header: bool = False) -> BinaryIO:
        file = open(self._temporary(ending), "wb", buffering=1 << 20)  # noqa: SIM115 (closed in _put_in_place)
        if header:
            file.write(bytes(HEADER_BYTES))
        return file

    def _finish(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(header_bytes(self.dtype, self._n_tokens))
        entry = self._put_in_place(self._file, ".bin", format="llmc", dtype=self.dtype, offset=HEADER_BYTES)
        if self._mask is not None:
            entry[MASK] = self._put_in_place(self._mask, ".mask", format=MASK, dtype="uint8", offset=0)
        self.entries.append(entry)
        self._file, self._mask, self._n_tokens = None, None, 0

    def _put_in_place(self, file: BinaryIO, ending: str, **layout: Any) -> dict:
        """Give a file its name, and return its entry."""
        file.flush()
        os.fsync(file.fileno())
        file.close()
        path = self.folder / self._name(ending)
        os.replace(self._temporary(ending), path)
        sizes = {"n_tokens": self._n_tokens, "size": path.stat().st_size, "sha256": sha256_of(path)}
        return {"file": path.name, **layout, **sizes}

    def close(self) -> list[dict]:
        """Finish the last file and return the manifest entries of all files."""
        if self._file is not None:
            self._finish()
        return self.entries

    def record(self, **known: Any) -> dict:
        """`close`, and return the record of the split: what is `known` of it, its shards, and n_targets if it is
        masked."""
        return {**known, **({"n_targets": self.n_targets} if self.masked else {}), "shards": self.close()}
