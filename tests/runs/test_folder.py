"""What a run writes down is whole, and readable after a kill."""

import json
import math

import pytest

from scaling_testbed.errors import UserError
from scaling_testbed.runs.folder import RunFolder, read_metrics


@pytest.mark.fault("25", "A half-written line is left out by number, and a resumed run writes no step twice.")
def test_a_half_written_line_is_reported_and_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 2}\n123\n{"step": "a"}\n"\xff"\n{"step": 2, "x"')
    assert read_metrics(path) == [{"step": 1, "x": 2}]
    err = capsys.readouterr().err
    assert all(f"{path}:{line}" in err for line in (2, 3, 4, 5))


def test_metrics_are_cut_back_to_the_step_that_will_be_written_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)) + '{"ste')
    with RunFolder(tmp_path) as folder:
        assert folder.open_metrics(keep_before=4) == ([{"step": step} for step in range(4)], True)
        folder.write_metrics({"step": 4})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed, while still open
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_result({"loss": math.nan, "by_set": {"a": math.inf, "b": [1.0, -math.inf]}})
    assert json.loads((tmp_path / "result.json").read_text()) == {"loss": None, "by_set": {"a": None, "b": [1.0, None]}}


@pytest.mark.parametrize("text", ['{"status": "fini', "[1]", '"x"', '{"a": 1}', '{"status": 3}', "null"])
def test_a_result_that_cannot_be_read_counts_as_none(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert RunFolder(tmp_path).result() is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runs_dir="), RunFolder(tmp_path / "file" / "run"):
        pass


def test_a_line_with_an_average_of_the_weights_is_read_again(whole, capsys):
    """Every line of a run that measures all it can by name."""
    _, folder = whole("averaging=ema")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum("val_loss_average_by_set" in line for line in lines) >= 3
    capsys.readouterr()
    assert read_metrics(folder / "metrics.jsonl") == [json.loads(line) for line in lines]
    assert capsys.readouterr().err == ""
