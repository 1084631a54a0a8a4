"""Descents that are computed together reach what a solver of scipy reaches one by one."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from scaling_testbed.analysis.laws import solver
from scaling_testbed.analysis.laws.fitting import HUBER, LSQ, LSQ_LOG, Problem, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.solver import minimise
from tests.analysis.laws.planted import observations

NAMES = ("chinchilla", "over_training", "kaplan_nd")


def spoiled(name, scale=0.01, seed=0):
    """Observations with noise of heavy tails, as losses of runs have it."""
    inputs, observed = observations(name)
    return inputs, observed * np.exp(scale * np.random.default_rng(seed).standard_t(3, len(observed)))


def one_by_one(problem, starts, counts):
    """The objective that L-BFGS-B reaches from each start, with gradients by differences of the definition."""
    found = []
    for start, count in zip(starts, counts, strict=True):
        unit = problem.delta**2 if problem.objective == HUBER else 1.0

        def value(theta, count=count, unit=unit):
            residuals, slopes = problem.linearised(theta)
            pull = count * problem.derivatives(residuals)[0]
            return problem.total(residuals, count) / unit, pull @ slopes / unit

        options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-16, "gtol": 1e-12}
        ends = np.array(problem.bounds).T
        found.append(minimize(value, start, jac=True, method="L-BFGS-B", bounds=ends, options=options).fun * unit)
    return np.array(found)


@pytest.mark.parametrize("objective", [HUBER, LSQ, LSQ_LOG])
@pytest.mark.parametrize("name", NAMES)
def test_resamples_reach_the_optimum_of_another_solver(name, objective):
    inputs, observed = spoiled(name)
    problem = Problem(LAWS[name], inputs, observed, objective, {})
    _, theta = minimise(problem, np.array([np.mean([_ends(p) for p in problem.free], axis=1)]))
    rng, n = np.random.default_rng(1), len(observed)
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(8)])
    starts = np.repeat(theta, 8, axis=0)
    values, thetas = minimise(problem, starts, counts)
    other = one_by_one(problem, starts, counts)
    assert (values <= other * (1 + 1e-8)).all(), values / other - 1
    np.testing.assert_allclose(problem.total(problem.residuals(thetas), counts), values, rtol=1e-12)


def _ends(param):
    return [math.log(one) if param.log else one for one in param.start]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("chinchilla", 63), ("over_training", 64), ("kaplan_nd", 44)],
)
def test_from_most_random_starts_the_best_optimum_is_reached(name, expected):
    inputs, observed = spoiled(name)
    found = fit(LAWS[name], inputs, observed, bootstrap=0)
    assert found.starts["reached_best"] >= expected - 8


def test_a_bound_holds_a_parameter_and_not_the_others():
    inputs, observed = spoiled("chinchilla", 1e-4)
    problem = Problem(LAWS["chinchilla"], inputs, observed - 1.75, LSQ_LOG, {})  # E would be negative
    low, _ = problem.bounds
    values, thetas = minimise(problem, np.array([[1.0, 5.0, 5.0, 0.3, 0.3]]))
    assert thetas[0, 0] == low[0] == 0
    fixed = fit(LAWS["chinchilla"], inputs, observed - 1.75, objective=LSQ_LOG, fixed={"E": 0.0}, bootstrap=0)
    assert values[0] == pytest.approx(fixed.objective["value"], rel=1e-8)


def test_a_start_without_a_value_has_none_and_the_others_go_on(monkeypatch):
    inputs, observed = spoiled("kaplan_n")
    tiny = {"n_params": inputs["n_params"] * 1e-200}
    problem = Problem(LAWS["kaplan_n"], tiny, observed, HUBER, {})
    starts = np.array([[math.log(1e60), 4.0], [math.log(1e13), 0.1]])
    values, _ = minimise(problem, starts)
    assert values[0] == math.inf and np.isfinite(values[1])
    monkeypatch.setattr(solver, "AT_ONCE", 1)  # each descent by itself
    assert minimise(problem, starts)[0].tolist() == pytest.approx(values.tolist(), rel=1e-10)
