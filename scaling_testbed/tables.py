"""Records as tables on a terminal, and what --out may name."""

import math
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from scaling_testbed.errors import ConfigError, UserError

LONGEST_CELL = 100  # printed; files hold all of it
SHORTEST_COLUMN = 4  # with less room it is left out


def cell(value: object) -> str:
    """A value for a person: four significant digits, whole numbers whole, nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and 1000 <= value < 1e15:
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def filled(records: Sequence[dict]) -> list[str]:
    """The columns that hold something in some record."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if any(record.get(key) not in (None, "") for record in records)]


def brief(text: str, longest: int = LONGEST_CELL) -> str:
    """A text with what passes `longest` characters cut off."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    wrapped: Collection[str] = (),
    widths: Sequence[int | None] | None = None,
) -> Table:
    """Rows of cells for a terminal, for `console().print`.

    wrapped: the columns whose text may take several lines. widths: of the columns, in characters; by default as wide as
    their cells, or all narrower where the terminal is.
    """
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column, width in zip(columns, widths or [None] * len(columns), strict=True):
        made.add_column(Text(column), no_wrap=column not in wrapped, width=width)
    for row in rows:
        made.add_row(*map(Text, row))  # as Text: brackets in a value are no markup
    return made


class LeftFirst:
    """A table for `console().print` of which a narrow terminal shows the columns at the left whole, one shortened, and
    none of those at the right."""

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[str]]):
        self.columns, self.rows = columns, list(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room, widths = options.max_width, []
        for column in zip(self.columns, *self.rows, strict=True):
            width = max(map(cell_len, column))
            if room < min(width, SHORTEST_COLUMN):
                break
            widths.append(min(width, room))
            room -= width + 2
        shown = len(widths)
        yield table(self.columns[:shown], (row[:shown] for row in self.rows), widths=widths)


def console() -> Console:
    """Standard output: as wide as the terminal is, or as wide as the lines are where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=400, soft_wrap=True)


def show(records: Sequence[dict]) -> None:
    """Print records with their filled columns."""
    keys = filled(records)
    rows = ([brief(cell(record.get(key))) for key in keys] for record in records)
    console().print(table(keys, rows, wrapped=("withheld", "run", "note")))


def check_out(out: Path | None, read: Sequence[Path]) -> None:
    """Raises ConfigError where the file to be written is one that is read."""
    if out is not None and out.resolve() in [path.resolve() for path in read]:
        raise ConfigError(f"--out {out} is what is read; it would be lost")


def prepare(folder: Path) -> None:
    """Make the output folder. Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --out") from None
