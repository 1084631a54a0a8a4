"""A profile shows the operators of the steps that were asked for, and changes nothing."""

import json

import pytest

from scaling_testbed.config.compose import compose
from scaling_testbed.errors import ConfigError
from scaling_testbed.training import run as trainer
from tests.training.conftest import StopAt, load_latest, metrics


def profiles(folder):
    return sorted(path.name for path in folder.glob("profile-*"))


def test_a_profile_has_its_steps_and_the_run_ends_in_the_same_bits(trained, whole):
    row, folder = trained("compute.profile_steps=4:6", "evaluation.every_steps=6")
    assert profiles(folder) == ["profile-4-6.operators.txt", "profile-4-6.trace.json"]
    names = [event.get("name") for event in json.loads((folder / "profile-4-6.trace.json").read_text())["traceEvents"]]
    steps = [name for name in names if str(name).startswith("Optimizer.step")]
    assert len(steps) == 2 and "aten::mm" in names
    assert "aten::mm" in (folder / "profile-4-6.operators.txt").read_text()
    expected = whole("evaluation.every_steps=6")
    assert metrics(folder) == metrics(expected[1]) and row["run_id"] == expected[0]["run_id"]
    mine, its = (load_latest(one / "checkpoints").tensors["model"] for one in (folder, expected[1]))
    assert all(mine[name].equal(its[name]) for name in its)


def test_a_run_that_stops_within_the_steps_profiles_the_others_when_it_goes_on(trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(14))
        row, folder = trained("compute.profile_steps=2:10")
    assert row["status"] == "preempted"
    _, folder = trained("compute.profile_steps=2:10")
    at = row["steps"]
    assert 2 < at < 10
    assert set(profiles(folder)) == {
        f"profile-{steps}.{kind}" for steps in (f"2-{at}", f"{at}-10") for kind in ("operators.txt", "trace.json")
    }


@pytest.mark.parametrize("value", ["20", "5:5", "6:5", "-1:5", "1:2:3", "a:b"])
def test_steps_that_are_no_range_are_refused(value):
    with pytest.raises(ConfigError, match="profile_steps must be A:B"):
        compose([f"compute.profile_steps='{value}'"])


def test_a_graph_and_a_profile_are_refused_and_late_steps_are_told(trained, tiny, capsys):
    with pytest.raises(ConfigError, match="profile_steps cannot be with cuda_graph=true"):
        compose(["compute.profile_steps=1:2", "compute.cuda_graph=true"])
    run, folder = tiny("compute.profile_steps=12:20")
    trainer.train(run)
    assert "compute.profile_steps=12:20 is after the last step; nothing is profiled" in capsys.readouterr().out
    assert profiles(folder) == []
