"""A synthetic source of independent symbols."""

import math
from dataclasses import dataclass

import numpy as np

from scaling_testbed.data.sources.source import SOURCES
from scaling_testbed.data.sources.synthetic import SyntheticSource, check_range
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import check_choices, key


@SOURCES.register("noise")
@dataclass(frozen=True, kw_only=True)
class NoiseConfig(SyntheticSource):
    """Independent symbols."""

    name: str = "noise"
    vocab_size: int = 256
    distribution: str = key(
        "uniform",
        "The distribution of a symbol. zipf: the probability of symbol i is proportional to (i + 1) ** -exponent. "
        "explicit: `probabilities`.",
        choices=("uniform", "zipf", "explicit"),
    )
    exponent: float = key(1.0, "The exponent of zipf.")
    probabilities: list[float] | None = key(None, "One number per symbol, for explicit. They need not sum to one.")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        most = math.floor(600 / math.log(self.vocab_size))  # so that no probability leaves the range of a float
        check_range("exponent", self.exponent, -most, most)
        if (self.probabilities is not None) != (self.distribution == "explicit"):
            raise ConfigError("probabilities must be set with distribution=explicit, and only then")
        if self.probabilities is not None:
            total = sum(self.probabilities)
            if len(self.probabilities) != self.vocab_size or min(self.probabilities) < 0 or not 0 < total < math.inf:
                raise ConfigError(
                    f"probabilities must be {self.vocab_size} numbers, none negative, finite, not all zero, got "
                    f"{len(self.probabilities)} with sum {total}"
                )

    def symbol_probabilities(self) -> np.ndarray:
        """The probability of each symbol [vocab_size]."""
        if self.distribution == "explicit":
            weights = np.array(self.probabilities, dtype=np.float64)
        elif self.distribution == "zipf":
            weights = np.arange(1, self.vocab_size + 1, dtype=np.float64) ** -self.exponent
        else:
            weights = np.ones(self.vocab_size)
        return weights / weights.sum()

    def entropy_rate_nats(self) -> float:
        """H = -sum p ln p over the symbols that occur."""
        share = self.symbol_probabilities()
        share = share[share > 0]
        return float(-(share * np.log(share)).sum())

    def entropies_by_context_nats(self) -> list[float]:
        return [self.entropy_rate_nats()]

    def tokens(self, split: str) -> np.ndarray:
        cumulative = np.cumsum(self.symbol_probabilities())
        draws = self.random(split).random(self._length(split)) * cumulative[-1]
        symbols = np.searchsorted(cumulative, draws, side="right")
        return np.minimum(symbols, self.vocab_size - 1)  # the product above may round up to the last cumulative value
