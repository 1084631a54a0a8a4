"""What is told of runs from their files alone, whole or broken, and the table of their rows."""

import json
from pathlib import Path

import pandas
import pytest

from scaling_testbed.runs.environment import environment, record_start
from scaling_testbed.sweeps.status import collect


@pytest.fixture
def planned(door):
    """Returns a function from overrides to the planned runs, as objects."""
    return lambda *typed: json.loads(door("plan", "--json", *typed)[1])


def write_row(run, **fields):
    folder = Path(run["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"run_id": run["run_id"], "status": "finished"} | fields))


def test_rows_of_any_size_and_mixture_become_a_table(planned):
    runs = planned()
    values = [2**70, 2**62, None, 1.5]
    mixed = [[1], 3, None, "a"]
    logical = [True, 1, None, 2]
    for run, large, mixture, flag in zip(runs, values, mixed, logical, strict=True):
        write_row(run, flops=large, over=[large] if large == 1.5 else large, mixture=mixture, flag=flag)
    folder = Path(runs[0]["folder"]).parent
    _, table, taken = collect(folder)
    found = pandas.read_parquet(table).set_index("run_id").loc[[run["run_id"] for run in runs]]
    assert len(taken) == 4
    assert list(found["flops"].dropna()) == [2.0**70, 2.0**62, 1.5]
    assert list(found["over"].dropna()) == [str(2.0**70), str(2**62), "[1.5]"]
    assert list(found["mixture"].dropna()) == ["[1]", "3", "a"]
    assert list(found["flag"].dropna()) == ["True", "1", "2"]


def test_flops_are_floats_in_plan_and_row(planned):
    assert {type(run[key]) for run in planned() for key in ("flops", "flops_6nd")} == {float}


def test_looking_asks_for_no_number_of_processes(door, states):
    """What submit took for four GPUs is told of by verbs that start nothing, and refused by those that start it."""
    typed = ("parallelism=fsdp", "parallelism.shard_size=2")
    assert {state["state"] for state in states(*typed).values()} == {"pending"}
    assert "holds no result of these runs yet" in door("collect", *typed)[2]
    assert "4 to submit" in door("submit", "--dry-run", "launcher.gpus_per_node=4", *typed)[1]
    status, _, err = door("run", *typed)
    assert status == 2 and "shard_size must divide the 1 processes" in err


def test_broken_files_of_one_run_hide_no_other(door, states, planned):
    """Each run has another broken file; one of them is in the plan of the folder that cannot be read."""
    first, second, third, fourth = (Path(run["folder"]) for run in planned())
    write_row(planned()[3], val_loss=1.0)
    for folder in (first, second, third):
        folder.mkdir()
    (first / "result.json").write_text('{"a": 1}')
    (second / "metrics.jsonl").write_text('{"step": 3, "val_loss": 2.5}\n123\n')
    (third / "lock").write_text('{"host": "x", "pid": "y"}')
    (first.parent / "plan.jsonl").write_bytes(b'{"run_id": "\xff"}\n')
    found = {state["folder"]: state for state in states().values()}
    assert [found[str(folder)]["state"] for folder in (first, second, third, fourth)] == ["pending"] * 3 + ["finished"]
    assert (found[str(second)]["step"], found[str(second)]["loss"]) == (3, 2.5)
    status, out, err = door("collect")
    assert status == 0 and "1 of 4 planned runs, 0 others" in out
    assert f"warning: {first}/result.json holds no complete row; it is left out" in err


def test_a_row_that_cannot_be_read_is_no_run_that_waits(door, states, planned):
    """As in the folder of another user, or where a file server does not answer."""
    first, second = (Path(run["folder"]) for run in planned()[:2])
    write_row(planned()[1], val_loss=1.0)
    (first / "result.json").mkdir(parents=True)
    found = {state["folder"]: state for state in states().values()}
    assert found[str(first)]["state"] == "failed" and found[str(second)]["state"] == "finished"
    assert found[str(first)]["error"] == f"{first}/result.json cannot be read: Is a directory"
    assert f"warning: {found[str(first)]['error']}; it is left out" in door("collect")[2]


def test_collect_takes_the_runs_that_are_typed_and_says_what_else_it_took(door, planned):
    for run in planned():
        write_row(run)
    for run in planned("budget.steps=9")[:1]:
        write_row(run)
    results = Path(planned()[0]["folder"]).parent / "results.jsonl"
    assert "4 of 4 planned runs, 1 others" in door("collect")[1]
    assert "1 of 4 planned runs, 0 others" in door("collect", "budget.steps=9")[1]
    assert [json.loads(line)["run_id"] for line in results.read_text().splitlines()] == [run["run_id"]]
    assert "2 of 2 planned runs, 0 others" in door("collect", "model=bigram")[1]


def test_the_job_of_a_run_stays_known_when_it_stops(planned, states, monkeypatch):
    run = planned()[0]
    write_row(run, status="failed", error="x")
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    record_start(Path(run["folder"]), environment("cpu", "fp32"))
    monkeypatch.delenv("SLURM_JOB_ID")
    found = {state["run_id"]: state for state in states().values()}
    assert (found[run["run_id"]]["state"], found[run["run_id"]]["job"]) == ("failed", "812")
    assert {state["job"] for state in found.values()} == {"812", None}


def test_the_plans_counts_are_the_rows_and_the_budgets_beside_them(planned):
    every, counted = planned()[2], planned("budget.params=n_params_non_embedding")[2]
    assert every["budget_n_params"] == every["n_params"] == counted["n_params"] > counted["budget_n_params"]
    assert every["flops_6nd"] == counted["flops_6nd"] == 6 * every["n_params"] * every["n_tokens"]


def test_what_tells_runs_apart_stays_known_when_a_part_is_typed(door, states, untrained):
    assert door("run", "model=bigram", "optimizer.lr=1e-3,1e-2")[0] == 0
    assert door("run", "model=bigram", "optimizer.lr=1e-2", "seed=0,1")[0] == 0
    found = [line["varied"] for line in states().values()]
    for keys in (("model", "optimizer.lr"), ("model", "optimizer.lr", "seed")):
        assert len({tuple(line[key] for key in keys) for line in found}) == len(keys) + 2  # with a seed one more
    assert {line["optimizer.lr"] for line in found} == {"1e-3", "1e-2"}


def test_the_loss_before_training_is_no_loss_of_a_run_that_was_stopped(planned, states):
    (run,) = planned("model=bigram", "optimizer.lr=1e-3")
    folder = Path(run["folder"])
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text("{}")
    lines = [{"step": 0, "val_loss": 6.5}, {"step": 3, "train_loss": 5.5}]
    for n, loss in ((1, None), (2, 5.5)):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:n]))
        (found,) = states("model=bigram", "optimizer.lr=1e-3").values()
        assert (found["state"], found["loss"]) == ("stopped", loss or 6.5)
