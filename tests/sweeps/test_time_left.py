"""The time that a sweep still takes is estimated from several runs, and from what this driver did."""

import json
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaling_testbed.sweeps import local
from scaling_testbed.sweeps.status import RunState

ROW = {"status": "finished", "steps": 4, "val_loss": 1.0}


@pytest.fixture
def standing_in(monkeypatch):
    """Runs that write a row after `seconds` and train nothing."""

    def stand_in(seconds):
        def start(_, run, slot):
            Path(run.folder).mkdir(parents=True, exist_ok=True)
            row = json.dumps({**ROW, "run_id": run.run_id})
            return subprocess.Popen(["sh", "-c", f"sleep {seconds}; echo '{row}' > {run.folder}/result.json"])

        monkeypatch.setattr(local.Driver, "_start", start)
        monkeypatch.setattr(local, "POLL_SECONDS", 0.02)

    return stand_in


def minutes(line):
    found = re.search(r"about (\d+):(\d\d) left", line)
    return None if found is None else 60 * int(found[1]) + int(found[2])


def test_one_run_is_no_estimate_and_two_are(door, standing_in):
    standing_in(0.05)
    lines = door("run")[1].splitlines()[:4]
    assert [line[:3] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert [minutes(line) is None for line in lines] == [True, False, False, True]


def test_after_a_minute_of_one_long_run_there_is_an_estimate(door, standing_in, monkeypatch):
    monkeypatch.setattr(local, "ENOUGH_SECONDS", 0.1)
    standing_in(0.15)
    assert minutes(door("run")[1].splitlines()[0]) is not None


def test_what_was_done_before_does_not_make_the_rest_look_quick(door, standing_in):
    four = ("optimizer.lr=1e-3,1e-2,2e-2,3e-2", "model=bigram")
    for run in json.loads(door("plan", "--json", *four)[1]):  # each stopped at its third step of four
        Path(run["folder"]).mkdir(parents=True)
        with open(f"{run['folder']}/metrics.jsonl", "w") as metrics:
            metrics.write(json.dumps({"step": 3, "train_loss": 2.0}) + "\n")
        with open(f"{run['folder']}/log.txt", "w") as log:
            log.write("stopped\n")
    standing_in(0.7)
    lines = door("run", *four)[1].splitlines()
    assert minutes(lines[1]) >= 1  # two of four equal runs are left: as long as the first two took


def test_what_the_runs_at_work_have_done_counts(monkeypatch, capsys):
    """Four equal runs, two at a time: one has ended, its neighbour is at half, and 60 seconds have passed."""
    runs = [
        SimpleNamespace(first_step=0, run_id=name, label=name, flops=1.0, steps=4, folder=name, config={})
        for name in "abcd"
    ]
    states = {run.run_id: RunState(run=run, state="pending") for run in runs}
    driver = local.Driver(runs, [{}, {}], states=dict(states))
    driver._due, driver._began = list(runs), time.monotonic() - 60
    driver._done_before = dict.fromkeys(states, 0.0)
    driver.waiting, driver.children = runs[2:], {"b": (None, runs[1], {})}
    driver.states["a"] = RunState(run=runs[0], state="finished", step=4, loss=1.0)
    monkeypatch.setattr(driver, "_read", lambda run: RunState(run=run, state="running", step=2))
    driver._say(runs[0])
    assert minutes(capsys.readouterr().out) == 100  # 2.5 runs are left, and 1.5 took a minute


def test_a_retry_with_nothing_to_retry_says_so(door, standing_in, tmp_path):
    standing_in(0)
    said = "no run has failed, so there is nothing to retry"
    code, out, _ = door("retry", "--dry-run")
    assert code == 0 and f"{said}; unfinished runs are started, as with `sweep run`" in out
    assert said not in door("run")[1]
    code, out, _ = door("retry")
    assert code == 0 and out.startswith(f"{said}\n")
    (failed,) = list((tmp_path / "runs").glob("*/*/result.json"))[:1]
    failed.write_text(json.dumps({"status": "failed", "run_id": failed.parent.name, "error": "no space"}))
    code, out, _ = door("retry")
    assert code == 0 and said not in out
