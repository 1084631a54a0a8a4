"""Write rows to a .csv, .json, .jsonl or .parquet file. The endings of other outputs are here too."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.files import write_bytes, write_text

ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
FIGURES = (".png", ".svg", ".pdf")
PAGE = (".html",)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace `path` by the rows, with one column for each field of any row.

    In .csv and .parquet, lists and mappings are JSON text. Raises UserError that names the file if it cannot be
    written, and KeyError for another ending.
    """
    WRITERS[path.suffix](path, rows)


def beside(rows: Path, name: str) -> Path:
    """The default path of an output made from rows: in their folder, or beside their file with its stem as prefix."""
    return rows / name if rows.is_dir() else rows.with_name(f"{rows.stem}_{name}")


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    buffer = io.StringIO()
    cells = _cells(rows)
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in cells for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    write_text(path, buffer.getvalue())


def _json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, one_per_line(rows) + "\n")


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pandas

    content = io.BytesIO()
    pandas.DataFrame(_cells(rows)).apply(_storable).to_parquet(content, index=False)
    write_bytes(path, content.getvalue())


def one_per_line(rows: Sequence[Any]) -> str:
    """A JSON list with one entry on each line."""
    return "[" + ",\n ".join(map(json.dumps, rows)) + "]"


def _storable(column):
    """A column of cells with one type, which Parquet can store."""
    types = {type(value) for value in column.dropna()}
    if len(types) < 2:
        return column
    return column.astype(float) if types <= {int, float} else column.map(str, na_action="ignore")


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{_cell(key): _cell(value) for key, value in row.items()} for row in rows]


def _cell(value: Any) -> Any:
    """A value for a table: lists and mappings as JSON text, integers over 64 bits as float."""
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair, which no UTF-8 has
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        try:
            return float(value)
        except OverflowError:
            return str(value)
    return value


WRITERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
