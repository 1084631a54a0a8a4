"""Files of rows: .csv, .parquet, .jsonl, .jsonl.gz and .json, our own and others'.

pandas reads the tables; every cell then passes through one function, because a guess of pandas about a whole column
would turn 3 into 3.0 beside an empty cell. JSON holds rows already: numbers, lists and mappings stay as written.
"""

import gzip
import io
import json
from pathlib import Path
from typing import Any

from scaling_testbed.errors import UserError

Row = dict[str, Any]

NOTHING = ("", "na", "n/a", "null", "-")  # in a cell
IDENTIFIERS = ("run_id",)  # hexadecimal digits, which may look like a number


def read_table(path: Path) -> list[Row]:
    """The rows of a file, None where a cell is empty. Raises UserError naming the file, and the line where one is at
    fault, for what cannot be read."""
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
    """Whether a file is a table of cells, in which an empty cell is no value, rather than JSON."""
    return path.name.lower().endswith((".csv", ".parquet"))


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError where it cannot be read."""
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def json_lines(path: Path) -> list[Row]:
    """A JSON object on each line. Raises UserError naming file and line where there is none."""
    return [_json_row(path, number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number} is no row in JSON; mend or delete the line")
    return row


def _records(path: Path) -> list[Row]:
    """A JSON file with a list of rows, or with one under "rows" as our own tables are."""
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no list of rows")
    return rows


def _text(path: Path) -> str:
    try:
        # Spreadsheets put a mark before the first column's name, which utf-8-sig takes off.
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _csv_rows(path: Path) -> list[Row]:
    import pandas

    text = _text(path)
    # pandas is told of the longest line: it would refuse one with an empty cell more than the header, as spreadsheets
    # write them, and with `usecols` it would drop what a decimal comma has cut off.
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
        if place := next((place for place, cell in enumerate(column) if cell.strip()), None):  # a decimal comma, say
            number = place + 1 + sum(cell.count("\n") for other in columns for cell in other[:place])
            raise UserError(f"{path}:{number} has more cells than the header has columns")
    filled = [any(map(str.strip, line)) for line in zip(*columns, strict=True)]
    kept = [[cell_value(cell, name) for cell, keep in zip(columns[place], filled, strict=True) if keep][1:]
            for place, name in named.items()]  # fmt: skip
    return [dict(zip(names, line, strict=True)) for line in zip(*kept, strict=True)]


def cell_value(cell: str, column: str = "") -> Any:
    """A cell of a CSV file: number, true or false, None for nothing, or text."""
    if column not in IDENTIFIERS and "_" not in cell:  # to Python 1_000 is a number
        for number in (int, float):
            try:
                return number(cell)
            except ValueError:
                pass
    cell = cell.strip()
    word = cell.lower()
    return None if word in NOTHING else word == "true" if word in ("true", "false") else cell


def _parquet_rows(path: Path) -> list[Row]:
    """Rows of a Parquet table: the format holds numbers and text, and no code."""
    import pandas

    try:
        # Arrow's own types: pandas' have no whole numbers in a column with an empty cell.
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
    """A cell as Python has it, None also for what is no number."""
    if isinstance(cell, float):
        return cell if cell == cell else None
    return cell.tolist() if hasattr(cell, "tolist") else cell
