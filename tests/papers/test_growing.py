"""The claims about growth on planted rows where they are right or wrong, and the plans of their sweep."""

import math

import pytest

from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.growing import EQUAL, GROWTH, NOISE, WIDTH
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.view import detectable_effects
from tests.analysis.conftest import make_row

SEEDS = (10, 11, 12, 13)
ARMS = {"alive": ("fpi", 1), "inert": ("fpi", 0), "aki": ("aki", 0), "scratch": None}


def verdicts(study, losses, **changed):
    """changed: of the rows of alive; arm -> loss."""
    rows = []
    for arm, how in ARMS.items():
        for seed in SEEDS:
            loss = losses[arm] + 0.01 * math.sin(seed) + 0.002 * math.sin(3 * seed + len(arm))
            row = make_row(1e-2, loss, seed=seed, d_model=32, run_id=f"{arm} {seed}", flops=3.0e11, flops_total=None)
            row |= {"start.run": None}
            if how is not None:
                row |= {"start.run": "runs/x/trunk/0123456789ab", WIDTH: how[0], NOISE: how[1]}
                row |= {"flops": 2.3e11, "flops_total": 3.002e11}
            rows.append(row | (changed if arm == "alive" else {}))
    declared = {"margins": {"loss": 0.01}, "seeds": list(SEEDS)}
    found = Evidence(study(rows, name="growth", declared=declared), GROWTH.group)
    return [claim.verdict(found) for claim in GROWTH.claims]


def words(found):
    return [verdict.word for verdict in found]


def test_each_arm_is_judged_against_scratch_by_its_loss(study):
    right = {"alive": 1.86, "inert": 2.03, "aki": 1.88, "scratch": 1.90}
    assert words(verdicts(study, right)) == [AGREES] * 4
    wrong = {"alive": 1.95, "inert": 1.86, "aki": 1.97, "scratch": 1.90}
    assert words(verdicts(study, wrong)) == [DISAGREES] * 4
    said = "loss with growth not set, noise of the growth not set less with growth fpi, noise of the growth 1"
    assert said in GROWTH.claims[0].estimand


def test_without_equal_compute_nothing_is_told(study):
    losses = {"alive": 1.86, "inert": 2.03, "aki": 1.88, "scratch": 1.90}
    found = verdicts(study, losses, flops_total=3.1e11)
    assert words(found) == [CANNOT_TELL] * 4
    assert "equal compute: the runs have 3e+11 to 3.1e+11 FLOPs" in found[0].words
    found = verdicts(study, losses, flops_total=None)
    assert words(found) == [CANNOT_TELL] * 4 and "flops_total" in found[0].words
    diverged = {"status": "diverged", "flops_total": 1e11, "val_loss": None}
    assert words(verdicts(study, losses, **diverged)) == [DISAGREES, AGREES, AGREES, AGREES]


@pytest.mark.parametrize("scale", ["paper", "gpu_hour", "cpu"])
def test_every_arm_has_the_same_model_and_the_same_compute_with_its_parent(scale):
    sweep = narrowed(load_sweep("growth", scale), ["seed=10"])
    runs, same = plan(sweep)
    (parent, *arms), by_id = runs, {run.run_id: run for run in runs}
    assert same == 0 and len(arms) == 4 and parent.is_part
    assert {run.config["model.d_model"] for run in arms} == {2 * parent.config["model.d_model"]}
    flops = [run.flops + (by_id[run.after].flops if run.after else 0) for run in arms]
    assert max(flops) < (1 + EQUAL) * min(flops)
    conditions = {(run.config.get(WIDTH), run.config.get(NOISE)) for run in arms}
    assert conditions == {how or (None, None) for how in ARMS.values()}
    if scale == "cpu":
        assert detectable_effects(sweep, runs)[0].startswith("1 seed, 1 size: "), "the small model is not compared"
