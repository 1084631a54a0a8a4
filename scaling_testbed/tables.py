"""Print records as tables on a terminal, and check the paths that --out names."""

import math
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from scaling_testbed.errors import ConfigError, UserError, escaped

LONGEST_CELL = 100  # characters that are printed; files hold the whole cell
SHORTEST_COLUMN = 4  # a column with less room is left out
SHORTEST_WRAPPED = 24  # least width of a column whose text may take several lines
NO_TERMINAL = 100_000  # width without a terminal; no table is wider
GAP = 2  # between columns


def cell(value: object) -> str:
    """A value as text: four significant digits, whole numbers in full, empty for None."""
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
    """The columns that have a value in at least one record."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if any(record.get(key) not in (None, "") for record in records)]


def brief(text: str, longest: int = LONGEST_CELL) -> str:
    """A text cut to at most `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    wrapped: Collection[str] = (),
    widths: Sequence[int | None] | None = None,
) -> Table:
    """A table of cells for `console().print`.

    wrapped: the columns whose text may take several lines. widths: the widths of the columns in characters. By default
    a column is as wide as its cells, and rich makes all columns narrower on a narrow terminal.
    """
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column, width in zip(columns, widths or [None] * len(columns), strict=True):
        made.add_column(Text(column), no_wrap=column not in wrapped, width=width)
    for row in rows:
        made.add_row(*map(Text, row))  # as Text, so that rich does not read brackets in a value as markup
    return made


class LeftFirst:
    """A table for `console().print` that shows as many columns as fit, from the left.

    On a narrow terminal the last column shown may be shortened, and the columns to its right are left out.
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[str]]):
        self.columns, self.rows = columns, _shown(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room, widths = options.max_width, []
        for column in zip(self.columns, *self.rows, strict=True):
            width = max(map(cell_len, column))
            if room < min(width, SHORTEST_COLUMN):
                break
            widths.append(min(width, room))
            room -= width + GAP
        shown = len(widths)
        yield table(self.columns[:shown], (row[:shown] for row in self.rows), widths=widths)


class Whole:
    """A table for `console().print` that shows every value.

    On a narrow terminal, the names of the columns take several lines. If that is not enough, the remaining columns
    follow in further tables below. Each repeats the first columns, which distinguish the rows.

    wrapped: the columns whose text may take several lines.
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, wrapped: Collection[str] = ()):
        self.columns, self.rows, self.wrapped = columns, _shown(rows), wrapped

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.columns:
            return
        widest, least = [], []
        for name, *cells in zip(self.columns, *self.rows, strict=True):
            cell_width = max(map(cell_len, cells), default=0)
            widest.append(max(cell_len(name), cell_width))
            if name in self.wrapped:
                cell_width = min(cell_width, SHORTEST_WRAPPED)
            least.append(min(options.max_width, max(cell_width, *map(cell_len, _pieces(name)))))
        for number, block in enumerate(_blocks(self._first_columns(), least, options.max_width)):
            if number:
                yield ""
            spare = options.max_width - _taken(least, block)
            widths = {}
            for column in block:
                wished = min(widest[column], least[column] + spare)
                useful = wished == widest[column] or self.columns[column] in self.wrapped
                widths[column] = wished if useful else least[column]
                spare -= widths[column] - least[column]
            made = table(
                [_folded(self.columns[column], widths[column]) for column in block],
                ([row[column] for column in block] for row in self.rows),
                widths=[widths[column] for column in block],
            )
            for column, shown in zip(block, made.columns, strict=True):
                if widths[column] < widest[column]:
                    shown.no_wrap, shown.overflow = False, "fold"
            yield made

    def _first_columns(self) -> list[int]:
        """The smallest number of left columns that distinguish all rows; only the first if all columns do not."""
        for count in range(1, len(self.columns) + 1):
            if len({tuple(row[:count]) for row in self.rows}) == len(self.rows):
                return list(range(count))
        return [0]


def _shown(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[escaped(text) for text in row] for row in rows]


def _blocks(first: Sequence[int], least: Sequence[int], room: int) -> list[list[int]]:
    """The column numbers of tables that are at most `room` wide. Each table begins with `first` if that leaves room."""
    if _taken(least, first) > room / 2:
        first = first[:1]
    blocks = [list(first)]
    for column in range(len(first), len(least)):
        if blocks[-1] != list(first) and _taken(least, [*blocks[-1], column]) > room:
            blocks.append(list(first))
        blocks[-1].append(column)
        if _taken(least, blocks[-1]) > room:
            blocks[-1:] = [blocks[-1][:-1], [column]] if len(blocks) == 1 else [[column]]
    return blocks


def _taken(least: Sequence[int], columns: Sequence[int]) -> int:
    return sum(least[column] for column in columns) + GAP * (len(columns) - 1)


def _pieces(name: str) -> list[str]:
    """The parts of a column's name. A line may end between two parts."""
    return re.findall(r"[^._=/ ]*[._=/ ]|[^._=/ ]+", name) or [""]


def _folded(name: str, width: int) -> str:
    """A column's name in lines of at most `width` characters, each as full as possible."""
    lines = [""]
    for piece in _pieces(name):
        if lines[-1] and cell_len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def console() -> Console:
    """Standard output, as wide as the terminal. Without a terminal, lines are not wrapped."""
    return Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL, soft_wrap=True)


def show(records: Sequence[dict]) -> None:
    """Print records with their filled columns."""
    keys = filled(records)
    rows = ([brief(cell(record.get(key))) for key in keys] for record in records)
    console().print(Whole(keys, rows, wrapped=("withheld", "run", "note")))


def check_out(out: Path | None, read: Sequence[Path]) -> None:
    """Raise ConfigError if `out` is one of the files to read."""
    if out is not None and out.resolve() in [path.resolve() for path in read]:
        raise ConfigError(f"--out {out} is also an input and would be overwritten; give another --out")


def prepare(folder: Path) -> None:
    """Make the output folder. Raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --out") from None
