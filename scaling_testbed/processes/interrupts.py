"""Signals that ask a run to stop: noted when they come, acted on between two micro-batches."""

import contextlib
import signal

from scaling_testbed.errors import STOPPED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A signal asked this run to stop; the message is the signal's name."""

    exit_status = STOPPED


class Interrupts:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 only leave a note, which `check` turns into Interrupted.

    A scheduler's warning (Slurm's --signal, a preemption) thus ends in a checkpoint at a whole step. Polled between
    micro-batches and between evaluation batches; a second signal while a checkpoint is being written changes nothing.
    A signal that was ignored, as a shell ignores SIGINT for what it starts with &, is taken too: nothing is lost by it.
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
        """Whether signals come here: not in another process that these were sent to, as by a launcher of Hydra."""
        return signal.getsignal(signal.SIGTERM) == self._note

    def _note(self, number, _frame):
        self.requested = self.requested or signal.Signals(number).name
        if self._at_once:
            self._at_once = False
            self.check()

    @contextlib.contextmanager
    def at_once(self):
        """While entered, a signal raises Interrupted where it comes: for work that may break off anywhere."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def counts(self) -> list[int]:
        """For each signal, whether it was the one that came here: to be added up over ranks."""
        return [int(self.requested == number.name) for number in _SIGNALS]

    def check_counts(self, counts) -> None:
        """Raise Interrupted if a signal came to any of the ranks whose `counts` were added up."""
        for number, count in zip(_SIGNALS, counts, strict=True):
            if count:
                raise Interrupted(number.name)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted(self.requested)
