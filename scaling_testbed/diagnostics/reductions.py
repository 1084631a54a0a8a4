"""Named numbers that are reduced over batches and processes, each by its own kind of reduction."""

import math
from collections.abc import Callable

import torch

MEAN, RMS, LARGEST, SMALLEST = "mean", "rms", "largest", "smallest"


class Reductions:
    """Gathers values by name. All values of a name have the same way (kind of reduction).

    mean: the weighted mean of means. rms: the root of the weighted mean of mean squares. largest, smallest: the extreme
    of extremes. `weight` is the number of equal parts (sequences) behind the values that are added next. With weight
    zero, values are ignored. Values stay tensors on their device until `result`.
    """

    def __init__(self):
        self.weight = 1
        self._ways: dict[str, str] = {}
        self._values: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def add(self, name: str, way: str, value: torch.Tensor) -> None:
        """Add a scalar. way: MEAN, RMS, LARGEST or SMALLEST. For RMS, value is a mean square."""
        self._ways[name] = way
        self._values.setdefault(name, []).append((value.detach().float(), self.weight))

    def result(self, sum_over_ranks: Callable, max_over_ranks: Callable) -> dict[str, float]:
        """Name -> the reduced number over all ranks. Every rank must have added values under the same names.

        The two functions take and return a list of numbers.
        """
        names = list(self._values)
        if not names:
            return {}
        stacked = torch.stack([self._over_batches(name) for name in names]).tolist()
        signed = [-x if self._ways[name] == SMALLEST else x for name, x in zip(names, stacked, strict=True)]
        extremes = max_over_ranks(signed)
        sums = sum_over_ranks([*signed, *(sum(weight for _, weight in self._values[name]) for name in names)])
        totals, weights = sums[: len(names)], sums[len(names) :]
        return {
            name: self._finish(self._ways[name], total / weight, extreme)
            for name, total, weight, extreme in zip(names, totals, weights, extremes, strict=True)
        }

    def _over_batches(self, name: str) -> torch.Tensor:
        """The extreme, or the weighted sum, of the values with a weight above zero."""
        way = self._ways[name]
        kept = [(value, weight) for value, weight in self._values[name] if weight]
        like = self._values[name][0][0]
        if way in (LARGEST, SMALLEST):
            least = torch.full_like(like, -math.inf if way == LARGEST else math.inf)
            values = torch.stack([least, *(value for value, _ in kept)])
            return values.amax() if way == LARGEST else values.amin()
        return torch.stack([torch.zeros_like(like), *(value * weight for value, weight in kept)]).sum()

    @staticmethod
    def _finish(way: str, mean: float, extreme: float) -> float:
        return {MEAN: mean, RMS: math.sqrt(max(mean, 0.0)) if mean == mean else mean}.get(
            way, -extreme if way == SMALLEST else extreme
        )
