"""The progress of a run or a preparation: elapsed time, and the bar or lines on the terminal.

All that a run prints goes through this module (`say` and the classes of progress), and through the logger
`scaling_testbed` of the standard library, whose level decides what is printed. Printing never raises: a closed terminal
or pipe, a full disk behind standard output, or a name that its encoding lacks stops no run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0  # plain lines of a preparation
_CANNOT_PRINT = (OSError, ValueError)  # a broken pipe, a full disk, a closed stream, a character without a code


# Details, ordinary lines, warnings and errors, and above these the results of a command, which are always printed.
DETAIL, LINE, WARNING, RESULT = logging.DEBUG, logging.INFO, logging.WARNING, logging.CRITICAL
LEVELS = {"quiet": WARNING, "normal": LINE, "verbose": DETAIL}
VERBOSITY = "SCALING_TESTBED_VERBOSITY"  # the variable with one of LEVELS by which a command tells its workers
LOGGER = logging.getLogger("scaling_testbed")


class _Printer(logging.Handler):
    """Prints records on the standard streams of the moment, those of `say` with errors on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if getattr(record, "errors", record.levelno >= WARNING) else sys.stdout
        if stream is None:
            return
        try:
            print(_encodable(record.getMessage(), stream), file=stream, flush=True)
        except BrokenPipeError:  # its reader, such as `head`, is gone for good
            _discard(stream)
        except _CANNOT_PRINT:
            pass


LOGGER.addHandler(_Printer())
LOGGER.propagate = False  # a handler of the root logger would print each line a second time
LOGGER.setLevel(LEVELS.get(os.environ.get(VERBOSITY, ""), LINE))


def say(text: str, *, errors: bool = False, level: int | None = None) -> None:
    """Print `text` on standard output, or on standard error if `errors`. Never raises: what cannot be printed is lost.
    A character that the stream's encoding lacks is printed as its number.

    level: of the logger; None: WARNING if `errors`, else LINE."""
    LOGGER.log(level or (WARNING if errors else LINE), text, extra={"errors": errors})


@contextlib.contextmanager
def verbosity(asked: str | None) -> Iterator[None]:
    """Context in which so much is printed: one of LEVELS. None: what the variable VERBOSITY says, else as before."""
    before = LOGGER.level
    LOGGER.setLevel(LEVELS.get(asked or os.environ.get(VERBOSITY, ""), before))
    try:
        yield
    finally:
        LOGGER.setLevel(before)


def for_workers() -> dict[str, str]:
    """The environment by which a process prints as much as this one."""
    return {VERBOSITY: next((name for name, level in LEVELS.items() if level == LOGGER.level), "normal")}


def open_streams() -> None:
    """Prepare the standard streams of a command.

    /dev/null takes the place of each stream that was closed before this process began. Without this, the next file that
    the process opens gets the number of the stream, and what libraries print ends in that file. Standard output shows a
    character that its encoding lacks as its number, as standard error does.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 (held until the end)
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        with contextlib.suppress(ValueError):  # it is closed
            sys.stdout.reconfigure(errors="backslashreplace")


def release_streams() -> None:
    """Flush the standard streams. What cannot be written is lost, so that the end of Python does not fail because of
    it, which would change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except _CANNOT_PRINT:
            _discard(stream)


def _discard(stream: Any) -> None:
    """Let what is printed on `stream` from now on, and what it holds, go to /dev/null."""
    with contextlib.suppress(*_CANNOT_PRINT):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def _encodable(text: str, stream: Any) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return escaped(text).encode(encoding, "backslashreplace").decode(encoding)


class Clock:
    """Measures the wall seconds of a run over all its starts, and the seconds that steps took since this start.

    before: wall seconds of earlier starts.
    """

    def __init__(self, before: float = 0.0):
        self._before = before
        self._began = self._step_began = time.monotonic()
        self._steps, self._seconds = 0, 0.0
        self._recent_steps, self._recent_seconds = 0, 0.0

    def begin_step(self) -> None:
        """Begin a step now. Without this call it began when the last one ended."""
        self._step_began = time.monotonic()

    def end_step(self) -> None:
        now = time.monotonic()
        self._steps += 1
        if self._steps > 1:  # the first step of a process compiles, allocates and warms caches
            self._seconds += now - self._step_began
            self._recent_steps += 1
            self._recent_seconds += now - self._step_began
        self._step_began = now

    @property
    def wall_seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def tokens_per_second(self, tokens_per_step: float) -> float | None:
        """Mean tokens per second since the second step of this start; None before the second step."""
        return (self._steps - 1) * tokens_per_step / self._seconds if self._steps > 1 else None

    def take_ms_per_step(self) -> float | None:
        """Mean milliseconds of the steps since the last call, without evaluations; None if the only one is the first of
        this start."""
        steps, seconds = self._recent_steps, self._recent_seconds
        self._recent_steps, self._recent_seconds = 0, 0.0
        return 1000 * seconds / steps if steps else None


class Progress:
    """Shows the work done out of a total: a bar with the time left on a terminal, plain lines otherwise.

    prefix: the start of every line. errors: print to standard error instead of standard output. quiet: print nothing.
    """

    def __init__(self, *, prefix: str = "", errors: bool = False, quiet: bool = False):
        self._prefix, self._errors, self._quiet = prefix, errors, quiet
        self._stream = sys.stderr if errors else sys.stdout
        self._bar: RichProgress | None = None

    @property
    def has_bar(self) -> bool:
        """Whether a bar is shown. Then a line for each step is not needed."""
        return self._bar is not None

    def start(self, total: float, done: float = 0) -> None:
        """Begin at `done` out of `total`, both in the caller's unit. total: infinite if it is not known."""
        self._total, self._first, self._began = total, done, time.monotonic()
        if not self._quiet and LOGGER.isEnabledFor(LINE) and _is_terminal(self._stream):
            from rich.console import Console

            shown = self._bar = bar(Console(file=self._stream))
            known = total if total < math.inf else None
            self._task = shown.add_task("", total=known, completed=done)  # type: ignore[arg-type]  # rich takes a fraction too
            with self._or_no_bar():
                shown.start()

    def move(self, done: float, text: str) -> None:
        """Move the bar to `done`, and show `text` beside it."""
        if self._bar is not None:
            with self._or_no_bar():
                self._bar.update(self._task, completed=done, description=_encodable(text, self._stream))

    def say(self, text: str, level: int = LINE) -> None:
        """Print `text` on a line of its own, if lines of this level are printed."""
        text = self._prefix + text
        if not LOGGER.isEnabledFor(level):
            return
        if self._bar is not None:
            with self._or_no_bar():
                shown = _encodable(text, self._stream)
                self._bar.console.print(shown, highlight=False, markup=False, soft_wrap=True)
        elif not self._quiet:
            say(text, errors=self._errors, level=level)

    def rate(self, done: float) -> float | None:
        """Units per second since the start; None before anything is done."""
        seconds = time.monotonic() - self._began
        return (done - self._first) / seconds if done > self._first and seconds > 0 else None

    def left(self, done: float) -> str:
        """The time left as text; empty at the start, at the end, and where the total is not known."""
        rate = self.rate(done)
        return f"{clock((self._total - done) / rate)} left" if rate and done < self._total < math.inf else ""

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            with self._or_no_bar():
                self._bar.stop()
            self._bar = None

    @contextlib.contextmanager
    def _or_no_bar(self) -> Iterator[None]:
        """Context manager for a use of the bar. If the terminal is gone, there is no bar from then on."""
        try:
            yield
        except _CANNOT_PRINT:
            self._bar = None


def _is_terminal(stream: Any) -> bool:
    with contextlib.suppress(*_CANNOT_PRINT):
        return stream is not None and stream.isatty()
    return False


def bar(console: Console) -> RichProgress:
    """A bar of rich: time left, bar, text. A narrow terminal shortens only the text."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    text = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    return RichProgress(TimeRemainingColumn(), BarColumn(bar_width=12), text, console=console, expand=True)


class RunProgress(Progress):
    """Reports step, loss, learning rate, speed, memory and time left of a run.

    line_every: steps between plain lines. A step with an evaluation always prints a line. is_limit: whether `steps` is
    only an upper limit, so that the time left is not known.
    """

    def __init__(self, steps: int, done: int, *, line_every: int, quiet: bool = False, is_limit: bool = False):
        super().__init__(quiet=quiet)
        self._steps, self._line_every, self._lines = steps, line_every, done // line_every
        self.start(math.inf if is_limit else steps, done)

    def shorten(self, steps: int) -> None:
        """Count towards `steps` from now on."""
        self._steps = self._total = steps
        if self._bar is not None:
            with self._or_no_bar():
                self._bar.update(self._task, total=steps)

    def update(self, row: dict[str, Any]) -> None:
        """Show a row of metrics that was just written."""
        step, evaluated = row["step"], "val_loss" in row
        self.move(step, _describe({key: value for key, value in row.items() if key != "val_loss"}, self._steps))
        if evaluated or (not self.has_bar and step // self._line_every > self._lines):
            self._lines = step // self._line_every
            self.say(f"{_describe(row, self._steps)}  {'' if self.has_bar else self.left(step)}".rstrip())


class ByteProgress(Progress):
    """Reports a long preparation on standard error, in bytes of text. Without a bar it prints a line every ten seconds.

    The total is an estimate for compressed files.
    """

    def __init__(self, label: str, *, quiet: bool = False):
        super().__init__(prefix=f"prepare {label}: ", errors=True, quiet=quiet)
        self._label, self._done = label, 0.0

    def start(self, total: float, done: float = 0) -> None:
        super().start(total, done)
        self._done, self._next_line = done, time.monotonic() + SECONDS_BETWEEN_LINES

    def advance(self, n_bytes: int) -> None:
        """Add `n_bytes` to the bytes done."""
        self._done = min(self._total, self._done + n_bytes)
        rate = self.rate(self._done)
        speed = f", {rate / 1e6:,.1f} MB/s" if rate else ""
        said = f"{self._done / max(1, self._total):.0%} of {self._total / 1e6:,.0f} MB of text{speed}"
        self.move(self._done, f"{said}, prepare {self._label}")
        if not self.has_bar and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self.say(f"{said}  {self.left(self._done)}".rstrip())


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _describe(row: dict[str, Any], steps: int) -> str:
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    for key, label, form in (
        ("train_loss", "loss", ".4f"),
        ("val_loss", "val_loss", ".4f"),
        ("lr", "lr", ".2e"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("ms_per_step", "ms/step", ",.1f"),
        ("mfu", "MFU", ".1%"),
    ):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:{form}}")
    if row.get("peak_memory_bytes") is not None:
        parts.append(f"{row['peak_memory_bytes'] / 2**30:.2f} GiB")
    return "  ".join(parts)
