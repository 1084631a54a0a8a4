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

from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.runs import checkpoint
from scaling_testbed.train import main as train_main
from scaling_testbed.training import parts as building
from scaling_testbed.training import step as updates
from scaling_testbed.training.run import train
from tests.conftest import REAL_PYTHON
from tests.training.conftest import TINY, data_dir, metrics, start, tiny, trained, whole  # noqa: F401
from tests.training.test_run import assert_same_bits, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent


def row_in(folder):
    return json.loads((folder / "result.json").read_text())


# ---- Signals


@pytest.fixture
def stopped(tiny, trained, whole, tmp_path, data_dir, monkeypatch, capsys):
    """Returns a function that runs the command with signals sent at one place, and then again without. It returns the
    row of the first start. The second must end in the same bits as a run that was not stopped."""

    def run_it(place, name, at, send_signals, *overrides):
        _, folder = tiny(*overrides)
        arguments = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}", *overrides]
        real, calls = getattr(place, name), [0]

        def hit(*given, **options):
            calls[0] += 1
            if calls[0] == at:
                return send_signals(lambda: real(*given, **options))
            return real(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, hit)
            assert train_main(arguments) == 75
        row = row_in(folder)
        assert row["status"] == "preempted" and "Traceback" not in capsys.readouterr().err
        assert train_main(arguments) == 0
        assert_same_bits(whole(*overrides)[1], folder)
        return row

    return run_it


def raising(*numbers):
    """Sends signals to this process, and then goes on with what was called."""

    def send_signals(go_on):
        for number in numbers:
            signal.raise_signal(number)
        return go_on()

    return send_signals


@pytest.mark.fault("4", "SIGTERM in a step saves this step; the status is preempted, the exit status 75.")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(x, marks=pytest.mark.slow) for x in (signal.SIGHUP, signal.SIGXCPU))]
)
def test_sigterm_in_a_step(stopped, record_property, number):
    """Or a closed terminal, or the limit of processor time. Tests that run under nohup ignore SIGHUP."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        row = stopped(updates, "set_lr", 6, raising(number))
    finally:
        signal.signal(number, before)
    record_property("seen", row["error"])
    assert row["error"] == f"stopped by {number.name} at step 6" and row["steps"] == 6


@pytest.mark.fault("5", "SIGUSR1 during an evaluation stops the run there; the evaluation is made again.")
def test_sigusr1_in_an_evaluation(stopped, record_property):
    """The fourteenth validation batch is in the evaluation at step 5."""
    row = stopped(ValidationBatches, "batch", 14, raising(signal.SIGUSR1))
    record_property("seen", row["error"])
    assert row["error"] == "stopped by SIGUSR1 at step 5"


@pytest.mark.fault("6", "SIGTERM while data are prepared or the model is built ends the run at once; it can go on.")
@pytest.mark.parametrize("phase", ["prepare", "parallelize"])
def test_sigterm_before_the_first_step(stopped, record_property, phase):
    row = stopped(building, phase, 1, raising(signal.SIGTERM))
    record_property("seen", row["error"])
    assert row["error"] == "stopped by SIGTERM before training"


@pytest.mark.fault("6", "SIGTERM in the first step, in which a model compiles, is obeyed after it.")
def test_sigterm_in_the_first_step(stopped, record_property):
    row = stopped(updates, "set_lr", 1, raising(signal.SIGTERM))
    record_property("seen", row["error"])
    assert row["error"] == "stopped by SIGTERM at step 1"


@pytest.mark.fault("8", "A second signal while a checkpoint is saved changes nothing: it is saved once, and whole.")
def test_a_second_signal_while_saving(stopped, record_property, tiny):
    """SIGTERM in step 6 leads to a checkpoint; two more signals come before its files are written."""
    real = checkpoint._finish

    def again(go_on):
        signal.raise_signal(signal.SIGTERM)
        checkpoint._finish = lambda *given: raising(signal.SIGTERM, signal.SIGINT)(lambda: real(*given))
        return go_on()

    try:
        row = stopped(updates, "set_lr", 6, again, "checkpoint.every_steps=0")
    finally:
        checkpoint._finish = real
    record_property("seen", row["error"])
    assert row["error"] == "stopped by SIGTERM at step 6"


@pytest.mark.parametrize("door", ["train", "prepare", "sweep", "analyze", "export"])
def test_ctrl_c_while_a_command_starts_is_one_line(door):
    """-X importtime says when the entry point has begun; what follows takes a second."""
    command = [REAL_PYTHON, "-X", "importtime", "-m", f"scaling_testbed.{door}", "--help"]
    obeys = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (tests in the background ignore it)
    piped = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=obeys, **piped)
    for line in process.stderr:
        if line.endswith("scaling_testbed.processes.interrupts\n"):
            break
    process.stderr.readline()  # the next import comes after its handler is installed
    process.send_signal(signal.SIGINT)
    left = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    process.communicate()
    assert (process.returncode, left) == (130, ["error: interrupted; type the same command to continue"])


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
real = group.Processes._read
group.Processes._read = lambda self, key: (time.sleep(0.5), real(self, key))[1]  # rank 0 would leave before that
for _ in range(2):
    with group.Processes(world_from_environment(), ParallelismConfig(kind="ddp")) as processes:
        processes.connect(torch.device("cpu"))
        assert processes.sum([1.0]) == [2.0] and processes.on_main(lambda: 7) == 7
sys.exit(0)
"""


@pytest.mark.fault("B5", "Processes started without torchrun all end with 0; rank 0, which keeps the store, ends last.")
def test_worlds_started_by_hand_end_with_0(world, record_property):
    """Two runs in each of them, one after the other, at the same port."""
    found = [world.run(before=A_WORLD) for _ in range(2)]
    statuses = [statuses for statuses, _ in found]
    record_property("seen", f"statuses of 2 worlds: {statuses}")
    assert statuses == [[0, 0]] * 2
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
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_is_named(world, record_property, rank):
    stop = AT_UPDATE.format(rank=rank, update=7, action=send("STOP"))
    stop += "\nfrom scaling_testbed.processes import group\ngroup.GRACE_SECONDS = 0.3"
    other = 1 - rank
    limited = ("parallelism=ddp", "parallelism.timeout_seconds=5")
    statuses, errors = world.run(*limited, before=stop, ends=[other])
    row = world.row()
    record_property("seen", f"exit status {statuses[0]}; {row['status']}: {row['error']}")
    assert statuses == [75] and row["status"] == "preempted"
    assert re.match(
        rf"rank {rank} hangs at step [67]: .*all_reduce of (gradients of )?\w+ \(training/step.py", row["error"]
    )
    assert f"error: {row['error']}" in errors[other]


@pytest.mark.slow
@pytest.mark.fault("33", "The same under torchrun, which then kills the rank that hangs.")
def test_a_rank_that_hangs_under_torchrun(python, tmp_path, data_dir, record_property):
    """A second hang at the same step is a failure: the same command would hang for ever."""
    words = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}", "parallelism=ddp"]
    words += ["parallelism.timeout_seconds=3", "checkpoint.every_steps=0"]
    stop = AT_UPDATE.format(rank=1, update=7, action="os.kill(os.getpid(), signal.SIGSTOP)")
    run = f"from scaling_testbed.train import main\nsys.exit(main({words!r}))"
    (tmp_path / "hang.py").write_text(f"import sys\n{stop}\n{run}")
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "hang.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seen = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        (folder,) = tmp_path.glob("runs/*/*")
        row = row_in(folder)
        seen.append(f"torchrun {done.returncode}, {row['status']}: {row['error']}")
        assert done.returncode == 1 and re.match(r"rank 1 hangs at step [67]: ", row["error"])
    record_property("seen", "; ".join(seen))
    assert "preempted" in seen[0] and "failed" in seen[1] and "it has hung there before" in seen[1]


PREPARING = """
import os, signal, threading, time
from scaling_testbed.training import parts as building
def prepare(*given, **options):
    time.sleep(30)
building.prepare = prepare
if os.environ["RANK"] == "1":
    from scaling_testbed.processes import group
    wait, waits = group.Processes._read, []
    def read(self, key):  # the last one waits for what rank 0 prepares
        for timer in waits:
            timer.cancel()
        waits.append(threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)))
        waits[-1].start()
        return wait(self, key)
    group.Processes._read = read
"""


@pytest.mark.fault("6", "A signal to one rank while rank 0 prepares data ends all ranks at once.")
def test_a_signal_to_one_rank_while_another_prepares(world, record_property):
    statuses, errors = world.run("parallelism=ddp", before=PREPARING, seconds=20)
    record_property("seen", f"{statuses}; {world.row()['error']}")
    assert statuses == [75, 75] and errors == ["", ""]
    assert world.row()["error"] == "stopped by SIGTERM before training"


@pytest.mark.fault("B3", "Where a lost peer is no exception, as under NCCL, its heartbeat ends the run with a row.")
def test_a_rank_that_is_gone_without_an_exception(world, record_property):
    """Rank 0 sleeps in place of a collective: nothing but the heartbeat tells it that rank 1 is killed."""
    before = """
import os, signal, time
from scaling_testbed.processes import group, heartbeat
from scaling_testbed.training import run as trainer
heartbeat.DEAD_SECONDS = group.GRACE_SECONDS = 0.5
real = trainer.make_update
def make_update(parts, given, *more):
    if given.step == 5:
        os.kill(os.getpid(), signal.SIGKILL) if os.environ["RANK"] == "1" else time.sleep(60)
    return real(parts, given, *more)
trainer.make_update = make_update
"""
    statuses, errors = world.run("parallelism=ddp", "parallelism.timeout_seconds=20", before=before, ends=[0])
    record_property("seen", f"{statuses}; {world.row()['error']}")
    assert statuses == [75] and world.row()["status"] == "preempted"
    assert re.match(r"rank 1 is gone at step \d: process \d+ has ended", world.row()["error"])


DIFFERENT = {
    "words": """
import importlib, os
door = importlib.import_module("scaling_testbed.train")
real = door.main
door.main = lambda words: real([*words, *["optimizer.lr=3e-3"] * int(os.environ["RANK"])])
""",
    "data": """
import os
from scaling_testbed.data.shards import PreparedData
PreparedData.fingerprint = property(lambda data: "of host " + os.environ["RANK"])
""",
    "folder": """
import os
from scaling_testbed.training import run as trainer
real = trainer.run_folder_path
trainer.run_folder_path = lambda run: real(run) / ("" if os.environ["RANK"] == "0" else "of_another_machine")
""",
}
SAID = {
    "words": "optimizer.lr is 0.003 there and 0.01 in rank 0",
    "data": 'is "of host 1" there and "of host 0" in rank 0',
    "folder": "is not the folder that rank 0 holds; with parallelism=fsdp every process writes",
}


@pytest.mark.fault("C: ranks that differ", "Processes with other words, versions or data are refused by name.")
@pytest.mark.parametrize("what", ["words", *(pytest.param(x, marks=pytest.mark.slow) for x in ("data", "folder"))])
def test_ranks_that_differ_are_refused(world, record_property, what):
    statuses, errors = world.run(f"parallelism={'fsdp' if what == 'folder' else 'ddp'}", before=DIFFERENT[what])
    record_property("seen", errors[0].strip())
    assert statuses == [1, 1] and errors[0].startswith("error: rank 1: ") and (errors[1] == "" or what == "folder")
    assert SAID[what] in errors[0] and not list(world.folder.glob("runs/*/*/checkpoints"))


# ---- The batch


@pytest.mark.fault("13", "A run goes on with another micro-batch: the same tokens, losses equal to rounding.")
def test_a_run_goes_on_with_another_micro_batch(tiny, trained, whole, monkeypatch, record_property):
    with monkeypatch.context() as patch:
        patch.setattr(updates, "set_lr", lambda *_: signal.raise_signal(signal.SIGTERM))
        first, folder = trained("batch.micro_batch_sequences=8")
    row, _ = trained("batch.micro_batch_sequences=2")
    record_property("seen", f"{row['micro_batch_changes']}")
    assert first["steps"] == 1 and row["micro_batch_changes"] == {"0": 8, "1": 2}
    assert row["n_tokens"] == whole()[0]["n_tokens"] and row["restarts"] == 1
    # fp32 sums in another order, for 12 steps
    assert row["val_loss"] == pytest.approx(whole()[0]["val_loss"], rel=1e-3)
    with pytest.raises(ConfigError, match="must divide"):
        tiny("batch.micro_batch_sequences=3")


# ---- Memory

LIMIT = """
import ctypes, resource
ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: else each thread reserves 64 MiB of addresses
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {mib} * 2**20,) * 2)
"""
WIDE = (
    "batch.sequences=256",
    "batch.sequence_length=128",
    "budget.steps=1",
    "evaluation.rows=8",
    "data.n_tokens=35000",
)


@pytest.mark.fault("B8", "Too little memory is one line with the micro-batch to try.")
@pytest.mark.fault("35", "Too little memory names the micro-batch to try.")
def test_too_little_memory_is_one_line_with_a_number(python, tmp_path, data_dir, record_property):
    process = start(python, tmp_path, data_dir, *WIDE, before=LIMIT.format(mib=140))
    _, err = process.communicate(timeout=60)
    record_property("seen", err.strip())
    assert process.returncode == 1 and err.count("\n") == 1
    assert (
        "too little memory for micro-batches of 256 sequences" in err and "try batch.micro_batch_sequences=128" in err
    )


LIMIT_BESIDE_WEIGHTS = """
from scaling_testbed.training import parts
def parallelize(*given, real=parts.parallelize):
    placed = real(*given)
    exec({limit!r})
    return placed
parts.parallelize = parallelize
"""


@pytest.mark.fault("B8", "Too little memory for the optimizer's state is said before the first evaluation.")
def test_too_little_memory_for_the_moments_is_said_at_the_start(python, tmp_path, data_dir, record_property):
    """Moments of 195 MiB; 70 MiB are there, and what the draws of the weights have left. The evaluation needs less."""
    large = ("model.n_layers=8", "model.d_ff=50000", "budget.steps=1", "evaluation.rows=1", "evaluation.tokens=64")
    before = LIMIT_BESIDE_WEIGHTS.format(limit=LIMIT.format(mib=70))
    process = start(python, tmp_path, data_dir, *large, before=before)
    out, err = process.communicate(timeout=60)
    record_property("seen", err.strip())
    assert process.returncode == 1 and err.count("\n") == 1 and "has too little memory" in err
    assert "step 0" not in out and not list(tmp_path.glob("runs/*/*/metrics.jsonl"))


@pytest.mark.fault("B8", "batch.micro_batch_sequences=auto takes what fits, falls back by halves, and the row says so.")
@pytest.mark.parametrize("estimate", ["right", "too low"])
def test_a_run_chooses_its_micro_batch(whole, python, tmp_path, data_dir, record_property, estimate):
    """Where the estimate is too low, all 256 sequences are tried first."""
    low = "from scaling_testbed.training import parts\nparts.free_memory_bytes = lambda *_: None\n"
    before = LIMIT.format(mib=140) + (low if estimate == "too low" else "")
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


@pytest.mark.slow
@pytest.mark.fault("14", "A sharded run of 2 processes goes on with 1, and again with 2: losses equal to 1e-6.")
def test_a_sharded_run_goes_on_with_one_process_and_back(world, tiny, whole, record_property):
    sharded = ("parallelism=fsdp", "checkpoint.every_steps=0")
    stop = AT_UPDATE.format(rank=1, update=5, action="os.kill(os.getpid(), signal.SIGTERM)")
    assert world.run(*sharded, before=stop)[0] == [75, 75]
    assert world.row()["steps"] == 5
    alone, _ = tiny("checkpoint.every_steps=0")
    with pytest.MonkeyPatch.context() as patch:
        calls, real = [0], updates.set_lr

        def set_lr(*given):
            calls[0] += 1
            if calls[0] == 4:
                signal.raise_signal(signal.SIGTERM)
            real(*given)

        patch.setattr(updates, "set_lr", set_lr)
        assert train(alone, quiet=True)["steps"] == 9
    assert world.run(*sharded)[0] == [0, 0]
    row = world.row()
    off = row["val_loss"] / whole()[0]["val_loss"] - 1
    record_property("seen", f"{row['restarts']} restarts, val_loss off by {off:.1e}")
    assert row["steps"] == 12 and row["restarts"] == 2 and abs(off) < 1e-6


# ---- One owner


WAITING = """
import os, time
from scaling_testbed.training import step as updates
real = updates.set_lr
def set_lr(*given, calls=[0]):
    calls[0] += 1
    while calls[0] == 6 and not os.path.exists("go on"):
        open("waits", "w").close()
        time.sleep(0.02)
    real(*given)
updates.set_lr = set_lr
"""


@pytest.fixture
def owner(python, tmp_path, data_dir):
    """A process that trains, and waits in step 6 until there is a file `go on`."""
    process = start(python, tmp_path, data_dir, before=WAITING, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "waits").exists())
    yield process
    process.kill()
    process.communicate()


@pytest.mark.fault("29", "A run whose owner is dead goes on at once; one of another machine after a minute of silence.")
def test_a_stale_lock(owner, tiny, trained, whole, record_property):
    _, folder = tiny()
    lock = folder / "lock"
    dead = json.loads(lock.read_text())
    os.kill(dead["pid"], signal.SIGKILL)
    owner.wait(timeout=20)
    elsewhere = dead | {"host": "elsewhere"}
    lock.write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match=f"is being run by elsewhere pid {dead['pid']}"):
        trained()
    silent = time.time() - 61
    os.utime(lock, (silent, silent))
    row, _ = trained()
    record_property("seen", f"taken over from {elsewhere['host']} pid {dead['pid']}, {row['status']}")
    assert row["status"] == "finished" and row["restarts"] == 1
    assert_same_bits(whole()[1], folder)


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
        short = "from scaling_testbed.runs.mirrors import mirror\nmirror.END_SECONDS = 1"
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
