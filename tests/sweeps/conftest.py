"""A sweep of runs that take a second: a Markov corpus and models of a few thousand parameters."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from scaling_testbed import sweep
from scaling_testbed.sweeps import local
from scaling_testbed.sweeps.status import RunState
from tests.analysis.trajectories.worlds import run as made_run
from tests.sweeps import cluster as cluster_module
from tests.sweeps.test_view import RUN

TINY = """
overrides: [data=markov, data.n_tokens=20000, data.n_validation_tokens=4000, batch.sequences=8,
            batch.sequence_length=16, budget.steps=4, evaluation.tokens=1024, compute.threads=1, compute.device=cpu]
axes:
  model: [bigram, nano_s]
  optimizer.lr: [1e-3, 1e-2]
"""


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def door(tmp_path, data_dir, capfd, python, monkeypatch, request):
    """Returns a function from (verb, arguments) to (exit status, stdout, stderr) of the sweep door, on TINY.

    The runs that the local driver starts are forks of the warm parent; tasks of a cluster are real processes."""
    if request.node.get_closest_marker("slurm") is None:
        monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr("scaling_testbed.sweeps.probe.SECONDS", 0.05)
    (tmp_path / "tiny.yaml").write_text(TINY)

    def call(verb, *arguments):
        places = [f"sweep={tmp_path / 'tiny.yaml'}", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
        capfd.readouterr()
        status = sweep.main([verb, *places, *arguments])
        return (status, *capfd.readouterr())

    return call


@pytest.fixture
def untrained(monkeypatch):
    """The runs that the local driver starts have a row at once, and nothing is trained."""

    def start(_driver, run, _slot):
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        row = {"run_id": run.run_id, "status": "finished", "steps": 4, "val_loss": 2.0}
        (folder / "result.json").write_text(json.dumps(row))
        return subprocess.Popen(["true"])

    monkeypatch.setattr(local.Driver, "_start", start)


@pytest.fixture
def states(door):
    """Returns a function to the runs' states by what tells them apart: {"bigram 1e-3": {...}}."""

    def read(*arguments):
        lines = json.loads(door("status", "--json", *arguments)[1])
        return {" ".join(line["varied"].values()): line for line in lines}

    return read


@pytest.fixture(scope="session")
def cluster_config():
    if lacking := cluster_module.missing():
        pytest.skip(f"no Slurm cluster: {lacking}")
    with (
        tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder,
        cluster_module.running(Path(folder) / "c") as config,
    ):
        yield config


@pytest.fixture
def cluster(cluster_config, monkeypatch):
    """A running cluster with an empty queue that the commands of this process talk to."""
    monkeypatch.setenv("SLURM_CONF", str(cluster_config))
    yield cluster_config
    cluster_module.empty_queue()


@pytest.fixture
def trained(tmp_path):
    """Returns a function to the state of a planned run with its metrics on the disk."""

    def make(name, state="finished", factor=1.0, upto=400):
        row, records = made_run(name, RUN.n_params, 400, lambda step, rates: factor * (2 + 20 / step))
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps(one) + "\n" for one in records if one["step"] <= upto]
        (folder / "metrics.jsonl").write_text("".join(lines))
        config = {key: value for key, value in row.items() if "." in key}
        planned = replace(RUN, run_id=name, folder=str(folder), steps=400, config=config)
        return RunState(run=planned, state=state, step=upto)

    return make
