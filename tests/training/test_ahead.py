"""A run whose losses are read some updates late is the run whose losses are read at once, to the bit.

A GPU reads late. Here a CPU does.
"""

import math
from pathlib import Path

import pytest
import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning import loss_model
from scaling_testbed.learning.optimizers import local_part
from scaling_testbed.processes.interrupts import Interrupted
from scaling_testbed.progress import Clock
from scaling_testbed.training import graph
from scaling_testbed.training import parts as building
from scaling_testbed.training import run as trainer
from scaling_testbed.training import step as updates
from tests.training.conftest import StopAt, load_latest, metrics

LATE = 3


@pytest.fixture
def late(monkeypatch):
    """Returns a function that lets further runs of this test read late."""
    return lambda: monkeypatch.setattr(building, "AHEAD", {"cpu": LATE})


@pytest.fixture
def largest_queue(monkeypatch):
    """A list of the largest number of updates that waited so far."""
    found, real = [0], updates.Queue.add

    def add(self, made):
        real(self, made)
        found[0] = max(found[0], len(self._waiting))

    monkeypatch.setattr(updates.Queue, "add", add)
    return found


def poison(monkeypatch, at: int, value: float, field: str):
    """Multiply a term of the loss of training forward pass number `at` by `value`."""
    real, calls = loss_model.loss_terms, [0]

    def poisoned(*args, **kwargs):
        terms = real(*args, **kwargs)
        training = torch.is_grad_enabled()
        calls[0] += training
        return terms._replace(**{field: getattr(terms, field) * value}) if training and calls[0] == at else terms

    monkeypatch.setattr(loss_model, "loss_terms", poisoned)


def same_state(one: Path, other: Path):
    """Whether the last checkpoints of two run folders have the same weights, moments and counters of steps."""
    mine, its = (load_latest(folder / "checkpoints").tensors for folder in (one, other))
    assert mine["model"].keys() == its["model"].keys()
    assert all(torch.equal(mine["model"][name], its["model"][name]) for name in mine["model"])
    for number, state in mine["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, its["optimizer"]["state"][number][key]), key


OPTIMIZERS = {
    "adamw": [],
    "bf16": ["compute.precision=bf16"],
    "stable": ["optimizer.update_clipping=true"],
    "atan2": ["optimizer=adam_atan2"],
    "sgd": ["optimizer=sgd"],
    "muon": ["optimizer=muon"],
    "ddp": ["parallelism=ddp", "batch.micro_batch_sequences=4"],
    "fsdp": ["parallelism=fsdp"],
    "no clip": ["optimizer.clip_norm=null"],
    "clipped inside": ["optimizer.fused=true", "optimizer.clip_impl=fused", "optimizer.clip_norm=0.1"],
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_that_reads_late_ends_in_the_same_bits(trained, whole, late, largest_queue, options):
    options = [*options, "checkpoint.every_steps=0"]
    row, folder = whole(*options)
    late()
    after, there = trained(*options)
    assert largest_queue == [LATE + 1]  # they did wait
    assert after["val_loss"] == row["val_loss"] and after["steps"] == row["steps"] == 12
    assert metrics(there) == metrics(folder)
    if "parallelism=fsdp" not in options:
        same_state(there, folder)


@pytest.mark.parametrize("optimizer", ["adamw", "adam_atan2", "muon", "sgd"])
@pytest.mark.parametrize("field, value", [("ce", math.nan), ("z_loss", math.inf), ("loss", math.nan)])
def test_a_bad_update_changes_nothing_and_those_after_it_are_dropped(
    trained, monkeypatch, late, largest_queue, field, value, optimizer
):
    """A `loss` that is not finite gives a gradient norm that is not finite."""
    weights = []

    def keep(parts, *given):
        weights.append([parameter.detach().clone() for parameter in parts.model.parameters()])
        return evaluate(parts, *given)

    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", keep)
    found = []
    for runs in ("at once", "late"):
        with monkeypatch.context() as changed:
            poison(changed, 8, value, field)
            found.append(trained(f"optimizer={optimizer}", "checkpoint.every_steps=0", "budget.steps=30", runs=runs))
        late()
    (row, folder), (after, there) = found
    assert largest_queue == [LATE + 1]
    assert row["status"] == "diverged" and row["diverged_at_step"] == 8
    same = ("status", "error", "diverged_at_step", "steps", "val_loss", "train_loss_last", "n_tokens")
    assert {key: after[key] for key in same} == {key: row[key] for key in same}
    assert metrics(there) == metrics(folder)
    half = len(weights) // 2
    assert all(torch.equal(x, y) for x, y in zip(weights[half - 1], weights[-1], strict=True))


@pytest.mark.parametrize("at", [1, 6])
@pytest.mark.parametrize(
    "options",
    [
        *([f"optimizer={name}"] for name in ("adamw", "stable_adamw", "adam_atan2", "sgd", "muon")),
        ["parallelism=fsdp"],
        ["optimizer.clip_impl=fused", "optimizer.fused=true"],
    ],
    ids=lambda options: options[0],
)
def test_the_state_after_a_bad_update_is_that_of_a_run_that_has_not_made_it(trained, monkeypatch, late, options, at):
    """Also after the very first one. Moments and counters of steps, to the bit."""
    states, real = [], trainer.build_parts

    def build(*args, **kwargs):
        parts = real(*args, **kwargs)
        states.append(parts.optimizer.state)
        return parts

    monkeypatch.setattr(trainer, "build_parts", build)
    for runs in ("at once", "late"):
        with monkeypatch.context() as changed:
            poison(changed, at, math.nan, "loss")
            row, _ = trained(*options, "checkpoint.every_steps=0", "evaluation.every_steps=0", runs=runs)
        assert row["status"] == "diverged" and row["diverged_at_step"] == at
        late()
    bits = [[bits_of(x) for of_one in state.values() for x in of_one.values()] for state in states]
    assert bits[0] == bits[1] and len(bits[0]) > 10


def bits_of(x: torch.Tensor) -> tuple:
    return x.dtype, x.device, local_part(x).numpy().tobytes()


class StopFrom(StopAt):
    """Asks again at every later poll, as a signal does."""

    def check(self):
        super().check()
        if self.left < 0:
            raise Interrupted("SIGTERM")

    def counts(self):
        try:
            self.check()
        except Interrupted:
            self.requested = "SIGTERM"
        return super().counts()


@pytest.mark.parametrize("options", [["optimizer=adamw"], ["optimizer=muon"], ["parallelism=fsdp"]], ids=str)
def test_a_checkpoint_before_the_first_update_holds_the_state(trained, whole, monkeypatch, options):
    """And the run goes on from it to the same bits."""
    options = [*options, "checkpoint.every_steps=0"]
    _, folder = whole(*options)
    with monkeypatch.context() as changed:
        changed.setattr(trainer, "Interrupts", lambda: StopFrom(5))  # during the first evaluation
        row, there = trained(*options)
    saved = load_latest(there / "checkpoints")
    assert row["status"] == "preempted" and saved.step == 0
    moments = [x for state in saved.tensors["optimizer"]["state"].values() for x in state.values() if x.dim()]
    assert len(moments) >= len(saved.tensors["model"]) and not any(x.any() for x in moments)
    row, there = trained(*options)
    assert row["status"] == "finished" and row["restarts"] == 1
    assert metrics(there) == metrics(folder)
    same_state(there, folder)


@pytest.mark.parametrize("kind", ["single", "ddp"])
def test_a_signal_saves_after_every_update_that_was_made(trained, whole, monkeypatch, late, kind):
    """What the run had made when the signal came is in the checkpoint, and it goes on to the same bits."""
    options = ["checkpoint.every_steps=0", "evaluation.every_steps=0", f"parallelism={kind}"]
    _, folder = whole(*options)
    late()
    with monkeypatch.context() as changed:
        changed.setattr(trainer, "Interrupts", lambda: StopFrom(13))
        row, there = trained(*options)
    assert row["status"] == "preempted" and row["steps"] == load_latest(there / "checkpoints").state["step"]
    assert 2 < row["steps"] < 12
    row, there = trained(*options)
    assert row["status"] == "finished" and metrics(there) == metrics(folder)
    same_state(there, folder)


def test_an_error_of_memory_comes_after_the_updates_that_were_made(trained, whole, monkeypatch, late):
    """Then the micro-batch is smaller from the step on that had too little memory."""
    options = ["batch.micro_batch_sequences=auto", "checkpoint.every_steps=0", "evaluation.every_steps=0"]
    late()
    real, made = trainer.make_update, []

    def make(parts, given, interrupts, rows):
        if given.step == 6 and rows == 8:
            raise updates.too_little_memory(parts, parts.run, rows, RuntimeError("out of memory"))
        made.append((given.step, rows))
        return real(parts, given, interrupts, rows)

    monkeypatch.setattr(trainer, "make_update", make)
    row, _ = trained(*options)
    assert made == [(step, 8 if step < 6 else 4) for step in range(12)]
    assert row["status"] == "finished" and row["micro_batch_changes"] == {"0": 8, "6": 4}


def test_an_error_of_memory_ends_a_group_at_once(trained, monkeypatch, late):
    """Another attempt would start its collectives again, while the other processes are in those of the first."""
    late()
    real, tried = trainer.make_update, []

    def make(parts, given, interrupts, rows):
        tried.append(given.step)
        if tried == list(range(7)):
            raise updates.too_little_memory(parts, parts.run, rows, RuntimeError("out of memory"))
        return real(parts, given, interrupts, rows)

    monkeypatch.setattr(trainer, "make_update", make)
    with pytest.raises(updates.TooLittleMemory):
        trained("parallelism=ddp", "checkpoint.every_steps=0", "evaluation.every_steps=0")
    assert tried == list(range(7))


@pytest.mark.parametrize("reads", ["at once", "late"])
def test_a_step_is_timed_from_the_end_of_the_last_one_unless_the_device_has_stopped(trained, monkeypatch, late, reads):
    if reads == "late":
        late()
    began, real = [], Clock.begin_step
    monkeypatch.setattr(Clock, "begin_step", lambda clock: began.append(1) or real(clock))
    trained("checkpoint.every_steps=0", "evaluation.every_steps=5")
    assert len(began) == (3 if reads == "late" else 12)


@pytest.mark.parametrize(
    "options",
    [["optimizer.skip_spikes_sigmas=6"], ["optimizer.fused=false"], ["diagnostics.every_steps=1"]],
    ids=["an intervention", "an optimizer without the flag", "diagnostics"],
)
def test_what_needs_the_values_of_an_update_reads_them_at_once(trained, late, largest_queue, options):
    late()
    trained(*options, "checkpoint.at_end=false")
    assert largest_queue == [1]


@pytest.fixture
def graphs(monkeypatch, late):
    """Lets a step be captured here: a replay does the work again. Returns a list with an entry for each replay."""
    replays = []

    def captured(work):
        values = torch.zeros(3, dtype=torch.float64)

        def replay():
            replays.append(1)
            values.copy_(work())

        return values, replay

    late()
    monkeypatch.setattr(graph, "captured", captured)
    return replays


@pytest.mark.parametrize("clip_impl", ["separate", "fused"])
def test_a_captured_step_has_the_bits_of_the_same_step_without_a_graph(trained, graphs, monkeypatch, clip_impl):
    """And nearly those of a run whose rates are doubles. Measured steps are made without the graph."""
    clip = ["optimizer.fused=true", f"optimizer.clip_impl={clip_impl}", "optimizer.clip_norm=0.1"]
    options = ["compute.cuda_graph=true", *clip, "diagnostics.every_steps=5", "checkpoint.every_steps=0"]
    plain, _ = trained(*options[1:], runs="plain")
    row, folder = trained(*options)
    assert len(graphs) == 12 - graph.WARM_UP - 3  # steps 5, 10 and 12 are measured
    monkeypatch.setattr(graph, "WARM_UP", 100)
    eager, there = trained(*options, runs="eager")
    assert row["cuda_graph"] is eager["cuda_graph"] is True and plain["cuda_graph"] is False
    assert metrics(folder) == metrics(there)
    same_state(folder, there)
    assert row["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-5)
    kept = load_latest(folder / "checkpoints").tensors["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in kept)


def test_a_run_that_goes_on_without_a_graph_says_so(tiny, graphs, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(9))
        assert trainer.train(tiny("compute.cuda_graph=true")[0])["status"] == "preempted"
    assert "from here on" not in "".join(capsys.readouterr())
    row = trainer.train(tiny()[0])
    assert "steps are not a CUDA graph from here on, and were before" in "".join(capsys.readouterr())
    assert row["cuda_graph"] is False and row["restarts"] == 1


def test_a_captured_step_that_is_bad_changes_nothing(trained, graphs, monkeypatch):
    poison(monkeypatch, 8, math.nan, "loss")
    row, _ = trained("compute.cuda_graph=true", "checkpoint.every_steps=0")
    assert row["status"] == "diverged" and row["diverged_at_step"] == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "the device is cpu"),
        (["parallelism=ddp"], "parallelism=ddp exchanges gradients"),
        (["optimizer.qk_clip=1", "model.qk_norm=none"], "qk_clip needs the host"),
        (["optimizer=muon"], "optimizer=muon has no fused step"),
        (["optimizer.fused=false"], "optimizer=adamw has no fused step"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(trained, late, options, says):
    if options:
        late()
    with pytest.raises(ConfigError, match=says):
        trained("compute.cuda_graph=true", *options)


def test_a_step_of_another_micro_batch_is_warmed_up_and_captured_again(trained, graphs, monkeypatch):
    real, replayed = graph.StepGraph.make, {}

    def make(self, given, interrupts, rows):
        if given.step == 6 and rows == 8:
            raise updates.too_little_memory(self._parts, self._parts.run, rows, RuntimeError("out of memory"))
        before = len(graphs)
        made = real(self, given, interrupts, rows)
        replayed[given.step] = len(graphs) > before
        return made

    monkeypatch.setattr(graph.StepGraph, "make", make)
    options = ["compute.cuda_graph=true", "batch.micro_batch_sequences=auto", "evaluation.every_steps=0"]
    row, _ = trained(*options, "checkpoint.every_steps=0")
    assert row["micro_batch_changes"] == {"0": 8, "6": 4} and row["status"] == "finished"
    assert [step for step, captured in replayed.items() if not captured] == [0, 1, 2, 6, 7, 8]
