"""The claims about online weights on planted rows where they are right, and where they are wrong."""

import math

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import flatten
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.skill_it import LEARNABLE, ONLINE
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row

RIGHT = {"uniform": 2.51, "without": 2.41, "hand": 2.3, "raw": 2.52, "excess": 2.27}
SEEDS = (10, 11, 12, 13, 14)


def arm_of(settings):
    if "data.online.score" in settings:
        return settings["data.online.score"]
    if settings["data.weights.noise"]:
        return "uniform"
    return "without" if settings["data.weights.first"] == 1 else "hand"


def verdicts(study, losses, fed):
    planned, _ = plan(load_sweep("online_mixtures"))
    runs = compose_many([one.overrides for one in planned])
    assert len(runs) == 25
    rows, arms = [], {}
    for run in runs:
        settings = {key: value for key, value in flatten(run).items() if key.startswith("data.")}
        arm = arms.setdefault(arm_of(settings), arm_of(settings))
        if arm not in losses:
            continue
        loss = losses[arm] + 0.003 * math.sin(run.seed + len(arm))
        row = make_row(1e-2, 3.0, seed=run.seed, run_id=f"{arm} {run.seed}", **settings)
        by_set = {"validation": 3.0, "noise": 2.8} | {
            name: loss + n for name, n in zip(LEARNABLE, (-0.2, 0, 0.2), strict=True)
        }
        share = fed if arm == "raw" else 0.25
        rows.append(row | {"val_loss_by_set": by_set, "tokens_by_source": {"noise": share, "first": 1 - share}})
    assert set(arms) == set(RIGHT)
    declared = {"margins": {"loss": 0.05, "share": 0.08}, "seeds": list(SEEDS)}
    found = Evidence(study(rows, name="online_mixtures", declared=declared), ONLINE.group)
    return [claim.verdict(found).word for claim in ONLINE.claims]


def test_each_claim_is_judged_by_the_rows_of_its_arms(study):
    assert verdicts(study, RIGHT, 0.38) == [AGREES] * 4
    wrong = RIGHT | {"excess": 2.6, "raw": 2.4}
    assert verdicts(study, wrong, 0.1) == [DISAGREES] * 4


def test_without_an_arm_its_claims_are_not_told(study):
    found = verdicts(study, {arm: loss for arm, loss in RIGHT.items() if arm != "excess"}, 0.38)
    assert found == [CANNOT_TELL, AGREES, AGREES, CANNOT_TELL]
