"""Read files of rows of this testbed and of other projects.

Tables of cells are .csv, .tsv and .txt, with any of , ; | and tab between the cells, and .parquet. JSON is .json,
.jsonl and .ndjson. All but .parquet may be compressed by gzip. Every cell is converted by itself, because one type for
a whole column would turn 3 beside an empty cell into 3.0. JSON holds rows already: its values stay as written.
"""

import csv
import gzip
import io
import re
import zlib
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.names import DECIMAL_COMMA, Row, is_text, nearest_first, plain
from scaling_testbed.errors import UserError
from scaling_testbed.files import parse_json

CELLS, JSON_LINES = (".csv", ".tsv", ".tab", ".psv", ".txt"), (".jsonl", ".ndjson")
READ = ".csv, .tsv, .txt, .parquet, .json or .jsonl (the text formats also as .gz)"
SPREADSHEET = "save its sheet as CSV"
OTHERS = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), SPREADSHEET),
    **dict.fromkeys((".feather", ".arrow", ".ipc", ".orc", ".avro", ".h5", ".hdf5"), "save it as Parquet or CSV"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz", ".rds", ".rdata"), "save it as CSV or Parquet"),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z"), "unpack it first"),
    **dict.fromkeys((".db", ".sqlite", ".duckdb"), "save its table as CSV or Parquet"),
    **dict.fromkeys((".yaml", ".yml", ".html", ".md"), "write a table or JSON"),
}
MAGIC = {b"PK\x03\x04": SPREADSHEET, b"\xd0\xcf\x11\xe0": SPREADSHEET, b"PAR1": "name it .parquet"}
NOTHING = ("", "na", "n/a", "null", "-")  # cells without a value
DELIMITERS = (",", "\t", ";", "|")
csv.field_size_limit(2**31 - 1)


def read_table(path: Path) -> list[Row]:
    """The rows of a file; an empty cell is None.

    Raises UserError, which names the file and, if known, the line, if the file cannot be read.
    """
    ending = _ending(path)
    if ending == ".parquet":
        return _parquet_rows(path)
    if ending in CELLS:
        return _csv_rows(path)
    if ending in JSON_LINES:
        return json_lines(path)
    if ending == ".json":
        return _records(path)
    advice = f"; {OTHERS[ending]}" if ending in OTHERS else ""
    raise UserError(f"{path}: rows are read from {READ}{advice}")


def is_flat(path: Path) -> bool:
    """Whether a file is a table of cells, where an empty cell means no value, and not JSON."""
    return _ending(path) in (*CELLS, ".parquet")


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def json_lines(path: Path) -> list[Row]:
    """The JSON objects of a file, one per line, or the objects of one list.

    Raises UserError, which names file and line, if a line holds none.
    """
    return _objects(path, _text(path))


def _objects(path: Path, text: str) -> list[Row]:
    if re.match(r"\s*\[\s*(\{|\]\s*$)", text):
        return _list_of_rows(path, parse_json(text, path, expect=list))
    lines = enumerate(text.split("\n"), 1)  # not splitlines: a text in JSON may hold U+2028 and U+0085
    advice = "correct or delete the line"
    return [parse_json(line, f"{path}:{number}", advice=advice) for number, line in lines if line.strip()]


def _records(path: Path) -> list[Row]:
    """The rows of a JSON file: a list, the list under "rows" as in this testbed's tables, or one object per line."""
    text = _text(path)
    if len(text.strip().split("\n")) > 1 and all(
        re.match(r"\s*(\{.*\})?\s*$", line) for line in text.split("\n")
    ):  # JSON lines under another name
        return _objects(path, text)
    content = parse_json(text, path, expect=object)
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        return _list_of_rows(path, content["rows"])
    if isinstance(content, dict):
        keys = nearest_first("rows", content, 6)
        wanted = 'a list of rows, as pandas writes with orient="records", or one under the key rows'
        raise UserError(f"{path} must hold {wanted}; it is an object with {keys}")
    return _list_of_rows(path, content)


def _list_of_rows(path: Path, content: Any) -> list[Row]:
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path} must hold a list of rows, each a JSON object")
    return content


def _text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 with its byte order mark; \\n between lines."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    for magic, advice in MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"cannot read {path}: it is no text; {advice}")
    # Spreadsheets write a byte order mark before the name of the first column; these decoders remove it.
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"cannot read {path}: it holds zero bytes and is no text in UTF-8; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _csv_rows(path: Path) -> list[Row]:
    text = _text(path).lstrip("\n")
    delimiter = _delimiter(text)
    if re.match(r"sep=.\n", text):  # Excel's own note
        text = text[6:]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[tuple[int, list[str]]] = []  # number of the first line of a record, and its cells
    before = 0
    try:
        for cells in reader:
            lines.append((before + 1, cells))
            before = reader.line_num
    except csv.Error as error:
        raise UserError(f"cannot read {path}:{before + 1} as cells with {delimiter!r} between them: {error}") from None
    lines = [(number, cells) for number, cells in lines if any(map(str.strip, cells))]
    if not lines:
        return []
    header, *body = lines
    names = [name.strip(" \t\u00a0") for name in header[1]]
    width = max((place for place, name in enumerate(names, 1) if name), default=0)
    names = names[:width]
    if double := [name for name in dict.fromkeys(filter(None, names)) if names.count(name) > 1]:
        raise UserError(f"{path} has more than one column {', '.join(double)}; rename or delete one")
    if delimiter != "," and body and all(names) and all(len(cells) == width + 1 for _, cells in body):
        body = [(number, cells[1:]) for number, cells in body]  # names of rows, which R writes without a header
    if body and len(body[-1][1]) < width and not text.endswith("\n"):
        raise UserError(f"{path}:{body[-1][0]} has fewer cells than the header, and the file ends there; it was cut")
    rows = []
    for number, cells in body:
        if any(map(str.strip, cells[width:])):  # e.g. a decimal comma
            raise UserError(f"{path}:{number} has more cells than the header has columns")
        if delimiter == ";" and (comma := next((c for c in cells if DECIMAL_COMMA.fullmatch(c.strip())), None)):
            raise UserError(f"{path}:{number} has the number {comma.strip()!r}: write the decimal comma as a point")
        cells += [""] * (width - len(cells))
        rows.append({name: cell_value(cell, name) for name, cell in zip(names, cells, strict=False) if name})
    return rows


def _delimiter(text: str) -> str:
    """What separates the cells: the character that divides most of the first lines into as many cells as the header."""
    if match := re.match(r"sep=(.)\n", text):
        return match[1]

    def score(delimiter: str) -> tuple[float, int]:
        try:
            lines = [cells for cells in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter) if any(cells)]
        except csv.Error:
            return (0.0, 0)
        width = len(lines[0]) if lines else 0
        alike = [len(cells) in (width, width + 1) for cells in lines]
        return (round(sum(alike) / len(alike), 1), width) if width > 1 else (0.0, 0)

    sample = "\n".join(text.split("\n", 30)[:30])
    return max(DELIMITERS, key=score)  # the first one where several are alike


def cell_value(cell: str, column: str = "") -> Any:
    """The value of a cell: a number, true or false, None for an empty cell, or text."""
    if "_" not in cell and not is_text(column):  # Python would read 1_000 as a number
        for number in (int, float):
            try:
                return number(cell)
            except ValueError:
                pass
    cell = plain(cell.strip())
    word = cell.lower()
    return None if word in NOTHING else word == "true" if word in ("true", "false") else cell


def _parquet_rows(path: Path) -> list[Row]:
    """The rows of a Parquet file, or of a folder of them as Spark writes it. The format holds no code."""
    import pandas

    try:
        # Arrow's types: those of pandas have no integers in a column with an empty cell.
        table = pandas.read_parquet(path, dtype_backend="pyarrow")
        if any(name is not None for name in table.index.names):
            table = table.reset_index()
        names = list(map(str, table.columns))
        cells = [
            [_plain_cell(cell) for cell in column.astype(object).where(column.notna(), None)]
            for _, column in table.items()
        ]
    except Exception as error:  # a damaged file fails in pandas and in pyarrow, also at its cells, in many ways
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path} has more than one column {', '.join(double)}; rename or delete one")
    return [dict(zip(names, line, strict=True)) for line in zip(*cells, strict=True)]


def _plain_cell(cell: Any) -> Any:
    """A cell as a Python value; None for NaN."""
    value = plain(cell)
    return None if isinstance(value, float) and value != value else value
