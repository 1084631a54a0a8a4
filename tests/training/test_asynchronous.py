"""Checkpoints that a thread writes beside training: the files of those written at once, in order, and none lost."""

import json
import signal
import threading
import time

import pytest
import torch

from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.model.counting import count_params
from scaling_testbed.runs import checkpoint
from scaling_testbed.runs.writer import Writer, on_host
from scaling_testbed.training import run as trainer
from tests.training.conftest import TINY, StopAt, start
from tests.training.test_run import assert_same_bits

BESIDE = "checkpoint.asynchronous=true"
KEPT = "checkpoint.keep_steps=[4,8,12]"


def saved(folder):
    """Step -> hashes of the files of tensors."""
    found = {}
    for step, path in checkpoint.by_step(folder / "checkpoints").items():
        checkpoint.check_whole(path)
        files = json.loads((path / "manifest.json").read_text())["files"]
        found[step] = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".pt")}
    return found


@pytest.fixture
def slow(monkeypatch):
    """Makes the writing of a checkpoint so slow that training goes on by some steps. Returns what happened: a mark at
    the begin and at the end of each writing, with the step and the thread."""
    happened, real = [], checkpoint._finish

    def finish(work, final, state, tensors):
        happened.append(("begin", state["step"], threading.current_thread().name))
        time.sleep(0.3)
        real(work, final, state, tensors)
        happened.append(("end", state["step"], threading.current_thread().name))

    monkeypatch.setattr(checkpoint, "_finish", finish)
    return happened


def test_the_files_are_those_of_a_run_that_waits_and_one_is_written_at_a_time(whole, trained, slow):
    at_once, beside = whole(KEPT), trained(KEPT, BESIDE)
    assert saved(beside[1]) == saved(at_once[1]) and list(saved(beside[1])) == [4, 8, 12]
    assert_same_bits(at_once[1], beside[1])
    assert slow[-6:] == [(mark, step, "checkpoint") for step in (4, 8, 12) for mark in ("begin", "end")]
    for step in (4, 8, 12):
        states = [checkpoint.read_state(folder / "checkpoints" / f"step-{step:08d}") for _, folder in (at_once, beside)]
        assert states[0]["metrics"]["lines"] == states[1]["metrics"]["lines"] == step + 1
        assert states[0]["micro_batches"] == states[1]["micro_batches"]


def test_a_signal_waits_for_the_checkpoint_and_the_run_goes_on(whole, trained, slow, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(24))
        row, folder = trained(BESIDE)
    assert row["status"] == "preempted" and list(saved(folder)) == [4, row["steps"]]
    assert slow[-1] == ("end", row["steps"], "checkpoint")
    assert "checkpoint" not in [one.name for one in threading.enumerate()]
    row, folder = trained(BESIDE)
    assert row["status"] == "finished" and row["restarts"] == 1
    assert_same_bits(whole()[1], folder)


def test_a_divergence_and_another_error_wait_for_the_checkpoint(trained, slow, monkeypatch):
    diverges = ("optimizer.lr=1e30", "schedule.warmup=3", "checkpoint.every_steps=1")
    row, folder = trained(BESIDE, *diverges)
    assert row["status"] == "diverged" and slow[-1][0] == "end" and saved(folder)

    found = [{}]  # of the evaluation at step 0; the next one is at step 5

    def evaluate(*_):
        if not found:
            raise UserError("the evaluation is broken")
        return found.pop()

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(UserError, match="the evaluation is broken"):
        trained(BESIDE, runs="others")
    assert slow[-1][:2] == ("end", 4)


@pytest.mark.fault("23", "On a full disk the earlier checkpoint stays, and the path and the bytes needed are told.")
@pytest.mark.parametrize("full_at", [4, 12])
def test_an_error_of_the_thread_is_raised_at_the_next_checkpoint_or_at_the_end(trained, monkeypatch, full_at, tmp_path):
    """In the words of a checkpoint that is written at once."""
    real, said = checkpoint._finish, []

    def full(work, final, state, tensors):
        if state["step"] == full_at:
            raise OSError(28, "No space left on device")
        real(work, final, state, tensors)

    monkeypatch.setattr(checkpoint, "_finish", full)
    for words in ((), (BESIDE,)):
        with pytest.raises(UserError, match=f"step-{full_at:08d}: the disk is full") as raised:
            trained(*words, runs="runs" + str(len(words)))
        said.append(str(raised.value).replace("runs1", "runs0"))
        (folder,) = tmp_path.glob(f"runs{len(words)}/*/*")
        row = json.loads((folder / "result.json").read_text())
        assert row["status"] == "failed" and row["error"] == str(raised.value)
        assert list(saved(folder)) == ([] if full_at == 4 else [4, 8])
        assert not list(folder.glob("checkpoints/*.tmp"))
    steps = [part.split(" bytes are needed")[0] for part in said]
    assert steps[0] == steps[1]


@pytest.mark.fault("2", "After a SIGKILL while a checkpoint is written the one before is used, to the same bits.")
def test_a_kill_while_the_thread_writes(whole, trained, python, tmp_path, data_dir):
    hook = """
import os, signal, time
from scaling_testbed.training import step as updates
real, real_lr, made = os.rename, updates.set_lr, [0]
def rename(source, target):
    if str(target).endswith("step-00000008"):
        while made[0] < 10:  # training goes on meanwhile
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
def set_lr(optimizer, lr):
    made[0] += 1
    real_lr(optimizer, lr)
os.rename, updates.set_lr = rename, set_lr
"""
    killed = start(python, tmp_path, data_dir, BESIDE, before=hook)
    assert killed.wait(timeout=120) == -signal.SIGKILL, killed.communicate()
    (folder,) = tmp_path.glob("runs/*/*")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000008.tmp"]
    trained(BESIDE)
    assert_same_bits(whole()[1], folder)


def test_a_writer_keeps_the_order_and_an_error_beside_another_is_a_warning(capsys):
    happened, go = [], threading.Event()

    def write(number, wait=0.0):
        time.sleep(wait)
        happened.append(number)

    with Writer() as writer:
        writer.start(lambda: write(1, 0.2))
        writer.start(lambda: write(2, 0.1))
        assert happened == [1]
    assert happened == [1, 2]

    def fails():
        go.wait()
        raise UserError("the disk is full")

    with pytest.raises(ValueError, match="another"), Writer() as writer:
        writer.start(fails)
        go.set()
        raise ValueError("another")
    assert capsys.readouterr().err == "warning: the disk is full\n"
    with pytest.raises(UserError, match="the disk is full"), Writer() as writer:
        writer.start(fails)


def test_a_copy_is_apart_and_shares_memory_as_the_original_does():
    one = torch.arange(4.0)
    value = {"a": one, "b": one.view(2, 2), "c": [one[:2], {"d": 3}]}
    copied = on_host(value)
    one.zero_()
    value["c"][1]["d"] = 4
    assert copied["a"].tolist() == [0, 1, 2, 3] and copied["c"][1] == {"d": 3}
    assert copied["a"].data_ptr() == copied["b"].data_ptr() == copied["c"][0].data_ptr() != one.data_ptr()


def test_a_sharded_run_is_refused():
    with pytest.raises(ConfigError, match="checkpoint.asynchronous=true cannot be sharded: .* use parallelism=single"):
        compose([*TINY, BESIDE, "parallelism=fsdp"])


def test_the_memory_of_the_copy_is_planned_where_it_is_on_the_device():
    run = compose([*TINY, BESIDE, "averaging=ema"])
    model = run.model.resolved(256)
    n = count_params(model).n_params
    cpu, gpu = (estimate_memory(run, model, n, "fp32", device=device) for device in ("cpu", "cuda"))
    assert cpu.checkpoint == (4 + 8 + 4) * n and gpu.checkpoint == 0 and cpu.total - gpu.total >= cpu.checkpoint
    assert estimate_memory(compose([*TINY]), model, n, "fp32", device="cpu").checkpoint == 0
