"""Rows as whoever asks has them: the path of a study, a study that is loaded, mappings, or a pandas DataFrame."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.study import ALIASES, Row, Study, load, name_of
from scaling_testbed.analysis.rows.study import where as only
from scaling_testbed.errors import UserError
from scaling_testbed.runs.row import FINAL

Given = Any  # str | Path | Study | Iterable[Mapping[str, Any]] | pandas.DataFrame; pandas is not loaded to say so
AT_HAND = "rows at hand"  # what stands for a path in messages and records


def study_of(given: Given, where: Sequence[str] = ()) -> Study:
    """The study of rows in any form, of which a mapping alone is one run, and of it the runs that fit every condition.
    Raises what `load` and `where` of study.py raise, and UserError for what is no row."""
    if isinstance(given, (str, Path)):
        given = load(given)
    study = given if isinstance(given, Study) else _at_hand(given)
    return only(study, where)


def _at_hand(given: Iterable[Mapping[str, Any]]) -> Study:
    if hasattr(given, "to_dict"):
        rows = _records(given)
    elif isinstance(given, Iterable) and not isinstance(given, Mapping):
        rows = list(given)
    else:
        rows = [given]
    if bad := [row for row in rows if not isinstance(row, Mapping)]:
        raise UserError(
            f"rows are a path, a DataFrame, or mappings, each a run; got {type(bad[0]).__name__} {bad[0]!r}"
        )
    rows = [_named({**row, "row": row.get("row", place)}) for place, row in enumerate(rows, 1)]
    finals = [row for row in rows if row.get("status", "finished") in FINAL]
    others = [row for row in rows if row.get("status", "finished") not in FINAL]
    missing = [{**row, "label": f"{name_of(row)} ({row['status']})"} for row in others]
    return Study(name=AT_HAND, path=Path(AT_HAND), rows=finals, missing=missing)


def _records(frame) -> list[Row]:
    """Rows of a DataFrame, None where it has no value. A run without its result and without a status is one to come."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict(orient="records")
    empty = [any(key in row and row[key] is None for key in ("val_loss", "value")) for row in rows]
    return [
        {**row, "status": "missing"} if none and row.get("status") is None else row
        for row, none in zip(rows, empty, strict=True)
    ]


def _named(row: Row) -> Row:
    """With our names for the columns that a hand-made table calls otherwise; without an empty status."""
    added = {full: row[short] for short, full in ALIASES.items() if short in row and full not in row}
    return {key: value for key, value in {**row, **added}.items() if key != "status" or value is not None}
