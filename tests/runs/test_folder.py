"""What a run writes down is whole, readable after a kill, and mirrored without risk."""

import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from scaling_testbed.config.sections import LoggingConfig
from scaling_testbed.errors import UserError
from scaling_testbed.runs import wandb
from scaling_testbed.runs.folder import RunFolder, read_metrics


@pytest.mark.fault("25", "A half-written line is left out by number, and a resumed run writes no step twice.")
def test_a_half_written_line_is_reported_and_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 2}\n123\n{"step": "a"}\n"\xff"\n{"step": 2, "x"')
    assert read_metrics(path) == [{"step": 1, "x": 2}]
    err = capsys.readouterr().err
    assert all(f"{path}:{line}" in err for line in (2, 3, 4, 5))


def test_metrics_are_cut_back_to_the_step_that_will_be_written_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)) + '{"ste')
    with RunFolder(tmp_path) as folder:
        assert folder.open_metrics(keep_before=4) == ([{"step": step} for step in range(4)], True)
        folder.write_metrics({"step": 4})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed, while still open
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_result({"loss": math.nan, "by_set": {"a": math.inf, "b": [1.0, -math.inf]}})
    assert json.loads((tmp_path / "result.json").read_text()) == {"loss": None, "by_set": {"a": None, "b": [1.0, None]}}


@pytest.mark.parametrize("text", ['{"status": "fini', "[1]", '"x"', '{"a": 1}', '{"status": 3}', "null"])
def test_a_result_that_cannot_be_read_counts_as_none(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert RunFolder(tmp_path).result() is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runs_dir="), RunFolder(tmp_path / "file" / "run"):
        pass


def mirror(tmp_path):
    return wandb.WandbMirror(LoggingConfig(wandb=True), RunFolder(tmp_path), "id", "name", {"a": 1})


def test_without_a_key_wandb_records_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    folder = tmp_path / "two words"
    folder.mkdir()
    mirrored = mirror(folder)
    mirrored.log({"step": 1, "train_loss": 2.0})
    mirrored.finish(dict.fromkeys(("status", "val_loss", "val_bpb", "n_params", "n_tokens", "flops"), 0))
    said = capsys.readouterr().out.strip()
    assert said.startswith("wandb: no key found; recording offline. To upload it later: wandb sync ")
    shown = subprocess.run(["bash", "-c", f"ls -d {said.partition('wandb sync ')[2]}"], capture_output=True, text=True)
    (recorded,) = map(Path, shown.stdout.splitlines())  # what the command names is what was recorded
    assert list(recorded.glob("*.wandb")) and recorded.parent == folder / "wandb"


class BrokenWandb(types.ModuleType):
    """Stands in for the package; `init` does what it is given."""

    Settings = staticmethod(lambda **_: None)


@pytest.mark.parametrize("trouble", ["raises", "exits", "hangs", "missing"])
def test_trouble_with_wandb_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys, trouble):
    def init(**_):
        if trouble == "hangs":
            time.sleep(60)
        raise SystemExit(1) if trouble == "exits" else RuntimeError("no connection")

    broken = BrokenWandb("wandb")
    broken.init = init
    monkeypatch.setitem(sys.modules, "wandb", None if trouble == "missing" else broken)
    monkeypatch.setattr(wandb, "END_SECONDS", 0.2)
    began = time.monotonic()
    mirrored = mirror(tmp_path)
    mirrored.log({"step": 1})
    mirrored.finish({})
    assert time.monotonic() - began < 5
    said = capsys.readouterr().err
    assert said.count("warning: wandb is off") == 1
    assert ("it is not installed; pip install wandb" in said) == (trouble == "missing")
