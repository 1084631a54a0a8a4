"""Which source each row of the training batches of a mixture comes from, as a pure function of the row's number.

The sources are the leaves of a binary tree. A node with the share s of its left child gives that child
floor(s r + 1/2) of its first r rows, and the right child the others. So each source's count grows by 0 or 1 from row to
row, the counts of all sources add up to the rows, and no count depends on rows that were made before.

The tree is that of Huffman (1952) over the weights. Then an inner node below the root has at most 2/3 of its parent's
rows, because its sibling is at least as heavy as each of its children. Its count differs from weight times rows by at
most 1/2 + 2/3 of the difference of its parent, thus by less than 3/2, and the count of a source by less than 2 rows. It
is at most 1/2 with two sources, and at most 1 with three.
"""

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class _Node:
    """A fork of the tree. share: the part of its rows that `left` gets."""

    left: "_Node | str"
    right: "_Node | str"
    share: Fraction

    def to_left(self, rows: int) -> int:
        """How many of the first `rows` rows the left child gets."""
        p, q = self.share.numerator, self.share.denominator
        return (2 * p * rows + q) // (2 * q)


def _tree(weights: Mapping[str, float]) -> _Node | str:
    """The tree over the sources with a positive weight. A weight is the decimal number that is written for it."""
    numbered = itertools.count()  # sources of equal weight stay in their order
    exact = {name: Fraction(repr(float(weight))) for name, weight in sorted(weights.items())}
    heap: list[tuple[Fraction, int, _Node | str]] = [(w, next(numbered), name) for name, w in exact.items() if w]
    heapq.heapify(heap)
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, next(numbered), _Node(left, right, heavy / (light + heavy))))
    return heap[0][2]


def _counts(node: _Node | str, rows: int) -> Iterator[tuple[str, int]]:
    if isinstance(node, str):
        yield node, rows
    else:
        to_left = node.to_left(rows)
        yield from _counts(node.left, to_left)
        yield from _counts(node.right, rows - to_left)


def _parted(node: _Node | str, first: int, at_N: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (source, number of its first row, where its rows stand). The node has the rows from number `first` on, and
    they stand at `at_N`."""
    if isinstance(node, str):
        yield node, first, at_N
        return
    to_left = [node.to_left(row) for row in range(first, first + len(at_N) + 1)]
    is_left_N = np.diff(np.array(to_left, dtype=np.int64)) == 1
    yield from _parted(node.left, to_left[0], at_N[is_left_N])
    yield from _parted(node.right, first - to_left[0], at_N[~is_left_N])


class Interleaving:
    """The sources of all rows.

    weights: (step, source -> weight) for each stretch of steps with the same weights, in rising order from step 0 on.
    The weights of a stretch are not negative, and not all 0. sequences: rows of a step.
    """

    def __init__(self, weights: Sequence[tuple[int, Mapping[str, float]]], sequences: int):
        self.names = sorted({name for _, there in weights for name in there})
        self.sequences = sequences
        # The row with which a stretch begins, the counts before it, and its tree.
        self._stretches: list[tuple[int, dict[str, int], _Node | str]] = []
        for step, there in weights:
            self.add(step, there)

    def add(self, step: int, weights: Mapping[str, float]) -> None:
        """Let these weights hold from `step` on, which is after the steps at which others begin."""
        begin = step * self.sequences
        self._stretches.append((begin, self.counts(begin), _tree(weights)))

    def _of(self, row: int) -> tuple[int, dict[str, int], _Node | str]:
        return next(found for found in reversed(self._stretches) if found[0] <= row)

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        found = dict.fromkeys(self.names, 0)
        if self._stretches and rows:
            begin, before, tree = self._of(rows - 1)
            found |= before
            for name, count in _counts(tree, rows - begin):
                found[name] += count
        return found

    def parted(self, first: int, count: int) -> dict[str, tuple[int, np.ndarray]]:
        """Source -> the number of its first row, from 0, and the places in [0, count) of its rows, of the rows
        [first, first + count), which are of one step. Sources without a row are left out."""
        begin, before, tree = self._of(first)
        found = _parted(tree, first - begin, np.arange(count))
        return {name: (before[name] + number, at_N) for name, number, at_N in found if len(at_N)}
