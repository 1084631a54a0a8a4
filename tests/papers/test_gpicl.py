"""The claims about tasks in context on planted rows where they are right, and where they are wrong."""

import math

import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import flatten
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.gpicl import IN_CONTEXT_TASKS, TASKS, rises_to_half
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row

DECLARED = {"margins": {"share": 0.05, "octaves": 0.5}, "seeds": [20, 21, 22]}


def verdicts(study, memory, in_context):
    """memory, in_context: accuracies by log2 of the tasks, and the width."""
    planned, _ = plan(load_sweep("in_context_tasks", "cpu"))
    runs = compose_many([one.overrides for one in planned])
    assert len(runs) == 63
    rows = []
    for run in runs:
        settings = flatten(run)
        tasks, width = settings[TASKS], settings["model.d_model"]
        noise = 0.01 * math.sin(run.seed + width)
        of = {"train_task_new": memory(math.log2(tasks), width) + noise}
        of["unseen_task_seen"] = in_context(math.log2(tasks), width) + noise
        name = f"{tasks} {width} {run.seed}"
        row = make_row(1e-2, 1.0, seed=run.seed, d_model=width, run_id=name, **{TASKS: tasks})
        rows.append(row | {"accuracy_by_group": of})
    found = Evidence(study(rows, name="in_context_tasks", declared=DECLARED), IN_CONTEXT_TASKS.group)
    return [claim.verdict(found) for claim in IN_CONTEXT_TASKS.claims]


def falling(octaves, width):
    return 0.95 / (1 + 2 ** (octaves - 8))


def rising(octaves, width):
    return 0.2 + 0.8 / (1 + 2.0 ** (3 + math.log2(width / 16) - octaves))


def test_each_claim_is_judged_by_the_rows_it_is_about(study):
    right = verdicts(study, falling, rising)
    assert [one.word for one in right] == [AGREES] * 5
    # One half is reached two octaves later at four times the width, which is 16 times the parameters. Straight lines
    # between the numbers of tasks, and noise, move it a little.
    assert right[4].effect == pytest.approx(2 / math.log10(16), abs=0.25)
    wrong = verdicts(study, lambda octaves, width: 0.03 * octaves, lambda octaves, width: 0.45 - 0.03 * octaves)
    assert [one.word for one in wrong] == [DISAGREES] * 4 + [CANNOT_TELL]  # one half is never reached
    earlier = verdicts(study, falling, lambda octaves, width: rising(octaves, 1024 / width))
    assert earlier[4].word == DISAGREES
    before = verdicts(study, falling, lambda octaves, width: rising(octaves, 256 / width))  # the fewest, for the widest
    assert before[4].word == CANNOT_TELL and "reaches one half at N=98.3k" in before[4].words


def test_the_first_rise_to_one_half_is_found_between_two_points():
    points = [(1.0, {0: 0.2, 1: 0.6}), (3.0, {0: 0.4, 1: 0.4}), (4.0, {0: 0.9}), (5.0, {0: 0.1, 1: 0.6})]
    assert rises_to_half(points, 0) == pytest.approx(3.2) and rises_to_half(points, 1) == pytest.approx(4.0)
    assert rises_to_half(points[:2], 0) is None
