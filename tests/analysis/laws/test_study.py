"""A law fitted to rows: what is fitted, what is predicted, and what is said of it, without any command."""

import math

import numpy as np
import pytest

from scaling_testbed.analysis.laws.best_runs import frontier_rows
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.study import Fitting, Rows, chain_rows, fit_rows, law_named, law_rows
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.laws.planted import PLANTED

QUICK = Fitting(starts=4, bootstrap=0)


def rows_of(law="kaplan_n", sizes=(1e6, 2e6, 4e6, 8e6, 1e8), **more):
    return [
        {"name": f"r{n:g}", "n_params": n, "loss": float(LAWS[law].predict(PLANTED[law], {"n_params": n})), **more}
        for n in sizes
    ]


def test_held_out_runs_are_predicted_and_the_far_one_is_named():
    found = fit_rows(Rows(rows=rows_of()), LAWS["kaplan_n"], hold_out=["n_params>4e6"], fitting=QUICK)
    assert found.fit.n_rows == 3 and [one["run"] for one in found.predictions] == ["r8e+06", "r1e+08"]
    assert all(one["relative_error"] < 1e-4 and one["inside"] is None for one in found.predictions)
    assert [one["predicted"] for one in found.fitted] == pytest.approx(
        [one["actual"] for one in found.fitted], rel=1e-4
    )
    assert "a prediction lies 25 times beyond what was fitted (r1e+08)" in found.warnings
    record = found.record()
    assert record["hold_out"] == ["n_params>4e6"] and record["rows"] == "rows at hand" and record["law"] == "kaplan_n"


def test_what_was_said_of_the_rows_and_what_the_law_does_not_see_are_warnings():
    rows = [
        *rows_of(dataset="a", lr=1e-3),
        *({**row, "loss": 1.1 * row["loss"]} for row in rows_of(dataset="b", lr=1e-2)),
    ]
    found = fit_rows(Rows(rows=rows, said=["2 runs are left out"]), LAWS["kaplan_n"], fitting=QUICK)
    assert "2 runs are left out" in found.warnings
    assert any("2 values of dataset" in text for text in found.warnings)
    assert any("rows of the same n_params differ in lr" in text for text in found.warnings)
    with pytest.raises(UserError, match="2 runs are left out"):
        fit_rows(Rows(rows=rows[:1], said=["2 runs are left out"]), LAWS["kaplan_n"], fitting=QUICK)


def test_a_chain_predicts_the_error_from_size_alone():
    rows = rows_of()
    for row in rows:
        row["error"] = float(LAWS["loss_to_error"].predict(PLANTED["loss_to_error"], {"loss": row["loss"]}))
    (held,) = [row for row in rows if row["n_params"] == 1e8]
    held["loss"] = None  # it takes no part
    laws = LAWS["kaplan_n"], LAWS["loss_to_error"]
    found = chain_rows(Rows(rows=rows), *laws, hold_out=["n_params=1e8"], where_loss=["n_params<5e6"], fitting=QUICK)
    assert (found.chain.loss.n_rows, found.chain.downstream.n_rows) == (3, 4)
    assert found.predictions[0]["predicted"] == pytest.approx(held["error"], rel=1e-3)
    assert found.record()["where_loss"] == ["n_params<5e6"] and any(
        "25 times beyond" in text for text in found.warnings
    )
    with pytest.raises(ConfigError, match="downstream chains a law of the loss"):
        chain_rows(Rows(rows=rows), *reversed(laws))


def test_the_best_size_of_each_budget_follows_the_planted_law():
    at = [{"n_params": n * c**0.5 / 1e10, "n_tokens": c**0.5 * 1e10 / 6 / n} for c in (1e18, 1e19, 1e20)
          for n in np.geomspace(1e8, 4e10, 6)]  # fmt: skip
    law, planted = LAWS["chinchilla"], PLANTED["chinchilla"]
    rows = [{**x, "flops": 6 * x["n_params"] * x["n_tokens"], "loss": float(law.predict(planted, x))} for x in at]
    found = frontier_rows(Rows(rows=rows, said=["said"]), "isoflop", where=["flops>1e17"])
    slope = planted["beta"] / (planted["alpha"] + planted["beta"])
    assert found.fit.params["p"] == pytest.approx(slope, abs=0.03) and len(found.optima) == 3
    assert found.warnings[-1] == "said" and found.record()["where"] == ["flops>1e17"]
    with pytest.raises(ConfigError, match="--method must be one of isoflop, envelope; got 'x'"):
        frontier_rows(Rows(rows=rows), "x")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"starts": 0}, "--starts"), ({"seed": -1}, "--seed"), ({"bootstrap": 5}, "--bootstrap must be 0 or at least 20")],
)
def test_a_way_of_fitting_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Fitting(**wrong)
    with pytest.raises(ConfigError, match="--error-law must be one of over_training"):
        law_named("nothing", "--error-law")


def test_an_error_of_exactly_zero_is_fitted_and_has_no_logarithm():
    losses = np.linspace(1.5, 4.0, 12)
    rows = [{"loss": float(loss), "error": max(0.0, 0.85 - 2.2 * math.exp(-0.6 * loss))} for loss in losses]
    assert rows[0]["error"] == 0
    given = law_rows(rows)
    found = fit_rows(given, LAWS["loss_to_error"], hold_out=["loss<1.6"], fitting=Fitting(bootstrap=20, starts=8))
    assert found.fit.params["k"] == pytest.approx(2.2, rel=0.05)
    assert found.predictions[0]["actual"] == 0 and found.predictions[0]["relative_error"] is None
    whole = fit_rows(given, LAWS["loss_to_error"], fitting=Fitting(bootstrap=0, starts=8))
    assert whole.fit.n_rows == 12
    with pytest.raises(UserError, match=r"error is 0 in 1 rows and has no logarithm; use --objective lsq, or --where"):
        fit_rows(given, LAWS["loss_to_error"], fitting=Fitting(objective="lsq_log"))
