"""What a file of rows holds is what is read: no number, name or line is changed or lost without a word."""

import gzip
import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from scaling_testbed.analysis.rows.tables import cell_value, read_table
from scaling_testbed.errors import UserError


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        *(("3", 3), (" 12 ", 12), ("12345678901234567890123", 12345678901234567890123), ("1e-3", 0.001)),
        *(("3.0", 3.0), ("True", True), ("false", False), ("", None), ("NA", None), ("n/a", None), ("-", None)),
        *(("null", None), ("2024_01", "2024_01"), ("2024-01-01", "2024-01-01"), (" text ", "text"), ("1,5", "1,5")),
    ],
)
def test_a_cell_is_a_number_a_truth_nothing_or_text(cell, value):
    found = cell_value(cell)
    assert found == value and type(found) is type(value)


def read(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path)


def test_a_whole_number_stays_one_beside_an_empty_cell(tmp_path):
    rows = read(tmp_path / "rows.csv", f"n,seed\n{2**70},\n,1\n")
    assert rows == [{"n": 2**70, "seed": None}, {"n": None, "seed": 1}] and type(rows[1]["seed"]) is int
    table = pyarrow.table({"n": [2**62 + 1, None], "list": [[1, 2], None], "loss": [float("nan"), 2.5]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = read_table(tmp_path / "rows.parquet")
    assert rows == [{"n": 2**62 + 1, "list": [1, 2], "loss": None}, {"n": None, "list": None, "loss": 2.5}]
    assert type(rows[0]["n"]) is int and type(rows[0]["list"]) is list


def test_a_run_id_of_digits_is_no_number(tmp_path):
    assert read(tmp_path / "rows.csv", "run_id,lr\n001234567890,1\n12e345678901,2\n") == [
        {"run_id": "001234567890", "lr": 1},
        {"run_id": "12e345678901", "lr": 2},
    ]


def test_the_index_of_a_frame_is_a_column_of_its_rows(tmp_path):
    pandas.DataFrame({"run_id": ["a", "b"], "loss": [1.0, 2.0]}).set_index("run_id").to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == [{"run_id": "a", "loss": 1.0}, {"run_id": "b", "loss": 2.0}]


def test_csv_of_spreadsheets_is_read_whole(tmp_path):
    """A mark at the front, a column without a name, cells in quotes, short and empty lines, commas at their ends."""
    text = '\ufeff,lr,note\r\n0,0.1,"a, ""b""\r\nc"\r\n\r\n1,0.2\r\n2,0.3,-,,\r\n,,\r\n'
    assert read(tmp_path / "empty.csv", "") == []
    assert read(tmp_path / "rows.csv", text) == [
        {"lr": 0.1, "note": 'a, "b"\nc'},
        {"lr": 0.2, "note": None},
        {"lr": 0.3, "note": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "n,loss\n10,3.5\n20,3,4\n", "rows.csv:3 has more cells than the header has columns"),
        ("rows.csv", 'n,loss\n"a\nb",3.5\n20,3,4,5,6\n', "rows.csv:4 has more cells than the header has columns"),
        ("rows.csv", "n,loss,n,loss\n1,2,3,4\n", "rows.csv has more than one column n, loss; rename or delete one"),
        ("rows.csv", 'n,loss\n1,"2\n', "cannot read .*rows.csv:2 as cells .*: unexpected end of data"),
        ("rows.csv", b"\xff\xfe\x00", "cannot read .*rows.csv"),
        ("rows.parquet", b"PAR1", "cannot read .*rows.parquet"),
        ("rows.jsonl", '{"n": 1}\n\n{"n": 2\n', "rows.jsonl:3 cannot be read as JSON .*; correct or delete the line"),
        ("rows.jsonl", "[1]\n", "rows.jsonl:1 cannot be read .list in place of dict"),
        ("rows.json", "[1]", "rows.json must hold a list of rows"),
        ("rows.jsonl.gz", gzip.compress(b'{"n": 1}\n', mtime=0)[:-9], "cannot read .*rows.jsonl.gz"),
        ("rows.xlsx", b"", "rows are read from .csv, .*save its sheet as CSV"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path / name, content)


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL", "rows.jsonl.gz", "rows.json"])
def test_rows_in_json_stay_as_they_were_written(tmp_path, name):
    rows = [
        {"n": 2**70, "loss": 1.2345e-20, "by_set": {"a": [1, {"b": None}]}, "day": "2024-01-01", "text": "x\u2028y"},
        {"n": 3, "more": True},
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = json.dumps(rows) if name.endswith(".json") else lines
    found = read(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    assert found == rows and type(found[1]["n"]) is int and list(found[1]) == ["n", "more"]
