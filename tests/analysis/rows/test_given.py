"""Rows that are at hand make the study that their file makes."""

import json

import pandas
import pytest

from scaling_testbed.analysis.rows.given import study_of
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import write_rows
from tests.analysis.conftest import grid


def test_a_path_a_study_mappings_and_a_frame_have_the_same_rows(tmp_path):
    rows = grid(lambda c, w, lr, s: 3.0 + lr, [{}])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = study_of(path)
    for given in (str(path), load(path), rows, iter(rows), pandas.DataFrame(rows)):
        found = study_of(given)
        assert sorted(found.rows, key=repr) == sorted(whole.rows, key=repr) and found.missing == []
    assert len(study_of(rows, ["model.d_model=32", "optimizer.lr<1e-2"]).rows) == 3
    with pytest.raises(ConfigError, match="--where 'seed=7': no row matches seed=7; seed is 0"):
        study_of(rows, ["seed=7"])


def test_short_names_and_runs_to_come_are_read_as_from_a_file(tmp_path):
    table = pandas.DataFrame({"lr": [1e-3, 1e-2], "n_params": [10, 20], "val_loss": [3.0, None], "seed": [0, 1]})
    table.to_csv(tmp_path / "rows.csv", index=False)
    given, read = study_of(table), load(tmp_path / "rows.csv")
    assert given.rows == read.rows and given.rows[0]["optimizer.lr"] == 1e-3
    assert [row["label"] for row in given.missing] == [row["label"] for row in read.missing]
    assert study_of([{"status": "failed", "name": "a"}]).missing[0]["label"] == "a (failed)"


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".json", ".jsonl"])
def test_rows_of_this_testbed_are_the_same_from_each_format(tmp_path, ending):
    rows = [{"schema_version": 1, **row} for row in grid(lambda c, w, lr, s: 3.0 + lr, [{}], widths=(32,))]
    write_rows(tmp_path / f"rows{ending}", rows)
    assert load(tmp_path / f"rows{ending}").rows == study_of(rows).rows


def test_the_status_of_others_tables_is_read_as_from_a_file(tmp_path):
    rows = [{"lr": lr, "val_loss": loss, "status": status} for lr, loss, status in
            ((1e-3, 3.0, "Completed"), (1e-2, 3.1, "diverged"), (1e-1, 3.2, "crashed"))]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load(path)
    for given in (rows, pandas.DataFrame(rows)):
        found = study_of(given)
        assert found.rows == read.rows and found.missing == read.missing
    assert [row["status"] for row in read.rows] == ["finished", "diverged"]
