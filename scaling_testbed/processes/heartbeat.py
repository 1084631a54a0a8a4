"""Signs of life of the processes of one run: who is gone, who hangs, and where.

Under gloo a collective with a process that is gone raises an exception. Under NCCL it waits, and with a process that
hangs it waits under both. So a thread of each process writes a beat into the store of the run: how far it has moved,
and what it does. Another thread looks at the beats, and ends this process when another one is gone or hangs. It does
not need the main thread, which waits in a collective.

A process has moved when it has started a collective or spoken to the others. All processes do this in the same order,
so the process that has moved least is the one that the others wait for.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scaling_testbed.processes.world import World

FAILURE = "failure"  # the key of the first report of a failure
BEAT_SECONDS = 2.0
DEAD_SECONDS = 4.0  # without a beat, until a process of this machine is looked for
SILENT_SECONDS = 90.0  # without a beat of a process of another machine, which cannot be looked for: it is gone
STILL_SECONDS = 60.0  # at least, before it counts that all processes are at the same place and none moves
# Functions of PyTorch whose name says too little.
NAMES = {"_engine_run_backward": "the backward pass with its all_reduce of gradients"}
PACKAGE = str(Path(__file__).resolve().parent.parent)
SAID = f"{PACKAGE}{os.sep}processes{os.sep}"  # not the place that a process is at


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    number: counts the beats. moves: collectives and talks so far. step: updates made, or None. place: the function of
    this package that the main thread is in, and what it called. alone: whether it does something that the others wait
    for without a limit. signal: the number of a signal that it was sent, or None.
    """

    number: int
    moves: int
    step: int | None
    place: str
    alone: bool
    host: str
    pid: int
    signal: int | None

    @property
    def at(self) -> str:
        return "before the first step" if self.step is None else f"at step {self.step}"


@dataclass(frozen=True)
class Finding:
    """A process that is gone, hangs or has failed. rank: None if it is not known which. error: in one line. report:
    what another process has written about it, if it did so first."""

    rank: int | None
    hangs: bool
    error: str
    report: dict[str, Any] | None = None


class Heartbeat:
    """Beats, and calls `on_finding` once, in a thread, when another process is gone or hangs. Use as a context manager.

    store: of the run; the threads use connections of their own. own: makes a beat of this process from its number.
    keeper: whether rank 0 keeps the store. limit: seconds that the others may wait for a process.
    on_beats: called with each set of beats that was read.
    """

    def __init__(
        self,
        store: dist.Store,
        world: World,
        limit: float,
        own: Callable[[int], Beat],
        on_finding: Callable[[Finding], None],
        *,
        keeper: bool,
        on_beats: Callable[[dict[int, Beat]], None] = lambda _: None,
    ):
        self.interval = min(BEAT_SECONDS, limit / 5)
        self._store, self._world, self._limit, self._own = store, world, limit, own
        self._keeper, self._on_finding, self._on_beats = keeper, on_finding, on_beats
        # Rank 0 watches all. The others watch rank 0, which would otherwise be watched by nobody.
        self._watched = list(range(world.size)) if world.is_main else [0, world.rank]
        self._stop = threading.Event()
        self._read: tuple[int, dict[int, Beat]] = (0, {})  # how often the beats were read, and the last ones
        self._late: int | None = world.rank  # the first rank that has not begun
        self._store_lost: str | None = None
        self._report: dict[str, Any] | None = None
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2)

    def stop(self) -> None:
        """Beat and watch no more."""
        self._stop.set()

    def _exchange(self) -> None:
        """Write own beats and read those of the others, until the store is gone. A store that hangs blocks this."""
        keys, number = [f"beat/{rank}" for rank in self._watched], 0
        try:
            store = self._store.clone()  # type: ignore[attr-defined]  # PyTorch has it, its stubs do not
            store.set_timeout(timedelta(seconds=max(10.0, self._limit)))
            while True:
                number += 1
                store.set(f"beat/{self._world.rank}", json.dumps(asdict(self._own(number))))
                if self._late is not None:
                    late = [rank for rank, key in zip(self._watched, keys, strict=True) if not store.check([key])]
                    self._late = late[0] if late else None
                beats = [] if self._late is not None else store.multi_get(keys)
                found = [Beat(**json.loads(beat)) for beat in beats]
                self._read = (number, dict(zip(self._watched, found, strict=False)))
                self._on_beats(self._read[1])
                if self._report is None and store.check([FAILURE]):
                    self._report = json.loads(store.get(FAILURE))
                if self._stop.wait(self.interval):
                    return
        except RuntimeError as error:  # the store's connection is closed, or it gave no answer in time
            self._store_lost = str(error).splitlines()[0]
        except BaseException:  # a defect here must not look like a process that hangs
            self._stop.set()
            raise

    def _watch(self) -> None:
        """Look at what `_exchange` read."""
        watch = _Watch(self._world, self._limit, self.interval, keeper=self._keeper)
        before = time.monotonic()
        while not self._stop.wait(self.interval / 2):
            now = time.monotonic()
            seconds, before = now - before, now
            number, beats = self._read
            if (told := self._report) is not None and told["rank"] != self._world.rank:
                finding: Finding | None = Finding(told["about"], told["peer"] == "hangs", told["error"], told)
            else:
                finding = watch.look(seconds, number, beats, self._own(0), self._late, self._store_lost)
            if finding is not None:
                self._on_finding(finding)
                return


class _Watch:
    """Judges the beats of `world` as they were read at several times."""

    def __init__(self, world: World, limit: float, interval: float, *, keeper: bool):
        self._world, self._limit, self._keeper = world, limit, keeper
        self._longest = 2 * interval  # seconds that count at once: this process may have been suspended
        self._dead = max(DEAD_SECONDS, 2 * interval) if limit > DEAD_SECONDS else limit
        self._reads = 0
        self._unread = 0.0  # seconds since the beats were read
        self._begun = 0.0  # seconds until all ranks have begun
        self._silent: dict[int, float] = {}  # seconds since the beat of a rank was another one
        self._still = 0.0  # seconds since any rank has moved
        self._beats: dict[int, Beat] = {}

    def look(
        self, seconds: float, number: int, beats: dict[int, Beat], here: Beat, late: int | None, store_lost: str | None
    ) -> Finding | None:
        """What is wrong after `seconds` more.

        number: of times that `beats` were read. here: of this process, now. late: a rank that has not begun.
        """
        seconds = min(seconds, self._longest)
        self._waits = f"rank {self._world.rank} waits in {here.place}"
        self._at = here.at
        if store_lost is not None:
            if self._keeper and not self._world.is_main:
                return Finding(0, False, f"rank 0 is gone {self._at}: {store_lost}; {self._waits}")
            return Finding(None, False, f"the store of this run is gone {self._at}: {store_lost}")
        if number == self._reads:
            self._unread += seconds
            return self._unanswered() if self._unread >= self._limit + 1 else None
        seconds += min(self._unread, seconds)  # a store that did not answer for long says nothing of the processes
        self._reads, self._unread = number, 0.0
        if late is not None:
            self._begun += seconds
            said = f"rank {late} hangs before it has begun: no sign of life for {self._begun:.0f} s"
            return Finding(late, True, said) if self._begun >= self._limit else None
        moved = {rank: beat.moves for rank, beat in beats.items()}
        idle = self._beats and moved == {rank: beat.moves for rank, beat in self._beats.items()}
        self._still = self._still + seconds if idle and not any(beat.alone for beat in beats.values()) else 0.0
        for rank, beat in beats.items():
            same = rank in self._beats and self._beats[rank].number == beat.number
            self._silent[rank] = self._silent.get(rank, 0.0) + seconds if same else 0.0
        self._beats = beats
        return self._silent_one() or self._slow_one()

    def _unanswered(self) -> Finding | None:
        what = "rank 0 hangs" if self._keeper else "torchrun, which keeps the store of this run, hangs"
        said = f"{what} {self._at}: no sign of life for {self._unread:.0f} s; {self._waits}"
        return Finding(0 if self._keeper else None, True, said)

    def _silent_one(self) -> Finding | None:
        for rank, seconds in self._silent.items():
            beat = self._beats[rank]
            here, since = beat.host == socket.gethostname(), f"no sign of life for {seconds:.0f} s"
            if rank == self._world.rank or seconds < self._dead:
                continue
            if here and not _exists(beat.pid):
                said = f"rank {rank} is gone {self._at}: process {beat.pid} has ended; {self._waits}"
                return Finding(rank, False, said)
            if not here and seconds >= min(SILENT_SECONDS, self._limit):
                return Finding(rank, False, f"rank {rank} is gone {self._at}: {since} from {beat.host}; {self._waits}")
            if seconds >= self._limit:
                said = f"rank {rank} hangs {self._at}: {since} from process {beat.pid}, which is there; {self._waits}"
                return Finding(rank, True, said)
        return None

    def _slow_one(self) -> Finding | None:
        """The rank that the others wait for. Only rank 0 sees all ranks."""
        if not self._world.is_main or not self._beats:
            return None
        moves = {rank: beat.moves for rank, beat in self._beats.items()}
        least, most = min(moves.values()), max(moves.values())
        if least == most:
            if self._still < max(STILL_SECONDS, 2 * self._limit):
                return None
            said = f"all ranks hang {self._at}: none has moved for {self._still:.0f} s; {self._waits}"
            return Finding(None, True, said)
        if self._still < self._limit:
            return None
        slow = [rank for rank, count in moves.items() if count == least]
        first = max(moves, key=lambda rank: moves[rank])
        others = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        there = self._beats[slow[0]]
        said = (
            f"rank {slow[0]}{others} hangs {there.at}: for {self._still:.0f} s it has been in {there.place}, while "
            f"rank {first} waits in {self._beats[first].place}"
        )
        return Finding(slow[0], True, said)


def _exists(pid: int) -> bool:
    """Whether a process of this machine lives; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


def collectives() -> int:
    """How many collectives this process has started, in all its process groups."""
    if not dist.is_initialized():
        return 0
    from torch.distributed.distributed_c10d import _world

    total = 0
    for group in list(_world.pg_map):
        with contextlib.suppress(RuntimeError, AttributeError):  # one that is just being made or destroyed
            total += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return total


def place() -> str:
    """What the main thread does: the innermost function of this package outside of processes/, and what it called."""
    main = threading.main_thread().ident
    frame: Any = sys._current_frames().get(main or 0)
    called = None
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(PACKAGE) and not file.startswith(SAID):
            where = f"{name} ({os.path.relpath(file, PACKAGE)}:{frame.f_lineno})"
            return where if called in (None, name) else f"{called} of {where}"
        if called is None and not name.startswith("<"):
            called = NAMES.get(name, name)
        frame = frame.f_back
    return called or "its start"
