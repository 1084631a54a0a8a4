"""A synthetic source of repeated strings."""

import math
from dataclasses import dataclass

import numpy as np

from scaling_testbed.data.sources.source import SOURCES
from scaling_testbed.data.sources.synthetic import SyntheticSource, check_range
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import key


@SOURCES.register("copy")
@dataclass(frozen=True, kw_only=True)
class CopyConfig(SyntheticSource):
    """Strings of uniform symbols, each followed by a copy of itself, without separators.

    With sequence_length = 2 x length, every training sequence begins at the start of a string.
    """

    name: str = "copy"
    vocab_size: int = 64
    length: int = key(32, "Symbols in a string.")

    def __post_init__(self):
        super().__post_init__()
        check_range("length", self.length, 1)
        shortest = min(self.n_tokens, self.n_validation_tokens)
        if shortest < 2 * self.length:
            raise ConfigError(f"length must be at most half of the smaller split ({shortest}), got {self.length}")

    def entropy_rate_nats(self) -> float:
        """0.5 ln V: half of the tokens are uniform, and the other half are determined."""
        return 0.5 * math.log(self.vocab_size)

    def n_documents(self, n_tokens: int) -> int:
        return n_tokens // (2 * self.length)

    def tokens(self, split: str) -> np.ndarray:
        """The whole stream of a split, int64. Its length is rounded down to a multiple of 2 x length."""
        shape = (self._length(split) // (2 * self.length), self.length)
        strings = self.random(split).integers(self.vocab_size, size=shape)
        return np.concatenate([strings, strings], axis=1).reshape(-1)
