"""Several laws of one table side by side: which of them predicts, and how far its predictions can be trusted.

The bootstrap interval of a fit takes its law for true. It is too narrow where the law is not, and too wide where the
scatter of small runs is not that of large ones. Here the laws are judged by what they are for: they are fitted to the
cheaper runs, and predict dearer ones (rolling origin, Tashman 2000, International Journal of Forecasting 16:437). The
errors of these predictions choose the laws and set the width of the intervals.

Where the rows are points of training curves, whole runs are left out: the points of a run are not independent, so a
curve is never fitted in one part and predicted in another. A run then counts once in every mean, and its last point
within reach in the intervals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit, from_record, with_ratios
from scaling_testbed.analysis.laws.fitting import FEWEST_RUNS, Problem, refitted
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.errors import UserError

ORIGINS = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the runs, in the order of compute, that a law is fitted to
REACH = 5.0  # times the largest fitted compute: how far a law is asked to predict
SPARE = 3  # so many more runs than parameters, at least, are in a fit
LEAST = 5  # predictions of dearer runs: fewer neither choose a law nor calibrate an interval
STARTS = 8
ALIKE = 1.3  # laws whose error is at most this times the least are not told apart
SIZE_ERROR = "error of left-out sizes"
MOST_SIZES = 10  # more sizes than this are left out in groups


def candidates() -> list[str]:
    """The laws of the loss in size and tokens, which can be compared on any table of runs."""
    return [law.name for law in LAWS.values() if law.output == "loss" and set(law.inputs) == {"n_params", "n_tokens"}]


@dataclass(frozen=True)
class Compared:
    """One law beside the others.

    aicc: Akaike's criterion with the correction for few rows, of residuals with Laplace's distribution, for which the
    sum of absolute residuals is the likelihood; None if there are too few rows, and for points of training curves,
    which are not independent. size_error, forward_error: the mean
    error |ln(predicted/observed)| of runs of sizes that were left out, and of dearer runs; None if there were none.
    share: of the law in the average; 0 if it is left out.
    """

    fit: Fit
    aicc: float | None
    size_error: float | None
    forward_error: float | None
    share: float


@dataclass(frozen=True)
class Selection:
    """Laws that were compared on one table.

    reason: why these laws are kept. errors: ln(predicted/observed) of the kept laws' average, of all dearer runs at all
    origins. reach: the factors in compute by which they lay beyond the runs that were fitted. Where a law has no finite
    error, there are no errors.
    """

    laws: dict[str, Compared]
    reason: str
    errors: np.ndarray
    reach: np.ndarray

    @property
    def best(self) -> str:
        """The law with the largest share."""
        return max(self.laws, key=lambda name: self.laws[name].share)

    @property
    def calibrated(self) -> str:
        """On what the intervals are calibrated."""
        if not len(self.errors):
            return "not calibrated: there are too few runs to predict dearer ones from cheaper ones"
        few = "" if len(self.errors) >= 1 / (1 - LEVEL) - 1 else f", too few for {LEVEL:.0%}: the largest error counts"
        return f"calibrated on {len(self.errors)} predictions of dearer runs, up to {np.max(self.reach):.3g} times{few}"

    def predict(self, inputs: Mapping[str, float]) -> dict[str, Any]:
        """The prediction for one new run, with its interval, as a flat row.

        The prediction is the geometric mean of the kept laws', by their shares. Half the width of the interval, in
        logarithms, is the larger of two numbers. One is the 95 % quantile of the errors of dearer runs; past their
        reach it grows with the logarithm of compute. The other is 1.96 times the root of the sum of squares of the
        bootstrap's deviation and of the laws' deviation from their mean. low and high are None without errors.
        """
        kept = {name: one for name, one in self.laws.items() if one.share}
        logs = {name: math.log(float(one.fit.predict(inputs))) for name, one in kept.items()}
        middle = sum(kept[name].share * value for name, value in logs.items())
        between = sum(kept[name].share * (value - middle) ** 2 for name, value in logs.items())
        within = sum(one.share * _deviation(one.fit, inputs) ** 2 for one in kept.values())
        found = {**inputs, "predicted_loss": math.exp(middle), "low": None, "high": None}
        beyond = next(iter(kept.values())).fit.extrapolation(inputs)
        if len(self.errors):
            of_errors = quantile(np.abs(self.errors)) * max(1.0, self._farther(inputs))
            half = max(of_errors, 1.96 * math.sqrt(between + within))
            found |= {"low": math.exp(middle - half), "high": math.exp(middle + half)}
        return {**found, "extrapolation": beyond}

    def _farther(self, inputs: Mapping[str, float]) -> float:
        """ln of the factor in compute beyond the fitted runs, by that of the farthest error."""
        most = max(one.fit.largest.get("flops", math.inf) for one in self.laws.values())
        factor = float(with_ratios(inputs)["flops"]) / most
        return math.log(max(factor, 1.0)) / math.log(max(float(np.max(self.reach)), 1.1))

    def records(self) -> list[dict[str, Any]]:
        """The laws as flat rows, the one with the largest share first."""
        least = min((one.aicc for one in self.laws.values() if one.aicc is not None), default=0.0)
        ordered = sorted(self.laws.items(), key=lambda pair: (-pair[1].share, pair[1].forward_error or math.inf))
        return [
            {
                "law": name,
                "parameters": len(one.fit.params) - len(one.fit.fixed),
                "above_least_aicc": None if one.aicc is None else one.aicc - least,
                "error_of_left_out_sizes": one.size_error,
                "error_of_dearer_runs": one.forward_error,
                "share": one.share,
            }
            for name, one in ordered
        ]

    def record(self) -> dict[str, Any]:
        """What `selection_from_record` needs, and the laws side by side."""
        return {
            "laws": self.records(),
            "reason": self.reason,
            "calibrated": self.calibrated,
            "errors_of_dearer_runs": self.errors.tolist(),
            "reach_of_errors": self.reach.tolist(),
            "fits": {name: asdict(one.fit) for name, one in self.laws.items()},
        }


def selection_from_record(record: Mapping[str, Any]) -> Selection:
    """A comparison from the output of `Selection.record`. Raises as `fitted.from_record` does."""
    errors, reach = (np.array(record[key], float) for key in ("errors_of_dearer_runs", "reach_of_errors"))
    if errors.ndim != 1 or (len(errors) and errors.shape != reach.shape) or not np.isfinite([*errors, *reach]).all():
        raise ValueError("errors_of_dearer_runs and reach_of_errors are damaged")
    laws = {
        one["law"]: Compared(
            from_record(record["fits"][one["law"]]),
            one["above_least_aicc"],
            one["error_of_left_out_sizes"],
            one["error_of_dearer_runs"],
            float(one["share"]),
        )
        for one in record["laws"]
    }
    if any(name not in candidates() or one.fit.law != name for name, one in laws.items()):
        raise ValueError(f"a comparison is of {', '.join(candidates())}")
    if not math.isclose(sum(one.share for one in laws.values()), 1) or min(one.share for one in laws.values()) < 0:
        raise ValueError("the shares are damaged")
    return Selection(laws, record["reason"], errors, reach)


def quantile(sizes: np.ndarray, level: float = LEVEL) -> float:
    """The smallest of the values with at least (k + 1) `level` values up to it: with k exchangeable errors, one more is
    at most this with that probability (split conformal prediction, Lei et al. 2018, JASA 113:1094). The largest value
    if there are too few."""
    ordered = np.sort(sizes)
    return float(ordered[min(math.ceil((len(ordered) + 1) * level), len(ordered)) - 1])


def compare(fits: Mapping[str, Fit], problems: Mapping[str, Problem], flops: Sequence[float]) -> Selection:
    """Compare laws that were fitted to the same runs. flops: the compute of each run.

    Raises UserError if no law has a finite value for every run.
    """
    if not fits:
        raise UserError("no law can be fitted to these rows")
    any_problem = next(iter(problems.values()))
    sizes_of, runs = any_problem.inputs["n_params"], any_problem.runs
    compute = np.asarray(flops, float)
    whole = compute if runs is None else _of_whole_run(compute, runs)
    cuts = _origins(compute, whole, sizes_of, runs, max(len(one.free) for one in problems.values()) + SPARE)
    tests = [_ahead(compute, whole, cut) for cut in cuts]
    if sum(_count(test, runs) for test in tests) < LEAST:
        cuts, tests = [], []
    folds = _left_out_sizes(sizes_of)
    below = [whole <= cut for cut in cuts]
    ahead = {name: errors_of(one, fits[name], below, tests) for name, one in problems.items()}
    sizes = {name: errors_of(one, fits[name], [~fold for fold in folds], folds) for name, one in problems.items()}
    forward, sized = (
        {
            name: mean_error(
                _joined([_mean_of_runs(np.abs(one), test, runs) for one, test in zip(found, left, strict=True)])
            )
            for name, found in errors.items()
        }
        for errors, left in ((ahead, tests), (sizes, folds))
    )
    aicc = {name: aicc_of(fits[name], problems[name]) if runs is None else None for name in fits}
    shares, reason = _shares(forward, aicc if runs is None else sized, "AICc" if runs is None else SIZE_ERROR)
    kept = [name for name in fits if shares[name]]
    ends = [_last_of_runs(test, runs, compute) for test in tests]
    errors = [
        np.sum([shares[name] * ahead[name][place] for name in kept], axis=0)[ends[place]] for place in range(len(cuts))
    ]
    return Selection(
        laws={name: Compared(fits[name], aicc[name], sized[name], forward[name], shares[name]) for name in fits},
        reason=reason,
        errors=_joined(errors) if np.isfinite(list(map(np.sum, errors))).all() else np.array([]),
        reach=_joined([compute[test][end] / cut for test, end, cut in zip(tests, ends, cuts, strict=True)]),
    )


def _origins(
    compute: np.ndarray, whole: np.ndarray, sizes: np.ndarray, runs: np.ndarray | None, least: int
) -> list[float]:
    """Values of the compute of whole runs up to which enough runs lie, and beyond which some lie within reach. Enough
    are `least` rows; points of training curves must also be of FEWEST_RUNS runs and of as many sizes."""
    ordered = np.sort(whole if runs is None else whole[_last_of_runs(np.full(len(whole), True), runs, compute)])
    cuts = dict.fromkeys(float(ordered[round(share * len(ordered)) - 1]) for share in ORIGINS)

    def enough(below: np.ndarray) -> bool:
        few = runs is not None and min(len(np.unique(runs[below])), len(np.unique(sizes[below]))) < FEWEST_RUNS
        return not few and np.sum(below) >= least

    return [cut for cut in cuts if enough(whole <= cut) and np.any(_ahead(compute, whole, cut))]


def _ahead(compute: np.ndarray, whole: np.ndarray, cut: float) -> np.ndarray:
    """The rows of dearer runs that lie within reach of `cut`."""
    return (whole > cut) & (compute > cut) & (compute <= REACH * cut)


def _of_whole_run(compute: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """The compute of the last point of the run of each point."""
    _, run = np.unique(runs, return_inverse=True)
    most = np.zeros(run.max() + 1)
    np.maximum.at(most, run, compute)
    return most[run]


def _count(test: np.ndarray, runs: np.ndarray | None) -> int:
    """The number of runs among the rows of a test."""
    return int(np.sum(test)) if runs is None else len(np.unique(runs[test]))


def _mean_of_runs(errors: np.ndarray, test: np.ndarray, runs: np.ndarray | None) -> np.ndarray:
    """The mean error of each run of a test, from the errors of its rows."""
    if runs is None or not len(errors):
        return errors
    _, run, points = np.unique(runs[test], return_inverse=True, return_counts=True)
    return np.bincount(run, errors) / points


def _last_of_runs(test: np.ndarray, runs: np.ndarray | None, compute: np.ndarray) -> np.ndarray:
    """The places, among the rows of a test, of the last point of each run; of all rows if each is a run."""
    if runs is None:
        return np.arange(np.sum(test))
    last = {run: place for place, run in sorted(enumerate(runs[test]), key=lambda one: compute[test][one[0]])}
    return np.array(sorted(last.values()), int)


def _left_out_sizes(sizes: np.ndarray) -> list[np.ndarray]:
    """For each size, or each group of neighbouring sizes, which runs have it; empty for fewer than three sizes."""
    distinct = np.unique(sizes)
    groups = np.array_split(distinct, min(len(distinct), MOST_SIZES))
    return [np.isin(sizes, group) for group in groups] if len(distinct) >= 3 else []


def errors_of(
    problem: Problem, fit: Fit, fitted: Sequence[np.ndarray], tests: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """ln(predicted/observed) of the runs of each test, by a fit to the runs of `fitted`."""
    if not fitted:
        return []
    thetas = refitted(problem, np.stack([np.asarray(one, float) for one in fitted]), fit.params, STARTS)
    logs = np.log(problem.predicted(thetas) / problem.observed)
    return [np.where(np.isfinite(row[test]), row[test], np.inf) for row, test in zip(logs, tests, strict=True)]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def mean_error(sizes: np.ndarray) -> float | None:
    """The mean; None if there is none or it is not finite."""
    return float(np.mean(sizes)) if len(sizes) and np.isfinite(sizes).all() else None


def aicc_of(fit: Fit, problem: Problem) -> float | None:
    """Akaike's criterion of a fit with Laplace's distribution; None if there are too few rows."""
    n, free = len(problem.observed), len(problem.free) + 1
    if n - free - 1 <= 0:
        return None
    off = float(np.mean(np.abs(np.log(problem.law.predict(fit.params, problem.inputs) / problem.observed))))
    return 2 * n * math.log(max(off, 1e-15)) + 2 * free + 2 * free * (free + 1) / (n - free - 1)


def _shares(
    forward: Mapping[str, float | None], otherwise: Mapping[str, float | None], named: str
) -> tuple[dict[str, float], str]:
    """Shares in the average, and the reason for them. otherwise: what decides without errors of dearer runs, by the
    name `named`; the least is the best."""
    known = {name: error for name, error in forward.items() if error is not None}
    none = dict.fromkeys(forward, 0.0)
    if not known:
        judged = {name: value for name, value in otherwise.items() if value is not None}
        if not judged:
            first = next(iter(forward))
            return none | {first: 1.0}, f"{first}, the first: there are too few runs to compare laws"
        best = min(judged, key=judged.__getitem__)
        return none | {
            best: 1.0
        }, f"{best} has the least {named}; there are too few runs to predict dearer ones from cheaper"
    ordered = sorted(known, key=known.__getitem__)
    least = known[ordered[0]]
    kept = [name for name in ordered if known[name] <= ALIKE * least]
    weights = {name: max(known[name], 1e-12) ** -2 for name in kept}
    shares = none | {name: weight / sum(weights.values()) for name, weight in weights.items()}
    if len(kept) > 1:
        listed = ", ".join(f"{name} {known[name]:.2%}" for name in kept)
        return shares, f"no clear choice, the prediction is an average: errors of dearer runs are {listed}"
    others = f"; the next, {ordered[1]}, has {known[ordered[1]]:.2%}" if len(ordered) > 1 else ""
    return shares, f"{ordered[0]} predicts dearer runs best, to {least:.2%} in the mean{others}"


def _deviation(fit: Fit, inputs: Mapping[str, float]) -> float:
    """The standard deviation of the logarithms of a fit's resampled predictions; 0 without resamples."""
    if not fit.draws:
        return 0.0
    draws = {name: np.array([draw[name] for draw in fit.draws]) for name in fit.params}
    logs = np.log(LAWS[fit.law].predict(draws, {key: np.asarray(value) for key, value in inputs.items()}))
    return float(np.std(logs[np.isfinite(logs)]))
