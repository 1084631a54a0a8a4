"""Results as tables on a terminal, and what --out may name."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scaling_testbed.errors import ConfigError, UserError

LONGEST_CELL = 100  # printed; files hold all of it


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


def _brief(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"


def show(records: Sequence[dict]) -> None:
    """Print records with their filled columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in filled(records):
        table.add_column(Text(key), no_wrap=key not in ("withheld", "run", "note"))
    for record in records:
        # As Text: brackets in a value are no markup.
        table.add_row(*(Text(_brief(cell(record.get(key)))) for key in filled(records)))
    (Console() if sys.stdout.isatty() else Console(width=400, soft_wrap=True)).print(table)


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
