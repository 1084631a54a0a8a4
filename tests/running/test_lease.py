"""A run folder has one owner at a time, and a dead one's folder can be had again."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from scaling_testbed.running import lease
from scaling_testbed.running.lease import AlreadyRunning, Lease, owner_of
from scaling_testbed.running.records import RunFolder

ELSEWHERE = {"host": "another-machine", "pid": 4321, "job": "77_3"}


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


def test_a_killed_owner_loses_the_folder_at_once(tmp_path):
    hold = (
        f"import time; from pathlib import Path; from scaling_testbed.running.lease import Lease\n"
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


def test_an_owner_on_another_machine_keeps_the_folder_while_it_gives_signs_of_life(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(ELSEWHERE))
    assert str(owner_of(lock)) == "another-machine pid 4321 (job 77_3)"
    with pytest.raises(AlreadyRunning, match="another-machine pid 4321"), Lease(lock):
        pass
    assert json.loads(lock.read_text()) == ELSEWHERE  # the refused starter left it alone
    long_ago = time.time() - lease.STALE_SECONDS - 5
    os.utime(lock, (long_ago, long_ago))
    assert owner_of(lock) is None
    with Lease(lock):
        assert owner_of(lock).host == socket.gethostname()


def test_a_process_id_used_again_by_a_later_process_is_no_owner(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None}))
    assert owner_of(lock) is not None
    long_ago = time.time() - lease.STALE_SECONDS - 5
    os.utime(lock, (long_ago, long_ago))
    assert owner_of(lock) is None


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with Lease(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "lock").stat().st_mtime > 1
    assert list(tmp_path.glob(".lock.*")) == []
