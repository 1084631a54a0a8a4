"""The claims about the critical batch on planted grids where they are right, and where they are wrong."""

import math

import pytest

from scaling_testbed.papers import batch_numbers as of
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.loss_trajectory import CRITICAL_BATCH
from scaling_testbed.papers.measures import Evidence
from tests.analysis.trajectories.test_critical_batch import SIZES, planted_world

SEEDS, RATES = (1, 2, 3), (3e-3,)


def evidence(study, change=lambda row, step, loss: loss, seeds=SEEDS):
    """The evidence of a planted grid at one rate; `change` mends its losses."""
    rows, traces = planted_world(seeds=seeds, sizes=(*SIZES, 55000), noise=0.001, lrs=RATES, slow=0.0, points=20)
    for row in rows:
        row["n_params"] += 8000  # embedding and head, which these laws do not count
        for record in traces[row["run_id"]]:
            if record["step"] and "val_loss" in record:
                record["val_loss"] = float(change(row, record["step"], record["val_loss"]))
    given = study(rows, name="critical_batch", traces=traces, declared={"seeds": list(seeds), "rates": list(RATES)})
    return Evidence(given)


def words(evidence, places):
    return [CRITICAL_BATCH.claims[place].verdict(evidence) for place in places]


def test_on_curves_of_the_law_all_claims_agree(study):
    found = words(evidence(study), range(5))
    assert [one.word for one in found] == [AGREES] * 5
    assert "/ L^4." in found[1].words and "the middle batch (2,048): 0." in found[2].words
    assert "the largest batch (16,384)" in found[3].words and "the largest size (55,000)" in found[4].words


@pytest.mark.parametrize(("power", "factor"), [(1, "9."), (-1, "0.1")])
def test_a_critical_batch_that_changes_with_the_size_and_not_with_the_loss_disagrees(study, power, factor):
    def other(row, step, loss):
        critical = 5000 * (row["n_params_non_embedding"] / SIZES[1]) ** power
        batch = row["batch.sequences"] * row["batch.sequence_length"]
        return 1 + (300 / step * (1 + critical / batch)) ** 0.4 * math.exp(0.001 * math.sin(step + row["seed"]))

    found = words(evidence(study, other), (0, 1))
    assert [one.word for one in found] == [DISAGREES] * 2
    assert f"a factor of {factor}" in found[0].words and math.copysign(1, found[0].effect) == power


@pytest.mark.parametrize(("which", "place"), [(of.MIDDLE_BATCH, 2), (of.LARGEST_BATCH, 3), (of.LARGEST_SIZE, 4)])
def test_curves_that_do_not_follow_the_law_of_the_others_disagree(study, which, place):
    def other(row, step, loss):
        batch = row["batch.sequences"] * row["batch.sequence_length"]
        odd = {
            of.MIDDLE_BATCH: batch == 2048,
            of.LARGEST_BATCH: batch == 16384,
            of.LARGEST_SIZE: row["n_params_non_embedding"] > 5e4,
        }
        return loss * (1.1 if odd[which] else 1.0)

    (number,) = of.curve_error(which)(evidence(study, other, seeds=SEEDS[:1]))
    assert number.number == pytest.approx(1 - 1 / 1.1, abs=0.01)  # the law predicts the loss without the factor
    assert words(evidence(study, other, seeds=SEEDS[:2]), (place,))[0].word == DISAGREES


def test_without_what_a_claim_needs_it_cannot_be_told(study):
    rows, traces = planted_world(seeds=SEEDS[:2], sizes=SIZES, lrs=RATES, points=10)
    rows = [row | {"n_params": row["n_params"] + 8000} for row in rows]
    declared = {"seeds": list(SEEDS[:2]), "rates": list(RATES)}
    bare = words(Evidence(study(rows, name="bare", declared=declared)), range(5))
    assert {one.word for one in bare} == {CANNOT_TELL} and "holds no training curve" in bare[0].words
    rows = [row for row in rows if row["batch.sequences"] in (4, 256)]
    few = words(Evidence(study(rows, name="few", traces=traces, declared=declared)), range(5))
    assert {one.word for one in few} == {CANNOT_TELL}
    assert few[0].words == "no loss has a critical batch at two sizes"
    assert few[1].words == "fewer than two losses have a critical batch"
    assert few[2].words == "the middle batch is predicted from two others or more, and batch_tokens is 256, 16,384"
    assert few[4].words == "the largest size is predicted from two others or more, and n_params is 6,000, 25,000"
