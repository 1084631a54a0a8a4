"""Named numbers that are gathered over batches and processes, each in its own way."""

import math
from collections.abc import Callable

import torch

MEAN, RMS, LARGEST, SMALLEST = "mean", "rms", "largest", "smallest"


class Reductions:
    """Gathers values by name, each over equally many elements; a name is always gathered in one way.

    mean: of means. rms: the root of the mean of mean squares. largest, smallest: of extremes. Values stay tensors on
    their device until `result`.
    """

    def __init__(self):
        self._ways: dict[str, str] = {}
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, way: str, value: torch.Tensor) -> None:
        """A scalar; for rms, a mean square."""
        self._ways[name] = way
        self._values.setdefault(name, []).append(value.detach().float())

    def result(self, sum_over_ranks: Callable, max_over_ranks: Callable, n_ranks: int) -> dict[str, float]:
        """The numbers, over what was added on all ranks; every rank has added under the same names. The two functions
        take and return a list of numbers."""
        names = list(self._values)
        if not names:
            return {}
        stacked = torch.stack([self._over_batches(name) for name in names]).tolist()
        signed = [-x if self._ways[name] == SMALLEST else x for name, x in zip(names, stacked, strict=True)]
        extremes = max_over_ranks(signed)
        means = [total / n_ranks for total in sum_over_ranks(signed)]
        return {
            name: self._finish(self._ways[name], mean, extreme)
            for name, mean, extreme in zip(names, means, extremes, strict=True)
        }

    def _over_batches(self, name: str) -> torch.Tensor:
        values = torch.stack(self._values[name])
        return {LARGEST: values.amax, SMALLEST: values.amin}.get(self._ways[name], values.mean)()

    @staticmethod
    def _finish(way: str, mean: float, extreme: float) -> float:
        return {MEAN: mean, RMS: math.sqrt(max(mean, 0.0)) if mean == mean else mean}.get(
            way, -extreme if way == SMALLEST else extreme
        )
