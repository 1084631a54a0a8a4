"""Laws are chosen by how they predict dearer runs, and intervals hold runs that no law was fitted to."""

import json

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.analysis.laws import selection
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.selection import quantile
from scaling_testbed.analysis.laws.study import Fitting, Rows, compare_rows, laws_named
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.laws.planted import PLANTED

QUICK = Fitting(starts=8, bootstrap=20)
WORLDS = {"chinchilla": PLANTED["chinchilla"], "coupled": PLANTED["coupled"] | {"A": 3e3, "B": 6e3}}


def world(law="chinchilla", noise=0.002, seed=0, sizes=7, ratios=(10, 20, 40, 80, 160)):
    """Runs of a planted law with noise of heavy tails: sizes over two decades, several tokens per parameter."""
    rng, rows = np.random.default_rng(seed), []
    for n in np.geomspace(1e7, 1e9, sizes):
        for ratio in ratios:
            row = {"n_params": float(n), "n_tokens": float(n * ratio)}
            loss = float(LAWS[law].predict(WORLDS[law], row)) * np.exp(noise * rng.standard_t(3))
            rows.append(row | {"loss": float(loss)})
    return rows


def compared(rows, laws=None, **options):
    given = Rows(rows=derived(rows))
    return compare_rows(given, laws_named(laws), fitting=options.pop("fitting", QUICK), **options)


def derived(rows):
    return [row | {"flops": 6 * row["n_params"] * row["n_tokens"]} for row in rows]


@pytest.mark.parametrize("law", WORLDS)
def test_the_planted_law_is_kept_and_predicts_a_larger_run(law):
    found = compared(world(law)).selection
    assert found.laws[law].share > 0 and found.laws["kaplan_nd"].share == 0
    assert sum(one.share for one in found.laws.values()) == pytest.approx(1)
    assert found.laws[law].forward_error < 0.006 < found.laws["kaplan_nd"].forward_error
    assert found.laws[law].aicc < found.laws["kaplan_nd"].aicc
    assert found.laws[law].size_error < found.laws["kaplan_nd"].size_error
    at = {"n_params": 2e9, "n_tokens": 2e11}
    made = found.predict(at)
    assert made["low"] < LAWS[law].predict(WORLDS[law], at) < made["high"] < 1.05 * made["low"]
    assert found.records()[0]["law"] == found.best


def held_out(law, seeds, laws):
    """Whether each dearer run lies in its interval, and half the width of the interval in logarithms."""
    inside, halves = [], []
    for seed in range(seeds):
        rows = derived(world(law, 0.004, seed))
        cut = np.quantile([row["flops"] for row in rows], 0.75)
        found = compared(rows, laws, hold_out=[f"flops>{cut}"]).predictions
        inside += [one["inside"] for one in found]
        halves += [0.5 * np.log(one["high"] / one["low"]) for one in found]
    return np.mean(inside), np.median(halves)


@pytest.mark.slow
@pytest.mark.parametrize("law", WORLDS)
def test_intervals_hold_dearer_runs_with_the_planted_law_and_without_it(law):
    others = ",".join(name for name in selection.candidates() if name != law)
    for laws in (None, others):
        inside, half = held_out(law, 8, laws)
        assert inside >= 0.9 and half < 0.03, (laws, inside, half)


def test_intervals_hold_dearer_runs_where_the_form_is_wrong():
    inside, half = held_out("coupled", 3, "chinchilla,over_training")
    assert inside >= 0.9 and half < 0.03, (inside, half)


def test_a_wide_spread_of_the_laws_widens_the_interval_and_distance_does_too():
    found = compared(world(), "chinchilla,over_training").selection
    near, far = (found.predict({"n_params": n, "n_tokens": 1e11}) for n in (1e9, 1e12))
    assert np.log(far["high"] / far["low"]) > 1.5 * np.log(near["high"] / near["low"])


def test_too_few_runs_are_not_calibrated_and_the_least_criterion_decides():
    found = compared(world(sizes=2, ratios=(10, 20, 80, 160)), "over_training,kaplan_nd")
    assert found.selection.calibrated.startswith("not calibrated") and "AICc" in found.selection.reason
    made = found.selection.predict({"n_params": 1e9, "n_tokens": 1e10})
    assert made["low"] is None and made["predicted_loss"] > 0
    few = compared(world(sizes=8, ratios=(20, 80)), "over_training").selection
    assert 0 < len(few.errors) < 19 and few.calibrated.endswith("too few for 95%: the largest error counts")


def test_a_law_with_too_many_parameters_is_left_out_and_said():
    found = compared(
        world(sizes=2, ratios=(20, 80, 160))[:5], "coupled,over_training", fitting=Fitting(starts=8, bootstrap=0)
    )
    assert list(found.selection.laws) == ["over_training"]
    assert any("coupled has 6 free parameters, but there are 5 rows" in text for text in found.warnings)
    with pytest.raises(UserError, match="coupled has 6 free parameters"):
        compared(world()[:5], "coupled")


def test_the_quantile_of_few_errors_is_the_largest_and_of_many_has_one_more_inside():
    assert quantile(np.array([3.0, 1.0, 2.0])) == 3.0
    errors = np.arange(1.0, 101.0)
    assert quantile(errors) == 96.0  # (100 + 1) 0.95 is 95.95
    rng = np.random.default_rng(0)
    hits = [rng.exponential() <= quantile(rng.exponential(size=39)) for _ in range(4000)]
    assert 0.94 <= np.mean(hits) <= 0.965  # 38 of 40


def test_one_size_is_no_plan_and_its_laws_are_said_to_be_undetermined(tmp_path, capsys):
    path = tmp_path / "one.csv"
    path.write_text(
        "N,D,loss\n" + "".join(f"1e8,{d},{1.7 + 400 / d**0.28 + 0.8:.4f}\n" for d in (2e9, 4e9, 8e9, 1.6e10))
    )
    at = ["--n-params", "7B", "--n-tokens", "140B"]
    kept = str(tmp_path / "laws.json")
    assert main(["laws", str(path), "--bootstrap", "0", "--starts", "4", *at, "--out", kept]) == 0
    printed = capsys.readouterr().out
    assert "not determined by these rows" in printed and "times beyond what was fitted" in printed
    assert main(["allocate", kept, "--flops", "1e21"]) == 2
    assert "allocate needs runs of several sizes; all fitted runs have n_params=1e+08" in capsys.readouterr().err


def test_a_missing_column_is_said_once_and_not_for_each_law():
    rows = [{key: value for key, value in row.items() if key != "loss"} | {"c4_loss": 3.0} for row in world()]
    with pytest.raises(UserError) as error:
        compared(rows)
    assert str(error.value).count("--map loss=c4_loss") == 1


def test_only_laws_of_size_and_tokens_can_be_compared():
    assert selection.candidates() == ["over_training", "chinchilla", "coupled", "kaplan_nd"]
    with pytest.raises(ConfigError, match=r"--laws must be laws of the loss in size and tokens .*; got kaplan_n"):
        compared(world(), "chinchilla,kaplan_n")
    with pytest.raises(ConfigError, match="--laws must be one of .*; got 'x'"):
        laws_named("x")


def test_the_command_prints_and_keeps_the_comparison(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    rows = world(sizes=6, ratios=(10, 40, 160))
    path.write_text("N,D,loss\n" + "".join(f"{r['n_params']},{r['n_tokens']},{r['loss']}\n" for r in rows))
    names = ["chinchilla", "over_training"]
    typed = ["laws", str(path), "--starts", "8", "--bootstrap", "20", "--hold-out", "N>9e8", "--n-params", "2B"]
    typed += ["--laws", ",".join(names)]
    assert main([*typed, "--n-tokens", "200B", "--out", str(tmp_path / "laws.json")]) == 0
    printed = capsys.readouterr().out
    assert "error_of_dearer_runs" in printed and "intervals are calibrated on" in printed and "inside" in printed
    kept = json.loads((tmp_path / "laws.json").read_text())
    assert {one["law"] for one in kept["laws"]} == set(kept["fits"]) == set(names)
    assert kept["asked"]["n_params"] == 2e9 and len(kept["predictions"]) == 3
    at = ["predict", str(tmp_path / "laws.json"), "--n-params", "2B"]
    assert main([*at, "--at", "tokens_per_param=100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(kept["asked"], rel=1e-12)
    assert main([*at, "--n-tokens", "200B"]) == 0
    printed = capsys.readouterr().out
    assert "the prediction is of " in printed and kept["calibrated"] in printed
    assert main(["allocate", str(tmp_path / "laws.json"), "--flops", "1e21"]) == 0
    assert "alone, the law with the largest share" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "laws.json"), "--out", str(tmp_path / "laws.html")]) == 0
    page = (tmp_path / "laws.html").read_text()
    assert "error_of_dearer_runs" in page and "Errors of dearer runs" in page and "<svg" in page
    few = ["laws", str(path), "--where", "tokens_per_param<20", "--laws", "kaplan_nd", "--bootstrap", "0"]
    assert main([*few, "--out", str(tmp_path / "few.png")]) == 1
    assert "there is no figure: no run is held out" in capsys.readouterr().err
    capsys.readouterr()
    assert main(typed) == 2
    assert "a prediction needs --n-params and --n-tokens" in capsys.readouterr().err
    assert main(["fit", str(path), "--starts", "8", "--bootstrap", "20", "--hold-out", "N>9e8"]) == 0
    printed = capsys.readouterr().out
    assert "error_of_dearer_runs" in printed and "take the law for true" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"laws": [{"law": "chinchilla", "share": 0.5}]}, "above_least_aicc"),
        ({"reach_of_errors": [1.0]}, "errors_of_dearer_runs and reach_of_errors are damaged"),
        ({"fits": {}}, "chinchilla"),
    ],
)
def test_a_damaged_comparison_is_refused_and_the_file_is_named(change, said, comparison, tmp_path):
    path = tmp_path / "laws.json"
    path.write_text(json.dumps(comparison.record() | change))
    with pytest.raises(UserError, match=f"{path}.*{said}"):
        st.predict(path, n_params=1e9, n_tokens=1e10)


@pytest.fixture(scope="module")
def comparison():
    return compared(world(sizes=5, ratios=(10, 40, 160)), "chinchilla,kaplan_nd")


def test_the_function_is_that_of_the_command():
    found = st.compare_laws(world(), ["chinchilla", "kaplan_nd"], starts=8, bootstrap=20, hold_out="n_params>9e8")
    assert found.selection.best == "chinchilla" and all(one["inside"] for one in found.predictions)
