"""The curvature at equal loss: exact for a power law, never extrapolated, and read from the table of a study."""

import math

import pytest

from scaling_testbed.analysis.trajectories.equal_loss import TABLE, at_loss, curvatures_of, equal_losses
from scaling_testbed.errors import UserError
from scaling_testbed.row_files import write_rows
from tests.analysis.conftest import make_row


def checkpoints(losses, c=1000.0, k=5.0, run="runs/x/a", **more):
    """The records of a run whose trace is c / loss^k."""
    common = {"run": run, "n_params": 9000, "tokens": 4096, "data_fingerprint": "f"}
    return [{**common, "step": 100 * n, "loss": x, "fisher_trace": c / x**k, **more} for n, x in enumerate(losses, 1)]


def test_a_power_law_of_the_loss_is_met_exactly_between_and_at_the_checkpoints():
    given = checkpoints([3.0, 2.5, 2.2, 1.9])
    for level in (2.9, 2.5, 2.3, 2.0, 1.9):
        found = at_loss(list(reversed(given)), level)
        assert found.value == pytest.approx(1000 / level**5, rel=1e-12) and found.note == ""


def test_a_loss_that_a_run_does_not_pass_is_withheld_with_the_reason():
    given = checkpoints([3.0, 2.5, 2.2])
    for level in (3.01, 2.19):
        found = at_loss(given, level)
        assert found.value is None and found.note == "its 3 checkpoints have losses from 3.000 to 2.200"
    assert at_loss(given[:1], 3.0).note == "1 checkpoint, and it takes two"
    assert at_loss([], 3.0).note == "0 checkpoints, and it takes two"


def test_where_a_loss_is_passed_twice_the_first_time_counts():
    given = checkpoints([3.0, 2.0, 2.4, 1.8])
    given[2]["fisher_trace"] = given[3]["fisher_trace"] = 7.0
    assert at_loss(given, 2.2).value == pytest.approx(1000 / 2.2**5)
    assert at_loss(checkpoints([2.0, 2.0]), 2.0).value == pytest.approx(1000 / 2**5)


def test_a_trace_that_is_not_finite_withholds_what_lies_beside_it():
    given = checkpoints([3.0, 2.5, 2.2])
    for bad in (math.inf, math.nan, None, 0.0):
        given[2]["fisher_trace"] = bad
        assert at_loss(given, 2.3).note == "a trace at step 200 or 300 is not finite"
        assert at_loss(given, 2.7).value is not None


def test_each_run_and_loss_has_a_line():
    both = [*checkpoints([3.0, 2.0]), *checkpoints([2.5, 1.5], run="runs/x/b")]
    found = equal_losses(both, [2.8, 2.2])
    assert [(one["run"], one["loss"], one["fisher_trace"] is None) for one in found] == [
        ("runs/x/a", 2.8, False), ("runs/x/a", 2.2, False), ("runs/x/b", 2.8, True), ("runs/x/b", 2.2, False)
    ]  # fmt: skip
    assert found[2]["note"] == "its 2 checkpoints have losses from 2.500 to 1.500" and found[0]["n_params"] == 9000


def test_the_table_of_a_study_is_read_by_run_and_refused_where_runs_cannot_be_compared(study):
    found = study([make_row(1e-2, 2.0, run_id="a")], name="curvature")
    with pytest.raises(UserError, match=r"curvature.csv does not exist; .*analyze curvature .* --all-steps --out"):
        curvatures_of(found)
    path, other = found.path / TABLE, checkpoints([2.5, 1.5], run="runs/x/b")
    write_rows(path, [*checkpoints([3.0, 2.0]), *other])
    read = curvatures_of(found)
    assert {run_id: [one["step"] for one in rows] for run_id, rows in read.items()} == {
        "a": [100, 200],
        "b": [100, 200],
    }
    assert at_loss(read["b"], 2.0).value == pytest.approx(1000 / 2**5)
    for change, said in (({"tokens": 64}, "several tokens"), ({"data_fingerprint": "g"}, "several data_fingerprint")):
        write_rows(path, [*checkpoints([3.0, 2.0]), *(one | change for one in other)])
        with pytest.raises(UserError, match=said):
            curvatures_of(found)
    write_rows(path, [{"run": "a", "step": 1}])
    with pytest.raises(UserError, match="has no column loss"):
        curvatures_of(found)
