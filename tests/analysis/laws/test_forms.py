"""Laws are what their formulas say, and their gradients are exact."""

import math

import numpy as np
import pytest

from scaling_testbed.analysis.laws.fitting import HUBER, LSQ, LSQ_LOG, Problem
from scaling_testbed.analysis.laws.forms import LAWS
from tests.analysis.laws.planted import INPUTS, PLANTED, observations


def test_every_law_has_planted_parameters_here():
    assert set(PLANTED) == set(LAWS)


@pytest.mark.parametrize("objective", [HUBER, LSQ, LSQ_LOG])
@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_those_of_finite_differences(name, objective):
    law = LAWS[name]
    inputs, observed = observations(name)
    problem = Problem(law, inputs, 1.1 * observed, objective, {})
    theta = np.array([math.log(PLANTED[name][p.name]) if p.log else PLANTED[name][p.name] for p in law.params])
    slopes = problem.linearised(theta)[1]
    for place in range(len(theta)):
        step = 1e-6 * max(1.0, abs(theta[place])) * np.eye(len(theta))[place]
        measured = (problem.residuals(theta + step) - problem.residuals(theta - step)) / (2 * step[place])
        np.testing.assert_allclose(slopes[:, place], measured, rtol=2e-5, atol=1e-8)


def test_the_gradient_of_hubers_sum_is_that_of_finite_differences():
    inputs, observed = observations("chinchilla")
    spoiled = observed * np.where(np.arange(len(observed)) % 2, 1.1, 1.0001)
    problem = Problem(LAWS["chinchilla"], inputs, spoiled, HUBER, {})
    theta = np.array([1.5, math.log(300.0), math.log(500.0), 0.33, 0.3])
    residuals, slopes = problem.linearised(theta)
    gradient = problem.derivatives(residuals)[0] @ slopes
    for place, step in enumerate(1e-7 * np.eye(5)):
        measured = (problem.value(theta + step) - problem.value(theta - step)) / 2e-7
        assert gradient[place] == pytest.approx(measured, rel=1e-4)


BY_HAND = [
    ("over_training", {"E": 1, "a": 2, "b": 3, "eta": 0.5}, {"n_params": 100, "n_tokens": 1e4}, 1 + 20.3 / 6e6**0.5),
    ("chinchilla", {"E": 1, "A": 8, "B": 27, "alpha": 0.5, "beta": 1}, {"n_params": 16, "n_tokens": 9}, 6),
    ("average_params", {"E": 1, "A": 8, "B": 27, "alpha": 0.5, "beta": 1}, {"n_params_average": 16, "n_tokens": 9}, 6),
    (
        "coupled",
        {"E": 1, "A": 8, "B": 9, "alpha": 0.5, "beta": 1, "k": 0.5},
        {"n_params": 4, "n_tokens": 3},
        1 + 7**0.5,
    ),
    ("kaplan_n", {"Nc": 81, "alpha_N": 0.5}, {"n_params": 9}, 3),
    ("kaplan_d", {"Dc": 64, "alpha_D": 0.5}, {"n_tokens": 16}, 2),
    ("kaplan_c", {"Cc": 1000, "alpha_C": 1 / 3}, {"flops": 8}, 5),
    ("kaplan_nd", {"Nc": 16, "Dc": 9, "alpha_N": 1, "alpha_D": 0.5}, {"n_params": 4, "n_tokens": 1}, 5),
    ("loss_steps", {"Nc": 81, "alpha_N": 0.5, "Sc": 8, "alpha_S": 1 / 3}, {"n_params": 9, "steps": 64}, 3.5),
    ("compute", {"E": 1, "C0": 64, "alpha": 0.5}, {"flops": 16}, 3),
    ("bivariate", {"E": 1, "alpha": 2, "p_e": 1, "p_d": 2}, {"n_params_encoder": 1e7, "n_params_decoder": 1e9}, 1.2),
    ("loss_to_error", {"epsilon": 0.9, "k": 2, "gamma": 1}, {"loss": np.log(4)}, 0.4),
    ("sigmoid", {"a": 0.5, "b": 0.25, "k": 1, "L0": 3}, {"loss": 3}, 0.5),
    ("sigmoid", {"a": 0.5, "b": 0.25, "k": 1, "L0": 3}, {"loss": 60}, 0.25),
    ("loss_to_loss", {"K": 2, "E0": 1, "kappa": 2, "E1": 0.5}, {"loss": 4}, 18.5),
    ("optimal_n", {"N0": 3, "C0": 4, "p": 0.5}, {"flops": 64}, 12),
    ("lr_power", {"lr0": 0.1, "C0": 2, "p": -0.5}, {"flops": 8}, 0.05),
    ("batch_power", {"B0": 2, "C0": 3, "p": 0.5}, {"flops": 27}, 6),
    ("optimal_lr", {"lr0": 2, "N0": 5, "p": -0.5}, {"n_params": 20}, 1),
    ("optimal_lr_nd", {"lr0": 2, "N0": 2, "D0": 3, "p": -1, "q": 0.5}, {"n_params": 8, "n_tokens": 27}, 1.5),
    ("optimal_lr_curved", {"lr0": 3, "N0": 5, "p": -1, "c": 2}, {"n_params": 5 * math.e}, 3 * math.e),
    ("optimal_batch", {"B0": 2, "D0": 3, "p": 0.5}, {"n_tokens": 27}, 6),
]


@pytest.mark.parametrize(("name", "params", "inputs", "expected"), BY_HAND)
def test_laws_have_the_values_that_a_person_finds(name, params, inputs, expected):
    """Planted data come from the law itself and follow it in its mistakes."""
    assert float(LAWS[name].predict(params, inputs)) == pytest.approx(expected, rel=1e-12)


def test_over_training_is_chinchilla_with_one_exponent():
    """Gadre et al. 2024: a M^eta C^-eta = a 6^-eta N^-2eta, b M^-eta C^-eta = b 6^-eta D^-2eta."""
    eta, a, b = 0.12, 140.0, 190.0
    tied = {"E": 1.5, "A": a * 6**-eta, "B": b * 6**-eta, "alpha": 2 * eta, "beta": 2 * eta}
    ours = LAWS["over_training"].predict({"E": 1.5, "a": a, "b": b, "eta": eta}, INPUTS["over_training"])
    np.testing.assert_allclose(ours, LAWS["chinchilla"].predict(tied, INPUTS["over_training"]), rtol=1e-13)


def test_data_constrained_is_chinchilla_where_nothing_is_repeated():
    params = PLANTED["data_constrained"]
    n, d = np.array([1e8, 3e8]), np.array([2e10, 6e10])  # N below the best size for D tokens
    inputs = {"n_params": n, "n_tokens": d, "unique_tokens": 2 * d}
    plain = {key: params[key] for key in ("E", "A", "B", "alpha", "beta")}
    expected = LAWS["chinchilla"].predict(plain, inputs)
    np.testing.assert_allclose(LAWS["data_constrained"].predict(params, inputs), expected, rtol=1e-13)
    repeated = LAWS["data_constrained"].predict(params, inputs | {"unique_tokens": d / 100})
    assert (repeated > expected * 1.001).all()


def test_data_constrained_gives_the_published_value():
    """Muennighoff et al. 2023's constants, unrounded as in their repository, for 6.34e9 parameters, 242e9 tokens, 25e9
    of them unique."""
    params = {"E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974), "alpha": 0.3526596}
    params |= {"beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}
    inputs = {"n_params": 6.34e9, "n_tokens": 242e9, "unique_tokens": 25e9}
    assert float(LAWS["data_constrained"].predict(params, inputs)) == pytest.approx(2.2256440890, abs=1e-9)


def test_the_batch_law_solves_its_equation():
    params = PLANTED["batch"]
    inputs, loss = observations("batch")
    critical = params["B_star"] / loss ** (1 / params["alpha_B"])
    size = (params["Nc"] / inputs["n_params"]) ** params["alpha_N"]
    steps = (params["Sc"] / inputs["steps"]) ** params["alpha_S"]
    right = size + steps * (1 + critical / inputs["batch_tokens"]) ** params["alpha_S"]
    np.testing.assert_allclose(loss, right, rtol=1e-12)


def test_loss_to_loss_has_a_floor():
    params = {"K": 1.0, "kappa": 0.5, "E0": 2.0, "E1": 1.0}
    assert LAWS["loss_to_loss"].predict(params, {"loss": [1.0, 6.0]}).tolist() == [1.0, 3.0]
