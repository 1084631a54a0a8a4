"""Rows as whoever asks has them: the path of a study, a study that is loaded, mappings, or a pandas DataFrame."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.study import Study, in_our_words, load, unfinished
from scaling_testbed.analysis.rows.study import where as only
from scaling_testbed.runs.row import FINAL

Given = Any  # str | Path | Study | Iterable[Mapping[str, Any]] | pandas.DataFrame; pandas is not loaded to say so
AT_HAND = "rows at hand"  # what stands for a path in messages and records


def study_of(given: Given, where: Sequence[str] = ()) -> Study:
    """The study of rows in any form, and of it the runs that fit every condition. Raises what `load` and `where` of
    study.py raise."""
    if isinstance(given, (str, Path)):
        given = load(given)
    study = given if isinstance(given, Study) else _at_hand(given)
    return only(study, where)


def _at_hand(given: Iterable[Mapping[str, Any]]) -> Study:
    is_frame = hasattr(given, "to_dict")
    if is_frame:  # None where it has no value
        given = given.astype(object).where(given.notna(), None).to_dict(orient="records")
    rows = in_our_words(map(dict, given), is_flat=is_frame)
    finals = [row for row in rows if row.get("status", "finished") in FINAL]
    return Study(name=AT_HAND, path=Path(AT_HAND), rows=finals, missing=unfinished(rows))
