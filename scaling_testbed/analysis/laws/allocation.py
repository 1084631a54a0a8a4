"""The best allocation of compute C = 6 N D under a law of size and tokens.

Sources: Hoffmann et al. 2022 (arXiv 2203.15556, section 3); for over-trained models of equal loss, Gadre et al. 2024
(arXiv 2403.08540).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.errors import ConfigError

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
TOKENS_PER_PARAM = (1e-4, 1e7)  # the searched range
FAR = 10.0  # times the tokens per parameter that were fitted: no plan beyond


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


def allocation_records(fit: Fit, flops: float, inference_tokens: float | None = None) -> list[dict[str, Any]]:
    """The models of `allocate` as flat rows, each with an interval of its loss and its distance from the fitted rows.

    The first row has an interval of the best size too: 95 % over the resamples of the fit, each with its own best size.
    A note says why a row has no interval, or how far its tokens per parameter lie beyond the fitted ones; from FAR
    times on, tokens are withheld. inference_tokens: tokens that the model will process after training, at 2N FLOPs for
    each (Sardana et al. 2023, arXiv 2401.00448); rows then have `total_flops`, and a row of the least total is added.

    Raises ConfigError as `allocate` does, and if a number is not positive and finite.
    """
    for option, value in (("--flops", flops), ("--inference-tokens", inference_tokens)):
        if value is not None and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise ConfigError(f"{option} must be a number greater than zero; got {value}")
    shares: tuple[float, ...] = SHARES
    if inference_tokens is not None:
        shares = tuple(sorted({*SHARES, _cheapest_share(fit, flops, inference_tokens)}, reverse=True))
    found = [_beside_fitted(fit, one) for one in allocate(fit, flops, shares)]
    low, high, note = _best_size_interval(fit, flops)
    for record in found:
        record["n_params_low"], record["n_params_high"] = (low, high) if record is found[0] else (None, None)
        if inference_tokens is not None:
            served = 2 * record["n_params"] * inference_tokens
            record["total_flops"] = record["flops"] + served if record["flops"] else None
        record["note"] = "; ".join(filter(None, [record.pop("note"), note if record is found[0] else ""]))
    if priced := [one for one in found if one.get("total_flops")]:
        best = min(priced, key=lambda one: one["total_flops"])
        best["note"] = "; ".join(filter(None, ["the least total of training and inference", best["note"]]))
    return found


def _beside_fitted(fit: Fit, one: Allocation) -> dict[str, Any]:
    record: dict[str, Any] = {**one.record(), "low": None, "high": None, "extrapolation": None, "note": ""}
    if one.n_tokens is None:
        return record | {"note": "no number of tokens brings so small a model to this loss"}
    ratio, most = one.n_tokens / one.n_params, fit.largest.get("tokens_per_param")
    if most and ratio > FAR * most:
        said = f"needs {ratio:.3g} tokens per parameter, {ratio / most:.3g} times more than was fitted"
        return record | {"n_tokens": None, "tokens_per_param": None, "flops": None, "times_compute": None, "note": said}
    inputs = {"n_params": one.n_params, "n_tokens": one.n_tokens}
    low, high = fit.interval(inputs) or (None, None)
    return record | {"low": low, "high": high, "extrapolation": fit.extrapolation(inputs)}


def _best_size_interval(fit: Fit, flops: float) -> tuple[float | None, float | None, str]:
    """95 % of the best sizes of the resamples, and a note if some of them have none in the searched range."""
    if not fit.draws:
        return None, None, "no interval: the fit has no resamples"
    sizes = np.linspace(*_searched(flops), 401)
    draws = {name: np.array([[draw[name]] for draw in fit.draws]) for name in fit.params}
    inputs = {"n_params": np.exp(sizes), "n_tokens": flops / 6 / np.exp(sizes)}
    losses = np.broadcast_to(LAWS[fit.law].predict(draws, inputs), (len(fit.draws), len(sizes)))
    place = np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=1)
    inside = (place > 0) & (place < len(sizes) - 1)
    low, high = np.quantile(np.exp(sizes[place]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    none = int(np.sum(~inside))
    return float(low), float(high), f"{none} of {len(place)} resamples have no best size in range" if none else ""


def _cheapest_share(fit: Fit, flops: float, inference_tokens: float) -> float:
    """The share of the best size at which training to its loss and inference together cost the least. Plans that are
    withheld do not count."""
    shares, most = np.geomspace(0.02, 1.0, 161), FAR * fit.largest.get("tokens_per_param", math.inf)
    cost = [6 * one.n_params * one.n_tokens + 2 * one.n_params * inference_tokens
            if one.n_tokens and one.n_tokens <= most * one.n_params else math.inf
            for one in allocate(fit, flops, list(shares))]  # fmt: skip
    return float(shares[int(np.argmin(cost))])


def _loss(fit: Fit, n_params, n_tokens) -> float:
    return float(fit.predict({"n_params": n_params, "n_tokens": n_tokens}))


def _optimal_size(fit: Fit, flops: float) -> float:
    from scipy.optimize import minimize_scalar

    def loss_at(log_n: float) -> float:
        return _loss(fit, math.exp(log_n), flops / 6 / math.exp(log_n))

    sizes = np.linspace(*_searched(flops), 401)  # a fitted law may have several local minima
    place = int(np.argmin([loss_at(x) for x in sizes]))
    if place in (0, len(sizes) - 1):
        raise ConfigError(f"{fit.law}: the loss at {flops:g} FLOPs has no minimum in N within the searched range")
    ends = sizes[place - 1], sizes[place + 1]
    return math.exp(minimize_scalar(loss_at, bounds=ends, method="bounded", options={"xatol": 1e-9}).x)


def _searched(flops: float) -> tuple[float, float]:
    """ln N at the ends of the searched range of tokens per parameter."""
    low, high = (0.5 * math.log(flops / 6 / ratio) for ratio in reversed(TOKENS_PER_PARAM))
    return low, high


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
