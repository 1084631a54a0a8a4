"""The best allocation of compute C = 6 N D under a law of size and tokens.

Sources: Hoffmann et al. 2022 (arXiv 2203.15556, section 3); for over-trained models of equal loss, Gadre et al. 2024
(arXiv 2403.08540).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.errors import ConfigError

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
TOKENS_PER_PARAM = (1e-4, 1e7)  # the searched range


@dataclass(frozen=True)
class Allocation:
    """A model whose loss, by the law, equals that of the optimal model.

    share: N divided by the optimal N. compute: C divided by the optimal C. n_tokens: None if so small a model does not
    reach that loss with any number of tokens.
    """

    share: float
    n_params: float
    n_tokens: float | None
    compute: float | None
    loss: float

    def record(self) -> dict[str, float | None]:
        """The model as one flat row."""
        ratio = self.n_tokens / self.n_params if self.n_tokens else None
        flops = 6 * self.n_params * self.n_tokens if self.n_tokens else None
        named = {"share_of_optimal_n": self.share, "n_params": self.n_params, "n_tokens": self.n_tokens}
        return {**named, "tokens_per_param": ratio, "flops": flops, "times_compute": self.compute, "loss": self.loss}


def allocate(fit: Fit, flops: float, shares: Sequence[float] = SHARES) -> list[Allocation]:
    """The N and D of the lowest loss at `flops`, and smaller models with the tokens that they need for the same loss.

    Raises ConfigError if the law is not one of n_params and n_tokens, or if its lowest loss lies at an end of the
    searched range, 1e-4 to 1e7 tokens per parameter.
    """
    law = LAWS[fit.law]
    known = [one.name for one in LAWS.values() if one.output == "loss" and set(one.inputs) == {"n_params", "n_tokens"}]
    if law.name not in known:
        raise ConfigError(f"allocate needs a law of n_params and n_tokens ({', '.join(known)}); this is {fit.law}")
    best = _optimal_size(fit, flops)
    tokens = flops / (6 * best)
    loss = _loss(fit, best, tokens)
    return [_smaller(fit, share, best, tokens, loss) for share in shares]


def allocation_records(fit: Fit, flops: float) -> list[dict[str, float | None]]:
    """The models of `allocate` as flat rows, each with its distance from the fitted rows.

    Raises ConfigError as `allocate` does, and if flops is not a positive finite number.
    """
    if not isinstance(flops, (int, float)) or not 0 < flops < math.inf:
        raise ConfigError(f"--flops must be a number greater than zero; got {flops}")
    return [one.record() | {"extrapolation": _extrapolation(fit, one)} for one in allocate(fit, flops)]


def _extrapolation(fit: Fit, one: Allocation) -> float | None:
    return fit.extrapolation({"n_params": one.n_params, "n_tokens": one.n_tokens}) if one.n_tokens else None


def _loss(fit: Fit, n_params, n_tokens) -> float:
    return float(fit.predict({"n_params": n_params, "n_tokens": n_tokens}))


def _optimal_size(fit: Fit, flops: float) -> float:
    from scipy.optimize import minimize_scalar

    def loss_at(log_n: float) -> float:
        return _loss(fit, math.exp(log_n), flops / 6 / math.exp(log_n))

    low, high = (0.5 * math.log(flops / 6 / ratio) for ratio in reversed(TOKENS_PER_PARAM))
    sizes = np.linspace(low, high, 401)  # a fitted law may have several local minima
    place = int(np.argmin([loss_at(x) for x in sizes]))
    if place in (0, len(sizes) - 1):
        raise ConfigError(f"{fit.law}: the loss at {flops:g} FLOPs has no minimum in N within the searched range")
    ends = sizes[place - 1], sizes[place + 1]
    return math.exp(minimize_scalar(loss_at, bounds=ends, method="bounded", options={"xatol": 1e-9}).x)


def _smaller(fit: Fit, share: float, best: float, tokens: float, loss: float) -> Allocation:
    from scipy.optimize import brentq

    n_params = share * best

    def excess(log_tokens: float) -> float:
        return _loss(fit, n_params, math.exp(log_tokens)) - loss

    low, high = math.log(tokens) - 1e-9, math.log(tokens * 1e9)
    if share == 1.0:
        return Allocation(share, n_params, tokens, 1.0, loss)
    if excess(high) > 0:
        return Allocation(share, n_params, None, None, loss)
    needed = math.exp(brentq(excess, low, high, xtol=1e-10))
    return Allocation(share, n_params, needed, share * needed / tokens, loss)
