"""When an update is left out because its loss or gradient norm is a spike."""

import statistics
from collections import deque
from collections.abc import Sequence


class SpikeFilter:
    """Says whether an update is made: not if its loss or its gradient norm is above mean + sigmas * std of those of the
    last `window` updates that were made (the skip-step of OLMo 2, arXiv 2501.00656, section 3; in OLMo-core the window
    holds skipped steps too, and low outliers are skipped as well).

    std divides by n - 1. Until half a window is full every update is made. What is skipped leaves no trace here, so a
    level that rises at once and for good is skipped for good; the count shows it.
    """

    def __init__(self, sigmas: float, window: int):
        self.sigmas, self.window = sigmas, window
        self.made: deque[tuple[float, float]] = deque(maxlen=window)  # (loss, gradient norm), the oldest first
        self.skipped = 0

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether either is one. Both are those of the step at hand and finite."""
        if len(self.made) < self.window // 2:
            return False
        losses, grad_norms = zip(*self.made, strict=True)
        return self._above(loss, losses) or self._above(grad_norm, grad_norms)

    def _above(self, x: float, past: Sequence[float]) -> bool:
        return x > statistics.fmean(past) + self.sigmas * statistics.stdev(past)

    def record(self, loss: float, grad_norm: float, *, skipped: bool) -> None:
        """Remember what became of the step at hand."""
        if skipped:
            self.skipped += 1
        else:
            self.made.append((loss, grad_norm))

    def state(self) -> dict:
        """Plain data from which `restore` goes on with the same decisions."""
        return {"made": [list(pair) for pair in self.made], "skipped": self.skipped}

    def restore(self, state: dict) -> None:
        self.made.extend(tuple(pair) for pair in state["made"])
        self.skipped = state["skipped"]
