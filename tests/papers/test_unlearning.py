"""The claims about unlearning on planted rows where they are right, and where they are wrong."""

import math

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import flatten
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.unlearning import UNLEARNING
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row

GOLD = (6.3, 1.8)
# Arm -> (loss on the strings, loss on held-out text)
RIGHT = {
    ("ascent", 0): (60.0, 30.0), ("ascent", 1): (40.0, 2.5), ("npo", 0): (6.0, 2.3), ("npo", 1): (5.0, 2.19),
    ("flat_tv", 0): (14.0, 8.0), ("flat_tv", 1): (7.0, 2.19), ("cross_entropy", 1): (3.5, 2.18),
}  # fmt: skip
WRONG = {
    ("ascent", 0): (7.0, 2.1), ("ascent", 1): (7.0, 2.1), ("npo", 0): (30.0, 2.3), ("npo", 1): (9.0, 20.4),
    ("flat_tv", 0): (7.0, 2.0), ("flat_tv", 1): (12.0, 5.0), ("cross_entropy", 1): (6.0, 20.0),
}  # fmt: skip


def verdicts(study, arms):
    planned, _ = plan(load_sweep("unlearning", "cpu"))
    runs = compose_many([one.overrides for one in planned if not one.is_part])
    assert len(runs) == 40 and len(planned) == 45
    rows = []
    for run in runs:
        settings = {
            key: value
            for key, value in flatten(run).items()
            if key.startswith(("objective.", "data.", "budget.", "start.")) and value is not None
        }
        arm = (settings["objective.name"], settings["data.weights.retain"])
        if (losses := GOLD if run.start.run is None else arms.get(arm)) is None:
            continue
        noise = 0.004 * math.sin(run.seed + 7 * len(arm[0]) + arm[1])
        row = make_row(1e-3, 3.0, seed=run.seed, run_id=f"{arm} {run.start.run} {run.seed}", **settings)
        rows.append(row | {"val_loss_by_set": {"forget": losses[0] + noise, "retain": losses[1] + noise}})
    declared = {"margins": {"loss": 0.05}, "seeds": [20, 21, 22, 23, 24]}
    found = Evidence(study(rows, name="unlearning", declared=declared), UNLEARNING.group)
    return [claim.verdict(found).word for claim in UNLEARNING.claims]


def test_each_claim_is_judged_by_the_rows_of_its_arms(study):
    assert verdicts(study, RIGHT) == [AGREES] * 7
    assert verdicts(study, WRONG) == [DISAGREES] * 7


def test_without_an_arm_its_claims_are_not_told(study):
    without = {arm: losses for arm, losses in RIGHT.items() if arm != ("npo", 0)}
    assert verdicts(study, without) == [AGREES] * 4 + [CANNOT_TELL] + [AGREES] * 2


def test_settings_that_both_sides_share_are_said_once():
    said = "loss on held-out text with objective flat_tv, weight of retain 0 less with weight of retain 1, mean over"
    assert UNLEARNING.claims[6].estimand.startswith(said)
