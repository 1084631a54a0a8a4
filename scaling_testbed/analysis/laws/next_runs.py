"""The runs that narrow a law's prediction most for their cost.

Near the fitted parameters theta, a law is linear in them. With j the slopes of ln L of a run, s the standard deviation
of its residual and I = sum j j^T / s^2 over the fitted runs, the variance of the predicted ln L at a target is
g^T I^-1 g, where g are the slopes there (Atkinson, Donev and Tobias 2007, Optimum Experimental Designs, with SAS,
sections 5.2 and 10.3: a c-optimal design, built up run by run). A run adds j j^T / s^2 to I, whatever its loss will be,
so its worth is known before it is trained, under the law. Where several laws share a prediction, the mean over them
counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import Fit, with_ratios
from scaling_testbed.analysis.laws.fitting import FLAT, Problem
from scaling_testbed.analysis.laws.forms import LAWS, LSQ, LSQ_LOG
from scaling_testbed.analysis.laws.selection import Selection, candidates
from scaling_testbed.errors import ConfigError, UserError

POWERS = (0.0, 0.5, 1.0)  # of a run's FLOPs, by which its gain is divided; the best of three lists is taken
RATIOS, SIZES = 9, 12  # values of tokens per parameter, and of new sizes, that are tried without others typed
LARGER = 4.0  # times the largest fitted size: no larger one is tried without --sizes or --models
LEAST_GAIN = 1e-3  # of ln(variance): a run that gains less is not worth its start
SAME_RANGE = 1.01  # a run this near to the fitted ones does not lie outside of them
Record = dict[str, Any]
Shares = Sequence[tuple[Fit, float]]  # laws that were fitted to the same runs, and their shares in a prediction


@dataclass(frozen=True)
class Known:
    """What the fitted runs say of a prediction under one law.

    share: of the law in the prediction. target: slopes of ln L at the target [n_free]. covariance: of the parameters
    [n_free, n_free]. spread: the standard deviation of ln L of one run about the law.
    """

    fit: Fit
    share: float
    target: np.ndarray
    covariance: np.ndarray
    spread: float

    @property
    def variance(self) -> float:
        """Of the predicted ln L at the target."""
        return float(self.target @ self.covariance @ self.target)


@dataclass(frozen=True, kw_only=True)
class NextRuns:
    """The chosen runs, in the order of choice, and what they do to a prediction.

    runs: each with its size, tokens, FLOPs, share of the budget, and the standard deviation of the predicted ln L at
    the target before and after it. laws: that standard deviation under each law, before and after all runs, and with
    the fitted runs made again at the same cost. flops, budget, fitted_flops: 6 N D of the chosen runs, what they may
    cost, and of the fitted runs. size: what N counts.
    """

    target: dict[str, float]
    runs: list[Record]
    laws: list[Record]
    flops: float
    budget: float
    fitted_flops: float
    size: str
    warnings: list[str]

    def notes(self) -> list[str]:
        """What the numbers mean, beside what making the fitted runs again gives."""
        before, after, again = (
            math.exp(sum(one["share"] * math.log(one[key]) for one in self.laws))
            for key in ("sd_before", "sd_after", "sd_of_fitted_runs_again")
        )
        return [
            f"sd: standard deviation of the predicted ln L at the target; {before:.3g} before, {after:.3g} after "
            f"{len(self.runs)} runs of {self.flops:.3g} FLOPs, {self.flops / self.budget:.0%} of the budget",
            f"the fitted runs made again at the same cost give {again:.3g}; all of them again cost "
            f"{self.fitted_flops:.3g} FLOPs and give {before / math.sqrt(2):.3g}",
            f"each law is taken for true: how far laws differ is not in the sd; N counts {self.size}, FLOPs are 6 N D",
        ]

    def record(self) -> Record:
        """The content of a saved file."""
        named = {"target": self.target, "runs": self.runs, "laws": self.laws, "flops": self.flops}
        told = {"budget": self.budget, "fitted_flops": self.fitted_flops, "size": self.size}
        return {**named, **told, "warnings": self.warnings}


def next_runs(
    kept: Shares, target: Mapping[str, float], places: Sequence[Record], flops: float, most_runs: int
) -> NextRuns:
    """Choose at most `most_runs` runs that cost at most `flops` together, each of them once.

    kept: see `laws_that_count`. target: n_params and n_tokens of the run to predict. places: the runs to choose from,
    flat rows with n_params and n_tokens.

    The runs are chosen one after another, each time the one with the largest fall of the logarithm of the variance per
    FLOPs^p; of the lists with p = 0, 1/2 and 1 the one with the least variance is taken. Raises ConfigError for a
    budget that is no positive number or below the cheapest run, and UserError if the fitted runs do not determine the
    parameters of any law.
    """
    _check("--flops", flops)
    if not isinstance(most_runs, int) or most_runs < 1:
        raise ConfigError(f"--runs must be a whole number greater than zero; got {most_runs}")
    known, said = _known(kept, target)
    inputs = {key: np.array([one[key] for one in places], float) for key in ("n_params", "n_tokens")}
    costs = 6 * inputs["n_params"] * inputs["n_tokens"]
    if not (costs <= flops).any():
        cheapest = f"the cheapest run to choose from costs {costs.min(initial=math.inf):.3g} FLOPs"
        raise ConfigError(f"--flops {flops:g}: {cheapest}; give more, or other --sizes or --tokens-per-param")
    slopes = [_slopes(one.fit, inputs) / one.spread for one in known]
    lists = [_chosen(known, slopes, costs, flops, most_runs, power) for power in POWERS]
    chosen = min(lists, key=lambda one: _log_variance(one[1][-1]))
    picked, states = chosen
    spent, own = float(costs[picked].sum()), _rows(known[0].fit)["flops"]
    deviations = [math.exp(0.5 * _log_variance(state)) for state in states]
    runs = [
        places[place] | {"tokens_per_param": float(inputs["n_tokens"][place] / inputs["n_params"][place]),
                         "flops": float(costs[place]), "share_of_budget": float(costs[place] / flops),
                         "sd_before": before, "sd_after": after}
        for place, before, after in zip(picked, deviations, deviations[1:], strict=False)
    ]  # fmt: skip
    again = math.sqrt(1 + spent / float(own.sum()))
    laws = [
        {"law": one.fit.law, "share": one.share, "sd_before": math.sqrt(one.variance),
         "sd_after": math.sqrt(last.variance), "sd_of_fitted_runs_again": math.sqrt(one.variance) / again}
        for one, last in zip(known, states[-1], strict=True)
    ]  # fmt: skip
    outside = [far for far in (known[0].fit.extrapolation(one) for one in _inputs(runs)) if far > SAME_RANGE]
    if outside:
        where = f"{len(outside)} of {len(runs)} chosen runs lie outside of the fitted ones"
        said.append(f"{where}, up to {max(outside):.3g} times: their worth rests on the form of the law")
    price = 6 * target["n_params"] * target["n_tokens"]
    said += [f"the target itself costs {price:.3g} FLOPs, which the budget allows"] if price <= flops else []
    return NextRuns(
        target=dict(target),
        runs=runs,
        laws=laws,
        flops=spent,
        budget=float(flops),
        fitted_flops=float(own.sum()),
        size=known[0].fit.size,
        warnings=said,
    )


def checked_target(typed: Sequence[float]) -> dict[str, float]:
    """The inputs of a law from N and D. Raises ConfigError unless they are two positive numbers."""
    if not isinstance(typed, Sequence) or isinstance(typed, str) or len(typed) != 2:
        raise ConfigError(
            "--target must be N,D: the parameters and the tokens of the run to predict, as in 7e9,1.4e11; got "
            f"{typed if isinstance(typed, str) or not isinstance(typed, Sequence) else ','.join(map(str, typed))}"
        )
    for name, value in zip("ND", typed, strict=True):
        _check(f"--target {name}", value)
    return {"n_params": float(typed[0]), "n_tokens": float(typed[1])}


def _check(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{option} must be a number greater than zero; got {value}")


def places_of(
    kept: Shares,
    target: Mapping[str, float],
    sizes: Sequence[Record] = (),
    ratios: Sequence[float] = (),
    most_flops: float | None = None,
) -> list[Record]:
    """Runs to choose from: every size at every number of tokens per parameter.

    sizes: rows with n_params; empty: the fitted sizes, and others between the smallest of them and LARGER times the
    largest, or the target's if that is smaller. ratios: empty: from the least to the most that was fitted. most_flops:
    6 N D of one run at most. Raises ConfigError for a number that is not positive, or if no run is left.
    """
    fit = kept[0][0]
    fitted = _rows(fit)
    own, ratio = np.unique(fitted["n_params"]), fitted["tokens_per_param"]
    largest = max(own.max(), min(LARGER * own.max(), target["n_params"]))
    new = np.geomspace(own.min(), largest, SIZES)
    sizes = sizes or [{"n_params": float(one)} for one in np.unique([*own, *(float(f"{one:.3g}") for one in new)])]
    ratios = list(ratios) or list(dict.fromkeys(np.geomspace(ratio.min(), ratio.max(), RATIOS).tolist()))
    for option, values in (("--sizes", [one["n_params"] for one in sizes]), ("--tokens-per-param", ratios)):
        for value in values:
            _check(option, value)
    if most_flops is not None:
        _check("--flops-per-run", most_flops)
    found = [one | {"n_tokens": one["n_params"] * m} for one in sizes for m in ratios]
    found = [one for one in found if 6 * one["n_params"] * one["n_tokens"] <= (most_flops or math.inf)]
    if not found:
        raise ConfigError(f"--flops-per-run {most_flops:g}: every run to choose from costs more")
    return found


def _inputs(runs: Sequence[Record]) -> list[dict[str, float]]:
    return [{key: one[key] for key in ("n_params", "n_tokens")} for one in runs]


def _rows(fit: Fit) -> dict[str, np.ndarray]:
    """Size, tokens, compute and tokens per parameter of the fitted runs. Raises UserError if the fit has none."""
    if not fit.fitted_inputs:
        raise UserError(
            f"the fit of {fit.law} does not hold the inputs of its rows; fit it again, one group alone (--where)"
        )
    return with_ratios({key: np.array(values) for key, values in fit.fitted_inputs.items()})


def laws_that_count(kept: object) -> Shares:
    """A law of size and tokens, or the compared laws that have a share, each with its share. Raises ConfigError for
    another law, and for one fitted to points of curves: these are no runs of their own."""
    fits = (
        [kept]
        if isinstance(kept, Fit)
        else [one.fit for one in kept.laws.values()]
        if isinstance(kept, Selection)
        else []
    )
    if any(fit.n_runs is not None for fit in fits):
        raise ConfigError("next needs a fit of finished runs; this one is of points of curves: fit without --curves")
    if isinstance(kept, Selection):
        return [(one.fit, one.share) for one in kept.laws.values() if one.share]
    if not isinstance(kept, Fit) or kept.law not in candidates():
        named = kept.law if isinstance(kept, Fit) else "a chain of two laws"
        raise ConfigError(f"next needs a law of n_params and n_tokens ({', '.join(candidates())}); this is {named}")
    return [(kept, 1.0)]


def _known(kept: Shares, target: Mapping[str, float]) -> tuple[list[Known], list[str]]:
    """The laws whose parameters the fitted runs determine, and notes on the others. Shares add up to one."""
    found, said = [], []
    for fit, share in kept:
        slopes, free = _slopes(fit, _rows(fit)), len(fit.params) - len(fit.fixed)
        _, singular, ways = np.linalg.svd(slopes, full_matrices=False)
        if fit.n_rows <= free or not np.isfinite(slopes).all() or singular[-1] <= FLAT * singular[0]:
            said.append(f"{fit.law} is left out: its {fit.n_rows} rows do not determine its parameters")
            continue
        spread = _spread(fit)
        covariance = (ways.T / singular**2) @ ways * spread**2
        at = _slopes(fit, {key: [value] for key, value in target.items()})[0]
        found.append(Known(fit, share, at, covariance, spread))
    if not found:
        raise UserError(f"{'; '.join(said)}: fix a parameter (fit --fix), or add runs of other sizes and tokens")
    whole = sum(one.share for one in found)
    return [Known(one.fit, one.share / whole, one.target, one.covariance, one.spread) for one in found], said


def _slopes(fit: Fit, inputs: Mapping[str, Any]) -> np.ndarray:
    """d ln L / d theta of each row [n_rows, n_free], in units of the starting ranges."""
    law, arrays = LAWS[fit.law], {key: np.asarray(values, float) for key, values in inputs.items()}
    problem = Problem(law, arrays, np.ones(len(next(iter(arrays.values())))), LSQ_LOG, fit.fixed)
    theta = [math.log(fit.params[one.name]) if one.log else fit.params[one.name] for one in problem.free]
    return problem.linearised(np.array(theta))[1] * problem.widths


def _spread(fit: Fit) -> float:
    """The standard deviation of ln(predicted/observed) of a run about the law, from the residuals of the fit."""
    residuals = np.array(fit.residuals)
    if fit.objective["name"] == LSQ:
        predicted = fit.predict(fit.fitted_inputs)
        residuals = np.log(predicted / (predicted - residuals))
    free = len(fit.params) - len(fit.fixed)
    return math.sqrt(max(float(np.sum(residuals**2)), 1e-30) / (fit.n_rows - free))


def _log_variance(state: Sequence[Known]) -> float:
    return sum(one.share * math.log(one.variance) for one in state)


def _chosen(
    known: Sequence[Known], slopes: Sequence[np.ndarray], costs: np.ndarray, flops: float, most_runs: int, power: float
) -> tuple[list[int], list[list[Known]]]:
    """The places of the chosen runs, and what is known before them and after each."""
    picked: list[int] = []
    states, free = [list(known)], np.ones(len(costs), bool)
    while len(picked) < most_runs and (free & (costs <= flops)).any():
        gains = np.zeros(len(costs))
        for one, own in zip(states[-1], slopes, strict=True):
            moved = own @ one.covariance
            fall = (moved @ one.target) ** 2 / (1 + np.sum(moved * own, axis=1)) / one.variance
            gains -= one.share * np.log1p(-np.minimum(fall, 1 - 1e-12))
        worth = np.where(free & (costs <= flops) & (gains > LEAST_GAIN), gains / costs**power, -1.0)
        place = int(np.argmax(worth))
        if worth[place] < 0:
            break
        picked.append(place)
        states.append([_with_run(one, own[place]) for one, own in zip(states[-1], slopes, strict=True)])
        free[place], flops = False, flops - float(costs[place])
    return picked, states


def _with_run(one: Known, slope: np.ndarray) -> Known:
    """What is known after one more run, whose slopes are divided by the spread: Sherman and Morrison's formula."""
    moved = one.covariance @ slope
    return Known(
        one.fit, one.share, one.target, one.covariance - np.outer(moved, moved) / (1 + slope @ moved), one.spread
    )
