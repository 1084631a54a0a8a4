"""`make faults` prints a line for each fault, and its exit status is 1 unless all hold."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.faults.conftest import COLLECTED
from tests.faults.scorecard import NAMES, order

TESTS = Path(__file__).resolve().parent.parent


def test_every_fault_has_a_test(request):
    collected = request.config.stash[COLLECTED]
    marked = {path for path in TESTS.rglob("test_*.py") if "mark.fault(" in path.read_text()}
    if marked - set(collected):
        pytest.skip("only a part of the tests was collected")
    assert not sorted(set(NAMES) - set().union(*collected.values()), key=order)


CASES = """
import pytest

@pytest.mark.fault("1", "One.")
@pytest.mark.parametrize("n", [1, 2])
def test_that_holds(n, record_property):
    record_property("seen", f"saw {n}")

@pytest.mark.fault("2", "Two.")
def test_without_a_word():
    pass

@pytest.mark.fault("2", "Two.")
@pytest.mark.skipif(True, reason="no cluster here")
def test_elsewhere():
    pass

@pytest.mark.fault("A1", "Three.")
def test_that_fails():
    assert False, "seen otherwise"

@pytest.mark.fault("C: last", "Four.")
@pytest.mark.xfail
def test_open():
    assert False
"""


@pytest.mark.parametrize("processes", ["0", "1"])
def test_the_table_has_a_line_for_each_fault(python, tmp_path, processes):
    (tmp_path / "test_cases.py").write_text(CASES)
    plugins = ["-p", "xdist", "-p", "tests.faults.scorecard", "-p", "no:cacheprovider"]
    options = ["-q", *plugins, "-n", processes, f"--rootdir={tmp_path}"]
    command = [python, "-m", "pytest", *options, "-c", "/dev/null", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for line in (
        r"1 +One\. +saw 1 \(and 1 more\) +holds +[\d.]+",
        r"2 +Two\. +without a word +in part +[\d.]+",
        r"3 +no test +0\.0",
        r"A1 +Three\. +in test_that_fails: AssertionError: seen otherwise +FAILS +[\d.]+",
        r"C: last +Four\. +expected to fail +FAILS +[\d.]+",
        r"left out: no cluster here",
        r"2 of 42, A 0 of 19, B 0 of 9, C 0 of 1",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), f"{line}\n{done.stdout}"
    _, _, table = done.stdout.partition("\nfault ")
    assert [line.split()[0] for line in table.split("\n\n")[0].splitlines()[1:]] == [*NAMES, "C:"]
