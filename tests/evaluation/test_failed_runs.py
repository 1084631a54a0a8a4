"""A verb that needs a checkpoint says why the run left none."""

import json

import pytest

from scaling_testbed.__main__ import app
from scaling_testbed.commands.app import run
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.errors import UserError
from scaling_testbed.training.run import train

EXPORTABLE = ("model.norm=rmsnorm", "model.mlp=swiglu", "model.qk_norm=none")


def said_by(verbs, capsys):
    found = []
    for words in verbs:
        assert run(app, [str(word) for word in words], "scaling-testbed") == 1
        found.append(capsys.readouterr().err)
    return found


def verbs(folder, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"context": "a", "choices": ["b", "c"], "gold": 0}) + "\n")
    return [
        ["export", folder, tmp_path / "exported"],
        ["analyze", "score", folder, task],
        ["analyze", "inspect", folder],
    ]


def test_a_run_that_failed_before_its_first_step_says_why(tmp_path, capsys):
    places = [f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/data"]
    small = compose(["model=nano_s", "data=text_files", f"data.files={tmp_path}/*.none", *places])
    folder = run_folder_path(small)
    with pytest.raises(UserError, match="no file matches"):
        train(small, quiet=True)
    assert not (folder / "config.yaml").exists()
    for line in said_by(verbs(folder, tmp_path), capsys):
        assert line.startswith(f"error: {folder} holds no checkpoint: the run failed: data.files: no file matches")


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        ("failed", "no space left on device", "the run failed: no space left on device"),
        ("diverged", "the loss is nan at step 3", "the run diverged: the loss is nan at step 3"),
        ("preempted", "stopped by SIGTERM before training", "the run was interrupted: stopped by SIGTERM before"),
    ],
)
def test_a_run_without_checkpoints_says_how_it_ended(trained, tmp_path, capsys, status, error, said):
    row, folder = trained(*EXPORTABLE, "checkpoint.at_end=false", "checkpoint.every_steps=100", "budget.steps=1")
    for line in said_by(verbs(folder, tmp_path), capsys):
        assert "holds no checkpoint; run with checkpoint.at_end=true" in line
    (folder / "result.json").write_text(json.dumps({**row, "status": status, "error": error}))
    for line in said_by(verbs(folder, tmp_path), capsys):
        assert line.startswith(f"error: {folder} holds no checkpoint: {said}")
