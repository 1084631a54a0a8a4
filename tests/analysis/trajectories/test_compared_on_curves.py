"""Laws compared on the points of training curves: whole runs are left out, and each counts once."""

import json

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.analysis.laws import selection
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.study import Fitting, Rows, compare_rows, laws_named
from scaling_testbed.analysis.trajectories.points import law_points
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError
from tests.analysis.laws.test_selection import derived
from tests.analysis.laws.test_selection import world as ends
from tests.analysis.trajectories.worlds import BATCH, run, world

TRUE = {"E": 1.5, "A": 20.0, "alpha": 0.3, "B": 60.0, "beta": 0.4}
SIZES = [4000 * 2**power for power in range(7)]
QUICK = Fitting(starts=4, bootstrap=0)


def planted(n, tokens):
    return float(LAWS["chinchilla"].predict(TRUE, {"n_params": n, "n_tokens": tokens}))


@pytest.fixture
def ladder(study):
    """Seven sizes at a constant rate with a planted law, each run with an error of its own."""
    errors = np.random.default_rng(3).normal(0, 0.002, len(SIZES))
    runs = [
        run(f"n{n}", n, 600, lambda step, rates, n=n, e=e: planted(n, BATCH * step) * np.exp(e), every=100)
        for n, e in zip(SIZES, errors, strict=True)
    ]
    rows, traces = world(runs)
    return study(rows, name="ladder", traces=traces)


@pytest.fixture
def seen(monkeypatch):
    """The fitted and the predicted rows of each refit."""
    found, real = [], selection.errors_of

    def errors_of(problem, fit, fitted, tests):
        found.extend(zip([problem] * len(tests), fitted, tests, strict=True))
        return real(problem, fit, fitted, tests)

    monkeypatch.setattr(selection, "errors_of", errors_of)
    return found


def test_no_curve_is_fitted_in_one_part_and_predicted_in_another(ladder, seen):
    found = compare_rows(law_points(ladder), laws_named("chinchilla,kaplan_nd"), fitting=QUICK)
    assert len(seen) > 2 * len(SIZES)
    for problem, fitted, test in seen:
        assert np.any(test) and not set(problem.runs[fitted]) & set(problem.runs[test])
        assert len(set(problem.runs[fitted])) >= 3
    assert found.selection.laws["chinchilla"].share == 1
    assert found.selection.laws["chinchilla"].forward_error < 0.02
    assert all(one.aicc is None and one.fit.n_runs == len(SIZES) for one in found.selection.laws.values())
    assert "AICc is withheld: the points of a run are not independent" in found.warnings
    tests = [(problem.runs, test) for problem, _, test in seen if problem.law.name == "chinchilla"]
    pairs = sum(len(set(runs[test])) for runs, test in tests) - len(SIZES)  # the rest is one left-out size each
    assert len(found.selection.errors) == len(found.selection.reach) == pairs >= 5
    assert np.all((found.selection.reach > 1) & (found.selection.reach <= selection.REACH))


def test_runs_of_one_point_are_compared_as_rows_are():
    rows = [row | {"run": f"r{place}", "lr_share": 1} for place, row in enumerate(derived(ends(sizes=5)))]
    laws = laws_named("chinchilla,kaplan_nd")
    one, other = (compare_rows(Rows(rows=rows, run=name), laws, fitting=QUICK).selection for name in ("run", None))
    assert one.errors == pytest.approx(other.errors) and one.reach == pytest.approx(other.reach)
    for name, law in one.laws.items():
        assert (law.share, law.forward_error) == pytest.approx((other.laws[name].share, other.laws[name].forward_error))
        assert law.size_error == pytest.approx(other.laws[name].size_error)


def test_a_run_counts_once_in_the_mean_and_by_its_last_point_in_the_intervals():
    runs, test = np.array(["a", "a", "b", "a", "b", "c"]), np.array([True, True, True, True, True, False])
    means = selection._mean_of_runs(np.array([1.0, 2.0, 10.0, 3.0, 20.0]), test, runs)
    assert means.tolist() == [2.0, 15.0]
    assert selection._last_of_runs(test, runs, np.array([1.0, 3.0, 2.0, 2.0, 1.0, 9.0])).tolist() == [1, 2]
    assert selection._of_whole_run(np.array([1.0, 3.0, 2.0, 2.0, 1.0, 9.0]), runs).tolist() == [3, 3, 2, 3, 2, 9]


def test_too_few_runs_are_judged_by_left_out_sizes_and_have_no_interval(ladder):
    given = law_points(ladder)
    few = Rows(rows=[row for row in given.rows if row["n_params"] in SIZES[2:5]], run=given.run)
    found = compare_rows(few, laws_named("chinchilla,kaplan_nd"), fitting=QUICK).selection
    assert "least error of left-out sizes; there are too few runs" in found.reason and not len(found.errors)
    assert found.predict({"n_params": 5e5, "n_tokens": 1e5})["low"] is None


def test_a_hold_out_that_divides_a_curve_is_refused(ladder):
    with pytest.raises(ConfigError, match="--hold-out divides the curve of n128000; hold out whole runs, such as "):
        compare_rows(law_points(ladder), laws_named("chinchilla"), hold_out=["step>300"], fitting=QUICK)


def test_the_command_predicts_held_out_runs_and_what_it_saves_is_no_ground_for_next_runs(ladder, tmp_path, capsys):
    words = ["laws", str(ladder.path), "--curves", "--laws", "chinchilla,kaplan_nd", "--starts", "4"]
    kept = tmp_path / "laws.json"
    assert main([*words, "--bootstrap", "0", "--hold-out", "n_params>200000", "--out", str(kept)]) == 0
    out = capsys.readouterr().out
    assert "n256000" in out and "mean_error" in out and "AICc is withheld" in out and "dearer runs" in out
    (held,) = json.loads(kept.read_text())["held_out_runs"]
    assert held["run"] == "n256000" and held["low"] < held["actual"] < held["high"] and held["mean_error"] < 0.05
    with pytest.raises(ConfigError, match="this one is of points of curves"):
        st.next_runs(kept, target={"n_params": 1e6, "n_tokens": 1e6}, flops=1e12)
    found = st.compare_laws(ladder, ["chinchilla", "kaplan_nd"], curves=True, starts=4, bootstrap=0)
    assert found.selection.best == "chinchilla"
