"""Signals: those that ask a run to stop, and Ctrl-C while a command starts. No other module reads them.

A run records a signal when it comes, and handles it between two micro-batches. Does not import torch.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scaling_testbed.errors import INTERRUPTED, STOPPED
from scaling_testbed.processes.world import is_main_process

# SIGHUP: the terminal or the connection is gone. SIGXCPU: a limit of processor time is near (ulimit -t, Grid Engine).
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
INTERRUPTED_LINE = "error: interrupted; type the same command to continue"


class Interrupted(Exception):
    """A signal asked this run to stop; the message is the signal's name."""

    exit_status = STOPPED


def end_quietly() -> None:
    """Let Ctrl-C end this process with one line, until `raised` takes over. For the first line of an entry point: its
    imports take a second, and Python's own answer to Ctrl-C is a traceback. A signal that is ignored stays ignored."""
    handle([signal.SIGINT], _end, only_from=signal.default_int_handler)


def _end(*_: object) -> None:
    if is_main_process():
        with contextlib.suppress(OSError):
            os.write(2, f"{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Context in which Ctrl-C raises KeyboardInterrupt again where `end_quietly` was called, so that work is cleaned
    up."""
    previous = handle([signal.SIGINT], signal.default_int_handler, only_from=_end)
    try:
        yield
    finally:
        restore(previous)


def handle(
    numbers: Sequence[signal.Signals], handler: Callable[[int, Any], object], *, only_from: Any = None
) -> dict[signal.Signals, Any]:
    """Install `handler`, and return the previous handlers for `restore`. only_from: the handler that is replaced; None:
    any but one that ignores the signal. nohup and a shell's & ignore signals, so that a process continues."""
    previous = {}
    for number in numbers:
        now = signal.getsignal(number)
        if now == only_from or (only_from is None and now is not signal.SIG_IGN):
            previous[number] = signal.signal(number, handler)
    return previous


def restore(previous: Mapping[signal.Signals, Any]) -> None:
    """Install the handlers that `handle` returned."""
    for number, handler in previous.items():
        signal.signal(number, handler)


class Interrupts:
    """Context manager that records the signals that ask a run to stop. `check` raises Interrupted after one has come.

    A warning of the scheduler (Slurm's --signal, a preemption) thus leads to a checkpoint of a whole step. Signals are
    checked between micro-batches and between evaluation batches. A second signal while a checkpoint is written changes
    nothing. Signals that were ignored before are recorded too, such as SIGINT in a process that a shell starts with &:
    the run loses nothing if it stops. Only SIGHUP stays ignored, because `nohup` asks for it. Python handles signals in
    the main thread alone, so a run in another thread is not stopped by them.
    """

    def __init__(self):
        self.requested: str | None = None
        self._at_once = False
        self._previous: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        restore(self._previous)

    @property
    def entered(self) -> bool:
        """Whether this object handles signals. Not in a process that it was sent to, as by a launcher of Hydra."""
        return signal.getsignal(signal.SIGTERM) == self._note

    @property
    def number(self) -> int | None:
        """The number of the signal that has come, or None."""
        return None if self.requested is None else int(signal.Signals[self.requested])

    def _note(self, number, _frame):
        self.requested = self.requested or signal.Signals(number).name
        if self._at_once:
            self._at_once = False
            self.check()

    @contextlib.contextmanager
    def at_once(self):
        """Context manager in which a signal raises Interrupted at once, for work that may be interrupted anywhere."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def counts(self) -> list[int]:
        """For each signal 1 if it has come to this rank (the first one counts), else 0. They are summed over ranks."""
        return [int(self.requested == number.name) for number in _SIGNALS]

    def check_counts(self, counts) -> None:
        """Raise Interrupted if a signal came to any of the ranks whose `counts` were summed."""
        for number, count in zip(_SIGNALS, counts, strict=True):
            if count:
                raise Interrupted(number.name)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted(self.requested)
