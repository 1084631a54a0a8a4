"""Batches as a pure function of (seed, step). They have no state, and do not depend on the number of ranks or restarts.

A stream is cut into sequences of T positions (cutting.py), in which each token is predicted once per epoch. Those of
all epochs form one endless sequence, and batch `step` takes the next `sequences` of it. Within an epoch their order is
a keyed permutation, which is computed only for the requested ones.

A mixture has a sequence for each of its sources, and each row of a batch is the next window of one of them
(interleaving.py).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from scaling_testbed.data.cutting import Batch, Cut, Cutting, Each, Windows, of_all, of_each
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


class Beside(Protocol):
    """What an objective needs beside the tokens of a training batch. Like them it is addressed by source and number of
    a sequence, and has no state."""

    def of(self, source: str, numbers: np.ndarray) -> Mapping[str, np.ndarray]:
        """Arrays by name, each [N, ...], for the N sequences of a source with these numbers; the same names, types and
        shapes for every source. source: its name in a mixture, else ONLY."""


class Shuffled:
    """The shuffled sequences of all epochs of a stream, as one endless sequence of them. name: of the source. beside:
    what its batches have beside the tokens. tokens, targets: how many of them the sequences have; tokens are positions
    without padding."""

    def __init__(self, cut: Cut, seed: int, name: str = ONLY):
        self.cut, self.seed, self.number = cut, seed, cut.number
        self.name = name
        self.beside: Beside | None = None
        self.tokens = _Held(cut.each_tokens, cut.number, seed)
        self.targets = _Held(cut.each_targets, cut.number, seed)

    def check(self, needed: int) -> None:
        """Raise UserError if an epoch has fewer than `needed` sequences, so that a batch would have one twice."""
        if self.number < needed:
            stream = self.cut.stream
            with_targets = " with a target" if stream.is_masked else ""
            raise UserError(
                f"{stream.label}: {stream.n_tokens} tokens give {self.number} sequences of {self.cut.length}"
                f"{with_targets}, too few for one training batch of {needed}; use more data, a smaller batch or "
                "shorter sequences"
            )

    def batch(self, first: int, count: int) -> Batch:
        """The sequences at places [first, first + count)."""
        numbers = _numbers(first, count, self.number, self.seed)
        batch = self.cut.batch(numbers)
        if self.beside is None:
            return batch
        return dataclasses.replace(batch, beside=self.beside.of(self.name, numbers))


class _Held:
    """What the sequences of all epochs hold. each: of each sequence of the stream, of which there are `number`."""

    def __init__(self, each: Each, number: int, seed: int):
        self.each, self.all, self._number, self._seed = each, of_all(each, number), number, seed
        self._before: dict[int, list[int]] = {}  # epoch -> the sums before each of its blocks, as far as they are known

    def between(self, first: int, count: int) -> int:
        """The sum over the sequences at places [first, first + count)."""
        if isinstance(self.each, int):
            return count * self.each
        return int(self.each[_numbers(first, count, self._number, self._seed)].sum()) if count else 0

    def before(self, place: int) -> int:
        """The sum over the sequences before a place."""
        if isinstance(self.each, int):
            return place * self.each
        epoch, place = divmod(place, self._number)
        before, block = self._before.setdefault(epoch, [0]), place // BLOCK
        for number in range(len(before) - 1, block):
            images = permute(np.arange(number * BLOCK, (number + 1) * BLOCK), self._number, self._seed, epoch)
            before.append(before[-1] + int(self.each[images].sum()))
        in_block = self.between(epoch * self._number + block * BLOCK, place % BLOCK)
        return epoch * self.all + before[block] + in_block


def _numbers(first: int, count: int, n: int, seed: int) -> np.ndarray:
    """The numbers of the sequences at places [first, first + count), across epochs of `n` sequences."""
    parts = []
    while count:
        epoch, place = divmod(first, n)
        here = min(count, n - place)
        here = min(here, BLOCK - place % BLOCK)
        parts.append(_block(n, seed, epoch, place // BLOCK)[place % BLOCK :][:here])
        first, count = first + here, count - here
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TrainingBatches:
    """Shuffled sequences of one stream, or of several in the shares of a mixture.

    streams: one, or those of the sources by name. weights: of the sources by step, as `Interleaving` takes them; needed
    with several streams. sequences: the global batch, over all ranks and micro-batches. skipped: the ranges [a, b) of
    steps whose batches are left out, as pairs of numbers in one list (data.skip_steps). largest_share: the largest part
    of the rows that `change` will give a source. cutting: how a stream becomes sequences. Raises UserError if a stream
    is too short for its rows of one batch, and what `cutting` raises.
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
        largest_share: float = 0.0,
        cutting: Cutting = Cutting(),  # noqa: B008 (frozen)
    ):
        self._skipped = list(zip(skipped[::2], skipped[1::2], strict=True))
        self.sequence_length, self.sequences = sequence_length, sequences
        named = streams if isinstance(streams, Mapping) else {ONLY: streams}
        self.is_mixture = ONLY not in named
        self._sources = {
            name: Shuffled(cutting.of(stream, sequence_length), seed, name) for name, stream in named.items()
        }
        self._interleaving = Interleaving(weights or [(0, dict.fromkeys(named, 1.0))], sequences)
        for name, source in self._sources.items():
            largest = max(there.get(name, 0) / sum(there.values()) for _, there in weights) if weights else 1
            source.check(max(1, math.ceil(max(largest, largest_share) * sequences - 1e-6)))
        self.n_sequences = sum(source.number for source in self._sources.values())
        self.n_tokens = sum(source.tokens.all for source in self._sources.values())
        self.is_masked = any(source.cut.stream.is_masked for source in self._sources.values())

    @property
    def cuts(self) -> dict[str, Cut]:
        """The sequences of each source."""
        return {name: source.cut for name, source in self._sources.items()}

    def lay_beside(self, beside: Beside | None) -> None:
        """Let batches have this beside their tokens."""
        for source in self._sources.values():
            source.beside = beside

    def change(self, step: int, weights: Mapping[str, float]) -> None:
        """Let the sources have these weights from batch `step` on, which is after the steps of all earlier changes."""
        self._interleaving.add(self._moved(step), weights)

    @property
    def why_targets_vary(self) -> str | None:
        """Why a batch has another number of targets than the next one; None if all have as many."""
        each = [source.targets.each for source in self._sources.values()]
        if all(isinstance(one, int) for one in each) and len(set(each)) == 1:
            return None
        return "the mask of its data" if self.is_masked else "the padding of its sequences"

    def remarks(self) -> list[str]:
        """What to say of the sequences at the start of a run."""
        return [said for source in self._sources.values() if (said := source.cut.remark())]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rank's contiguous slice of batch `step` (from 0): sequences / world_size sequences.

        Raises ConfigError if the ranks cannot have equal slices.
        """
        if self.sequences % world_size:
            raise ConfigError(f"a batch of {self.sequences} sequences cannot be shared equally by {world_size} ranks")
        rows = self.sequences // world_size
        first = self._moved(step) * self.sequences + rank * rows
        parts = self._interleaving.parted(first, rows)
        of_sources = [(self._sources[name].batch(number, len(at_N)), at_N) for name, (number, at_N) in parts.items()]
        if self.is_masked:  # the rows of a source without a mask too, so that all batches have the same arrays
            of_sources = [(batch.explicit(), at_N) for batch, at_N in of_sources]
        if len(of_sources) == 1:
            return of_sources[0][0]
        whole = of_sources[0][0].map(lambda x: np.empty((rows, *x.shape[1:]), dtype=x.dtype))
        for of_source, at_N in of_sources:
            for array, part in zip(whole.arrays, of_source.arrays, strict=True):
                array[at_N] = part
        return whole

    def targets(self, step: int) -> int:
        """How many targets the global batch `step` has: its positions without padding that a mask counts."""
        parts = self._interleaving.parted(self._moved(step) * self.sequences, self.sequences)
        return sum(self._sources[name].targets.between(number, len(at_N)) for name, (number, at_N) in parts.items())

    def _moved(self, step: int) -> int:
        """The step of which `step` takes the batch, after those that are left out."""
        for begin, end in self._skipped:
            step += end - begin if step >= begin else 0
        return step

    def epochs(self, steps: int) -> float:
        """The number of epochs in `steps` batches. It may be above 1."""
        return steps * self.sequences / self.n_sequences

    def rows_by_source(self, first: int, last: int) -> dict[str, int]:
        """How many rows of the batches of the steps [first, last) come from each source."""
        return self._by_source(first, last, lambda name, rows: rows)

    def tokens_by_source(self, first: int, last: int) -> dict[str, int]:
        """How many tokens, padding left out, the batches of the steps [first, last) have from each source."""
        return self._by_source(first, last, lambda name, rows: self._sources[name].tokens.before(rows))

    def n_targets(self, first: int, last: int) -> int:
        """How many targets the batches of the steps [first, last) have."""
        found = self._by_source(first, last, lambda name, rows: self._sources[name].targets.before(rows))
        return sum(found.values())

    def epochs_by_source(self, first: int, last: int) -> dict[str, float]:
        """The number of epochs of each source in the batches of the steps [first, last)."""
        rows = self.rows_by_source(first, last)
        return {name: rows[name] / self._sources[name].number for name in rows}

    def _by_source(self, first: int, last: int, of: Callable[[str, int], int]) -> dict[str, int]:
        """The growth from step `first` to step `last` of what the rows of each source that were used hold. of: (source,
        n) -> what its first n rows hold, used or not."""
        here, before = self._before(last, of), self._before(first, of)
        return {name: here[name] - before[name] for name in here}

    def _before(self, step: int, of: Callable[[str, int], int]) -> dict[str, int]:
        def counts(step: int) -> dict[str, int]:
            found = self._interleaving.counts(step * self.sequences)
            return {name: of(name, rows) for name, rows in found.items()}

        end = self._moved(step - 1) + 1 if step else 0
        held = counts(end)
        for begin, after in self._skipped:
            if after <= end:
                left_out, before = counts(after), counts(begin)
                held = {name: held[name] - left_out[name] + before[name] for name in held}
        return held


class ValidationBatches:
    """Sequences spread evenly over a stream, so that each part of a mixture is scored, the same at every evaluation.

    At most `max_tokens` positions are in them (None: all of the stream). n_tokens: how many of these have a target.
    Iteration yields batches of `rows` sequences; only the last may have fewer. Raises UserError if the stream is too
    short for one sequence, and what `cutting` raises.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        max_tokens: int | None,
        rows: int,
        cutting: Cutting = Cutting(),  # noqa: B008 (frozen)
    ):
        self.rows, self._cut = rows, cutting.of(stream, sequence_length)
        available = self._cut.number
        wanted = available if max_tokens is None else max(1, max_tokens // sequence_length)
        self.n_sequences = min(available, wanted)
        if not self.n_sequences:
            raise UserError(
                f"{stream.label}: {stream.n_tokens} tokens are too few for one validation batch of {sequence_length} "
                "tokens; use more data, a larger data.validation_fraction or shorter sequences"
            )
        self.n_tokens = int(of_each(self._cut.each_targets, self._numbers(0, self.n_sequences)).sum())

    def __len__(self) -> int:
        return -(-self.n_sequences // self.rows)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the iteration."""
        first = number * self.rows
        return self._cut.batch(self._numbers(first, min(first + self.rows, self.n_sequences)))

    def windows(self, number: int) -> np.ndarray:
        """The numbers of the sequences of batch `number` among all windows of the stream. Raises ConfigError if it is
        cut into documents."""
        if not isinstance(self._cut, Windows):
            raise ConfigError("batch.packing=documents has no windows; use batch.packing=windows")
        first = number * self.rows
        return self._cut.windows(self._numbers(first, min(first + self.rows, self.n_sequences)))

    def _numbers(self, first: int, last: int) -> np.ndarray:
        return np.arange(first, last) * self._cut.number // self.n_sequences

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(len(self)))
