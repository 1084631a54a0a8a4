"""Synthetic sources, whose lowest possible loss is known in closed form.

They give token ids and not text, so they have no tokenizer, no EOS and no documents to split. The validation stream has
the same distribution as the train stream and another random stream. `entropy_rate_nats` is the lowest possible expected
cross-entropy per token of a model that sees all earlier tokens; `entropies_by_context_nats` gives that of a model that
sees a window of them. The loss on a finite validation set scatters around it.
"""

import math
from dataclasses import dataclass

import numpy as np

from scaling_testbed.data.shard_writer import ShardWriter
from scaling_testbed.data.shards import SPLITS
from scaling_testbed.data.sources.source import Job, Source, token_record
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.keys import key

MAX_VOCABULARY, MAX_TOKENS = 1 << 24, 1 << 32  # a stream is made in memory, in 8 bytes for each token and more
STREAMS = {"table": 0, "train": 1, "validation": 2}


def check_range(field: str, value, low, high=math.inf) -> None:
    """Raise ConfigError unless `value` lies between `low` and `high`, both included."""
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{field} must be {limit}, got {value}")


@dataclass(frozen=True, kw_only=True)
class GeneratedSource(Source):
    """The base of the sources whose tokens a program makes."""

    name: str = "generated"
    seed: int = key(0, "The seed of the source. It is not the seed of the run.")

    knows_entropy = True

    @property
    def vocab_size(self) -> int:
        """The number of symbols."""
        raise NotImplementedError

    def without_documents(self) -> list[str]:
        return [self.kind]

    def __post_init__(self):
        check_range("seed", self.seed, 0)

    def inputs(self) -> dict[str, list[str]]:
        return {}

    def prepare(self, job: Job) -> dict:
        splits = {}
        for split in SPLITS:
            try:
                tokens = self.tokens(split)
                mask = self.mask(split) if self.masked else None
            except MemoryError:
                raise UserError(
                    f"data={self.name}: the tokens of {split} do not fit into memory; ask for fewer of them"
                ) from None
            writer = ShardWriter(job.work, f"{split}-00000", self.vocab_size, masked=self.masked)
            writer.write(tokens, self.name, mask)
            if split == "train":
                counts = np.bincount(tokens if mask is None else tokens[mask], minlength=self.vocab_size)
            splits[split] = writer.record(**token_record(len(tokens), self.n_documents(len(tokens))))
        rate, by_context = self.entropy_rate_nats(), self.entropies_by_context_nats()
        return self.manifest(splits, counts, entropy_rate_nats=rate, entropies_by_context_nats=by_context)

    def random(self, stream: str) -> np.random.Generator:
        """An independent random stream: `table`, `train` or `validation`."""
        return np.random.default_rng([self.seed, STREAMS[stream]])

    def entropy_rate_nats(self) -> float:
        """The exact entropy per token of an endless stream, in nats."""
        raise NotImplementedError

    def entropies_by_context_nats(self) -> list[float] | None:
        """The exact entropy of a token after 0, 1, ... known tokens, in nats; the last number holds for all longer
        contexts. None: not known in closed form."""
        return None

    def tokens(self, split: str) -> np.ndarray:
        """The whole stream of a split, int64 [n_tokens]."""
        raise NotImplementedError

    def mask(self, split: str) -> np.ndarray:
        """Whether each token of `tokens(split)` is a target, bool [n_tokens]. It is asked of a `masked` source."""
        return np.ones(len(self.tokens(split)), dtype=bool)

    def n_documents(self, n_tokens: int) -> int:
        """The number of documents that the manifest records for a stream."""
        return 1


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(GeneratedSource):
    """The base of the sources of so many symbols and tokens."""

    name: str = "synthetic"
    vocab_size: int = key(32, "The number of symbols.")  # in place of the property
    n_tokens: int = key(4_000_000, "Tokens of the train split.")
    n_validation_tokens: int = key(200_000, "Tokens of the validation split.")

    def __post_init__(self):
        super().__post_init__()
        check_range("vocab_size", self.vocab_size, 2, MAX_VOCABULARY)
        check_range("n_tokens", self.n_tokens, 1, MAX_TOKENS)
        check_range("n_validation_tokens", self.n_validation_tokens, 1, MAX_TOKENS)

    def _length(self, split: str) -> int:
        return self.n_tokens if split == "train" else self.n_validation_tokens
