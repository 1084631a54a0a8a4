"""Accuracies by group against a loop over answers, in a run, in its row and at the door."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.sources.in_context_tasks import GROUPS, UNSEEN
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.statistics import ratio_of_sums
from scaling_testbed.evaluation.target_groups import accuracies, of_run
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, metrics

TASKS = (
    *("data=in_context_tasks", "data.n_tasks=2", "data.n_symbols=4", "data.n_labels=2", "data.pairs=6"),
    *("data.n_sequences=400", "data.n_validation_sequences=60", "batch.sequence_length=12", "budget.steps=30"),
    *("evaluation.every_steps=15", "evaluation.tokens=1e6", "optimizer.lr=2e-2"),
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Returns a function from further overrides to (row, run folder) of a run on tasks, trained once."""
    done, place = {}, tmp_path_factory.mktemp("tasks")

    def run_it(*overrides):
        if overrides not in done:
            (run,) = compose_many([[*TINY[3:], *TASKS, f"runs_dir={place}", f"data_dir={place / 'data'}", *overrides]])
            done[overrides] = train(run, quiet=True), run_folder_path(run)
        return done[overrides]

    return run_it


def by_hand(folder):
    """Group -> (right, loss) of each answer in the second half, a sequence at a time."""
    run = recorded_run(folder)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    found = {name: [] for name in GROUPS}
    known = {tuple(run.data.table(task)) for task in range(run.data.n_tasks)}  # of few tables a new task can have one
    for number in range(60):
        tokens = torch.from_numpy(data.validation.read(number * 12, 12).astype(np.int64))
        with torch.no_grad():
            logits_TV = model.logits(tokens[None])[0]
        for place in range(3, 6):
            x, answer = int(tokens[2 * place]), tokens[2 * place + 1]
            seen = x in tokens[: 2 * place : 2].tolist()
            is_known = number < 30 or tuple(run.data.table(UNSEEN + number - 30)) in known
            name = f"{'train' if is_known else 'unseen'}_task_{'seen' if seen else 'new'}"
            loss = F.cross_entropy(logits_TV[2 * place], answer).item()
            found[name].append((float(logits_TV[2 * place].argmax() == answer), loss))
    return found


def test_groups_are_graded_as_a_loop_over_answers_grades_them(learned):
    row, folder = learned()
    hand, run = by_hand(folder), recorded_run(folder)
    rows = of_run(run, folder, tokens=10**6)
    assert [one["group"] for one in rows] == list(GROUPS) and sum(one["answers"] for one in rows) == 180
    for one in rows:
        right, losses = zip(*hand[one["group"]], strict=True)
        assert one["answers"] == len(right) and one["accuracy"] == pytest.approx(np.mean(right))
        assert one["loss"] == pytest.approx(np.mean(losses), abs=1e-5) and one["accuracy_se"] > 0
        assert row["accuracy_by_group"][one["group"]] == pytest.approx(np.mean(right))
    records = [line["accuracy_by_group"] for line in metrics(folder) if "accuracy_by_group" in line]
    assert len(records) == 3 and records[-1] == row["accuracy_by_group"]
    assert row["n_targets"] == row["n_tokens"] / 2 and row["entropy_window_nats"] == row["entropy_rate_nats"] > 0


def test_a_compiled_or_other_cut_of_batches_grades_the_same(learned):
    one, other = learned()[0], learned("evaluation.rows=7")[0]
    assert one["accuracy_by_group"] == other["accuracy_by_group"]


def test_the_door_shows_several_runs_with_the_keys_in_which_they_differ(learned, capsys, tmp_path):
    folders = [str(learned()[1]), str(learned("data.n_tasks=5")[1])]
    assert analyze.main(["in-context", *folders, "--out", str(tmp_path / "a.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "data.n_tasks" in said and "unseen_task_seen" in said and "standard errors over sequences" in said
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["data.n_tasks"] for row in rows] == [2] * 4 + [5] * 4
    assert analyze.main(["in-context", folders[0], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["groups"]) == 4


def test_data_without_groups_are_refused_by_name(whole, capsys):
    _, folder = whole()
    with pytest.raises(UserError, match="was trained on data=markov, which tells no groups of answers apart"):
        of_run(recorded_run(folder), folder, tokens=100)
    assert analyze.main(["in-context", str(folder), "--tokens", "0"]) == 2
    assert "--tokens must be greater than zero" in capsys.readouterr().err


def test_a_group_without_answers_has_no_accuracy_and_one_with_nan_neither():
    found = accuracies({"a": (0, 0, 0.0), "b": (4, 1, 3.0), "c": (4, 1, float("nan"))})
    assert found == {"a": None, "b": 0.25, "c": None}


def test_a_ratio_of_sums_has_the_error_of_the_mean_where_all_weights_are_equal():
    values = np.array([1.0, 4.0, 2.0, 9.0])
    ratio, se = ratio_of_sums(values, np.full(4, 2.0))
    assert ratio == pytest.approx(2.0) and se == pytest.approx((values / 2).std(ddof=1) / 2)
    assert ratio_of_sums([0.0], [0.0]) == (None, None) and ratio_of_sums([3.0], [2.0]) == (1.5, None)
    draw = np.random.default_rng(0)
    ratios = []
    for _ in range(400):
        weights = draw.integers(1, 9, size=80)
        values = np.array([draw.random(n).sum() for n in weights])
        ratios.append(ratio_of_sums(values, weights))
    spread, claimed = np.std([ratio for ratio, _ in ratios]), np.mean([se for _, se in ratios])
    assert claimed == pytest.approx(spread, rel=0.12)  # the error of a spread of 400 values is 4 %
