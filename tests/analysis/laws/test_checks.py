"""What a law cannot see of its rows is said."""

import pytest

from scaling_testbed.analysis.laws.checks import doubts, mixed_data, mixed_settings, odd_exponents
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.forms import LAWS


def test_an_exponent_above_one_is_said_to_be_unusual():
    def found(law, **params):
        return Fit(law=law, params=params, ci95=None, objective={}, n_rows=9, starts={}, warnings=[])

    usual = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.3, "beta": 1.0}
    assert odd_exponents(found("chinchilla", **usual)) == []
    (said,) = odd_exponents(found("chinchilla", **usual | {"beta": 1.4, "E": 5.0}))
    assert said.startswith("beta is 1.4: an exponent above 1 is unusual; is the loss in nats")
    assert odd_exponents(found("loss_to_error", epsilon=0.9, k=2.0, gamma=3.0)) == []


def test_rows_that_differ_in_what_the_law_does_not_see_are_named():
    law = LAWS["chinchilla"]
    points = [(1e6, 2e7), (1e6, 4e7), (2e6, 4e7)]
    rows = [
        {"n_params": n, "n_tokens": d, "loss": 3.0 + worse, "optimizer.lr": lr, "lr": lr, "seed": seed}
        for n, d in points
        for lr, worse, seed in ((1e-3, 0.0, 0), (1e-2, 0.5, 1))
    ]
    (said,) = mixed_settings(rows, law)
    assert "same n_params and n_tokens differ in optimizer.lr, and by up to 0.5 in loss" in said
    assert mixed_settings([row for row in rows if row["lr"] == 1e-2], law) == []
    assert mixed_settings([row | {"optimizer.lr": 1.0, "lr": 1.0} for row in rows], law) == []  # seeds are no setting
    assert mixed_settings([row | {"loss": 3.0} for row in rows], law) == []


def test_rows_of_several_data_sets_are_named_by_the_fingerprint_first():
    rows = [{"data_fingerprint": "a", "dataset": "c4"}, {"data_fingerprint": "b", "dataset": "c4"}, {"dataset": None}]
    assert mixed_data(rows) == ["the rows have 2 values of data_fingerprint: a law describes one data set; use --where"]
    assert mixed_data(rows[1:]) == [] == mixed_data([])
    first, second = ({"plugins": {"mine.py": letter * 64}} for letter in "ab")
    assert "2 versions of the plug-in mine.py (aaaaaaaaaaaa, bbbbbbbbbbbb)" in mixed_data([first, second])[0]
    auto = [{"schema_version": 1, "precision": precision} for precision in ("bf16", "fp32", None)]
    assert "the rows were made with 2 precisions (bf16, fp32)" in mixed_data(auto)[0]
    narrow = [auto[0], auto[0] | {"compute.residual_dtype": "bf16"}, auto[0] | {"compute.residual_dtype": "fp32"}]
    assert "2 precisions (bf16, bf16 with a bf16 residual stream)" in mixed_data(narrow)[0]
    assert mixed_data(auto[1:]) == [] == mixed_data([{"precision": 0.8}, {"precision": 0.9}])  # of another project
    assert mixed_data([first, first, {}]) == []


@pytest.mark.parametrize(("reach", "said"), [(9.9, 0), (10.0, 1)])
def test_the_farthest_prediction_is_named_from_ten_times_on(reach, said):
    found = doubts([{"run": "near", "extrapolation": 2.0}, {"run": "far", "extrapolation": reach}])
    assert len(found) == said and all(text.endswith("beyond what was fitted (far)") for text in found)
    assert doubts([]) == []


def test_predictions_below_zero_are_counted_and_the_least_is_named():
    def said(*values):
        return doubts([{"run": f"r{value}", "extrapolation": 1.0, "predicted": value} for value in values])

    assert said(0.0, 0.2) == [] == doubts([{"extrapolation": 1.0}, {"extrapolation": 1.0, "predicted": None}])
    assert said(0.1, -0.25) == ["a prediction is below zero, down to -0.25 (r-0.25): the law does not hold there"]
    assert said(-0.1, -12.4, 1.0) == [
        "2 predictions are below zero, down to -12.4 (r-12.4): the law does not hold there"
    ]
