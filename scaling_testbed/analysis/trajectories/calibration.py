"""Intervals from the errors that predictions of left-out runs had."""

import math
from collections.abc import Sequence

from scaling_testbed.analysis.laws.fitted import LEVEL

FEWEST = 5  # left-out runs; the interval of fewer is too wide to be of use


def half_width(errors: Sequence[float]) -> float:
    """The half-width of the 95 % interval of the next error: their root mean square times Student's quantile, for one
    degree of freedom less than there are errors.

    errors: each of a run that its own prediction did not use, so that they hold the uncertainty of the prediction. They
    are taken as normal, exchangeable with the next one, and not as unbiased: their mean is not subtracted. If the
    prediction is a mean of the other runs, the interval is Student's own up to a factor n / sqrt(n^2 - 1).
    """
    from scipy.stats import t

    rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return float(t.ppf((1 + LEVEL) / 2, len(errors) - 1)) * rms
