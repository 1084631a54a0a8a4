"""A row belongs to its data: what decides a number besides the configuration is compared before a row is served."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

SMALL = ["model=bigram", "batch.sequences=2", "batch.sequence_length=16", "evaluation.tokens=64", "compute.threads=1"]
TEXT = ["data=text_files", "data.files=c.txt", "budget.steps=2"]
LONG = ["budget.steps=1000000", "evaluation.every_steps=0", "logging.every_steps=1"]


def text(folder: Path, word: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "c.txt").write_text("".join(f"the {word} brown fox number {i}\n" for i in range(400)))
    return folder / "c.txt"


@pytest.fixture
def places(tmp_path):
    return [f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}"]


@pytest.fixture
def command(python, tmp_path, places):
    """Returns a function from words to the command line of training, and the folder that it is typed in."""

    def words(*words, cwd="."):
        line = [python, "-m", "scaling_testbed.train", *SMALL, *places, *words]
        return {"args": line, "cwd": tmp_path / cwd, "text": True}

    return words


@pytest.fixture
def train(typed, places):
    """Returns a function that trains and returns (exit status, stdout, stderr)."""
    return lambda *words, **where: typed("train", *SMALL, *places, *words, **where)


def row_in(tmp_path) -> dict:
    (path,) = tmp_path.glob("runs/default/*/result.json")
    return json.loads(path.read_text())


@pytest.mark.fault("A1", "A finished row is served only while its data are the same.")
def test_a_finished_row_is_not_served_for_the_file_of_that_name_in_another_folder(train, tmp_path, record_property):
    a, b = text(tmp_path / "A", "quick"), text(tmp_path / "B", "slow, old")
    assert train(*TEXT, cwd="A")[0] == 0
    row = row_in(tmp_path)
    status, out, err = train(*TEXT, cwd="B")
    record_property("seen", err.strip())
    assert status == 1 and "validation loss" not in out and err.count("\n") == 1
    assert f"{b} has {b.stat().st_size:,} bytes, and {a} had {a.stat().st_size:,}" in err
    assert "give another name=" in err and "delete the folder" in err
    assert row_in(tmp_path) == row
    assert "name=b" not in err and train(*TEXT, "name=b", cwd="B")[0] == 0
    status, out, _ = train(*TEXT, cwd="A")
    assert status == 0 and "has finished before" in out


@pytest.mark.fault("A1", "A finished row is served only while its data are the same.")
def test_a_finished_row_is_not_served_for_a_file_that_grew_or_was_edited(train, tmp_path, record_property):
    file = text(tmp_path / "A", "quick")
    assert train(*TEXT, cwd="A")[0] == 0
    before, stat = file.read_text(), file.stat()
    file.write_text(before + "more\n")
    status, out, err = train(*TEXT, cwd="A")
    assert status == 1 and f"{file} has {stat.st_size + 5:,} bytes, and it had {stat.st_size:,}" in err
    file.write_text(before.replace("quick", "quack"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    status, out, err = train(*TEXT, cwd="A")
    record_property("seen", err.strip())
    assert status == 1 and f"{file} has other bytes" in err and "validation loss" not in out
    file.write_text(before)
    status, out, err = train(*TEXT, cwd="A")
    assert status == 0 and "has finished before" in out and not err
    (shard,) = tmp_path.glob("data/*/train-*.bin")
    shard.write_bytes(shard.read_bytes()[:-2] + bytes(2))
    status, out, err = train(*TEXT, cwd="A")
    assert status == 1 and f"{shard}: sha256 differs" in err and "validation loss" not in out


@pytest.mark.fault("21", "Data that changed under a run's path between two starts are refused.")
def test_a_run_does_not_go_on_with_other_data(command, train, tmp_path, record_property):
    """The second start reads no document of the new file: nothing more is prepared."""
    file = text(tmp_path / "A", "quick")
    before = file.read_text()
    words = [*TEXT[:2], *LONG]
    stopped_after(command(*words, cwd="A"), tmp_path, lambda run: run.send_signal(signal.SIGTERM), 75)
    step, prepared = row_in(tmp_path)["steps"], sorted(tmp_path.glob("data/*"))
    file.write_text(before + "more\n")
    status, _, err = train(*words, cwd="A")
    record_property("seen", err.strip())
    assert status == 1 and "was trained on other data" in err and f"{file} has " in err
    assert sorted(tmp_path.glob("data/*")) == prepared
    file.write_text(before)
    stopped_after(command(*words, cwd="A"), tmp_path, lambda run: run.send_signal(signal.SIGTERM), 75, step + 1)
    assert row_in(tmp_path)["restarts"] >= 1 and row_in(tmp_path)["steps"] > step


@pytest.mark.fault("22", "Records of another configuration in a run's folder are refused, with the difference.")
def test_the_records_of_another_run_are_not_served(train, tmp_path, record_property):
    text(tmp_path / "A", "quick")
    assert train(*TEXT, cwd="A")[0] == 0
    (zero,) = tmp_path.glob("runs/default/*")
    assert train(*TEXT, "seed=1", "optimizer.lr=0.5", cwd="A")[0] == 0
    (other,) = set(tmp_path.glob("runs/default/*")) - {zero}
    for path in sorted(other.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    other.rmdir()
    zero.rename(other)
    status, out, err = train(*TEXT, "seed=1", "optimizer.lr=0.5", cwd="A")
    record_property("seen", err.strip())
    assert status == 1 and "validation loss" not in out
    assert f"holds the records of run {zero.name}: seed is 0 there and 1 here (and 1 more)" in err


def stopped_after(popen, tmp_path, act, status, step=3):
    """Start a run, do `act` with it after `step`, and return what it said on stderr when it ended with `status`."""
    popen["args"] = [str(word) for word in popen["args"]]
    run = subprocess.Popen(**popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not any(last_step(path) >= step for path in tmp_path.glob("runs/*/*/metrics.jsonl")):
            assert time.monotonic() < deadline and run.poll() is None, run.communicate()
            time.sleep(0.02)
        act(run)
        _, err = run.communicate(timeout=60)
        assert run.returncode == status, err
        return err
    finally:
        run.kill()


def last_step(path: Path) -> int:
    lines = [line for line in path.read_text().split("\n")[:-1] if line]
    return json.loads(lines[-1])["step"] if lines else -1


@pytest.fixture
def token_words(tmp_path):
    """The words of a run on token files, and the file of its train split."""
    for name, n in (("train", 40_000), ("validation", 4_000)):
        np.random.default_rng(n).integers(0, 500, n).astype("<u2").tofile(tmp_path / f"{name}.bin")
    words = ["data=token_files", "data.train=train.bin", "data.validation=validation.bin", "data.vocab_size=512"]
    return [*words, *LONG], tmp_path / "train.bin"


@pytest.mark.fault("A14", "A token file that is overwritten while a run reads it stops the run, which says so.")
def test_a_token_file_overwritten_in_place_stops_its_run(command, token_words, tmp_path, record_property):
    words, file = token_words

    def overwrite(_):
        with open(file, "r+b") as opened:
            opened.write(bytes(80_000))

    err = stopped_after(command(*words), tmp_path, overwrite, 1)
    record_property("seen", err.strip().splitlines()[-1])
    assert f"{file} was changed while it was in use: its sha256 is another now" in err and "Traceback" not in err
    assert row_in(tmp_path)["status"] == "failed" and str(file) in row_in(tmp_path)["error"]


@pytest.mark.fault("A14", "A token file that is cut while a run reads it stops the run, which says so.")
def test_a_token_file_that_is_cut_stops_its_run_without_a_crash(command, token_words, tmp_path, record_property):
    words, file = token_words
    err = stopped_after(command(*words), tmp_path, lambda _: os.truncate(file, 10_000), 1)
    record_property("seen", err.strip().splitlines()[-1])
    assert f"{file} was changed while it was in use: it has 10,000 bytes now and had 80,000" in err
    assert row_in(tmp_path)["status"] == "failed" and str(file) in row_in(tmp_path)["error"]


@pytest.mark.fault("A14", "A token file whose time alone changes stops no run.")
def test_a_token_file_that_is_touched_stops_no_run(command, token_words, tmp_path, record_property):
    words, file = token_words

    def touch(run):
        before = row_steps(tmp_path)
        file.touch()
        file.chmod(0o600)
        os.link(file, tmp_path / "link")
        deadline = time.monotonic() + 30
        while row_steps(tmp_path) < before + 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)

    stopped_after(command(*words), tmp_path, touch, 75)
    record_property("seen", f"preempted at step {row_in(tmp_path)['steps']} by the signal of the test")
    assert row_in(tmp_path)["status"] == "preempted"


def row_steps(tmp_path) -> int:
    (path,) = tmp_path.glob("runs/*/*/metrics.jsonl")
    return last_step(path)
