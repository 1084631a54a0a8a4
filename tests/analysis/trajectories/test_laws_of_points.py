"""Laws fitted to the points of training curves: each run counts once, and the intervals resample runs."""

import json

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.analysis.figures.law_panels import frontier_panels
from scaling_testbed.analysis.laws import frontier
from scaling_testbed.analysis.laws.best_runs import frontier_rows
from scaling_testbed.analysis.laws.fitted import from_record
from scaling_testbed.analysis.laws.fitting import HUBER, LSQ_LOG, fit, problem_of
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.study import Fitting, fit_rows
from scaling_testbed.analysis.trajectories.points import law_points
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError
from tests.analysis.laws.planted import PLANTED
from tests.analysis.trajectories.worlds import run, world

LAW, TRUE = LAWS["loss_steps"], {"Nc": 1e7, "alpha_N": 0.12, "Sc": 50.0, "alpha_S": 0.6}
SIZES = (6000, 12000, 24000, 48000, 96000)


def curve(n, noise=0.0):
    """The planted loss of a size at each step, times one factor for the whole run."""
    return lambda step, rates: float(LAW.predict(TRUE, {"n_params": n, "steps": step})) * np.exp(noise)


@pytest.fixture
def ladder(study):
    """A study of five sizes at a constant rate with a planted law, each run with an error of its own."""
    errors = np.random.default_rng(1).normal(0, 0.01, len(SIZES))
    runs = [run(f"n{n}", n, 600, curve(n, error)) for n, error in zip(SIZES, errors, strict=True)]
    rows, traces = world(runs)
    return study(rows, name="ladder", traces=traces)


def test_a_run_counts_once_however_often_it_is_evaluated():
    """The objective and the optimum are those of rows repeated so that each run has as many."""
    n = np.array([1e3, 1e3, 1e4, 1e4, 1e4, 1e4, 1e5, 1e5])
    inputs = {"n_params": n, "steps": np.array([100, 400, 100, 200, 300, 400, 100, 400.0])}
    observed = LAW.predict(TRUE, inputs) * np.exp(np.random.default_rng(0).normal(0, 0.02, len(n)))
    runs = [f"n{value:g}" for value in n]
    repeated = np.repeat(np.arange(len(n)), np.where(n == 1e4, 1, 2))
    for objective in (HUBER, LSQ_LOG):
        found = fit(LAW, inputs, observed, objective=objective, starts=6, bootstrap=0, runs=runs)
        same = fit(
            LAW, {key: one[repeated] for key, one in inputs.items()}, observed[repeated],
            objective=objective, starts=6, bootstrap=0,
        )  # fmt: skip
        assert found.params == pytest.approx(same.params, rel=1e-3) and found.n_runs == 3
        assert found.objective["value"] * 12 / 8 == pytest.approx(same.objective["value"], rel=1e-6)
    assert problem_of(LAW, inputs, observed, runs=runs).weights.sum() == pytest.approx(len(n))
    assert problem_of(LAW, inputs, observed).weights == 1.0


def test_intervals_come_from_resamples_of_whole_runs(ladder):
    """Points of a run have one error, so many points tell hardly more than a few. Rows would be taken as independent:
    their interval is far narrower."""
    given = law_points(ladder)
    fitting = Fitting(objective=LSQ_LOG, starts=4, bootstrap=40)
    found = fit_rows(given, LAW, fitting=fitting).fit
    assert (found.n_rows, found.n_runs) == (28 * len(SIZES), len(SIZES)) and found.params["alpha_S"] == pytest.approx(
        TRUE["alpha_S"], abs=0.1
    )
    low, high = found.ci95["alpha_N"]
    assert low <= TRUE["alpha_N"] <= high
    as_rows = fitting.fit(LAW, given.rows, LSQ_LOG)
    assert high - low > 2 * np.diff(as_rows.ci95["alpha_N"])[0]
    two = [row for row in given.rows if row["run"] in ("n6000", "n96000")]
    few = fitting.fit(LAW, two, LSQ_LOG, run="run")
    assert few.draws == [] and any("the points are of 2 runs: too few for an interval" in text for text in few.warnings)


def test_fit_takes_curves_on_the_command_line(ladder, tmp_path, capsys):
    kept = tmp_path / "fit.json"
    words = ["fit", str(ladder.path), "--law", "loss_steps", "--curves", "--first-step", "100", "--starts", "4"]
    assert main([*words, "--bootstrap", "20", "--hold-out", "n_params>9e4", "--out", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "over 104 points of 4 runs" in printed and "low and high: 95 % over 20 resamples of the runs" in printed
    assert "n96000 " in printed and "n96000 step" not in printed and "largest_error" in printed
    assert (
        "mean relative error of all 26 held-out points: " in printed
        and "20 points before step 100 are left out" in printed
    )
    record = json.loads(kept.read_text())
    assert record["n_runs"] == 4 and len(record["predictions"]) == 26
    same = st.fit(ladder.path, "loss_steps", curves=True, hold_out="n_params>9e4", starts=4, bootstrap=0)
    assert same.fit.n_rows == 4 * 28 and same.fit.n_runs == 4
    with pytest.raises(ConfigError, match="leave source out"):
        st.fit(ladder.path, "loss_steps", curves=True, source="mlfoundations-scaling")
    assert main(["predict", str(kept), "--n-params", "1e5", "--at", "steps=600"]) == 0
    assert "predicted_loss" in capsys.readouterr().out


def test_points_at_the_peak_rate_beside_ends_of_decays_are_named(study):
    """Not where --where has chosen one of the two kinds."""
    both = [*(run(f"n{n}", n, 600, curve(n)) for n in SIZES), *(run(f"c{n}", n, 600, curve(n), schedule="cosine")
            for n in SIZES)]  # fmt: skip
    rows, traces = world(both)
    given, quick = law_points(study(rows, traces=traces)), Fitting(starts=2, bootstrap=0)
    said = fit_rows(given, LAW, fitting=quick).warnings
    assert any(text.startswith("points at the peak rate (5 runs) stand beside ends of runs") for text in said)
    for chosen in ("lr_share=1", "lr_share<1"):
        said = fit_rows(given, LAW, where=[chosen], fitting=quick).warnings
        assert not any(text.startswith("points at the peak rate") for text in said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--law", "optimal_lr"], "--curves: optimal_lr is no law of the loss of a run"),
        (["--law", "sigmoid"], "--curves: sigmoid is no law of the loss of a run"),
        (["--law", "loss_steps", "--source", "mlfoundations-scaling"], "leave --source out"),
        (["--law", "loss_steps", "--warmup-steps", "9"], "--warmup-steps is for tables"),
        (["--law", "loss_steps", "--first-step", "0"], "--first-step must be a whole number of at least 1"),
    ],
)
def test_what_curves_cannot_do_is_one_line(ladder, capsys, words, said):
    assert main(["fit", str(ladder.path), "--curves", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.splitlines()) == 1


def test_options_of_curves_need_curves(ladder, capsys):
    assert main(["fit", str(ladder.path), "--law", "loss_steps", "--first-step", "9"]) == 2
    assert "--first-step needs --curves" in capsys.readouterr().err


def test_points_of_a_law_of_size_and_tokens_are_ends_of_runs_at_the_peak_rate(study):
    """A planted chinchilla world: points at a constant rate give its parameters as finished runs would."""
    law, true = LAWS["chinchilla"], PLANTED["chinchilla"] | {"A": 40.0, "B": 41.0}

    def loss(n):
        return lambda step, rates: float(law.predict(true, {"n_params": n, "n_tokens": 128.0 * step}))

    runs = [run(f"n{n}", n, 600, loss(n)) for n in SIZES]
    rows, traces = world(runs)
    given = law_points(study(rows, traces=traces))
    found = fit_rows(given, law, fitting=Fitting(starts=8, bootstrap=0))
    assert found.fit.params == pytest.approx(true, rel=0.02) and found.fit.n_rows == 28 * len(SIZES)
    assert not any("losses in mid-run are no losses" in text for text in found.warnings)


def decaying(n, steps):
    """A planted world in which a run loses a hundredth of its loss at a high rate, and gains it as the rate decays."""
    law, true = LAWS["chinchilla"], PLANTED["chinchilla"] | {"A": 40.0, "B": 41.0}

    def loss(step, rates):
        high = rates[-1] / rates.max()
        return float(law.predict(true, {"n_params": n, "n_tokens": 128.0 * step})) * (1 + 0.01 * high)

    return run(f"n{n}s{steps}", n, steps, loss, schedule="cosine", every=40)


def best_size(flops, true):
    """Hoffmann et al. 2022, eq. 4."""
    ratio = true["alpha"] * true["A"] / (true["beta"] * true["B"])
    return ratio ** (1 / (true["alpha"] + true["beta"])) * (flops / 6) ** (
        true["beta"] / (true["alpha"] + true["beta"])
    )


@pytest.fixture
def cosines(study, monkeypatch):
    """Twelve sizes with cosines of three lengths, in a world where the exponent of the best size is .4516."""
    monkeypatch.setattr("scaling_testbed.analysis.laws.best_runs.RESAMPLES", 40)
    sizes = [int(n) for n in np.geomspace(600, 1.2e5, 12)]
    rows, traces = world([decaying(n, steps) for n in sizes for steps in (200, 800, 3200)])
    return study(rows, name="cosines", traces=traces)


def test_the_envelope_of_whole_curves_finds_the_planted_best_sizes(cosines):
    """The loss there is between that of the ends of runs and that of runs at a high rate."""
    given = law_points(cosines, decayed=True)
    found = frontier_rows(given, "envelope")
    true = PLANTED["chinchilla"] | {"A": 40.0, "B": 41.0}
    exponent = true["beta"] / (true["alpha"] + true["beta"])
    trusted = [one for one in found.optima if not one["note"]]
    assert len(trusted) > 50 and found.fit.params["p"] == pytest.approx(exponent, abs=0.06)
    for one in trusted:
        assert 0.4 < one["n_params"] / best_size(one["flops"], true) < 2.5  # a size in steps of a factor of 1.6
        ends = LAWS["chinchilla"].predict(true, {"n_params": one["n_params"], "n_tokens": one["n_tokens"]})
        assert 0.999 * ends < one["loss"] < 1.01 * ends
    low, high = found.fit.ci95["p"]
    assert low <= exponent <= high and 0.01 < high - low < 0.5
    with pytest.raises(ConfigError, match="--curves is for --method envelope"):
        frontier_rows(given, "isoflop")


def test_the_envelope_takes_the_lowest_run(cosines):
    """At the end of a short cosine, a longer one of the same size is still at a high rate."""
    given = law_points(cosines, decayed=True)
    curves = {}
    for row in given.rows:
        curves.setdefault(row["run"], []).append((row["flops"], row["loss"]))
    for one in frontier.envelope(given.rows, "run")[::7]:
        at = np.log(one.flops)
        reached = [np.log(np.transpose(sorted(curve))) for curve in curves.values()]
        losses = [np.exp(np.interp(at, x, y)) for x, y in reached if x[0] - 1e-9 <= at <= x[-1] + 1e-9]
        assert one.loss == pytest.approx(min(losses), rel=1e-9)


def test_frontier_takes_curves_on_the_command_line(cosines, tmp_path, capsys):
    words = ["frontier", str(cosines.path), "--method", "envelope", "--curves", "--out", str(tmp_path / "f.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "N = N0 (C/C0)^p" in printed and "95 % over 40 resamples of the runs\n" in printed
    record = json.loads((tmp_path / "f.json").read_text())
    panels = frontier_panels(record["runs"], record["optima_by_budget"], from_record(record), "envelope")
    assert len(panels[0].lines) == 36 + 1  # one line for each run, and the envelope
