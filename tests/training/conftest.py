"""Runs small enough for a test: a Markov corpus of 16 symbols and a model of a few thousand parameters."""

import json
import subprocess
from pathlib import Path

import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.processes.interrupts import Interrupted, Interrupts
from scaling_testbed.runs import checkpoint
from scaling_testbed.training.run import train

TINY = [
    *("data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000"),
    *("model=nano_s", "batch.sequences=8", "batch.sequence_length=16", "budget.steps=12"),
    *("evaluation.every_steps=5", "evaluation.tokens=1024", "checkpoint.every_steps=4", "logging.every_steps=1"),
    "compute.threads=1",
]
TIMING = ("seconds", "tokens_per_second", "ms_per_step", "mfu", "peak_memory_bytes")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def tiny(tmp_path, data_dir):
    """Returns a function from further overrides to (RunConfig, run folder)."""

    def make(*overrides, runs="runs"):
        (run,) = compose_many([[*TINY, f"runs_dir={tmp_path / runs}", f"data_dir={data_dir}", *overrides]])
        return run, run_folder_path(run)

    return make


@pytest.fixture
def trained(tiny):
    """Returns a function that trains a tiny run and returns (row, run folder)."""

    def run_it(*overrides, **where):
        run, folder = tiny(*overrides, **where)
        return train(run, quiet=True), folder

    return run_it


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data_dir):
    """Returns a function from further overrides to (row, run folder) of a tiny run that was never stopped.

    It is trained once a session, so tests only read it."""
    done = {}

    def run_it(*overrides):
        if overrides not in done:
            places = [f"runs_dir={tmp_path_factory.mktemp('whole')}", f"data_dir={data_dir}"]
            (run,) = compose_many([[*TINY, *places, *overrides]])
            done[overrides] = train(run, quiet=True), run_folder_path(run)
        return done[overrides]

    return run_it


def load_latest(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint in a folder of checkpoints, or None where there is none."""
    path = checkpoint.latest(folder)
    return None if path is None else checkpoint.read(path)


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def start(python, tmp_path, data_dir, *overrides, before="", **kwargs) -> subprocess.Popen:
    """The door of training in a process of its own, after `before` (Python) has run in it."""
    arguments = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}", *overrides]
    code = f"import sys\n{before}\nfrom scaling_testbed.train import main\nsys.exit(main({arguments!r}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs
    return subprocess.Popen([python, "-c", code], **pipes)


class StopAt(Interrupts):
    """Interrupts that ask to stop at the n-th time they are polled, not counting the one before the start."""

    def __init__(self, polls):
        super().__init__()
        self.left = polls + 1

    def check(self):
        self.left -= 1
        if self.left == 0:
            raise Interrupted("SIGTERM")
