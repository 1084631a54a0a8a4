"""Runs of several processes each, started by srun in an array job on a real cluster."""

import json

import pytest

from tests.sweeps.cluster import squeue, until


def row(state):
    with open(f"{state['folder']}/result.json") as file:
        return json.load(file)


@pytest.mark.slurm
def test_tasks_of_an_array_share_a_node_without_meeting(cluster, door, states):
    """Each has a store of its own, at a port of its own: met, they would wait for processes that never come."""
    status, out, err = door("submit", "model=nano_s", "parallelism=fsdp", "launcher.gpus_per_node=2")
    assert (status, err) == (0, "") and "2 tasks" in out
    until(lambda: {state["state"] for state in states("model=nano_s").values()} == {"finished"}, 120)
    rows = [row(state) for state in states("model=nano_s").values()]
    assert [(found["world_size"], found["parallelism"]) for found in rows] == [(2, "fsdp")] * 2
    until(lambda: not squeue(), 30)
