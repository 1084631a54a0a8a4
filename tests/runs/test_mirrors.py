"""Mirrors hold the records of metrics.jsonl, each once, also after a kill, and cannot stop a run."""

import csv
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from scaling_testbed.config.sections import LoggingConfig
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.runs.mirrors import mirror
from scaling_testbed.runs.mirrors.chosen import axes
from scaling_testbed.runs.mirrors.csv_file import CsvFile
from scaling_testbed.runs.mirrors.tensorboard import TensorBoard
from scaling_testbed.runs.mirrors.wandb import recording_to_sync, wandb_mirror
from scaling_testbed.training import run as trainer
from tests.training.conftest import TIMING, StopAt, data_dir, tiny, trained, whole  # noqa: F401


def wandb_of(tmp_path, rows=(), **given):
    mirrored = wandb_mirror(LoggingConfig(wandb=True, **given), tmp_path, "id", "name", {"a": 1}, rows)
    assert mirrored is not None
    return mirrored


def test_without_a_key_wandb_records_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    folder = tmp_path / "two words"
    folder.mkdir()
    mirrored = wandb_of(folder)
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
    monkeypatch.setattr(mirror, "END_SECONDS", 0.2)
    began = time.monotonic()
    mirrored = wandb_of(tmp_path)
    mirrored.log({"step": 1})
    mirrored.finish({})
    assert time.monotonic() - began < 5
    said = capsys.readouterr().err
    assert said.count("warning: wandb is off") == 1
    assert ("it is not installed; pip install wandb" in said) == (trouble == "missing")


def table(folder):
    """metrics.csv as rows of numbers by name, without what a clock decides."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: json.loads(text) for key, text in row.items() if text and key not in TIMING} for row in rows]


def records(folder):
    """metrics.jsonl in the same form."""
    rows = read_metrics(folder / "metrics.jsonl")
    found = [{"step": row["step"]} | mirror.numbers(row) for row in rows]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in found]


ROWS = [
    {"step": 0, "val_loss": 3.0, "val_loss_by_set": {"main": 3.0, "other": None}},
    {"step": 1, "tokens": 128, "train_loss": 2.5, "val_loss": None},
    {"step": 2, "tokens": 256, "train_loss": 2.25, "skipped": True, "q_rms/0": 0.1},
]


def test_a_table_has_each_number_once_and_null_as_an_empty_cell(tmp_path):
    begun = CsvFile(tmp_path, ROWS[:1])
    for row in ROWS[1:]:
        begun.log(row)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == (
        "step,tokens,train_loss,skipped,val_loss,val_loss_by_set.main,q_rms/0\n"
        "0,,,,3.0,3.0,\n1,128,2.5,,,,\n2,256,2.25,true,,,0.1\n"
    )
    CsvFile(tmp_path, ROWS)  # a later start makes the same file from the lines that it keeps
    assert (tmp_path / "metrics.csv").read_text() == text


def test_the_table_of_a_killed_and_resumed_run_is_that_of_metrics_jsonl(trained, monkeypatch):  # noqa: F811
    words = ("logging=csv", "diagnostics=basic", "diagnostics.every_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(16))
        row, folder = trained(*words)
    assert row["status"] == "preempted"
    stopped = len(table(folder))
    with open(folder / "metrics.csv", "a") as file:
        file.write("99,1,")  # what a kill can leave
    row, folder = trained(*words)
    assert row["status"] == "finished" and 0 < stopped < len(table(folder))
    assert table(folder) == records(folder) and [row["step"] for row in table(folder)] == list(range(13))


class Events:
    """Stands in for SummaryWriter: an event file with a line for each number."""

    def __init__(self, folder, flush_secs):
        Path(folder).mkdir(exist_ok=True)
        self.path = Path(folder) / f"events.out.tfevents.{time.monotonic_ns()}"
        self.path.touch()

    def add_scalar(self, name, value, step):
        with self.path.open("a") as file:
            file.write(json.dumps([step, name, value]) + "\n")

    def close(self):
        pass


def stand_in(monkeypatch):
    """TensorBoard's writer replaced by `Events`, so that the package is not needed."""
    package = types.ModuleType("torch.utils.tensorboard")
    package.writer = types.SimpleNamespace(SummaryWriter=Events)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr("torch.utils.tensorboard", package, raising=False)


def test_tensorboard_has_each_line_of_a_resumed_run_once(trained, monkeypatch):  # noqa: F811
    stand_in(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(16))
        assert trained("logging=tensorboard")[0]["status"] == "preempted"
    row, folder = trained("logging=tensorboard")
    assert row["status"] == "finished"
    (path,) = (folder / "tensorboard").iterdir()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        [row["step"], name, float(value)]
        for row in read_metrics(folder / "metrics.jsonl")
        for name, value in mirror.numbers(row).items()
    ]
    assert events == expected and {step for step, *_ in events} == set(range(13))


def test_an_event_file_is_read_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for rows in (ROWS[:1], ROWS):  # the second start replaces the file of the first
        written = TensorBoard(tmp_path, rows)
        written.finish({})
    (path,) = tmp_path.iterdir()
    values = [(event.step, value) for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    found = [(step, value.tag, value.tensor.float_val[0]) for step, value in values]
    assert found[:2] == [(0, "val_loss", 3.0), (0, "val_loss_by_set.main", 3.0)]
    assert [tag for step, tag, _ in found if step == 2] == ["tokens", "train_loss", "skipped", "q_rms/0"]


class Recorded(types.ModuleType):
    """Stands in for wandb: runs that keep what they are given."""

    Settings = staticmethod(lambda **_: None)

    def __init__(self, there=0):
        super().__init__("wandb")
        self.there, self.given, self.logged, self.summary = there, {}, [], {}

    def init(self, **given):
        self.given = given
        log = lambda numbers, step: self.logged.append((step, numbers))  # noqa: E731
        return types.SimpleNamespace(
            starting_step=self.there, log=log, summary=self.summary, finish=lambda exit_code=0: None
        )


@pytest.mark.parametrize(("mode", "there", "steps"), [("offline", 0, [0, 1, 2]), ("online", 2, [2])])
def test_wandb_gets_the_lines_that_it_lacks(tmp_path, monkeypatch, mode, there, steps):
    """Online it has those of the earlier start. An offline recording holds all, and replaces an upload."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    stub = Recorded(there)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    mirrored = wandb_of(tmp_path, ROWS[:1], wandb_mode=mode, tags=["first"], notes="why")
    for row in ROWS[1:]:
        mirrored.log(row)
    mirrored.finish({"status": "finished"})
    assert [step for step, _ in stub.logged] == steps
    assert stub.logged[-1][1] == {"tokens": 256, "train_loss": 2.25, "skipped": True, "q_rms/0": 0.1}
    assert stub.given["resume"] == ("allow" if mode == "online" else None)
    assert (stub.given["tags"], stub.given["notes"], stub.given["group"]) == (["first"], "why", "name")
    assert stub.summary["status"] == "finished"


def test_the_axes_of_a_sweep_are_named_with_the_values_of_the_run(tmp_path):
    lines = [{"run_id": "a1", "varied": {"model": "nano_s"}}, {"run_id": "b2", "varied": {"model": "x", "seed": "3"}}]
    (tmp_path / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert axes(tmp_path / "b2", {"seed": 3, "optimizer.lr": 0.1}) == {"axes.model": "x", "axes.seed": 3}
    assert axes(tmp_path / "c3", {"seed": 3}) == {} and axes(tmp_path / "none" / "b2", {}) == {}


def test_the_newest_recording_is_uploaded_unless_it_was(tmp_path):
    assert recording_to_sync(tmp_path) is None
    for name in ("offline-run-20260102_000000-a", "run-20260101_000000-a", "offline-run-20251231_000000-a"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to("run-20260101_000000-a")
    newest = tmp_path / "wandb" / "offline-run-20260102_000000-a"
    assert recording_to_sync(tmp_path) == newest
    (newest / "run-a.wandb.synced").touch()
    assert recording_to_sync(tmp_path) is None
    (tmp_path / "wandb" / "run-20260103_000000-a").mkdir()  # of a start that was online and sent all
    assert recording_to_sync(tmp_path) is None
