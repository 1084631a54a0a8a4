"""The chosen runs narrow a prediction by what independent numbers say, and more than the same grid or chance does."""

import json
from dataclasses import replace

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.analysis.laws.fitting import fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.next_runs import checked_target, laws_that_count, next_runs, places_of
from scaling_testbed.analysis.laws.selection import Compared, Selection
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.laws.planted import PLANTED

TARGET = checked_target((7e9, 1.4e11))


def fitted(law="chinchilla", sizes=6, ratios=(10, 20, 40, 80, 160), noise=0.003, seed=0, starts=6):
    n, m = (one.ravel() for one in np.meshgrid(np.geomspace(1e7, 1e9, sizes), ratios))
    inputs = {"n_params": n, "n_tokens": n * m}
    truth = LAWS[law].predict(PLANTED[law], inputs)
    observed = truth * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))
    return fit(LAWS[law], inputs, observed, starts=starts, bootstrap=0, objective="lsq_log")


@pytest.fixture(scope="module")
def base():
    return fitted()


def chosen(kept, flops, runs=10, **options):
    laws = laws_that_count(kept)
    return next_runs(laws, TARGET, places_of(laws, TARGET, **options), flops, runs)


def by_differences(kept, runs):
    """The standard deviation of ln L at the target, by finite differences and the normal equations."""
    n = np.array([*kept.fitted_inputs["n_params"], *(one["n_params"] for one in runs), TARGET["n_params"]])
    d = np.array([*kept.fitted_inputs["n_tokens"], *(one["n_tokens"] for one in runs), TARGET["n_tokens"]])

    def logs(name, step):
        moved = kept.params | {name: kept.params[name] * (1 + step)}
        return np.log(LAWS[kept.law].predict(moved, {"n_params": n, "n_tokens": d}))

    slopes = np.stack([(logs(name, 1e-4) - logs(name, -1e-4)) / 2e-4 for name in kept.params], axis=1)
    freedom = kept.n_rows - len(kept.params)
    variance = np.sum(np.square(kept.residuals)) / freedom
    return float(np.sqrt(variance * slopes[-1] @ np.linalg.solve(slopes[:-1].T @ slopes[:-1], slopes[-1])))


@pytest.mark.parametrize("law", ["chinchilla", "kaplan_nd"])
def test_the_deviations_before_and_after_are_those_of_all_runs_together(law):
    kept = fitted(law)
    found = chosen(kept, 1e21, runs=4)
    assert len(found.runs) == 4 and found.flops <= 1e21
    for place, one in enumerate(found.runs):
        assert one["sd_before"] == pytest.approx(by_differences(kept, found.runs[:place]), rel=1e-3)
    assert found.runs[-1]["sd_after"] == pytest.approx(by_differences(kept, found.runs), rel=1e-3)
    assert found.laws[0]["sd_after"] == pytest.approx(found.runs[-1]["sd_after"])


def test_the_deviation_before_is_that_of_refitted_worlds(base):
    """Of 24 worlds with other noise, by their own fits."""
    logs = [np.log(float(fitted(seed=seed, starts=2).predict(TARGET))) for seed in range(1, 25)]
    said = chosen(base, 1e21, runs=1).runs[0]["sd_before"]
    assert said == pytest.approx(np.std(logs), rel=0.35)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_chosen_runs_narrow_more_than_the_same_grid_and_than_chance_at_equal_cost(base, share):
    cost = share * sum(6 * n * d for n, d in zip(*base.fitted_inputs.values(), strict=True))
    found = chosen(base, cost)
    (law,) = found.laws
    assert law["sd_after"] < 0.97 * law["sd_of_fitted_runs_again"] and found.flops <= cost
    rng, places = np.random.default_rng(0), places_of(laws_that_count(base), TARGET)
    chance = []
    for _ in range(20):
        left, picked = cost, []
        for one in (places[place] for place in rng.permutation(len(places))):
            if 6 * one["n_params"] * one["n_tokens"] <= left and len(picked) < 10:
                picked.append(one)
                left -= 6 * one["n_params"] * one["n_tokens"]
        chance.append(by_differences(base, picked))
    assert law["sd_after"] < min(chance)


def test_each_place_is_chosen_once_within_the_fitted_ratios_and_the_cost_of_a_run(base):
    found = chosen(base, 1e21, runs=30, most_flops=1e20)
    at = {(one["n_params"], one["n_tokens"]) for one in found.runs}
    assert len(at) == len(found.runs) > 10 and max(one["flops"] for one in found.runs) <= 1e20
    assert all(10 - 1e-9 <= one["tokens_per_param"] <= 160 + 1e-9 for one in found.runs)
    assert sum(one["share_of_budget"] for one in found.runs) == pytest.approx(found.flops / 1e21)
    assert min(one["n_params"] for one in found.runs) >= 1e7


def test_laws_with_a_share_count_by_it_and_one_that_is_not_determined_is_left_out(base):
    other = fitted("kaplan_nd")
    one = Selection(
        {"chinchilla": Compared(base, 0, 0, 0, 0.25), "kaplan_nd": Compared(other, 0, 0, 0, 0.75)},
        "", np.array([]), np.array([]),
    )  # fmt: skip
    found = chosen(one, 1e20, runs=2)
    assert [law["share"] for law in found.laws] == [0.25, 0.75]
    mean = np.exp(sum(law["share"] * np.log(law["sd_before"]) for law in found.laws))
    assert found.runs[0]["sd_before"] == pytest.approx(mean)
    narrow = fitted(sizes=1, ratios=(10, 20, 40, 80, 120, 160, 200, 300))  # one size: E and A are not told apart
    one.laws["chinchilla"] = Compared(narrow, 0, 0, 0, 0.25)
    found = chosen(one, 1e20, runs=2)
    assert [law["law"] for law in found.laws] == ["kaplan_nd"] and found.laws[0]["share"] == 1
    assert found.warnings[0] == "chinchilla is left out: its 8 rows do not determine its parameters"
    with pytest.raises(UserError, match=r"do not determine its parameters: fix a parameter \(fit --fix\), or add runs"):
        chosen(narrow, 1e20)


def test_a_fit_of_points_of_curves_is_refused(base):
    with pytest.raises(ConfigError, match="this one is of points of curves: fit without --curves"):
        laws_that_count(replace(base, n_runs=4))


def test_a_budget_that_allows_the_target_and_runs_outside_of_the_fitted_ones_are_said(base):
    found = chosen(base, 1e22, ratios=[1000.0], runs=2)
    assert any(text.startswith("2 of 2 chosen runs lie outside of the fitted ones, up to ") for text in found.warnings)
    assert any(text.startswith("the target itself costs 5.88e+21 FLOPs") for text in found.warnings)
    assert chosen(base, 1e20, runs=2, sizes=[{"n_params": 1e8}]).warnings == []
    assert chosen(base, 1e20, runs=2, sizes=[{"n_params": 1e7 / 1.005}]).warnings == []  # a rounded size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flops": 1.0}, r"--flops 1: the cheapest run to choose from costs 6e\+15 FLOPs"),
        ({"flops": 0}, "--flops must be a number greater than zero; got 0"),
        ({"runs": 0}, "--runs must be a whole number greater than zero; got 0"),
        ({"target": (7e9,)}, r"--target must be N,D: the parameters and the tokens"),
        ({"target": (7e9, -1)}, "--target D must be a number greater than zero"),
        ({"sizes": [1e8], "models": "nano_s"}, "--models and --sizes both say which sizes are tried"),
        ({"sizes": [-1.0]}, "--sizes must be a number greater than zero"),
        ({"flops_per_run": 1.0}, "--flops-per-run 1: every run to choose from costs more"),
        ({"models": "nono_*"}, r"--models nono_\*: there is no such model; it is one of bigram, nano_16x0"),
    ],
)
def test_a_mistake_is_named_with_what_to_type(options, said, base):
    with pytest.raises(ConfigError, match=said):
        st.next_runs(base, **({"target": (7e9, 1.4e11), "flops": 1e21} | options))


def test_another_law_is_refused():
    kept = fit(LAWS["kaplan_n"], {"n_params": [1e6, 1e7, 1e8]}, [3.0, 2.5, 2.2], starts=2, bootstrap=0)
    with pytest.raises(ConfigError, match="next needs a law of n_params and n_tokens .*; this is kaplan_n"):
        st.next_runs(kept, (1e9, 1e10), 1e20)


def test_the_command_writes_a_sweep_of_models_that_can_be_planned(tmp_path, capsys):
    path = "studies/archive/overtraining/chinchilla.json"  # of an earlier version, without the inputs of its rows apart
    overrides = ["experiment=over_training_nano", "evaluation.tasks=[continuation,identifier]"]
    typed = ["next", path, "--target", "1M,20M", "--flops", "1e12", "--models", "nano_xs,nano_3*", "--runs", "4"]
    typed += [word for one in overrides for word in ("--override", one)]
    sweep = tmp_path / "next.yaml"
    assert main([*typed, "--out", str(sweep), "--out", str(tmp_path / "next.csv")]) == 0
    printed = capsys.readouterr().out
    assert "sd_of_fitted_runs_again" in printed and "each law is taken for true" in printed
    assert main([*typed, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    planned, doubled = plan(load_sweep(str(sweep)))
    assert len(planned) == len(found["runs"]) == 4 and doubled == 0
    for run, one in zip(planned, found["runs"], strict=True):
        assert run.n_params == one["n_params"] and run.config["evaluation.tasks"] == ["continuation", "identifier"]
        assert run.n_tokens == pytest.approx(one["n_tokens"], abs=run.tokens_per_step)
    assert len((tmp_path / "next.csv").read_text().splitlines()) == 5
    assert main(["next", path, "--target", "1M,20M", "--flops", "1e12", "--out", str(sweep)]) == 2
    assert "a sweep file needs models: give --models" in capsys.readouterr().err
    assert main(["next", path, "--target", "1M,x", "--flops", "1e12"]) == 2
    assert "--target 1M,x: 'x' is not a number" in capsys.readouterr().err
