"""Fit a law to runs, with many starts, exact gradients, bootstrap intervals over runs, and warnings about the fit.

Objectives:

- `huber_log`: the sum of Huber's function, with delta 1e-3, of ln(predicted) - ln(observed) (Hoffmann et al. 2022,
  arXiv 2203.15556, section 3.3). It is the sum and not the mean: the small gradients of a mean stop a solver early.
- `lsq`: the sum of squares of predicted - observed.
- `lsq_log`: the sum of squares of ln(predicted) - ln(observed).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL, Fit, with_ratios
from scaling_testbed.analysis.laws.forms import HUBER, LSQ, LSQ_LOG, Law, Param
from scaling_testbed.errors import ConfigError, UserError

DELTA = 1e-3
OBJECTIVES = (HUBER, LSQ, LSQ_LOG)
SAME_OPTIMUM = 1e-6  # relative difference of objectives: below it, a start reached the best optimum
NEAR_OPTIMUM = 0.05  # relative difference of objectives: below it, a warning names the other optimum
FLAT = 1e-10  # relative singular value of the scaled slopes: below it, the rows do not determine this direction
LOOSE = 0.02  # share of a starting range: a smaller error is never large, even where the value is near zero
STEP = 1e-30  # step of complex differentiation: its square vanishes beside 1


@dataclass(frozen=True)
class Problem:
    """A law with some parameters fixed, and the rows to fit.

    A vector theta holds the free parameters: the logarithm of each parameter with `log` set, the value of the others.
    """

    law: Law
    inputs: dict[str, np.ndarray]
    observed: np.ndarray
    objective: str
    fixed: dict[str, float]

    @property
    def free(self) -> list[Param]:
        return [param for param in self.law.params if param.name not in self.fixed]

    def params(self, theta: np.ndarray) -> dict[str, Any]:
        """The value of each parameter by name. theta may have more axes after its first."""
        return self.fixed | {
            param.name: np.exp(value) if param.log else value for param, value in zip(self.free, theta, strict=True)
        }

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Predicted - observed for `lsq`, the difference of logarithms otherwise; inf where the law has no value."""
        return self._apart(self.law.predict(self.params(theta), self.inputs))

    def linearised(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals and d residuals / d theta [n_rows, n_free] from one evaluation, exact up to rounding."""
        stepped = theta[:, None, None] + 1j * STEP * np.eye(len(theta))[:, :, None]
        found = self.law.predict(self.params(stepped), self.inputs)
        found = np.broadcast_to(found, (len(theta), len(self.observed)))
        predicted, slopes = found[0].real, found.imag.T / STEP
        with np.errstate(all="ignore"):
            return self._apart(predicted), slopes if self.objective == LSQ else slopes / predicted[:, None]

    def _apart(self, predicted: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = predicted - self.observed if self.objective == LSQ else np.log(predicted / self.observed)
        return np.where(np.isfinite(found), found, np.inf)

    def value(self, theta: np.ndarray) -> float:
        """The value of the objective."""
        residuals = self.residuals(theta)
        if self.objective != HUBER:
            return float(np.sum(residuals**2))
        size = np.abs(residuals)
        return float(np.sum(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))))

    def huber_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Huber's objective divided by delta squared, so that it is near 1, and its gradient in theta."""
        residuals, jacobian = self.linearised(theta)
        scaled = residuals / DELTA
        size = np.abs(scaled)
        value = np.sum(np.where(size <= 1, 0.5 * size**2, size - 0.5))
        return float(value), np.clip(scaled, -1, 1) @ jacobian / DELTA

    def subset(self, rows: np.ndarray) -> "Problem":
        inputs = {key: values[rows] for key, values in self.inputs.items()}
        return Problem(self.law, inputs, self.observed[rows], self.objective, self.fixed)


def fit(
    law: Law,
    inputs: Mapping[str, Sequence[float]],
    observed: Sequence[float],
    *,
    objective: str | None = None,
    fixed: Mapping[str, float] | None = None,
    starts: int = 64,
    bootstrap: int = 200,
    seed: int = 0,
    size: str = "n_params",
) -> Fit:
    """Fit `law` to the inputs and observed outputs of runs: one number for each run, all finite and positive.

    Raises ConfigError for an unknown objective or fixed parameter. Raises UserError if there are fewer runs than free
    parameters, or if no start leads to an optimum.
    """
    if find_spec("scipy") is None:
        raise UserError("fitting needs scipy: pip install -e '.[analysis]'")
    problem = _problem(law, inputs, observed, objective, fixed or {})
    rng = np.random.default_rng(seed)
    solutions = _solutions(problem, _starts(problem, starts, rng))
    if not solutions:
        raise UserError(f"{law.name}: no start of {starts} leads to an optimum; are the units right? {law.formula}")
    best, theta = solutions[0]
    reached = sum(_as_good(value, best) for value, _ in solutions)
    optima = _distinct(problem, solutions)
    draws = _resampled(problem, optima, bootstrap, rng)
    seen = with_ratios(problem.inputs)
    errors = _errors_of_all(problem, [other for value, other in optima if _as_good(value, best)])
    told = [param.name for param, free in zip(problem.free, errors.undetermined, strict=True) if not free]
    warnings = [
        *_too_few(problem, bootstrap),
        *_seldom(reached, starts),
        *_at_bounds(problem, theta),
        *_several(problem, optima),
        *_undetermined(problem, errors),
        *_unidentified(problem, theta, errors),
    ]
    return Fit(
        law=law.name,
        params=_named(problem, theta),
        ci95=_intervals(told, problem, draws),
        objective={"name": problem.objective, "value": best},
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
    )


def _as_good(value: float, best: float) -> bool:
    return value <= best * (1 + SAME_OPTIMUM) + 1e-18


def _problem(law: Law, inputs, observed, objective: str | None, fixed: Mapping[str, float]) -> Problem:
    objective = objective or law.objective
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
    problem = Problem(law, arrays, np.asarray(observed, float), objective, dict(fixed))
    if not problem.free:
        raise ConfigError(f"{law.name}: every parameter is fixed, so there is nothing to fit")
    if len(problem.observed) < len(problem.free):
        raise UserError(
            f"{law.name} has {len(problem.free)} free parameters, but there are {len(problem.observed)} rows to fit"
        )
    return problem


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
    bounds = np.array([_ends(param, param.low, param.high) for param in problem.free])
    found = []
    for index, start in enumerate(starts):
        residuals, jacobian = problem.linearised(start)
        if not (np.isfinite(residuals).all() and np.isfinite(jacobian).all()):
            continue
        try:
            if problem.objective != HUBER or index % 2 == 0:
                start = _least_squares(problem, start, bounds)
            theta = _least_huber(problem, start, bounds) if problem.objective == HUBER else start
        except (ValueError, np.linalg.LinAlgError):  # a step reached a point where the law has no slope
            continue
        found.append((problem.value(theta), theta))
    return sorted((pair for pair in found if math.isfinite(pair[0])), key=lambda pair: pair[0])


def _least_squares(problem: Problem, start: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The nearest minimum of the sum of squares, found by a trust-region method with exact slopes."""
    from scipy.optimize import least_squares

    tolerance = 1e-8 if problem.objective == HUBER else 1e-12
    return least_squares(
        problem.residuals,
        start,
        lambda theta: problem.linearised(theta)[1],
        bounds.T,
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=500,
    ).x


def _least_huber(problem: Problem, start: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    options = {"maxiter": 2000, "maxfun": 3000, "ftol": 1e-15, "gtol": 1e-10}
    return minimize(problem.huber_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def _distinct(problem: Problem, solutions: Sequence[tuple[float, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """The best optimum, followed by distinct optima of nearly equal objective; at most five in all."""
    kept: list[tuple[float, np.ndarray]] = []
    width = _widths(problem)
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


def _widths(problem: Problem) -> np.ndarray:
    """Widths of the starting ranges: the unit of the distance between two optima."""
    ends = [_ends(param, *param.start) for param in problem.free]
    return np.array([high - low for low, high in ends])


def _resampled(problem: Problem, optima, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """theta of each bootstrap resample of the rows, refitted from `optima`; empty if there are too few rows."""
    n, free = len(problem.observed), len(problem.free)
    if n - free < 2:
        return []
    places = np.unique(np.stack(list(problem.inputs.values())), axis=1, return_inverse=True)[1].ravel()
    if len(np.unique(places)) <= free:
        return []
    starts = np.array([theta for _, theta in optima])
    found = []
    for _ in range(count):
        rows = rng.integers(n, size=n)
        while len(np.unique(places[rows])) <= free:  # no more distinct points than parameters: the fit would be exact
            rows = rng.integers(n, size=n)
        solved = _solutions(problem.subset(rows), starts)
        if solved:
            found.append(solved[0][1])
    return found


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
    weights = np.ones(len(residuals))
    if problem.objective == HUBER:
        weights = np.minimum(1.0, DELTA / np.maximum(np.abs(residuals), 1e-300))
    widths = _widths(problem)
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
    for param, value, error, width in zip(problem.free, theta, errors.theta, _widths(problem), strict=True):
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
