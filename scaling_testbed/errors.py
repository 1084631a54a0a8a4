"""The errors that a user can cause, which commands print without a traceback, and the exit statuses."""

import math
import re
from collections.abc import Collection, Sequence

DONE, FAILED, WRONG, STOPPED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 75, 130, 141
EXIT_STATUSES = {
    DONE: "The command is done. A run has finished, or has diverged, which is a result too.",
    FAILED: "Something failed: a file, a run, a machine, or a run of a sweep. One line names it and says what to do.",
    WRONG: "The command is wrong: a key, value, verb or option. Nothing was started.",
    STOPPED: "A signal stopped the run, or one of its processes is gone or hangs, or another process owns it. The same "
    "command continues it.",
    INTERRUPTED: "Ctrl-C stopped a command that saves nothing, such as an analysis, or one that was just starting.",
    PIPE_CLOSED: "The reader of the output closed it early, as `head` does. The command may not be done.",
}


LONGEST_WORD = 300  # of a message, in characters


class UserError(Exception):
    """A wrong file, run or machine. Exit status 1.

    The message is one or two lines. It names the file, run or machine and says what to do next. It can quote what a
    damaged or foreign file holds: control characters and halves of surrogate pairs become escapes, and a long word is
    cut in its middle.
    """

    exit_status = FAILED
    told_to_all = False  # whether every process of a run raises it; then only one process prints it

    def __init__(self, message: object = ""):
        super().__init__(_printable(str(message)))


def _printable(text: str) -> str:
    text = escaped(text)
    if len(text) <= LONGEST_WORD:
        return text
    return re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda found: f"{found[0][:100]}...{found[0][-100:]}", text)


def escaped(text: str) -> str:
    """A text for a terminal, with escapes in place of control characters and halves of surrogate pairs: a log or a file
    of someone else must not move the cursor or set a title."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


class ConfigError(UserError):
    """A wrong key or value on the command line or in a config file. Exit status 2."""

    exit_status = WRONG


def check_choice(field: str, value: str, choices: Collection[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{field} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(field: str, value: float | None) -> None:
    """Raise ConfigError unless `value` is None or a finite number greater than zero."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{field} must be greater than zero and finite; got {value!r}")


def check_not_negative(field: str, value: float) -> None:
    """Raise ConfigError unless `value` is zero or a finite number greater than zero."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{field} must be finite and not negative; got {value!r}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list for a message: `a, b, c and 4 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


_NO_MEMORY = re.compile(
    r"out of memory|(can't|[Cc]annot) allocate memory|not enough memory|bad_alloc|failed to map segment"
)
_ASKED = re.compile(r"(?:allocate|size) ([\d.]+) ?(bytes|KiB|MiB|GiB)")


def is_memory_error(error: BaseException) -> bool:
    """Whether `error` says that memory could not be allocated: on a GPU, by PyTorch, NumPy or Python on a CPU, or for
    the code of a library."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError, ImportError)) and bool(_NO_MEMORY.search(str(error)))


def bytes_asked_for(error: BaseException) -> int | None:
    """How many bytes could not be allocated, if the message of a memory error says so."""
    found = _ASKED.search(str(error))
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return int(float(found[1]) * units[found[2]]) if found else None
