"""budget.hours: the clock chooses the number of steps, and nothing else. A run is then that of so many steps."""

import dataclasses
import itertools
import json

import pytest

from scaling_testbed.config.compose import compose
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.interventions.base import Intervention
from scaling_testbed.learning.schedules import ConstantConfig, InverseSqrtConfig, WarmupStableDecayConfig
from scaling_testbed.processes.interrupts import Interrupted
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.predicted import curve_so_far, with_predictions
from scaling_testbed.sweeps.status import read_state
from scaling_testbed.training.length import Length
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, load_latest, metrics

WORDS = ["schedule=wsd", "schedule.warmup=2", "budget.steps=40", "checkpoint.every_steps=2"]


class Times:
    """A clock that a test sets."""

    wall_seconds = 0.0


@pytest.fixture
def due_from(monkeypatch):
    """Returns a function that sets from which number of updates the clock says that the run must end; the run is
    interrupted after `stop` updates."""

    def set_to(number, stop=None):
        def is_due(self, made):
            if made == stop:
                raise Interrupted("SIGTERM")
            return made >= number

        monkeypatch.setattr(Length, "is_due", is_due)

    return set_to


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_a_schedule_that_ends_as_soon_as_it_can_has_the_rates_of_a_longer_one_until_there(shape):
    for fraction, made, warmup in itertools.product((0.01, 0.2, 0.5, 0.9), (1, 2, 7, 100, 333), (0, 1, 5, 50)):
        schedule = WarmupStableDecayConfig(warmup=warmup, decay_fraction=fraction, decay_shape=shape)
        steps = schedule.shortest(made, warmup)
        rates = [schedule.lr(step, steps, 0.1) for step in range(steps)]
        assert rates[:made] == [schedule.lr(step, 50 * steps, 0.1) for step in range(made)]
        assert steps >= max(made, warmup) and rates[-1] == pytest.approx(1e-5 if round(fraction * steps) else 0.1)
        lasting = steps - max(made, warmup)
        assert lasting == pytest.approx(fraction * steps, abs=1)  # the decay is as long as it should be
    assert WarmupStableDecayConfig(decay_fraction=1).shortest(5, 0) is None
    assert ConstantConfig().shortest(5, 0) == InverseSqrtConfig().shortest(5, 0) == 5


@pytest.mark.parametrize("seconds", [1.0, 10.0, 170.0])
def test_the_decay_begins_so_that_it_ends_in_time_at_the_speed_that_is_measured(seconds):
    run = compose([*TINY, *WORDS, "budget.hours=1", "budget.steps=100000"])
    length = Length(run, 100_000)
    length.clock = clock = Times()
    made = 0
    clock.wall_seconds = 300.0  # to prepare
    while not length.is_due(made):
        made += 1
        clock.wall_seconds += seconds
    assert length.choose(made).endswith(f"ends the run at step {length.steps:,}; {made:,} are made")
    end = clock.wall_seconds + (length.steps - made) * seconds
    assert 3600 - 4 * seconds <= end <= 3600
    assert not length.is_due(made + 1) and length.choose(made + 1) is None


def test_without_the_option_the_clock_is_not_asked_and_a_budget_that_ends_first_stays():
    run = compose([*TINY, *WORDS])
    assert not Length(run, 40).by_clock and not Length(run, 40).is_due(10**6)
    length = Length(dataclasses.replace(run, budget=dataclasses.replace(run.budget, hours=1.0)), 40)
    length.clock.wall_seconds  # noqa: B018 (begins)
    assert length.choose(35) is None and length.steps == 40 and length.chosen is None


def test_the_run_is_to_the_bit_that_of_the_number_of_steps_which_the_clock_chose(trained, due_from):
    due_from(10)
    row, folder = trained(*WORDS, "budget.hours=0.5")
    steps = row["steps"]
    assert 12 <= steps <= 15 and row["steps_planned"] == steps and row["status"] == "finished"
    assert row["steps_by_clock"] is True and row["budget.hours"] == 0.5 and row["wall_seconds"] > 0
    assert row["n_tokens"] == steps * 8 * 16
    plain, other = trained(*WORDS, f"budget.steps={steps}")
    assert plain["steps_by_clock"] is None and plain["run_id"] != row["run_id"]
    ends = [metrics(place) for place in (folder, other)]
    assert ends[0] == ends[1] and plain["val_loss"] == row["val_loss"]
    assert ends[0][-1]["lr"] == pytest.approx(1e-5)


def test_the_time_left_is_said_from_the_choice_on(tiny, due_from, capsys):
    due_from(10)
    train(tiny(*WORDS, "budget.hours=0.5")[0])
    said = capsys.readouterr().out
    before, _, after = said.partition("budget.hours=0.5 ends the run at step 14; 10 are made")
    assert "0.5 hours, at most 40 steps" in before and "step  5/40" in before and " left" not in before
    assert "step 10/14" in after and " left" in after


def test_a_constant_rate_simply_ends_and_has_its_last_evaluation(trained, due_from):
    due_from(6)
    row, _ = trained(*WORDS, "schedule=constant", "budget.hours=0.5")
    assert row["steps"] == row["steps_planned"] == 7 and row["val_loss"] is not None


@pytest.mark.parametrize("stop", [8, 12])
def test_a_run_that_was_stopped_keeps_the_number_that_the_clock_chose(trained, due_from, stop):
    """It goes on to the same bits, whatever the clock would say now. Before the choice it may choose anew."""
    due_from(10, stop=stop)
    row, folder = trained(*WORDS, "budget.hours=0.5")
    assert row["status"] == "preempted" and row["steps"] == stop
    kept = load_latest(folder / "checkpoints").state["steps_by_clock"]
    assert (kept is None) == (stop == 8)
    due_from(10 if stop == 8 else 10**9)
    row, folder = trained(*WORDS, "budget.hours=0.5")
    assert row["restarts"] == 1 and row["steps_by_clock"] is True and row["steps"] in (kept, 14)
    _, other = trained(*WORDS, f"budget.steps={row['steps']}")
    assert metrics(folder)[-1] == metrics(other)[-1]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("schedule=cosine", "schedule=cosine, whose rates depend on the number of steps .* use schedule=wsd"),
        ("schedule=linear", "schedule=linear, whose rates"),
        ("schedule.decay_fraction=1", "decay_fraction below 1"),
        ("schedule.warmup=0.05", "give it in steps, as schedule.warmup=100"),
        ("schedule.steps=100", "leave one of them out"),
        ("optimizer.weight_decay_steps=1000", "optimizer.weight_decay_steps"),
        ("+interventions.magnitude_pruning.sparsity=0.5", "interventions.magnitude_pruning"),
        ("budget.hours=0", "hours"),
    ],
)
def test_what_needs_the_number_of_steps_is_refused_in_one_line(word, said):
    with pytest.raises(ConfigError, match=said):
        compose([*TINY, *WORDS, "budget.hours=1", word])


def test_the_plan_says_that_the_number_is_not_known_and_runs_that_share_steps_are_refused(tmp_path):
    def planned(more):
        text = f"overrides: {[*TINY, *WORDS, 'budget.hours=1', f'runs_dir={tmp_path}']}\nseeds: [0, 1]\n{more}"
        (tmp_path / "timed.yaml").write_text(text)
        return plan(load_sweep(str(tmp_path / "timed.yaml")))[0]

    assert all("is unknown until it has run" in run.unusual["hours"] for run in planned(""))
    for more, key in (("shared_trunk: true", "shared_trunk"), ("parent: []", "parent")):
        with pytest.raises(ConfigError, match=f"{key} cannot be with budget.hours=1: the clock chooses the steps"):
            planned(more)


def test_what_would_need_the_steps_of_the_plan_is_withheld(tmp_path):
    """The time left, the predicted final loss, and the curve with which others are predicted."""
    text = f"overrides: {[*TINY, *WORDS, f'runs_dir={tmp_path}']}\naxes: {{budget.hours: [null, 1]}}\n"
    (tmp_path / "timed.yaml").write_text(text)
    for run in plan(load_sweep(str(tmp_path / "timed.yaml")))[0]:
        folder = tmp_path / "timed" / run.run_id
        folder.mkdir(parents=True)
        lines = [{"step": step, "tokens": 128 * step, "train_loss": 2.5, "val_loss": 2.5 - 0.01 * step,
                  "tokens_per_second": 128.0} for step in range(0, 31, 5)]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        is_timed = run.config["budget.hours"] is not None
        assert (curve_so_far(run) is None) == is_timed
        with RunFolder(folder):
            state = read_state(run)
        assert state.state == "running" and state.eta_seconds == (None if is_timed else 10.0)
        (state,) = with_predictions([state])
        assert is_timed == ("budget.hours ends them" in state.final.withheld)


def test_a_run_that_the_clock_has_ended_has_all_its_steps_in_the_status(tmp_path, data_dir, due_from):
    text = f"overrides: {[*TINY, *WORDS, 'budget.hours=1', f'data_dir={data_dir}', f'runs_dir={tmp_path}']}\n"
    (tmp_path / "timed.yaml").write_text(text)
    (run,) = plan(load_sweep(str(tmp_path / "timed.yaml")))[0]
    due_from(10)
    row = train(compose(run.overrides), quiet=True)
    record = read_state(run).record()
    assert record["state"] == "finished" and record["step"] == record["steps"] == row["steps"] < run.steps


def test_an_intervention_is_told_the_number_of_steps_if_it_has_the_function_that_gets_it():
    class Told(Intervention):
        def before_update(self, step, steps):
            """It could act at a part of `steps`."""

    assert Told().needs_steps and not Told().prunes and not Intervention().needs_steps
