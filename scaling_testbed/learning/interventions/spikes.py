"""Skip an update if its loss or gradient norm is a spike."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scaling_testbed.learning.interventions.base import INTERVENTIONS, Context, Intervention

if TYPE_CHECKING:
    from scaling_testbed.learning.optimizers import OptimizerConfig
    from scaling_testbed.model.config import ModelConfig


@INTERVENTIONS.register("spikes")
class SpikeFilter(Intervention):
    """Skips an update if its loss or gradient norm is above mean + sigmas * std of the last `window` updates made.

    This is the skip-step of OLMo 2 (arXiv 2501.00656, section 3). In OLMo-core the window contains skipped steps too,
    and low outliers are skipped as well.

    std divides by n - 1. Every update is made until the window is half full. Skipped updates do not enter the window,
    so if the loss or norm rises suddenly and stays high, all later updates are skipped. The count in the row shows it.
    """

    key = "optimizer.skip_spikes_sigmas"

    def __init__(self, sigmas: float, window: int):
        self.sigmas, self.window = sigmas, window
        self.made: deque[tuple[float, float]] = deque(maxlen=window)  # (loss, gradient norm), the oldest first
        self.skipped = 0
        self._at_hand: tuple[float, float] | None = None
        self._refused = False
        self._largest: Callable[[Sequence[float]], list[float]] = list  # over the processes; one process until `attach`

    @classmethod
    def asked_by(cls, optimizer: OptimizerConfig, model: ModelConfig) -> SpikeFilter | None:
        sigmas = optimizer.skip_spikes_sigmas
        return None if sigmas is None else cls(sigmas, optimizer.skip_spikes_window)

    def attach(self, context: Context) -> None:
        self._largest = context.largest

    def allows(self, loss: float, grad_norm: float) -> bool:
        self._at_hand = loss, grad_norm
        self._refused = bool(self._largest([self.is_spike(loss, grad_norm)])[0])
        return not self._refused

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether the loss or the gradient norm of the current step is a spike. Both are finite."""
        if len(self.made) < self.window // 2:
            return False
        losses, grad_norms = zip(*self.made, strict=True)
        return self._above(loss, losses) or self._above(grad_norm, grad_norms)

    def _above(self, x: float, past: Sequence[float]) -> bool:
        return x > statistics.fmean(past) + self.sigmas * statistics.stdev(past)

    def after_update(self, made: bool) -> None:
        self.skipped += self._refused
        if made:
            assert self._at_hand is not None, "`allows` comes before `after_update` in every step"
            self.made.append(self._at_hand)

    def state(self) -> dict[str, Any]:
        return {"made": [list(pair) for pair in self.made], "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.made.extend((loss, grad_norm) for loss, grad_norm in state["made"])
        self.skipped = state["skipped"]

    def row(self) -> dict[str, int]:
        """skipped_steps: the number of updates that were skipped as spikes."""
        return {"skipped_steps": self.skipped}
