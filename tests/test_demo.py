"""What the two commands of the README say before and after they work, with a stand-in for what they start."""

import subprocess
from pathlib import Path

import pytest

from tests.data.sources.test_python_packages import SYMPY_IN_BYTES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stand_in(tmp_path):
    """Makes a program in place of Python that prints its arguments, and the fingerprint that `prepare` would print."""

    def make(fingerprint):
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\necho "started $*"\necho "fingerprint      {fingerprint}"\n')
        program.chmod(0o755)
        return program

    return make


def test_the_demo_says_what_it_does_how_long_it_takes_and_which_report_to_open(stand_in):
    demo = ROOT / "scripts" / "demo.sh"
    ran = subprocess.run([demo, stand_in(SYMPY_IN_BYTES)], check=True, capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("Training 36 models") and "about four minutes" in lines[1]
    assert lines[2] == "started -m scaling_testbed.prepare data=sympy"
    assert lines[4] == f"README's table was made on the corpus {SYMPY_IN_BYTES}. This machine has the same corpus."
    assert lines[5].startswith("started -m scaling_testbed.sweep run sweep=demo --workers 2")
    assert lines[-1].startswith("Open runs/demo/report.html in a browser")


def test_the_demo_says_when_its_corpus_is_not_that_of_the_readme(stand_in):
    ran = subprocess.run([ROOT / "scripts" / "demo.sh", stand_in("0" * 16)], check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines()[4].endswith("This machine has another one: do not compare the losses.")


def test_setup_says_what_it_installs_where_and_installs_no_tests_extras():
    ran = subprocess.run(
        ["make", "-n", "setup", "VENV=/nowhere/venv"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    said = [line for line in ran.stdout.splitlines() if line.startswith("echo")]
    assert "into /nowhere/venv: 1.5 GB" in said[0]
    assert "'.[analysis,export]'" in ran.stdout and "[test]" not in ran.stdout
    tests = ["make", "-n", "test", "VENV=/nowhere/venv"]
    assert "'.[test]'" in subprocess.run(tests, cwd=ROOT, check=True, capture_output=True, text=True).stdout
