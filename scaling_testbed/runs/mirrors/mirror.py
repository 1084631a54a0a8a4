"""Mirrors of metrics.jsonl: the same records in the form that another tool reads.

A mirror is made anew at each start from the lines of metrics.jsonl that the run keeps, and gets each further line when
it is written. So it has no line twice and lacks none, also after a kill.
"""

import atexit
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from scaling_testbed.errors import first_line
from scaling_testbed.progress import say

END_SECONDS = 10  # how long the end of a run waits for a mirror

Record: TypeAlias = dict[str, Any]  # a line of metrics.jsonl


class Target(Protocol):
    """What a tool reads. It is opened with the records of earlier starts. Its methods may raise."""

    def log(self, row: Record) -> None:
        """Add a record."""

    def finish(self, row: dict[str, Any]) -> None:
        """Add what is shown of the row of the run, and close."""

    def fail(self) -> None:
        """Close without a row."""


class Mirror:
    """Keeps a target in a thread of its own. It cannot stop a run, and delays only its end, by END_SECONDS at most. A
    failure is one warning, after which the mirror is off."""

    def __init__(
        self,
        name: str,
        open_target: Callable[[Sequence[Record]], Target],
        rows: Sequence[Record],
        *,
        give_up: Callable[[], None] = lambda: None,
    ):
        """name: of the tool, and of the package that it needs, for messages. open_target: called in the thread with
        `rows`, the records of earlier starts. give_up: what lets the process end although the tool hangs."""
        self._name, self._let_go = name, give_up
        self._todo: queue.SimpleQueue[Callable[[Target], object] | None] = queue.SimpleQueue()
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(lambda: open_target(rows),), daemon=True)
        self._thread.start()

    def log(self, row: Record) -> None:
        """Mirror a record, as it is in metrics.jsonl."""
        self._ask(lambda target: target.log(row))

    def finish(self, row: dict[str, Any]) -> None:
        """Mirror the row of the run, and wait until everything is done."""
        self._ask(lambda target: target.finish(row))
        self._end()

    def _fail(self) -> None:
        """End the mirror of a run that has no row."""
        self._ask(lambda target: target.fail())
        self._end()

    def _ask(self, action: Callable[[Target], object]) -> None:
        if not self._off.is_set():
            self._todo.put(action)

    def _work(self, open_target: Callable[[], Target]) -> None:
        """Open the target and do what is asked, in a thread."""
        try:
            target = open_target()
            atexit.register(self._fail)  # registered after the tool's own hook, so it runs before that
            while (action := self._todo.get()) is not None:
                action(target)
        except BaseException as error:  # wandb raises exceptions of its own, and SystemExit
            reason = first_line(error)
            if isinstance(error, ModuleNotFoundError) and error.name == self._name:
                reason = f"it is not installed; pip install {self._name}"
            self._give_up(reason)

    def _end(self) -> None:
        """Wait for what was asked. What is not done then is given up, so that the process can end."""
        if self._off.is_set():
            return
        self._todo.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"no answer in {END_SECONDS} s at the end of the run")
        self._off.set()
        atexit.unregister(self._fail)

    def _give_up(self, reason: str) -> None:
        if self._off.is_set():
            return
        self._off.set()
        say(f"warning: {self._name} is off for the rest of this run: {reason}; metrics.jsonl has all", errors=True)
        with contextlib.suppress(Exception):
            self._let_go()


def numbers(row: Record) -> dict[str, float]:
    """The numbers of a record by name, without the step and without null. Numbers that have names themselves, such as
    the losses of validation sets, are called val_loss_by_set.NAME."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": one for name, one in value.items() if one is not None}
        elif key != "step" and value is not None:
            found[key] = value
    return found
