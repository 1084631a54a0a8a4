"""How a stream of tokens is cut into sequences, and where the documents in a sequence begin.

The EOS token that ends a document is the first input of the next one. So each document is predicted from an EOS token
on, as `analyze score` and `sample` do it, and its own EOS is its last target. A document of n tokens, with its EOS, has
n targets, and no target lies outside of its document. Where a stream has a mask, only the tokens that it counts are
targets, and a sequence without a target is left out.

Shapes in names: B sequences, T positions, S = T + 1.
"""

import bisect
import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling_testbed.data.shards import TokenStream
from scaling_testbed.errors import ConfigError, UserError

NO_TARGET = -100  # the target of a position that has none
WINDOWS, DOCUMENTS = "windows", "documents"
PACKINGS = (WINDOWS, DOCUMENTS)
READ_TOKENS = 1 << 22  # read at once in search of EOS tokens


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences, as NumPy arrays or as tensors.

    tokens_BS: int64. Columns 0 .. T - 1 are the inputs. targets_BT: int64, NO_TARGET where a position has none; None:
    the targets are columns 1 .. T of the tokens, else column T is not used. begins_BT: int32, for each position the
    position in its sequence at which its document begins; None: documents are not told apart. beside: arrays [B, ...]
    that the objective of a training batch needs, by name.
    """

    tokens_BS: Any
    targets_BT: Any = None
    begins_BT: Any = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        """The arguments of LossModel.forward, without `beside`."""
        return self.tokens_BS, self.targets_BT, self.begins_BT

    @property
    def arrays(self) -> list[Any]:
        """All arrays that are there, in an order that their names decide."""
        return [x for x in self.tensors if x is not None] + [self.beside[name] for name in sorted(self.beside)]

    def map(self, function: Callable[[Any], Any]) -> "Batch":
        """The batch of the results of `function` for each array that is there."""
        tokens_BS, *others = (None if x is None else function(x) for x in self.tensors)
        beside = {name: function(x) for name, x in self.beside.items()}
        return Batch(tokens_BS=tokens_BS, targets_BT=others[0], begins_BT=others[1], beside=beside)

    def explicit(self) -> "Batch":
        """The same batch, with targets_BT in any case."""
        if self.targets_BT is not None:
            return self
        return dataclasses.replace(self, targets_BT=self.tokens_BS[:, 1:])

    def n_targets(self, chosen_B: np.ndarray) -> int:
        """How many targets the sequences at which chosen_B is true have. The batch is of NumPy arrays."""
        if self.targets_BT is None:
            return int(chosen_B.sum()) * (self.tokens_BS.shape[1] - 1)
        return int((self.targets_BT[chosen_B] != NO_TARGET).sum())

    def split(self, rows: int) -> list["Batch"]:
        """Batches of `rows` sequences each; the last may have fewer."""
        firsts = range(0, len(self.tokens_BS), rows)
        return [self.map(operator.itemgetter(slice(first, first + rows))) for first in firsts]


class Windows:
    """The windows of T + 1 tokens at stride T, cut anywhere in a document. The last token of a window is the first of
    the next, so that each token is predicted once.

    number: how many there are. each_tokens, each_targets: of each of them, one number where all have as many; tokens
    are positions without padding. masking: whether batches say where documents begin.
    """

    def __init__(self, stream: TokenStream, length: int, *, masking: bool = False):
        self.stream, self.length, self.masking = stream, length, masking
        self.number = max(0, (stream.n_tokens - 1) // length)
        self.each_tokens: Each = length
        self.each_targets: Each = length
        self._kept: np.ndarray | None = None
        self._n_windows = self.number
        if stream.is_masked:
            of_each = np.diff(counted_before(stream, np.arange(self.number + 1) * length + 1))
            self._kept = np.flatnonzero(of_each)
            self.number, self.each_targets = len(self._kept), _each(of_each[self._kept])

    def windows(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of these sequences among all windows, those without a target included."""
        return numbers if self._kept is None else self._kept[numbers]

    def batch(self, numbers: np.ndarray) -> Batch:
        """The sequences with these numbers, in their order."""
        starts = self.windows(numbers) * self.length
        tokens_BS, targets_BT = self.stream.gather(starts, self.length + 1), None
        if self.stream.is_masked:
            targets_BT = np.where(self.stream.gather_counted(starts + 1, self.length), tokens_BS[:, 1:], NO_TARGET)
        begins_BT = self._begins(tokens_BS[:, :-1]) if self.masking else None
        return Batch(tokens_BS=tokens_BS, targets_BT=targets_BT, begins_BT=begins_BT)

    def remark(self) -> str | None:
        """What to say of the sequences at the start of a run, if there is anything."""
        if not self.stream.is_masked:
            return None
        return f"{self.stream.label}: {_share_of_targets(self, self._n_windows)}"

    def _begins(self, inputs_BT: np.ndarray) -> np.ndarray:
        position_T = np.arange(self.length, dtype=np.int32)
        return np.maximum.accumulate(np.where(inputs_BT == self.stream.eos_id, position_T, np.int32(0)), axis=1)


class Packed:
    """Whole documents, packed into sequences of T positions by best fit.

    A document of more than T tokens is split into pieces of T and a rest. A piece of T is a sequence. All others are
    taken in the order of their length, the longest first, and each joins the sequence with the least room in which it
    fits, or begins a new one (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830, section 3). The sequences are
    numbered in the order in which their first document stands in the stream. They depend on the lengths of the
    documents and on T alone. Positions that no piece fills are padding: EOS tokens without targets, as a document of
    their own. A rest has the last token of the piece before as its first input.

    number, each_tokens, each_targets, masking: as of Windows. n_documents: of the stream. n_split: those that are
    split.
    """

    def __init__(self, stream: TokenStream, length: int, *, masking: bool = False):
        self.stream, self.length, self.masking = stream, length, masking
        ends = document_ends(stream)
        starts = np.concatenate([[0], ends[:-1]])
        sizes = ends - starts
        self.n_documents, self.n_split = len(ends), int((sizes > length).sum())
        self._starts, self._sizes = _pieces(starts, sizes, length)
        of_piece = _sequences(self._sizes, length)
        self._pieces = np.argsort(of_piece, kind="stable")  # within a sequence in the order of the stream
        self._firsts = np.searchsorted(of_piece[self._pieces], np.arange(of_piece.max() + 2))
        tokens = np.bincount(of_piece, weights=self._sizes).astype(np.int64)
        targets, self._n_sequences = tokens, len(tokens)
        self._kept: np.ndarray | None = None
        if stream.is_masked:  # the pieces lie one after the other
            counted = np.diff(counted_before(stream, np.append(self._starts, stream.n_tokens)))
            targets = np.bincount(of_piece, weights=counted).astype(np.int64)
            self._kept = np.flatnonzero(targets)
            tokens, targets = tokens[self._kept], targets[self._kept]
        self.number, self.each_tokens, self.each_targets = len(tokens), _each(tokens), _each(targets)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The sequences with these numbers, in their order."""
        numbers = numbers if self._kept is None else self._kept[numbers]
        tokens_BS = np.full((len(numbers), self.length + 1), self.stream.eos_id, dtype=np.int64)
        targets_BT = np.full((len(numbers), self.length), NO_TARGET, dtype=np.int64)
        begins_BT = np.empty((len(numbers), self.length), dtype=np.int32)
        for row, number in enumerate(numbers.tolist()):
            at = 0
            for piece in self._pieces[self._firsts[number] : self._firsts[number + 1]].tolist():
                start, size = int(self._starts[piece]), int(self._sizes[piece])
                tokens = np.asarray(self.stream.read(start, size), dtype=np.int64)
                if start:  # before the first document stands no EOS, and the array has one there
                    tokens_BS[row, at] = self.stream.read(start - 1, 1)[0]
                tokens_BS[row, at + 1 : at + size] = tokens[:-1]
                if self.stream.is_masked:
                    tokens = np.where(self.stream.counted(start, size), tokens, NO_TARGET)
                targets_BT[row, at : at + size] = tokens
                begins_BT[row, at : at + size] = at
                at += size
            begins_BT[row, at:] = at
        return Batch(tokens_BS=tokens_BS, targets_BT=targets_BT, begins_BT=begins_BT if self.masking else None)

    def remark(self) -> str:
        """What to say of the sequences at the start of a run."""
        padding = 1 - of_all(self.each_tokens, self.number) / max(1, self.number * self.length)
        split = f", {self.n_split:,} of them split" if self.n_split else ""
        masked = f"; {_share_of_targets(self, self._n_sequences)}" if self.stream.is_masked else ""
        return (
            f"{self.stream.label}: {self.n_documents:,} documents{split}, in {self.number:,} sequences, of which "
            f"{padding:.2%} is padding{masked}"
        )


Cut = Windows | Packed
Each = int | np.ndarray  # a number of each sequence: one for all where they have the same


def of_each(each: Each, numbers: np.ndarray) -> np.ndarray:
    """The numbers of the sequences with these `numbers`."""
    return np.full(len(numbers), each) if isinstance(each, int) else each[numbers]


def of_all(each: Each, number: int) -> int:
    """The sum over all `number` sequences."""
    return each * number if isinstance(each, int) else int(each.sum())


def _each(found: np.ndarray) -> Each:
    """The same as one number if all are alike."""
    return int(found[0]) if len(found) and found.min() == found.max() else found


def _share_of_targets(cut: Cut, there: int) -> str:
    """What a mask leaves, where `there` sequences were cut."""
    targets, tokens = of_all(cut.each_targets, cut.number), of_all(cut.each_tokens, cut.number)
    left_out = there - cut.number
    without = f"; {left_out:,} sequences without a target are left out" if left_out else ""
    return f"{targets:,} of {tokens:,} tokens are targets{without}"


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How streams are cut: the keys of the same names in `batch`."""

    packing: str = WINDOWS
    document_masking: bool = False

    def of(self, stream: TokenStream, length: int) -> Cut:
        """The sequences of `length` positions of a stream. Raises ConfigError if documents must be known, and the
        stream has no EOS token."""
        if stream.eos_id is None and self.needs_documents:
            raise ConfigError(
                f"{self} needs the ends of documents, and {stream.label} has no EOS token (for "
                "token files give it as data.eos_id); use batch.document_masking=false and batch.packing=windows"
            )
        kind = Packed if self.packing == DOCUMENTS else Windows
        return kind(stream, length, masking=self.document_masking)

    @property
    def needs_documents(self) -> bool:
        """Whether the documents of a stream must be known."""
        return self.document_masking or self.packing == DOCUMENTS

    @property
    def settings(self) -> str:
        """Both keys with their values."""
        return f"batch.packing={self.packing}, batch.document_masking={str(self.document_masking).lower()}"

    def __str__(self) -> str:
        return f"batch.packing={DOCUMENTS}" if self.packing == DOCUMENTS else "batch.document_masking=true"


def document_ends(stream: TokenStream) -> np.ndarray:
    """The place after the EOS token of each document, in rising order, int64. A last document without EOS ends with the
    stream. Reads the whole stream. Raises UserError if it has no EOS token."""
    found = []
    for start in range(0, stream.n_tokens, READ_TOKENS):
        tokens = stream.read(start, min(READ_TOKENS, stream.n_tokens - start))
        found.append(np.flatnonzero(tokens == stream.eos_id) + (start + 1))
    ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    if not len(ends):
        raise UserError(
            f"{stream.label}: none of its {stream.n_tokens:,} tokens is the EOS token {stream.eos_id}, so its "
            "documents are not known; use batch.packing=windows"
        )
    return ends if ends[-1] == stream.n_tokens else np.append(ends, stream.n_tokens)


def counted_before(stream: TokenStream, places: np.ndarray) -> np.ndarray:
    """How many tokens before each of the `places`, which rise, count as targets, int64. Reads the whole mask."""
    found = np.empty(len(places), dtype=np.int64)
    before = 0
    for start in range(0, stream.n_tokens, READ_TOKENS):
        counted = stream.counted(start, min(READ_TOKENS, stream.n_tokens - start))
        sums = before + np.concatenate([[0], np.cumsum(counted)])
        first, last = np.searchsorted(places, [start, start + len(counted)], side="left")
        found[first:last] = sums[places[first:last] - start]
        before = int(sums[-1])
    found[np.searchsorted(places, stream.n_tokens) :] = before
    return found


def _pieces(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of the pieces of at most `length` tokens, in the order of the stream."""
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    of_piece = np.minimum(length, sizes[document] - place * length)
    return starts[document] + place * length, of_piece.astype(np.int32)


def _sequences(sizes: np.ndarray, length: int) -> np.ndarray:
    """The number of the sequence of each piece, by best fit."""
    by_size = np.argsort(-sizes, kind="stable")
    chosen = best_fit(sizes[by_size], length)
    of_piece = np.empty(len(sizes), dtype=np.int64)
    of_piece[by_size] = chosen
    _, first, inverse = np.unique(of_piece, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]  # numbered by their first piece


def best_fit(falling: np.ndarray, room: int) -> np.ndarray:
    """The number of the bin of each size, where bins have `room` and the sizes fall: each goes into the bin with the
    least room left in which it fits, of several the one that came to it first, else into a new bin.

    Sizes and bins that are equal are taken together, so the time grows with the number of different ones.
    """
    chosen = np.empty(len(falling), dtype=np.int64)
    left: dict[int, list[np.ndarray]] = {}  # room -> the bins that have it
    rooms: list[int] = []  # the keys of `left`, in rising order
    n_bins = 0

    def put(bins: np.ndarray, there: int) -> None:
        if there and len(bins):
            if there not in left:
                bisect.insort(rooms, there)
            left.setdefault(there, []).append(bins)

    begins = np.flatnonzero(np.concatenate([[True], falling[1:] != falling[:-1]])).tolist()
    for at, end in zip(begins, [*begins[1:], len(falling)], strict=True):
        size = int(falling[at])
        while at < end:
            place = bisect.bisect_left(rooms, size)
            there = rooms[place] if place < len(rooms) else room
            in_each = there // size
            needed = -(-(end - at) // in_each)
            if place < len(rooms):
                rooms.pop(place)
                bins = np.concatenate(left.pop(there))
                put(bins[needed:], there)
                bins = bins[:needed]
            else:
                bins = np.arange(n_bins, n_bins + needed)
                n_bins += needed
            count = min(end - at, len(bins) * in_each)
            chosen[at : at + count] = np.repeat(bins, in_each)[:count]
            in_last = count - (len(bins) - 1) * in_each
            put(bins[:-1], there - in_each * size)
            put(bins[-1:], there - in_last * size)
            at += count
    return chosen
