"""Processes that run one command after another, for runs on a GPU.

A small run on a GPU takes less time than to import PyTorch and to make a CUDA context, and CUDA does not survive a
fork. So a worker process does what `python -m MODULE ARGUMENTS` does for one request after another, and keeps both, and
what torch.compile has compiled for runs of the same shape.

Nothing else may be left of a run. A worker that has ended a run with a status other than 0, as after an error of CUDA,
ends with this status, and the next run gets a new worker. A crash thus costs its run alone.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from scaling_testbed.processes.warm import LONGEST_MESSAGE, code_now
from scaling_testbed.progress import release_streams


class SerialRun:
    """A run in a worker, with what is used here of subprocess.Popen."""

    def __init__(self, worker: "Worker"):
        self.returncode: int | None = None
        self._worker = worker

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal that killed the worker; None while it runs."""
        if self.returncode is None:
            self.returncode = self._worker.status()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the run has ended. A handler of signals may call it at any moment."""
        if self.returncode is None:
            self._worker.send_signal(number)


class Worker:
    """A worker process, started in a session of its own. place, kind, code: see SerialStarter."""

    def __init__(self, place: Mapping[str, str], kind: str, code: Mapping[str, int], log: IO[Any]):
        self.place, self.kind, self.code = place, kind, code
        self.busy = False
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | place,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def usable(self) -> bool:
        """Whether the worker waits for a request."""
        return not self.busy and self._process.poll() is None

    def start(self, request: Mapping[str, Any], log: IO[Any]) -> SerialRun:
        """Start a run. Raises OSError if the worker is gone."""
        socket.send_fds(self._connection, [json.dumps(request).encode()], [log.fileno()])
        self.busy = True
        return SerialRun(self)

    def status(self) -> int | None:
        """0 if the run has ended with it, the exit status of the worker if it has ended, else None."""
        ended = self._process.poll()
        with contextlib.suppress(ConnectionError):  # the worker has ended before it has read its request
            if select.select([self._connection], [], [], 0)[0] and self._connection.recv(1):
                self.busy = False
                return 0
        return ended

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        """Let the worker end, after its run if it has one."""
        self._connection.close()
        if not self.busy:
            self._process.wait()


class SerialStarter:
    """Starts runs in workers, each in an idle one of its place and kind, else in a new one."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: IO[Any],
        *,
        place: Mapping[str, str],
        kind: str,
        shape: str,
    ) -> SerialRun:
        """Start `python -m arguments[0] arguments[1:]` with its output in `log`.

        environment: changes to the environment for this run. place: those for the whole worker, such as the GPU. kind:
        whatever must be the same for all runs of a process. shape: compiled code is kept while this stays the same.
        Raises OSError.
        """
        code, request = code_now(), {"arguments": list(arguments), "environment": dict(environment), "shape": shape}
        for worker in [one for one in self._workers if one.place == place and not one.busy]:
            if worker.usable and (worker.kind, worker.code) == (kind, code):
                with contextlib.suppress(OSError):  # it has just ended
                    return worker.start(request, log)
            self._workers.remove(worker)  # its memory on the GPU is needed
            worker.close()
        self._workers = [one for one in self._workers if one._process.poll() is None]
        self._workers.append(Worker(place, kind, code, log))
        return self._workers[-1].start(request, log)

    def close(self) -> None:
        """Let the workers end. Their runs continue."""
        while self._workers:
            self._workers.pop().close()


def _run(request: Mapping[str, Any], log: int) -> int:
    """Do what a new process does with the arguments of the request, with its output in `log`. Returns its status."""
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ.update(request["environment"])
    sys.argv = list(request["arguments"])
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        release_streams()
    return 0


def _forget() -> None:
    """Free what a run held, so that others can use the memory while this process waits."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()  # of each stream that the run has used
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _forget_compiled() -> None:
    """Free what was compiled. Dynamo compiles a function for few shapes, and then no more."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def main() -> None:
    """`python -m scaling_testbed.processes.serial SOCKET`: a worker."""
    connection, own = socket.socket(fileno=int(sys.argv[1])), dict(os.environ)
    connection.set_inheritable(False)
    shape = None
    while True:
        data, logs, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 1)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if shape not in (None, request["shape"]):
            _forget_compiled()
        shape = request["shape"]
        if status := _run(request, logs[0]):
            os._exit(status)
        _forget()  # before the answer: an error of CUDA that shows only here belongs to this run
        os.environ.clear()
        os.environ.update(own)
        try:
            connection.send(b"0")
        except OSError:  # nobody listens any more
            os._exit(0)


if __name__ == "__main__":
    main()
