"""Signals that ask a run to stop. They are recorded when they come, and handled between two micro-batches."""

import contextlib
import signal

from scaling_testbed.errors import STOPPED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A signal asked this run to stop; the message is the signal's name."""

    exit_status = STOPPED


class Interrupts:
    """Context manager that records SIGTERM, SIGINT, SIGUSR1 and SIGUSR2. `check` raises Interrupted after one has come.

    A warning of the scheduler (Slurm's --signal, a preemption) thus leads to a checkpoint of a whole step. Signals are
    checked between micro-batches and between evaluation batches. A second signal while a checkpoint is written changes
    nothing. Signals that were ignored before are recorded too, such as SIGINT in a process that a shell starts with &:
    the run loses nothing if it stops.
    """

    def __init__(self):
        self.requested: str | None = None
        self._at_once = False
        self._previous: dict = {}

    def __enter__(self):
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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
