"""A sweep on one machine: nothing is repeated, nothing is lost, and a failure is named and passed by."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaling_testbed.files import sha256_of
from scaling_testbed.runs.identity import Found
from scaling_testbed.runs.lease import Owner
from scaling_testbed.sweeps import local, status
from scaling_testbed.sweeps.local import slots
from scaling_testbed.sweeps.plan import remembered
from tests.conftest import REAL_PYTHON
from tests.training.conftest import metrics


@pytest.mark.fault("30", "A finished sweep that is typed again starts nothing.")
def test_a_grid_runs_to_its_end_and_again_starts_nothing(door, states, tmp_path, monkeypatch):
    code, out, err = door("run", "--workers", "2")
    assert (code, err) == (0, "")
    assert "4/4  finished" in out and "4 finished" in out and "optimizer.lr=1e-2" in out
    found = states()
    assert {state["state"] for state in found.values()} == {"finished"}
    assert all(f"{state['loss']:.4f}" in out for state in found.values())

    monkeypatch.setattr(local.Driver, "_start", lambda *_: pytest.fail("a finished run was started again"))
    assert door("run", "--workers", "2")[0] == 0

    code, out, _ = door("collect")
    assert code == 0 and "4 of 4 planned runs, 0 others" in out
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/results.jsonl").read_text().splitlines()]
    assert {row["run_id"] for row in rows} == {state["run_id"] for state in found.values()}
    import pandas

    table = pandas.read_parquet(tmp_path / "runs/tiny/results.parquet")
    assert sorted(table["val_loss"]) == sorted(row["val_loss"] for row in rows)
    assert len(status.rows(tmp_path / "runs/tiny")) == 4
    assert "finished runs" in door("plan")[1]  # priced by what they reached


def test_compiled_runs_find_the_compiler_imported():
    for value, expected in ((True, True), (False, False), ("auto", False)):
        runs = [SimpleNamespace(config={"compute.compile": way}) for way in (False, value)]
        assert ("torch._inductor.compile_fx" in local.Driver(runs, [{}])._starter._modules) is expected


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="warm processes need Linux")
def test_runs_of_a_warm_parent_are_those_of_new_interpreters_in_every_bit(door, tmp_path, monkeypatch):
    """Weights, metrics and rows are equal, but for times, memory and places."""
    of_a_start = {"wall_seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "overrides", "runs_dir"}
    started = []
    for kind in (local.Starter, local.SerialStarter):
        monkeypatch.setattr(kind, "start", remembering(started, kind.start))
    monkeypatch.setattr(local, "_shares_process", lambda run, slot: "CUDA_VISIBLE_DEVICES" in slot)
    found = []
    for words in (["--workers=2"], ["--workers=2", "--fresh"], ["--gpus=0"]):
        folder = tmp_path / f"runs{len(found)}"
        assert door("run", *words, f"runs_dir={folder}")[0] == 0
        rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/result.json"))]
        steps = [
            [{key: value for key, value in line.items() if key not in of_a_start} for line in metrics(path)]
            for path in sorted(folder.glob("*/*"))
            if path.is_dir()
        ]
        hashes = {path.parent.parent.parent.name: sha256_of(path) for path in folder.rglob("model.pt")}
        found.append(([{k: v for k, v in row.items() if k not in of_a_start} for row in rows], steps, hashes))
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 4
    kinds = (local.WarmProcess, subprocess.Popen, local.SerialRun)
    assert [type(process) for process in started] == [kind for kind in kinds for _ in range(4)]
    assert len({run._worker for run in started[-4:]}) == 1  # the shapes alternate


def remembering(started, start):
    def remember(*given, **named):
        started.append(start(*given, **named))
        return started[-1]

    return remember


SHARING = """
import sys
from scaling_testbed import sweep
from scaling_testbed.sweeps import local
local._shares_process = lambda run, slot: True
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_for_several_runs_costs_one_run_when_it_is_killed_and_saves_it_at_a_signal(
    door, states, tmp_path, data_dir
):
    places = [f"sweep={tmp_path / 'tiny.yaml'}", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    long = ("budget.steps=1000", "logging.every_steps=1", "model=bigram")

    def sweep(*words):
        """The process of a sweep of two runs, and the state of the one that is at work."""
        command = [REAL_PYTHON, "-c", SHARING, "run", *places, *words, "--gpus", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        at_work = lambda: [one for one in states(*words).values() if one["state"] == "running" and one["step"] > 5]  # noqa: E731
        return process, until(at_work)[0]

    process, run = sweep(*long)
    os.kill(int(re.search(r"pid (\d+)", run["owner"])[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1 and "killed by signal 9" in err
    assert sorted(state["state"] for state in states(*long).values()) == ["finished", "stopped"]

    process, run = sweep(*long, "seed=1")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 75 and "stopped by SIGTERM" in err
    assert list(Path(run["folder"]).glob("checkpoints/step-*"))


# Runs of a warm parent, and runs in new interpreters.
BOTH_WAYS = pytest.mark.parametrize(
    "fresh", [pytest.param((), id="warm"), pytest.param(("--fresh",), id="fresh", marks=pytest.mark.slow)]
)


@BOTH_WAYS
@pytest.mark.fault("31", "One failing run is named, the others finish, and retry runs it alone.")
def test_a_failure_is_named_does_not_stop_the_others_and_is_tried_again_only_when_asked(door, states, tmp_path, fresh):
    planned = json.loads(door("plan", "--json")[1])
    folder = Path(planned[0]["folder"])
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)  # damaged: the run refuses to start
    code, out, err = door("run", *fresh)
    assert code == 1
    assert "model=bigram optimizer.lr=1e-3" in err and "damaged" in err and "log.txt" in err
    assert states()["bigram 1e-3"]["state"] == "failed"
    assert "3 finished" in out

    printed = (folder / "log.txt").read_text()
    code, out, err = door("run", *fresh)
    assert code == 1 and "`sweep retry`" in err
    assert (folder / "log.txt").read_text() == printed  # it was not started
    (folder / "checkpoints" / "step-00000002").rmdir()
    assert door("retry", *fresh)[0] == 0
    assert {state["state"] for state in states().values()} == {"finished"}


def test_a_dry_run_starts_nothing(door, tmp_path, monkeypatch):
    monkeypatch.setattr(local.Driver, "_start", lambda *_: pytest.fail("a dry run started a run"))
    for verb in ("run", "retry"):
        code, out, _ = door(verb, "--dry-run")
        assert code == 0 and "4 pending; 4 to start" in out
    assert not (tmp_path / "runs").exists()


def test_the_data_of_runs_are_looked_at_once_and_again_where_they_seem_to_have_changed(
    door, untrained, monkeypatch, tmp_path
):
    composed, compose = [], status.compose_many
    monkeypatch.setattr(status, "compose_many", lambda *what, **how: composed.append(what) or compose(*what, **how))
    assert door("run")[0] == 0
    assert len(composed) == 2  # while it runs, and at its end
    run = remembered(tmp_path / "runs" / "tiny")[0]
    driver = local.Driver([run], [{}])
    driver._comparison = SimpleNamespace(of=lambda *_: Found(changed="was trained on other data"))
    assert driver._read(run).state == "finished"


def test_gpus_that_are_not_there_are_no_cpu(door, tmp_path, data_dir, capfd):
    text = (tmp_path / "tiny.yaml").read_text().replace(", compute.device=cpu", "")
    (tmp_path / "tiny.yaml").write_text(text)
    code, _, err = door("run", "--gpus", "99", "model=bigram", "optimizer.lr=1e-3")
    assert code == 1 and "compute.device=cuda, but PyTorch sees no GPU here" in err
    for none, said in (("", "the argument after --gpus is blank"), (",", "--gpus names no GPU")):
        code, _, err = door("run", "--gpus", none)
        assert code == 2 and said in err


@pytest.fixture
def standing_in(monkeypatch):
    """Commands that run in place of the sweep's runs, one after the other; what was started is kept."""
    started = []

    def stand_in(*commands):
        def start(*_):
            started.append(subprocess.Popen(commands[len(started) % len(commands)]))
            return started[-1]

        monkeypatch.setattr(local.Starter, "start", start)
        return started

    yield stand_in
    for process in started:
        process.kill()


def test_a_folder_that_cannot_be_had_stops_no_other_run(door, tmp_path, standing_in):
    planned = json.loads(door("plan", "--json")[1])
    Path(planned[3]["folder"]).parent.mkdir(parents=True)
    Path(planned[3]["folder"]).write_text("")  # of the largest model, so that it would be the first
    started = standing_in(["true"])
    code, _, err = door("run")
    assert code == 1 and len(started) == 3
    assert f"cannot write {planned[3]['folder']}: File exists; set runs_dir=" in err


def test_a_process_that_cannot_be_started_is_not_told_as_a_folder(door, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    code, _, err = door("run", "model=bigram", "optimizer.lr=1e-3")
    assert code == 1 and ": cannot start /no/python: No such file or directory (" in err


def test_an_error_of_the_driver_leaves_no_run_without_it(door, standing_in, monkeypatch):
    started = standing_in(["sleep", "60"], ["true"])
    monkeypatch.setattr(local.Driver, "_ended", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        door("run", "--workers", "2")
    assert len(started) == 2 and started[0].wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("ignored", [True, False])
def test_what_protects_a_driver_from_a_signal_goes_on_protecting_it(door, standing_in, ignored):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        started = standing_in(["sh", "-c", f"kill -HUP {os.getpid()}; sleep 0.1"])
        code, _, err = door("run")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (code, len(started)) == ((1, 4) if ignored else (75, 1)), err


def driver(python, tmp_path, data_dir, *arguments):
    places = [f"sweep={tmp_path / 'tiny.yaml'}", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    command = [python, "-m", "scaling_testbed.sweep", "run", *places, *arguments]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  ignored where the tests run with &
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@BOTH_WAYS
@pytest.mark.fault("32", "Runs go on when their driver is killed, and the next driver adopts them.")
def test_a_signal_saves_every_run_and_the_next_call_goes_on(door, states, python, tmp_path, data_dir, fresh):
    """The first driver and its runs are real processes."""
    long = ("budget.steps=1500", "logging.every_steps=1", "model=bigram")
    process = driver(REAL_PYTHON, tmp_path, data_dir, "--workers", "2", *fresh, *long)
    until(lambda: sum(state["step"] > 5 for state in states(*long).values()) == 2)
    assert {state["state"] for state in states(*long).values()} == {"running"}
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGINT" in err
    stopped = states(*long)
    assert {state["state"] for state in stopped.values()} == {"stopped"}
    assert all(list(Path(state["folder"]).glob("checkpoints/step-*")) for state in stopped.values())

    # A run that was stopped is resumed, not started again.
    process = driver(python, tmp_path, data_dir, "--workers", "2", *fresh, *long)
    until(lambda: sum(state["state"] == "running" for state in states(*long).values()) == 2)
    process.kill()  # the driver alone: its runs go on, and the next driver waits for them
    process.communicate()
    owners = [state["owner"] for state in states(*long).values() if state["state"] == "running"]
    assert owners
    code, _, err = door("run", "--workers", "2", *fresh, *long)
    assert code == 0 and f"is being run by {owners[0]}; waiting for it" in err
    for state in states(*long).values():
        row = json.loads((Path(state["folder"]) / "result.json").read_text())
        steps = [
            json.loads(line)["step"] for line in (Path(state["folder"]) / "metrics.jsonl").read_text().splitlines()
        ]
        assert (row["status"], row["restarts"]) == ("finished", 1)
        assert "is being run by" not in (Path(state["folder"]) / "log.txt").read_text()  # waited for, not tried
        assert steps == sorted(set(steps)) and steps[-1] == 1500


def test_a_run_that_fails_in_another_process_counts_as_failed(door, monkeypatch, tmp_path):
    """The owner is seen once; when it is gone the folder says that its run failed."""
    (planned, *_) = json.loads(door("plan", "--json", "model=bigram")[1])
    seen = []

    def owner(path):
        if str(path.parent) != planned["folder"] or seen:
            return None
        seen.append(path)
        path.parent.mkdir(parents=True)
        row = {"status": "failed", "run_id": path.parent.name, "error": "no luck"}
        (path.parent / "result.json").write_text(json.dumps(row))
        return Owner("another-machine", 7)

    monkeypatch.setattr(local, "owner_of", owner)
    code, out, err = door("run", "model=bigram")
    assert code == 1 and "being run by another-machine pid 7" in err and "no luck" in err and "1 finished" in out


def test_a_run_of_another_process_is_looked_at_seldom(door, untrained, monkeypatch):
    seen = []

    def owner(_):
        seen.append(time.monotonic())
        return Owner("another-machine", 7) if seen[-1] < seen[0] + 0.5 else None

    monkeypatch.setattr(local, "OWNER_SECONDS", 0.2)
    monkeypatch.setattr(local, "owner_of", owner)
    code, _, err = door("run", "model=bigram", "optimizer.lr=1e-3")
    assert code == 0 and 3 <= len(seen) <= 4 and err.count("waiting for it") == 1


def test_the_longest_run_starts_first(door, tmp_path, monkeypatch):
    order = []

    def start(self, run, slot):
        order.append(run)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(local.Driver, "_start", start)
    assert door("run")[0] == 1  # nothing was trained
    assert [run.flops for run in order] == sorted((run.flops for run in order), reverse=True)
    assert len({run.flops for run in order}) == 2


def test_places_for_runs_by_workers_or_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert slots(None, [], 1) == [{}]
    assert slots(4, [], 1) == [{"OMP_NUM_THREADS": "2"}] * 4
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(None, ["0", "3"], 2)] == ["0", "3", "0", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--workers", "0"), "--workers must be a number greater than zero"),
        (("run", "--workers", "2", "--gpus", "0"), "not both"),
        (("run", "--runs-per-gpu", "2"), "needs --gpus"),
        (("plan", "--workers", "2"), "plan: there is no option --workers"),
        (("plan", "--dry-run"), "plan: there is no option --dry-run"),
        (("run", "launcher.partition=x"), "this command does not take launcher.partition=x; plan, submit and retry do"),
        (("run", "optimizer.lrr=1"), "did you mean optimizer.lr"),
        (("jump",), "there is no command 'jump'; it is one of plan, run, submit"),
        (("plan", "budget"), "write key=value"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(door, tmp_path, arguments, message):
    code, _, err = door(*arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
