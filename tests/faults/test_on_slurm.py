"""What a real Slurm cluster does to a sweep: preemption, time limits, cancelled jobs, nodes that go down, refusals."""

# ruff: noqa: F811  (fixtures of tests.sweeps are imported by name)

import json
import subprocess
from pathlib import Path

import pytest

from tests.sweeps.cluster import squeue, until
from tests.sweeps.conftest import cluster, cluster_config, data_dir, door, states  # noqa: F401

pytestmark = pytest.mark.slurm
LONG = ("model=bigram", "optimizer.lr=1e-3", "logging.every_steps=100", "evaluation.every_steps=0")


class OneRun:
    """A sweep of one run of some seconds, on the cluster."""

    def __init__(self, door, states):
        self.door, self.states = door, states

    def submit(self, steps, *overrides, launcher=()):
        self.words = (*LONG, f"budget.steps={steps}", *overrides)
        assert self.door("submit", *self.words, *launcher)[0] == 0
        until(squeue, 30)
        (line,) = squeue()
        self.job = line.split()[0]

    def state(self):
        (state,) = self.states(*self.words).values()
        return state

    def row(self):
        return json.loads((Path(self.state()["folder"]) / "result.json").read_text())

    def until_step(self, step):
        until(lambda: (self.state()["step"] or 0) >= step, 90)

    def until_stopped(self, name):
        until(lambda: self.state()["state"] == "finished" or name in (self.state()["error"] or ""), 150)
        assert name in (self.state()["error"] or "")

    def goes_on(self):
        """Wait until the job is back in the queue, let it start soon, and return the row at its end."""
        until(lambda: squeue() == [f"{self.job} PENDING"], 60)
        # Slurm would hold a requeued task back for two minutes. Not "now": credentials count in seconds, and one made
        # in the second in which the first start's were revoked is taken for revoked.
        subprocess.run(["scontrol", "update", f"jobid={self.job}", "TimeLimit=30", "StartTime=now+3"], check=True)
        until(lambda: not squeue(), 700)
        assert self.state()["state"] == "finished", self.state()
        return self.row()

    def undisturbed(self):
        """The loss of the same run on this machine, without a cluster."""
        assert self.door("run", *self.words, "name=undisturbed")[0] == 0
        (again,) = json.loads(self.door("status", "--json", *self.words, "name=undisturbed")[1])
        return again["loss"]


@pytest.fixture
def one_run(cluster, door, states):
    return OneRun(door, states)


@pytest.mark.fault("B1", "A run that Slurm preempts saves within its GraceTime, goes back into the queue, and goes on.")
@pytest.mark.fault("10", "Preemption by a higher partition: requeued and finished, the restarts in the row.")
@pytest.mark.parametrize("partition", ["test", pytest.param("hasty", marks=pytest.mark.slow)])
def test_a_preempted_run_goes_on(one_run, record_property, partition):
    """test has a GraceTime of 20 s, hasty one of 0."""
    one_run.submit(6000, "checkpoint.every_steps=0", launcher=(f"launcher.partition={partition}",))
    one_run.until_step(200)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"]
    subprocess.run([*urgent, "--output=/dev/null"], check=True, capture_output=True)
    one_run.until_stopped("SIGTERM")
    saved = one_run.state()["step"]
    row = one_run.goes_on()
    record_property("seen", f"saved at step {saved}, {row['status']} after {row['restarts']} restarts")
    assert row["restarts"] == 1 and saved >= 200
    assert one_run.undisturbed() == row["val_loss"]


@pytest.mark.fault("9", "A time limit is warned of: the run saves, is requeued, and ends in the same bits.")
@pytest.mark.parametrize("sender", ["scancel", pytest.param("its time limit", marks=pytest.mark.slow)])
def test_a_run_that_is_warned_is_saved_requeued_and_ends_in_the_same_bits(one_run, record_property, sender):
    """A time limit is a minute at least, which a run must outlast at any speed; scancel sends the same signal."""
    limited = sender == "its time limit"
    limits = ("launcher.time=1", "launcher.signal_seconds=20") if limited else ()
    one_run.submit(80000 if limited else 6000, "checkpoint.every_steps=0", launcher=limits)
    if not limited:
        one_run.until_step(200)
        subprocess.run(["scancel", "--signal=USR1", one_run.job], check=True)
    one_run.until_stopped("SIGUSR1")
    row = one_run.goes_on()
    record_property("seen", f"{row['status']} after {row['restarts']} restarts")
    assert row["restarts"] >= 1
    assert one_run.undisturbed() == row["val_loss"]


@pytest.mark.slow
@pytest.mark.fault("11", "A node that goes down gives no time to save: the run goes on from its last checkpoint.")
def test_a_node_that_goes_down(one_run, record_property):
    one_run.submit(6000, "checkpoint.every_steps=100")
    one_run.until_step(400)
    node = subprocess.run(["squeue", "-h", "-r", "-o", "%N"], capture_output=True, text=True).stdout.strip()
    for state in ("down", "drain"):  # drained, because its daemon would report it back at once
        subprocess.run(["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"], check=True)
    try:
        row = one_run.goes_on()
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=True)
    record_property("seen", f"{row['status']} after {row['restarts']} restarts")
    assert row["restarts"] == 1
    assert one_run.undisturbed() == row["val_loss"]


@pytest.mark.fault("B1", "A run that is cancelled saves and is not requeued; it can be submitted again.")
def test_a_cancelled_sweep_is_submitted_again_and_only_the_rest_runs(cluster, door, states, record_property):
    long = ("model=nano_s", "budget.steps=1500", "launcher.max_running=1")
    run_keys = long[:2]
    assert door("submit", *long)[0] == 0
    until(lambda: any(s["state"] == "running" and s["step"] > 20 for s in states(*run_keys).values()), 60)
    assert {s["state"] for s in states(*run_keys).values()} == {"running", "queued"}
    (job,) = {line.split("_")[0] for line in squeue()}
    subprocess.run(["scancel", job], check=True)
    until(lambda: not squeue(), 60)
    stopped = {name: s for name, s in states(*run_keys).items() if s["state"] == "stopped"}
    assert len(stopped) == 1 and "SIGTERM" in next(iter(stopped.values()))["error"]
    ask = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    ended = subprocess.run(ask, capture_output=True, text=True).stdout.split()
    record_property("seen", f"job {ended}; {next(iter(stopped.values()))['error']}")
    assert set(ended) == {"CANCELLED"}
    assert "2 to submit" in door("submit", *run_keys)[1]
    until(lambda: {s["state"] for s in states(*run_keys).values()} == {"finished"}, 200)
    (name,) = stopped
    row = json.loads((Path(stopped[name]["folder"]) / "result.json").read_text())
    assert row["restarts"] == 1


@pytest.mark.fault("41", "What sbatch says when it refuses is passed on, and nothing is left behind.")
def test_what_sbatch_says_when_it_refuses_is_passed_on(cluster, door, tmp_path, record_property):
    status, _, err = door("submit", "launcher.partition=no_such_partition")
    record_property("seen", err.strip())
    assert status == 1 and "sbatch refused" in err and "invalid partition" in err.lower()
    assert list((tmp_path / "runs/tiny/slurm").iterdir()) == []
