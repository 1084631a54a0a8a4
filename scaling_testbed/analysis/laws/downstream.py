"""Predict downstream error from size and tokens in two steps.

The first step is a law of the loss, the second is error = epsilon - k exp(-gamma L) (Gadre et al. 2024, arXiv
2403.08540, section 4).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit, from_record

LOSSES = 2000  # values of the loss, at least, in an interval of the downstream value


@dataclass(frozen=True)
class Chain:
    """A law of the loss, and a law whose input is the loss."""

    loss: Fit
    downstream: Fit

    def predict(self, inputs: Mapping[str, float]) -> tuple[float, float]:
        """Loss and downstream value of one new run."""
        loss = float(self.loss.predict(inputs))
        return loss, float(self.downstream.predict({"loss": loss}))

    def interval(self, inputs: Mapping[str, float]) -> tuple[float, float] | None:
        """Bounds of a 95 % prediction interval of the downstream value; None if either fit has no resamples.

        Each resample of the downstream fit gets a few values of the loss, drawn from its samples.
        """
        if not (self.loss.draws and self.downstream.draws):
            return None
        losses = self.loss.samples(inputs)
        each = -(-LOSSES // len(self.downstream.draws))
        count = each * len(self.downstream.draws)
        losses = np.quantile(losses, (np.arange(count) + 0.5) / count)  # fewer values with the same distribution
        losses = np.random.default_rng(0).permutation(losses).reshape(each, -1)
        values = self.downstream.samples({"loss": losses})
        if not np.isfinite(values).any():
            return None
        low, high = np.quantile(values[np.isfinite(values)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def record(self, inputs: Mapping[str, float]) -> dict[str, Any]:
        """One new run as a flat row."""
        loss, value = self.predict(inputs)
        low, high = self.interval(inputs) or (None, None)
        far = max(self.loss.extrapolation(inputs), self.downstream.extrapolation({"loss": loss}))
        return {**inputs, "predicted_loss": loss, "predicted": value, "low": low, "high": high, "extrapolation": far}


def chain_from_record(record: Mapping[str, Any]) -> Chain:
    """A chain from the output of dataclasses.asdict. Raises as from_record does."""
    return Chain(from_record(record["loss"]), from_record(record["downstream"]))
