"""Read files of rows (.csv, .parquet, .jsonl, .jsonl.gz and .json) of this testbed and of other projects.

pandas reads the tables. One function then converts every cell by itself, because pandas infers one type for a whole
column: an empty cell would turn 3 into 3.0. JSON holds rows already: numbers, lists and mappings stay as written.
"""

import gzip
import io
import json
from pathlib import Path
from typing import Any

from scaling_testbed.errors import UserError

Row = dict[str, Any]

NOTHING = ("", "na", "n/a", "null", "-")  # cells without a value
IDENTIFIERS = ("run_id",)  # columns of hexadecimal digits, which may look like numbers


def read_table(path: Path) -> list[Row]:
    """The rows of a file; an empty cell is None.

    Raises UserError, which names the file and, if known, the line, if the file cannot be read.
    """
    name = path.name.lower()
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return json_lines(path)
    if name.endswith(".json"):
        return _records(path)
    raise UserError(f"{path}: rows are read from .jsonl, .json, .csv or .parquet")


def is_flat(path: Path) -> bool:
    """Whether a file is a table of cells, where an empty cell means no value, and not JSON."""
    return path.name.lower().endswith((".csv", ".parquet"))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError if it cannot be read."""
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def json_lines(path: Path) -> list[Row]:
    """The JSON objects of a file, one per line. Raises UserError, which names file and line, if a line holds none."""
    return [_json_row(path, number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number} is not a JSON object; correct or delete the line")
    return row


def _records(path: Path) -> list[Row]:
    """The rows of a JSON file: a list, or the list under "rows" as in this testbed's tables."""
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must hold a list of rows")
    return rows


def _text(path: Path) -> str:
    try:
        # Spreadsheets write a byte order mark before the name of the first column; utf-8-sig removes it.
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _csv_rows(path: Path) -> list[Row]:
    import pandas

    text = _text(path)
    # pandas gets the width of the longest line. Otherwise it would refuse lines with an extra empty cell, which
    # spreadsheets write; with `usecols` it would silently drop the digits after a decimal comma.
    width = max(line.count(",") for line in text.split("\n")) + 1
    try:
        table = pandas.read_csv(
            io.StringIO(text), header=None, names=range(width), dtype=object, na_filter=False, skip_blank_lines=False
        )
    except ValueError as error:  # pandas' errors of parsing are ValueErrors
        raise UserError(f"cannot read {path}: {error}") from None
    if table.empty:
        return []
    columns = [column.tolist() for _, column in table.items()]
    named = {place: column[0] for place, column in enumerate(columns) if column[0]}
    names = list(named.values())
    if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path} has more than one column {', '.join(double)}; rename or delete one")
    for column in columns[max(named, default=-1) + 1 :]:
        if place := next((place for place, cell in enumerate(column) if cell.strip()), None):  # e.g. a decimal comma
            number = place + 1 + sum(cell.count("\n") for other in columns for cell in other[:place])
            raise UserError(f"{path}:{number} has more cells than the header has columns")
    filled = [any(map(str.strip, line)) for line in zip(*columns, strict=True)]
    kept = [[cell_value(cell, name) for cell, keep in zip(columns[place], filled, strict=True) if keep][1:]
            for place, name in named.items()]  # fmt: skip
    return [dict(zip(names, line, strict=True)) for line in zip(*kept, strict=True)]


def cell_value(cell: str, column: str = "") -> Any:
    """The value of a CSV cell: a number, true or false, None for an empty cell, or text."""
    if column not in IDENTIFIERS and "_" not in cell:  # Python would read 1_000 as a number
        for number in (int, float):
            try:
                return number(cell)
            except ValueError:
                pass
    cell = cell.strip()
    word = cell.lower()
    return None if word in NOTHING else word == "true" if word in ("true", "false") else cell


def _parquet_rows(path: Path) -> list[Row]:
    """The rows of a Parquet table. The format holds numbers and text, and no code."""
    import pandas

    try:
        # Arrow's types: those of pandas have no integers in a column with an empty cell.
        table = pandas.read_parquet(path, dtype_backend="pyarrow")
    except (OSError, ValueError, ImportError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"cannot read {path}: {error}") from None
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    columns = {
        str(name): [_plain(cell) for cell in column]
        for name, column in table.astype(object).where(table.notna(), None).items()
    }
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _plain(cell: Any) -> Any:
    """A cell as a Python value; None for NaN."""
    if isinstance(cell, float):
        return cell if cell == cell else None
    return cell.tolist() if hasattr(cell, "tolist") else cell
