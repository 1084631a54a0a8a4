"""Progress of a long preparation: a bar on a terminal, a plain line now and then elsewhere; always on
stderr."""

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes of text towards a total that is an estimate for compressed files."""

    def __init__(self, label: str, quiet: bool = False):
        self.label, self.quiet = label, quiet
        self._bar = None
        self._done = self._total = 0
        self._next_line = 0.0

    def line(self, text: str) -> None:
        """One line about something that happened."""
        if not self.quiet:
            out = self._bar.console.print if self._bar is not None else _print
            out(f"prepare {self.label}: {text}")

    def start(self, total: int, done: int = 0) -> None:
        """Begins counting towards `total` bytes, of which `done` were there already."""
        self._total, self._done = total, done
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = ("prepare {task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, markup=False))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=total, completed=done)

    def advance(self, n_bytes: int) -> None:
        """`n_bytes` more are done."""
        self._done = min(self._total, self._done + n_bytes)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self.quiet and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            share = self._done / max(1, self._total)
            self.line(f"{share:.0%} of {self._total / 1e6:,.0f} MB of text")

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
