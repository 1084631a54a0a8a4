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
    with pytest.raises(UserError, match=f"cannot write {path}: Read-only file system"):
        files.write_json(path, 2)
    monkeypatch.undo()
    assert path.read_text() == "1\n"
