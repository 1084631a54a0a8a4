"""The warm parent: `parent.py SOCKET EXECUTABLE` imports, gets ready to compose, and then forks a child for each
request, until its stdin ends."""

import atexit
import fcntl
import gc
import importlib
import importlib.util
import io
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import types

# What most of the commands import.
MODULES = ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.run"]
MODULES += ["filelock", "hydra", "numpy.fft", "omegaconf"]
MODULES += ["scaling_testbed.training.run", "scaling_testbed.config.compose", "scaling_testbed.commands.doors"]
MODULES += ["scaling_testbed.sweeps.local", "scaling_testbed.sweeps.plan"]
# What Hydra imports when it composes for the first time.
MODULES += [
    f"hydra._internal.core_plugins.{name}"
    for name in ("bash_completion", "basic_launcher", "basic_sweeper", "file_config_source", "fish_completion")
    + ("importlib_resources_config_source", "structured_config_source", "zsh_completion")
]


def serve(listener):
    """Answers requests. Returns a request in each child, and never returns in the parent."""
    with listener:
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            reap()
            if listener not in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    return answer(connection)


def reap():
    """Collects the keepers that have ended, and with them the processor time of their children."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def answer(connection):
    """Forks the child and returns the request in it. The process itself is its keeper: it tells the client the child's
    process id and how the child ended, and kills the child when the client is gone."""
    header, streams, _, _ = socket.recv_fds(connection, 4, 99)
    data = connection.recv(*struct.unpack("i", header), socket.MSG_WAITALL)
    child = os.fork()
    if child == 0:
        connection.close()
        request = json.loads(data)
        moved = [fcntl.fcntl(stream, fcntl.F_DUPFD, 100) for stream in streams]  # away from where others belong
        for stream in streams:
            os.close(stream)
        for target, stream in zip([0, 1, 2, *request["inherited"]], moved, strict=True):
            os.dup2(stream, target)
            os.close(stream)
        return request
    for stream in [0, 1, 2, *streams]:
        os.close(stream)
    try:
        connection.send(struct.pack("i", child))
        ended = os.pidfd_open(child)
        ready, _, _ = select.select([connection, ended], [], [])
        if ended not in ready:
            raise ConnectionError("the client is gone")
        connection.send(struct.pack("i", os.waitpid(child, 0)[1]))
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finally:
        os._exit(0)


def become(request, executable, searched):
    """Makes this process what a new interpreter is with these arguments, in this folder and environment."""
    os.chdir(request["cwd"])
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # where spawned processes look for the main module
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, usual)  # the parent ignores them where the tests run under nohup or with &
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    unbuffered = request["arguments"][0] == "-u"
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    for name, stream, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        lines = unbuffered or name == "stderr" or os.isatty(stream)
        file = io.BufferedWriter(io.FileIO(stream, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, "utf-8", errors, line_buffering=lines, write_through=unbuffered))
    sys.executable = executable
    paths = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = ["", *(os.path.abspath(path) for path in paths if path), *searched]
    threads = int(request["environment"].get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    if threads != 1:
        import torch

        torch.set_num_threads(threads)
    return request["arguments"][unbuffered:]


def run(arguments):
    """python -m NAME ..., python -c CODE ..., or python FILE ..."""
    option, *rest = arguments
    if option == "-m":
        name, sys.path[0], sys.argv = rest[0], os.getcwd(), rest
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            name += ".__main__"
        sys.modules.pop(name, None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    if option == "-c":
        sys.argv = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(option))
        main.__file__ = os.path.abspath(option)
        with open(option, "rb") as file:
            code = compile(file.read(), main.__file__, "exec")
    exec(code, main.__dict__)


def end(call):
    """Calls and ends the process as Python would, but does not take the modules apart, which takes 0.3 s."""
    status = 0
    try:
        try:
            call()
        finally:
            threading._shutdown()
    except SystemExit as error:
        status = 0 if error.code is None else error.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    listener, executable = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    own = os.environ["PYTHONPATH"]
    searched = [entry for entry in sys.path[1:] if entry != own]
    sys.path[0] = own
    for name in MODULES:
        importlib.import_module(name)
    sys.modules["scaling_testbed.config.compose"].get_ready()
    os.fsync = lambda opened: None  # as tests/conftest.py says
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "an import has started a thread: forks are not safe"
    gc.freeze()
    end(lambda: run(become(serve(listener), executable, searched)))
