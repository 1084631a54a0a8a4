"""Calls of harmful rates at a size that was not trained, and their outcomes."""

import json
import math

import pytest

from scaling_testbed import analyze, api
from scaling_testbed.analysis.curves.calls import FINE, HARMED, harmed, learnt_threshold, make_calls, outcomes
from scaling_testbed.analysis.curves.grouping import curves
from scaling_testbed.analysis.curves.instability import Quantity
from scaling_testbed.errors import UserError
from tests.analysis.conftest import grid

LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
GROUP = ["model.qk_norm"]


def world(widths, seeds=(0, 1, 2)):
    """The critical rate falls as 2 / width, and the score is 300 there."""

    def loss(condition, width, lr, seed):
        return 3.0 + 0.001 * seed - 0.01 * math.log(lr) * (lr < 2 / width) + 2.0 * max(0.0, math.log(lr * width / 2))

    def score(condition, width, lr, seed):
        return {"step": 1, "attention_logit_max/0": 300 * (lr * width / 2) ** 3 * (1 + 0.01 * seed)}

    return grid(loss, [{"model__qk_norm": "none"}], widths, LRS, seeds, diagnostics_at_step=score)


def n_params(width):
    return 24.0 * width**2


def test_a_larger_size_is_called_by_the_extrapolated_score_and_by_the_extrapolated_critical_rate(study):
    found = study(world((16, 32, 64)))
    made = make_calls(found, GROUP, Quantity(), "wide", lambda row: n_params(128), lr_range=(1e-3, 3e-1))
    assert [call.by_quantity for call in made] == [FINE] * 3 + [HARMED] * 3
    assert [call.by_critical_rate for call in made] == [FINE] * 3 + [HARMED] * 3
    assert made[0].critical_lr == pytest.approx(2 / 128 * math.exp(0.14), rel=0.15)
    assert made[2].predicted == pytest.approx(300 * (1e-2 * 128 / 2) ** 3 * 1.01, rel=0.01)
    assert 100 < made[0].threshold < 3000


def test_what_is_measured_later_tells_which_calls_were_right(study):
    made = make_calls(
        study(world((16, 32, 64))), GROUP, Quantity(), "wide", lambda row: n_params(128), lr_range=(1e-3, 3e-1)
    )
    records = [call.record() for call in made]
    unknown = outcomes(records, study(world((16, 32, 64)), name="same"))
    assert unknown.notes() == ["no call has an outcome yet"]
    records[0] = {**records[0], "by_quantity": HARMED}  # a wrong call
    later = outcomes(records, study(world((128,)), name="later"))
    assert [row["measured"] for row in later.records] == [FINE] * 3 + [HARMED] * 3
    assert later.records[0]["right_by_quantity"] is False and later.records[1]["right_by_quantity"] is True
    assert later.notes() == [
        "by quantity: 5 of 6 calls right, 83% [36%, 100%]; their interval decides 6, 5 of them rightly",
        "by critical rate: 6 of 6 calls right, 100% [54%, 100%]; their interval decides 0, 0 of them rightly",
        "the intervals take calls as independent; those of one size are not quite",
    ]


@pytest.fixture
def records(study):
    """Calls for width 128 at each rate."""
    found = study(world((16, 32, 64)))
    return [one.record() for one in make_calls(found, GROUP, Quantity(), "wide", lambda row: n_params(128), 0.25,
                                               (1e-3, 3e-1))]  # fmt: skip


def measured(records, study, keep):
    later = study([row for row in world((128,)) if keep(row["optimizer.lr"], row["seed"])], name="later")
    found = outcomes(records, later)
    return [row["measured"] for row in found.records], found.notes()[-1]


def test_a_rate_is_not_fine_while_a_rate_that_was_called_too_was_not_run(records, study):
    """Of the rates from 1e-1 on the lowest would be the best one. A harmed one stays so."""
    got, note = measured(records, study, lambda lr, seed: lr >= 1e-1)
    assert got == [None] * 5 + [HARMED]
    assert note.startswith("without an outcome, though they look fine: 1; not every called rate of their size was run")


def test_a_rate_without_all_seeds_of_its_size_has_no_outcome_and_is_not_the_best_one(records, study):
    got, _ = measured(records, study, lambda lr, seed: (lr, seed) != (1e-1, 2))
    assert got == [None, None, None, HARMED, None, HARMED]
    assert measured(records, study, lambda lr, seed: True)[0] == [FINE] * 3 + [HARMED] * 3


def test_a_rate_at_which_one_seed_of_three_diverged_is_harmed_by_its_mean_with_the_initial_loss(records, study):
    rows = [
        {**row, "status": "diverged", "val_loss": None} if (row["optimizer.lr"], row["seed"]) == (1e-3, 1) else row
        for row in world((128,))
    ]
    found = outcomes(records, study(rows, name="later"))
    assert [row["measured"] for row in found.records] == [HARMED] + [FINE] * 2 + [HARMED] * 3


def test_a_call_whose_interval_leaves_both_answers_is_not_decided(study):
    made = make_calls(
        study(world((16, 32, 64))), GROUP, Quantity(), "wide", lambda row: n_params(128), lr_range=(1e-3, 3e-1)
    )
    records = [{**call.record(), "low": 1e-9, "critical_low": 1.2e-2, "critical_high": 4e-2} for call in made]
    records[0] = {**records[0], "low": None, "critical_high": None}
    said = outcomes(records, study(world((128,)), name="later")).notes()
    # The score of the three harmed rates may now lie below its threshold, and the critical rate above 3e-2.
    assert said[0].endswith("their interval decides 2, 2 of them rightly")
    assert said[1].endswith("their interval decides 4, 4 of them rightly")


def test_calls_are_checked_in_their_own_condition_and_with_their_own_excess(study):
    """Also where the later study has one condition only, or declares another excess."""
    made = make_calls(
        study(world((16, 32, 64))), GROUP, Quantity(), "wide", lambda row: n_params(128), 0.25, (1e-3, 3e-1)
    )
    records = [call.record() for call in made]
    others = [{**row, "model.qk_norm": "layernorm"} for row in records]
    later = study(world((128,)), name="later")
    assert outcomes(others, later).notes() == ["no call has an outcome yet"]
    assert [row["measured"] for row in outcomes(records, later, excess=9.0).records] == [FINE] * 3 + [HARMED] * 3


def test_the_interval_of_an_extrapolated_critical_rate_is_of_the_sizes_where_they_miss_a_line(study):
    """Here by the steps of the rates, while the seeds hardly differ."""

    def made(widths):
        found = study(world(widths), name=f"{len(widths)} sizes")
        return make_calls(found, GROUP, Quantity(), "wide", lambda row: n_params(128), 0.25, (1e-3, 3e-1))[0]

    three, two = made((16, 32, 64)), made((32, 64))
    assert three.critical_low < three.critical_lr / 10 and three.critical_high > 10 * three.critical_lr
    assert 0.01 < two.critical_lr < 0.04
    assert (two.critical_low, two.critical_high) == (None, None)


def test_harm_is_an_excess_of_the_mean_loss_above_the_best_of_the_size(study):
    (curve,) = curves(study(world((64,))), GROUP)
    assert [lr for lr, bad in harmed(curve, 0.25).items() if bad] == [1e-1, 3e-1]


@pytest.mark.parametrize(
    ("values", "bad", "threshold"),
    [
        ([1, 10, 100, 1000], [False, False, True, True], math.sqrt(1000)),
        ([1000, 1, 100, 10], [True, False, True, False], math.sqrt(1000)),
        ([1, 10, 100, 1000, 10000], [False, True, False, True, True], math.sqrt(1e5)),
        ([1, 10], [False, False], 7.0),
        ([1, 10], [True, True], 7.0),
    ],
)
def test_the_threshold_has_the_fewest_errors(values, bad, threshold):
    assert learnt_threshold(values, bad, 7.0) == pytest.approx(threshold)


def test_a_study_without_a_smaller_size_cannot_call(study):
    with pytest.raises(UserError, match="has no size below wide, N=6144"):
        make_calls(study(world((32,))), GROUP, Quantity(), "wide", lambda row: n_params(16), lr_range=(1e-3, 3e-1))


def test_the_command_saves_calls_and_checks_them(study, tmp_path, capsys):
    declared = {"lr_range": [1e-3, 3e-1], "margins": {"S": 0.05}}
    place = study(world((16, 32, 64)), name="qknorm_lr", declared=declared).path
    saved = tmp_path / "calls.csv"
    assert analyze.main(["instability", str(place), "--predict", "model=nano_l", "--out", str(saved)]) == 0
    said = capsys.readouterr().out
    assert "nano_l" in said and "harmed: the loss is at least 0.25 nats above the best" in said
    later = study(world((16, 32, 64, 128)), name="later", sweep="qknorm_lr", declared=declared).path
    rows = [line for line in saved.read_text().splitlines()]
    n = int(float(rows[1].split(",")[rows[0].split(",").index("n_params")]))
    results = [json.loads(line) for line in (later / "results.jsonl").read_text().splitlines()]
    for row in results:  # nano_l has the gains of its norms
        row["n_params_non_embedding"] = n if row["model.d_model"] == 128 else row["n_params_non_embedding"]
    (later / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    assert analyze.main(["instability", str(later), "--check", str(saved)]) == 0
    assert "by critical rate: 6 of 6 calls right" in capsys.readouterr().out
    assert analyze.main(["instability", str(place), "--predict", "nano_l"]) == 2
    assert "--predict must be model=NAME" in capsys.readouterr().err
    assert analyze.main(["instability", str(place), "--predict", "model=x", "--check", str(saved)]) == 2
    for unused in (["--threshold", "5"], ["--hold-out-largest"], ["--size", "n_params"]):
        assert analyze.main(["instability", str(place), "--predict", "model=nano_l", *unused]) == 2
        assert f"{unused[0]} does not apply to --predict" in capsys.readouterr().err
    assert [call.lr for call in api.calls(place, "nano_l")] == list(LRS)
