"""How far a run is: the time it took, and what a person sees of it (a bar on a terminal, plain lines otherwise)."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Clock:
    """Wall seconds of a run over all its starts, and the seconds of this start's steps without the rest.

    before: wall seconds of earlier starts.
    """

    def __init__(self, before: float = 0.0):
        self._before = before
        self._began = self._step_began = time.monotonic()
        self._steps, self._seconds = 0, 0.0

    def begin_step(self) -> None:
        self._step_began = time.monotonic()

    def end_step(self) -> None:
        self._steps += 1
        if self._steps > 1:  # the first step of a process compiles, allocates and warms caches
            self._seconds += time.monotonic() - self._step_began

    @property
    def wall_seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """None before the second step."""
        return (self._steps - 1) * tokens_per_step / self._seconds if self._steps > 1 else None


class RunProgress:
    """Reports step, loss, learning rate, tokens/s and time left. `quiet` says nothing at all.

    line_every: steps between plain lines; a step with an evaluation always has its line.
    """

    def __init__(self, steps: int, done: int, *, line_every: int, quiet: bool = False):
        self._steps, self._first, self._line_every, self._quiet = steps, done, line_every, quiet
        self._lines = done // line_every
        self._began = time.monotonic()
        self._bar = None
        if not quiet and sys.stdout.isatty():
            columns = (BarColumn(bar_width=12), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._bar.start()

    def say(self, text: str) -> None:
        """One line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif not self._quiet:
            print(text, flush=True)

    def update(self, row: dict[str, Any]) -> None:
        """A metrics row was written."""
        line = _describe(row, self._steps)
        if self._bar is not None:
            if "val_loss" in row:
                self.say(line)
            line = _describe({key: value for key, value in row.items() if key != "val_loss"}, self._steps)
            self._bar.update(self._task, completed=row["step"], description=line)
        elif "val_loss" in row or row["step"] // self._line_every > self._lines:
            self._lines = row["step"] // self._line_every
            self.say(f"{line}  {self._left(row['step'])}".rstrip())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, step: int) -> str:
        if not self._first < step < self._steps:
            return ""
        left = (time.monotonic() - self._began) / (step - self._first) * (self._steps - step)
        return f"{clock(left)} left"


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
    ):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:{form}}")
    return "  ".join(parts)
