# ruff: noqa: F811 (fixtures of tests/training)
"""Records, checkpoints and printed lines of a run, when files are lost, swapped or damaged and disks are full."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch

from scaling_testbed.analyze import main as analyze
from scaling_testbed.config.sections import CheckpointConfig
from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.summary import Summary
from scaling_testbed.errors import UserError
from scaling_testbed.export import main as export
from scaling_testbed.runs import checkpoint
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.train import main as train_main
from scaling_testbed.training import run as trainer
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt, data_dir, metrics, start, tiny, trained, whole  # noqa: F401

MEASURED = ("diagnostics=basic", "diagnostics.every_steps=2", "diagnostics.at_step=3", "diagnostics.last_steps=6")
OF_A_START = ("wall_seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "restarts", "runs_dir", "overrides")


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


def quick(names, *few):
    """The cases of a test: these few always, the others with the slow tests."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


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
@pytest.mark.parametrize("how", quick(LOST, "emptied", "a value changed", "removed"))
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
    assert said.count("\n") == 1 and str(path) in said and "lines before step" in said and "curves" in said
    record_property("seen", f"val_loss_initial {again['val_loss_initial']:.4f} as undisturbed; {said[:40]}...")


@pytest.mark.fault("A12", "A row is the same after lines of metrics.jsonl were lost, and the loss is said.")
def test_a_run_that_lost_lines_and_stops_again_keeps_its_row(whole, stopped, trained, monkeypatch):
    """The second checkpoint is saved with a file that lacks lines, so it counts and not the file."""
    row, _ = whole(*MEASURED)
    (stopped(*MEASURED, polls=10) / "metrics.jsonl").write_bytes(b"")
    (stopped(*MEASURED, polls=6) / "environment.json").unlink()
    again, _ = trained(*MEASURED)
    assert same(again) == same(row) and again["restarts"] == 2


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
@pytest.mark.parametrize(
    "other", ["seed", "rate", *(pytest.param(x, marks=pytest.mark.slow) for x in ("size", "optimizer"))]
)
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


@pytest.mark.fault("C: another precision", "A run that was begun in bf16 on a GPU does not go on in fp32 elsewhere.")
def test_a_run_does_not_go_on_in_another_precision(tiny, whole, record_property):
    """compute.precision=auto is part of the run_id, and what it means is not."""
    _, done = whole()
    run, folder = tiny()
    newest = folder / "checkpoints" / "step-00000008"
    shutil.copytree(done / "checkpoints" / newest.name, newest)
    assert json.loads((newest / "state.json").read_text())["precision"] == "fp32"
    change_state(newest, precision="bf16")
    with pytest.raises(UserError, match="was computed in bf16 so far, and compute.precision=auto means fp32") as raised:
        train(run, quiet=True)
    record_property("seen", str(raised.value)[-160:])


def as_before(path):
    """A checkpoint as versions before this one wrote it."""
    state = json.loads((path / "state.json").read_text())
    for name in ("schema_version", "run_id", "shapes", "precision", "summary", "metrics", "restarts"):
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
@pytest.mark.parametrize("which", quick(STEPS, "past the end", "negative", "other"))
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
@pytest.mark.parametrize("how", quick(TAKEN, "deleted", "renamed", "replaced"))
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
@pytest.mark.parametrize("name", ["größe", pytest.param("模型", marks=pytest.mark.slow)])
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


SWEEP = """
overrides: [data=markov, data.n_tokens=20000, data.n_validation_tokens=4000, model=bigram, batch.sequences=8,
            batch.sequence_length=16, budget.steps=4, evaluation.tokens=1024, compute.threads=1, compute.device=cpu]
axes:
  optimizer.lr: [1e-3, 1e-2]
"""
HIDDEN = {
    "closed by its reader": "",
    "closed": closing(1),
    "ascii": "import sys\nsys.stdout.reconfigure(encoding='ascii', errors='strict')",
}


@pytest.mark.fault("B6", "Printing never decides a run's fate.")
@pytest.mark.parametrize("how", ["closed by its reader", pytest.param("closed", marks=pytest.mark.slow), "ascii"])
def test_a_sweep_finishes_whatever_becomes_of_its_output(python, tmp_path, data_dir, how):
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    words = ["run", f"sweep={tmp_path / 'tiny.yaml'}", f"runs_dir='{tmp_path / 'größe'}'", f"data_dir={data_dir}"]
    code = f"import sys\n{HIDDEN[how]}\nfrom scaling_testbed.sweep import main\nsys.exit(main({words!r}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([python, "-c", code], **pipes)
    if how == "ascii":
        out, err = process.communicate(timeout=60)
        assert "records under" in out and "gr\\xf6\\xdfe" in out
    else:
        process.stdout.close()
        err = process.stderr.read()
    assert process.wait(60) == 0 and err == ""
    rows = [json.loads(path.read_text()) for path in (tmp_path / "größe").glob("*/*/result.json")]
    assert [row["status"] for row in rows] == ["finished", "finished"]


def at_step(number, code):
    """Python that runs `code` in a run before its update `number`."""
    return f"""
from scaling_testbed.training import step as updates
set_lr = updates.set_lr
def hooked(optimizer, lr, count=[0]):
    count[0] += 1
    if count[0] == {number}:
        exec({code!r}, {{}})
    set_lr(optimizer, lr)
updates.set_lr = hooked
"""


@pytest.fixture
def small_disk(tmp_path):
    """Returns a function that mounts or resizes a small disk and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(kib, *options):
        words = ",".join([*options, f"size={kib}k"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", words, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("a small disk needs the right to mount one")
        return folder

    yield size
    subprocess.run(["umount", "-l", folder], capture_output=True)


FILLED = "with open({path!r}, 'wb', buffering=0) as file:\n    while True:\n        file.write(bytes(4096))"
FULL = "import contextlib\nwith contextlib.suppress(OSError):\n" + textwrap.indent(FILLED, "    ")


@pytest.mark.fault("23", "On a full disk the earlier checkpoint stays, and the path and the bytes needed are told.")
@pytest.mark.parametrize("parallelism", ["single", "fsdp"])
def test_a_full_disk_stops_a_run_that_goes_on_later(
    python, whole, tmp_path, data_dir, small_disk, record_property, parallelism
):
    row, unbroken = whole()
    disk = small_disk(8192)
    options = (f"runs_dir={disk}", f"parallelism={parallelism}")
    process = start(python, tmp_path, data_dir, *options, before=at_step(7, FULL.format(path=f"{disk}/filler")))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said and "enforce" not in said
    assert said.startswith("error: could not write the checkpoint") and "step-00000008: the disk is full" in said
    assert ("bytes are needed" in said) and "earlier checkpoints are intact" in said
    (folder,) = disk.glob("*/*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    (disk / "filler").unlink()
    process = start(python, tmp_path, data_dir, *options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "resumed at step 4" in out and err == ""
    if parallelism == "single":
        assert same(json.loads((folder / "result.json").read_text())) == same(row)
        assert metrics(folder) == metrics(unbroken)
    record_property("seen", said.splitlines()[0][-160:])


@pytest.mark.fault("24", "On a full disk a line of metrics is told in one line, and no half line stays.")
def test_a_full_disk_leaves_no_half_line(python, whole, tmp_path, data_dir, small_disk, record_property):
    """Lines of diagnostics are long, so that one of them meets the end of the last block."""
    options = ("diagnostics=basic", "diagnostics.every_steps=1", "evaluation.every_steps=0")
    row, unbroken = whole(*options)
    disk = small_disk(8192)
    full = at_step(6, FULL.format(path=f"{disk}/filler"))
    process = start(python, tmp_path, data_dir, *options, f"runs_dir={disk}", before=full)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "metrics.jsonl: the disk is full" in said and "bytes are needed" in said
    (folder,) = disk.glob("*/*")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"}\n") and json.loads(line) for line in lines)
    (disk / "filler").unlink()
    process = start(python, tmp_path, data_dir, *options, f"runs_dir={disk}")
    assert process.wait(60) == 0
    assert same(json.loads((folder / "result.json").read_text())) == same(row)
    assert metrics(folder) == metrics(unbroken)
    record_property("seen", said.strip()[-160:])


@pytest.mark.fault("24", "On a full disk a line of metrics is told in one line, and no half line stays.")
def test_a_read_only_disk_is_one_line(python, tmp_path, data_dir, small_disk):
    disk = small_disk(4096, "ro")
    process = start(python, tmp_path, data_dir, f"runs_dir={disk}")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1 and "the file system is read-only; set runs_dir=" in said


@pytest.mark.fault("C: ulimit -f", "A limit on the size of files is told in one line with its name.")
def test_a_limit_on_file_sizes_is_one_line(python, tmp_path, data_dir, record_property):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    process = start(python, tmp_path, data_dir, before=at_step(2, limit))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1 and "`ulimit -f`" in said and "step-00000004" in said
    assert "bytes are needed" in said
    (path,) = tmp_path.glob("runs/*/*/result.json")
    row = json.loads(path.read_text())
    assert row["status"] == "failed" and "ulimit -f" in row["error"]
    record_property("seen", said.strip()[-160:])


@pytest.mark.fault("C: retention", "A checkpoint that cannot be deleted is a warning; the run goes on.")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs a second user")
def test_a_checkpoint_that_cannot_be_deleted_fails_no_run(capsys, record_property):
    """Another user owns the old checkpoint in a folder with the sticky bit: it can be read, and not be renamed."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "checkpoints"
        config = CheckpointConfig(keep_last=1)
        checkpoint.save(folder, 1, {}, {"model": {"w": torch.ones(3)}}, config)
        os.chmod(folder, 0o1777)
        os.seteuid(65534)
        try:
            checkpoint.save(folder, 2, {}, {"model": {"w": torch.ones(3)}}, config)
        finally:
            os.seteuid(0)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
        assert checkpoint.load(folder / "step-00000002").step == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-00000001 cannot be deleted: " in said
    record_property("seen", said.strip()[-120:])


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bad_zip(path):
    """A file of torch.save whose pickle is cut."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as there, zipfile.ZipFile(packed, "w") as other:
        for name in there.namelist():
            content = there.read(name)
            other.writestr(name, content[: len(content) // 2] if name.endswith("data.pkl") else content)
    return packed.getvalue()


MALFORMED = {
    "empty": lambda path: b"",
    "text": lambda path: b"no pickle at all",
    "half a pickle": lambda path: b"\x80\x02}q\x00(X\x05\x00\x00\x00model",
    "protocol 255": lambda path: b"\x80\xff.",
    "a global": lambda path: b"cos\nsystem\n(S'true'\ntR.",
    "a persistent id": lambda path: b"Pabc\n.",
    "half a file": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "a cut pickle": bad_zip,
    "a list": lambda path: torch_bytes([1, 2]),
    "a number": lambda path: torch_bytes(7),
    "no tensors": lambda path: torch_bytes({"a": 1}),
    "other tensors": lambda path: torch_bytes({"a": torch.ones(3)}),
}


@pytest.mark.fault(
    "C: malformed pickle", "A file of tensors that cannot be loaded is one line, with the right hash too."
)
@pytest.mark.parametrize(
    "file", ["model", *(pytest.param(name, marks=pytest.mark.slow) for name in ("optimizer", "rng"))]
)
@pytest.mark.parametrize("what", quick(MALFORMED, "empty", "half a pickle", "a cut pickle", "a list"))
def test_a_malformed_file_with_the_right_hash_is_one_line(tiny, whole, tmp_path, capsys, record_property, what, file):
    _, done = whole()
    run, folder = tiny()
    newest = folder / "checkpoints" / "step-00000008"
    shutil.copytree(done / "checkpoints" / newest.name, newest)
    content = MALFORMED[what](newest / f"{file}.pt")
    (newest / f"{file}.pt").write_bytes(content)
    rehash(newest)
    with pytest.raises(UserError) as raised:
        train(run, quiet=True)
    said = str(raised.value)
    assert len(said.splitlines()) == 1 and str(newest) in said and len(said) < 600
    assert capsys.readouterr().err == ""
    record_property("seen", said[-120:])


SUMMARY = Summary(DiagnosticsConfig()).state()
STATES = {
    "no object": "[]",
    "a text": '"x"',
    "nothing": "",
    "too deep": "[" * 100_000,
    "empty": "{}",
    "no fields": '{"step": 8}',
    "a newer version": {"schema_version": 99},
    "no version": {"schema_version": "x"},
    "a clock": {"wall_seconds": "x"},
    "a huge clock": {"wall_seconds": 10**400},
    "a negative clock": {"wall_seconds": -1},
    "a record": {"row": [1]},
    "a loss": {"train_loss_last": "x"},
    "a summary": {"summary": {"last": 3}},
    "means": {"summary": {"val_loss_initial": None, "val_loss_best": None, "evaluation": 3, "last": [], "at_step": 1}},
    "a summary of texts": {"summary": SUMMARY | {"val_loss_initial": "x"}},
    "a logit": {"summary": SUMMARY | {"largest_logit": [1]}},
    "a step of means": {"summary": SUMMARY | {"last": {"steps": ["x"], "names": [], "values": ""}}},
    "values of means": {"summary": SUMMARY | {"last": {"steps": [1], "names": ["a"], "values": "AAAA"}}},
    "no means": {"summary": SUMMARY | {"last": {"steps": [1], "names": ["a"], "values": "%%"}}},
    "a record of texts": {"row": {"step": 8, "lr": "x"}},
    "a record of another step": {"row": {"step": 5}},
    "metrics": {"metrics": {}},
    "metrics of texts": {"metrics": {"lines": "x", "sha256": 5, "whole": "no"}},
    "no micro-batch": {"micro_batches": {"0": 0}},
    "states": {"updates": [1]},
    "restarts": {"restarts": "x"},
    "a surrogate": {"run_id": "\ud800"},
}


@pytest.mark.fault("C: malformed state", "The plain state of a checkpoint is read right or refused in one line.")
@pytest.mark.parametrize("what", STATES)
def test_a_malformed_state_with_the_right_hash_is_one_line(tiny, whole, what, record_property):
    _, done = whole()
    run, folder = tiny()
    newest = folder / "checkpoints" / "step-00000008"
    shutil.copytree(done / "checkpoints" / newest.name, newest)
    if isinstance(STATES[what], str):
        (newest / "state.json").write_text(STATES[what])
        rehash(newest)
    else:
        change_state(newest, **STATES[what])
    with pytest.raises(UserError) as raised:
        train(run, quiet=True)
    said = str(raised.value)
    assert len(said.splitlines()) == 1 and str(folder) in said and len(said) < 600
    record_property("seen", said[-120:])


@pytest.mark.fault("C: malformed state", "The plain state of a checkpoint is read right or refused in one line.")
@pytest.mark.parametrize("file", ["model.pt", "optimizer.pt", "rng.pt"])
def test_a_file_that_the_manifest_does_not_name_is_damage(tiny, whole, capsys, file):
    _, done = whole()
    run, folder = tiny()
    shutil.copytree(done / "checkpoints", folder / "checkpoints")
    newest = folder / "checkpoints" / "step-00000012"
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][file]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert train(run, quiet=True)["status"] == "finished"
    assert f"{file} is not in the manifest" in capsys.readouterr().err
    shutil.rmtree(folder)
    shutil.copytree(done / "checkpoints" / "step-00000008", folder / "checkpoints" / "step-00000008")
    newest = folder / "checkpoints" / "step-00000008"
    (newest / file).unlink()
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][file]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    if file == "rng.pt":  # a sharded run has none
        assert train(run, quiet=True)["status"] == "finished"
    else:
        with pytest.raises(UserError, match="holds no weights|lacks 'optimizer'"):
            train(run, quiet=True)


@pytest.mark.fault("15", "A flipped bit in any file of a checkpoint is named, and the checkpoint before it is used.")
def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path, capsys, record_property):
    """Every fifth bit of the manifest and of the state, and some of the tensors. A flipped blank changes nothing."""
    config = CheckpointConfig(keep_last=2)
    for step in (1, 2):
        tensors = {"model": {"w": torch.arange(5.0) * step}}
        newest = checkpoint.save(tmp_path, step, {"run_id": "a", "wall_seconds": 1.5}, tensors, config)
    known = checkpoint.load(newest)
    tried = harmless = 0
    for path in newest.iterdir():
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 5 if path.suffix == ".json" else 61):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            found = checkpoint.latest(tmp_path)
            tried += 1
            if found == newest:
                harmless += 1
                again = checkpoint.load(newest)
                assert again.state == known.state and torch.equal(again.tensors["model"]["w"], torch.arange(5.0) * 2)
        path.write_bytes(content)
    said = capsys.readouterr().err
    assert said.count("\n") == tried - harmless and said.count(str(newest)) == tried - harmless
    record_property("seen", f"{tried} flips: {tried - harmless} named, {harmless} in blanks")


@pytest.mark.fault(
    "C: metrics", "Damaged lines of metrics.jsonl or .gz are left out by number, or the file is refused."
)
def test_damaged_metrics_are_read_right_or_told(whole, tmp_path, capsys, record_property):
    _, folder = whole()
    known = read_metrics(folder / "metrics.jsonl")
    packed = gzip.compress((folder / "metrics.jsonl").read_bytes())
    path, refused = tmp_path / "metrics.jsonl.gz", 0
    path.write_bytes(packed)
    assert read_metrics(path) == known
    damaged = [packed[:cut] for cut in range(0, len(packed), 29)]
    for bit in range(0, 8 * len(packed), 97):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        try:
            assert read_metrics(path) == known  # a bit of the header, such as the time
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert refused > 0.9 * len(damaged)
    plain = tmp_path / "metrics.jsonl"
    plain.write_text('{"step": 0}\n{"step": 1, "val_loss": "x"}\n' + "[" * 10**5 + '\n{"step": ' + "9" * 5000 + "}\n")
    assert read_metrics(plain) == [{"step": 0}]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(f"{plain}:{line}" in said for line in (2, 3, 4))
    record_property("seen", f"{len(damaged)} damaged files: {refused} refused in one line, no other content")


ROWS = {
    "a status alone": '{"status": "finished"}',
    "another status": '{"status": "done", "run_id": "a"}',
    "a text for a loss": '{"status": "finished", "run_id": "RUN", "val_loss": "x"}',
    "a huge number": '{"status": "finished", "run_id": "RUN", "val_loss": 1' + "0" * 400 + "}",
    "digits without end": '{"status": "finished", "run_id": "RUN", "steps": ' + "9" * 5000 + "}",
    "a text for a plug-in": '{"status": "finished", "run_id": "RUN", "plugins": {"a": 3}}',
    "a list": "[]",
    "half": '{"status": "fini',
    "nothing": "",
    "too deep": "[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.fault("C: result.json", "What is in place of a row and is none is told in one line, and the run goes on.")
@pytest.mark.parametrize("what", quick(ROWS, "a status alone", "a huge number", "half"))
def test_an_odd_row_is_told_and_made_again(whole, tiny, tmp_path, data_dir, capsys, record_property, what):
    row, done = whole()
    _, folder = tiny()
    shutil.copytree(done, folder)
    content = ROWS[what]
    content = content if isinstance(content, bytes) else content.replace("RUN", folder.name).encode()
    (folder / "result.json").write_bytes(content)
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder / "result.json") in said and len(said) < 400
    assert same(json.loads((folder / "result.json").read_text())) == same(row)
    record_property("seen", said.strip()[-120:])


@pytest.mark.fault("A11", "A checkpoint of another run is refused in one line.")
def test_a_row_of_another_run_is_refused(tiny, tmp_path, data_dir, capsys):
    _, folder = tiny()
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "finished", "run_id": "0123456789ab"}')
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{folder} holds the records of run 0123456789ab" in said


@pytest.mark.fault("C: result.json", "What is in place of a row and is none is told in one line, and the run goes on.")
def test_a_row_of_a_newer_version_is_neither_served_nor_overwritten(tiny, tmp_path, data_dir, capsys):
    _, folder = tiny()
    folder.mkdir(parents=True)
    text = json.dumps({"schema_version": 99, "status": "finished", "run_id": folder.name})
    (folder / "result.json").write_text(text)
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "newer version" in said and (folder / "result.json").read_text() == text


@pytest.mark.fault("C: result.json", "What is in place of a row and is none is told in one line, and the run goes on.")
def test_a_row_of_an_earlier_version_is_served(tiny, tmp_path, data_dir, capsys):
    """It has fewer fields."""
    _, folder = tiny()
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"status": "finished", "run_id": folder.name, "val_loss": 1.5}))
    assert train_main([*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]) == 0
    assert "1.5000 nats per token" in capsys.readouterr().out


CONFIGS = ["", "[]", "a: [", "name: 3", "overrides: x", "overrides: [[1]]", "\x00", "!!python/object:os.system {}"]


@pytest.mark.fault("C: config.yaml", "A run folder without a readable config.yaml is refused in one line.")
@pytest.mark.parametrize("content", CONFIGS)
def test_an_odd_configuration_is_one_line(whole, tmp_path, capsys, content):
    _, done = whole()
    folder = tmp_path / done.name
    shutil.copytree(done, folder)
    (folder / "config.yaml").write_text(content)
    assert analyze(["inspect", str(folder)]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said and len(said) < 500


@pytest.mark.fault("C: failed folder", "The folder of a failed run is refused with the reason in its row.")
@pytest.mark.parametrize("verb", ["inspect", "score", "export"])
def test_the_folder_of_a_failed_run_names_the_reason(tmp_path, data_dir, capsys, verb):
    """It failed before it wrote its configuration."""
    arguments = [*TINY[3:], "data=text_files", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    assert train_main([*arguments, "data.files=nowhere.txt"]) in (1, 2)
    (path,) = tmp_path.glob("runs/*/*/result.json")
    capsys.readouterr()
    if verb == "export":
        status = export([str(path.parent), str(tmp_path / "out")])
    else:
        status = analyze([verb, str(path.parent), *(["task.jsonl"] if verb == "score" else [])])
    said = capsys.readouterr().err
    assert status in (1, 2) and said.count("\n") == 1 and "nowhere.txt" in said


@pytest.mark.fault("A19", "WANDB_MODE and WANDB_DISABLED come before logging.wandb_mode.")
@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "disabled"), ("WANDB_MODE", "Disabled"), ("WANDB_DISABLED", "true")]
)
@pytest.mark.parametrize("mode", ["auto", "online", "offline"])
def test_a_disabled_mirror_stays_disabled(trained, monkeypatch, capsys, record_property, variable, value, mode):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would be a warning
    row, folder = trained("logging.wandb=true", f"logging.wandb_mode={mode}")
    said = capsys.readouterr()
    assert row["status"] == "finished" and not (folder / "wandb").exists()
    assert (
        said.err == ""
        and said.out.strip() == f"wandb: {variable}={value.lower()}, so nothing is sent or recorded there"
    )
    record_property("seen", said.out.strip())


@pytest.mark.fault("A19", "WANDB_MODE and WANDB_DISABLED come before logging.wandb_mode.")
@pytest.mark.slow
@pytest.mark.parametrize("silent", [None, "true", "false"])
def test_the_variables_of_wandb_decide_where_it_records(trained, tmp_path, monkeypatch, silent):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", silent or "")
    if silent is None:
        monkeypatch.delenv("WANDB_SILENT")
    seen = []
    real = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: seen.append(given) or real(**given))
    _, folder = trained("logging.wandb=true", "logging.wandb_mode=online")
    assert list((folder / "wandb").glob("offline-run-*"))
    assert seen[0]["mode"] == "offline" and os.environ["WANDB_SILENT"] == (silent or "true")


@pytest.mark.fault("A19", "WANDB_MODE and WANDB_DISABLED come before logging.wandb_mode.")
def test_a_mode_that_does_not_exist_is_one_warning(trained, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "silent")
    assert trained("logging.wandb=true")[0]["status"] == "finished"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "WANDB_MODE=silent is none of" in said


@pytest.mark.fault("36", "Where no home folder is known, as in a container, wandb records offline.")
def test_a_user_without_a_home_folder_has_no_key(trained, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "NETRC", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that has no name
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert trained("logging.wandb=true", "budget.steps=1")[0]["status"] == "finished"
    assert "no key found; recording offline" in capsys.readouterr().out


@pytest.mark.fault("40", "The row records commit and changes of the code that ran, and a change in between is told.")
def test_code_that_is_edited_between_two_starts_is_in_the_records(python, tmp_path, data_dir, record_property):
    package = tmp_path / "code" / "scaling_testbed"
    package.mkdir(parents=True)
    source = package / "__init__.py"
    source.write_text("a = 1\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(package.parent)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    there = f"""
from pathlib import Path
from scaling_testbed.runs import environment
environment.PACKAGE = Path({str(package)!r})
"""
    stop = at_step(6, "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    assert start(python, tmp_path, data_dir, before=there + stop).wait(60) == 75
    source.write_text("a = 2\n")
    (package / "new.py").write_text("b = 1\n")
    process = start(python, tmp_path, data_dir, before=there)
    out, _ = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("runs/*/*")
    row = json.loads((folder / "result.json").read_text())
    diff = (folder / f"uncommitted-{row['git_dirty']}.diff").read_text()
    assert row["git_commit"] == head and "+a = 2" in diff and "+b = 1" in diff
    assert (
        f"what it is computed with has changed since the last start: {head[:12]} then, {head[:12]} with changes" in out
    )
    record_property("seen", next(line for line in out.splitlines() if "has changed since" in line))
