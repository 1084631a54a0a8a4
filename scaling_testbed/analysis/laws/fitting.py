"""Fit a law to runs, with many starts, exact gradients, bootstrap intervals over runs, and warnings about the fit.

Objectives:

- `huber_log`: the sum of Huber's function of ln(predicted) - ln(observed), with a delta of 1e-3 by default (Hoffmann et
  al. 2022, arXiv 2203.15556, section 3.3).
- `lsq`: the sum of squares of predicted - observed.
- `lsq_log`: the sum of squares of ln(predicted) - ln(observed).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit, with_ratios
from scaling_testbed.analysis.laws.forms import HUBER, LSQ, LSQ_LOG, Law, Param
from scaling_testbed.analysis.laws.slopes import Sloped
from scaling_testbed.analysis.laws.solver import AT_ONCE, minimise
from scaling_testbed.errors import ConfigError, UserError

DELTA = 1e-3
RESAMPLES = 2000
OBJECTIVES = (HUBER, LSQ, LSQ_LOG)
SAME_OPTIMUM = 1e-6  # relative difference of objectives: below it, a start reached the best optimum
NEAR_OPTIMUM = 0.05  # relative difference of objectives: below it, a warning names the other optimum
FLAT = 1e-10  # relative singular value of the scaled slopes: below it, the rows do not determine this direction
FEWEST_RUNS = 3  # with fewer, resamples of runs are only the runs themselves
LOOSE = 0.02  # share of a starting range: a smaller error is never large, even where the value is near zero


@dataclass(frozen=True)
class Problem:
    """A law with some parameters fixed, and the rows to fit.

    weights: of each row in the objective. A vector theta holds the free parameters: the logarithm of each parameter
    with `log` set, the value of the others. Every function takes several of them at once: theta is [..., n_free], and
    residuals are [..., n_rows]. runs: the run of each row, where rows are points of training curves; None: each row is
    a run.
    """

    law: Law
    inputs: dict[str, np.ndarray]
    observed: np.ndarray
    objective: str
    fixed: dict[str, float]
    delta: float = DELTA
    weights: np.ndarray | float = 1.0
    runs: np.ndarray | None = None

    @property
    def n_runs(self) -> int:
        return len(self.observed) if self.runs is None else len(np.unique(self.runs))

    @property
    def free(self) -> list[Param]:
        return [param for param in self.law.params if param.name not in self.fixed]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest theta."""
        low, high = zip(*(_ends(param, param.low, param.high) for param in self.free), strict=True)
        return np.array(low), np.array(high)

    @property
    def widths(self) -> np.ndarray:
        """Widths of the starting ranges: the unit of the distance between two optima."""
        ends = [_ends(param, *param.start) for param in self.free]
        return np.array([high - low for low, high in ends])

    def params(self, theta: np.ndarray) -> dict[str, Any]:
        """The value of each parameter by name: an array of theta's shape without its last axis."""
        theta = np.asarray(theta)
        values = {param.name: theta[..., place] for place, param in enumerate(self.free)}
        return self.fixed | {param.name: np.exp(values[param.name]) if param.log else values[param.name]
                             for param in self.free}  # fmt: skip

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Predicted - observed for `lsq`, the difference of logarithms otherwise; inf where the law has no value."""
        return self._apart(self.predicted(theta))

    def predicted(self, theta: np.ndarray) -> np.ndarray:
        """The law's output for each row."""
        params = {name: np.asarray(value)[..., None] for name, value in self.params(theta).items()}
        found = self.law.predict(params, self.inputs)
        return np.broadcast_to(found, (*np.shape(theta)[:-1], len(self.observed)))

    def linearised(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals and d residuals / d theta [..., n_rows, n_free] from one evaluation, exact up to rounding."""
        theta, names = np.asarray(theta), [param.name for param in self.free]
        params: dict[str, Any] = dict(self.fixed)
        for param, value in zip(self.free, np.moveaxis(theta, -1, 0)[..., None], strict=True):
            value = np.exp(value) if param.log else value
            params[param.name] = Sloped(value, {param.name: value if param.log else np.ones_like(value)})
        found = self.law.predict(params, self.inputs)
        shape = (*theta.shape[:-1], len(self.observed))
        predicted, slopes = np.broadcast_to(np.real(found), shape), np.zeros((*shape, len(names)))
        for name, slope in (found.slopes if isinstance(found, Sloped) else {}).items():
            slopes[..., names.index(name)] = slope
        with np.errstate(all="ignore"):
            return self._apart(predicted), slopes if self.objective == LSQ else slopes / predicted[..., None]

    def _apart(self, predicted: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = predicted - self.observed if self.objective == LSQ else np.log(predicted / self.observed)
        return np.where(np.isfinite(found), found, np.inf)

    def total(self, residuals: np.ndarray, counts: np.ndarray | float = 1.0) -> np.ndarray:
        """The objective. counts: how often each row counts."""
        counts = counts * self.weights
        if self.objective != HUBER:
            return np.sum(counts * residuals**2, axis=-1)
        size = np.abs(residuals)
        inner = np.minimum(size, self.delta)
        return np.sum(counts * inner * (size - 0.5 * inner), axis=-1)

    def derivatives(self, residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first derivative of a row's part of the objective in its residual, the second one, and the factor of
        the residual in the first, which replaces the second in iteratively reweighted least squares."""
        if self.objective != HUBER:
            two = np.full(residuals.shape, 2.0) * self.weights
            return two * residuals, two, two
        inside = np.abs(residuals) <= self.delta
        reweighted = np.where(inside, 1.0, self.delta / np.maximum(np.abs(residuals), 1e-300)) * self.weights
        return residuals * reweighted, np.where(inside, 1.0, 0.0) * self.weights, reweighted

    def value(self, theta: np.ndarray) -> float:
        """The objective at one theta."""
        return float(self.total(self.residuals(theta)))


def fit(
    law: Law,
    inputs: Mapping[str, Sequence[float]],
    observed: Sequence[float],
    *,
    objective: str | None = None,
    delta: float = DELTA,
    fixed: Mapping[str, float] | None = None,
    starts: int = 64,
    bootstrap: int = RESAMPLES,
    seed: int = 0,
    size: str = "n_params",
    errors: Sequence[float] | None = None,
    strata: Sequence[float] | None = None,
    runs: Sequence[str] | None = None,
) -> Fit:
    """Fit `law` to the inputs and observed outputs of runs: one finite positive number for each run. With `lsq` an
    output may be zero.

    delta: where Huber's function turns linear. errors: the standard errors of the logarithms of the outputs, if they
    are known: each output weighs by the inverse square of its own, and intervals follow from them. strata: the group of
    each run; a resample has as many runs of each group as there are. runs: the run of each value, where the values are
    points of training curves: each run then has the same weight, and the resamples are of whole runs. Raises
    ConfigError for an unknown objective or fixed parameter. Raises UserError if there are fewer runs than free
    parameters, or if no start leads to an optimum.
    """
    problem = problem_of(law, inputs, observed, objective, fixed, delta, runs)
    if errors is not None:
        problem = replace(problem, weights=np.asarray(errors, float) ** -2.0)
    rng = np.random.default_rng(seed)
    solutions = _solutions(problem, _starts(problem, starts, rng))
    if not solutions:
        raise UserError(f"{law.name}: no start of {starts} leads to an optimum; are the units right? {law.formula}")
    best, theta = solutions[0]
    reached = sum(_as_good(value, best) for value, _ in solutions)
    optima = _distinct(problem, solutions)
    if errors is None:
        draws = _resampled(problem, optima, bootstrap, rng, strata)
    else:
        draws = _by_errors(problem, optima, bootstrap, rng)
    seen = with_ratios(problem.inputs)
    linearised = _errors_of_all(problem, [other for value, other in optima if _as_good(value, best)])
    told = [param.name for param, free in zip(problem.free, linearised.undetermined, strict=True) if not free]
    warnings = [
        *([] if errors is not None and draws else _too_few(problem, bootstrap)),
        *_seldom(reached, starts),
        *_at_bounds(problem, theta),
        *_several(problem, optima),
        *_undetermined(problem, linearised),
        *_unidentified(problem, theta, linearised),
    ]
    return Fit(
        law=law.name,
        params=_named(problem, theta),
        ci95=_intervals(told, problem, draws),
        objective={
            "name": problem.objective,
            "value": best,
            **({"delta": delta} if problem.objective == HUBER else {}),
            **({} if errors is None else {"by_errors": True}),
        },
        n_rows=len(problem.observed),
        starts={"tried": starts, "reached_best": reached},
        warnings=warnings,
        fixed=dict(problem.fixed),
        optima=[{"objective": value, "params": _named(problem, other)} for value, other in optima[1:]],
        largest={key: float(np.max(values)) for key, values in seen.items()},
        smallest={key: float(np.min(values)) for key, values in seen.items()},
        residuals=[float(one) for one in problem.residuals(theta)],
        draws=[_named(problem, one) for one in draws],
        size=size,
        fitted_inputs={key: values.tolist() for key, values in problem.inputs.items()},
        n_runs=None if runs is None else problem.n_runs,
    )


def _as_good(value: float, best: float) -> bool:
    return value <= best * (1 + SAME_OPTIMUM) + 1e-18


def problem_of(
    law: Law,
    inputs: Mapping[str, Sequence[float]],
    observed: Sequence[float],
    objective: str | None = None,
    fixed: Mapping[str, float] | None = None,
    delta: float = DELTA,
    runs: Sequence[str] | None = None,
) -> Problem:
    """The problem of a fit. Raises as `fit` does."""
    objective = objective or law.objective
    fixed = {one.name: _middle(inputs[one.centre]) for one in law.params if one.centre} | dict(fixed or {})
    if objective not in OBJECTIVES:
        raise ConfigError(f"--objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    known = [param.name for param in law.params]
    for name in fixed:
        if name not in known:
            raise ConfigError(f"{law.name} has no parameter {name!r}; it has {', '.join(known)}")
    for param in law.params:
        value = fixed.get(param.name, param.low)
        if not param.low <= value <= param.high:
            raise ConfigError(f"{param.name} must be between {param.low:g} and {param.high:g}; got {value:g}")
    arrays = {key: np.asarray(inputs[key], float) for key in law.inputs}
    problem = Problem(law, arrays, np.asarray(observed, float), objective, fixed, delta)
    if runs is not None:
        problem = replace(problem, runs=np.asarray(runs), weights=weights_of_runs(runs))
    if problem.objective != LSQ and (problem.observed == 0).any():
        zeros = int(np.sum(problem.observed == 0))
        raise UserError(
            f"{law.name}: {law.output} is 0 in {zeros} rows and has no logarithm; use --objective {LSQ}, or "
            f'--where "{law.output}>0"'
        )
    if not problem.free:
        raise ConfigError(f"{law.name}: every parameter is fixed, so there is nothing to fit")
    if len(problem.observed) < len(problem.free):
        raise UserError(
            f"{law.name} has {len(problem.free)} free parameters, but there are {len(problem.observed)} rows to fit"
        )
    return problem


def weights_of_runs(runs: Sequence[str] | np.ndarray) -> np.ndarray:
    """The weight of each point of several runs, 1 on average: the points of a run share the weight of the run."""
    _, run, points = np.unique(runs, return_inverse=True, return_counts=True)
    return len(run) / len(points) / points[run]


def _middle(values: Sequence[float]) -> float:
    """The geometric mean, to three digits."""
    return float(f"{math.exp(np.mean(np.log(np.asarray(values, float)))):.3g}")


def _named(problem: Problem, theta: np.ndarray) -> dict[str, float]:
    values = problem.params(theta)
    return {param.name: float(values[param.name]) for param in problem.law.params}


def _ends(param: Param, low: float, high: float) -> tuple[float, float]:
    return (math.log(low), math.log(high)) if param.log else (low, high)


def _starts(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """Starts [count, n_free], drawn uniformly from the starting ranges."""
    low, high = zip(*(_ends(param, *param.start) for param in problem.free), strict=True)
    return rng.uniform(low, high, size=(count, len(problem.free)))


def _solutions(problem: Problem, starts: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Objective and theta of the minimum that each start reaches, the best first.

    Huber's sum is close to a sum of absolute values. Far from the optimum, descent on it is slow and stops at its
    kinks. So every second start first minimises the squares of the logarithms. The other starts minimise Huber's sum
    directly, so that not all starts end in the basin of the least squares.
    """
    found = zip(*minimise(problem, _from_squares(problem, starts)), strict=True)
    return sorted(((float(value), theta) for value, theta in found if math.isfinite(value)), key=lambda pair: pair[0])


def _from_squares(problem: Problem, starts: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    if problem.objective != HUBER:
        return starts
    starts, squares = starts.copy(), replace(problem, objective=LSQ_LOG)
    values, thetas = minimise(squares, starts[::2], None if counts is None else counts[::2], 1e-8)
    starts[::2] = np.where(np.isfinite(values)[:, None], thetas, starts[::2])
    return starts


def refitted(problem: Problem, counts: np.ndarray, params: Mapping[str, float], starts: int) -> np.ndarray:
    """The best theta [B, n_free] for each of several weightings of the rows [B, n_rows]; nan where there is none. Each
    is the best of `starts` random starts and of the one from `params`."""
    own = [math.log(params[one.name]) if one.log else params[one.name] for one in problem.free]
    drawn = np.vstack([_starts(problem, starts, np.random.default_rng(0)), own])
    weights = np.repeat(counts, len(drawn), axis=0)
    begun = _from_squares(problem, np.tile(drawn, (len(counts), 1)), weights)
    return _best_of_each(problem, begun, weights, len(drawn))


def _best_of_each(problem: Problem, starts: np.ndarray, counts: np.ndarray, each: int) -> np.ndarray:
    """The best theta of each group of `each` descents; nan where none leads to an optimum."""
    values, thetas = minimise(problem, starts, counts, 1e-10)
    values, thetas = values.reshape(-1, each), thetas.reshape(-1, each, starts.shape[1])
    best = np.argmin(values, axis=1)[:, None]
    found = np.take_along_axis(thetas, best[:, :, None], axis=1)[:, 0]
    return np.where(np.isfinite(np.take_along_axis(values, best, axis=1)), found, math.nan)


def _distinct(problem: Problem, solutions: Sequence[tuple[float, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """The best optimum, followed by distinct optima of nearly equal objective; at most five in all."""
    kept: list[tuple[float, np.ndarray]] = []
    width = problem.widths
    for value, theta in solutions:
        near = value <= solutions[0][0] * (1 + NEAR_OPTIMUM) + 1e-18
        elsewhere = all(np.max(np.abs(theta - other) / width) > 0.01 for _, other in kept)
        if near and elsewhere and not _same_valley(problem, theta, value, kept):
            kept.append((value, theta))
    return kept[:5]


def _same_valley(problem: Problem, theta: np.ndarray, value: float, kept) -> bool:
    """Whether the straight line to a kept optimum crosses no ridge: then theta is an unfinished descent to it."""
    for other_value, other in kept:
        way = [problem.value(theta + t * (other - theta)) for t in np.linspace(0.05, 0.95, 19)]
        if max(way) <= max(value, other_value) * (1 + SAME_OPTIMUM):
            return True
    return False


def _resampled(
    problem: Problem, optima, count: int, rng: np.random.Generator, strata: Sequence[float] | None
) -> list[np.ndarray]:
    """theta of each bootstrap resample of the runs, refitted from `optima`; empty if there are too few of them."""
    n, free = len(problem.observed), len(problem.free)
    if count == 0 or n - free < 2 or problem.n_runs < FEWEST_RUNS:
        return []
    run = np.arange(n) if problem.runs is None else np.unique(problem.runs, return_inverse=True)[1].ravel()
    varied = [one for one in problem.inputs.values() if problem.runs is not None and np.ptp(one) > 0]
    places = np.unique(np.stack(list(problem.inputs.values())), axis=1, return_inverse=True)[1].ravel()
    if len(np.unique(places)) <= free:
        return []
    starts, found = np.array([theta for _, theta in optima]), []
    codes = np.zeros(n) if strata is None else np.asarray(strata)
    parts = [np.flatnonzero(codes == one) for one in np.unique(codes)]
    together = max(1, AT_ONCE // (n * len(starts)))  # resamples at a time, for the memory's sake
    for begin in range(0, count, together):
        counts = np.empty((min(together, count - begin), n))
        for resample in counts:
            while True:
                if problem.runs is None:
                    resample[:] = np.bincount(_drawn(parts, rng), minlength=n)
                else:
                    drawn = rng.integers(problem.n_runs, size=problem.n_runs)
                    resample[:] = np.bincount(drawn, minlength=problem.n_runs)[run]
                rows = resample > 0
                # No more distinct points than parameters is an exact fit; one size of model says nothing about size.
                if len(np.unique(places[rows])) > free and all(np.ptp(values[rows]) > 0 for values in varied):
                    break
        each, weights = np.tile(starts, (len(counts), 1)), np.repeat(counts, len(starts), axis=0)
        found += list(_best_of_each(problem, each, weights, len(starts)))
    return [theta for theta in found if np.isfinite(theta).all()]


def _by_errors(problem: Problem, optima, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """theta for `count` draws of outputs with the known errors, by the slopes at the optimum; empty without degrees of
    freedom. Where residuals are larger than the errors explain, the draws are wider by this factor, as Birge 1932
    (Physical Review 40:207) has it, and follow Student's t."""
    theta = optima[0][1]
    residuals, slopes = problem.linearised(theta)
    freedom = len(residuals) - len(theta)
    if count == 0 or freedom < 1 or not np.isfinite(slopes).all():
        return []
    root = np.sqrt(problem.weights)
    birge = max(1.0, math.sqrt(float(np.sum((root * residuals) ** 2)) / freedom))
    noise = (
        rng.standard_normal((count, len(residuals))) if birge == 1 else rng.standard_t(freedom, (count, len(residuals)))
    )
    found = theta + birge * noise @ np.linalg.pinv(root[:, None] * slopes).T
    low, high = problem.bounds
    return list(np.clip(found, low, high))


def _drawn(parts: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Rows drawn with replacement from each part, as many as it has."""
    return np.concatenate([part[rng.integers(len(part), size=len(part))] for part in parts])


def _intervals(told: Sequence[str], problem: Problem, draws) -> dict[str, tuple[float, float]] | None:
    """Intervals of the parameters that the rows determine. Draws of the others only show where descents stopped."""
    if not draws:
        return None
    named = [_named(problem, theta) for theta in draws]
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found = {name: np.quantile([one[name] for one in named], ends) for name in told}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def _too_few(problem: Problem, bootstrap: int) -> list[str]:
    n, free = len(problem.observed), len(problem.free)
    if problem.runs is not None:
        if problem.n_runs < FEWEST_RUNS:
            return [f"the points are of {problem.n_runs} runs: too few for an interval, which resamples whole runs"]
        few = bootstrap and problem.n_runs - free < free
        return [f"{problem.n_runs} runs for {free} parameters: intervals from so few may be too narrow"] if few else []
    if n - free >= 2 and len({tuple(row) for row in np.stack(list(problem.inputs.values())).T}) > free:
        few = bootstrap and n - free < free
        return [f"{n} rows for {free} parameters: intervals from so few are too narrow"] if few else []
    return [f"{n} rows for {free} parameters: too few for an interval" + ("" if bootstrap else ", and none was asked")]


def _seldom(reached: int, starts: int) -> list[str]:
    if reached > 1 or starts == 1:
        return []
    return [f"one start of {starts} reached the best optimum; raise --starts to see whether there is a better one"]


def _at_bounds(problem: Problem, theta: np.ndarray) -> list[str]:
    said = []
    for param, value in zip(problem.free, theta, strict=True):
        for end, bound in zip(("lower", "upper"), (param.low, param.high), strict=True):
            at = _ends(param, bound, bound)[0] if math.isfinite(bound) else math.inf
            if math.isfinite(at) and abs(value - at) < 1e-6 * max(1.0, abs(at)):
                said.append(f"{param.name} is at its {end} bound {bound:g}")
    return said


def _several(problem: Problem, optima) -> list[str]:
    if len(optima) < 2:
        return []
    best = optima[0][0]
    # The objective of an exact fit is rounding error, and may be zero.
    more = [0.0 if _as_good(value, best) else value / best - 1 for value, _ in optima]
    named = [_spelled(_named(problem, theta)) for _, theta in optima]
    listed = "; ".join(f"{name} (+{part:.2%})" for name, part in zip(named[1:], more[1:], strict=True))
    return [f"other optima of near-equal objective: {listed}"]


def _spelled(params: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in params.items())


@dataclass(frozen=True)
class Errors:
    """Linearised standard errors of theta and of the predictions at the fitted rows; nan without degrees of freedom.

    undetermined: for each parameter, whether it can change, alone or together with others, without a change of any
    fitted prediction. Its standard error is then nan.
    """

    theta: np.ndarray
    predictions: np.ndarray
    undetermined: np.ndarray


def standard_errors(problem: Problem, theta: np.ndarray) -> Errors:
    """Standard errors from the slopes at the optimum.

    The errors of predictions are relative, except for `lsq`. Huber's function is treated as reweighted squares.
    """
    residuals, jacobian = problem.linearised(theta)
    weights = problem.derivatives(residuals)[2] / (1 if problem.objective == HUBER else 2)
    widths = problem.widths
    if not np.isfinite(jacobian).all():
        return Errors(np.full(len(theta), math.nan), np.full(len(residuals), math.nan), np.zeros(len(theta), bool))
    _, singular, ways = np.linalg.svd(np.sqrt(weights)[:, None] * jacobian * widths, full_matrices=True)
    singular = np.pad(singular, (0, len(theta) - len(singular)))
    flat = singular <= FLAT * singular.max(initial=0.0)
    undetermined = (np.abs(ways[flat]) > 1e-3).any(axis=0) if flat.any() else np.zeros(len(theta), bool)
    freedom = len(residuals) - int(np.sum(~flat))
    variance = float(np.sum(weights * residuals**2)) / freedom if freedom > 0 else math.nan
    spread = ways[~flat].T / singular[~flat]
    of_theta = math.sqrt(variance) * np.linalg.norm(spread, axis=1) * widths
    of_predictions = math.sqrt(variance) * np.linalg.norm((jacobian * widths) @ spread, axis=1)
    return Errors(np.where(undetermined, math.nan, of_theta), of_predictions, undetermined)


def _errors_of_all(problem: Problem, optima: Sequence[np.ndarray]) -> Errors:
    """Standard errors at the first of several equally good optima.

    A parameter is undetermined if it is so at any of the optima. Example: the rows determine E + A only. At an optimum
    with A = 0, E looks determined; at one with A > 0 it does not. Rounding decides which of them is the first.
    """
    first, *others = [standard_errors(problem, theta) for theta in optima]
    free = np.any([errors.undetermined for errors in (first, *others)], axis=0)
    return Errors(np.where(free, math.nan, first.theta), first.predictions, free)


def _undetermined(problem: Problem, errors: Errors) -> list[str]:
    names = [param.name for param, free in zip(problem.free, errors.undetermined, strict=True) if free]
    if not names:
        return []
    what = "is" if len(names) == 1 else "are"
    return [
        f"{', '.join(names)} {what} not determined by these rows: other values fit equally well. Predictions for "
        "inputs that vary in another way are not determined either"
    ]


def _unidentified(problem: Problem, theta: np.ndarray, errors: Errors) -> list[str]:
    """A warning about parameters whose standard error is a factor of two or half their value: a flat valley."""
    loose = []
    for param, value, error, width in zip(problem.free, theta, errors.theta, problem.widths, strict=True):
        if param.log and error > math.log(2):
            loose.append(f"{param.name} (a factor of {math.exp(min(error, 50)):.2g})")
        elif not param.log and error > max(0.5 * abs(value), LOOSE * width):
            loose.append(f"{param.name} (±{error:.2g})")
    if not loose:
        return []
    unit = "" if problem.objective == LSQ else " relative"
    return [
        f"a flat valley: one standard error moves {', '.join(loose)}, and the predictions at the fitted rows by at "
        f"most {np.max(errors.predictions):.2g}{unit}: trust these, not the parameters"
    ]
