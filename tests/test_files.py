"""A file is replaced whole or not at all."""

import json
import os

import pytest

from scaling_testbed import files
from scaling_testbed.errors import UserError


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="it exists and is not a regular file"):
            files.write_text(name, "text")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("broken", ["open", "fsync", "replace"])
def test_a_disk_that_refuses_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, broken):
    """On a read-only file system not even the removal of the temporary file works."""
    path = tmp_path / "a.json"
    files.write_json(path, 1)

    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("builtins.open" if broken == "open" else f"os.{broken}", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(UserError, match=f"cannot write {path}: the file system is read-only"):
        files.write_json(path, 2)
    monkeypatch.undo()
    assert path.read_text() == "1\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read as JSON (Expecting value"),
        (b'{"x": 1', "cannot be read as JSON (Expecting ',' delimiter"),
        (b'{"x": \xff}', "cannot be read as JSON ('utf-8' codec can't decode"),
        (b'{"x": 1, "y": {"z": 1, "z": 2}}', "cannot be read as JSON ('z' is there twice)"),
        (b'{"x": ' + b"9" * 5000 + b"}", "cannot be read as JSON (Exceeds the limit"),
        (b"[" * 100_000, "cannot be read as JSON (nested too deeply)"),
        (b"[1]", "cannot be read (list in place of dict)"),
    ],
)
def test_damaged_json_is_one_line_that_names_the_file_and_what_to_do(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        files.read_json(path, advice="delete it")
    assert str(error.value).startswith(f"{path} {message}")
    assert str(error.value).endswith("; it is damaged; delete it") and "\n" not in str(error.value)


def test_json_that_was_written_is_read_and_a_missing_file_can_be_told_from_a_damaged_one(tmp_path):
    value = {"x": [1, 2.5, None, "naïve \u2028"], "y": {}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert files.parse_json("[1]", "a.jsonl:3", expect=list) == [1]
    with pytest.raises(FileNotFoundError, match=r"b.json does not exist") as error:
        files.read_json(tmp_path / "b.json")
    assert isinstance(error.value, UserError)
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        files.read_json(tmp_path)
