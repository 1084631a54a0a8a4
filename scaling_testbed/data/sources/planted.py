"""Short pieces of the standard library, of which known shares are junk: to judge ways of choosing documents."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scaling_testbed.data.sources.python_stdlib import PythonStdlibConfig
from scaling_testbed.data.sources.reading import Tally, Unit
from scaling_testbed.data.sources.source import SOURCES, split_of
from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import key

PHRASE = 8  # bytes that a repeated document repeats
FIRST, LAST = 32, 126  # the printable characters of ASCII, of which uniform documents are


@SOURCES.register("planted")
@dataclass(frozen=True, kw_only=True)
class PlantedConfig(PythonStdlibConfig):
    """Pieces of the standard library in ASCII, each a document, with three kinds of junk in the train split alone.

    A hash of a piece decides whether it is junk and of which kind. The junk has the length of the piece and takes its
    place. The validation split is clean, and the same for any shares.
    """

    name: str = "planted"
    document_bytes: int = key(128, "The length of each document. The rest of a file is left out.")
    shuffled: float = key(0.1, "The share of the training documents whose bytes are shuffled.")
    uniform: float = key(0.1, "The share of those that become uniform random printable characters.")
    repeated: float = key(0.1, "The share of those that become 8 of their bytes again and again.")

    kinds: ClassVar[tuple[str, ...]] = ("shuffled", "uniform", "repeated")

    def __post_init__(self):
        super().__post_init__()
        check_positive("document_bytes", self.document_bytes)
        shares = [getattr(self, kind) for kind in self.kinds]
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(f"{', '.join(self.kinds)} must not be negative and have a sum of 1 at most; got {shares}")

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        for text in super().documents(unit, tally):
            plain = text.decode(errors="ignore").encode("ascii", "ignore")
            for first in range(0, len(plain) - self.document_bytes + 1, self.document_bytes):
                piece = plain[first : first + self.document_bytes]
                if piece.strip():
                    yield self.planted(piece)

    def planted(self, piece: bytes) -> bytes:
        """The document in the place of a piece: the piece itself, or junk. Junk is in the train split too."""
        kind = self.kind_of(piece)
        if kind is None:
            return piece
        for salt in range(1000):  # the split of junk is that of a hash of its own
            junk = _junk(kind, piece, np.random.default_rng(_hash(piece, salt)))
            if split_of(junk, self.validation_fraction) == "train":
                return junk
        return piece

    def kind_of(self, piece: bytes) -> str | None:
        """The kind of junk that a piece becomes; None if it stays as it is."""
        if split_of(piece, self.validation_fraction) != "train":
            return None
        draw = _hash(piece) / 2.0**64
        for kind in self.kinds:
            draw -= getattr(self, kind)
            if draw < 0:
                return kind
        return None


def _hash(piece: bytes, salt: int | None = None) -> int:
    key_ = b"planted" if salt is None else str(salt).encode()
    return int.from_bytes(hashlib.blake2b(piece, digest_size=8, key=key_).digest(), "big")


def _junk(kind: str, piece: bytes, rng: np.random.Generator) -> bytes:
    if kind == "shuffled":
        return rng.permutation(np.frombuffer(piece, np.uint8)).tobytes()
    if kind == "uniform":
        return rng.integers(FIRST, LAST + 1, len(piece), dtype=np.uint8).tobytes()
    at = int(rng.integers(max(1, len(piece) - PHRASE)))
    return (piece[at : at + PHRASE] * len(piece))[: len(piece)]
