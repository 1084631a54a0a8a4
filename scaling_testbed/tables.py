"""Records as tables on a terminal, and what --out may name."""

import math
import re
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
SHORTEST_WRAPPED = 24  # of a column whose text may take several lines
NO_TERMINAL = 100_000  # columns: no table is wider
GAP = 2  # between columns


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
            room -= width + GAP
        shown = len(widths)
        yield table(self.columns[:shown], (row[:shown] for row in self.rows), widths=widths)


class Whole:
    """A table for `console().print` of which every value is shown. Where the terminal is too narrow, the names of the
    columns take several lines; where that is not enough, the columns that have no room follow below, again beside the
    first columns, which tell the rows apart.

    wrapped: the columns whose text may take several lines.
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, wrapped: Collection[str] = ()):
        self.columns, self.rows, self.wrapped = columns, list(rows), wrapped

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
        """The fewest columns at the left that tell all rows apart; the first one where all do not."""
        for count in range(1, len(self.columns) + 1):
            if len({tuple(row[:count]) for row in self.rows}) == len(self.rows):
                return list(range(count))
        return [0]


def _blocks(first: Sequence[int], least: Sequence[int], room: int) -> list[list[int]]:
    """The columns, by number, of tables that are no wider than `room`, each of which begins with `first` where there is
    room beside it."""
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
    """The parts of a column's name between which a line may end."""
    return re.findall(r"[^._=/ ]*[._=/ ]|[^._=/ ]+", name) or [""]


def _folded(name: str, width: int) -> str:
    """A column's name in lines of `width` characters, each as full as can be."""
    lines = [""]
    for piece in _pieces(name):
        if lines[-1] and cell_len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def console() -> Console:
    """Standard output: as wide as the terminal is, or as wide as the lines are where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL, soft_wrap=True)


def show(records: Sequence[dict]) -> None:
    """Print records with their filled columns."""
    keys = filled(records)
    rows = ([brief(cell(record.get(key))) for key in keys] for record in records)
    console().print(Whole(keys, rows, wrapped=("withheld", "run", "note")))


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
