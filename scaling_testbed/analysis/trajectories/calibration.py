"""Intervals from the errors that predictions of left-out runs had."""

import math
from collections.abc import Sequence

from scaling_testbed.analysis.laws.fitted import LEVEL

FEWEST = 5  # left-out runs; the interval of fewer is too wide to be of use, and its level is not known


def half_width(errors: Sequence[float], free: int = 0) -> float:
    """The half-width of the 95 % interval of the next error: Student's quantile times the root mean square.

    errors: of runs that their own prediction did not use, so that they hold its uncertainty; at least FEWEST. free:
    the parameters that were estimated from the same errors. The errors are taken as normal and exchangeable with the
    next one, and not as unbiased: their mean is not subtracted.
    """
    from scipy.stats import t

    freedom = len(errors) - free
    rms = math.sqrt(sum(error**2 for error in errors) / freedom)
    return float(t.ppf((1 + LEVEL) / 2, freedom)) * rms
