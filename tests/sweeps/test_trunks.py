"""Runs that share a trunk end in the bits of whole runs, and each waits for the run in whose state it begins."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from scaling_testbed import sweep
from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.analysis.trajectories.points import curves_of
from scaling_testbed.commands.submission import with_a_parent
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import run_id
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps import slurm
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.local import Driver, slots, with_followers
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.slurm import SlurmConfig
from scaling_testbed.sweeps.status import RunState
from scaling_testbed.sweeps.trunks import saving, without_checkpoint
from tests.sweeps.cluster import until

LADDER = """
overrides: [data=markov, data.n_tokens=20000, data.n_validation_tokens=4000, batch.sequences=8, model=bigram,
            batch.sequence_length=16, evaluation.tokens=1024, evaluation.every_steps=0, compute.threads=1,
            compute.device=cpu, schedule=wsd, schedule.warmup=2, checkpoint.every_steps=0, checkpoint.at_end=false]
axes:
  budget.steps: [20, 10, 15]
seeds: [0, 1]
"""


@pytest.fixture
def ladder(tmp_path):
    """Returns a function from the end of the file to (runs, number of duplicates) of its plan."""

    def make(text="shared_trunk: true\n", of=LADDER, name="ladder"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(of + text)
        loaded = load_sweep(str(path))
        return plan(replace(loaded, overrides=[*loaded.overrides, f"runs_dir={tmp_path / 'runs'}"]))

    return make


def test_each_budget_has_a_part_of_the_trunk_that_begins_where_the_one_before_ends(ladder):
    runs, same = ladder()
    assert same == 0 and len(runs) == 12
    first = [run for run in runs if run.config["seed"] == 0]
    parts = [run for run in first if run.is_part]
    branches = [run for run in first if not run.is_part]
    assert [(run.first_step, run.steps) for run in parts] == [(0, 8), (8, 12), (12, 16)]
    assert [(run.first_step, run.steps) for run in branches] == [(8, 10), (12, 15), (16, 20)]
    assert [run.after for run in parts] == [None, parts[0].run_id, parts[1].run_id]
    assert [run.after for run in branches] == [run.run_id for run in parts]
    assert all("/ladder/trunk/" in run.folder for run in parts)
    assert [run.n_tokens for run in branches] == [10 * 128, 15 * 128, 20 * 128]
    per_step = branches[0].flops / 2
    assert [run.flops / per_step for run in first] == pytest.approx([8, 2, 4, 3, 4, 4])
    assert saving(runs) == (
        f"6 runs share trunks in 6 parts: {50 * per_step:.3g} FLOPs, 56% of the {90 * per_step:.3g} of whole runs"
    )
    whole, _ = ladder("shared_trunk: false\n", name="whole")
    assert {run.run_id for run in whole} == {run.run_id for run in runs if not run.is_part}
    for run in runs:  # the words of a run mean this run
        assert run_id(compose(run.overrides)) == run.run_id


def test_a_middle_or_a_single_budget_has_the_run_ids_of_the_whole_ladder(ladder):
    ids = {run.run_id for run in ladder()[0] if not run.is_part}
    for text in (LADDER.replace("[20, 10, 15]", "[15]"), LADDER.replace("[20, 10, 15]", "[20, 10]")):
        assert {run.run_id for run in ladder(of=text)[0] if not run.is_part} < ids


def test_a_longer_budget_changes_no_run_before_it(ladder):
    before, after = (
        {run.run_id for run in ladder(of=text)[0]} for text in (LADDER, LADDER.replace("20, ", "20, 30, "))
    )
    assert before < after and len(after) == len(before) + 4


def test_the_branches_end_in_the_bits_of_whole_runs(ladder, tmp_path, data_dir, capfd, monkeypatch, python):
    monkeypatch.setattr("sys.executable", python)
    losses = {}
    for name, text in (("whole", "shared_trunk: false\n"), ("shared", "shared_trunk: true\n")):
        ladder(text, name=name)
        words = [f"sweep={tmp_path / name}.yaml", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}", "seed=0"]
        assert sweep.main(["run", *words, "--workers", "2"]) == 0, capfd.readouterr()
        assert sweep.main(["collect", *words]) == 0
        assert "3 of 3 planned runs, 0 others" in capfd.readouterr().out
        rows = [json.loads(line) for line in (tmp_path / "runs" / name / "results.jsonl").read_text().splitlines()]
        losses[name] = {row["steps"]: (row["val_loss"], row["train_loss_last"]) for row in rows}
    assert len(losses["whole"]) == 3 and losses["shared"] == losses["whole"]
    # The folder is read back: every run is finished, none is missing or changed, and a second run does nothing.
    capfd.readouterr()
    assert sweep.main(["status", *words[:3], "--json"]) == 0
    states = json.loads(capfd.readouterr().out)
    assert [state["state"] for state in states if state["run_id"] in {row["run_id"] for row in rows}] == [
        "finished"
    ] * 3
    assert sweep.main(["status", *words]) == 0
    out = capfd.readouterr().out
    assert "6 finished" in out and f"records under {tmp_path / 'runs' / 'shared'}/" in out
    assert sweep.main(["run", *words]) == 0
    found = load(tmp_path / "runs" / "shared")
    assert len(found.rows) == 3 and found.missing == []
    fitted, said = columns.of_study(found)
    assert len(fitted) == 3 and said == []
    with pytest.raises(UserError, match="3 runs began in the state of another run"):
        curves_of(tmp_path / "runs" / "shared")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LADDER.replace("schedule=wsd", "schedule=cosine"), "no run has schedule=wsd"),
        (LADDER.replace("warmup=2", "warmup=0.1"), r"other warm-ups \(1 to 2 steps\); give schedule.warmup= in steps"),
        (LADDER.replace("warmup=2", "warmup=8"), "begins at step 8, in its warm-up of 8"),
        (LADDER.replace("model=bigram", "model=bigram, schedule.steps=50"), "schedule.steps is set by the sweep"),
        (LADDER.replace("model=bigram", "model=bigram, optimizer.weight_decay_steps=50"), "depends on their length"),
        (
            LADDER.replace("model=bigram", "model=nano_xs, +interventions.magnitude_pruning.sparsity=0.5").replace(
                "warmup=2", "warmup=2, +interventions.magnitude_pruning.every_steps=1"
            ),
            "interventions.magnitude_pruning is told the number of all steps",
        ),
    ],
)
def test_runs_without_a_common_trunk_are_refused(ladder, text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        ladder(of=text)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_no_truth_is_refused(ladder):
    with pytest.raises(ConfigError, match="shared_trunk must be one of true, false"):
        ladder("shared_trunk: maybe\n")


def test_runs_after_one_that_failed_have_failed_and_others_go_on(ladder, monkeypatch, tmp_path):
    runs, _ = ladder()
    started, broken = [], runs[0]

    def start(_driver, run, _slot):
        assert run.after is None or (Path(known[run.after].folder) / "result.json").exists()
        started.append(run.run_id)
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        status = "failed" if run.run_id == broken.run_id else "finished"
        row = {"run_id": run.run_id, "status": status, "steps": run.steps, "val_loss": 2.0, "error": "no luck"}
        (folder / "result.json").write_text(json.dumps(row))
        return subprocess.Popen(["true"])

    known = {run.run_id: run for run in runs}
    monkeypatch.setattr(Driver, "_start", start)
    driver = Driver(runs, slots(2, [], 1))
    assert driver.drive() == 1
    after_broken = [run for run in runs if run.config["seed"] == broken.config["seed"]]
    assert len(started) == 1 + 6 and len(driver.failures) == len(after_broken) == 6
    assert all("ends, and that run is failed" in driver.failures[run.run_id] for run in after_broken[1:])


def test_runs_after_a_trunk_that_diverged_are_trained_whole(ladder, monkeypatch):
    runs, _ = ladder()
    words = {}

    def start(self, run, _slot):
        words[run.run_id] = self._is_trained_whole(run)
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        row = {
            "run_id": run.run_id,
            "status": "diverged",
            "steps": 3,
            "val_loss": 9.0,
            "error": "the loss is not finite",
        }
        (folder / "result.json").write_text(json.dumps(row))
        return subprocess.Popen(["true"])

    monkeypatch.setattr(Driver, "_start", start)
    driver = Driver(runs, slots(2, [], 1))
    assert driver.drive() == 0 and driver.failures == {}
    assert words == {run.run_id: run.after is not None for run in runs}


def test_a_cluster_gets_no_run_whose_parent_has_failed(ladder, capsys):
    runs, _ = ladder()
    first = [run for run in runs if run.config["seed"] == 0]
    states = [RunState(run=run, state="failed" if run is first[0] else "pending") for run in runs]
    due = [state.run for state in states if state.state == "pending"]
    kept = with_a_parent(due, states)
    assert {run.config["seed"] for run in kept} == {1} and "5 runs are not submitted" in capsys.readouterr().err
    states = [replace(state, state="finished") if state.run is first[0] else state for state in states]
    assert with_a_parent(due, states) == due


def test_the_longest_chain_goes_first(ladder):
    runs, _ = ladder()
    chain = with_followers(runs)
    first = max(runs, key=lambda run: chain[run.run_id])
    assert first.is_part and first.after is None
    per_step = first.flops / 8
    assert chain[first.run_id] == pytest.approx(20 * per_step)


def test_on_a_cluster_each_generation_waits_for_the_one_before(ladder, tmp_path):
    runs, _ = ladder()
    groups = slurm.generations(runs)
    assert [sorted(run.steps for run in group) for group in groups] == [
        [8, 8],
        [10, 10, 12, 12],
        [15, 15, 16, 16],
        [20, 20],
    ]
    assert [len(group) for group in slurm.generations(groups[1])] == [4]
    (one,) = slurm.write_submissions(groups[1], SlurmConfig(), 1000, ["17", "18"])
    assert "#SBATCH --dependency=afterany:17:18" in one.script and one.folder.parent.parent.name == "ladder"
    (one,) = slurm.write_submissions(groups[0], SlurmConfig(), 1000)
    assert "dependency" not in one.script and one.folder.parent.parent.name == "ladder"


def test_a_step_that_was_looked_up_is_in_the_words_of_the_plan(ladder, tmp_path):
    parent = tmp_path / "runs/a/0123456789ab"
    (parent / "checkpoints/step-00000004").mkdir(parents=True)
    runs, _ = ladder(
        f"axes: {{start.run: [{parent}]}}\n", of=LADDER.replace("axes:\n  budget.steps: [20, 10, 15]\n", "")
    )
    assert [run.overrides[-1] for run in runs] == ["start.step=4"] * 2
    assert [run.first_step for run in runs] == [4, 4]
    (parent / "checkpoints/step-00000006").mkdir()
    assert [run_id(compose(run.overrides)) for run in runs] == [run.run_id for run in runs]


ARMS = """
overrides: [data=markov, data.n_tokens=20000, data.n_validation_tokens=4000, batch.sequences=8, model=bigram,
            batch.sequence_length=16, evaluation.tokens=1024, evaluation.every_steps=0, compute.threads=1,
            compute.device=cpu, budget.steps=12, logging.every_steps=1, checkpoint.every_steps=0, start.step=8]
axes:
  start.take: ["[weights,optimizer,step]", "[weights,step]"]
  start.rewarm: [0, 2]
seeds: [0, 1]
"""


GROWN = """
overrides: [data=markov, data.n_tokens=20000, data.n_validation_tokens=4000, batch.sequences=8, model=nano_s,
            batch.sequence_length=16, evaluation.tokens=1024, evaluation.every_steps=0, compute.threads=1,
            compute.device=cpu, checkpoint.every_steps=0]
together:
  - - {+start.grow: {width: fpi}, start.take: "[weights]", budget.steps: 6}
    - {+start.grow: {}, start.run: null, budget.steps: 8}
rules: {optimizer.lr: 0.1/d_model}
seeds: [0, 1]
"""


def test_runs_that_begin_in_the_state_of_one_parent_share_it(ladder):
    runs, same = ladder("parent: [budget.steps=10]\n", of=ARMS)
    parents, arms = runs[:2], runs[2:]
    assert same == 0 and len(arms) == 8 and all(run.is_part for run in parents)
    assert [run.steps for run in parents] == [10, 10] and [run.config["seed"] for run in parents] == [0, 1]
    assert {run.after for run in arms} == {run.run_id for run in parents}
    assert all(run.first_step == 8 and "checkpoint.keep_steps=[8]" in parents[0].overrides for run in arms)
    for run in runs:
        assert run_id(compose(run.overrides)) == run.run_id
    with pytest.raises(ConfigError, match="start.step=12 is not before the last of the 12 steps"):
        ladder("parent: []\n", of=ARMS.replace(", start.step=8", ""))


def test_each_arm_begins_with_the_state_of_its_seed(ladder, tmp_path, data_dir, capfd, monkeypatch, python):
    monkeypatch.setattr("sys.executable", python)
    ladder("parent: []\n", of=ARMS, name="arms")
    words = [f"sweep={tmp_path / 'arms'}.yaml", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    assert sweep.main(["run", *words, "--workers", "2"]) == 0, capfd.readouterr()
    rows = [json.loads(file.read_text()) for file in (tmp_path / "runs/arms").rglob("result.json")]
    whole = {row["seed"]: row["val_loss"] for row in rows if row["lineage"] is None}
    arms = [row for row in rows if row["lineage"] is not None]
    assert len(whole) == 2 and len(arms) == 8
    for row in arms:
        same = row["start.take"] == ["weights", "optimizer", "step"] and row["start.rewarm"] == 0
        assert (row["val_loss"] == whole[row["seed"]]) is same


@pytest.mark.parametrize(
    ("text", "of", "said"),
    [
        (
            "parent: []\n",
            ARMS.replace("start.step=8", "start.step=15"),
            "start.step must be a step of the parent, which has 12; got 15",
        ),
        (
            "parent: []\n",
            ARMS.replace("start.step=8", "start.step=last"),
            "must be a step of the parent, which has 12; got last",
        ),
        ("parent: []\nshared_trunk: true\n", ARMS, "shared_trunk and parent both say where the runs begin"),
        (
            "parent: []\n",
            ARMS.replace("start.step=8", "start.run=runs/a/0123456789ab"),
            "start.run=runs/a/0123456789ab: with parent: in a sweep, .* or write start.run=null",
        ),
        ("parent: []\n", ARMS.replace("start.step=8", "start.run=null"), "every run has start.run=null"),
        (
            "parent: [budget.steps=4]\n",
            GROWN.replace("budget.steps: 8", "start.take: '[weights]', budget.steps: 8"),
            "start.take needs start.run=FOLDER",
        ),
        ("parent: [5]\n", ARMS, "parent: overrides are written key=value"),
    ],
)
def test_a_parent_that_cannot_be_is_refused_when_the_sweep_is_planned(ladder, text, of, said):
    with pytest.raises(ConfigError, match=said):
        ladder(text, of=of)


def test_the_parent_keeps_the_steps_that_it_is_asked_to_keep_too(ladder):
    runs, _ = ladder('parent: ["checkpoint.keep_steps=[5]"]\n', of=ARMS)
    assert runs[0].overrides[-1] == "checkpoint.keep_steps=[5,8]"


def test_a_parent_has_its_own_values_in_place_of_those_of_a_run_and_a_run_can_begin_from_scratch(ladder):
    runs, same = ladder("parent: [model=nano_xs, budget.steps=4]\n", of=GROWN)
    parents, grown = runs[:2], [run for run in runs if run.after]
    scratch = [run for run in runs[2:] if run.after is None]
    assert same == 0 and (len(parents), len(grown), len(scratch)) == (2, 2, 2)
    assert [run.config["model.name"] for run in runs] == ["nano_xs"] * 2 + ["nano_s"] * 4
    assert {run.steps for run in parents} == {4} and {run.steps for run in scratch} == {8}
    assert [run.varied for run in parents] == [{"seed": "0"}, {"seed": "1"}]
    assert not any(key.startswith("start.grow.") for run in [*parents, *scratch] for key in run.config)
    assert {run.after for run in grown} == {run.run_id for run in parents}
    assert {run.config["start.step"] for run in grown} == {4} and {run.first_step for run in grown} == {0}
    assert {run.config["optimizer.lr"] for run in parents} == {0.00625}, "the rule for the parent's own model"
    assert {run.config["optimizer.lr"] for run in grown} == {0.003125}
    for run in runs:
        assert run_id(compose(run.overrides)) == run.run_id
    plain = [[text for text in run.overrides if "start." not in text] for run in scratch]
    assert [run.run_id for run in scratch] == [run_id(compose(words)) for words in plain]


def test_a_parent_replaces_the_value_of_an_axis_and_of_a_rule(ladder):
    axes = ARMS.replace("axes:", "axes:\n  model: [bigram, nano_xs]").replace("model=bigram,", "optimizer.lr=1e-2,")
    runs, _ = ladder("parent: [model=nano_s, optimizer.lr=2e-2]\n", of=axes)
    parents = [run for run in runs if run.is_part]
    assert len(parents) == 2 and {run.varied["model"] for run in parents} == {"nano_s"}
    assert {(run.config["model.name"], run.config["optimizer.lr"]) for run in parents} == {("nano_s", 0.02)}
    runs, _ = ladder("parent: [model=nano_xs, budget.steps=4, optimizer.lr=0.5]\n", of=GROWN)
    assert {run.config["optimizer.lr"] for run in runs if run.is_part} == {0.5}
    key = "interventions.magnitude_pruning"
    pruned = ARMS.replace("start.step=8", f"start.step=8, +{key}.every_steps=1, +{key}.sparsity=0.5")
    runs, _ = ladder(f"parent: [+{key}.sparsity=0.2]\n", of=pruned)
    assert {(run.is_part, run.config[f"{key}.sparsity"]) for run in runs} == {(True, 0.2), (False, 0.5)}


def test_a_finished_parent_without_the_step_is_named_in_the_plan(ladder, tmp_path):
    runs, _ = ladder("parent: []\n", of=ARMS)
    parents = [Path(run.folder) for run in runs if run.is_part]
    assert without_checkpoint(runs) == []
    for folder in parents:
        (folder / "checkpoints/step-00000012").mkdir(parents=True)
        (folder / "result.json").write_text('{"status": "finished", "steps": 12}')
    (parents[1] / "checkpoints/step-00000008").mkdir()
    (said,) = without_checkpoint(runs)
    lost = "has finished without a checkpoint of step 8, in which 4 unfinished runs begin; delete this folder"
    assert said.startswith(f"{parents[0]} {lost}")
    for run in runs:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        (Path(run.folder) / "result.json").write_text('{"status": "finished", "steps": 12}')
    assert without_checkpoint(runs) == []


@pytest.mark.slurm
def test_a_cluster_takes_a_shared_trunk_to_its_end_part_by_part(cluster, ladder, tmp_path, data_dir, capfd):
    ladder()
    words = [f"sweep={tmp_path}/ladder.yaml", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    words += ["seed=0", "budget.steps=10,15"]
    assert sweep.main(["submit", *words, "launcher.cpus_per_process=4"]) == 0
    out = capfd.readouterr().out
    assert "4 to submit" in out and out.count("after job") == 2

    def states():
        capfd.readouterr()
        assert sweep.main(["status", *words, "--json"]) == 0
        return [state["state"] for state in json.loads(capfd.readouterr().out)]

    until(lambda: states() == ["finished"] * 4, 240)
