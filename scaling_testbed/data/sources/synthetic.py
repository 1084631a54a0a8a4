"""Sources whose best possible loss is known in closed form.

They give token ids, not text: no tokenizer, no EOS, no documents to split. The validation stream is drawn
from the same distribution with another random stream. `entropy_rate_nats` is the cross-entropy per token that
no model can beat on average; a finite validation set scatters around it.
"""

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass

import numpy as np

from scaling_testbed.errors import ConfigError, check_choice

STREAMS = {"table": 0, "train": 1, "validation": 2}
MAX_TABLE = 1 << 22  # entries of a transition table


def _check_range(field: str, value, low, high=math.inf) -> None:
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{field} must be {limit}, got {value}")


@dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """What the synthetic sources share: sizes of the two splits in tokens, and a seed."""

    name: str = "synthetic"
    vocab_size: int = 32
    n_tokens: int = 4_000_000
    n_validation_tokens: int = 200_000
    seed: int = 0

    def __post_init__(self):
        _check_range("vocab_size", self.vocab_size, 2, 2**31)
        _check_range("n_tokens", self.n_tokens, 1)
        _check_range("n_validation_tokens", self.n_validation_tokens, 1)
        _check_range("seed", self.seed, 0)

    def identity(self) -> dict:
        """Everything that decides the tokens; the tokenizer is not among it."""
        return {"kind": self.kind, **self.description()["fields"]}

    def description(self) -> dict:
        """The record of this source in the manifest."""
        fields = asdict(self)
        del fields["name"]
        return {"kind": self.kind, "fields": fields}

    def random(self, stream: str) -> np.random.Generator:
        """An independent random stream: `table`, `train` or `validation`."""
        return np.random.default_rng([self.seed, STREAMS[stream]])

    def entropy_rate_nats(self) -> float:
        """The exact entropy per token of an endless stream, in nats."""
        raise NotImplementedError

    def tokens(self, split: str) -> np.ndarray:
        """The whole stream of a split, int64 [n_tokens]."""
        raise NotImplementedError

    def n_documents(self, n_tokens: int) -> int:
        """How many documents the manifest counts in a stream."""
        return 1

    def _length(self, split: str) -> int:
        return self.n_tokens if split == "train" else self.n_validation_tokens


@dataclass(frozen=True, kw_only=True)
class MarkovConfig(SyntheticSource):
    """A Markov source: the next symbol depends on the last `order` symbols through a random table whose rows
    are Dirichlet(`concentration`) draws (small: nearly deterministic; large: nearly uniform)."""

    name: str = "markov"
    order: int = 2
    concentration: float = 0.3

    kind = "markov"

    def __post_init__(self):
        super().__post_init__()
        _check_range("order", self.order, 1, 8)
        if not self.concentration >= 0.01:
            raise ConfigError(f"concentration must be at least 0.01, got {self.concentration}")
        if self.vocab_size ** (self.order + 1) > MAX_TABLE:
            raise ConfigError(
                f"order must be small enough that vocab_size ** (order + 1) is at most {MAX_TABLE}, "
                f"got order {self.order} with vocab_size {self.vocab_size}"
            )

    def table(self) -> np.ndarray:
        """Transition probabilities [vocab_size ** order, vocab_size]; a context's row is its symbols read as
        digits, oldest first. A floor of 1e-6 keeps every context reachable, so that one stationary
        distribution exists."""
        shape = (self.vocab_size**self.order, self.vocab_size)
        table = self.random("table").standard_gamma(self.concentration, size=shape) + 1e-300
        table = table / table.sum(axis=1, keepdims=True) + 1e-6
        return table / table.sum(axis=1, keepdims=True)

    def stationary(self, table: np.ndarray) -> np.ndarray:
        """The stationary distribution over contexts [vocab_size ** order], by power iteration to rounding
        error."""
        share = np.full(len(table), 1.0 / len(table))
        for _ in range(1_000_000):
            joint = (share[:, None] * table).reshape(self.vocab_size, -1)
            after = joint.sum(axis=0)  # drop the oldest symbol: what is left is the next context
            moved = np.abs(after - share).sum()
            share = after / after.sum()
            if moved < 1e-14:
                return share
        raise ConfigError(f"concentration must be larger for the chain to mix, got {self.concentration}")

    def entropy_rate_nats(self) -> float:
        """H = -sum_c pi(c) sum_s P(s|c) ln P(s|c) (Cover and Thomas, Elements of Information Theory, eq.
        4.27)."""
        table = self.table()
        return float(-(self.stationary(table) * (table * np.log(table)).sum(axis=1)).sum())

    def tokens(self, split: str) -> np.ndarray:
        """One continuous chain, started from the stationary distribution. A chain cannot be vectorised along
        time, so this is a plain loop over uniforms drawn beforehand: some millions of tokens a second."""
        table, random, length = self.table(), self.random(split), self._length(split)
        context = int(random.choice(len(table), p=self.stationary(table)))
        digits = [context // self.vocab_size**place % self.vocab_size for place in reversed(range(self.order))]
        chain = digits[:length]
        cumulative = np.cumsum(table, axis=1)
        cumulative[:, -1] = 1.0
        rows, n_contexts, vocab_size, append = cumulative.tolist(), len(table), self.vocab_size, chain.append
        while len(chain) < length:
            for draw in random.random(min(1 << 20, length - len(chain))).tolist():
                symbol = bisect_right(rows[context], draw)
                append(symbol)
                context = (context * vocab_size + symbol) % n_contexts
        return np.array(chain, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(SyntheticSource):
    """Independent symbols. `distribution` is uniform, zipf (probability of symbol i proportional to
    (i + 1) ** -exponent) or explicit (`probabilities`, one per symbol)."""

    name: str = "noise"
    vocab_size: int = 256
    distribution: str = "uniform"
    exponent: float = 1.0
    probabilities: list[float] | None = None

    kind = "noise"

    def __post_init__(self):
        super().__post_init__()
        check_choice("distribution", self.distribution, ("uniform", "zipf", "explicit"))
        if (self.probabilities is not None) != (self.distribution == "explicit"):
            raise ConfigError("probabilities must be given with distribution=explicit and only there")
        if self.probabilities is not None:
            total = sum(self.probabilities)
            if len(self.probabilities) != self.vocab_size or min(self.probabilities) < 0 or not total > 0:
                raise ConfigError(
                    f"probabilities must be {self.vocab_size} numbers, none negative, not all zero, "
                    f"got {len(self.probabilities)} with sum {total}"
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

    def tokens(self, split: str) -> np.ndarray:
        cumulative = np.cumsum(self.symbol_probabilities())
        draws = self.random(split).random(self._length(split)) * cumulative[-1]
        symbols = np.searchsorted(cumulative, draws, side="right")
        return np.minimum(symbols, self.vocab_size - 1)  # the product above may round up to the very end


@dataclass(frozen=True, kw_only=True)
class CopyConfig(SyntheticSource):
    """Strings of `length` uniform symbols, each followed by its repetition, packed without separators: with
    sequence_length = 2 x length every training sequence starts where a string starts."""

    name: str = "copy"
    vocab_size: int = 64
    length: int = 32

    kind = "copy"

    def __post_init__(self):
        super().__post_init__()
        _check_range("length", self.length, 1)
        shortest = min(self.n_tokens, self.n_validation_tokens)
        if shortest < 2 * self.length:
            raise ConfigError(f"length must be at most half of the smaller split ({shortest}), got {self.length}")

    def entropy_rate_nats(self) -> float:
        """Half of the tokens are uniform and half are determined: 0.5 ln V."""
        return 0.5 * math.log(self.vocab_size)

    def n_documents(self, n_tokens: int) -> int:
        return n_tokens // (2 * self.length)

    def tokens(self, split: str) -> np.ndarray:
        """Whole documents only: the length is rounded down to a multiple of 2 x length."""
        shape = (self._length(split) // (2 * self.length), self.length)
        strings = self.random(split).integers(self.vocab_size, size=shape)
        return np.concatenate([strings, strings], axis=1).reshape(-1)
