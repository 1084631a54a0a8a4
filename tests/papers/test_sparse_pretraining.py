"""The claims about pruning on planted rows where they are right or wrong, and the plans of their sweeps."""

import math

import numpy as np
import pytest

from scaling_testbed.papers import law_claims as by
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.predictions import Number
from scaling_testbed.papers.sparse_pretraining import AVERAGE_PARAMS, BEGIN, PRUNING_WINDOW
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import grid, make_row

SEEDS = (10, 11, 12)


def windows(study, losses):
    conditions = [{"interventions.magnitude_pruning.begin": begin} for begin in (0.25, 0, 0.75)]
    rows = grid(
        lambda condition, width, lr, seed: losses[condition[BEGIN]] + 0.01 * math.sin(seed + width),
        conditions, widths=(48,), lrs=(1e-2,), seeds=SEEDS,
        **{"interventions.magnitude_pruning.end": lambda condition, *_: 0.75 if condition[BEGIN] == 0.25 else 1},
    )  # fmt: skip
    declared = {"margins": {"loss": 0.05}, "seeds": list(SEEDS)}
    found = Evidence(study(rows, name="pruning_window", declared=declared), PRUNING_WINDOW.group)
    return [claim.verdict(found).word for claim in PRUNING_WINDOW.claims]


def test_the_order_of_windows_is_judged_by_their_losses(study):
    assert windows(study, {0.25: 2.06, 0: 2.45, 0.75: 2.9}) == [AGREES, AGREES]
    assert windows(study, {0.25: 2.45, 0: 2.06, 0.75: 2.0}) == [DISAGREES, DISAGREES]
    assert windows(study, {0.25: 2.05, 0: 2.06, 0.75: 2.9}) == [AGREES, "no difference"]


def sparse(study, gap, sizes=(20_000, 33_000, 49_000, 68_000), average=47_000):
    def loss(n, seed):
        return 2.0 - 0.2 * math.log(n / 20_000) + 0.005 * math.sin(seed)

    common = {"n_tokens": 1_024_000, "optimizer__name": "adamw"}
    rows = [
        make_row(1e-2, loss(n, seed), seed=seed, d_model=n // 1000, n_params=n + 6000, n_params_average=given(n + 6000),
                 n_params_no_input_embedding=n, interventions__magnitude_pruning__sparsity=0, **common)
        for n, given in zip(sizes, (float, lambda n: None, float, float), strict=True)
        for seed in SEEDS
    ]  # fmt: skip
    rows += [
        make_row(1e-2, loss(average, seed) + gap, seed=seed, d_model=68, n_params=74_000,
                 n_params_average=average + 6000.0, n_params_no_input_embedding=68_000,
                 interventions__magnitude_pruning__sparsity=0.5, **common)
        for seed in SEEDS
    ]  # fmt: skip
    found = Evidence(study(rows, name="average_params", declared={"margins": {"loss": 0.03}, "seeds": list(SEEDS)}), [])
    return AVERAGE_PARAMS.claims[0].verdict(found)


def test_a_pruned_run_is_beside_the_dense_line_at_its_average(study):
    found = sparse(study, 0.005)
    assert found.word == AGREES and "47,000 parameters in the mean: +0.0" in found.words
    above, below = sparse(study, 0.1), sparse(study, -0.1)
    assert above.word == below.word == DISAGREES and above.effect > 0 > below.effect


@pytest.mark.parametrize("sd", [0.02, 0.1])
def test_noise_does_not_refute_that_two_laws_are_equal(study, sd):
    """In more than one of twenty studies. The mean of distances without their sign would be above the limit."""
    rng, seeds = np.random.default_rng(0), range(10)
    rows = [make_row(1e-2, 2.0, seed=seed) for seed in seeds]
    evidence = Evidence(study(rows, name="own", declared={"margins": {"loss": 0.03}, "seeds": list(seeds)}), [])
    drawn = {}
    judge = by.near(lambda own: [Number(drawn[own.study.rows[0]["seed"]], "")], 0.03)
    words = []
    for _ in range(100):
        drawn = dict(zip(seeds, sd * rng.standard_normal(10), strict=True))
        words.append(judge(evidence).word)
    assert words.count(DISAGREES) <= 11 and (words.count(AGREES) >= 75) == (sd == 0.02)


def test_a_distance_of_published_rows_is_within_its_limit_on_both_sides(study):
    evidence = Evidence(study([{**make_row(1e-2, 2.0), "seed": None}], name="own"), [])
    found = {gap: by.near(lambda own, gap=gap: [Number(gap, "")], 0.03)(evidence).word for gap in (-0.02, -0.04, 0.04)}
    assert found == {-0.02: AGREES, -0.04: DISAGREES, 0.04: DISAGREES}


def test_a_distance_that_is_a_loss_has_its_unit(study):
    found = sparse(study, 0.0)
    assert found.words.startswith("The difference is ") and " nats (95 % interval" in found.words
    assert AVERAGE_PARAMS.claims[0].estimand == "difference, which must be within 0.03 nats of zero"
    assert by.near(list, 1.4, ratio=True).estimand == "ratio, which must be within a factor of 1.4 of one"


def test_an_average_outside_of_the_dense_sizes_cannot_be_told(study):
    found = sparse(study, 0.0, average=19_000)
    assert found.word == CANNOT_TELL and "no dense sizes are on both sides of 19,000" in found.words


@pytest.mark.parametrize("scale", ["paper", "cpu"])
def test_the_windows_have_equal_compute_and_the_later_ones_fewer_steps(scale):
    runs, same = plan(load_sweep("pruning_window", scale))
    assert len(runs) == 9 and same == 0
    budgets = {run.budget_flops_6nd for run in runs}
    assert max(budgets) / min(budgets) < 1.01
    steps = {run.config[BEGIN]: run.steps for run in runs}
    assert steps[0.25] > steps[0] > steps[0.75]


@pytest.mark.parametrize("scale", ["paper", "cpu"])
def test_the_average_lies_between_dense_sizes_over_the_same_tokens(scale):
    runs, same = plan(load_sweep("average_params", scale))
    assert same == 0 and len({run.n_tokens for run in runs}) == 1
    counted = {run.config["n_params_no_input_embedding"] - run.n_params + run.n_params_average for run in runs}
    pruned = [run for run in runs if run.n_params_average < run.n_params]
    average = pruned[0].config["n_params_no_input_embedding"] - pruned[0].n_params + pruned[0].n_params_average
    assert len(pruned) == 3 and min(counted) < average < max(counted)
