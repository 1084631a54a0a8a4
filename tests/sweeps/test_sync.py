"""Offline recordings of a sweep are uploaded, each once."""

import pytest

from scaling_testbed.commands import sync as command
from scaling_testbed.runs.folder import RunFolder


@pytest.fixture
def recorded(door, tmp_path, monkeypatch):
    """Returns the folders of the four runs of a sweep, each with an offline recording, and the list of uploads."""
    uploads = []

    def upload(recording):
        uploads.append(recording)
        (recording / "run-x.wandb.synced").touch()
        return True

    monkeypatch.setattr(command, "_upload", upload)
    _, out, _ = door("plan", "--json")
    folders = [tmp_path / "runs/tiny" / line.split('"')[3] for line in out.splitlines() if '"run_id"' in line]
    for folder in folders:
        (folder / "wandb" / "offline-run-20260101_000000-x").mkdir(parents=True)
    return folders, uploads


def test_each_recording_is_uploaded_once(door, recorded):
    folders, uploads = recorded
    commands = [f"wandb sync {folder}/wandb/offline-run-20260101_000000-x" for folder in folders]
    status, out, _ = door("sync", "--dry-run")
    assert status == 0 and out.splitlines() == [*commands, "4 of 4 runs to upload"] and not uploads
    with RunFolder(folders[0]):  # it trains
        status, out, _ = door("sync")
    assert status == 0 and out.splitlines()[:-1] == commands[1:] and len(uploads) == 3
    assert out.splitlines()[-1] == "3 of 4 uploaded; 1 train now: type the command again when they have ended"
    assert door("sync")[1].splitlines() == [commands[0], "1 of 4 uploaded"]
    assert door("sync")[1].splitlines() == ["0 of 4 uploaded"]


def test_an_upload_that_fails_is_counted_and_tried_again(door, recorded, monkeypatch):
    monkeypatch.setattr(command, "_upload", lambda recording: False)
    for _ in range(2):
        status, out, _ = door("sync", "model=bigram")
        assert status == 1 and out.splitlines()[-1] == (
            "0 of 2 uploaded; 2 failed, and the same command tries them again"
        )
