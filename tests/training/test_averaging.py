"""The average of the weights: its definition, its place in checkpoints, and the run that goes on with it."""

import json

import pytest
import torch

from scaling_testbed.config.compose import compose, recorded_run
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.config.run import run_id
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.learning.averaging import Averages, EmaConfig, LatestConfig
from scaling_testbed.model.counting import count_params
from scaling_testbed.sweeps.unusual import unusual
from scaling_testbed.training import parts as building
from scaling_testbed.training import run as trainer
from scaling_testbed.training.validation import evaluate, evaluate_average
from tests.training.conftest import TINY, load_latest
from tests.training.test_ahead import poison
from tests.training.test_pruning import StopGroup, kept
from tests.training.test_run import StopAt, assert_same_weights

EMA = ("averaging=ema", "averaging.decay=0.7")
LATEST = ("averaging=latest", "averaging.k=3", "averaging.every_steps=2")
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=20")


def means_of(folder, averaging):
    """Step -> name -> average of the weights of the checkpoints so far, by the definition."""
    weights = {step: one.tensors["model"] for step, one in kept(folder).items()}
    found = {}
    for step in weights:
        if averaging is EMA:
            shares = {i: 0.3 * 0.7 ** (step - i) / (1 - 0.7**step) for i in range(1, step + 1)}
        else:
            latest = [i for i in range(1, step + 1) if i % 2 == 0][-3:]
            shares = {i: 1 / len(latest) for i in latest}
        assert not shares or sum(shares.values()) == pytest.approx(1)
        found[step] = {
            name: sum(share * weights[i][name].double() for i, share in shares.items()) for name in weights[step]
        }
    return found


@pytest.mark.parametrize("averaging", [EMA, LATEST])
def test_the_average_is_that_of_the_definition_and_the_run_is_the_same(trained, averaging):
    row, plain = trained(*EVERY_STEP, "evaluation.every_steps=1")
    averaged, folder = trained(*EVERY_STEP, *averaging, "evaluation.every_steps=1")
    assert_same_weights(plain, folder)
    assert averaged["val_loss"] == row["val_loss"] and row["val_loss_average"] is None
    first = 1 if averaging is EMA else 2
    run = recorded_run(folder)
    for step, expected in means_of(folder, averaging).items():
        if step < first:
            with pytest.raises(UserError, match="has no average of its weights yet"):
                load_model(run, folder, step=step, device=torch.device("cpu"), average=True)
            continue
        model = load_model(run, folder, step=step, device=torch.device("cpu"), average=True)[1]
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=2e-6, atol=1e-7)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss_average" in line] == list(range(first, 13))
    assert averaged["val_loss_average"] == lines[-1]["val_loss_average"] != averaged["val_loss"]


def test_the_loss_of_the_average_is_that_of_a_model_with_these_weights(trained, monkeypatch):
    seen = {}

    def look(parts, poll=lambda: None):
        found = evaluate_average(parts, poll)
        if found:
            own = {name: parameter.detach().clone() for name, parameter in parts.model.named_parameters()}
            parts.averages.into_parameters()
            seen[found["val_loss_average"]] = evaluate(parts)["val_loss"]
            with torch.no_grad():
                for name, parameter in parts.model.named_parameters():
                    parameter.copy_(own[name])
        return found

    monkeypatch.setattr(trainer, "evaluate_average", look)
    trained(*EMA)
    assert seen and all(averaged == loss for averaged, loss in seen.items())


@pytest.mark.parametrize(("averaging", "kind"), [(EMA, "single"), (LATEST, "fsdp")])
def test_a_stopped_run_goes_on_to_the_bit(trained, monkeypatch, averaging, kind):
    options = (*averaging, f"parallelism={kind}", "evaluation.rows=64")
    row, whole = trained(*options, runs="whole")
    for polls in (4, 9):
        with monkeypatch.context() as patch:
            stop = StopGroup if kind == "fsdp" else StopAt
            patch.setattr(trainer, "Interrupts", lambda stop=stop, polls=polls: stop(polls))
            stopped, folder = trained(*options, runs="stopped")
        assert stopped["status"] == "preempted" and stopped["steps"] < 12
    again, _ = trained(*options, runs="stopped")
    assert_same_weights(whole, folder)
    here, there = (load_latest(one / "checkpoints") for one in (whole, folder))
    assert here.state["averaged"] == there.state["averaged"] > 0
    averages = here.tensors["averages"]
    assert averages and all(torch.equal(there.tensors["averages"][name], tensor) for name, tensor in averages.items())
    assert again["val_loss_average"] == row["val_loss_average"] is not None


def test_a_sharded_run_has_the_average_of_a_whole_one_and_each_goes_on_from_the_other(trained, monkeypatch):
    row, _ = trained(*LATEST, "evaluation.rows=64")
    for first, second in (("fsdp", "single"), ("single", "fsdp")):
        with monkeypatch.context() as patch:
            stop = StopGroup if first == "fsdp" else StopAt
            patch.setattr(trainer, "Interrupts", lambda stop=stop: stop(9))
            stopped, _ = trained(*LATEST, "evaluation.rows=64", f"parallelism={first}", runs=first)
        assert stopped["status"] == "preempted"
        again, folder = trained(*LATEST, "evaluation.rows=64", f"parallelism={second}", runs=first)
        assert again["val_loss_average"] == pytest.approx(row["val_loss_average"], abs=1e-6)
        assert load_latest(folder / "checkpoints").state["averaged"] == 6


def test_a_run_that_goes_on_from_another_takes_the_same_average_and_no_other(trained):
    _, parent = trained(*EMA, *EVERY_STEP, "schedule.steps=12", runs="parent")
    start = (f"start.run={parent}", "start.step=6", "schedule.steps=12")
    _, same = trained(*EMA, *EVERY_STEP, *start, runs="same")
    at_end = [load_latest(folder / "checkpoints") for folder in (parent, same)]
    averages = at_end[0].tensors["averages"]
    assert all(torch.equal(at_end[1].tensors["averages"][name], tensor) for name, tensor in averages.items())
    assert at_end[1].state["averaged"] == 12
    _, other = trained("averaging=ema", "averaging.decay=0.8", *start, runs="other")
    assert load_latest(other / "checkpoints").state["averaged"] == 6


def test_no_average_leaves_checkpoints_and_ids_as_they_were(trained):
    _, folder = trained()
    assert "averages" not in load_latest(folder / "checkpoints").tensors
    assert run_id(compose([*TINY])) == run_id(compose([*TINY, "averaging=none"]))
    assert run_id(compose([*TINY])) != run_id(compose([*TINY, *EMA]))
    with pytest.raises(UserError, match="has no average of its weights: it was trained with averaging=none"):
        load_model(recorded_run(folder), folder, step=None, device=torch.device("cpu"), average=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["averaging.decay=1"], "decay must be at least 0 and less than 1; got 1"),
        (["+interventions.magnitude_pruning.sparsity=0.5"], "interventions.magnitude_pruning: the average would hold"),
        (["model.linear=sigma_reparam"], "averaging=ema cannot be with model.linear=sigma_reparam"),
    ],
)
def test_what_cannot_be_averaged_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        compose([*TINY, "averaging=ema", *words])


def test_the_memory_of_the_copies_is_planned():
    run = compose([*TINY, *LATEST])
    model = run.model.resolved(256)
    n = count_params(model).n_params
    assert estimate_memory(run, model, n).averages == 3 * 4 * n
    assert estimate_memory(compose([*TINY]), model, n).averages == 0


@pytest.mark.parametrize("config", [EmaConfig(decay=0.5), LatestConfig(k=2, every_steps=1)])
def test_a_bad_update_is_not_averaged(config):
    weight = torch.nn.Parameter(torch.ones(3))
    averages = Averages(config, {"w": weight})
    bad = torch.zeros(())
    for step, value in ((1, 1.0), (2, 3.0), (3, 5.0)):
        weight.data.fill_(value)
        averages.add(step, bad)
    before = averages.mean("w")
    bad.fill_(1.0)
    averages.add(4, bad)  # the optimizer has left the weights as they were
    averages.add(5, bad)
    averages.take_back(5, 3)
    assert averages.n == 3 and torch.equal(averages.mean("w"), before)


@pytest.mark.parametrize(
    "averaging", [EMA, *(("averaging=latest", f"averaging.k={k}", "averaging.every_steps=1") for k in (2, 8))]
)
def test_the_average_of_a_run_that_diverges_is_the_same_where_losses_are_read_late(trained, monkeypatch, averaging):
    losses = []
    for ahead, runs in (({}, "at_once"), ({"cpu": 3}, "late")):
        with monkeypatch.context() as patch:
            patch.setattr(building, "AHEAD", ahead)
            poison(patch, 5, float("nan"), "loss")
            row, _ = trained(*averaging, "diagnostics=none", "evaluation.every_steps=0", runs=runs)
        assert (row["status"], row["diverged_at_step"]) == ("diverged", 5)
        losses.append(row["val_loss_average"])
    assert losses[0] == losses[1] is not None


def test_a_run_that_takes_no_weights_for_its_average_says_so(tiny, capfd):
    words = [*TINY, "averaging=latest", "averaging.every_steps=100"]
    said = "averaging.every_steps=100 takes no weights before the last of 12 steps, so there is no average"
    run = compose(words)
    model = run.model.resolved(256)
    assert said in unusual(run, model, count_params(model), 12)["no average"]
    assert "no average" not in unusual(run, model, count_params(model), 100)
    assert "no average" not in unusual(compose([*TINY, *EMA]), model, count_params(model), 12)
    assert trainer.train(tiny(*words[len(TINY) :])[0])["val_loss_average"] is None
    assert said in capfd.readouterr().out
