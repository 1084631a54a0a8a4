"""Communication between the processes of one run, and how they end together.

Before training, and while rank 0 works alone for a long time (it prepares data or hashes a checkpoint), the other ranks
wait at a key-value store without a time limit. The collectives of a step have a limit, `parallelism.timeout_seconds`.
In a run without a process group (parallelism=single) the functions here only run their action.
"""

import atexit
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.errors import FAILED, STOPPED, UserError
from scaling_testbed.processes.world import World

WAIT_SECONDS = 30  # one wait at the store, which is then repeated
LEAVE_SECONDS = 20  # how long rank 0 waits at the end for the other ranks
STORE_GONE = "the process that keeps the store of this run is gone"
_uses = itertools.count()  # how often this process used the launcher's store; the same on every rank
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
        super().__init__(f"another process of this run is gone: {reason}", STOPPED)


class Processes:
    """The processes of one run, seen from one of them. Use as a context manager; `connect` makes the process group."""

    def __init__(self, world: World, config: ParallelismConfig):
        self.world, self.config = world, config
        self.grouped = False
        self._device = torch.device("cpu")
        self._talks = 0
        self._store: dist.Store | None = None

    def __enter__(self) -> Self:
        if self.config.kind != "single":
            self._store = self._open_store()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure in a group the other ranks wait in a collective until this process has ended.
        failed_in_group = self.grouped and kind is not None
        if self.grouped and (not failed_in_group or self.world.size == 1):
            _end_group()
        self.grouped = False
        if self.world.address is not None and self._store is not None and not failed_in_group:
            self._leave(self._store)
        self._store = None

    def _leave(self, store: dist.Store) -> None:
        """Leave the store. Without torchrun rank 0 keeps it and leaves last: the others may still read from it."""
        others = [f"bye/{rank}" for rank in range(1, self.world.size)]
        with contextlib.suppress(RuntimeError):
            if self.world.is_main:
                store.wait(others, timedelta(seconds=LEAVE_SECONDS))
            else:
                store.set(f"bye/{self.world.rank}", "")

    def _open_store(self) -> dist.Store:
        if self.world.size == 1:
            return dist.HashStore()
        world, timeout = self.world, timedelta(seconds=self.config.timeout_seconds)
        try:
            if world.address is not None and world.port is not None:
                return dist.TCPStore(world.address, world.port, world.size, world.is_main, timeout)
            launchers, *_ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
            return dist.PrefixStore(f"run/{next(_uses)}", launchers)
        except dist.DistError as error:
            where = f"{world.address}:{world.port}" if world.address else "torchrun's store"
            raise UserError(f"rank {world.rank} cannot reach {where}: {str(error).splitlines()[0]}") from None

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
            timeout=timedelta(seconds=self.config.timeout_seconds),
        )
        self.grouped = True

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0, and return its value (plain data) on every rank. The others wait without limit.

        An error of rank 0 is raised on all ranks: unchanged on rank 0, as RankError on the others.
        """
        if self.world.size == 1:
            return action()
        key = self._next_key()
        if not self.world.is_main:
            return _value_or_error(self._read(key))
        try:
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
            value = action()
        except Exception as error:
            failure = error
        self._write(f"{key}/{self.world.rank}", {"value": None} if failure is None else _as_error(failure))
        if failure is not None and not isinstance(failure, UserError):
            raise failure  # a defect: show its traceback on this rank
        for rank in range(self.world.size):
            _value_or_error(self._read(f"{key}/{rank}"), f"rank {rank}: " if rank else "")
        return value

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Elementwise maxima over the ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], operation) -> list[float]:
        if not self.grouped:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(numbers, operation)
        return numbers.tolist()

    def first_failure(self, error: BaseException) -> UserError | None:
        """Report an error of this rank to the others, and return the cause if another rank has reported one before.

        A rank whose peer has ended knows only that a connection broke, so the first report is the cause. Returns
        PeerGone if all that is known is a broken connection, and None if `error` itself is the cause.
        """
        if self.world.size == 1 or self._store is None or isinstance(error, RankError):
            return None
        broken = _broken_connection(error) if self.grouped else None
        mine = json.dumps({"rank": self.world.rank, "broken": broken, **_as_error(error)})
        try:
            first = json.loads(self._store.compare_set("failure", "", mine))
        except RuntimeError:
            return None if isinstance(error, UserError) else RankError(STORE_GONE, 1)
        if first["broken"]:
            return PeerGone(first["broken"])
        if first["rank"] != self.world.rank:
            return RankError(f"rank {first['rank']} failed: {first['error']}", first["exit_status"])
        return None

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
        """Wait for the value at `key` and return it. Raises RankError if the process that keeps the store has ended."""
        store = self._opened
        while True:
            try:
                store.wait([key], timedelta(seconds=WAIT_SECONDS))
                return json.loads(store.get(key))
            except dist.DistNetworkError:
                raise RankError(STORE_GONE, 1) from None
            except dist.DistStoreError:
                continue  # not there yet


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


def _as_error(error: BaseException) -> dict[str, Any]:
    message = str(error) or type(error).__name__
    if not isinstance(error, UserError):
        message = f"{type(error).__name__}: {message}".splitlines()[0]
    return {"error": message, "exit_status": getattr(error, "exit_status", FAILED)}


def _value_or_error(found: dict[str, Any], prefix: str = "") -> Any:
    if "error" in found:
        raise RankError(prefix + found["error"], found["exit_status"])
    return found["value"]
