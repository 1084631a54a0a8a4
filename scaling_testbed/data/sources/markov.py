"""A synthetic source whose symbols depend on the last few symbols."""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from scaling_testbed.data.sources.source import SOURCES
from scaling_testbed.data.sources.synthetic import SyntheticSource, check_range
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import key

MAX_TABLE = 1 << 22  # entries of a transition table


@SOURCES.register("markov")
@dataclass(frozen=True, kw_only=True)
class MarkovConfig(SyntheticSource):
    """A Markov source. A random table gives the distribution of the next symbol; its entropy rate is known."""

    name: str = "markov"
    order: int = key(2, "How many past symbols the next one depends on.")
    concentration: float = key(
        0.3,
        "Rows of the table are drawn from a Dirichlet distribution with this concentration. Small: nearly "
        "deterministic. Large: nearly uniform.",
    )

    def __post_init__(self):
        super().__post_init__()
        check_range("order", self.order, 1, 8)
        if not self.concentration >= 0.01:
            raise ConfigError(f"concentration must be at least 0.01, got {self.concentration}")
        if self.vocab_size ** (self.order + 1) > MAX_TABLE:
            raise ConfigError(
                f"order must be small enough that vocab_size ** (order + 1) is at most {MAX_TABLE}, got order "
                f"{self.order} with vocab_size {self.vocab_size}"
            )

    def table(self) -> np.ndarray:
        """Transition probabilities [vocab_size ** order, vocab_size].

        The row number of a context is the number whose digits are its symbols, the oldest first. A floor of 1e-6 makes
        every context reachable, so that there is one stationary distribution.
        """
        shape = (self.vocab_size**self.order, self.vocab_size)
        table = self.random("table").standard_gamma(self.concentration, size=shape) + 1e-300
        table = table / table.sum(axis=1, keepdims=True) + 1e-6
        return table / table.sum(axis=1, keepdims=True)

    def stationary(self, table: np.ndarray) -> np.ndarray:
        """The stationary distribution over contexts [vocab_size ** order], by power iteration to rounding error."""
        share = np.full(len(table), 1.0 / len(table))
        for _ in range(1_000_000):
            joint = (share[:, None] * table).reshape(self.vocab_size, -1)
            after = joint.sum(axis=0)  # sum over the oldest symbol; the remaining symbols are the next context
            moved = np.abs(after - share).sum()
            share = after / after.sum()
            if moved < 1e-14:
                return share
        raise ConfigError(f"concentration must be larger for the chain to mix, got {self.concentration}")

    def entropy_rate_nats(self) -> float:
        """H = -sum_c pi(c) sum_s P(s|c) ln P(s|c) (Cover and Thomas, Elements of Information Theory, eq. 4.27)."""
        table = self.table()
        return float(-(self.stationary(table) * (table * np.log(table)).sum(axis=1)).sum())

    def entropies_by_context_nats(self) -> list[float]:
        """H(X_(j+1) | X_1 ... X_j) = H(X_1 ... X_(j+1)) - H(X_1 ... X_j) for j below the order, then the rate."""
        share = self.stationary(self.table())
        blocks = [0.0]
        for length in range(1, self.order + 1):
            p = share.reshape(self.vocab_size**length, -1).sum(axis=1)
            blocks.append(float(-(p[p > 0] * np.log(p[p > 0])).sum()))
        return [*np.diff(blocks).tolist(), self.entropy_rate_nats()]

    def tokens(self, split: str) -> np.ndarray:
        """One continuous chain, int64, which starts from the stationary distribution.

        A chain cannot be vectorised over time, so this is a plain loop over uniform numbers drawn beforehand. It makes
        some millions of tokens per second.
        """
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
