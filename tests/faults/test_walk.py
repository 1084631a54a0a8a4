"""A random walk over a sweep and a run of two ranks: kills, full disks, touched files. The end is always that of an
undisturbed sweep, to the bit.

SCALING_TESTBED_WALK_SECONDS (600) is its length, SCALING_TESTBED_WALK_SEED (0) chooses the events. Their moments depend
on the machine, so that a walk is not repeated exactly; a failure tells all events.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from scaling_testbed.runs import checkpoint
from tests.training.conftest import metrics

SECONDS = float(os.environ.get("SCALING_TESTBED_WALK_SECONDS", 600))
SEED = int(os.environ.get("SCALING_TESTBED_WALK_SEED", 0))
EVENTS_IN_A_ROUND = 30
ROOT = Path(__file__).resolve().parent.parent.parent
SWEEP = """
overrides: [data=markov, data.n_tokens=20000, data.n_validation_tokens=4000, batch.sequences=8,
            batch.sequence_length=16, budget.steps=300, evaluation.every_steps=40, evaluation.tokens=1024,
            checkpoint.every_steps=20, logging.every_steps=5, compute.threads=1, compute.device=cpu]
axes:
  model: [bigram, nano_s]
  optimizer.lr: [1e-3, 1e-2]
seeds: [0, 1]
"""
RUN = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000", "batch.sequences=8", "model=nano_s"]
RUN += ["batch.sequence_length=16", "budget.steps=150", "evaluation.every_steps=40", "evaluation.tokens=1024"]
RUN += ["checkpoint.every_steps=20", "compute.threads=1", "compute.device=cpu", "parallelism=ddp", "name=ranks"]
RANK = "import os, sys\nopen({pid!r}, 'w').write(str(os.getpid()))\nfrom scaling_testbed.train import main\n"
OF_A_START = ("wall_seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "restarts", "runs_dir", "overrides")


class Walk:
    """The processes of one sweep and of one run of two ranks, below `runs`, and what is done to them."""

    def __init__(self, python: str, folder: Path, runs: Path, chance: random.Random):
        self.python, self.folder, self.runs, self.chance = python, folder, runs, chance
        self.log: list[str] = []
        self.driver: subprocess.Popen | None = None
        self.ranks: list[subprocess.Popen] = []
        self.finished: dict[Path, bytes] = {}
        self.filler = runs / "filler"

    def words(self) -> list[str]:
        return [f"runs_dir={self.runs}", f"data_dir={self.folder / 'data'}"]

    def command(self, verb: str) -> list[str]:
        return [self.python, "-m", "scaling_testbed.sweep", verb, f"sweep={self.folder / 'walk.yaml'}", *self.words()]

    def start_driver(self, verb: str = "run") -> None:
        fresh = self.chance.choice([[], [], ["--fresh"]])
        with open(self.folder / "driver.log", "a") as log:
            command = [*self.command(verb), "--workers", "2", *fresh]
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def start_ranks(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        self.ranks = []
        for rank in range(2):
            code = RANK.format(pid=str(self.folder / f"rank{rank}")) + f"sys.exit(main({[*RUN, *self.words()]!r}))"
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(self.folder / f"rank{rank}.log", "a") as log:
                options = {"stdout": log, "stderr": log, "env": environment, "cwd": ROOT}
                self.ranks.append(subprocess.Popen([self.python, "-c", code], **options))

    def rows(self) -> dict[Path, dict]:
        """The row of each run that has one."""
        found = {}
        for path in self.runs.glob("*/*/result.json"):
            with contextlib.suppress(OSError, ValueError):
                found[path.parent] = json.loads(path.read_bytes())
        return found

    def look(self) -> None:
        """A run that has finished stays as it is."""
        for folder, row in self.rows().items():
            if row["status"] == "finished":
                now = (folder / "result.json").read_bytes()
                assert self.finished.setdefault(folder, now) == now, f"{folder} has finished twice"
        assert all((folder / "result.json").exists() for folder in self.finished), "a finished run is lost"

    def disturb(self) -> None:
        """One event. Killing is the most frequent one."""
        event = self.chance.choice(
            [self.kill_run, self.kill_run, self.kill_rank, self.kill_driver, self.kill_parent, self.fill, self.touch]
        )
        self.log.append(f"{event.__name__} {event()}")

    def kill_driver(self) -> str:
        number = self.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        self.driver.send_signal(number)
        return number.name

    def kill_parent(self) -> str:
        """The warm parent of runs, which a driver started that writes here."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if b"scaling_testbed.processes.warm" in path.read_bytes().split(b"\0"):
                    driver = (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
                    if os.readlink(f"/proc/{driver}/fd/1").startswith(str(self.folder)):
                        os.kill(int(path.parent.name), signal.SIGKILL)
                        return path.parent.name
        return "nobody"

    def kill_run(self) -> str:
        return self.kill([owner(lock) for lock in sorted(self.runs.glob("walk/*/lock"))])

    def kill_rank(self) -> str:
        return self.kill([number_in(self.folder / f"rank{rank}") for rank in range(2)])

    def kill(self, pids: list[int]) -> str:
        """Kill one of these processes. A number may be another process's by now: only one that writes here is ours."""
        number = self.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
        for pid in self.chance.sample(pids, len(pids)):
            with contextlib.suppress(OSError):
                process = os.pidfd_open(pid)
                try:
                    if os.readlink(f"/proc/{pid}/fd/1").startswith(str(self.folder)):
                        signal.pidfd_send_signal(process, number)
                        return f"{pid} {number.name}"
                finally:
                    os.close(process)
        return "nobody"

    def fill(self) -> str:
        """The disk is full for a while."""
        with contextlib.suppress(OSError), open(self.filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        seconds = self.chance.uniform(0.2, 2)
        time.sleep(seconds)
        self.filler.unlink(missing_ok=True)
        return f"{seconds:.1f} s"

    def touch(self) -> str:
        """A file gets another time and keeps its bytes."""
        files = [path for place in (self.runs, self.folder / "data") for path in place.rglob("*") if path.is_file()]
        path = self.chance.choice(
            [path for path in files if path.name not in ("lock", "filler", ".lock")] or [self.runs]
        )
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (1.7e9, self.chance.uniform(1e9, 1.9e9)))
        return path.name

    def round(self, deadline: float) -> None:
        """Disturb until enough has happened, then let everything end."""
        events = 0
        while events < EVENTS_IN_A_ROUND and time.monotonic() < deadline and not self.is_done():
            if self.driver is None or self.driver.poll() is not None:
                self.start_driver(self.chance.choice(["run", "retry"]))
            if not self.ranks or all(rank.poll() is not None for rank in self.ranks):
                self.start_ranks()
            time.sleep(self.chance.uniform(0.1, 1.5))
            self.disturb()
            self.look()
            events += 1
        self.end()
        for attempt in range(8):
            for verb in ("retry", "run"):
                self.start_driver(verb)
                status = self.driver.wait(timeout=300)
            self.start_ranks()
            statuses = [rank.wait(timeout=300) for rank in self.ranks]
            self.look()
            self.log.append(f"undisturbed, {attempt + 1}: {status} {statuses}")
            if (status, *statuses) == (0, 0, 0):
                return
        raise AssertionError("the runs do not come to their end")

    def is_done(self) -> bool:
        rows = self.rows()
        return len(rows) == 9 and all(row["status"] == "finished" for row in rows.values())

    def end(self) -> None:
        """End what still runs: a signal first, so that it saves."""
        self.filler.unlink(missing_ok=True)
        for process in [self.driver, *self.ranks]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in [self.driver, *self.ranks]:
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=120)
                process.kill()


def owner(lock: Path) -> int:
    """The process in a lock file; 0, which is none, where it names nobody."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        return json.loads(lock.read_text())["pid"]
    return 0


def number_in(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


@pytest.fixture
def disk(tmp_path):
    """A disk of 48 MiB where this process may mount one; else a folder in which nothing is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True)
    yield folder, mounted.returncode == 0
    subprocess.run(["umount", "-l", folder], capture_output=True)


def content(folder: Path) -> tuple[dict, list, dict]:
    """Row, metrics and state of a run, without what a clock or a start decides."""
    row = json.loads((folder / "result.json").read_text())
    row = {key: value for key, value in row.items() if key not in OF_A_START}
    tensors = checkpoint.load(checkpoint.latest(folder / "checkpoints")).tensors
    return row, metrics(folder), {key: tensors[key] for key in ("model", "optimizer")}


def assert_same(one, other, where=""):
    """Two nests of plain values and tensors are equal, to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for at, value in enumerate(one):
            assert_same(value, other[at], f"{where}/{at}")
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.fault("C: random walk", "After kills, full disks and touched files a sweep ends as an undisturbed one.")
def test_a_random_walk_ends_in_the_bits_of_an_undisturbed_sweep(python, tmp_path, disk, record_property):
    (tmp_path / "walk.yaml").write_text(SWEEP)
    chance, (place, is_small) = random.Random(SEED), disk
    undisturbed = Walk(python, tmp_path, tmp_path / "undisturbed", chance)
    undisturbed.round(deadline=0)
    expected = {folder.name: content(folder) for folder in undisturbed.rows()}
    assert len(expected) == 9
    deadline, rounds, events = time.monotonic() + SECONDS, 0, []
    while time.monotonic() < deadline:
        walk = Walk(python, tmp_path, place / f"round{rounds}", chance)
        walk.runs.mkdir()
        if not is_small:
            walk.fill = lambda: "no small disk"
        try:
            walk.round(deadline)
            assert {folder.name for folder in walk.rows()} == set(expected)
            for folder in walk.rows():
                assert_same(content(folder), expected[folder.name], folder.name)
        except BaseException:
            walk.end()
            print("\n".join(walk.log), *(path.read_text()[-3000:] for path in tmp_path.glob("*.log")), sep="\n")
            raise
        subprocess.run(["rm", "-rf", walk.runs])
        rounds, events = rounds + 1, events + walk.log
    kinds = {name: sum(line.startswith(name) for line in events) for name in ("kill", "fill", "touch")}
    record_property("seen", f"{rounds} rounds of 9 runs, {kinds}; 0 differences in rows, metrics, weights")
