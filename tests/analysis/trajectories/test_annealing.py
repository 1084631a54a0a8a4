"""Laws over the history of the rate: their sums, their published errors, and what the command predicts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scaling_testbed.analysis.laws.fitting import HUBER, Problem
from scaling_testbed.analysis.laws.slopes import Sloped
from scaling_testbed.analysis.trajectories.anneal import anneal, rates_typed
from scaling_testbed.analysis.trajectories.annealing import ANNEALING, Fitting, history
from scaling_testbed.analysis.trajectories.points import curves_of
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.learning.schedules import SCHEDULES
from tests.analysis.trajectories.worlds import run, world

# Nine curves of a 25M model, the numbers of github.com/thu-yao-01-luo/MultiPowerLaw (Luo et al. 2025, arXiv
# 2503.12811). Its runs warm up over 2,160 steps, and its curves begin there.
NINE = Path(__file__).parent / "data" / "loss_curves_25m_nine_schedules.csv.gz"
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
PLANTED = {
    "momentum": {"L0": 1.5, "A": 1.2, "alpha": 0.5, "C": 0.15},
    "multi_power": {"L0": 1.5, "A": 1.2, "alpha": 0.5, "B": 20.0, "C": 0.8, "beta": 0.5, "gamma": 0.4},
}


def by_definition(law, p, rates, step, momentum=0.999):
    """The loss after `step` updates, from the formulas of the papers, term by term."""
    s1 = sum(rates[:step])
    drops = [(k, rates[k - 1] - rates[k]) for k in range(1, step)]
    if law == "momentum":
        m = s2 = 0.0
        for _, drop in drops:
            m = momentum * m + drop
            s2 += m
        return p["L0"] + p["A"] * s1 ** -p["alpha"] - p["C"] * s2
    fall = sum(
        drop * (1 - (p["C"] * rates[k] ** -p["gamma"] * sum(rates[k:step]) + 1) ** -p["beta"]) for k, drop in drops
    )
    return p["L0"] + p["A"] * s1 ** -p["alpha"] - p["B"] * fall


@pytest.mark.parametrize("law", ANNEALING)
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_law_of_a_history_is_what_its_paper_writes(law, schedule):
    """Drops within a block of updates count as one, which changes a loss by less than a ten-thousandth."""
    made = SCHEDULES[schedule](warmup=30)
    rates = np.array([made.lr(step, 900, 1e-2) for step in range(900)])
    steps = np.array([40, 333, 720, 899, 900])
    found = ANNEALING[law].predict(PLANTED[law], history(rates, steps))
    expected = [by_definition(law, PLANTED[law], rates, step) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-9 if law == "momentum" else 1e-4)


@pytest.mark.parametrize("law", ANNEALING)
def test_gradients_of_the_laws_are_those_of_finite_differences(law):
    rates = np.array([SCHEDULES["wsd"](warmup=5).lr(step, 60, 1e-2) for step in range(60)])
    one = ANNEALING[law]
    problem = Problem(one, history(rates, np.array([10, 50, 58, 60])), np.array([3.0, 2.5, 2.4, 2.3]), HUBER, {})
    theta = np.array([np.log(PLANTED[law][p.name]) if p.log else PLANTED[law][p.name] for p in one.params])
    slopes = problem.linearised(theta)[1]
    for place, step in enumerate(1e-6 * np.eye(len(theta))):
        measured = (problem.residuals(theta + step) - problem.residuals(theta - step)) / 2e-6
        np.testing.assert_allclose(slopes[:, place], measured, rtol=1e-5, atol=1e-9)


def test_an_axis_is_added_and_summed_with_its_derivatives():
    x = Sloped(np.array([1.0, 2.0]), {"a": np.array(1.0)})  # a derivative that broadcasts
    found = np.sum(np.expand_dims(x, -1) * np.array([1.0, 10.0, 100.0]), axis=-1)
    assert found.value.tolist() == [111, 222] and found.slopes["a"].tolist() == [111, 111]
    whole = np.sum(Sloped(np.ones((2, 3)), {"a": np.array(1.0)}), axis=-1)
    assert whole.value.tolist() == whole.slopes["a"].tolist() == [3, 3]


@pytest.fixture(scope="module")
def nine():
    return curves_of(NINE, warmup_steps=2160)[0]


@pytest.mark.parametrize(("law", "published"), [("multi_power", 0.00110), ("momentum", 0.00151)])
def test_the_published_errors_of_six_held_out_schedules_are_found(nine, law, published):
    """To a hundredth of a percent: rates between the points of the table are interpolated, and 40 points of each run
    are fitted."""
    found = anneal(nine, law, hold_out=[f"schedule={one.run}" for one in nine if one.run not in FITTED],
                   points=40, starts=2)  # fmt: skip
    held = [one["mean_error"] for one in found.runs if one["held_out"]]
    assert len(held) == 6 and np.mean(held) == pytest.approx(published, abs=1e-4)
    assert any("no interval: it needs the errors of 5 fitted runs" in text for text in found.warnings)
    assert all(one["low"] is None for one in found.runs)


def after(curve, first=60):
    late = curve.steps >= first
    return replace(curve, steps=curve.steps[late], losses=curve.losses[late])


def planted(law, *runs, noise=0.0, seed=0):
    """Runs of one model that follow a law. runs: schedule, its keys, steps."""
    rng, made = np.random.default_rng(seed), []
    for place, (schedule, keys, steps) in enumerate(runs):
        factor = np.exp(rng.normal(0, noise))

        def loss(step, rates, factor=factor):
            inputs = history(rates, np.array([step]))
            return float(ANNEALING[law].predict(PLANTED[law], inputs)[0]) * factor

        made.append(run(f"r{place}", 5000, steps, loss, schedule=schedule, every=steps // 15, **keys))
    return world(made)


SOME = [
    ("constant", {}, 900),
    ("wsd", {"decay_fraction": 0.2}, 600),
    ("wsd", {"decay_fraction": 0.4}, 900),
    ("cosine", {}, 600),
    ("cosine", {}, 900),
    ("linear", {}, 1200),
]


@pytest.mark.parametrize("law", ANNEALING)
def test_a_planted_law_is_found_and_predicts_other_schedules(study, law):
    rows, traces = planted(law, *SOME)
    curves, _ = curves_of(study(rows, traces=traces))
    found = anneal(curves, law, hold_out=["run=r5", "run=r3"], starts=4, schedule=["schedule=linear", "steps=1200"])
    if law == "momentum":  # the parameters of the other law trade for each other
        assert found.fitted.params == pytest.approx(PLANTED[law], rel=0.01)
    assert all(one["largest_error"] < 2e-3 for one in found.runs)
    rates = np.array([SCHEDULES["linear"](warmup=20).lr(step, 1200, 1e-2) for step in range(1200)])
    assert found.asked["predicted"] == pytest.approx(by_definition(law, PLANTED[law], rates, 1200), rel=2e-3)
    assert found.asked["schedule"].startswith("schedule=linear optimizer.lr=0.01 schedule.warmup=20")
    assert found.curve[-1] == {"step": 1200, "lr": pytest.approx(1e-5), "loss": found.asked["predicted"]}


def test_the_interval_is_as_wide_as_the_errors_of_runs_that_were_left_out(study):
    """By its definition: Student's quantile for five errors, 2.776, times their root mean square."""
    rows, traces = planted("momentum", *SOME, noise=0.01)
    curves, _ = curves_of(study(rows, traces=traces))
    found = anneal(curves, "momentum", hold_out=["run=r5"], starts=3, delta=0.1)  # squares, which have one optimum
    errors = []
    for left_out in curves[:5]:
        others = [after(one) for one in curves[:5] if one is not left_out]
        fitted = Fitting("momentum", others, starts=3, delta=0.1).without()
        predicted = fitted.losses(left_out.rates, left_out.steps[-1:])[0]
        errors.append(np.log(predicted / left_out.losses[-1]))
    assert found.errors == pytest.approx(errors, rel=0.02, abs=1e-4)
    (held,) = [one for one in found.runs if one["held_out"]]
    assert np.log(held["high"] / held["predicted"]) == pytest.approx(
        2.776 * np.sqrt(np.mean(np.square(errors))), rel=0.02
    )
    assert held["inside"] == (held["low"] <= held["actual"] <= held["high"])
    assert all(one["low"] is None for one in found.runs if not one["held_out"])  # they were fitted


def test_schedules_far_from_the_fitted_ones_have_no_interval_and_no_negative_loss(study):
    rows, traces = planted("momentum", *SOME, noise=0.001)
    curves, _ = curves_of(study(rows, traces=traces))

    def typed(lr):
        words = ["schedule=linear", "steps=900", "schedule.warmup=0", f"optimizer.lr={lr}"]
        return anneal(curves, "momentum", starts=4, delta=0.1, schedule=words)

    near, far = typed(1e-2), typed(2.5e-2)
    assert near.asked["low"] < near.asked["predicted"] and not any("beyond" in text for text in near.warnings)
    assert far.asked["low"] is None
    assert any(
        text.startswith("the typed schedule lies ") and "no interval past 2 times" in text for text in far.warnings
    )
    with pytest.raises(UserError, match="momentum has no positive loss for this schedule; the typed schedule lies 9"):
        typed(100.0)


def test_runs_of_several_models_are_refused_and_other_settings_named(study):
    rows, traces = planted("momentum", *SOME)
    rows[1]["n_params"] = 7000
    with pytest.raises(UserError, match="the runs have 2 values of n_params .*; choose with --where n_params=5000"):
        anneal(curves_of(study(rows, name="two", traces=traces))[0], "momentum")
    with pytest.raises(UserError, match="the rate of no fitted run falls after the warm-up, so what a decay gains"):
        anneal(curves_of(study(rows, name="two", traces=traces))[0], "momentum", where=["run=r0"])
    rows[1]["n_params"], rows[1]["optimizer.beta2"], rows[0]["optimizer.lr"] = 5000, 0.9, 2e-2
    found = anneal(curves_of(study(rows, name="beta", traces=traces))[0], "momentum", starts=2)
    assert any("the runs also differ in optimizer.beta2" in text for text in found.warnings)
    assert any("the fitted runs have 2 peak rates" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schedule=wsdd", "steps=9"], "schedule=wsdd: choose one of cosine, linear"),
        (["steps=9"], "schedule=: choose one of"),
        (["schedule=wsd"], "the fitted runs have several values of steps: type steps=VALUE too"),
        (["schedule=wsd", "steps=9.5"], "steps=9.5: it must be a whole number"),
        (["schedule=wsd", "steps=9", "decay=1"], "decay=1: the keys are steps, optimizer.lr, schedule.warmup"),
        (
            ["schedule=wsd", "steps=9", "schedule.decay_fraction=two"],
            "schedule.decay_fraction=two: it must be a number",
        ),
        (["schedule=wsd", "steps=9", "steps=8"], "steps=8: write KEY=VALUE once"),
        (["schedule=wsd", "steps=9", "schedule.decay_fraction=2"], "decay_fraction must be above 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(study, words, said):
    rows, traces = planted("momentum", *SOME[:2])
    with pytest.raises(ConfigError, match=said):
        rates_typed(words, curves_of(study(rows, traces=traces))[0])


def test_the_command_predicts_and_keeps_what_it_shows(study, tmp_path, capsys):
    rows, traces = planted("momentum", *SOME)
    place, kept = study(rows, traces=traces).path, tmp_path / "anneal.json"
    words = ["anneal", str(place), "schedule=wsd", "schedule.decay_fraction=.3", "steps=2000", "--hold-out", "run=r4"]
    assert main([*words, "--annealing-law", "momentum", "--starts", "3", "--out", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "Tissue et al. 2024" in printed and "mean relative error of the curves of 1 held-out runs: 0.0" in printed
    record = json.loads(kept.read_text())
    assert record["asked"]["steps"] == 2000 and len(record["curve"]) == 50 and record["law"] == "momentum"
    assert main([*words, "--annealing-law", "other"]) == 2
    assert "--annealing-law must be one of momentum, multi_power; got 'other'" in capsys.readouterr().err
