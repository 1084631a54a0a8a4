"""A run's identity outlives the code: what is filed under a run_id is found under it again."""

import json
from pathlib import Path

import pytest
import torch

from scaling_testbed.config.compose import compose, compose_many, run_config_files
from scaling_testbed.config.run import run_id
from scaling_testbed.model.counting import count_params, flops_per_token
from scaling_testbed.model.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
PLANS = sorted(ROOT.glob("studies/**/plan.jsonl"))
GOLDEN = json.loads((Path(__file__).parent / "run_ids.json").read_text())


def test_there_are_committed_plans():
    assert len(PLANS) >= 12


def lines_of(plan):
    return [json.loads(line) for line in plan.read_text().splitlines()]


def covering(lines):
    """As few of the lines, in order, as have every word that any of them has."""
    seen, chosen = set(), []
    for line in lines:
        if not seen.issuperset(line["overrides"]):
            seen.update(line["overrides"])
            chosen.append(line)
    return chosen


def assert_same_ids(lines):
    runs = compose_many([line["overrides"] for line in lines])
    assert [run_id(run) for run in runs] == [line["run_id"] for line in lines]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.parent.name)
def test_lines_of_a_committed_plan_with_each_of_its_words_recompose_to_their_run_ids(plan):
    assert_same_ids(covering(lines_of(plan)))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.parent.name)
def test_the_last_line_of_a_committed_plan_recomposes_to_its_run_id_the_whole_way(plan, hydra_composes_all_words):
    line = lines_of(plan)[-1]
    assert run_id(compose(line["overrides"])) == line["run_id"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.parent.name)
def test_every_line_of_a_committed_plan_recomposes_to_its_run_id(plan):
    assert_same_ids(lines_of(plan))


@pytest.mark.parametrize("overrides", GOLDEN, ids=lambda text: text or "default")
def test_every_choice_of_every_group_composes_builds_and_keeps_its_run_id(overrides):
    run = compose(overrides.split())
    assert run_id(run) == GOLDEN[overrides]
    config = run.model.resolved(run.model.vocab_size or 257)
    with torch.device("meta"):
        model = Transformer(config, run.parametrization)
    run.optimizer.build(model)
    steps = run.budget.resolve_steps(count_params(config), run.batch.tokens)
    assert steps > 0 and flops_per_token(config, run.batch.sequence_length) > 0
    assert 0 < run.schedule.lr(0, steps, run.optimizer.lr) <= run.optimizer.lr


def test_no_choice_is_left_out():
    chosen = {word for text in GOLDEN for word in text.split()}
    assert {f"{path.parent.name}={path.stem}" for path in run_config_files()} <= chosen
