"""Mirror the records of a run to metrics.csv, a table with a column for each number."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.files import write_text
from scaling_testbed.runs.metrics import STEP_METRICS
from scaling_testbed.runs.mirrors.mirror import Record, numbers

CSV = "metrics.csv"
_ORDER = {metric.name: place for place, metric in enumerate(STEP_METRICS)}


class CsvFile:
    """metrics.csv in the folder of a run. The columns are those of the numbers so far: the step and its metrics, then
    diagnostics in the order in which they came. A record with a new number replaces the file by one with its column."""

    def __init__(self, folder: Path, rows: Sequence[Record]):
        self._path = folder / CSV
        self._columns = ["step"]
        self._replace([_cells(row) for row in rows])

    def log(self, row: Record) -> None:
        cells = _cells(row)
        if cells.keys() <= set(self._columns):
            with open(self._path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(cells)
            return
        with open(self._path, newline="", encoding="utf-8") as file:
            before: list[dict[str, Any]] = list(csv.DictReader(file))
        self._replace([*before, cells])

    def finish(self, row: dict[str, Any]) -> None:
        """Nothing is left to do: each record is in the file when it is added."""

    def fail(self) -> None:
        """As `finish`."""

    def _replace(self, rows: Iterable[dict[str, Any]]) -> None:
        names = dict.fromkeys([*self._columns, *(name for row in rows for name in row)])
        self._columns = sorted(names, key=lambda name: _ORDER.get(name.partition(".")[0], len(_ORDER)))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self._path, text.getvalue())


def _cells(row: Record) -> dict[str, Any]:
    """A record as cells with the text of metrics.jsonl. null is an empty cell."""
    return {"step": row["step"]} | {name: json.dumps(value) for name, value in numbers(row).items()}
