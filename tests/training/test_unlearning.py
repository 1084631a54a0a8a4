"""Unlearning as a run: what it compares with is that of its parent, computed once, whatever stops and restarts it."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.batches import TrainingBatches
from scaling_testbed.data.cutting import of_all
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.loading import build_anywhere
from scaling_testbed.learning.objectives.npo import FILE, read_losses
from scaling_testbed.learning.objectives.unlearning import Unlearning
from scaling_testbed.runs import checkpoint
from scaling_testbed.training import run as trainer
from scaling_testbed.training import surroundings as around
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt, metrics
from tests.training.test_run import assert_same_bits

SOURCES = [
    "data=mixture",
    "data.sources={bad: {name: markov, vocab_size: 16, n_tokens: 400, n_validation_tokens: 100}, "
    "text: {name: markov, vocab_size: 16, seed: 1, n_tokens: 20000, n_validation_tokens: 4000}}",
    "data.weights={bad: 1, text: 3}",
]
OF_TINY = TINY[3:]  # without its data
SECOND = ["start.take=[weights]", "objective=npo", "objective.forget=bad", "optimizer.lr=1e-3"]


def trained_at(place, *words):
    (run,) = compose_many([[*OF_TINY, f"runs_dir={place / 'runs'}", f"data_dir={place / 'data'}", *words]])
    return train(run, quiet=True), run_folder_path(run)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return trained_at(tmp_path_factory.mktemp("parent"), *SOURCES, "optimizer.lr=1e-2")


@pytest.fixture
def trained(tmp_path):
    """Returns a function from words to (row, run folder) of a tiny run."""
    return lambda *words, runs="runs": trained_at(tmp_path / runs, *words)


def about(parent):
    return [f"start.run={parent[1]}", "start.step=12"]


def test_the_reference_is_the_loss_of_each_target_under_the_weights_of_the_parent(parent, trained):
    row, folder = trained(*SOURCES, *about(parent), *SECOND)
    content = json.loads((folder / FILE).read_bytes().split(b"\n")[1])["about"]
    assert content["start"] == {"run_id": parent[0]["run_id"], "step": 12} and content["source"] == "bad"
    losses_NT, sha256 = read_losses(folder / FILE, content)
    assert losses_NT.shape == (399 // 16, 16) and row["reference_sha256"] == sha256
    weights = checkpoint.read(parent[1] / "checkpoints/step-00000012").tensors["model"]
    data = open_prepared(folder.parents[2] / "data" / row["data_folder"])
    model = build_anywhere(recorded_run(folder), data, torch.device("cpu"))
    model.load_state_dict(weights)
    tokens = torch.from_numpy(data.sources()["bad"].train.read(0, 400).astype("int64"))
    for number in (0, 5, 23):
        window = tokens[number * 16 : number * 16 + 17][None]
        with torch.no_grad():
            log_p = model.logits(window[:, :-1]).log_softmax(-1).gather(2, window[:, 1:, None])
        assert losses_NT[number] == pytest.approx(-log_p.flatten().numpy(), abs=1e-5)
    lines = metrics(folder)
    first = next(line for line in lines if line["step"] == 1)
    of_start = next(line["val_loss_by_set"] for line in lines if line["step"] == 0)
    assert set(of_start) == {"validation", "bad", "text"}
    retained = first["train_objective"] - 2 / 0.1 * math.log(2)
    assert 0.5 * of_start["text"] < retained < 1.5 * of_start["text"]
    last = [line["val_loss_by_set"] for line in lines if "val_loss_by_set" in line][-1]
    assert last["bad"] - of_start["bad"] > last["text"] - of_start["text"]


@pytest.mark.parametrize("objective", [["objective=npo"], ["objective=ascent"]])
def test_a_stopped_run_goes_on_to_the_bit_without_its_parent(parent, trained, tmp_path, monkeypatch, objective):
    moved = tmp_path / "parent" / parent[1].name
    shutil.copytree(parent[1], moved)
    words = [*SOURCES, f"start.run={moved}", "start.step=12", *SECOND, *objective, "objective.forget=bad"]
    _, whole = trained(*words, runs="whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(50))
        stopped, folder = trained(*words, runs="stopped")
    assert stopped["status"] == "preempted" and 0 < stopped["steps"] < 12
    shutil.rmtree(moved / "checkpoints")  # the reference is in the run's own folder
    monkeypatch.setattr(around, "_losses_at_start", None)
    again, _ = trained(*words, runs="stopped")
    assert again["status"] == "finished"
    assert_same_bits(whole, folder)


def test_a_mean_divides_by_what_a_batch_has_on_average_and_not_by_its_own_targets(trained, tmp_path):
    """So a document weighs the same in each step, also where a mask leaves few or many targets in the others."""
    file = tmp_path / "pairs.jsonl"
    pairs = [{"question": "q" * (1 + n * 7 % 29), "text": "answer" * (1 + n % 3)} for n in range(200)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    bad, text = (f"{{name: text_files, files: {file}{more}}}" for more in (", prompt_field: question", ""))
    words = ["data=mixture", "tokenizer=bytes", f"data.sources={{bad: {bad}, text: {text}}}"]
    words += ["data.weights={bad: 1, text: 0}", "objective=ascent", "objective.forget=bad", "objective.retain_weight=0"]
    row, folder = trained(*words)
    data = open_prepared(folder.parents[2] / "data" / row["data_folder"])
    batches = TrainingBatches({"bad": data.sources()["bad"].train}, sequence_length=16, sequences=8, seed=0)
    cut = batches.cuts["bad"]
    mean = 8 * of_all(cut.each_targets, cut.number) / cut.number
    targets = [batches.targets(step) for step in range(12)]
    assert max(targets) > 1.1 * min(targets)
    for line, n_targets in zip([line for line in metrics(folder) if "train_loss" in line], targets, strict=True):
        assert line["train_objective"] == pytest.approx(-line["train_loss"] * n_targets / mean, rel=1e-5)


def test_micro_batches_change_nothing_but_rounding(parent, trained):
    words = [*SOURCES, *about(parent), *SECOND]
    one, _ = trained(*words)
    two, _ = trained(*words, "batch.micro_batch_sequences=2", runs="parts")
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)


def test_a_damaged_or_foreign_reference_is_refused_in_one_line(parent, trained, monkeypatch):
    words = [*SOURCES, *about(parent), *SECOND]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(9))
        _, folder = trained(*words)
    path = folder / FILE
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = "delete it, and it is computed again from start.run"
    with pytest.raises(UserError, match=f"{FILE} is damaged: its hash is another one; {again}"):
        trained(*words)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        trained(*words)
    path.write_bytes(good)
    real = Unlearning.build
    monkeypatch.setattr(Unlearning, "build", lambda self, around: real(self, _another_start(around)))
    with pytest.raises(UserError, match=f"has the losses of other weights or sequences, .*; {again}"):
        trained(*words)


def _another_start(around):
    return dataclasses.replace(around, start={"run_id": "f" * 12, "step": 1})


def test_a_parent_without_its_checkpoint_or_with_another_vocabulary_is_said(parent, trained, tmp_path):
    moved = tmp_path / "parent" / parent[1].name
    shutil.copytree(parent[1], moved)
    with pytest.raises(UserError, match="has no checkpoint of step 11"):
        trained(*SOURCES, f"start.run={moved}", "start.step=11", *SECOND)
    other = [word.replace("vocab_size: 16", "vocab_size: 17") for word in SOURCES]
    with pytest.raises(UserError, match="is of another model: embedding.weight is of shape"):
        trained(*other, f"start.run={moved}", "start.step=12", *SECOND)
