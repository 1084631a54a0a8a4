"""The critical learning rate: where the loss has risen by a given excess above its best.

Above the best rate, the critical rate is the first one at which the mean loss over seeds passes the best mean loss plus
`excess`, interpolated in the logarithm of the rate. If no rate of the grid does, it is not known, and lies above the
highest rate: it is censored. It takes the place of "the lowest rate that diverges" of Wortsman et al. 2023 (Figure 1),
which needs no interpolation, but no small model of bytes ever ends above its initial loss.

The interval holds all rates at which a t-test over seeds does not tell the excess from the given one. So it is right
where the curve has a kink, and it is open above where the seeds do not exclude that no rate passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves.intervals import t_factor

EXCESS = 0.25  # nats per token
POINTS = 64  # of the interval's search, between neighbouring rates


@dataclass(frozen=True)
class CriticalRate:
    """The critical rate of one condition and size.

    rate: None if no rate passes; it then lies above `top`, the highest rate of the grid. low, high: the 95 % interval;
    high is None if it is open above, both are None with one seed. by_seed: the logarithm of the critical rate of each
    seed's own curve, infinite if no rate passes; its best rate is that of the mean over seeds.
    """

    rate: float | None
    low: float | None
    high: float | None
    top: float
    by_seed: Mapping[int, float]

    def record(self) -> dict[str, object]:
        """Flat columns for a table; critical_above is the highest rate if no rate passes."""
        return {
            "critical_lr": self.rate,
            "critical_low": self.low,
            "critical_high": self.high,
            "critical_above": self.top if self.rate is None else None,
        }

    def __str__(self) -> str:
        said = f"above {self.top:g}" if self.rate is None else f"{self.rate:.3g}"
        if self.low is None:
            return said
        return f"{said} [{self.low:.3g}, {f'{self.high:.3g}' if self.high is not None else 'open'}]"


def critical_rate(
    lrs: Sequence[float], losses_SL: np.ndarray, seeds: Sequence[int], excess: float = EXCESS, intervals: bool = True
) -> CriticalRate:
    """The critical rate of losses [seeds, rates], in nats, of a grid of rates in ascending order.

    intervals: whether to compute the interval; it needs scipy.
    """
    x_L = np.log(np.asarray(lrs, float))
    losses_SL = np.asarray(losses_SL, float)
    best = int(losses_SL.mean(axis=0).argmin())
    middle = _crossing(x_L, losses_SL.mean(axis=0), best, excess)
    # The lowest of a seed's own losses would be too low, and its critical rate with it, where the curve is flat.
    by_seed = {seed: _crossing(x_L, own_L, best, excess) for seed, own_L in zip(seeds, losses_SL, strict=True)}
    low = high = None
    if intervals and len(losses_SL) > 1:
        low, high = _interval(x_L, losses_SL, best, excess)
        low, high = math.exp(low), math.exp(high) if math.isfinite(high) else None
    rate = math.exp(middle) if math.isfinite(middle) else None
    return CriticalRate(rate, low, high, lrs[-1], by_seed)


def _crossing(x_L: np.ndarray, loss_L: np.ndarray, best: int, excess: float) -> float:
    """The first x above that of the best rate at which the line through the losses passes the best loss + excess."""
    return _first_above_zero(x_L[best:], loss_L[best:] - loss_L[best] - excess)


def _first_above_zero(x: np.ndarray, y: np.ndarray) -> float:
    """The first x at which the line through the points reaches zero from below; infinite if it never does."""
    above = np.flatnonzero(y >= 0)
    if not len(above):
        return math.inf
    if (at := int(above[0])) == 0:
        return float(x[0])
    share = -y[at - 1] / (y[at] - y[at - 1])
    return float(x[at - 1] + share * (x[at] - x[at - 1]))


def _interval(x_L: np.ndarray, losses_SL: np.ndarray, best: int, excess: float) -> tuple[float, float]:
    """The ends of the rates above the best one at which the excess is not told from `excess`."""
    parts = [np.linspace(a, b, POINTS, endpoint=False) for a, b in zip(x_L[best:-1], x_L[best + 1 :], strict=True)]
    x_P = np.concatenate([*parts, x_L[-1:]])
    over_SP = np.array([np.interp(x_P, x_L, own_L) for own_L in losses_SL]) - losses_SL[:, [best]] - excess
    n = len(losses_SL)
    mean_P, reach_P = over_SP.mean(axis=0), t_factor(n - 1) * over_SP.std(axis=0, ddof=1) / math.sqrt(n)
    low = _first_above_zero(x_P, mean_P + reach_P)
    return (low if math.isfinite(low) else float(x_P[-1])), _first_above_zero(x_P, mean_P - reach_P)
