"""A checkpoint is whole or not there, and nothing in it is trusted before its hash is checked."""

import json
import os
import pickle
import signal
import subprocess
import textwrap

import pytest
import torch

from scaling_testbed.config.sections import CheckpointConfig
from scaling_testbed.errors import UserError
from scaling_testbed.runs import checkpoint
from tests.training.conftest import load_latest

KEEP = CheckpointConfig(keep_last=2)


def save(folder, step, config=KEEP):
    weights = torch.full((100, 10), float(step))
    return checkpoint.save(folder, step, {"note": [step, None]}, {"model": {"w": weights}}, config)


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.iterdir())]


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 7)
    found = load_latest(tmp_path)
    assert found.step == 7 and found.state["note"] == [7, None]
    assert torch.equal(found.tensors["model"]["w"], torch.full((100, 10), 7.0))


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path):
    assert load_latest(tmp_path / "nothing") is None
    assert load_latest(tmp_path) is None


def test_the_last_k_and_the_named_ones_stay(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, CheckpointConfig(keep_last=2, keep_steps=[2, 3]))
    assert steps(tmp_path) == [2, 3, 6, 7]


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": damage_flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.fault("16", "A cut, empty or missing file of a checkpoint is named, and the checkpoint before it is used.")
@pytest.mark.parametrize("file", ["model.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file_is_noticed_named_and_the_one_before_is_used(tmp_path, capsys, file, how):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[how](newest / file)
    if how == "flipped bit" and file == "manifest.json":  # may hit a blank; make it hit a hash
        (newest / file).write_text((newest / file).read_text().replace('"sha256": "', '"sha256": "0', 1))
    assert load_latest(tmp_path).step == 1
    assert str(newest) in capsys.readouterr().err


@pytest.mark.fault("17", "If all checkpoints are damaged the run stops, and never begins again at step 0.")
def test_when_all_are_damaged_it_stops_instead_of_starting_again(tmp_path):
    for step in (1, 2):
        damage_flip(save(tmp_path, step) / "model.pt")
    with pytest.raises(UserError, match="every checkpoint"):
        load_latest(tmp_path)


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/scaling-testbed-payload-ran",)


@pytest.mark.fault("18", "Code in a checkpoint is refused and never runs.")
def test_a_pickle_payload_is_refused_even_with_a_matching_hash(tmp_path):
    path = save(tmp_path, 1)
    (path / "model.pt").write_bytes(pickle.dumps(Payload()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.pt"] = checkpoint._fingerprint(path / "model.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no tensor"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/scaling-testbed-payload-ran")


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from scaling_testbed.runs import checkpoint
from scaling_testbed.config.sections import CheckpointConfig

folder, calls_left = Path(sys.argv[1]), int(sys.argv[2])
def killing(real):
    def call(*args, **kwargs):
        global calls_left
        calls_left -= 1
        if calls_left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync, os.rename, checkpoint.shutil.rmtree = killing(os.fsync), killing(os.rename), killing(checkpoint.shutil.rmtree)
weights = {"w": torch.full((100, 10), 3.0)}
checkpoint.save(folder, 3, {}, {"model": weights}, CheckpointConfig(keep_last=1))
print("saved")
"""


@pytest.mark.fault("2", "After a SIGKILL while a checkpoint is written the one before is used, to the same bits.")
@pytest.mark.fault("3", "At every moment of saving and deleting there is a good checkpoint.")
def test_a_kill_at_any_moment_of_saving_leaves_a_good_checkpoint(tmp_path, python):
    """Kills at every system call that makes something durable, one after the other, until a save comes through."""
    survived = []
    for calls in range(0, 40, 2):
        folder = tmp_path / str(calls)
        save(folder, 1)
        command = [python, "-c", textwrap.dedent(KILLED_WHILE_SAVING), str(folder), str(calls)]
        ended = subprocess.run(command, capture_output=True, text=True)
        found = load_latest(folder)
        survived.append(found.step)
        assert not list(folder.glob("*.tmp"))
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.returncode == 0 and survived[0] == 1 and survived[-1] == 3


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full \(4,000 bytes are needed"):
        save(tmp_path, 2)
    assert steps(tmp_path) == [1]


def test_saving_the_same_step_again_replaces_a_damaged_one_and_keeps_a_good_one(tmp_path):
    path = save(tmp_path, 1)
    damage_flip(path / "model.pt")
    save(tmp_path, 1)
    assert load_latest(tmp_path).step == 1
