"""Runs that share a process are like new interpreters one after another, and a crash costs one run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_testbed.processes import serial
from scaling_testbed.processes.serial import SerialStarter
from tests.processes.test_warm import ended

CHILD = """
import json, os, signal, sys, time
print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("ADDED"), os.environ.get("LEFT"), __name__]), flush=True)
os.environ["LEFT"] = "behind"
print("to stderr", file=sys.stderr)
if sys.argv[1] == "hold":
    class Held:
        def __del__(self):
            print("freed", flush=True)
    held = Held()
    held.itself = held
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "abort":
    os.abort()
if sys.argv[1] == "raise":
    raise ValueError("a defect")
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns a function that starts `child`: (process, a function to the lines of its log)."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    starter, numbers = SerialStarter(), iter(range(99))

    def begin(what="say", code="0", *, place="0", kind="a", environment=None):
        path = tmp_path / f"{next(numbers)}.txt"
        with open(path, "a") as log:
            run = starter.start(
                ["child", what, code], environment or {}, log, place={"PLACE": place}, kind=kind, shape="one"
            )
        return run, lambda: path.read_text().splitlines()

    yield begin
    starter.close()


def pid_of(lines):
    deadline = time.monotonic() + 30
    while not lines():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(lines()[0])[0]


def test_runs_share_a_process_and_leave_nothing_to_each_other(start):
    first, said = start(environment={"ADDED": "1"})
    assert ended(first) == 0
    second, said_then = start("say", "0")
    assert ended(second) == 0
    pid = pid_of(said)
    assert said() == [json.dumps([pid, ["say", "0"], "1", None, "__main__"]), "to stderr"]
    assert said_then() == [json.dumps([pid, ["say", "0"], None, None, "__main__"]), "to stderr"]


@pytest.mark.parametrize(
    ("what", "status"),
    [("kill", -signal.SIGKILL), ("abort", -signal.SIGABRT), ("raise", 1), ("say", 75), ("wait", -signal.SIGTERM)],
)
def test_a_run_that_does_not_end_well_ends_its_process_alone(start, what, status):
    before, said_before = start()
    assert ended(before) == 0
    run, said = start(what, "75")
    assert pid_of(said) == pid_of(said_before)
    if what == "wait":
        run.send_signal(signal.SIGTERM)
    assert ended(run) == status
    run.send_signal(signal.SIGTERM)  # nobody is there any more
    assert ("ValueError: a defect" in said()) == (what == "raise")
    after, said_after = start()
    assert ended(after) == before.poll() == 0 and pid_of(said_after) != pid_of(said)


def test_a_signal_before_a_worker_has_read_its_request_ends_the_run_alone(start):
    """As Ctrl-C just after a start: the request that nobody reads resets the connection."""
    run, _ = start("wait")
    run.send_signal(signal.SIGTERM)
    assert ended(run) == -signal.SIGTERM


def test_what_a_run_held_is_free_while_its_worker_waits(start):
    run, said = start("hold")
    assert ended(run) == 0 and said()[-1] == "freed"


@pytest.mark.parametrize("differs", ["place", "kind", "code"])
def test_other_runs_get_another_process(start, monkeypatch, differs):
    first, said = start()
    assert ended(first) == 0
    monkeypatch.setattr(serial, "code_now", lambda: {"a.py": len(differs)} if differs == "code" else CODE)
    second, said_then = start(**({} if differs == "code" else {differs: "other"}))
    assert ended(second) == 0 and pid_of(said) != pid_of(said_then)
    assert Path(f"/proc/{pid_of(said)}").exists() == (differs == "place")  # else it has made room


CODE = serial.code_now()


def test_a_run_outlives_the_one_that_asked_for_it(tmp_path, start):
    """As a driver of a sweep that is killed."""
    asks = "import os, sys; from scaling_testbed.processes.serial import SerialStarter; log = open(sys.argv[1], 'a');"
    asks += "SerialStarter().start(['child', 'wait', '0'], {}, log, place={}, kind='', shape='');"
    asks += "\nwhile not os.path.getsize(sys.argv[1]): pass\nos.kill(os.getpid(), 9)"
    path = tmp_path / "log.txt"
    subprocess.run([sys.executable, "-c", asks, path], timeout=60)
    pid = pid_of(lambda: path.read_text().splitlines())
    assert Path(f"/proc/{pid}").exists()
    os.kill(pid, signal.SIGKILL)
