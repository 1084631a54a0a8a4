"""The claims about chosen documents on planted rows where they are right, and where they are wrong."""

import math

import pytest

from scaling_testbed.papers.document_selection import GAP, LOW, MIDDLE, PRESELECT, RANDOM, SELECTION
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row

SEEDS = (10, 11, 12)
RIGHT = {RANDOM: 2.18, LOW: 2.15, GAP: 2.13, MIDDLE: 2.11, PRESELECT: 2.08, "planted_clean": 1.97, "planted": 2.2}


def verdicts(study, losses):
    rows = []
    for arm, loss in losses.items():
        for seed in SEEDS:
            row = make_row(1e-2, loss + 0.003 * math.sin(seed), seed=seed, d_model=32, run_id=f"{arm} {seed}")
            chosen = {"data.documents": arm, "data.name": "filtered"} if arm.endswith(".json") else {"data.name": arm}
            rows.append(row | chosen)
    declared = {"margins": {"loss": 0.02}, "seeds": list(SEEDS)}
    found = Evidence(study(rows, name="document_selection", declared=declared), SELECTION.group)
    return [claim.verdict(found).word for claim in SELECTION.claims]


def test_each_claim_is_judged_by_the_loss_of_its_arms(study):
    assert verdicts(study, RIGHT) == [AGREES] * 5
    wrong = RIGHT | {RANDOM: 2.0, LOW: 2.01, GAP: 2.02, MIDDLE: 2.06, "planted_clean": 2.15}
    assert verdicts(study, wrong) == [DISAGREES] * 5


@pytest.mark.parametrize("left_out", [PRESELECT])
def test_without_an_arm_its_claims_are_not_told(study, left_out):
    found = verdicts(study, {arm: loss for arm, loss in RIGHT.items() if arm != left_out})
    assert found == [CANNOT_TELL, CANNOT_TELL, CANNOT_TELL, AGREES, CANNOT_TELL]


def test_the_sweep_has_every_arm_of_the_claims():
    runs, _ = plan(load_sweep("document_selection"))
    arms = {word.removeprefix("data.documents=") for run in runs for word in run.overrides}
    assert {RANDOM, LOW, GAP, MIDDLE, PRESELECT, "data.name=planted_clean"} <= arms and len(runs) == 21
    assert len(plan(load_sweep("document_ladder"))[0]) == 4
