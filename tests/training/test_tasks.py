"""The weights of a run are scored on its tasks by what `analyze score` does, and the row has the final errors."""

import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.config.run import run_folder_path, run_id
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation import scoring
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.training import parts as building
from scaling_testbed.training import step as updates
from scaling_testbed.training import tasks
from scaling_testbed.training.run import train
from tests.evaluation.test_corpus_tasks import code
from tests.training.conftest import TIMING
from tests.training.test_distributed import Launch

QUESTIONS = [
    {"context": "def unit1_value", "choices": ["(", " = unit7_index"], "gold": 0},
    {"context": "", "choices": ["def", "unit", "}}"], "gold": 1},
    {"context": "x = f(", "choices": [")", "y"], "gold": 1},
]
MADE = ["continuation", "identifier", "bracket"]
NUMBER = 12
TASKS = "error_by_task"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, a task and prepared data."""
    place = tmp_path_factory.mktemp("tasks")
    for number in range(40):
        (place / f"{number}.py").write_text(code(f"unit{number}"))
    (place / "own.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return place


def words(place, runs, *more):
    return [
        *("data=text_files", f"data.files=['{place}/*.py']", "data.validation_fraction=0.3", f"data_dir={place}/data"),
        *("model=nano_s", "tokenizer=bytes", "batch.sequences=4", "batch.sequence_length=64", "budget.steps=3"),
        *("evaluation.every_steps=0", "evaluation.tokens=512", "optimizer.lr=1e-2", "compute.threads=1"),
        *(f"evaluation.tasks=[{place}/own.jsonl,{','.join(MADE)}]", f"evaluation.task_questions={NUMBER}"),
        *(f"runs_dir={runs}", *more),
    ]


@pytest.fixture
def composed(place, tmp_path):
    """Returns a function from overrides to (RunConfig, run folder)."""

    def make(*more):
        (run,) = compose_many([words(place, tmp_path / "runs", *more)])
        return run, run_folder_path(run)

    return make


def errors(row):
    return {key: value for key, value in row.items() if key.startswith(("error/", "task_"))}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_row_has_the_errors_that_analyze_score_finds(composed, place, tmp_path, capsys, precision):
    run, folder = composed(f"compute.precision={precision}")
    row = train(run, quiet=True)
    (data,) = (place / "data").glob("*/manifest.json")
    assert analyze.main(["tasks", str(data.parent), str(tmp_path), "--questions", str(NUMBER)]) == 0
    capsys.readouterr()
    files = [f"{place}/own.jsonl", *(f"{tmp_path}/{kind}.jsonl" for kind in MADE)]
    assert analyze.main(["score", str(folder), *files, "--json"]) == 0
    *made, mean = json.loads(capsys.readouterr().out)["tasks"]
    assert [task["task"] for task in made] == ["own", *MADE]
    assert analyze.main(["score", str(folder), files[0], *reversed(MADE), "--json"]) == 0  # by their names alone
    *named, named_mean = json.loads(capsys.readouterr().out)["tasks"]
    assert named == [made[0], *reversed(made[1:])] and named_mean["error"] == pytest.approx(mean["error"])
    for task in made:
        assert row[f"error/{task['task']}"] == task["error"]
        assert row["task_documents"][task["task"]] == task["documents"]
    assert (row["task_error"], row["task_error_chance"]) == (mean["error"], mean["chance_error"])
    assert row["task_error_withheld"] is None
    assert row["task_data"] == {Path(file).stem: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
    found = {task["task"]: task["error"] for task in made}
    assert read_metrics(folder / "metrics.jsonl")[-1]["error_by_task"] == found


def test_a_run_without_tasks_has_no_column_of_them_and_keeps_its_id(composed):
    run, _ = composed("evaluation.tasks=[]", "evaluation.task_questions=400")
    row = train(run, quiet=True)
    assert not [key for key in row if key.startswith("error/")]
    assert row["task_error"] is row["task_error_chance"] is row["task_error_withheld"] is None
    ids = {run_id(composed(*more)[0]) for more in ([], ["evaluation.task_questions=13"], ["evaluation.task_seed=1"])}
    assert len(ids) == 3 and run_id(run) not in ids


def test_tasks_are_scored_at_every_so_many_steps_too_and_the_row_is_that_of_scoring_at_the_end(composed):
    whole = train(composed("name=whole", "budget.steps=5")[0], quiet=True)
    run, folder = composed("evaluation.tasks_every_steps=2", "budget.steps=5")
    row = train(run, quiet=True)
    scored = {line["step"]: line["error_by_task"] for line in read_metrics(folder / "metrics.jsonl") if TASKS in line}
    assert list(scored) == [0, 2, 4, 5] and all(list(found) == ["own", *MADE] for found in scored.values())
    assert scored[0] != scored[5]
    assert errors(row) == errors(whole) and row["val_loss"] == whole["val_loss"] and row["run_id"] != whole["run_id"]


def test_a_run_that_reads_its_losses_late_scores_the_weights_of_the_same_steps(composed, monkeypatch):
    """As a GPU does."""
    found, real = [], scoring.log_likelihoods
    monkeypatch.setattr(
        tasks, "log_likelihoods", lambda *given, **more: found.append(real(*given, **more)) or found[-1]
    )
    train(composed("evaluation.tasks_every_steps=2", "budget.steps=5", "name=at_once")[0], quiet=True)
    monkeypatch.setattr(building, "AHEAD", {"cpu": 3})
    train(composed("evaluation.tasks_every_steps=2", "budget.steps=5", "name=late")[0], quiet=True)
    assert len(found) == 8 and found[:4] == found[4:] and found[1] != found[2]


def test_a_run_that_is_stopped_while_its_tasks_are_scored_midway_ends_with_the_same_records(composed, monkeypatch):
    every = "evaluation.tasks_every_steps=2"
    whole, of_whole = composed(every, "name=whole")
    train(whole, quiet=True)
    run, folder = composed(every, "name=stopped")
    calls, real = [], scoring.log_likelihoods

    def signalled(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:  # at step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **more)

    monkeypatch.setattr(tasks, "log_likelihoods", signalled)
    row = train(run, quiet=True)
    assert (row["status"], row["error"]) == ("preempted", "stopped by SIGTERM at step 2")
    train(run, quiet=True)
    assert calls == [1] * 4
    found, expected = (
        [
            {key: value for key, value in line.items() if key not in TIMING}
            for line in read_metrics(at / "metrics.jsonl")
        ]
        for at in (folder, of_whole)
    )
    assert found == expected and [line["step"] for line in found if TASKS in line] == [0, 2, 3]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_signal_while_a_run_is_scored_stops_it_and_the_next_start_scores_it_again(composed, monkeypatch, batch):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 1000)  # some ten batches
    whole = train(composed("name=whole")[0], quiet=True)
    run, _ = composed("name=stopped")
    calls, real = [], scoring._of_batch

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(scoring, "_of_batch", signalled)
    row = train(run, quiet=True)
    assert (row["status"], row["error"], len(calls)) == ("preempted", "stopped by SIGTERM at step 3", batch)
    assert row["task_error"] is None and row["task_error_withheld"] == "the run was stopped early"
    assert all(row[f"error/{name}"] is None for name in ("own", *MADE))
    again = train(run, quiet=True)
    assert again["restarts"] == 1 and errors(again) == errors(whole) and again["task_error"] is not None


@pytest.mark.parametrize("lost", ["result.json", "metrics.jsonl"])
def test_a_run_that_ends_after_its_last_checkpoint_keeps_its_errors(composed, monkeypatch, lost):
    run, folder = composed()
    row = train(run, quiet=True)
    for name in {"result.json", lost}:
        (folder / name).unlink()
    monkeypatch.setattr(scoring, "_of_batch", None)  # nothing is scored again
    assert errors(train(run, quiet=True)) == errors(row) and row["task_error"] is not None


def test_a_run_that_diverged_has_no_errors_and_says_why(composed, monkeypatch):
    norms = iter([1.0, math.inf])
    monkeypatch.setattr(updates, "clip_gradients", lambda parts: torch.tensor(next(norms)))
    row = train(composed()[0], quiet=True)
    assert row["status"] == "diverged" and row["task_error"] is None and row["task_error_chance"] > 0
    assert row["task_error_withheld"] == "the run diverged" and row["error/own"] is None


def test_log_likelihoods_that_are_no_numbers_give_no_errors(composed, monkeypatch):
    monkeypatch.setattr(scoring, "_of_batch", lambda model, rows, device, temperature: [math.nan] * len(rows))
    row = train(composed()[0], quiet=True)
    assert row["status"] == "finished" and row["task_error"] is row["error/own"] is None
    assert row["task_error_withheld"] == "a log-likelihood is not finite"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.tasks=[none.jsonl]", "cannot read none.jsonl: No such file"),
        ("evaluation.task_questions=100000", "of 100000 questions of kind .*; ask for fewer with evaluation.task_ques"),
        ("batch.sequence_length=16", r"choices\[\d\] has 3\d tokens; .* .batch.sequence_length"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused_before_training(composed, monkeypatch, override, said):
    run, folder = composed(override)
    monkeypatch.setattr(building, "Transformer", None)
    with pytest.raises(UserError, match=f"evaluation.tasks: .*{said}.*; mend this, or leave evaluation.tasks out"):
        train(run, quiet=True)
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


def test_a_corpus_without_a_tokenizer_is_refused_before_training(tiny, monkeypatch):
    monkeypatch.setattr(building, "Transformer", None)
    with pytest.raises(UserError, match="evaluation.tasks: .* there is no tokenizer; mend this, or leave"):
        train(tiny("evaluation.tasks=[identifier]")[0], quiet=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.tasks=[brackets]", "files .* or continuation, identifier, bracket; got 'brackets'"),
        ("evaluation.tasks=[a/bracket.jsonl,bracket]", "two are named bracket"),
        ("evaluation.tasks=[a.b.jsonl]", "the name a.b has a point"),
        ("evaluation.tasks_every_steps=-1", "tasks_every_steps must not be negative"),
        ("evaluation.tasks_every_steps=5", "tasks_every_steps=5 has no tasks to score; name some in evaluation.tasks"),
        ("evaluation.task_questions=0", "task_questions must be greater than zero"),
        ("evaluation.task_seed=-1", "task_seed must not be negative"),
    ],
)
def test_tasks_that_no_run_can_have_are_refused_as_words(override, said):
    with pytest.raises(ConfigError, match=said):
        compose([override])


def test_a_task_file_that_changed_is_named_and_its_row_is_not_served(composed, place, tmp_path):
    file = shutil.copy(place / "own.jsonl", tmp_path / "mine.jsonl")
    run, folder = composed(f"evaluation.tasks=[{file}]")
    row = train(run, quiet=True)
    assert train(run, quiet=True) == row
    content = Path(file).read_text()
    Path(file).write_text(content.replace("unit7", "unit8"))
    changed = f"was scored on other documents: evaluation.tasks: {file} has the sha256 .*, or delete the folder"
    with pytest.raises(UserError, match=changed):
        train(run, quiet=True)
    (folder / "result.json").unlink()  # the checkpoint tells it too
    with pytest.raises(UserError, match=changed):
        train(run, quiet=True)
    Path(file).unlink()
    (folder / "result.json").write_text(json.dumps(row))
    with pytest.warns(UserWarning, match=f"was not compared with its data: evaluation.tasks: {file}: cannot be read"):
        assert train(run, quiet=True) == row


@pytest.fixture(scope="module")
def two(tmp_path_factory, python, place):
    """The runs of a torchrun of two processes."""
    launch = Launch(tmp_path_factory.mktemp("two"), python)
    for name in ("ddp", "fsdp"):
        overrides = words(place, launch.folder / name, f"parallelism={name}", "evaluation.tasks_every_steps=2")
        launch.specs[name] = {"name": name, "overrides": overrides}
    said, status = launch.start(2)
    assert status == 0, said
    return launch


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_processes_share_the_documents_and_agree_with_analyze_score(two, place, tmp_path, capsys, kind):
    row = two.row(kind)
    assert row["world_size"] == 2 and row["status"] == "finished"
    (data,) = (place / "data").glob("*/manifest.json")
    analyze.main(["tasks", str(data.parent), str(tmp_path), "--questions", str(NUMBER)])
    capsys.readouterr()
    files = [f"{place}/own.jsonl", *(f"{tmp_path}/{name}.jsonl" for name in MADE)]
    assert analyze.main(["score", str(two.run_folder(kind)), *files, "--json"]) == 0
    *made, _ = json.loads(capsys.readouterr().out)["tasks"]
    found = {task["task"]: task["error"] for task in made}
    assert found == {name: row[f"error/{name}"] for name in ("own", *MADE)}
    scored = [line for line in read_metrics(two.run_folder(kind) / "metrics.jsonl") if TASKS in line]
    assert [line["step"] for line in scored] == [0, 2, 3] and scored[-1][TASKS] == found
