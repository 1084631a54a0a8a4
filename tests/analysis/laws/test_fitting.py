"""A fit finds planted laws, says how sure it is, and warns where it should."""

from dataclasses import asdict

import numpy as np
import pytest

from scaling_testbed.analysis.laws import fitting
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitted import Fit, from_record
from scaling_testbed.analysis.laws.fitting import DELTA, HUBER, LSQ, LSQ_LOG, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.laws.planted import CHINCHILLA, INPUTS, PLANTED, observations


def noisy(name, scale, seed=0):
    inputs, observed = observations(name)
    return inputs, observed * np.exp(np.random.default_rng(seed).normal(0, scale, len(observed)))


@pytest.mark.parametrize("name", LAWS)
def test_planted_parameters_are_found(name):
    inputs, observed = observations(name)
    found = fit(LAWS[name], inputs, observed, starts=12, bootstrap=0)
    predicted = found.predict(inputs)
    np.testing.assert_allclose(predicted, observed, rtol=1e-5)
    assert found.params == pytest.approx(PLANTED[name], rel=2e-2), found


def test_hubers_sum_is_minimised():
    """No parameter can be moved either way without the sum growing; computed here from its definition."""
    inputs, observed = noisy("chinchilla", 0.01)
    observed[3] *= 1.3
    found = fit(LAWS["chinchilla"], inputs, observed, starts=16, bootstrap=0)

    def huber(params):
        r = np.abs(np.log(LAWS["chinchilla"].predict(params, inputs)) - np.log(observed))
        return np.sum(np.where(r < DELTA, r**2 / 2, DELTA * (r - DELTA / 2)))

    assert found.objective == {"name": HUBER, "value": pytest.approx(huber(found.params), rel=1e-12), "delta": DELTA}
    for name in found.params:
        for factor in (0.999, 1.001):
            assert huber(found.params | {name: found.params[name] * factor}) > found.objective["value"]
    assert found.params["alpha"] == pytest.approx(CHINCHILLA["alpha"], rel=0.1)  # one outlier moves it little


@pytest.mark.parametrize("objective", [LSQ, LSQ_LOG])
def test_least_squares_agree_with_scipys_curve_fit(objective):
    from scipy.optimize import curve_fit

    inputs, observed = noisy("loss_to_error", 0.02)
    log = objective == LSQ_LOG

    def model(loss, epsilon, k, gamma):
        error = epsilon - k * np.exp(-gamma * loss)
        return np.log(error) if log else error

    expected, _ = curve_fit(model, inputs["loss"], np.log(observed) if log else observed, p0=(0.9, 2, 0.8))
    found = fit(LAWS["loss_to_error"], inputs, observed, objective=objective, bootstrap=0, starts=8)
    assert list(found.params.values()) == pytest.approx(expected, rel=1e-4)


def test_intervals_cover_the_planted_parameters_as_often_as_they_say():
    """30 data sets of a line in logarithms with noise: 95 % intervals of two parameters should miss about 3 of 60."""
    law, truth = LAWS["optimal_lr_nd"], PLANTED["optimal_lr_nd"]
    inside = 0
    for seed in range(30):
        inputs, observed = noisy("optimal_lr_nd", 0.2, seed)
        found = fit(law, inputs, observed, starts=1, bootstrap=60, seed=seed)
        inside += sum(found.ci95[name][0] <= truth[name] <= found.ci95[name][1] for name in ("p", "q"))
    assert 0.85 <= inside / 60 <= 1.0
    assert all(high - low < 0.2 for low, high in (found.ci95["p"], found.ci95["q"]))  # and are no wider than they need


def test_a_planted_loss_law_is_recovered_within_its_intervals():
    """Ten data sets, four parameters: 95 % intervals should miss about 2 of 40."""
    truth, inside = PLANTED["over_training"], 0
    for seed in range(10):
        inputs, observed = noisy("over_training", 0.003, seed)
        found = fit(LAWS["over_training"], inputs, observed, objective=LSQ_LOG, starts=4, bootstrap=60, seed=seed)
        inside += sum(found.ci95[name][0] <= value <= found.ci95[name][1] for name, value in truth.items())
        assert found.params == pytest.approx(truth, rel=0.15) and not found.warnings
    assert 0.85 <= inside / 40 <= 1.0


def test_prediction_intervals_hold_new_runs():
    """95 % of runs never fitted lie inside, at sizes beyond the fitted ones; and the interval is not idly wide."""
    law, truth = LAWS["over_training"], PLANTED["over_training"]
    inputs, observed = noisy("over_training", 0.01)
    found = fit(law, inputs, observed, objective=LSQ_LOG, starts=4, bootstrap=100)
    rng = np.random.default_rng(1)
    at = {"n_params": 3e9, "n_tokens": 3e11}
    low, high = found.interval(at)
    new = law.predict(truth, at) * np.exp(rng.normal(0, 0.01, 1000))
    assert 0.85 <= np.mean((new >= low) & (new <= high)) <= 1.0
    assert high / low < 1.1
    assert found.extrapolation(at) == pytest.approx(9.0)  # in compute
    assert found.extrapolation({"n_params": 1e7, "n_tokens": 1e9}) == 1.0


def test_the_interval_of_a_linear_fit_is_around_its_prediction():
    inputs, observed = noisy("loss_to_error", 0.02)
    found = fit(LAWS["loss_to_error"], inputs, observed, starts=4, bootstrap=50)
    low, high = found.interval({"loss": 3.0})
    assert low < float(found.predict({"loss": 3.0})) < high


def test_a_fixed_parameter_stays():
    inputs, observed = observations("chinchilla")
    found = fit(LAWS["chinchilla"], inputs, observed, fixed={"E": 1.7, "alpha": 0.34}, starts=8, bootstrap=5)
    assert found.params == pytest.approx(CHINCHILLA, rel=1e-3)
    assert found.fixed == {"E": 1.7, "alpha": 0.34} and set(found.ci95) == {"A", "B", "beta"}
    assert all(draw["E"] == 1.7 for draw in found.draws)


def test_the_seed_decides_everything():
    inputs, observed = noisy("kaplan_n", 0.01)
    one, two, other = (fit(LAWS["kaplan_n"], inputs, observed, starts=4, bootstrap=9, seed=s) for s in (0, 0, 1))
    assert one == two and one != other


def warnings_of(name, inputs, observed, **more):
    return " | ".join(fit(LAWS[name], inputs, observed, **{"starts": 16, "bootstrap": 0} | more).warnings)


def test_it_warns_of_too_few_rows_and_withholds_the_interval():
    inputs = {key: values[[0, 7, 14, 21, 28]] for key, values in INPUTS["over_training"].items()}
    observed = LAWS["over_training"].predict(PLANTED["over_training"], inputs)
    found = fit(LAWS["over_training"], inputs, observed, starts=8)
    assert "5 rows for 4 parameters: too few for an interval" in found.warnings
    assert found.ci95 is None and not found.draws and found.interval({"n_params": 1e9, "n_tokens": 1e10}) is None


def test_repeated_seeds_at_four_points_do_not_pass_for_more_points():
    inputs = {key: np.repeat(values[[0, 7, 14, 21]], 3) for key, values in INPUTS["over_training"].items()}
    observed = LAWS["over_training"].predict(PLANTED["over_training"], inputs) * np.linspace(0.99, 1.01, 12)
    found = fit(LAWS["over_training"], inputs, observed, starts=8)
    assert found.ci95 is None and "too few for an interval" in found.warnings[0]


def test_it_warns_of_a_bound():
    inputs, observed = INPUTS["compute"], 5 * (INPUTS["compute"]["flops"] / 1e15) ** -0.05
    assert "E is at its lower bound 0" in warnings_of("compute", inputs, observed * np.linspace(1.05, 0.95, 12))


def test_it_warns_of_a_flat_valley():
    """Sizes within five percent say nothing of A and alpha apart."""
    inputs = {key: values.copy() for key, values in INPUTS["chinchilla"].items()}
    inputs["n_params"] = np.linspace(0.95e8, 1e8, len(inputs["n_params"]))
    observed = LAWS["chinchilla"].predict(CHINCHILLA, inputs)
    observed = observed * np.exp(np.random.default_rng(0).normal(0, 0.002, len(observed)))
    said = warnings_of("chinchilla", inputs, observed, objective=LSQ_LOG)
    assert "flat valley" in said and "A (a factor of" in said
    assert "flat valley" not in warnings_of("chinchilla", *noisy("chinchilla", 0.002), objective=LSQ_LOG)


@pytest.mark.parametrize(
    ("name", "inputs", "free"),
    [
        ("chinchilla", {"n_params": [1e8] * 12, "n_tokens": np.geomspace(1e8, 1e11, 12)}, ["E", "A", "alpha"]),
        ("optimal_lr_nd", {"n_params": np.geomspace(1e7, 1e9, 12), "n_tokens": 20 * np.geomspace(1e7, 1e9, 12)},
         ["p", "q"]),
    ],
)  # fmt: skip
def test_what_the_rows_do_not_tell_is_named_and_has_no_interval(name, inputs, free):
    inputs = {key: np.array(values, float) for key, values in inputs.items()}
    planted = PLANTED[name]
    observed = LAWS[name].predict(planted, inputs)
    observed = observed * np.exp(np.random.default_rng(0).normal(0, 0.002, len(observed)))
    found = fit(LAWS[name], inputs, observed, starts=8, bootstrap=20, objective=LSQ_LOG)
    (said,) = [text for text in found.warnings if "not determined by these rows" in text]
    assert said.startswith(", ".join(free) + " are")
    assert not set(found.ci95) & set(free) and set(found.ci95) == set(found.params) - {*free, *found.fixed}
    assert found.predict(inputs) == pytest.approx(observed, rel=0.02)


def test_an_exponent_of_zero_may_be_well_determined():
    n = np.geomspace(1e6, 1e9, 8)
    lr = 1e-2 * np.exp(np.random.default_rng(0).normal(0, 0.02, 8))
    found = fit(LAWS["optimal_lr"], {"n_params": n}, lr, starts=8, bootstrap=20)
    assert abs(found.params["p"]) < 0.01 and not [text for text in found.warnings if "flat valley" in text]


def test_it_lists_other_optima_of_near_equal_quality(monkeypatch):
    """Two frequencies that fit the same three points equally well."""
    from scaling_testbed.analysis.laws.forms import Law, Param

    def wave(p, x):
        return 2 + np.sin(p["w"] * x["flops"])

    law = Law("wave", "", "", ("flops",), "loss", (Param("w", (0.5, 10.0), 0.1, 12.0),), wave, LSQ)
    monkeypatch.setitem(LAWS, "wave", law)
    inputs = {"flops": 2 * np.pi * np.array([1.0, 2.0, 3.0, 4.0]) / 4}
    observed = wave({"w": 1.5}, inputs)  # and w = 5.5, 9.5
    found = fit(law, inputs, observed + 1e-3 * np.array([1, -1, 1, 1]), starts=40, bootstrap=0)
    others = sorted(round(one["params"]["w"], 1) for one in [{"params": found.params}, *found.optima])
    assert others == [1.5, 5.5, 9.5]
    assert any("other optima" in text and "w=5.5" in text for text in found.warnings) or found.params["w"] > 5


def test_it_says_that_one_start_alone_reached_the_best(monkeypatch):
    solutions = fitting._solutions
    monkeypatch.setattr(fitting, "_solutions", lambda *a: [(v + (i > 0), t) for i, (v, t) in enumerate(solutions(*a))])
    assert "one start of 16 reached the best optimum" in warnings_of("kaplan_n", *observations("kaplan_n"))


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"objective": "l1"}, ConfigError, "huber_log, lsq, lsq_log"),
        ({"fixed": {"Q": 1.0}}, ConfigError, "kaplan_n has no parameter 'Q'"),
        ({"fixed": {"alpha_N": -3.0}}, ConfigError, "alpha_N must be between 0 and 4; got -3"),
        ({"fixed": {"Nc": 1.0, "alpha_N": 1.0}}, ConfigError, "there is nothing to fit"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        fit(LAWS["kaplan_n"], *observations("kaplan_n"), **arguments)


def planted_fit(law, **more) -> Fit:
    of = {"ci95": None, "objective": {"name": LSQ}, "n_rows": 9, "starts": {}, "warnings": []}
    return Fit(law=law, params=PLANTED[law], **of, **more)


def test_extrapolation_counts_both_ways():
    made = planted_fit("chinchilla", largest={"n_params": 8e9, "n_tokens": 1e12},
                       smallest={"n_params": 1e9, "n_tokens": 1e11})  # fmt: skip
    for n, d, factor in [(2e9, 2e11, 1), (1e10, 2e11, 1.25), (2.5e8, 2e11, 4), (2.5e8, 1e13, 10)]:
        assert made.extrapolation({"n_params": n, "n_tokens": d}) == pytest.approx(factor)


def test_extrapolation_counts_compute_and_tokens_per_parameter_too():
    n, d = np.array([1e7, 1e8, 1e9, 1e10, 1e7, 1e8]), np.array([2e8, 2e9, 2e10, 2e11, 4e8, 4e9])
    made = fit(LAWS["kaplan_nd"], {"n_params": n, "n_tokens": d}, 3 - 0.01 * np.log(d), starts=1, bootstrap=0)
    for at, factor in [((1e7, 2e8), 1), ((1e9, 5e9), 4), ((1e8, 4e10), 10), ((1e10, 4e11), 2), ((1e7, 1e8), 2)]:
        assert made.extrapolation(dict(zip(("n_params", "n_tokens"), at, strict=True))) == pytest.approx(factor)


def test_an_interval_is_the_residuals_about_each_resamples_prediction():
    """By hand: L = 10 / N of one resample, four residuals of ln(predicted / observed), two of the three free."""
    params = {"Nc": 10.0, "alpha_N": 1.0}
    shared = {"law": "kaplan_n", "params": params, "ci95": None, "n_rows": 4, "starts": {}, "warnings": []}
    residuals = [-0.3, 0.0, 0.0, 0.1]
    one = Fit(**shared, objective={"name": "huber_log", "value": 0.0}, residuals=residuals, draws=[params])
    wide = np.sqrt(4 / 2)  # two parameters took their share of the residuals
    expected = 2.0 * np.exp(-wide * np.array(residuals))  # one that was predicted too low was above
    assert np.sort(one.samples({"n_params": 5.0})) == pytest.approx(np.sort(expected))
    least = Fit(**shared, objective={"name": "lsq", "value": 0.0}, residuals=residuals, draws=[params])
    assert np.sort(least.samples({"n_params": 5.0})) == pytest.approx(np.sort(2.0 - wide * np.array(residuals)))


def test_a_chained_interval_has_the_spread_of_both_laws():
    at, loss, middle = {"n_params": 5.0}, {"Nc": 10.0, "alpha_N": 1.0}, {"epsilon": 1.0, "k": 1.0, "gamma": 0.5}
    shared = {"ci95": None, "starts": {}, "warnings": [], "n_rows": 10**6}

    def interval(of_loss, of_error):
        chain = Chain(
            Fit(law="kaplan_n", params=loss, objective={"name": "lsq"}, residuals=of_loss, draws=[loss], **shared),
            Fit(law="loss_to_error", params=middle, objective={"name": "lsq"}, residuals=of_error, draws=[middle],
                **shared),
        )  # fmt: skip
        return chain.interval(at)

    def error(loss):
        return 1 - np.exp(-0.5 * loss)

    assert interval([0.0], [0.0]) == pytest.approx((error(2), error(2)))
    assert interval([0.0], [-0.1, 0.1]) == pytest.approx((error(2) - 0.1, error(2) + 0.1), abs=1e-5)
    # Two losses, 1.5 and 2.5, and what lies between them.
    assert interval([-0.5, 0.5], [0.0]) == pytest.approx((error(1.525), error(2.475)), abs=1e-3)
    low, high = interval([-0.5, 0.5], [-0.1, 0.1])
    assert low < error(1.6) - 0.1 and high > error(2.4) + 0.1


def test_an_exact_fit_has_optima_of_which_none_is_worse():
    flat = fit(LAWS["loss_to_error"], {"loss": np.linspace(3, 4, 8)}, [0.75] * 8, starts=16, bootstrap=0)
    assert flat.objective["value"] == pytest.approx(0, abs=1e-18)
    assert not any("%" in text and "+0.00%" not in text for text in flat.warnings)


def test_a_prediction_that_is_no_number_has_no_interval():
    made = planted_fit("kaplan_n", residuals=[0.0], draws=[PLANTED["kaplan_n"]])
    assert made.interval({"n_params": -5.0}) is None and made.interval({"n_params": 1e6}) is not None


@pytest.mark.parametrize("params", [{}, {"Nc": 1.0}, {"Nc": 1.0, "alpha_N": float("nan")}])
def test_a_record_with_other_parameters_is_no_fit(params):
    made = {**asdict(fit(LAWS["kaplan_n"], *observations("kaplan_n"), starts=2, bootstrap=0))}
    assert from_record(made).params == made["params"]
    with pytest.raises(ValueError, match="kaplan_n has the parameters Nc, alpha_N|params is damaged"):
        from_record({**made, "params": params})


def test_fewer_rows_than_parameters_are_refused():
    with pytest.raises(UserError, match="5 free parameters, but there are 2 rows"):
        fit(LAWS["chinchilla"], {"n_params": [1e6, 1e7], "n_tokens": [1e8, 1e9]}, [3.0, 2.9])
