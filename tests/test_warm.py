"""A fork of the warm parent is what a new interpreter is, from its arguments to its exit status."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import REAL_PYTHON

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks are used on Linux alone")

ASKED = """
import json, os, signal, sys
first = sys.stdin.readline()
print(json.dumps([sys.argv, sys.path[:2], os.getcwd(), os.environ["MINE"], first]))
print(json.dumps([sys.stdout.isatty(), __name__, globals().get("__file__")]))
print(json.dumps([str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]))
print("heard", file=sys.stderr)
raise SystemExit(int(sys.argv[1]))
"""


def both(python, arguments, **options):
    """(status, stdout, stderr) of the real interpreter and of the warm one."""
    found = []
    for executable in (REAL_PYTHON, python):
        done = subprocess.run([executable, *arguments], capture_output=True, text=True, timeout=60, **options)
        found.append((done.returncode, done.stdout, done.stderr))
    return found


@pytest.mark.parametrize("way", ["code", "file", "module"])
def test_a_fork_has_what_a_new_interpreter_has(python, tmp_path, way):
    (tmp_path / "ask.py").write_text(ASKED)
    words = {"code": ["-c", ASKED], "file": ["ask.py"], "module": ["-m", "ask"]}[way]
    environment = os.environ | {"MINE": "ä b", "PYTHONPATH": str(tmp_path)}
    real, warm = both(python, [*words, "3", "x y"], cwd=tmp_path, env=environment, input="line\n")
    assert real == warm and real[0] == 3 and real[2] == "heard\n"


@pytest.mark.parametrize(
    "code", ["raise SystemExit('no')", "1 / 0", "import os; os.abort()", "import sys; sys.exit(256)"]
)
def test_a_fork_ends_as_a_new_interpreter_does(python, code):
    real, warm = both(python, ["-c", code])
    assert real[0] == warm[0] and real[1] == warm[1]
    assert real[2].splitlines()[-1:] == warm[2].splitlines()[-1:]


def test_what_is_to_be_done_at_the_end_is_done(python):
    code = "import atexit, threading, time; atexit.register(print, 'end')\n"
    code += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()"
    assert both(python, ["-c", code]) == [(0, "thread\nend\n", "")] * 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_reaches_the_fork(python, number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the process
    try:
        process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    fork = int(process.stdout.readline())
    assert fork != process.pid
    process.send_signal(number)
    assert process.wait(60) == -number and process.stdout.read() == ""  # it has closed its end
    process.stdout.close()


def test_the_parent_has_imported_pytorch_and_has_one_thread(python):
    code = "import os, sys; print('torch' in sys.modules, len(os.listdir('/proc/self/task')), 'pandas' in sys.modules)"
    assert both(python, ["-c", code])[1] == (0, "True 1 False\n", "")


def test_where_a_fork_could_differ_the_interpreter_is_real(python):
    code = "import sys; print('torch' in sys.modules)"

    def is_warm(*options, **more):
        done = subprocess.run([python, *options, "-c", code], capture_output=True, text=True, check=True, **more)
        return done.stdout == "True\n"

    assert is_warm() and is_warm("-u") and is_warm(env=os.environ | {"CUDA_VISIBLE_DEVICES": "3"})
    assert not is_warm("-X", "utf8") and not is_warm(env=os.environ | {"PYTHONWARNINGS": "error"})


def test_a_fork_inherits_what_it_was_given(python):
    reader, writer = os.pipe()
    os.write(writer, b"told")
    code = f"import os, sys; print('torch' in sys.modules, os.read({reader}, 9), os.get_inheritable({reader}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, pass_fds=[reader])
    os.close(reader)
    os.close(writer)
    assert done.stdout == "True b'told' True\n"
