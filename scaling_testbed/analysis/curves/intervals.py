"""Student's t for one number of each seed: intervals, p-values, and the smallest effect that can be detected.

The seeds of a study are the same in all its conditions. So an effect is first computed for each seed, by the same
weights and batches in all conditions, and only then compared with its spread over the seeds. With n seeds, the interval
has n - 1 degrees of freedom. tests/analysis/curves/test_calibration.py measures how often these intervals hold the
truth.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.errors import UserError

LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and its interval at LEVEL. With one seed, the ends are infinite."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """The mean of one number of each seed, with Student's t interval. Raises UserError without scipy."""
    mean, error, n = _mean_and_error(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    reach = t_factor(n - 1) * error
    return Interval(mean, mean - reach, mean + reach, n)


def p_above(values: Sequence[float], bound: float) -> float:
    """The one-sided p-value of the hypothesis that the expected number is at most `bound`; 1 with one seed."""
    mean, error, n = _mean_and_error(values)
    if n < 2:
        return 1.0
    if error == 0:
        return 0.0 if mean > bound else 1.0
    return float(_special().stdtr(n - 1, -(mean - bound) / error))


def p_below(values: Sequence[float], bound: float) -> float:
    """The one-sided p-value of the hypothesis that the expected number is at least `bound`; 1 with one seed."""
    return p_above([-value for value in values], -bound)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return float(np.mean(values)), error, n


def t_factor(freedom: int, level: float = LEVEL) -> float:
    """The quantile of Student's t that bounds a two-sided interval. Raises UserError without scipy."""
    return float(_special().stdtrit(freedom, (1 + level) / 2))


def has_scipy() -> bool:
    """Whether intervals can be computed."""
    try:
        _special()
    except UserError:
        return False
    return True


def _special():
    try:
        from scipy import special
    except ImportError:
        raise UserError("intervals over seeds need scipy: pip install -e '.[analysis]'") from None
    return special


def noise_of(values_VS: np.ndarray) -> float:
    """The standard deviation over seeds of one value, without what a seed adds to all values alike.

    values_VS: [values, seeds], at least two of each. It is pooled over the values, with (values - 1) (seeds - 1)
    degrees of freedom.
    """
    n_values, n_seeds = values_VS.shape
    of_value, of_seed = values_VS.mean(axis=1, keepdims=True), values_VS.mean(axis=0, keepdims=True)
    residual_VS = values_VS - of_value - of_seed + values_VS.mean()
    return math.sqrt(float(np.sum(residual_VS**2)) / ((n_values - 1) * (n_seeds - 1)))


def honest_difference(values_VS: np.ndarray) -> np.ndarray:
    """The least difference of the means of two values that tells them apart, for all pairs at once: [values, values].

    values_VS: [values, seeds], at least two of each. This is Tukey's honestly significant difference at LEVEL (Tukey
    1949, Biometrics 5:99), with seeds as blocks and the noise of all values. A pair must pass it by its own noise too,
    which has n_seeds - 1 degrees of freedom: one noisy value beside quiet ones would else be told apart too often. The
    second quantile is that of half of the values, because only some pairs are noisier than all are in the mean.
    tests/analysis/curves/test_decisions.py measures how often equal values are told apart. Raises UserError without
    scipy.
    """
    n_values, n_seeds = values_VS.shape
    of_pair_VV = (values_VS[:, None] - values_VS[None]).std(axis=2, ddof=1) / math.sqrt(2)
    of_all = _studentized_range(n_values, (n_values - 1) * (n_seeds - 1)) * noise_of(values_VS)
    half = min(n_values, max(3, n_values // 2 + 1))
    return np.maximum(of_all, _studentized_range(half, n_seeds - 1) * of_pair_VV) / math.sqrt(n_seeds)


@functools.cache
def _studentized_range(n_means: int, freedom: int) -> float:
    _special()
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(LEVEL, n_means, freedom))


def exact_share(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent trials (Clopper and Pearson 1934)."""
    special, tail = _special(), (1 - LEVEL) / 2
    low = float(special.betaincinv(right, n - right + 1, tail)) if right else 0.0
    high = float(special.betaincinv(right + 1, n - right, 1 - tail)) if right < n else 1.0
    return low, high


def p_share_above(right: int, n: int, share: float) -> float:
    """The one-sided p-value of the hypothesis that the share is at most `share`."""
    return float(_special().bdtrc(right - 1, n, share)) if right else 1.0


def p_larger_variance(one: float, freedom: int, other: float, other_freedom: int) -> float:
    """The p-value of the F test of the hypothesis that the first variance is not the larger one."""
    return float(_special().fdtrc(freedom, other_freedom, one / max(other, 1e-300)))


def jackknife(statistic: Callable[[np.ndarray], float], values_SX: np.ndarray) -> float:
    """A statistic of the mean over seeds without the largest part of its bias (Quenouille 1956).

    values_SX: [seeds, ...]. The statistic takes the mean over some of the seeds. A minimum over noisy means is too low;
    its bias falls as 1 / n_seeds, and leaving out each seed in turn estimates it. One seed: the statistic as it is.
    """
    n = len(values_SX)
    whole = statistic(values_SX.mean(axis=0))
    if n < 2:
        return whole
    without = [statistic(np.delete(values_SX, seed, axis=0).mean(axis=0)) for seed in range(n)]
    return n * whole - (n - 1) * float(np.mean(without))


def detectable(seed_sd: float, n_seeds: int, margin: float = 0.0, power: float = POWER, n_claims: int = 1) -> float:
    """The smallest effect that is detected with a probability of `power`, in the unit of seed_sd.

    It is detected if a two-sided t-test at 5 % tells it from zero and its mean over seeds is at least the margin.
    seed_sd: the standard deviation over seeds of the effect, e.g. of a paired difference. n_claims: the test is at
    5 % / n_claims, which Holm's correction asks of the smallest of so many p-values. Infinite with one seed. Raises
    UserError without scipy.
    """
    if n_seeds < 2:
        return math.inf
    special, error = _special(), seed_sd / math.sqrt(n_seeds)
    quantiles = (np.arange(1000) + 0.5) / 1000
    found_errors = error * np.sqrt(special.chdtri(n_seeds - 1, quantiles) / (n_seeds - 1))
    needed = np.maximum(
        t_factor(n_seeds - 1, 1 - ALPHA / n_claims) * found_errors, margin
    )  # of the mean, for each standard error
    low, high = 0.0, margin + 1000 * seed_sd
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(special.ndtr((middle - needed) / error).mean())
        low, high = (low, middle) if reached >= power else (middle, high)
    return high
