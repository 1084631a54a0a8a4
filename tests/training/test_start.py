"""A run that begins in the state of another: with all of it, it goes on as if it had never stopped, to the bit."""

import hashlib
import json
import shutil

import pytest
import torch

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.rows.study import Study
from scaling_testbed.config.compose import compose, recorded_run
from scaling_testbed.config.run import run_id
from scaling_testbed.data.batches import TrainingBatches
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.runs.identity import AtHand
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt, load_latest, metrics

OPTIONS = {
    "plain": [],
    "muon": ["optimizer=muon", "optimizer.lr=1e-3"],
    "skipping": ["optimizer.skip_spikes_sigmas=0.5", "optimizer.skip_spikes_window=4"],
}


def assert_same_state(one, other):
    first, second = tensors(one), tensors(other)
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in second["model"].items())
    assert first["optimizer"]["state"].keys() == second["optimizer"]["state"].keys()
    for index, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][index][key]) for key, value in state.items())


def tensors(folder):
    return load_latest(folder / "checkpoints").tensors


def files_of(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_that_takes_all_ends_as_if_it_had_never_stopped(whole, trained, options):
    row, parent = whole(*options)
    before = files_of(parent)
    branch, folder = trained(*options, f"start.run={parent}", "start.step=8")
    assert_same_state(folder, parent)
    assert metrics(folder)[1:] == [line for line in metrics(parent) if line["step"] > 8]
    assert files_of(parent) == before
    same = ("val_loss", "val_loss_initial", "n_tokens", "flops", "steps", "epochs", "train_loss_last")
    assert [branch[key] for key in same] == [row[key] for key in same]
    (entry,) = branch["lineage"]
    assert (entry["run_id"], entry["step"], entry["steps"]) == (row["run_id"], 8, 8)
    assert branch["n_tokens_here"] == 4 * 128 and branch["n_tokens_total"] == row["n_tokens"]
    assert branch["flops_total"] == pytest.approx(row["flops"], rel=1e-12)
    assert branch["flops_here"] == pytest.approx(row["flops"] / 3, rel=1e-12)


def test_a_branch_that_was_stopped_goes_on_to_the_same_bits(whole, tiny, trained):
    _, parent = whole()
    run, folder = tiny(f"start.run={parent}", "start.step=8")
    with StopAt(4) as stop:
        first = train(run, stop, quiet=True)
    assert first["status"] == "preempted" and 8 <= first["steps"] < 12
    again = train(run, quiet=True)
    assert_same_state(folder, parent)
    assert again["lineage"][0]["step"] == 8 and again["val_loss_start"] == metrics(folder)[0]["val_loss"]


def test_without_step_a_run_begins_at_step_0_and_without_optimizer_with_new_moments(whole, trained):
    _, parent = whole()
    row, folder = trained(f"start.run={parent}", "start.step=12", "start.take=[weights]", "budget.steps=1")
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["val_loss"] == metrics(parent)[-1]["val_loss"]
    assert row["n_tokens"] == row["n_tokens_here"] == 128 and row["n_tokens_total"] == 13 * 128
    state = tensors(folder)["optimizer"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {1.0}
    kept, other = trained(f"start.run={parent}", "start.step=12", "start.take=[weights,optimizer]", "budget.steps=1")
    assert {float(entry["step"]) for entry in tensors(other)["optimizer"]["state"].values()} == {13.0}
    assert kept["run_id"] != row["run_id"]


def test_the_optimizer_s_settings_are_those_of_the_branch(whole, trained):
    _, parent = whole()
    _, folder = trained(f"start.run={parent}", "start.step=8", "optimizer.weight_decay=0.5", "optimizer.eps=1e-3")
    groups = tensors(folder)["optimizer"]["param_groups"]
    assert {group["eps"] for group in groups} == {1e-3}
    assert max(group["weight_decay"] for group in groups) != max(
        group["weight_decay"] for group in tensors(parent)["optimizer"]["param_groups"]
    )


def test_the_rate_is_warmed_up_again_from_the_first_step_of_the_branch(whole, trained):
    _, parent = whole()
    _, folder = trained(
        f"start.run={parent}", "start.step=8", "start.take=[weights,step]", "start.rewarm=2", "schedule=cosine"
    )
    before = {line["step"]: line["lr"] for line in metrics(parent) if "lr" in line}
    after = {line["step"]: line["lr"] for line in metrics(folder) if "lr" in line}
    assert after == {9: before[9] / 2, 10: before[10], 11: before[11], 12: before[12]}


def test_the_identity_has_the_parent_s_run_id_and_not_its_place(whole, tiny, tmp_path):
    row, parent = whole()
    elsewhere = shutil.copytree(parent, tmp_path / "elsewhere" / parent.name)
    one, two = (tiny(f"start.run={place}", "start.step=8")[0] for place in (parent, f"{elsewhere}/"))
    assert run_id(one) == run_id(two)
    others = [["start.step=12", "start.take=[weights]"], ["start.step=8", "start.take=[weights,step]"], []]
    ids = {run_id(one)} | {run_id(tiny(f"start.run={parent}", *other)[0]) for other in others if other}
    assert len(ids) == 3
    assert run_id(tiny(f"start.run={parent}", "budget.steps=20")[0]) == run_id(
        tiny(f"start.run={parent}", "start.step=12", "budget.steps=20")[0]
    )
    assert run_id(compose(TINY)) == run_id(compose([*TINY, "start.run=null"]))


def test_last_is_recorded_as_a_number_so_that_the_run_is_found_again(whole, trained, tmp_path, data_dir):
    _, parent = whole()
    place = shutil.copytree(parent, tmp_path / "copy" / parent.name)
    row, folder = trained(f"start.run={place}", "budget.steps=14")
    assert row["start.step"] == 12 and "start.step=12" in row["overrides"]
    shutil.rmtree(place / "checkpoints")
    (place / "result.json").unlink()
    assert run_id(recorded_run(folder)) == row["run_id"]


def test_a_finished_branch_is_served_until_its_parent_has_other_weights(whole, tiny, trained, tmp_path):
    _, parent = whole()
    place = shutil.copytree(parent, tmp_path / "copy" / parent.name)
    row, folder = trained(f"start.run={place}", "start.step=8")
    run, _ = tiny(f"start.run={place}", "start.step=8")
    assert AtHand().compare(row, run).changed is None
    manifest = place / "checkpoints/step-00000008/manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["model.pt"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    assert "began with other weights" in AtHand().compare(row, run).changed
    shutil.rmtree(place / "checkpoints")
    assert AtHand().compare(row, run).changed is None and train(run, quiet=True) == row


def test_the_lineage_of_a_branch_of_a_branch_counts_each_part_once(whole, trained):
    first, parent = whole()
    second, folder = trained(f"start.run={parent}", "start.step=8", "start.take=[weights]", "budget.steps=4")
    third, _ = trained(f"start.run={folder}", "start.step=4", "budget.steps=6")
    assert [entry["run_id"] for entry in third["lineage"]] == [first["run_id"], second["run_id"]]
    assert [entry["n_tokens"] for entry in third["lineage"]] == [8 * 128, 4 * 128]
    assert third["n_tokens_here"] == 2 * 128 and third["n_tokens"] == 6 * 128
    assert third["n_tokens_total"] == 14 * 128
    assert third["flops_total"] == pytest.approx(first["flops"] * 14 / 12)
    assert third["epochs"] == pytest.approx(first["epochs"] * 14 / 12)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.mlp=swiglu"], "weights of another model: model.mlp was"),
        (["model=nano_m"], "weights of another model: model."),
        (["data.vocab_size=20"], "another model|another tokenizer"),
        (["optimizer=sgd"], r"moments of another optimizer: optimizer.name .* type start.take=\[weights,step\]"),
        (["batch.sequences=4"], r"steps of another batch.* type start.take=\[weights,optimizer\]"),
        (["budget.steps=8"], "start.step=8 is not before the last of the 8 steps"),
        (["start.step=3"], r"has no checkpoint of step 3: it has checkpoints of .*12"),
        (["start.step=-1"], "start.step must not be negative"),
        (["start.take=[optimizer,step]"], "start.take must have weights"),
        (["start.take=weights"], r"start.take must be a list; type 'start.take=\[weights\]'"),
        (["start.grow=fpi"], r"start.grow must be a mapping; type \+start.grow.KEY=VALUE"),
        (["start.take=[weights,step]", "start.rewarm=5"], "start.rewarm=5 is more than the 4 steps of this run"),
        (["start.take=[weights,moments]"], "start.take must name some of weights, optimizer, step"),
        (["start.run=runs/x"], "start.run must be the folder of a run"),
        (["start.run=runs/x/0123456789ab", "start.step=last"], "there is no such folder"),
        (["start.run=runs/x/0123456789ab"], "no checkpoint of step 8: there is no such folder"),
        (["start.run=null"], "start.step needs start.run=FOLDER"),
        (["data.skip_steps=[4]"], "data.skip_steps must be pairs"),
        (["data.skip_steps=[4,4]"], "data.skip_steps must be pairs"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_in_one_line(whole, trained, overrides, said):
    _, parent = whole()
    with pytest.raises(UserError, match=said) as caught:
        trained(f"start.run={parent}", "start.step=8", *overrides)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_no_start(whole, trained, tmp_path):
    _, parent = whole()
    place = shutil.copytree(parent, tmp_path / "copy" / parent.name)
    with open(place / "checkpoints/step-00000008/model.pt", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="step-00000008 is damaged: model.pt has"):
        trained(f"start.run={place}", "start.step=8")


def test_skipped_steps_leave_out_their_batches_and_no_other(whole, tiny, trained, monkeypatch):
    _, parent = whole()
    asked, real = [], TrainingBatches.batch

    def batch(self, step, *rank):
        asked.append(real(self, step, *rank).tokens_BS.tobytes())
        return real(self, step, *rank)

    monkeypatch.setattr(TrainingBatches, "batch", batch)
    trained("budget.steps=16", runs="plain")
    plain, asked[:] = list(asked), []
    row, folder = trained(f"start.run={parent}", "start.step=8", "data.skip_steps=[9,11,13,14]")
    assert asked == [plain[step] for step in (8, 11, 12, 14)]
    assert row["data.skip_steps"] == [9, 11, 13, 14]
    assert row["data_fingerprint"] == whole()[0]["data_fingerprint"]


def test_a_larger_model_begins_with_the_loss_of_the_parent_and_counts_its_cost(whole, tiny, trained):
    parent_row, parent = whole()
    model = tiny()[0].model
    wide = [f"model.d_model={2 * model.d_model}", f"model.n_heads={2 * model.n_heads}"]
    words = [f"start.run={parent}", "start.step=12", "start.take=[weights]", "+start.grow.width=fpi", *wide]
    row, folder = trained(*words, "budget.steps=1")
    assert metrics(folder)[0]["val_loss"] == pytest.approx(parent_row["val_loss"], abs=1e-5)
    assert row["flops_total"] == pytest.approx(parent_row["flops"] + row["flops_here"])
    assert row["n_params"] > 2 * parent_row["n_params"]
    other, _ = tiny(*words, "+start.grow.noise=0.5", "budget.steps=1")
    assert run_id(other) != row["run_id"]
    for change, said in (
        (["start.take=[weights,optimizer]"], r"start.grow makes new matrices.*type start.take=\[weights\]"),
        (["+start.grow.moise=1"], "start.grow has no key moise; it has width, noise, depth"),
        (["start.grow.width=twice"], "start.grow.width must be fpi or aki; got 'twice'"),
        (["model.mlp=swiglu"], "weights of another model: model.mlp was"),
        ([f"model.d_model={3 * model.d_model}", f"model.n_heads={3 * model.n_heads}"], "model.d_model must be"),
    ):
        with pytest.raises(UserError, match=said):
            trained(*words, "budget.steps=1", *change)


PRUNED = ["+interventions.magnitude_pruning.sparsity=0.5", "+interventions.magnitude_pruning.every_steps=1"]


def test_pruning_goes_on_in_a_branch_to_the_same_bits_and_its_flops_add_up(whole, trained):
    row, parent = whole(*PRUNED)
    branch, folder = trained(*PRUNED, f"start.run={parent}", "start.step=8")
    assert_same_state(folder, parent)
    assert branch["n_params_average"] == row["n_params_average"] < row["n_params"]
    assert branch["density_by_role"] == row["density_by_role"]
    assert branch["flops_total"] == pytest.approx(row["flops"], rel=1e-12)
    assert branch["flops_here"] < row["flops"] * 4 / 12  # the later steps have fewer weights
    with pytest.raises(ConfigError, match=r"type start.take=\[weights,step,optimizer\]"):
        trained(*PRUNED, f"start.run={parent}", "start.step=8", "start.take=[weights,step]")


def test_the_same_run_is_refused_where_the_parent_made_other_steps(whole, trained):
    _, parent = whole()
    words = [f"start.run={parent}", "start.step=8", "start.same_run=true"]
    for change, said in (
        (["optimizer.lr=3e-2"], "did not make the first steps of this run: optimizer.lr was"),
        (["schedule.warmup=6"], "schedule.warmup was"),
        (["budget.steps=14"], "its rate was another one in step"),
        (["optimizer.skip_spikes_sigmas=0.5"], "optimizer.skip_spikes_sigmas was None and is 0.5"),
        ([*PRUNED], "interventions was {} and is {'magnitude_pruning'"),
        (["start.take=[weights,step]"], "start.same_run=true needs all of start.take"),
    ):
        with pytest.raises(UserError, match=said):
            trained(*words, *change)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["optimizer.skip_spikes_sigmas=0.5"], "optimizer.skip_spikes_sigmas was 0.5 and is None"),
        ([*PRUNED], "interventions was {'magnitude_pruning'.* and is {}"),
        (["data.skip_steps=[2,4]"], r"data.skip_steps was \[2, 4\] and is \[\]"),
    ],
)
def test_the_same_run_is_refused_where_the_parent_alone_has_a_setting(whole, trained, options, said):
    _, parent = whole(*options)
    with pytest.raises(UserError, match=said):
        trained(f"start.run={parent}", "start.step=8", "start.same_run=true")


def test_the_same_run_is_refused_where_the_parent_s_version_did_not_know_a_setting(whole, trained, tmp_path):
    _, parent = whole()
    older = tmp_path / parent.name
    shutil.copytree(parent, older)
    recorded = (older / "config.yaml").read_text()
    (older / "config.yaml").write_text(recorded.replace("averaging:\n  name: none\n", ""))
    words = [f"start.run={older}", "start.step=8", "start.same_run=true"]
    with pytest.raises(UserError, match="averaging.name was not set and is 'ema'"):
        trained(*words, "averaging=ema")
    assert trained(*words)[0]["status"] == "finished"


def test_the_same_run_is_refused_where_its_steps_depend_on_their_number(whole, trained):
    constant = ("schedule=constant", "schedule.warmup=2")
    words = (*constant, "start.step=8", "start.same_run=true", "budget.steps=24")
    for options, said in (
        (PRUNED, "interventions.magnitude_pruning is told the number of all steps"),
        (["optimizer.weight_decay_steps=12"], "optimizer.weight_decay_steps divides the decay by all steps"),
    ):
        _, parent = whole(*options, *constant)
        with pytest.raises(ConfigError, match=said):
            trained(*options, *words, f"start.run={parent}")


def test_pruning_goes_on_only_where_the_steps_say_what_is_pruned(whole, trained):
    _, pruned = whole(*PRUNED)
    _, dense = whole()
    for parent, words, said in (
        (pruned, ["budget.steps=24"], "prunes at parts of all steps, and budget.steps was 12.0 and is 24.0"),
        (pruned, ["start.take=[weights,optimizer]"], "stay so, and the steps begin at 0"),
        (dense, [], "prunes from step . on, and the parent has pruned nothing before"),
    ):
        with pytest.raises(ConfigError, match=said):
            trained(*PRUNED, f"start.run={parent}", "start.step=8", *words)
    row, _ = trained(*PRUNED, f"start.run={dense}", "start.step=8", "budget.steps=48")  # it begins at step 12 or later
    assert row["n_params_average"] < row["n_params"]


def test_a_warm_start_keeps_the_loss_at_step_0_and_laws_leave_it_out(whole, trained):
    parent_row, parent = whole()
    row, _ = trained(f"start.run={parent}", "start.step=12", "start.take=[weights]", "budget.steps=2")
    assert row["val_loss_initial"] == parent_row["val_loss_initial"] > row["val_loss_start"]
    study = Study(name="two", path=parent, rows=[parent_row, row])
    kept, said = columns.of_study(study)
    assert [one["n_tokens"] for one in kept] == [parent_row["n_tokens"]]
    assert "1 runs began with the weights of other runs" in said[0] and "--map n_tokens=n_tokens_total" in said[0]
    alone = Study(name="two", path=parent, rows=[row])
    (kept,), said = columns.of_study(alone, ["n_tokens=n_tokens_total"])
    assert kept["n_tokens"] == row["n_tokens_total"] == 14 * 128
