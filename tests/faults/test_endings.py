"""Runs that stop, are stopped or cannot go on: each ends in time with a row that says why, and the same command goes on
with it. Real processes, signals, sockets and limits of memory."""

# ruff: noqa: F811  (fixtures of tests.training are imported by name)

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.conftest import TINY, data_dir, metrics, start, tiny, trained, whole  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent


def row_in(folder):
    return json.loads((folder / "result.json").read_text())


# ---- Several processes

AT_UPDATE = """
import os, signal
from scaling_testbed.training import step as updates
real = updates.set_lr
def set_lr(optimizer, lr, calls=[0]):
    calls[0] += 1
    if os.environ.get("RANK", "0") == "{rank}" and calls[0] == {update}:
        {action}
    real(optimizer, lr)
updates.set_lr = set_lr
"""


def send(name):
    """Python that sends a signal to its own process, and leaves the number of the process in the file `stopped`."""
    return f"open('stopped', 'w').write(str(os.getpid())); os.kill(os.getpid(), signal.SIG{name})"


class World:
    """The processes of one run without torchrun, as Kubeflow or mpirun start them. They work in `folder`."""

    def __init__(self, python, folder, data_dir):
        self.python, self.folder, self.data_dir = python, folder, data_dir

    def run(self, *overrides, size=2, before="", seconds=60, ends=None):
        """Start `size` processes. Returns their exit statuses when those in `ends` have ended (None: all), and what
        they printed on stderr. What is left is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        ranks = []
        for rank in range(size):
            environment = os.environ | words | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with open(self.folder / f"{rank}.out", "w") as out, open(self.folder / f"{rank}.err", "w") as err:
                pipes = {"stdout": out, "stderr": err, "env": environment, "cwd": self.folder}
                ranks.append(start(self.python, self.folder, self.data_dir, *overrides, before=before, **pipes))
        try:
            statuses = [ranks[rank].wait(timeout=seconds) for rank in (range(size) if ends is None else ends)]
        finally:
            if (stopped := self.folder / "stopped").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(stopped.read_text()), signal.SIGKILL)
                stopped.unlink()
            for process in ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                process.kill()
        return statuses, [(self.folder / f"{rank}.err").read_text() for rank in range(size)]

    def row(self):
        (path,) = self.folder.glob("runs/*/*/result.json")
        return json.loads(path.read_text())


@pytest.fixture
def world(python, tmp_path, data_dir):
    return World(python, tmp_path, data_dir)


A_WORLD = """
import os, time, torch
from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.processes import group
from scaling_testbed.processes.world import world_from_environment
real = group._end_group
group._end_group = lambda: (real(), time.sleep(0.2 * int(os.environ["RANK"])))  # rank 0 would leave first
for _ in range(2):
    with group.Processes(world_from_environment(), ParallelismConfig(kind="ddp")) as processes:
        processes.connect(torch.device("cpu"))
        assert processes.sum([1.0]) == [2.0] and processes.on_main(lambda: 7) == 7
sys.exit(0)
"""


@pytest.mark.fault("B5", "Processes started without torchrun all end with 0; rank 0, which keeps the store, ends last.")
def test_worlds_started_by_hand_end_with_0(world, record_property):
    """Two runs in each of them, one after the other, at the same port."""
    found = [world.run(before=A_WORLD) for _ in range(8)]
    statuses = [statuses for statuses, _ in found]
    record_property("seen", f"statuses of 8 worlds: {statuses}")
    assert statuses == [[0, 0]] * 8
    assert "Exception raised" not in "".join(error for _, errors in found for error in errors)


@pytest.mark.slow
@pytest.mark.fault("B5", "Runs whose processes were started without torchrun all end with 0.")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_runs_started_by_hand_end_with_0(world, record_property, kind):
    found = [world.run(f"parallelism={kind}", "budget.steps=2", f"seed={seed}")[0] for seed in range(8)]
    record_property("seen", f"statuses of 8 runs with {kind}: {found}")
    assert found == [[0, 0]] * 8


@pytest.mark.fault("B3", "A rank that stands still ends the run in time, with a row and the exit status 75.")
@pytest.mark.fault("B2", "A rank that hangs is told from one that is gone; the row names rank, step and collective.")
@pytest.mark.fault("33", "If one rank hangs, the job ends within the set time and names the rank and the collective.")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(world, record_property, rank):
    stop = AT_UPDATE.format(rank=rank, update=7, action=send("STOP"))
    stop += "\nfrom scaling_testbed.processes import group\ngroup.GRACE_SECONDS = 0.3"
    other = 1 - rank
    limited = ("parallelism=ddp", "parallelism.timeout_seconds=1.5")
    statuses, errors = world.run(*limited, before=stop, ends=[other])
    row = world.row()
    record_property("seen", f"exit status {statuses[0]}; {row['status']}: {row['error']}")
    assert statuses == [75] and row["status"] == "preempted"
    assert re.match(rf"rank {rank} hangs at step [67]: .*all_reduce of \w+ \(training/step.py", row["error"])
    assert f"error: {row['error']}" in errors[other]


# ---- Memory

LIMIT = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {mib} * 2**20,) * 2)
"""
WIDE = (
    "batch.sequences=256",
    "batch.sequence_length=64",
    "budget.steps=3",
    "evaluation.every_steps=0",
    "evaluation.rows=8",
)


@pytest.mark.fault("B8", "Too little memory is one line with the micro-batch to try.")
@pytest.mark.fault("35", "Too little memory names the micro-batch to try.")
def test_too_little_memory_is_one_line_with_a_number(python, tmp_path, data_dir, record_property):
    process = start(python, tmp_path, data_dir, *WIDE, before=LIMIT.format(mib=450))
    _, err = process.communicate(timeout=60)
    record_property("seen", err.strip())
    assert process.returncode == 1 and err.count("\n") == 1
    assert (
        "too little memory for micro-batches of 256 sequences" in err and "try batch.micro_batch_sequences=128" in err
    )


@pytest.mark.fault("B8", "batch.micro_batch_sequences=auto takes what fits, falls back by halves, and the row says so.")
@pytest.mark.parametrize("estimate", ["right", "too low"])
def test_a_run_chooses_its_micro_batch(whole, python, tmp_path, data_dir, record_property, estimate):
    """Where the estimate is too low, all 256 sequences are tried first."""
    low = "from scaling_testbed.training import parts\nparts.free_memory_bytes = lambda *_: None\n"
    before = LIMIT.format(mib=450) + (low if estimate == "too low" else "")
    process = start(python, tmp_path, data_dir, *WIDE, "batch.micro_batch_sequences=auto", before=before)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), err
    (folder,) = tmp_path.glob("runs/*/*")
    row, unlimited = row_in(folder), whole(*WIDE)[0]
    rows = row["micro_batch_sequences"]
    record_property("seen", f"micro-batches of {rows}; {[line for line in out.splitlines() if 'micro' in line]}")
    assert rows < 256 == unlimited["micro_batch_sequences"] and 256 % rows == 0
    assert ("too little memory at step 0: micro-batches of 128 sequences in place of 256" in out) == (
        estimate != "right"
    )
    for key in ("val_loss", "train_loss_last"):  # fp32 sums in another order
        assert row[key] == pytest.approx(unlimited[key], rel=1e-4)
    assert row["run_id"] == unlimited["run_id"] and row["n_tokens"] == unlimited["n_tokens"]


# ---- Weights & Biases


@pytest.mark.fault("B7", "Weights & Biases that cannot be reached delays a run by 10 s at most, at its end.")
@pytest.mark.fault("36", "Weights & Biases that cannot be reached is one warning; training is unaffected.")
@pytest.mark.parametrize("port", ["silent", "closed"])
def test_wandb_that_cannot_be_reached(whole, python, tmp_path, data_dir, record_property, port):
    """The end waits for 1 s here in place of 10."""
    pytest.importorskip("wandb")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if port == "silent":
            listener.listen(50)  # connections are accepted and never answered
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environment = os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        short = "from scaling_testbed.runs import wandb\nwandb.END_SECONDS = 1"
        began = time.monotonic()
        process = start(python, tmp_path, data_dir, "logging.wandb=true", before=short, env=environment)
        _, err = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("runs/*/*")
    row = row_in(folder)
    over = time.monotonic() - began - row["wall_seconds"]
    record_property("seen", f"{err.strip()}; {over:.1f} s besides training")
    assert process.returncode == 0 and row["status"] == "finished"
    assert err.count("\n") == 1 and err.startswith("warning: wandb is off for the rest of this run: ")
    assert metrics(folder) == metrics(whole()[1])
