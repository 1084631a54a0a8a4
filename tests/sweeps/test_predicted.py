"""The predicted final losses of a sweep: read from its folders, shown by `status`."""

from dataclasses import replace

import pytest

from scaling_testbed.sweeps import view
from scaling_testbed.sweeps.predicted import with_predictions, withheld
from tests.test_tables import printed


def test_runs_that_have_begun_have_a_predicted_final_loss(trained):
    states = [*(trained(f"f{place}", factor=1 + place / 9) for place in range(5)), trained("u", "running", 1.5, 200)]
    states += [trained("s", "stopped", 1.2, 300), trained("p", "pending", 1.0, 0), trained("d", "diverged", 1.0, 200)]
    found = {one.run.run_id: one for one in with_predictions(states)}
    assert found["u"].final.loss == pytest.approx(1.5 * 2.05) and found["s"].final.loss == pytest.approx(1.2 * 2.05)
    assert all(found[name].final is None for name in ("f0", "p", "d"))
    assert (
        found["u"].record()["predicted_loss"] == found["u"].final.loss and "predicted_loss" not in found["p"].record()
    )
    lines = printed(view.status_table(list(found.values())), 160)
    assert "predicted final loss" in lines[0] and any("3.0750 ± 0.0000" in line and "running" in line for line in lines)
    assert withheld(list(found.values())) == []


def test_too_few_finished_runs_are_named_and_no_column_is_shown(trained):
    found = with_predictions([*(trained(f"f{place}") for place in range(4)), trained("u", "running", 1.5, 200)])
    (line,) = withheld(found)
    assert line.startswith("no predicted final loss of 1 runs: 4 finished runs of this schedule have a curve")
    assert "predicted final loss" not in printed(view.status_table(found), 160)[0]


def test_curves_are_not_read_where_no_run_has_begun(trained, monkeypatch):
    monkeypatch.setattr("scaling_testbed.sweeps.predicted.curve_so_far", lambda run: 1 / 0)
    states = [trained("f"), trained("p", "pending", upto=0), trained("r", "running", upto=0)]
    assert with_predictions(states) == states


def test_a_damaged_curve_withholds_the_prediction_of_its_run_alone(trained, tmp_path):
    states = [*(trained(f"f{place}") for place in range(6)), trained("u", "running", 1.5, 200)]
    path = tmp_path / "f0" / "metrics.jsonl"
    path.write_text(path.read_text() * 2)  # its steps repeat
    assert with_predictions(states)[-1].final.n_runs == 5
    old = replace(states[-1], run=replace(states[-1].run, config={}))  # a plan of an older version
    assert "cannot be read" in with_predictions([*states[:-1], old])[-1].final.withheld
