"""Rows in any accepted form: the path of a study, a loaded study, mappings, or a pandas DataFrame."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.study import Study, in_our_words, load, unfinished
from scaling_testbed.analysis.rows.study import where as only
from scaling_testbed.errors import UserError
from scaling_testbed.runs.row import FINAL

Given = Any  # str | Path | Study | Iterable[Mapping[str, Any]] | pandas.DataFrame, without an import of pandas
AT_HAND = "rows at hand"  # replaces the path in messages and records


def study_of(given: Given, where: Sequence[str] = ()) -> Study:
    """The study of rows in any form, restricted to the runs that match every condition.

    A single mapping is one run. Raises as `load` and `where` of study.py do, and UserError if an item is not a row.
    """
    if isinstance(given, (str, Path)):
        given = load(given)
    study = given if isinstance(given, Study) else _at_hand(given)
    return only(study, where)


def _at_hand(given: Given) -> Study:
    if is_frame := hasattr(given, "to_dict"):  # a missing value becomes None
        given = given.astype(object).where(given.notna(), None).to_dict(orient="records")
    rows = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else [given]
    if bad := [row for row in rows if not isinstance(row, Mapping)]:
        raise UserError(
            f"rows must be a path, a DataFrame or one mapping per run; got {type(bad[0]).__name__} {bad[0]!r}"
        )
    ours = in_our_words(map(dict, rows), is_frame, AT_HAND)
    finals = [row for row in ours if row.get("status", "finished") in FINAL]
    return Study(name=AT_HAND, path=Path(AT_HAND), rows=finals, missing=unfinished(ours))
