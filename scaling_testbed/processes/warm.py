"""Processes that start warm: forks of one parent process that has imported PyTorch.

A new interpreter needs 3 seconds to import what a run needs, as long as a small run trains. `WarmParent` starts
`python -m scaling_testbed.processes.warm`, which imports some modules and nothing else. It then forks a child for each
request, and the child does what `python -m MODULE ARGUMENTS` does. Only on Linux, and only without a GPU: CUDA in a
fork of a process that has looked for GPUs has not been tried.

The parent is asked through a socket. When the process that asks is gone, the parent ends, and its children continue.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from scaling_testbed.processes.interpreter import importing_torch

LONGEST_MESSAGE = 2**20  # bytes of a request
STATUS_LOST = 1  # of a child whose parent was killed, so that nobody knows how it ended


class WarmParentLost(Exception):
    """The warm parent is gone, or could not import its modules."""


class WarmProcess:
    """A child of a warm parent, with what is used here of subprocess.Popen."""

    def __init__(self, parent: "WarmParent", pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent
        self._fd: int | None = None
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self._fd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal that killed it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.status_of(self.pid)
            if self.returncode is None and self._parent.lost and self._has_ended():
                self.returncode = STATUS_LOST
            if self.returncode is not None and self._fd is not None:
                os.close(self._fd)
                self._fd = None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended. A handler of signals may call it at any moment."""
        if self._fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def _has_ended(self) -> bool:
        return self._fd is None or bool(select.select([self._fd], [], [], 0)[0])


class WarmParent:
    """A parent process that imports `modules`, and starts processes.

    modules: their names; with MODULE:FUNCTION the function is called too, without arguments. environment: changes to
    the environment of this process. What is read while modules are imported must stand in it.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]):
        self.lost = False
        self._statuses: dict[int, int] = {}
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), *modules]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what fails here fails again in a process of its own, and is seen there
                env=os.environ | environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: IO[Any]) -> WarmProcess:
        """Start `python -m arguments[0] arguments[1:]` in a session of its own, with its output in `log`.

        environment: changes to the environment. The first call waits until the parent has imported its modules. Raises
        WarmParentLost.
        """
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        try:
            socket.send_fds(self._connection, [request], [log.fileno()])
            while (message := self._receive()) is not None:
                if "status" not in message:
                    return WarmProcess(self, message["pid"])
        except OSError:
            self.lost = True
        raise WarmParentLost

    def status_of(self, pid: int) -> int | None:
        """The exit status of a child, or None while it runs or if the parent is lost."""
        while not self.lost and select.select([self._connection], [], [], 0)[0]:
            self._receive()
        return self._statuses.pop(pid, None)

    def close(self) -> None:
        """Let the parent end. Its children continue."""
        self.lost = True
        self._connection.close()
        self._process.wait()

    def _receive(self) -> dict[str, int] | None:
        """The next message of the parent; None, and `lost` is true, if it is gone."""
        try:
            data = self._connection.recv(LONGEST_MESSAGE)
        except OSError:
            data = b""
        if not data:
            self.lost = True
            return None
        message: dict[str, int] = json.loads(data)
        if "status" in message:
            self._statuses[message["pid"]] = message["status"]
        return message


class Starter:
    """Starts processes of `python -m`: warm ones where this is possible, else new interpreters.

    modules: what most of the processes import, as in WarmParent. environment: changes that all of them need, and that
    are read while modules are imported. warm: False for new interpreters only.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], *, warm: bool = True):
        self._modules, self._environment = modules, environment
        self._warm = warm and _is_possible()
        self._parents: list[WarmParent] = []  # the last one starts processes; of earlier ones some may still run
        self._code: dict[str, int] = {}

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: IO[Any]
    ) -> "subprocess.Popen[bytes] | WarmProcess":
        """Start `python -m arguments[0] arguments[1:]` in a session of its own, with its output in `log`. Raises
        OSError."""
        if self._warm:
            try:
                return self._renewed().start(arguments, environment, log)
            except WarmParentLost:
                self._warm = False
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )

    def _renewed(self) -> WarmParent:
        """The parent, with the modules that are on the disk: a process records the sources that are there now."""
        code = code_now()
        if not self._parents or code != self._code:
            self._parents.append(WarmParent(self._modules, self._environment))
            self._code = code
        return self._parents[-1]

    def close(self) -> None:
        """Let the warm parents end. Their processes continue."""
        while self._parents:
            self._parents.pop().close()


def _is_possible() -> bool:
    """Whether this system has process file descriptors: Linux from 5.3, where a container does not forbid them."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def code_now() -> dict[str, int]:
    """When each source of this package, and the folders of installed packages, were last changed."""
    package = Path(__file__).resolve().parent.parent
    found: dict[str, int] = {}
    for path in [*package.rglob("*.py"), *(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))]:
        with contextlib.suppress(OSError):  # an editor replaces it just now
            found[str(path)] = path.stat().st_mtime_ns
    return found


def _serve(connection: socket.socket) -> tuple[dict[str, Any], int]:
    """Fork a child for each request, and tell how each ends. Returns the request and the log in the children only."""
    children: dict[int, int] = {}  # file descriptor -> process id
    while True:
        waits: list[Any] = [connection, *children]
        for ready in select.select(waits, [], [])[0]:
            if ready is not connection:
                pid = children.pop(ready)
                os.close(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _tell(connection, {"pid": pid, "status": status})
                continue
            data, logs, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 1)
            if not data:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                for other in children:
                    os.close(other)
                connection.close()
                return json.loads(data), logs[0]
            os.close(logs[0])
            children[os.pidfd_open(pid)] = pid
            _tell(connection, {"pid": pid})


def _tell(connection: socket.socket, message: dict[str, int]) -> None:
    try:
        connection.send(json.dumps(message).encode())
    except OSError:  # nobody listens any more
        os._exit(0)


def _become(request: Mapping[str, Any], log: int) -> None:
    """Do what a new process does: `python -m` with the arguments of the request, and its output in `log`."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ.update(request["environment"])
    sys.argv = list(request["arguments"])
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def main() -> None:
    """`python -m scaling_testbed.processes.warm SOCKET MODULE ...`: the warm parent."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with importing_torch():
        for name in sys.argv[2:]:
            module, _, function = name.partition(":")
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
    gc.freeze()  # a collection in a child would copy the memory that it shares with this process
    atexit.register(gc.unfreeze)  # else extensions of C report their objects as leaked
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import has started a thread, which a fork would lack")
    if "torch" in sys.modules and sys.modules["torch"].cuda.device_count():
        sys.exit("runs on a GPU as forks have not been tried")
    _become(*_serve(connection))


if __name__ == "__main__":
    main()
