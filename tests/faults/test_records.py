# ruff: noqa: F811 (fixtures of tests/training)
"""Records, checkpoints and printed lines of a run, when files are lost, swapped or damaged and disks are full."""

import json
import os
import shutil
import signal
import time

import pytest

from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.runs import checkpoint
from scaling_testbed.train import main as train_main
from scaling_testbed.training import run as trainer
from tests.training.conftest import TINY, data_dir, metrics, start, tiny, trained, whole  # noqa: F401

MEASURED = ("diagnostics=basic", "diagnostics.every_steps=2", "diagnostics.at_step=3", "diagnostics.last_steps=6")
OF_A_START = ("wall_seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "restarts", "runs_dir", "overrides")


class StopAt(Interrupts):
    """Interrupts that ask to stop at the n-th time they are polled, not counting the one before the start."""

    def __init__(self, polls):
        super().__init__()
        self.left = polls + 1

    def check(self):
        self.left -= 1
        if self.left == 0:
            raise trainer.Interrupted("SIGTERM")


@pytest.fixture
def stopped(trained, monkeypatch):
    """Returns a function that stops a tiny run in mid-run and returns its folder."""

    def stop(*overrides, polls=16, **where):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "Interrupts", lambda: StopAt(polls))
            row, folder = trained(*overrides, **where)
        assert row["status"] == "preempted" and 0 < row["steps"] < 12
        return folder

    return stop


def same(row):
    """A row without what a clock or the start decides."""
    return {key: value for key, value in row.items() if key not in OF_A_START}


def rehash(path):
    """Give a checkpoint the hashes of its files, as somebody who changes it on purpose would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: checkpoint._fingerprint(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_state(path, **values):
    state = json.loads((path / "state.json").read_text()) | values
    (path / "state.json").write_text(json.dumps(state))
    rehash(path)


LOST = {
    "emptied": lambda lines: [],
    "first lines": lambda lines: lines[3:],
    "last lines": lambda lines: lines[:3],
    "a hole": lambda lines: lines[:2] + lines[5:],
    "a value changed": lambda lines: [lines[0].replace(b'"val_loss": 4', b'"val_loss": 5'), *lines[1:]],
    "removed": None,
}


@pytest.mark.fault("A12", "A row is the same after lines of metrics.jsonl were lost, and the loss is said.")
@pytest.mark.parametrize("how", LOST)
def test_a_row_does_not_need_the_lines_of_metrics(whole, stopped, trained, capsys, record_property, how):
    row, _ = whole(*MEASURED)
    folder = stopped(*MEASURED)
    path, lose = folder / "metrics.jsonl", LOST[how]
    if lose is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(b"".join(lose(before.splitlines(keepends=True))))
        assert path.read_bytes() != before
    capsys.readouterr()
    again, _ = trained(*MEASURED)
    said = capsys.readouterr().err
    assert same(again) == same(row) and again["diagnostics_at_step"] and again["diagnostics_last_mean"]
    assert said.count("\n") == 1 and str(path) in said and "lines before step" in said
    record_property("seen", f"val_loss_initial {again['val_loss_initial']:.4f} as undisturbed; {said[:40]}...")


@pytest.mark.fault("A12", "A row is the same after lines of metrics.jsonl were lost, and the loss is said.")
def test_a_run_that_lost_lines_and_stops_again_keeps_its_row(whole, stopped, trained, monkeypatch):
    """The second checkpoint is saved with a file that lacks lines, so it counts and not the file."""
    row, _ = whole(*MEASURED)
    (stopped(*MEASURED, polls=10) / "metrics.jsonl").write_bytes(b"")
    stopped(*MEASURED, polls=6)
    assert same(trained(*MEASURED)[0]) == same(row)


@pytest.mark.fault("A12", "A row is the same after lines of metrics.jsonl were lost, and the loss is said.")
def test_lines_are_on_the_disk_before_a_checkpoint_gets_its_name(python, tmp_path, data_dir, record_property):
    """The system calls of a real run: between the last line and the rename the file is synced."""
    log = tmp_path / "calls"
    hook = f"""
import os
log = open({str(log)!r}, "a", buffering=1)
write, fsync, rename = os.write, os.fsync, os.rename
def name(opened):
    return os.path.basename(os.readlink(f"/proc/self/fd/{{opened}}"))
def traced_write(opened, content):
    if name(opened) == "metrics.jsonl": log.write("write\\n")
    return write(opened, content)
def traced_fsync(opened):
    if name(getattr(opened, "fileno", lambda: opened)()) == "metrics.jsonl": log.write("sync\\n")
    fsync(opened)
def traced_rename(source, target):
    if "step-" in str(target) and not str(target).endswith(".tmp"): log.write("rename\\n")
    rename(source, target)
os.write, os.fsync, os.rename = traced_write, traced_fsync, traced_rename
"""
    process = start(python, tmp_path, data_dir, before=hook)
    assert process.wait(60) == 0, process.communicate()
    calls = log.read_text().split()
    assert calls.count("rename") == 3  # steps 4, 8 and 12
    for number, call in enumerate(calls):
        if call == "rename":
            before = calls[:number]
            assert "write" not in before[len(before) - before[::-1].index("sync") :]
    record_property("seen", " ".join(calls[-4:]))


SWAPS = {
    "seed": ("seed=1",),
    "rate": ("optimizer.lr=3e-3",),
    "size": ("model.n_layers=1",),
    "optimizer": ("optimizer=sgd",),
}


@pytest.mark.fault("A11", "A checkpoint of another run is refused in one line.")
@pytest.mark.parametrize("other", SWAPS)
def test_a_checkpoint_of_another_run_is_refused(
    stopped,
    whole,
    tmp_path,
    data_dir,
    capsys,
    record_property,
    other,
):
    folder = stopped()
    _, stranger = whole(*SWAPS[other])
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(stranger / "checkpoints", folder / "checkpoints")
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"is of the run {stranger.name}" in said and "step-00000012" in said
    record_property("seen", said.strip()[-120:])


@pytest.mark.fault("A11", "A checkpoint of another run is refused in one line.")
def test_an_old_checkpoint_of_another_size_is_refused_by_its_shapes(
    stopped,
    whole,
    tmp_path,
    data_dir,
    capsys,
    record_property,
):
    """Checkpoints of earlier versions do not name their run."""
    folder = stopped()
    _, stranger = whole("model.n_layers=1")
    newest = folder / "checkpoints" / "step-00000008"
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(stranger / "checkpoints" / newest.name, newest)
    as_before(newest)
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "of another model" in said and "missing" in said
    record_property("seen", said.strip()[-120:])


def as_before(path):
    """A checkpoint as versions before this one wrote it."""
    state = json.loads((path / "state.json").read_text())
    for name in ("schema_version", "run_id", "shapes", "summary", "metrics", "restarts"):
        del state[name]
    (path / "state.json").write_text(json.dumps(state))
    rehash(path)


@pytest.mark.fault("A11", "A checkpoint of another run is refused in one line.")
def test_a_checkpoint_of_an_earlier_version_is_continued(whole, stopped, trained):
    row, _ = whole(*MEASURED)
    folder = stopped(*MEASURED)
    for path in (folder / "checkpoints").iterdir():
        as_before(path)
    assert same(trained(*MEASURED)[0]) == same(row)


@pytest.mark.fault("A11", "A checkpoint of another run is refused in one line.")
def test_a_checkpoint_of_another_run_is_not_scored(whole, tmp_path, capsys):
    from scaling_testbed.analyze import main as analyze

    _, folder = whole()
    _, stranger = whole("seed=1")
    mine = tmp_path / folder.name
    shutil.copytree(folder, mine)
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(stranger / "checkpoints", mine / "checkpoints")
    assert analyze(["inspect", str(mine)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"is of the run {stranger.name}" in said


STEPS = {"past the end": 13, "negative": -1, "text": "8", "fraction": 8.5, "other": 7, "huge": 10**300, "true": True}


@pytest.mark.fault("B4", "A checkpoint whose step is no step of the run is refused.")
@pytest.mark.parametrize("which", STEPS)
def test_a_wrong_step_is_refused(stopped, tmp_path, data_dir, capsys, record_property, which):
    newest = checkpoint.latest(stopped() / "checkpoints")
    change_state(newest, step=STEPS[which])
    if which == "past the end":
        newest.rename(newest.with_name("step-00000013"))
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "of step" in said and len(said) < 500
    record_property("seen", said.strip()[-120:])


def begun(tmp_path, steps=3, seconds=60):
    """The folder of the run that a process has begun, once it has written `steps` lines."""
    deadline = time.monotonic() + seconds
    while True:
        for path in tmp_path.glob("runs/*/*/metrics.jsonl"):
            if len(path.read_bytes().splitlines()) > steps:
                return path.parent
        assert time.monotonic() < deadline, "it did not begin in time"
        time.sleep(0.02)


ENDLESS = ("budget.steps=100000", "checkpoint.every_steps=0", "evaluation.every_steps=0")
TAKEN = {
    "deleted": lambda folder, _: shutil.rmtree(folder),
    "renamed": lambda folder, aside: folder.rename(aside),
    "replaced": lambda folder, aside: (folder.rename(aside), shutil.copytree(aside, folder)),
    "a level above": lambda folder, aside: folder.parent.parent.rename(aside),
    "records deleted": lambda folder, _: (folder / "metrics.jsonl").unlink(),
    "lock deleted": lambda folder, _: (folder / "lock").unlink(),
}
LOST_FILE = {"records deleted": "metrics.jsonl", "lock deleted": "lock"}


@pytest.mark.fault("B9", "A run whose folder is deleted, moved or replaced stops with one line and recreates nothing.")
@pytest.mark.parametrize("how", TAKEN)
def test_a_run_whose_folder_is_taken_away_stops(python, tmp_path, data_dir, record_property, how):
    process = start(python, tmp_path, data_dir, *ENDLESS)
    folder = begun(tmp_path)
    pid = json.loads((folder / "lock").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    TAKEN[how](folder, tmp_path / "aside")
    there = sorted(folder.rglob("*"))
    os.kill(pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1, said
    assert f"{LOST_FILE.get(how, '')} was deleted, moved or replaced" in said
    assert sorted(folder.rglob("*")) == there and folder.exists() == (how == "replaced" or how in LOST_FILE)
    record_property("seen", said.strip()[-120:])


@pytest.mark.fault("B9", "A run whose folder is deleted, moved or replaced stops with one line and recreates nothing.")
def test_a_checkpoint_recreates_no_folder_that_was_deleted(python, tmp_path, data_dir):
    """A signal asks for a checkpoint of a folder that is gone."""
    process = start(python, tmp_path, data_dir, *ENDLESS, "logging.every_steps=100000")
    folder = begun(tmp_path, steps=1)
    pid = json.loads((folder / "lock").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    shutil.rmtree(folder)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1 and "was deleted" in said, said
    assert not folder.exists()


def closing(stream):
    return f"import os\nos.close({stream})"


PIPES = {"closed by its reader": "", "closed": closing(1), "both closed": f"{closing(1)}\n{closing(2)}"}


@pytest.mark.fault("B6", "Printing never decides a run's fate.")
@pytest.mark.parametrize("how", PIPES)
def test_a_run_finishes_when_its_output_is_closed(
    python,
    whole,
    tmp_path,
    data_dir,
    record_property,
    how,
):
    row, unbroken = whole()
    process = start(python, tmp_path, data_dir, before=PIPES[how])
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 0 and said == ""
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert same(json.loads((folder / "result.json").read_text())) == same(row)
    assert metrics(folder) == metrics(unbroken)
    record_property("seen", "finished, exit 0, the row of a run that printed")


@pytest.mark.fault("B6", "Printing never decides a run's fate.")
def test_a_run_that_starts_without_streams_keeps_its_files(python, tmp_path, data_dir):
    """What a library prints to number 1 must not end in a file of the run that has got this number."""
    loud = "import os, atexit\nfor number in (0, 1, 2): os.close(number)\natexit.register(lambda: os.write(1, b'loud'))"
    process = start(python, tmp_path, data_dir, before=loud, stdout=None, stderr=None)
    assert process.wait(60) == 0
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert not any(b"loud" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


@pytest.mark.fault("B6", "Printing never decides a run's fate.")
@pytest.mark.parametrize("name", ["größe", "模型", "\udcff"])
def test_a_name_that_the_output_cannot_show_is_written_as_numbers(
    python,
    tmp_path,
    data_dir,
    record_property,
    name,
):
    ascii_only = "import sys\nsys.stdout.reconfigure(encoding='ascii', errors='strict')"
    runs = tmp_path / name
    process = start(python, tmp_path, data_dir, f"runs_dir='{runs}'", before=ascii_only)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert name.encode("ascii", "backslashreplace").decode() in out and "status           finished" in out
    assert list(runs.glob("*/*/result.json"))
    record_property("seen", out.splitlines()[0][-100:])


@pytest.mark.fault("B6", "Printing never decides a run's fate.")
def test_a_full_disk_behind_the_output_stops_no_run(python, tmp_path, data_dir):
    with open("/dev/full", "w") as full:
        process = start(python, tmp_path, data_dir, stdout=full)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == ""
