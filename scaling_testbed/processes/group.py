"""Communication between the processes of one run, and how they end together.

Before training, and while rank 0 works alone for a long time (it prepares data or hashes a checkpoint), the other ranks
wait at a key-value store without a time limit. In a step they wait for `parallelism.timeout_seconds`. A process that is
gone, or that hangs for so long, is noticed by its heartbeat (heartbeat.py), also where the main thread waits in a
collective. In a run without a process group (parallelism=single) the functions here only run their action.
"""

import atexit
import collections
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.errors import FAILED, STOPPED, UserError
from scaling_testbed.processes.device import in_fp64
from scaling_testbed.processes.heartbeat import FAILURE, Beat, Finding, Heartbeat, collectives, place
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.world import World
from scaling_testbed.progress import release_streams, say

LONGEST_PAUSE = 1.0  # seconds between two looks into the store, a tenth of the time waited so far
LEAVE_SECONDS = 20  # how long rank 0 waits at the end for the other ranks
LEAVE_SECONDS_FAILED = 8  # the same after a failure, of which they read within some seconds; one of them may be dead
GRACE_SECONDS = 3  # how long the main thread may take to end by itself after another process has failed
STORE_GONE = "the process that keeps the store of this run is gone"
_uses: collections.Counter[int] = collections.Counter()  # rank -> how often its store was used; the same on every rank
_kept_stores: dict[tuple[str, int, int], dist.Store] = {}  # address, port, rank -> store, until the process ends
_ended_group = None  # the last group, kept longer than its model: see _end_group


class RankError(UserError):
    """An error of another process, with the exit status that it has there. Rank 0 prints it for all ranks."""

    told_to_all = True

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


class PeerGone(RankError):
    """Another process ended without a message; it may have been killed. The run can be resumed, as after a signal. Exit
    status 75."""

    def __init__(self, reason: str):
        super().__init__(reason, STOPPED)


class PeerHangs(PeerGone):
    """Another process does not go on. The run can be resumed, but it may hang again. Exit status 75."""


class Processes:
    """The processes of one run, seen from one of them. Use as a context manager; `connect` makes the process group.

    interrupts: the signals of this process, which are passed on to rank 0 while it works alone. step: how many updates
    are made, to say where a process hangs; None before training.
    """

    def __init__(self, world: World, config: ParallelismConfig, interrupts: Interrupts | None = None):
        self.world, self.config = world, config
        self.step: int | None = None
        self.grouped = False
        self.moves = 0  # talks and reductions; see heartbeat.py
        self._interrupts = interrupts or Interrupts()
        self._device = torch.device("cpu")
        self._talks = 0
        self._alone = False
        self._store: dist.Store | None = None
        self._heartbeat: Heartbeat | None = None
        self._record: Callable[[Exception], Exception] = lambda error: error
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self.config.kind != "single":
            self._store = self._open_store()
        if self._store is not None and self.world.size > 1:
            self._heartbeat = Heartbeat(
                self._store,
                self.world,
                self.config.timeout_seconds,
                self._beat,
                self._end,
                keeper=self.world.address is not None,
                on_beats=self._pass_on_signals,
            )
            self._heartbeat.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure in a group the other ranks wait in a collective. They read of it in the store.
        failed_in_group = self.grouped and kind is not None
        if kind is None:  # the others may be gone before this process has left the group
            self._over.set()
        if self.grouped and (not failed_in_group or self.world.size == 1):
            _end_group()
        self.grouped = False
        self._over.set()
        if self._heartbeat is not None:
            self._heartbeat.__exit__()
        if self._store is not None:
            self._leave(self._store, LEAVE_SECONDS_FAILED if failed_in_group else LEAVE_SECONDS)
        self._store = None

    def _leave(self, store: dist.Store, seconds: float, without: int | None = None) -> None:
        """Leave the store. Without torchrun rank 0 keeps it and leaves last: the others may still read from it.

        seconds: how long rank 0 waits for the others. without: a rank that is not waited for.
        """
        if self.world.address is None:
            return
        others = [f"bye/{rank}" for rank in range(1, self.world.size) if rank != without]
        with contextlib.suppress(RuntimeError):
            if self.world.is_main:
                store.wait(others, timedelta(seconds=seconds))
            else:
                store.set(f"bye/{self.world.rank}", "")

    def _open_store(self) -> dist.Store:
        if self.world.size == 1:
            return dist.HashStore()
        world, timeout = self.world, timedelta(seconds=self.config.timeout_seconds)
        try:
            if world.address is not None and world.port is not None:
                where = world.address, world.port, world.rank
                if where not in _kept_stores:
                    _kept_stores[where] = dist.TCPStore(*where[:2], world.size, world.is_main, timeout)
                kept = _kept_stores[where]
            else:
                kept, *_ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
            _uses[world.rank] += 1
            return dist.PrefixStore(f"run/{_uses[world.rank]}", kept)
        except dist.DistError as error:
            at = f"the store of rank 0 at {world.address}:{world.port}" if world.address else "torchrun's store"
            said = str(error).splitlines()[0]
            raise UserError(
                f"rank {world.rank} cannot reach {at}: {said}; are all {world.size} processes started, with the same "
                "MASTER_ADDR and a free MASTER_PORT?"
            ) from None

    def connect(self, device: torch.device) -> None:
        """Make the process group: nccl between GPUs, else gloo."""
        if self._store is None:
            return
        self._device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self.world.rank,
            world_size=self.world.size,
            # The heartbeat notices what hangs before the group does, and can say which process it is.
            timeout=timedelta(seconds=2 * self.config.timeout_seconds + 60),
            device_id=device if device.type == "cuda" else None,  # else NCCL guesses which GPU is this process's
        )
        self.grouped = True

    def on_main(self, action: Callable[[], Any], *, at_once: bool = False) -> Any:
        """Run `action` on rank 0, and return its value (plain data) on every rank. The others wait without limit.

        An error of rank 0 is raised on all ranks: unchanged on rank 0, as RankError on the others. at_once: whether a
        signal to any rank interrupts the action; rank 0 then raises Interrupted.
        """
        if self.world.size == 1:
            return action()
        key = self._next_key()
        if not self.world.is_main:
            return _value_or_error(self._read(key))
        try:
            with self._working_alone(), self._interrupts.at_once() if at_once else contextlib.nullcontext():
                value = action()
        except BaseException as error:
            self._write(key, _as_error(error))
            raise
        self._write(key, {"value": value})
        return value

    def together(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank, and return the value of this rank after all have succeeded.

        If it fails on some ranks, all ranks raise: those their own error, the others RankError with the first of these.
        """
        if self.world.size == 1:
            return action()
        key, value, failure = self._next_key(), None, None
        try:
            with self._working_alone():
                value = action()
        except Exception as error:
            failure = error
        self._write(f"{key}/{self.world.rank}", {"value": None} if failure is None else _as_error(failure))
        if failure is not None and not isinstance(failure, UserError):
            raise failure  # a defect: show its traceback on this rank
        for rank in range(self.world.size):
            _value_or_error(self._read(f"{key}/{rank}"), f"rank {rank}: " if rank else "")
        return value

    def check_alike(self, mine: Mapping[str, Any]) -> None:
        """Raise RankError on all ranks, with the name of the first difference, unless `mine`, plain data by name, is
        the same on each."""
        if self.world.size > 1:
            texts = {name: json.dumps(value) for name, value in mine.items()}
            first = self.on_main(lambda: texts)
            self.together(lambda: _check_equal(texts, first))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Elementwise maxima over the ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum_here(self, values: torch.Tensor, more: Sequence[float] = ()) -> torch.Tensor:
        """`values` and then `more`, one-dimensional in float64, summed over the ranks. The host does not wait for them.

        values: on the device of `connect`.
        """
        numbers = in_fp64(values)
        if more:
            # From memory that is not pinned, the host would wait until the GPU has computed all that is queued.
            theirs = torch.tensor(more, dtype=torch.float64, pin_memory=numbers.is_cuda)
            numbers = torch.cat([numbers, theirs.to(numbers.device, non_blocking=True)])
        if self.grouped:
            self.moves += 1
            dist.all_reduce(numbers)
        return numbers

    def _reduced(self, values: Sequence[float], operation) -> list[float]:
        if not self.grouped:
            return list(values)
        self.moves += 1
        numbers = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(numbers, operation)
        return numbers.tolist()

    def when_ended(self, record: Callable[[Exception], Exception]) -> None:
        """Set what records the end of this run in place of the main thread, if another process is gone or hangs. It
        returns the error with which this process ends."""
        self._record = record

    def first_failure(self, error: BaseException) -> UserError | None:
        """Report an error of this rank to the others, and return the cause if another rank has reported one before.

        A rank whose peer has ended knows only that a connection broke, so the first report is the cause. Returns
        PeerGone if all that is known is a broken connection, and None if `error` itself is the cause.
        """
        if self.world.size == 1 or self._store is None or isinstance(error, RankError):
            return None
        broken = _broken_connection(error) if self.grouped else None
        mine = {"rank": self.world.rank, "about": None, "peer": None, **_as_error(error)}
        if broken:
            mine |= {"error": f"another process of this run is gone: {broken}", "peer": "gone"}
            if re.search(r"[Tt]imed? ?out", broken):
                mine |= {"error": f"another process of this run hangs: {broken}", "peer": "hangs"}
        try:
            first = self._report(mine)
        except RuntimeError:
            return None if isinstance(error, UserError) else PeerGone(STORE_GONE)
        return None if first["rank"] == self.world.rank and not first["peer"] else _reported(first)

    def _report(self, failure: dict[str, Any]) -> dict[str, Any]:
        """Write `failure` into the store unless another one is there, and return the one that is there."""
        first: dict[str, Any] = json.loads(self._opened.compare_set(FAILURE, "", json.dumps(failure)))
        return first

    @contextlib.contextmanager
    def _working_alone(self) -> Iterator[None]:
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def _beat(self, number: int) -> Beat:
        asked = self._interrupts.number
        moves = self.moves + self._talks + collectives()
        return Beat(number, moves, self.step, place(), self._alone, socket.gethostname(), os.getpid(), asked)

    def _pass_on_signals(self, beats: dict[int, Beat]) -> None:
        """Before training, rank 0 takes a signal to another rank for its own. In a step all ranks share them."""
        asked = next((beat.signal for beat in beats.values() if beat.signal is not None), None)
        if asked is not None and self.world.is_main and not self.grouped and self._interrupts.number is None:
            main = threading.main_thread().ident
            if main is not None:
                signal.pthread_kill(main, asked)  # wakes it also from a wait

    def _end(self, finding: Finding) -> None:
        """End this process, because another one is gone or hangs. The main thread may not be able to: it may wait in a
        collective. It is given a moment, since a broken connection or a report of another process may end it."""
        mine: dict[str, Any] = {
            "rank": self.world.rank,
            "about": finding.rank,
            "peer": "hangs" if finding.hangs else "gone",
        }
        mine |= {"error": finding.error, "exit_status": STOPPED}
        answered = finding.report or _in_time(lambda: self._report(mine), GRACE_SECONDS)
        first = answered or mine  # without an answer, the store is gone or hangs
        if self._over.wait(GRACE_SECONDS):
            return
        error: Exception = _reported(first)
        try:
            if self.world.rank == (1 if first["about"] == 0 else 0):
                error = self._record(error)
                say(f"error: {error}", errors=True)
            if answered and self._store is not None:
                store = self._store
                _in_time(lambda: self._leave(store, LEAVE_SECONDS_FAILED, first["about"]), LEAVE_SECONDS)
            release_streams()
        finally:
            os._exit(getattr(error, "exit_status", FAILED))

    def _next_key(self) -> str:
        self._talks += 1
        return f"talk/{self._talks}"

    @property
    def _opened(self) -> dist.Store:
        if self._store is None:
            raise RuntimeError("the store is not open: use Processes as a context manager")
        return self._store

    def _write(self, key: str, value: dict[str, Any]) -> None:
        self._opened.set(key, json.dumps(value))

    def _read(self, key: str) -> dict[str, Any]:
        """Wait for the value at `key` and return it. Raises PeerGone if the process that keeps the store has ended."""
        store, waited = self._opened, 0.0
        try:
            while not store.check([key]):  # `wait` would print a warning of PyTorch, and hold back signals
                pause = min(LONGEST_PAUSE, max(0.001, waited / 10))
                time.sleep(pause)
                waited += pause
            return json.loads(store.get(key))
        except dist.DistNetworkError:
            raise PeerGone(STORE_GONE) from None


def _check_equal(here: Mapping[str, str], first: Mapping[str, str]) -> None:
    if name := next((name for name in {**first, **here} if here.get(name) != first.get(name)), None):
        what = f"{name} is {here.get(name)} there and {first.get(name)} in rank 0"
        raise RankError(f"{what}; start all processes of a run with the same words, versions and data", FAILED)


def _end_group() -> None:
    """Destroy the process group, but keep a handle to it until the next group ends.

    Freeing a gloo group waits for its threads, and these need the GIL to release a tensor. A handle in Python releases
    the GIL during this wait. The reference in DDP does not: if it were the last one, the process could wait forever. So
    the handle is kept longer than the model. It is dropped at exit while the interpreter still runs: later, no thread
    could get the GIL, and the process would abort.
    """
    global _ended_group
    _ended_group = dist.group.WORLD
    dist.destroy_process_group()


@atexit.register
def _free_ended_group() -> None:
    global _ended_group
    _ended_group = None


def _broken_connection(error: BaseException | None) -> str | None:
    """The message of gloo or NCCL about a peer that has ended, if this caused `error`; else None."""
    while error is not None:
        line = (str(error) or " ").splitlines()[0]
        if isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)", line):
            return line
        error = error.__cause__ or error.__context__
    return None


def _in_time(action: Callable[[], Any], seconds: float) -> Any:
    """The value of `action`, or None if it fails or takes longer than `seconds`."""
    found: list[Any] = []

    def attempt() -> None:
        with contextlib.suppress(Exception):
            found.append(action())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _reported(failure: dict[str, Any]) -> RankError:
    """The error of another process, from its report."""
    if failure["peer"]:
        return {"gone": PeerGone, "hangs": PeerHangs}[failure["peer"]](failure["error"])
    return RankError(f"rank {failure['rank']} failed: {failure['error']}", failure["exit_status"])


def _as_error(error: BaseException) -> dict[str, Any]:
    message = str(error) or type(error).__name__
    if not isinstance(error, UserError):
        message = f"{type(error).__name__}: {message}".splitlines()[0]
    return {"error": message, "exit_status": getattr(error, "exit_status", FAILED)}


def _value_or_error(found: dict[str, Any], prefix: str = "") -> Any:
    if "error" in found:
        raise RankError(prefix + found["error"], found["exit_status"])
    return found["value"]
