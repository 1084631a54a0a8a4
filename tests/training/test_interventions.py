"""An intervention that the package does not know acts in a run, is kept in its checkpoints and counted in its FLOPs."""

import json

import pytest

from scaling_testbed.config.compose import compose
from scaling_testbed.config.compute import training_flops
from scaling_testbed.config.run import interventions_of, run_id
from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.learning.interventions.base import INTERVENTIONS, Intervention
from scaling_testbed.runs import checkpoint
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.train import main as train_main
from scaling_testbed.training import run as trainer
from scaling_testbed.training.progress import restore_states, states_of
from tests.training.conftest import TINY, load_latest, metrics
from tests.training.test_run import StopAt, assert_same_bits

FADING = "+interventions.fading.factor=0.5"


@pytest.fixture(autouse=True)
def fading():
    """Multiplies the gradients of the n-th update by factor / n, and allows no update whose number `every` divides."""

    @INTERVENTIONS.register("fading")
    class Fading(Intervention):
        needs_whole_tensors = "it counts its own updates"

        def __init__(self, factor: float, every: int = 100):
            check_positive("factor", factor)
            self.factor, self.every, self.n, self.heard = factor, every, 0, []

        def attach(self, context):
            self.parameters = list(context.model.parameters())

        def flops_per_token(self, model, sequence_length):
            return 1000 * model.n_layers + sequence_length

        def after_backward(self):
            self.n += 1
            for parameter in self.parameters:
                parameter.grad.mul_(self.factor / self.n)

        def allows(self, loss, grad_norm):
            return self.n % self.every != 0

        def after_update(self, made):
            self.heard.append(made)

        def state(self):
            return {"n": self.n, "heard": self.heard}

        def restore(self, state):
            self.n, self.heard = state["n"], state["heard"]

        def row(self):
            return {"updates_heard": self.heard, "val_loss": -1.0}

    yield
    del INTERVENTIONS["fading"]


def test_it_changes_the_gradient_before_the_clip(trained):
    """All that a clip to a tenth leaves of the first gradient is its direction."""
    clip = ("optimizer.clip_norm=0.1", "diagnostics=basic", "diagnostics.every_steps=1")
    plain, halved = (metrics(trained(*clip, *extra)[1])[1] for extra in ((), (FADING,)))
    assert halved["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-5)
    assert halved["clip_coefficient"] == pytest.approx(2 * plain["clip_coefficient"], rel=1e-3)
    name = "grad_rms/blocks.0.mlp.mlp_in.weight"  # measured as it is clipped
    assert halved[name] == pytest.approx(plain[name] / 2, rel=1e-5)


def test_an_update_that_it_does_not_allow_is_left_out_and_it_is_told(trained):
    row, folder = trained(FADING, "+interventions.fading.every=4", "checkpoint.every_steps=1")
    assert [line["step"] for line in metrics(folder) if line.get("skipped")] == [4, 8, 12]
    assert row["updates_heard"] == 3 * [True, True, True, False]
    moments = load_latest(folder / "checkpoints").tensors["optimizer"]["state"]
    assert moments[0]["step"].item() == 9


def test_its_state_goes_on_where_the_run_was_stopped(trained, monkeypatch):
    options = (FADING, "+interventions.fading.every=5", "evaluation.rows=64")
    row, whole = trained(*options, runs="whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(9))
        stopped, folder = trained(*options, runs="stopped")
    assert stopped["status"] == "preempted" and 5 <= stopped["steps"] < 12
    assert load_latest(folder / "checkpoints").state["updates"]["fading"]["n"] == stopped["steps"]
    again, _ = trained(*options, runs="stopped")
    assert again["updates_heard"] == row["updates_heard"] and len(row["updates_heard"]) == 12
    assert_same_bits(whole, folder)


def test_its_flops_are_in_the_row_the_plan_and_the_dry_run(trained, tmp_path, capsys):
    plain, _ = trained()
    row, _ = trained(FADING)
    added = (1000 * row["model.n_layers"] + row["batch.sequence_length"]) * row["n_tokens"]
    assert row["flops"] == plain["flops"] + added and row["flops_6nd"] == plain["flops_6nd"]
    grid = {"overrides": TINY, "axes": {"+interventions.fading.factor": ["0.5", "2"]}}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    planned, _ = plan(load_sweep(str(tmp_path / "grid.yaml")))
    assert [run.flops for run in planned] == 2 * [row["flops"]]
    assert train_main(["--dry-run", *TINY, FADING]) == 0
    assert f"training FLOPs   {row['flops']:.3g}\n" in capsys.readouterr().out


def test_the_row_names_it_and_no_field_of_it_hides_one_of_the_run(trained):
    row, _ = trained(FADING)
    assert row["interventions.fading.factor"] == 0.5 and row["val_loss"] > 0


def test_it_is_part_of_the_run_id_where_it_is_switched_on():
    ids = {run_id(compose([*TINY, *extra])) for extra in ((), (FADING,), ("+interventions.fading.factor=2",))}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+interventions.fadin.factor=1"], r"interventions\.fadin: there is no such .* registered are .*fading"),
        (["+interventions.fading.facto=1"], r"interventions\.fading: .*factor.*; it takes factor, every"),
        (["+interventions.fading.factor=-1"], r"interventions\.fading\.factor must be greater than zero"),
        (["+interventions.fading.factor=much"], r"interventions\.fading: .*"),
        (["+interventions.fading=1"], r"interventions\.fading must be a mapping, \+interventions\.fading\.KEY=VALUE"),
        (["interventions.fading.factor=1"], r"must be typed with a plus.*: \+interventions\.fading"),
        (["+interventions.spikes.sigmas=3"], r"switched on by optimizer\.skip_spikes_sigmas"),
        (["+interventions.qk_clip.limit=3"], r"switched on by optimizer\.qk_clip"),
        (
            [FADING, "parallelism=fsdp"],
            r"interventions\.fading cannot be sharded: it counts its own updates; use parallelism=single",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overrides, message):
    with pytest.raises(ConfigError, match=message) as found:
        compose(overrides)
    assert "\n" not in str(found.value)


def test_those_that_follow_the_weights_come_last():
    overrides = [FADING, "model.linear=sigma_reparam", "model.qk_norm=none", "optimizer.skip_spikes_sigmas=6"]
    assert list(interventions_of(compose(overrides))) == ["fading", "spikes", "sigma_reparam"]


def test_those_of_the_package_add_nothing_to_the_flops():
    plain, several = (
        compose(["model=nano_s", "model.qk_norm=none", *extra])
        for extra in ((), ("model.linear=sigma_reparam", "optimizer.skip_spikes_sigmas=6"))
    )
    model = plain.model.resolved(257)
    assert training_flops(plain, model, 9, 9) == training_flops(several, model, 9, 9) > 0


def test_a_checkpoint_names_the_states_and_an_older_one_names_spikes_that_are_switched_off(trained, tiny):
    _, folder = trained("optimizer.skip_spikes_sigmas=6", runs="on")
    assert list(checkpoint.read_state(checkpoint.latest(folder / "checkpoints"))["updates"]) == ["spikes"]
    assert states_of(interventions_of(tiny()[0])) == {}
    restore_states(interventions_of(tiny()[0]), {"spikes": None})
    spikes = interventions_of(tiny("optimizer.skip_spikes_sigmas=6")[0])
    restore_states(spikes, json.loads('{"spikes": {"made": [[2.0, 1.0]], "skipped": 3}}'))
    assert spikes["spikes"].row() == {"skipped_steps": 3}
