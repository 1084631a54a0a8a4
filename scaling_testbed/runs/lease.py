"""One owner of a run folder at a time, on one machine or on several that share a file system.

The file `lock` names host, process and job of the owner. Among the processes of one machine its flock decides who owns
the folder; the flock is released when its holder ends, in any way. Not every file system passes a flock to other
machines. So the owner also updates the modification time of the file every BEAT_SECONDS, and another machine takes over
after STALE_SECONDS without an update. If a flock does not reach other machines, or does not exist, as on Lustre without
its option, two processes that start at the same instant can both get a free folder. An owner that was silent and
returns, or that lost this race, finds the name of the other in the file before it writes anything (`check`).
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from scaling_testbed.errors import STOPPED, UserError
from scaling_testbed.files import read_json

BEAT_SECONDS, STALE_SECONDS = 10, 60
CLOCK_SECONDS = 3600  # the clocks of two machines differ by less


class AlreadyRunning(UserError):
    """Another process owns this run's folder. Exit status 75."""

    exit_status = STOPPED


@dataclass(frozen=True)
class Owner:
    """The owner of a run folder: host, process id, and the Slurm job (`array_task` for a task of an array) or None."""

    host: str
    pid: int
    job: str | None = None

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}" + (f" (job {self.job})" if self.job else "")


def this_process() -> Owner:
    """This process as an owner."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return Owner(socket.gethostname(), os.getpid(), job)


class Lease:
    """Context manager that holds the lock file `path`. Raises AlreadyRunning, which names the owner, if it is taken."""

    def __init__(self, path: Path):
        self.path = path
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._file = open(self.path, "a+")
        taken: Owner | str | None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = _alive_elsewhere(self.path)
        except BlockingIOError:
            taken = _read(self.path) or "another process"
        except OSError:  # this file system has no flock
            taken = owner_of(self.path)
        if taken:
            self._file.close()
            raise AlreadyRunning(f"{self.path.parent} is being run by {taken}; wait for it or end it")
        self._owner = this_process()
        try:
            self._file.truncate(0)
            os.write(self._file.fileno(), json.dumps(asdict(self._owner)).encode())
        except OSError:
            self._file.close()
            raise
        self._stop.clear()
        self._beat = threading.Thread(target=self._renew, daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._beat.join()
        with contextlib.suppress(OSError):  # a disk that has become read-only; the flock ends with the file
            if self._other() is None:
                self._file.truncate(0)
        self._file.close()

    def check(self) -> None:
        """Raise AlreadyRunning if another process has taken over. Must be called before anything is written."""
        if other := self._other():
            raise AlreadyRunning(f"{self.path.parent} was taken over by {other} while this process was silent")

    def _other(self) -> Owner | None:
        owner = _read(self.path)
        return owner if owner != self._owner else None

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file server may not answer for a moment
                if self._other() is None:
                    os.utime(self.path)


def owner_of(path: Path) -> Owner | None:
    """The process that holds the lock file `path` now, as far as the file and this machine show it, or None."""
    owner = _read(path)
    if owner is None:
        return None
    if owner.host != socket.gethostname():
        return _alive_elsewhere(path)
    held = _is_locked(path)
    if held is not None:  # also by a process that is suspended, or that has another number here, as in a container
        return owner if held else None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return owner if _gives_signs(path) else None  # else the process id belongs to a later process


def _is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the flock of `path`; None if this file system has no flock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _alive_elsewhere(path: Path) -> Owner | None:
    """The owner, if it is on another machine and gives signs of life; else None."""
    owner = _read(path)
    elsewhere = owner is not None and owner.host != socket.gethostname()
    return owner if elsewhere and _gives_signs(path) else None


def _gives_signs(path: Path) -> bool:
    """Whether the lock file was updated in the last STALE_SECONDS. A time far in the future is none: the clock was set
    back since then, and an owner that lives would have updated it."""
    return -CLOCK_SECONDS < _seconds_silent(path) < STALE_SECONDS


def _read(path: Path) -> Owner | None:
    with contextlib.suppress(UserError, TypeError):
        owner = Owner(**read_json(path))
        known = isinstance(owner.host, str) and type(owner.pid) is int and 0 < owner.pid < 2**31
        return owner if known and isinstance(owner.job, (str, type(None))) else None
    return None


def _seconds_silent(path: Path) -> float:
    """Seconds since the lock file was updated. Clocks differ, so this uses the clock of the file server, or that of
    this machine if the process may not write in the folder."""
    probe = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:
        now = time.time()
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0  # unknown: it is safer to wait than to write beside a running owner
