"""Rows in files of four formats, whole or not at all."""

import errno
import json
import os

import pandas
import pytest

from scaling_testbed.analysis.figures import drawing
from scaling_testbed.errors import UserError
from scaling_testbed.row_files import ENDINGS, FIGURES, beside, one_per_line, write_rows

ROWS = [{"a": 1, "b": "x,y", "list": [1, 2]}, {"a": 2.5, "c": True, "large": 2**70}]


def test_every_row_and_column_is_there_in_each_format(tmp_path):
    for ending in ENDINGS:
        write_rows(tmp_path / f"rows{ending}", ROWS)
    assert json.loads((tmp_path / "rows.json").read_text()) == ROWS
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ROWS
    for found in (pandas.read_csv(tmp_path / "rows.csv"), pandas.read_parquet(tmp_path / "rows.parquet")):
        assert list(found.columns) == ["a", "b", "list", "c", "large"]
        assert list(found["a"]) == [1.0, 2.5] and found["b"][0] == "x,y"
        assert json.loads(found["list"][0]) == [1, 2] and float(found["large"][1]) == 2.0**70
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(ENDINGS)  # no temporary file is left


def test_a_list_is_one_document_with_an_entry_on_each_line():
    assert json.loads(one_per_line(ROWS)) == ROWS and len(one_per_line(ROWS).splitlines()) == 2
    assert json.loads(one_per_line([])) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    for ending in ENDINGS:
        with pytest.raises(UserError, match=f"cannot write .*none/rows{ending}"):
            write_rows(tmp_path / "none" / f"rows{ending}", ROWS)


@pytest.mark.fault("C: full disk", "On a full disk a table or figure that was there stays, and no part of one is left.")
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, record_property):
    panel = drawing.Panel(lines=[drawing.Line(x=[1.0, 2.0], y=[3.0, 4.0])], x_label="x", y_label="y")
    writers = dict.fromkeys(ENDINGS, lambda path: write_rows(path, ROWS))
    writers |= dict.fromkeys(FIGURES, lambda path: drawing.save([panel], [path]))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for ending, write in writers.items():
        path = tmp_path / f"rows{ending}"
        path.write_text("before")
        with pytest.raises(UserError, match=f"cannot write {path}: the disk is full"):
            write(path)
        assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == len(writers)
    record_property("seen", f"{', '.join(writers)} as before")


def test_what_is_found_lies_in_the_folder_or_beside_the_file(tmp_path):
    assert beside(tmp_path, "analysis") == tmp_path / "analysis"
    assert beside(tmp_path / "rows.csv", "report.html") == tmp_path / "rows_report.html"
