"""What a cluster does to a run, on a real one."""

# ruff: noqa: F811  (fixtures of tests.sweeps are imported by name)

import json
import subprocess
from pathlib import Path

import pytest

from tests.sweeps.cluster import squeue, until
from tests.sweeps.conftest import cluster, cluster_config, data_dir, door, states  # noqa: F401

RUN = ("model=bigram", "optimizer.lr=1e-3", "budget.steps=6000", "logging.every_steps=100")
RUN += ("evaluation.every_steps=0", "checkpoint.every_steps=500")


@pytest.mark.slurm
@pytest.mark.fault("11", "After the loss of its node a run goes on from its last periodic checkpoint.")
def test_a_run_whose_node_goes_down(cluster, door, states, record_property):
    def read():
        return next(iter(states(*RUN).values()))

    assert door("submit", *RUN)[0] == 0
    until(lambda: (read()["step"] or 0) >= 1000, 120)
    (task,) = squeue()
    job = task.split()[0]
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    node = "n2" if "NodeList=n2" in shown else "n1"
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    try:
        until(lambda: any("PENDING" in line for line in squeue()), 60)
        folder = Path(read()["folder"])
        saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now+3"], check=True)
        until(lambda: not squeue(), 300)
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=True)
    row = json.loads((folder / "result.json").read_text())
    record_property("seen", f"node {node} down with {saved[-1]}; then {row['status']}, restarts {row['restarts']}")
    assert read()["state"] == "finished" and row["restarts"] == 1
    log = (folder / "log.txt").read_text()
    assert f"resumed at step {int(saved[-1][5:]):,}" in log
    assert door("run", *RUN, "name=undisturbed")[0] == 0
    (again,) = json.loads(door("status", "--json", *RUN, "name=undisturbed")[1])
    assert again["loss"] == row["val_loss"]
