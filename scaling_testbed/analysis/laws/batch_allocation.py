"""The best size, batch and steps for a budget of compute C = 6 N B S, under the law of size, steps and batch.

Compute alone has no best batch: the loss at C falls as the batch shrinks, and the number of steps grows without end. So
one of two things is given besides C.

- The rule of Su et al. 2024 (arXiv 2403.06563) and of Kaplan et al. 2020 (arXiv 2001.08361, section 5.1): the batch is
  the critical batch of the loss that the run reaches, B = B_crit(L). The run then takes S = 2 S_min steps and E = 2
  E_min tokens: twice the fewest of both. The best size has a closed form: (Nc/N)^alpha_N = L alpha_S / (alpha_N +
  alpha_S), as in Kaplan et al. 2020, appendix B.1.
- The number of steps, where time is limited: the size and the batch B = C / 6NS have the lowest loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit
from scaling_testbed.analysis.laws.forms import LAWS, critical_batch
from scaling_testbed.errors import ConfigError

INPUTS = ("n_params", "steps", "batch_tokens")
BATCHES = (1.0, 0.25, 0.5, 2.0, 4.0)  # multiples of the critical batch, the best plan first
FAR = 10.0  # times beyond the fitted batches: no plan
SIZES = np.geomspace(1e2, 1e14, 1201)  # searched for a given number of steps
NEAR = np.geomspace(1e-2, 1e2, 121)  # searched for its resamples, times the best size


def is_of_batches(fit: Fit) -> bool:
    """Whether a fitted law has a critical batch, so that the functions here apply to it."""
    return LAWS[fit.law].inputs == INPUTS and {"B_star", "alpha_B"} <= set(fit.params)


def batch_allocation_records(fit: Fit, flops: float, steps: float | None = None) -> list[dict[str, Any]]:
    """Size, batch and steps for a budget as flat rows; the first is the best plan.

    Without `steps`, the batch of the best plan is the critical batch of its loss. More rows have a quarter to four
    times that batch: at the same size and loss, fewer steps and more compute, or the reverse. With `steps`, there is
    one row. The first row has 95 % intervals of its size, batch and steps over the resamples of the fit. Where the
    batch lies more than FAR times beyond the fitted ones, the plan is withheld with a note.

    Raises ConfigError if a number is not positive and finite, if an exponent of the law is zero, or if there is no
    best size in the searched range of 1e2 to 1e14 parameters.
    """
    for option, value in (("--flops", flops), ("--steps", steps)):
        if value is not None and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise ConfigError(f"{option} must be a number greater than zero; got {value}")
    if zero := [name for name in ("alpha_N", "alpha_S", "alpha_B") if not fit.params[name]]:
        raise ConfigError(f"{fit.law}: {zero[0]} is 0, so that no size is the best one")
    draws = {name: np.array([draw[name] for draw in fit.draws]) for name in fit.params}
    if steps is None:
        best = {key: float(value) for key, value in _at_critical_batch(fit.params, flops).items()}
        spread = _at_critical_batch(draws, flops) if fit.draws else None
        plans = [_with_batch(best, times) for times in BATCHES]
    else:
        found, inside = _at_steps(fit.law, fit.params, flops, steps, SIZES)
        if not inside:
            raise ConfigError(f"{fit.law}: the loss of {steps:g} steps at {flops:g} FLOPs has no minimum in N")
        best = {key: float(value[0]) for key, value in found.items()}
        columns, near = {name: one[:, None] for name, one in draws.items()}, best["n_params"] * NEAR
        spread = _at_steps(fit.law, columns, flops, steps, near)[0] if fit.draws else None
        plans = [best]
    return [_record(fit, plan, flops, spread if plan is plans[0] else None) for plan in plans]


def _at_critical_batch(p: Mapping[str, Any], flops: float) -> dict[str, Any]:
    """The plan of lowest loss with the critical batch: each part is a power of the loss, and so is 6 N B S."""
    a_n, a_s, a_b = p["alpha_N"], p["alpha_S"], p["alpha_B"]
    of_size, of_steps = a_s / (a_n + a_s), a_n / (a_n + a_s)  # shares of the loss
    whole = np.log(12) + np.log(p["Nc"]) + np.log(p["Sc"]) + np.log(p["B_star"])
    logs = whole - np.log(of_size) / a_n - np.log(of_steps) / a_s - math.log(flops)
    loss = np.exp(logs / (1 / a_n + 1 / a_s + 1 / a_b))
    n_params = p["Nc"] * (of_size * loss) ** (-1 / a_n)
    steps = 2 * p["Sc"] * (of_steps * loss) ** (-1 / a_s)
    return {"n_params": n_params, "steps": steps, "batch_tokens": critical_batch(p, loss), "loss": loss, "times": 1.0}


def _with_batch(best: Mapping[str, float], times: float) -> dict[str, float]:
    """The plan of the same size and loss with `times` the critical batch: S = S_min (1 + 1/times)."""
    steps, batch = best["steps"] * (1 + 1 / times) / 2, best["batch_tokens"] * times
    return {**best, "steps": steps, "batch_tokens": batch, "times": times}


def _at_steps(
    law: str, p: Mapping[str, Any], flops: float, steps: float, sizes: np.ndarray
) -> tuple[dict[str, np.ndarray], bool]:
    """The plan of lowest loss with this number of steps, for parameters of shape [n, 1] or numbers: arrays of shape
    [n]. Also whether each of them lies inside of the sizes."""

    def loss_of(params, n_params):
        batch = flops / (6 * n_params * steps)
        inputs: dict[str, Any] = {"n_params": n_params, "steps": steps, "batch_tokens": batch}
        return LAWS[law].predict(params, inputs), batch

    losses = np.atleast_2d(loss_of(p, sizes)[0])
    place = np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=1)
    inside = bool(((place > 0) & (place < len(sizes) - 1)).all())
    place = np.clip(place, 1, len(sizes) - 2)
    left, middle, right = (losses[np.arange(len(place)), place + shift] for shift in (-1, 0, 1))
    distance = math.log(sizes[1] / sizes[0])  # to the vertex of the parabola in ln N through these three
    n_params = sizes[place] * np.exp(0.5 * distance * (left - right) / (left - 2 * middle + right))
    flat = {name: np.ravel(value) for name, value in p.items()}
    loss, batch = loss_of(flat, n_params)
    times, constant = batch / critical_batch(flat, loss), np.full_like(loss, steps)
    return {"n_params": n_params, "steps": constant, "batch_tokens": batch, "loss": loss, "times": times}, inside


def _record(fit: Fit, plan: Mapping[str, float], flops: float, spread: Mapping[str, Any] | None) -> dict[str, Any]:
    inputs = {key: plan[key] for key in INPUTS}
    n_tokens = plan["batch_tokens"] * plan["steps"]
    compute = 6 * plan["n_params"] * n_tokens
    record: dict[str, Any] = {
        "times_critical_batch": plan["times"], **inputs, "n_tokens": n_tokens, "flops": compute,
        "times_compute": compute / flops, "loss": plan["loss"], "low": None, "high": None, "extrapolation": None,
    }  # fmt: skip
    for key in INPUTS:
        ends = (None, None) if spread is None else np.quantile(spread[key], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        record[f"{key}_low"], record[f"{key}_high"] = (None if end is None else float(end) for end in ends)
    fitted = [fit.largest.get("batch_tokens", math.inf), fit.smallest.get("batch_tokens", 0.0)]
    beyond = max(plan["batch_tokens"] / fitted[0], fitted[1] / plan["batch_tokens"])
    if beyond > FAR:
        withheld = ("steps", "n_tokens", "flops", "times_compute")
        return record | dict.fromkeys(withheld) | {"note": f"a batch {beyond:.3g} times beyond the fitted ones"}
    low, high = fit.interval(inputs) or (None, None)
    note = "" if fit.draws else "no interval: the fit has no resamples"
    return record | {"low": low, "high": high, "extrapolation": fit.extrapolation(inputs), "note": note}
