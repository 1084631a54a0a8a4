"""Size, batch and steps for a budget, beside a search of all plans."""

import json
from dataclasses import replace

import numpy as np
import pytest

from scaling_testbed.analysis.laws.batch_allocation import batch_allocation_records
from scaling_testbed.analysis.laws.fitted import Fit, with_ratios
from scaling_testbed.analysis.laws.forms import LAWS, critical_batch
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError
from tests.analysis.laws.planted import PLANTED, observations

PARAMS = PLANTED["batch"]
SMALLEST = {"n_params": 1e7, "steps": 1e3, "batch_tokens": 1e4}
LARGEST = {"n_params": 1e10, "steps": 1e5, "batch_tokens": 1e7}


def fitted(draws=(), **changed):
    return Fit(
        law="batch", params=PARAMS | changed, ci95=None, objective={"name": "lsq", "value": 0.0}, n_rows=99,
        starts={}, warnings=[], residuals=[0.01, -0.01], draws=list(draws),
        smallest=SMALLEST, largest=LARGEST,
    )  # fmt: skip


def loss_at(n_params, steps, batch):
    return LAWS["batch"].predict(PARAMS, {"n_params": n_params, "steps": steps, "batch_tokens": batch})


def test_by_the_critical_batch_no_plan_of_the_budget_has_a_lower_loss():
    flops = 1e21
    best = batch_allocation_records(fitted(), flops)[0]
    # All sizes and losses: the batch is critical at the loss, and the steps spend the budget.
    losses, sizes = np.meshgrid(np.linspace(2.5, 2.7, 401), np.geomspace(5e8, 1e10, 101))
    steps = flops / (6 * sizes * critical_batch(PARAMS, losses))
    reached = loss_at(sizes, steps, critical_batch(PARAMS, losses))
    at = np.argmin(np.where(reached <= losses, losses, np.inf))  # the lowest loss that its own plan reaches
    assert best["loss"] == pytest.approx(losses.ravel()[at], abs=1e-3)
    assert best["n_params"] == pytest.approx(sizes.ravel()[at], rel=0.2)
    assert best["batch_tokens"] == pytest.approx(critical_batch(PARAMS, best["loss"]))
    assert float(loss_at(best["n_params"], best["steps"], best["batch_tokens"])) == pytest.approx(best["loss"])
    assert best["flops"] == pytest.approx(flops) == 6 * best["n_params"] * best["n_tokens"]


def test_other_batches_reach_the_same_loss_with_fewer_steps_or_less_compute():
    best, *others = batch_allocation_records(fitted(), 1e21)
    fewest = PARAMS["Sc"] * (best["loss"] - (PARAMS["Nc"] / best["n_params"]) ** PARAMS["alpha_N"]) ** (
        -1 / PARAMS["alpha_S"]
    )
    assert best["steps"] == pytest.approx(2 * fewest)
    for one in others:
        assert float(loss_at(one["n_params"], one["steps"], one["batch_tokens"])) == pytest.approx(best["loss"])
        times = one["times_critical_batch"]
        assert one["steps"] == pytest.approx(fewest * (1 + 1 / times))
        assert one["times_compute"] == pytest.approx((1 + times) / 2)


def test_with_a_number_of_steps_no_size_has_a_lower_loss():
    best = batch_allocation_records(fitted(), 1e21, steps=2e4)[0]
    sizes = np.geomspace(1e9, 1e11, 4001)
    losses = loss_at(sizes, 2e4, 1e21 / (6 * sizes * 2e4))
    assert best["n_params"] == pytest.approx(sizes[np.argmin(losses)], rel=2e-3)
    assert best["loss"] == pytest.approx(losses.min(), rel=1e-9)
    assert best["flops"] == pytest.approx(1e21) and best["steps"] == 2e4


@pytest.mark.parametrize("steps", [None, 2e4])
def test_intervals_are_those_of_the_resamples(steps):
    draws = [PARAMS | {"Nc": PARAMS["Nc"] * factor} for factor in np.linspace(0.5, 2.0, 41)]
    found = batch_allocation_records(fitted(draws), 1e21, steps)[0]
    each = [batch_allocation_records(fitted(Nc=draw["Nc"]), 1e21, steps)[0]["n_params"] for draw in draws]
    low, high = np.quantile(each, [0.025, 0.975])
    assert (found["n_params_low"], found["n_params_high"]) == (
        pytest.approx(low, rel=1e-3),
        pytest.approx(high, rel=1e-3),
    )
    assert found["low"] < found["loss"] < found["high"]
    assert batch_allocation_records(fitted(), 1e21, steps)[0]["note"] == "no interval: the fit has no resamples"


def test_a_batch_far_beyond_the_fitted_ones_is_withheld_with_the_reason():
    found = batch_allocation_records(fitted(), 1e33)
    assert found[0]["steps"] is None and "times beyond the fitted ones" in found[0]["note"]


def test_many_steps_of_a_large_batch_lie_beyond_runs_that_had_one_or_the_other():
    pairs = {"n_params": np.array([1e7, 1e7]), "steps": np.array([1e5, 1e3]), "batch_tokens": np.array([1e4, 1e7])}
    seen = with_ratios(pairs)
    ends = {"largest": {key: float(np.max(one)) for key, one in seen.items()},
            "smallest": {key: float(np.min(one)) for key, one in seen.items()}}  # fmt: skip
    fit = replace(fitted(), **ends)
    assert fit.extrapolation({"n_params": 1e7, "steps": 1e5, "batch_tokens": 1e7}) == pytest.approx(100)


def test_what_is_no_plan_is_refused():
    with pytest.raises(ConfigError, match="--steps must be a number greater than zero; got -1"):
        batch_allocation_records(fitted(), 1e21, -1)
    with pytest.raises(ConfigError, match="alpha_S is 0"):
        batch_allocation_records(fitted(alpha_S=0.0), 1e21)
    with pytest.raises(ConfigError, match="no minimum in N"):
        batch_allocation_records(fitted(Nc=1e50), 1e21, 1e3)  # all of the loss is due to the size


def test_the_command_takes_the_law_of_batches(tmp_path, capsys):
    inputs, losses = observations("batch")
    lines = [",".join([*inputs, "loss"])]
    lines += [",".join(map(repr, map(float, one))) for one in zip(*inputs.values(), losses, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    kept = tmp_path / "fit.json"
    typed = ["--law", "batch", "--starts", "4", "--bootstrap", "20", "--objective", "lsq_log", "--out", str(kept)]
    assert main(["fit", str(tmp_path / "runs.csv"), *typed]) == 0
    capsys.readouterr()
    assert main(["allocate", str(kept), "--flops", "1e20", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]
    assert best["loss"] == pytest.approx(batch_allocation_records(fitted(), 1e20)[0]["loss"], rel=1e-3)
    assert main(["allocate", str(kept), "--flops", "1e20", "--steps", "10k"]) == 0
    assert " 10,000 " in capsys.readouterr().out
    assert main(["allocate", str(kept), "--flops", "1e20"]) == 0
    assert "the first row has the critical batch of its loss" in capsys.readouterr().out
    assert main(["allocate", str(kept), "--flops", "1e20", "--inference-tokens", "1e9"]) == 2
    assert "--inference-tokens needs a law of n_params and n_tokens; this is batch" in capsys.readouterr().err
