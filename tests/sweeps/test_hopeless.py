"""Runs that a sweep stops, because their predicted final loss is too high: --stop-hopeless."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats  # noqa: F401 - the first prediction would import it while the run trains

from scaling_testbed import api
from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.analysis.trajectories.final_loss import FinalLoss
from scaling_testbed.errors import ConfigError
from scaling_testbed.report.sweep import _grid
from scaling_testbed.runs.hopeless import HOPELESS_FILE, Hopeless, read_call
from scaling_testbed.runs.lease import Owner
from scaling_testbed.sweeps import local
from scaling_testbed.sweeps.hopeless import Judge, hopeless
from scaling_testbed.sweeps.status import RunState, read_state
from tests.sweeps.test_view import RUN

FINAL = FinalLoss(loss=3.2, low=3.06, high=3.4, step=120, n_runs=5, like="the schedule")
CONFIG = {"data.name": "markov", "data.seed": 0, "evaluation.tokens": 1024, "batch.sequence_length": 16}
AT_WORK = replace(RUN, config=CONFIG)


def ended(name, loss, **changed):
    return RunState(run=replace(AT_WORK, run_id=name, **changed), state="finished", loss=loss)


def test_a_run_is_hopeless_if_the_low_end_lies_above_the_best_comparable_loss_by_more_than_the_margin():
    rivals = [ended("good", 3.0), ended("bad", 4.0)]
    found = hopeless(AT_WORK, FINAL, rivals, 0.05)
    assert (found.best_run, found.best_loss, found.margin, found.step) == ("good", 3.0, 0.05, 120)
    assert (found.predicted_low, found.predicted_loss, found.predicted_n_runs) == (3.06, 3.2, 5)
    assert str(found) == ("predicted final loss 3.06 to 3.4 at step 120, more than 0.05 nats above 3 of run good")
    assert hopeless(AT_WORK, FINAL, rivals, 0.07) is None
    assert hopeless(AT_WORK, FINAL, [ended("bad", 4.0)], 0.05) is None
    assert hopeless(AT_WORK, FinalLoss(withheld="too few runs"), rivals, 0.05) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"n_params": 999}, {"n_tokens": 10_000}, {"config": CONFIG | {"data.seed": 1}},
        {"config": CONFIG | {"batch.sequence_length": 32}}, {"config": CONFIG | {"evaluation.tokens": 512}},
    ],
)  # fmt: skip
def test_a_run_of_another_size_length_or_data_is_no_rival(changed):
    assert hopeless(AT_WORK, FINAL, [ended("good", 3.0, **changed)], 0.05) is None
    assert hopeless(AT_WORK, FINAL, [ended("good", 3.0, config=CONFIG | {"optimizer.lr": 1.0})], 0.05)


def test_a_run_is_looked_at_once_for_each_evaluation_after_its_start(trained):
    done = [replace(state, loss=2.05 * (1 + place / 99)) for place in range(6) for state in [trained(f"f{place}")]]
    begun = trained("u", "running", 1.5, 100).run
    begun = replace(begun, config=begun.config | {"evaluation.every_steps": 20})
    done = [replace(one, run=replace(one.run, config=one.run.config | {"evaluation.every_steps": 20})) for one in done]

    judge = Judge(0.05)
    judge.begin(begun)
    assert judge.call(begun, done) is None  # its evaluation is older than its start
    path = Path(begun.folder) / "metrics.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps({"step": 120, "val_loss": 1.5 * (2 + 20 / 120)}) + "\n")
    found = judge.call(begun, done)
    assert found.step == 120 and found.predicted_loss == pytest.approx(1.5 * 2.05) and found.best_run == "f0"
    assert judge.call(begun, done) is None  # looked at already
    assert Judge(0.05).call(replace(begun, steps=481), done) is None  # 120 is less than a quarter
    assert Judge(1.5).call(begun, done) is None and Judge(0.05).call(begun, done[:4]) is None
    assert Judge(0.05, done).call(begun, []).best_run == "f0"  # by runs of the sweep that were not asked for
    assert Judge(0.05).call(replace(begun, config={**begun.config, "evaluation.every_steps": None}), done) is None


WORDS = ("model=bigram", "optimizer.lr=1e-2,12e-3,14e-3,16e-3,18e-3,1e-06", "budget.steps=1000", "seed=0")
WORDS += ("evaluation.every_steps=50", "logging.every_steps=50", "schedule=constant", "evaluation.tokens=256")


def a_run_that_has_ended(run, loss):
    """Write what a run leaves whose loss has not changed after its first evaluation."""
    folder = Path(run.folder)
    folder.mkdir(parents=True)
    curve = [{"step": step, "val_loss": loss * (1 + 0.01 * (step == 50))} for step in range(50, 1001, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in curve))
    row = {"run_id": run.run_id, "status": "finished", "steps": 1000, "val_loss": loss, "val_loss_initial": 3.93}
    row |= {"schema_version": 1, **run.config}
    (folder / "result.json").write_text(json.dumps(row))
    return subprocess.Popen(["true"])


@pytest.fixture
def only_the_lowest_rate_is_trained(monkeypatch):
    start, trains = local.Driver._start, "1e-06"

    def stand_in(driver, run, slot):
        if (rate := run.varied["optimizer.lr"]) == trains:
            return start(driver, run, slot)
        return a_run_that_has_ended(run, 3.44 + float(rate))

    monkeypatch.setattr(local.Driver, "_start", stand_in)
    monkeypatch.setattr(local, "JUDGE_SECONDS", 0.0)


@pytest.mark.usefixtures("only_the_lowest_rate_is_trained")
def test_a_rate_that_is_far_too_low_is_stopped_stays_so_and_continues_when_asked(door, states, tmp_path, monkeypatch):
    code, out, err = door("run", "--stop-hopeless", "0.05", *WORDS)
    found = {one["varied"]["optimizer.lr"]: one for one in states(*WORDS).values()}
    bad = found.pop("1e-06")
    assert (code, bad["state"]) == (0, "hopeless"), (out, err)
    assert {one["state"] for one in found.values()} == {"finished"}
    assert "1 run was stopped as hopeless" in err and "a mean over the other seeds" in err and "failed" not in err
    folder = Path(bad["folder"])
    row, call = json.loads((folder / "result.json").read_text()), read_call(folder)
    assert (row["status"], row["val_loss"], row["error"]) == ("hopeless", None, str(call))
    assert 250 <= call.step <= row["steps"] < 1000 and call.excess > 0.05 and bad["hopeless"]["step"] == call.step
    assert any((folder / "checkpoints").iterdir())

    study = load(tmp_path / "runs/tiny")
    (s,) = api.lr_sensitivity(study, lr_range=(1e-6, 2e-2))
    assert s.s is None and "1 missing" in s.withheld and "hopeless" in s.withheld
    page = str(_grid(study))
    assert "5 finished, 1 hopeless." in page and "a mean over the other seeds of the same setting is too low" in page
    assert any("stopped as hopeless" in text for text in columns.of_study(study)[1])
    assert "6 of 6 planned runs" in door("collect", *WORDS)[1]
    assert "1 run was stopped as hopeless" in door("status", *WORDS)[1]

    dry = lambda *more: door("run", "--dry-run", *more, *WORDS)[1]  # noqa: E731
    assert "0 to start" in dry("--stop-hopeless", "0.05") and "1 to start" in dry("--stop-hopeless", "9")
    assert "1 to start" in dry()
    with monkeypatch.context() as patched:
        patched.setattr(local.Driver, "_start", lambda *_: pytest.fail("a hopeless run was started again"))
        assert door("run", "--stop-hopeless", "0.05", *WORDS)[0] == 0

    assert door("run", *WORDS)[0] == 0
    row = json.loads((folder / "result.json").read_text())
    assert (row["status"], row["steps"], row["restarts"]) == ("finished", 1000, 1)
    assert not (folder / HOPELESS_FILE).exists()


CALL = Hopeless(
    step=120, predicted_loss=3.2, predicted_low=3.06, predicted_high=3.4, predicted_n_runs=5,
    predicted_like="the schedule", best_loss=3.0, best_run="good", margin=0.05,
)  # fmt: skip


def test_a_run_that_is_killed_before_it_saves_is_hopeless_and_a_result_outranks_the_call(tmp_path):
    run = replace(AT_WORK, run_id="u", folder=str(tmp_path / "u"))
    Path(run.folder).mkdir()
    CALL.write(Path(run.folder))
    state = read_state(run)
    assert (state.state, state.hopeless, state.error) == ("hopeless", CALL, str(CALL))
    assert state.stays_stopped(0.05) and not state.stays_stopped(0.06 + 1e-9) and not state.stays_stopped(None)
    row = {"schema_version": 1, "run_id": "u", "status": "finished", "val_loss": 3.1}
    (tmp_path / "u/result.json").write_text(json.dumps(row))
    assert read_state(run).state == "finished"


def test_a_damaged_call_leaves_its_run_stopped_or_as_its_row_says(tmp_path):
    run = replace(AT_WORK, run_id="u", folder=str(tmp_path / "u"))
    Path(run.folder).mkdir()
    (tmp_path / "u/log.txt").write_text("")
    (tmp_path / "u" / HOPELESS_FILE).write_text('{"step": 120}')
    assert read_state(run).state == "stopped"
    row = {"schema_version": 1, "run_id": "u", "status": "hopeless", "error": "predicted final loss too high"}
    (tmp_path / "u/result.json").write_text(json.dumps(row))
    state = read_state(run)
    assert (state.state, state.error) == ("hopeless", "predicted final loss too high") and state.stays_stopped(9.0)


def test_a_run_that_another_driver_stopped_as_hopeless_is_no_failure_and_stays_stopped(door, monkeypatch):
    (planned, *_) = json.loads(door("plan", "--json", "model=bigram", "optimizer.lr=1e-3")[1])
    seen = []

    def owner(path):
        if seen:
            return None
        seen.append(path)
        path.parent.mkdir(parents=True)
        CALL.write(path.parent)
        return Owner("another-machine", 7)

    monkeypatch.setattr(local, "owner_of", owner)
    monkeypatch.setattr(local.Driver, "_start", lambda *_: pytest.fail("it was started"))
    code, out, err = door("run", "--stop-hopeless", "0.05", "model=bigram", "optimizer.lr=1e-3")
    assert code == 0 and "another-machine pid 7" in err and "1 hopeless" in out and "failed" not in err
    assert read_call(Path(planned["folder"])) == CALL


@pytest.mark.parametrize(
    ("verb", "more", "said"),
    [
        ("submit", ["--stop-hopeless", "0.05"], "submit: there is no option --stop-hopeless"),
        ("retry", ["--stop-hopeless", "0.05", "--launcher", "slurm"], "--stop-hopeless applies to this machine only"),
        ("run", ["--stop-hopeless", "-0.1"], "--stop-hopeless must be a margin in nats of at least 0"),
    ],
)
def test_what_cannot_stop_runs_refuses_the_option(door, verb, more, said):
    code, _, err = door(verb, *more)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_the_margin_of_a_call_in_python_reaches_the_driver(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(local.Driver, "drive", lambda driver: seen.append(driver.stop_hopeless) or 0)
    words = [f"runs_dir={tmp_path}", "data=markov", "model=bigram", "optimizer.lr=1e-3", "model.qk_norm=none"]
    assert api.run_sweep("nano_lr", words, stop_hopeless=0.05) == [] == api.run_sweep("nano_lr", words)
    assert seen == [0.05, None]
    with pytest.raises(ConfigError, match="stop_hopeless must be finite and not negative; got -1"):
        api.run_sweep("nano_lr", words, stop_hopeless=-1)
