"""Processes that a warm parent forks are like new interpreters, and outlive it and the process that asked for them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_testbed.processes import warm
from scaling_testbed.processes.warm import STATUS_LOST, Starter, WarmParent, WarmParentLost, WarmProcess

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="warm processes need Linux")
CHILD = """
import json, os, signal, sys, time
def get_ready():
    os.environ["READY"] = "yes"
if __name__ == "__main__":
    what = sys.argv[1]
    if what == "say":
        own_session = os.getsid(0) == os.getpid()
        added, ready = os.environ.get("ADDED"), os.environ.get("READY")
        print(json.dumps([sys.argv[1:], added, ready, own_session, sys.stdin.read()]))
    if what == "wait":
        print("waits", flush=True)
        time.sleep(60)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("a defect")
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def parent(tmp_path, monkeypatch):
    """A warm parent whose processes can run the module `child`."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parent = WarmParent(["json", "child:get_ready"], {})
    yield parent
    parent.close()


@pytest.fixture
def log(tmp_path):
    with open(tmp_path / "log.txt", "a") as file:
        yield file


def ended(process, seconds=30):
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process.returncode


def until_it_waits(log):
    deadline = time.monotonic() + 30
    while "waits" not in Path(log.name).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_has_its_arguments_environment_session_output_and_status(parent, log):
    processes = [parent.start(["child", "say", str(status)], {"ADDED": str(status)}, log) for status in (0, 3)]
    assert [ended(process) for process in processes] == [0, 3]
    said = sorted(Path(log.name).read_text().splitlines())
    assert said == ['[["say", "0"], "0", "yes", true, ""]', '[["say", "3"], "3", "yes", true, ""]']
    assert "ADDED" not in os.environ


def test_a_process_that_is_killed_or_has_a_defect_ends_alone(parent, log):
    waits = parent.start(["child", "wait", "0"], {}, log)
    assert ended(parent.start(["child", "kill", "0"], {}, log)) == -signal.SIGKILL
    assert ended(parent.start(["child", "raise", "0"], {}, log)) == 1
    assert Path(log.name).read_text().endswith("ValueError: a defect\n")
    assert waits.poll() is None
    waits.send_signal(signal.SIGTERM)
    assert ended(waits) == -signal.SIGTERM
    waits.send_signal(signal.SIGTERM)  # nobody is there any more
    assert parent.start(["child", "say", "0"], {}, log).pid != waits.pid


def test_processes_outlive_their_parent(parent, log):
    waits = parent.start(["child", "wait", "0"], {}, log)
    until_it_waits(log)
    parent._process.kill()
    with pytest.raises(WarmParentLost):
        parent.start(["child", "say", "0"], {}, log)
    assert waits.poll() is None
    waits.send_signal(signal.SIGTERM)
    assert ended(waits) == STATUS_LOST


def test_processes_outlive_the_one_that_asked_for_them(tmp_path, parent, log):
    """As a driver of a sweep that is killed."""
    asks = "from scaling_testbed.processes.warm import WarmParent; import os, sys; parent = WarmParent(['json'], {});"
    asks += "process = parent.start(['child', 'wait', '0'], {}, open(sys.argv[1], 'a'));"
    asks += "print(process.pid, parent._process.pid, flush=True); os.kill(os.getpid(), 9)"
    code = f"import sys; sys.path.insert(0, {os.getcwd()!r}); {asks}"
    said = subprocess.run([sys.executable, "-c", code, log.name], capture_output=True, text=True, timeout=60).stdout
    pid, its_parent = map(int, said.split())
    until_it_waits(log)
    deadline = time.monotonic() + 30
    while exists(its_parent):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert exists(pid)
    os.kill(pid, signal.SIGKILL)


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_starter_makes_a_new_parent_when_the_code_has_changed_and_new_interpreters_when_it_is_lost(
    parent, log, monkeypatch
):
    starter = Starter(["json"], {})
    monkeypatch.setattr(warm, "code_now", lambda: {"a.py": 1})
    first = starter.start(["child", "say", "0"], {}, log)
    second = starter.start(["child", "say", "0"], {}, log)
    assert first._parent is second._parent and ended(first) == ended(second) == 0
    stays = starter.start(["child", "wait", "0"], {}, log)
    monkeypatch.setattr(warm, "code_now", lambda: {"a.py": 2})
    third = starter.start(["child", "wait", "0"], {}, log)
    assert third._parent is not first._parent
    stays.send_signal(signal.SIGTERM)
    assert ended(stays) == -signal.SIGTERM  # its parent is there still
    starter._parents[-1]._process.kill()
    starter._parents[-1]._process.wait()
    fourth = starter.start(["child", "say", "0"], {}, log)
    assert isinstance(third, WarmProcess) and isinstance(fourth, subprocess.Popen) and fourth.wait() == 0
    third.send_signal(signal.SIGKILL)
    assert ended(third) == STATUS_LOST
    starter.close()


@pytest.mark.parametrize("why", ["a GPU", "a thread"])
def test_where_a_fork_is_not_known_to_work_there_are_new_interpreters(parent, tmp_path, log, why):
    torch = "class cuda:\n    device_count = staticmethod(lambda: 1)\n"
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=[9], daemon=True).start()\n"
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "threads.py").write_text(thread)
    starter = Starter(["torch" if why == "a GPU" else "threads"], {})
    process = starter.start(["child", "say", "0"], {}, log)
    assert isinstance(process, subprocess.Popen) and process.wait() == 0


def test_a_module_that_cannot_be_imported_is_left_to_new_interpreters(parent, log):
    starter = Starter(["no_such_module"], {})
    assert isinstance(starter.start(["child", "say", "0"], {}, log), subprocess.Popen)


def test_the_code_is_that_of_the_package_and_of_the_folders_of_packages(tmp_path):
    now = warm.code_now()
    assert any(path.endswith("training/step.py") for path in now) and any("packages" in path for path in now)
