"""A run folder has one owner at a time, and a dead one's folder can be had again."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_testbed.runs import lease
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.runs.lease import AlreadyRunning, Lease, owner_of

ELSEWHERE = {"host": "another-machine", "pid": 4321, "job": "77_3"}


@pytest.mark.fault("28", "A second process in the same folder is refused with its owner's name and the exit status 75.")
def test_a_second_starter_is_told_who_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    with RunFolder(tmp_path):
        assert str(owner_of(tmp_path / "lock")) == f"{socket.gethostname()} pid {os.getpid()} (job 12_5)"
        with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()} \(job 12_5\)"), RunFolder(tmp_path):
            pass
    assert owner_of(tmp_path / "lock") is None
    with RunFolder(tmp_path):  # given up, it can be had again
        pass


@pytest.mark.fault("29", "The folder of a dead owner can be taken at once, that of a silent machine after a lease.")
def test_a_killed_owner_loses_the_folder_at_once(tmp_path):
    hold = (
        f"import time; from pathlib import Path; from scaling_testbed.runs.lease import Lease\n"
        f"with Lease(Path({str(tmp_path / 'lock')!r})): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(AlreadyRunning, match=f"pid {process.pid}"), Lease(tmp_path / "lock"):
        pass
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == process.pid  # it could not clean up
    assert owner_of(tmp_path / "lock") is None
    with Lease(tmp_path / "lock"):
        assert owner_of(tmp_path / "lock").pid == os.getpid()


@pytest.mark.fault("29", "The folder of a dead owner can be taken at once, that of a silent machine after a lease.")
def test_an_owner_on_another_machine_keeps_the_folder_while_it_gives_signs_of_life(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(ELSEWHERE))
    assert str(owner_of(lock)) == "another-machine pid 4321 (job 77_3)"
    with pytest.raises(AlreadyRunning, match="another-machine pid 4321"), Lease(lock):
        pass
    assert json.loads(lock.read_text()) == ELSEWHERE  # the refused starter left it alone
    long_ago = time.time() - lease.STALE_SECONDS - 5
    tomorrow = time.time() + 86400  # before the clock of the file server was set back
    for when in (long_ago, tomorrow):
        lock.write_text(json.dumps(ELSEWHERE))
        os.utime(lock, (when, when))
        assert owner_of(lock) is None
        with Lease(lock):
            assert owner_of(lock).host == socket.gethostname()


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["known here", "of a container"])
def test_an_owner_that_is_suspended_keeps_the_folder(tmp_path, monkeypatch, pid):
    """Here it holds the flock and gives no sign of life. In a container it can have another number."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 3600)
    with Lease(tmp_path / "lock"):
        (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))
        os.utime(tmp_path / "lock", (1, 1))
        assert owner_of(tmp_path / "lock").pid == pid
        (tmp_path / "lock").write_text(json.dumps(vars(lease.this_process())))


def test_a_process_id_used_again_by_a_later_process_is_no_owner(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None}))
    assert owner_of(lock) is None  # nobody holds the flock
    monkeypatch.setattr(lease, "_is_locked", lambda _: None)  # where there is none
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None}))
    assert owner_of(lock) is not None
    long_ago = time.time() - lease.STALE_SECONDS - 5
    os.utime(lock, (long_ago, long_ago))
    assert owner_of(lock) is None


@pytest.mark.parametrize("text", ['{"host": 1, "pid": 2}', json.dumps(ELSEWHERE | {"pid": "x"}), "[1]", "\x00"])
def test_a_lock_that_names_nobody_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    assert owner_of(tmp_path / "lock") is None


def test_who_may_not_write_tells_the_living_from_the_dead_too(tmp_path, monkeypatch):
    """Root may write anything, so the file system is asked to refuse."""
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(ELSEWHERE))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert str(owner_of(lock)) == "another-machine pid 4321 (job 77_3)"
    long_ago = time.time() - lease.STALE_SECONDS - 5
    os.utime(lock, (long_ago, long_ago))
    assert owner_of(lock) is None


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_is_no_flock_name_and_signs_of_life_settle_who_owns(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(lease.fcntl, "flock", refuse)
    lock = tmp_path / "lock"
    with Lease(lock), pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"), Lease(lock):
        pass
    for text in ("", json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "job": None})):  # free, a dead one's
        lock.write_text(text)
        with Lease(lock):
            assert owner_of(lock).pid == os.getpid()
    lock.write_text(json.dumps(ELSEWHERE))
    with pytest.raises(AlreadyRunning, match="another-machine"), Lease(lock):
        pass


def test_an_owner_that_was_silent_finds_the_folder_taken_and_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    with RunFolder(tmp_path) as folder:
        folder.open_metrics(0)
        folder.write_metrics({"step": 0})
        (tmp_path / "lock").write_text(json.dumps(ELSEWHERE))
        os.utime(tmp_path / "lock", (1, 1))
        time.sleep(0.2)
        assert (tmp_path / "lock").stat().st_mtime == 1  # no sign of life for the other
        for write in (folder.write_metrics, folder.write_result):
            with pytest.raises(AlreadyRunning, match="taken over by another-machine pid 4321"):
                write({"step": 1})
    assert json.loads((tmp_path / "lock").read_text()) == ELSEWHERE
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with Lease(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "lock").stat().st_mtime > 1
    assert list(tmp_path.glob(".lock.*")) == []
