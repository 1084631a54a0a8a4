"""The best allocation of compute C = 6 N D under a law of size and tokens, also where tokens must be repeated.

Sources: Hoffmann et al. 2022 (arXiv 2203.15556, section 3); for over-trained models of equal loss, Gadre et al. 2024
(arXiv 2403.08540); for a limit of unique tokens, Muennighoff et al. 2023 (arXiv 2305.16264, section 6).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.errors import ConfigError

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
TOKENS_PER_PARAM = (1e-4, 1e7)  # the searched range
MOST_TOKENS = 1e9  # times those of the best size: a smaller model that needs more does not reach its loss
PLANNED = ("n_params", "n_tokens", "tokens_per_param", "epochs", "flops", "times_compute", "total_flops")
FAR = 10.0  # times the tokens per parameter that were fitted: no plan beyond


@dataclass(frozen=True)
class Allocation:
    """A model whose loss, by the law, equals that of the optimal model.

    share: N divided by the optimal N. compute: C divided by the optimal C. n_tokens: None if so small a model does not
    reach that loss with any number of tokens. unique_tokens: how many different tokens there are; None: no limit.
    """

    share: float
    n_params: float
    n_tokens: float | None
    compute: float | None
    loss: float
    unique_tokens: float | None = None

    @property
    def inputs(self) -> dict[str, float]:
        """The inputs of the law; the model must have tokens."""
        limit = {} if self.unique_tokens is None else {"unique_tokens": self.unique_tokens}
        return {"n_params": self.n_params, "n_tokens": self.n_tokens or math.nan, **limit}

    def record(self) -> dict[str, float | None]:
        """The model as one flat row."""
        ratio = self.n_tokens / self.n_params if self.n_tokens else None
        flops = 6 * self.n_params * self.n_tokens if self.n_tokens else None
        named = {"share_of_optimal_n": self.share, "n_params": self.n_params, "n_tokens": self.n_tokens}
        unique = self.unique_tokens
        epochs = {} if unique is None else {"epochs": self.n_tokens / unique if self.n_tokens else None}
        found = {**named, "tokens_per_param": ratio, **epochs, "flops": flops, "times_compute": self.compute}
        return found | {"loss": self.loss}


def allocate(
    fit: Fit, flops: float, shares: Sequence[float] = SHARES, unique_tokens: float | None = None
) -> list[Allocation]:
    """The N and D of the lowest loss at `flops`, and smaller models with the tokens that they need for the same loss.

    unique_tokens: how many different tokens there are, for a law that knows them; D may be more, in several epochs.
    Raises ConfigError if the law is not one of n_params and n_tokens (and unique_tokens), or if its lowest loss lies at
    an end of the searched range, 1e-4 to 1e7 tokens per parameter.
    """
    _check_law(fit, unique_tokens)
    best = _optimal_size(fit, flops, unique_tokens)
    tokens = flops / (6 * best)
    whole = Allocation(1.0, best, tokens, 1.0, 0.0, unique_tokens)
    loss = _loss(fit, whole)
    return [_smaller(fit, share, replace(whole, loss=loss)) for share in shares]


def _check_law(fit: Fit, unique_tokens: float | None) -> None:
    if "n_params" in fit.largest and fit.largest["n_params"] == fit.smallest.get("n_params"):
        raise ConfigError(
            f"allocate needs runs of several sizes; all fitted runs have n_params={fit.largest['n_params']:g}"
        )
    size = {"n_params", "n_tokens"}
    of_size, limited = (
        [one.name for one in LAWS.values() if one.output == "loss" and set(one.inputs) == inputs]
        for inputs in (size, size | {"unique_tokens"})
    )
    if fit.law in limited and unique_tokens is None:
        raise ConfigError(f"allocate needs --unique-tokens U: the tokens that there are; {fit.law} depends on them")
    if fit.law in of_size and unique_tokens is not None:
        raise ConfigError(f"--unique-tokens: {fit.law} has no limit of unique tokens; fit {', '.join(limited)}")
    if fit.law not in [*of_size, *limited]:
        known = ", ".join([*of_size, *limited])
        raise ConfigError(f"allocate needs a law of n_params and n_tokens ({known}); this is {fit.law}")


def allocation_records(
    fit: Fit, flops: float, inference_tokens: float | None = None, unique_tokens: float | None = None
) -> list[dict[str, Any]]:
    """The models of `allocate` as flat rows, with intervals and their distance from the fitted rows.

    low and high are of the loss of one run. NAME_low and NAME_high are of the plan: 95 % over the resamples of the fit,
    each with its own best size, and its own tokens for the loss of that size. A note says why a row has no interval, or
    that it lies outside of the fitted rows; from FAR times their tokens per parameter on, tokens are withheld.
    unique_tokens: see `allocate`; rows then have `epochs`. inference_tokens: tokens that the model will process after
    training, at 2N FLOPs for each (Sardana et al. 2023, arXiv 2401.00448); rows then have `total_flops`, and a row of
    the least total is added.

    Raises ConfigError as `allocate` does, and if a number is not positive and finite.
    """
    for option, value in (
        ("--flops", flops), ("--inference-tokens", inference_tokens), ("--unique-tokens", unique_tokens),
    ):  # fmt: skip
        if value is not None and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise ConfigError(f"{option} must be a number greater than zero; got {value}")
    shares: tuple[float, ...] = SHARES
    if inference_tokens is not None:
        shares = tuple(sorted({*SHARES, _cheapest_share(fit, flops, inference_tokens, unique_tokens)}, reverse=True))
    found = [_beside_fitted(fit, one) for one in allocate(fit, flops, shares, unique_tokens)]
    plans, note = _resampled_plans(fit, flops, unique_tokens)
    for record in found:
        if inference_tokens is not None:
            served = 2 * record["n_params"] * inference_tokens
            record["total_flops"] = record["flops"] + served if record["flops"] else None
        record |= _ends(record, plans(record["share_of_optimal_n"]) if plans else {}, inference_tokens)
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
    low, high = fit.interval(one.inputs) or (None, None)
    beyond = fit.extrapolation(one.inputs)
    said = "outside of the fitted runs" if beyond > 1 + 1e-9 and fit.largest else ""
    return record | {"low": low, "high": high, "extrapolation": beyond, "note": said}


Plans = Callable[[float], dict[str, np.ndarray]]  # from a share to n_params and n_tokens of each resample


def _resampled_plans(fit: Fit, flops: float, unique_tokens: float | None) -> tuple[Plans | None, str]:
    """The plans of each resample, and a note if some resamples have no best size in the searched range."""
    if not fit.draws:
        return None, "no interval: the fit has no resamples"
    draws = {name: np.array([[draw[name]] for draw in fit.draws]) for name in fit.params}
    limit = {} if unique_tokens is None else {"unique_tokens": np.array(unique_tokens)}

    def loss(log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
        found = LAWS[fit.law].predict(draws, {"n_params": np.exp(log_n), "n_tokens": np.exp(log_d), **limit})
        return np.where(np.isfinite(found), found, np.inf)

    sizes, budget = np.linspace(*_searched(flops), 401), math.log(flops / 6)
    losses = np.broadcast_to(loss(sizes, budget - sizes), (len(fit.draws), len(sizes)))
    place = np.argmin(losses, axis=1)
    none = int(np.sum((place == 0) | (place == len(sizes) - 1)))
    low, high = (sizes[np.clip(place + step, 0, len(sizes) - 1)][:, None] for step in (-1, 1))
    for _ in range(30):  # thirds of the interval around the minimum
        one, other = low + (high - low) / 3, high - (high - low) / 3
        left = loss(one, budget - one) < loss(other, budget - other)
        low, high = np.where(left, low, one), np.where(left, other, high)
    best = (low + high) / 2
    least = loss(best, budget - best)

    def plans(share: float) -> dict[str, np.ndarray]:
        log_n = best + math.log(share)
        low, high = budget - best - 1e-9, budget - best + math.log(MOST_TOKENS)
        reached = loss(log_n, high) <= least
        for _ in range(50 if share < 1 else 0):  # halves of the interval around the tokens for the least loss
            middle = (low + high) / 2
            enough = loss(log_n, middle) <= least
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        log_d = high if share < 1 else budget - best
        n_tokens = np.where(reached | (share == 1), np.exp(log_d), np.inf)
        return {"n_params": np.exp(log_n)[:, 0], "n_tokens": n_tokens[:, 0]}

    return plans, f"{none} of {len(place)} resamples have no best size in range" if none else ""


def _ends(
    record: dict[str, Any], plans: dict[str, np.ndarray], inference_tokens: float | None
) -> dict[str, float | None]:
    """NAME_low and NAME_high of each number of a plan; None where it is withheld or has no end."""
    found: dict[str, np.ndarray] = dict(plans)
    if plans:
        n, d = plans["n_params"], plans["n_tokens"]
        found |= {"tokens_per_param": d / n, "flops": 6 * n * d}
        if record.get("epochs"):
            found["epochs"] = d * (record["epochs"] / record["n_tokens"])
        if record["times_compute"]:
            found["times_compute"] = found["flops"] * (record["times_compute"] / record["flops"])
        if inference_tokens is not None:
            found["total_flops"] = found["flops"] + 2 * n * inference_tokens
    ends: dict[str, float | None] = {}
    for name in PLANNED:
        if name not in record:
            continue
        pair: list[float | None] = [None, None]
        if name in found and record[name] is not None:
            quantiles = np.quantile(found[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
            pair = [float(one) if math.isfinite(one) else None for one in quantiles]
        ends[f"{name}_low"], ends[f"{name}_high"] = pair
    return ends


def _cheapest_share(fit: Fit, flops: float, inference_tokens: float, unique_tokens: float | None) -> float:
    """The share of the best size at which training to its loss and inference together cost the least. Plans that are
    withheld do not count."""
    shares, most = np.geomspace(0.02, 1.0, 161), FAR * fit.largest.get("tokens_per_param", math.inf)
    cost = [6 * one.n_params * one.n_tokens + 2 * one.n_params * inference_tokens
            if one.n_tokens and one.n_tokens <= most * one.n_params else math.inf
            for one in allocate(fit, flops, list(shares), unique_tokens)]  # fmt: skip
    return float(shares[int(np.argmin(cost))])


def _loss(fit: Fit, one: Allocation) -> float:
    return float(fit.predict(one.inputs))


def _optimal_size(fit: Fit, flops: float, unique_tokens: float | None) -> float:
    from scipy.optimize import minimize_scalar

    def loss_at(log_n: float) -> float:
        return _loss(fit, Allocation(1.0, math.exp(log_n), flops / 6 / math.exp(log_n), 1.0, 0.0, unique_tokens))

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


def _smaller(fit: Fit, share: float, whole: Allocation) -> Allocation:
    """The model of that share with the tokens for the loss of the whole one."""
    from scipy.optimize import brentq

    if share == 1.0:
        return whole
    small, tokens = replace(whole, share=share, n_params=share * whole.n_params), whole.n_tokens or math.nan

    def excess(log_tokens: float) -> float:
        return _loss(fit, replace(small, n_tokens=math.exp(log_tokens))) - whole.loss

    low, high = math.log(tokens) - 1e-9, math.log(tokens * MOST_TOKENS)
    if excess(high) > 0:
        return replace(small, n_tokens=None, compute=None)
    needed = math.exp(brentq(excess, low, high, xtol=1e-10))
    return replace(small, n_tokens=needed, compute=share * needed / tokens)
