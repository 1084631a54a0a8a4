"""What `folder/python` of `warm_python` runs: `client.py FIXED.json ARGUMENTS`. It has to start quickly."""

import array
import contextlib
import json
import os
import signal
import socket
import struct
import sys

# The beginnings of variables that are read while Python starts or a module is imported. A fork would not see them.
READ_ONCE = (
    "PYTHON",
    "LD_",
    "LC_",
    "LANG",
    "MKL_",
    "OMP_",
    "OPENBLAS_",
    "TORCH_LOGS",
    "TRITON_INTERPRET",
    "TYPER",
    "_TYPER",
)
SET_IN_FORK = {"PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}  # the last is read when CUDA starts
SET_IN_FORK |= {"PYTHON_EXEC"}  # by torchrun, when it starts its ranks
PASSED_ON = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def read_once(environment):
    """The part of an environment that must be equal in a fork and in its parent."""
    return {k: v for k, v in environment.items() if k.startswith(READ_ONCE) and k not in SET_IN_FORK}


def must_be_real(arguments, fixed):
    """Whether a fork could differ from a new interpreter: an option other than -u, or another value of a variable that
    is read once."""
    rest = arguments[1:] if arguments[:1] == ["-u"] else arguments
    option = rest[0] if rest else "-"
    known = option in ("-m", "-c") and len(rest) > 1 or not option.startswith("-")
    return not known or read_once(os.environ) != fixed["environment"]


def inherited():
    """The file descriptors beside the standard streams that this process was given."""
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and is_inheritable(fd)]


def is_inheritable(fd):
    try:
        return os.get_inheritable(fd)
    except OSError:  # of the listing itself
        return False


def received(connection):
    """An integer, or None where the other side is gone."""
    data = connection.recv(4, socket.MSG_WAITALL)
    return struct.unpack("i", data)[0] if len(data) == 4 else None


def main():
    path, *arguments = sys.argv[1:]
    with open(path) as file:
        fixed = json.load(file)
    given = inherited()
    connection = socket.socket(socket.AF_UNIX)
    try:
        if must_be_real(arguments, fixed):
            raise ConnectionError
        connection.connect("\0" + fixed["address"])
    except ConnectionError:
        os.execv(fixed["python"], [fixed["python"], *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known where to pass them on to
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ), "ignored": ignored}
    data = json.dumps(request | {"inherited": given}).encode()
    streams = array.array("i", [0, 1, 2, *given])
    connection.sendmsg([struct.pack("i", len(data))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(data)
    pid = received(connection)
    for number in PASSED_ON:
        if number not in ignored:
            signal.signal(number, lambda number, _: passed_on(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    for stream in streams:
        os.close(stream)  # a reader of these streams sees their end when the fork closes them
    status = received(connection)
    if status is None or pid is None:
        os._exit(1)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def passed_on(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    main()
