"""The cross-entropy after one temperature: what a loss leaves of a model when it is not calibrated.

The logits z become z / T with one T for all tokens. T is fitted on one half of the windows, and the loss is that of
the other half. The sums below are taken in one pass over the data, at a ladder of temperatures and with two
derivatives, and hold the logits of a part of the tokens at a time. Between two rungs the loss is the polynomial of
degree five with these values and derivatives at both, whose error is far below 1e-5 nats.

Shapes in names: N tokens, D model width, V vocabulary, K temperatures.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling_testbed.kernels.reference import softcap_scores, wide
from scaling_testbed.learning.loss import IGNORE

LADDER = tuple(2.0 ** (half / 2) for half in range(-6, 7))  # temperatures, from 1/8 to 8
LOGITS_BYTES = 2**24  # of logits that are held at once


@torch.no_grad()
def ladder_sums(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Sums [K, 3] over the tokens at each temperature of LADDER, fp64 where the device has it: the cross-entropy in
    nats, and its first and second derivative by x = -log T.

    With b = 1 / T it is log sum exp(b z) - b z_y. Its derivative by b is E z - z_y and the second one Var z, under the
    softmax of b z.
    """
    rows = max(1, LOGITS_BYTES // (4 * len(weight_VD)))
    kind = torch.float32 if hidden_ND.device.type == "mps" else torch.float64
    total_K3 = torch.zeros(len(LADDER), 3, dtype=kind, device=hidden_ND.device)
    for part_ND, part_N in zip(torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True):
        z_NV = softcap_scores(wide(F.linear(part_ND, weight_VD)), softcap)[part_N != IGNORE]
        z_NV = z_NV - z_NV.amax(-1, keepdim=True)
        z_N = z_NV.gather(1, part_N[part_N != IGNORE][:, None])[:, 0]
        for rung, temperature in enumerate(LADDER):
            b = 1 / temperature
            log_p_NV = (b * z_NV).log_softmax(-1)
            p_NV = log_p_NV.exp()
            mean_N = (p_NV * z_NV).sum(-1)
            variance_N = (p_NV * (z_NV - mean_N[:, None]).square()).sum(-1)
            slope_N = b * (mean_N - z_N)
            ce_N = -log_p_NV[:, 0] + b * (z_NV[:, 0] - z_N)  # log Z of the shifted logits, less b z_y
            sums = (ce_N, slope_N, slope_N + b * b * variance_N)
            total_K3[rung] += torch.stack([values.to(kind).sum() for values in sums])
    return total_K3


def fitted(fit_K3: Sequence[Sequence[float]], told_K3: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The temperature with the lowest sum in `fit_K3`, and the sum in `told_K3` at it. Both are of `ladder_sums`.

    A temperature beyond an end of LADDER is that end. None if a sum is not finite.
    """
    if not all(math.isfinite(value) for sums in (fit_K3, told_K3) for row in sums for value in row):
        return None
    # The cross-entropy is convex in 1 / T, so its slope by x = -log T changes its sign once. T rises along LADDER, and
    # x falls: the slope is positive where T is too small.
    slopes = [row[1] for row in fit_K3]
    if slopes[0] <= 0:
        return LADDER[0], told_K3[0][0]
    if slopes[-1] >= 0:
        return LADDER[-1], told_K3[-1][0]
    rung = next(k for k in range(len(LADDER) - 1) if slopes[k] > 0 >= slopes[k + 1])
    width = math.log(LADDER[rung] / LADDER[rung + 1])  # of x between the two rungs, negative
    to_fit = _between(fit_K3[rung], fit_K3[rung + 1], width)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        falls = sum(n * c * middle ** (n - 1) for n, c in enumerate(to_fit) if n) < 0
        low, high = (middle, high) if falls else (low, middle)
    temperature = LADDER[rung] * math.exp(-width * low)
    told = _between(told_K3[rung], told_K3[rung + 1], width)
    return temperature, sum(c * low**n for n, c in enumerate(told))


def _between(first: Sequence[float], last: Sequence[float], width: float) -> list[float]:
    """The coefficients, from the constant on, of the polynomial of degree five in the way t in [0, 1] from one rung to
    the next, with the values and the two derivatives by x of both. width: of x on this way."""
    f, d, s = first[0], width * first[1], width**2 * first[2]
    f1, d1, s1 = last[0], width * last[1], width**2 * last[2]
    a, b, c = f1 - f - d - s / 2, d1 - d - s, s1 - s
    return [f, d, s / 2, 10 * a - 4 * b + c / 2, -15 * a + 7 * b - c, 6 * a - 3 * b + c / 2]
