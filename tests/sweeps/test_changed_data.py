"""A sweep never mixes runs of different data or plug-ins: what has changed is named, and a retry trains it again."""

import dataclasses
import json
from pathlib import Path

import pytest

from scaling_testbed import sweep
from scaling_testbed.config.compose import compose_many
from scaling_testbed.data.preparing.preparation import folder_name
from scaling_testbed.errors import UserError
from scaling_testbed.files import sha256_of
from scaling_testbed.runs import identity
from scaling_testbed.runs.identity import Found
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.status import Comparison, check_not_mixed

GRID = """
overrides: [model=bigram, data=text_files, data.files={file}, batch.sequences=2, batch.sequence_length=16,
            budget.steps=2, evaluation.tokens=64, compute.threads=1, compute.device=cpu, checkpoint.at_end=false]
axes:
  optimizer.lr: [1e-3, 1e-2]
"""


@pytest.fixture
def grid(tmp_path, capfd, python, monkeypatch):
    """Returns a function from (verb, arguments) to (exit status, stdout, stderr) on two runs of a text file."""
    monkeypatch.setattr("sys.executable", python)
    (tmp_path / "c.txt").write_text("".join(f"line number {i} of a text\n" for i in range(600)))
    (tmp_path / "text.yaml").write_text(GRID.format(file=tmp_path / "c.txt"))

    def call(verb, *arguments):
        places = [f"sweep={tmp_path / 'text.yaml'}", f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}"]
        capfd.readouterr()
        status = sweep.main([verb, *places, *arguments])
        return (status, *capfd.readouterr())

    return call


def states(grid):
    return {line["varied"]["optimizer.lr"]: line for line in json.loads(grid("status", "--json")[1])}


def test_every_verb_names_data_that_have_changed_and_a_retry_trains_again(grid, tmp_path):
    file, runs = tmp_path / "c.txt", tmp_path / "runs" / "text"
    assert grid("run", "--workers", "2")[0] == 0
    assert {state["state"] for state in states(grid).values()} == {"finished"}
    old = {path.parent.name: path.read_text() for path in runs.glob("*/result.json")}
    size = file.stat().st_size
    file.write_text(file.read_text() + "more\n")
    reason = f"was trained on other data: {file} has {size + 5:,} bytes, and it had {size:,}"
    assert {(state["state"], state["error"]) for state in states(grid).values()} == {("changed", reason)}
    out = grid("status")[1]
    assert f"2 changed: run {min(old)}" in out or f"2 changed: run {max(old)}" in out
    assert reason in out and "2 changed; records" in out
    for verb in (["run"], ["submit", "--dry-run"]):
        status, out, err = grid(*verb)
        assert status == 1 and reason in err and "nothing was started" in err and "sweep retry" in err, verb
        assert "#!" not in out
    status, _, err = grid("collect")
    assert status == 0 and f"{reason}; its row is of the data then" in err
    assert len((runs / "results.jsonl").read_text().splitlines()) == 2

    half = ["optimizer.lr=1e-3"]
    status, out, err = grid("retry", *half)
    assert status == 0 and "the old run is in" in out, err
    assert {lr: state["state"] for lr, state in states(grid).items()} == {"1e-3": "finished", "1e-2": "changed"}
    status, _, err = grid("collect")
    assert status == 1 and "the rows are not of the same data: data_fingerprint is" in err
    assert grid("collect", *half)[0] == 0
    assert grid("retry", "--workers", "2")[0] == 0
    assert {state["state"] for state in states(grid).values()} == {"finished"}
    assert grid("collect")[0] == 0
    kept = {path.parent.name: path.read_text() for path in runs.glob("replaced/*/result.json")}
    assert kept == {f"{run_id}-1": text for run_id, text in old.items()}


def test_data_that_are_not_at_hand_hinder_nobody_and_are_told_of_once(grid, tmp_path):
    assert grid("run", "--workers", "2")[0] == 0
    (tmp_path / "c.txt").unlink()
    for verb in ("run", "status", "collect"):
        status, _, err = grid(verb)
        assert status == 0 and err.count("warning: 2 not compared with its data: ") == 1, (verb, err)
        assert "data.files: no file matches" in err
    assert {state["state"] for state in states(grid).values()} == {"finished"}


def test_a_touched_file_and_a_moved_corpus_are_the_same_data(grid, tmp_path):
    assert grid("run", "--workers", "2")[0] == 0
    (tmp_path / "c.txt").touch()
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    status, _, err = grid("run")
    assert status == 0 and not err
    assert not (tmp_path / "data").exists()


def test_a_checkpoint_of_other_data_is_named_before_a_run_goes_on(grid, tmp_path):
    assert grid("run", "--workers", "2")[0] == 0
    for path in Path(tmp_path / "runs" / "text").glob("*/result.json"):
        row = json.loads(path.read_text())
        place = path.parent / "checkpoints" / "step-00000001"
        place.mkdir(parents=True, exist_ok=True)
        path.unlink()
        state = {"data_fingerprint": row["data_fingerprint"], "data_folder": row["data_folder"], "step": 1}
        (place / "state.json").write_text(json.dumps(state | {"data_inputs": row["data_inputs"]}))
        manifest = {"files": {"state.json": {"sha256": sha256_of(place / "state.json")}}}
        (place / "manifest.json").write_text(json.dumps(manifest))
    assert {state["state"] for state in states(grid).values()} == {"stopped"}
    (tmp_path / "c.txt").write_text("other text\n" * 4000)
    assert {state["state"] for state in states(grid).values()} == {"changed"}
    assert grid("run")[0] == 1


def test_the_newest_checkpoint_whose_state_is_whole_tells_the_data(tmp_path):
    for step in (1, 2):
        place = tmp_path / "checkpoints" / f"step-{step:08}"
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps({"step": step}))
        manifest = {"files": {"state.json": {"sha256": sha256_of(place / "state.json")}}}
        (place / "manifest.json").write_text(json.dumps(manifest))
    assert identity.of_checkpoint(tmp_path) == {"step": 2}
    (place / "state.json").write_text(json.dumps({"step": 3}))
    assert identity.of_checkpoint(tmp_path) == {"step": 1}


@pytest.mark.fault("A1", "Data that follow another key, as data.seed=${seed}, are those of each run.")
def test_each_run_is_compared_with_its_own_data_where_they_follow_another_key(tmp_path, record_property):
    path = tmp_path / "noise.yaml"
    path.write_text("overrides: [data=noise, 'data.seed=${seed}', budget.steps=1]\nseeds: [0, 1]\n")
    runs, _ = plan(load_sweep(str(path)))
    folders = [folder_name(run.data, run.tokenizer) for run in compose_many([one.overrides for one in runs])]
    assert len(set(folders)) == 2
    for planned in (runs, [dataclasses.replace(run, config={}) for run in runs]):  # empty in older plans
        comparison = Comparison()
        found = [
            comparison.of({"data_fingerprint": "x", "data_folder": folder}, run)
            for folder, run in zip(folders, planned, strict=True)
        ]
        assert found == [Found(), Found()]
    record_property("seen", "both runs are as they were")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"data_fingerprint": "b"}, "data_fingerprint is a in run r1 and b in run r2"),
        ({"evaluation_data": {"x": "2"}}, "the data of evaluation set x is 1 in run r1 and 2 in run r2"),
        ({"task_data": {"t": "6"}}, "the documents of task t is 5 in run r1 and 6 in run r2"),
        ({"plugins": {"mine.py": "4"}}, "the code of plug-in mine.py is 3 in run r1 and 4 in run r2"),
    ],
)
def test_rows_of_different_data_are_not_collected_together(fields, said):
    row = {"run_id": "r1", "data.files": ["c.txt"], "data_fingerprint": "a"}
    row |= {"evaluation_data": {"x": "1"}, "task_data": {"t": "5"}, "plugins": {"mine.py": "3"}}
    check_not_mixed([row, row | {"run_id": "r2"}, row | {"data_fingerprint": None, "evaluation_data": None}])
    check_not_mixed([row, row | {"data.files": ["d.txt"], "data_fingerprint": "b"}])
    with pytest.raises(UserError, match=said):
        check_not_mixed([row, row | {"run_id": "r2"} | fields])
