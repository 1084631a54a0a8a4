"""The claims about distillation are judged by the runs of their arms, and its sweep names the teachers' runs."""

import math

import yaml

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_id
from scaling_testbed.papers.distillation import ARM, STUDENTS
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.sweeps.grid import SWEEP_DIR, load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row

RIGHT = {"ce": 2.09, "ce_twice": 2.04, "kl_16": 2.06, "kl_32": 2.0, "kl_64": 1.99, "half_64": 2.02}
RIGHT |= {"half_top4_64": 2.03, "top4_64": 2.2}


def arms():
    """The rows of keys of the sweep of students."""
    content = yaml.safe_load((SWEEP_DIR / "distillation.yaml").read_text())
    return content["scales"]["cpu"]["together"][0]


def verdicts(study, losses):
    rows = [
        make_row(1e-2, loss + 0.003 * math.sin(seed + len(arm)), seed=seed, run_id=f"{arm} {seed}", **{ARM: arm})
        for arm, loss in losses.items()
        for seed in range(10, 15)
    ]
    declared = {"margins": {"loss": 0.01}, "seeds": list(range(10, 15))}
    found = Evidence(study(rows, name="distillation", declared=declared), STUDENTS.group)
    return [claim.verdict(found).word for claim in STUDENTS.claims]


def test_each_claim_is_judged_by_the_rows_of_its_arms(study):
    assert [row[ARM] for row in arms()] == list(RIGHT)
    assert verdicts(study, RIGHT) == [AGREES] * 8
    wrong = RIGHT | {
        "half_top4_64": 2.15,
        "kl_64": 2.15,
        "ce_twice": 1.9,
        "half_64": 2.01,
        "kl_16": 2,
        "kl_32": 2.3,
        "top4_64": 2.0,
    }
    assert verdicts(study, wrong) == [DISAGREES] * 8


def test_without_an_arm_its_claims_are_not_told(study):
    found = verdicts(study, {arm: loss for arm, loss in RIGHT.items() if arm != "half_top4_64"})
    assert found == [CANNOT_TELL, *[AGREES] * 3, CANNOT_TELL, *[AGREES] * 3]


def test_the_teachers_are_the_runs_of_their_sweep():
    planned, _ = plan(load_sweep("distillation_teachers"))
    ids = [run_id(run) for run in compose_many([one.overrides for one in planned])]
    named = dict.fromkeys(row["objective.teacher"] for row in arms() if "objective.teacher" in row)
    assert list(named) == [f"runs/distillation_teachers/{one}" for one in ids]
    stored = {row["objective.targets"] for row in arms() if "objective.targets" in row}
    assert stored == {f"data/*/targets/{ids[-1]}-top4-*"}
