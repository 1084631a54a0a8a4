"""A process that imports PyTorch collects no garbage meanwhile, and ends without taking its modules apart."""

import gc
import os
import subprocess

import pytest

from scaling_testbed.processes.interpreter import importing_torch
from tests.conftest import REAL_PYTHON

ENDS = """
import sys
from scaling_testbed.processes.interpreter import end_at_once, planned
end_at_once()
import atexit
atexit.register(lambda: print("called"))
class Kept:
    def __del__(self):
        print("taken apart")
kept = Kept()
print("said")
sys.exit({})
"""


@pytest.mark.parametrize(
    ("status", "said"), [("planned(3)", ["said", "called"]), ("3", ["said", "called", "taken apart"])]
)
def test_a_process_with_a_planned_status_ends_at_once_with_all_that_it_said(status, said):
    done = subprocess.run([REAL_PYTHON, "-c", ENDS.format(status)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:-1], done.stderr) == (3, said, "")


def test_garbage_is_collected_again_after_the_import(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with pytest.raises(ImportError), importing_torch():
        assert not gc.isenabled() and os.environ["GOMP_SPINCOUNT"] == "1000"
        raise ImportError
    assert gc.isenabled()
