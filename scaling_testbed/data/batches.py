"""Batches as a pure function of (seed, step). They have no state, and do not depend on the number of ranks or restarts.

A stream of n tokens holds (n - 1) // T windows of T + 1 tokens at stride T. The last token of a window is the first
token of the next, so that each token is predicted once per epoch. The windows of all epochs form one endless sequence,
and batch `step` takes the next `sequences` windows of it. Within an epoch their order is a keyed permutation, which is
computed only for the requested windows.

A mixture has a sequence for each of its sources, and each row of a batch is the next window of one of them
(interleaving.py).
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from scaling_testbed.data.interleaving import Interleaving
from scaling_testbed.data.shards import TokenStream
from scaling_testbed.errors import ConfigError, UserError

ONLY = ""  # the name of a source that is no part of a mixture
ROUNDS = 8
BLOCK = 4096  # places whose windows are computed together, because many small computations cost more than one


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `positions` (in [0, n)) under a pseudo-random permutation of [0, n) keyed by (seed, epoch).

    The permutation is a Feistel network over Z_a x Z_b, with a x b at least n and little more, whose rounds add to the
    two halves in turn. The few images at n or above are mapped again until they are below n (cycle walking; Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(seed, epoch)
    image = np.asarray(positions, dtype=np.uint64).copy()
    outside = np.ones(len(image), dtype=bool)
    while outside.any():
        left, right = np.divmod(image[outside], np.uint64(b))
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + _mix(right + key) % np.uint64(a)) % np.uint64(a)
            else:
                right = (right + _mix(left + key) % np.uint64(b)) % np.uint64(b)
        image[outside] = left * np.uint64(b) + right
        outside = image >= n
    return image.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _block(n: int, seed: int, epoch: int, number: int) -> np.ndarray:
    """The images of the places of one block. It is shared, and must not be changed."""
    return permute(np.arange(number * BLOCK, min((number + 1) * BLOCK, n)), n, seed, epoch)


class Windows:
    """The shuffled windows of all epochs of a stream, as one endless sequence."""

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int):
        self.stream, self.sequence_length, self.seed = stream, sequence_length, seed
        self.number = max(0, (stream.n_tokens - 1) // sequence_length)

    def check(self, needed: int) -> None:
        """Raise UserError if an epoch has fewer than `needed` windows, so that a batch would have one twice."""
        if self.number < needed:
            raise UserError(
                f"{self.stream.label}: {self.stream.n_tokens} tokens give {self.number} sequences of "
                f"{self.sequence_length}, too few for one training batch of {needed}; use more data, a smaller batch "
                "or shorter sequences"
            )

    def tokens(self, first: int, count: int) -> np.ndarray:
        """The tokens at places [first, first + count), int64 [count, T + 1]."""
        return self.stream.gather(self._at(first, count) * self.sequence_length, self.sequence_length + 1)

    def _at(self, first: int, count: int) -> np.ndarray:
        """The window numbers at these places, across epochs."""
        parts = []
        while count:
            epoch, place = divmod(first, self.number)
            here = min(count, self.number - place)
            here = min(here, BLOCK - place % BLOCK)
            parts.append(_block(self.number, self.seed, epoch, place // BLOCK)[place % BLOCK :][:here])
            first, count = first + here, count - here
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TrainingBatches:
    """Shuffled windows of one stream, or of several in the shares of a mixture.

    streams: one, or those of the sources by name. weights: of the sources by step, as `Interleaving` takes them; needed
    with several streams. sequences: the global batch, over all ranks and micro-batches. skipped: the ranges [a, b) of
    steps whose batches are left out, as pairs of numbers in one list (data.skip_steps). Raises UserError if a stream is
    too short for its rows of one batch.
    """

    def __init__(
        self,
        streams: TokenStream | Mapping[str, TokenStream],
        *,
        sequence_length: int,
        sequences: int,
        seed: int,
        skipped: Sequence[int] = (),
        weights: Sequence[tuple[int, Mapping[str, float]]] = (),
    ):
        self._skipped = list(zip(skipped[::2], skipped[1::2], strict=True))
        self.sequence_length, self.sequences = sequence_length, sequences
        named = streams if isinstance(streams, Mapping) else {ONLY: streams}
        self.is_mixture = ONLY not in named
        self._windows = {name: Windows(stream, sequence_length, seed) for name, stream in named.items()}
        self._interleaving = Interleaving(weights or [(0, dict.fromkeys(named, 1.0))], sequences)
        for name, windows in self._windows.items():
            largest = max(there.get(name, 0) / sum(there.values()) for _, there in weights) if weights else 1
            windows.check(max(1, math.ceil(largest * sequences - 1e-6)))
        self.n_windows = sum(windows.number for windows in self._windows.values())

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Tokens of the rank's contiguous slice of batch `step` (from 0), int64 [sequences / world_size, T + 1].

        Columns 0..T-1 are the inputs and columns 1..T the targets. Raises ConfigError if the ranks cannot have equal
        slices.
        """
        if self.sequences % world_size:
            raise ConfigError(f"a batch of {self.sequences} sequences cannot be shared equally by {world_size} ranks")
        rows = self.sequences // world_size
        first = self._moved(step) * self.sequences + rank * rows
        parts = self._interleaving.parted(first, rows)
        if len(parts) == 1:
            ((name, (number, _)),) = parts.items()
            return self._windows[name].tokens(number, rows)
        tokens_BS = np.empty((rows, self.sequence_length + 1), dtype=np.int64)
        for name, (number, at_N) in parts.items():
            tokens_BS[at_N] = self._windows[name].tokens(number, len(at_N))
        return tokens_BS

    def _moved(self, step: int) -> int:
        """The step of which `step` takes the batch, after those that are left out."""
        for begin, end in self._skipped:
            step += end - begin if step >= begin else 0
        return step

    def epochs(self, steps: int) -> float:
        """The number of epochs in `steps` batches. It may be above 1."""
        return steps * self.sequences / self.n_windows

    def rows_by_source(self, first: int, last: int) -> dict[str, int]:
        """How many rows of the batches of the steps [first, last) come from each source."""
        here, before = self._rows_before(last), self._rows_before(first)
        return {name: here[name] - before[name] for name in here}

    def epochs_by_source(self, first: int, last: int) -> dict[str, float]:
        """The number of epochs of each source in the batches of the steps [first, last)."""
        rows = self.rows_by_source(first, last)
        return {name: rows[name] / self._windows[name].number for name in rows}

    def _rows_before(self, step: int) -> dict[str, int]:
        end = self._moved(step - 1) + 1 if step else 0
        counts = self._interleaving.counts
        rows = counts(end * self.sequences)
        for begin, after in self._skipped:
            if after <= end:
                left_out, before = counts(after * self.sequences), counts(begin * self.sequences)
                rows = {name: rows[name] - left_out[name] + before[name] for name in rows}
        return rows


class ValidationBatches:
    """Windows spread evenly over a stream, so that each part of a mixture is scored, the same at every evaluation.

    At most `max_tokens` tokens are predicted (None: all). Iteration yields int64 [<= rows, T + 1]; only the last batch
    may have fewer rows.
    """

    def __init__(self, stream: TokenStream, *, sequence_length: int, max_tokens: int | None, rows: int):
        self.stream, self.sequence_length, self.rows = stream, sequence_length, rows
        available = max(0, (stream.n_tokens - 1) // sequence_length)
        wanted = available if max_tokens is None else max(1, max_tokens // sequence_length)
        self.n_windows, self._available = min(available, wanted), available
        self.n_tokens = self.n_windows * sequence_length
        if not self.n_windows:
            raise UserError(
                f"{stream.label}: {stream.n_tokens} tokens are too few for one validation batch of {sequence_length} "
                "tokens; use more data, a larger data.validation_fraction or shorter sequences"
            )

    def __len__(self) -> int:
        return -(-self.n_windows // self.rows)

    def batch(self, number: int) -> np.ndarray:
        """Batch `number` of the iteration."""
        first = number * self.rows
        windows = np.arange(first, min(first + self.rows, self.n_windows)) * self._available // self.n_windows
        return self.stream.gather(windows * self.sequence_length, self.sequence_length + 1)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.batch, range(len(self)))
