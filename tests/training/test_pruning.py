"""A run that prunes its weights: budget, plan and row know what is left, and it goes on to the bit."""

import json
from types import SimpleNamespace

import pytest
import torch

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.trajectories import points
from scaling_testbed.config.compose import compose
from scaling_testbed.config.compute import pruned_of, steps_of
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.model.counting import count_params
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.runs import checkpoint
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.train import main as train_main
from scaling_testbed.training import run as trainer
from tests.training.conftest import TINY, load_latest
from tests.training.test_run import StopAt, assert_same_bits, assert_same_weights

NAME = "+interventions.magnitude_pruning"
PRUNED = (f"{NAME}.sparsity=0.5", f"{NAME}.every_steps=2", "checkpoint.every_steps=1", "checkpoint.keep_last=20")


def kept(folder):
    """Step -> checkpoint of a run that kept one of every step."""
    found = {step: checkpoint.read(path) for step, path in checkpoint.by_step(folder / "checkpoints").items()}
    assert sorted(found) == list(range(1, 13))
    return found


class StopGroup(Interrupts):
    """Interrupts whose n-th counts, of an evaluation or update of a group, have a signal."""

    def __init__(self, polls):
        super().__init__()
        self.left = polls

    def counts(self):
        self.left -= 1
        self.requested = "SIGTERM" if self.left == 0 else None
        return super().counts()


def test_without_sparsity_every_bit_is_that_of_a_dense_run(trained):
    plain, dense = trained()
    row, folder = trained(f"{NAME}.sparsity=0", f"{NAME}.every_steps=2")
    assert_same_bits(dense, folder)
    assert row["flops"] == plain["flops"] and row["n_params_average"] == row["n_params_final"] == row["n_params"]
    assert plain["n_params_average"] is plain["n_params_final"] is plain["density_by_role"] is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_weights_left_are_those_of_the_plan(trained, optimizer):
    row, folder = trained(*PRUNED, f"optimizer={optimizer}", "diagnostics=basic", "diagnostics.every_steps=1")
    masks = {step: one.tensors["interventions"]["magnitude_pruning"] for step, one in kept(folder).items()}
    n = sum(mask.numel() for mask in masks[12].values())
    events = [2, 4, 6, 8]
    left = {step: n - sum(int(mask.sum()) for mask in masks[step].values()) for step in masks}
    # An event comes before its update, so the checkpoint before it has no pruned weights yet.
    assert left == {step: int(0.5 ** (sum(event < step for event in events) / 4) * n) for step in left}
    for step, one in kept(folder).items():
        weights = one.tensors["model"]
        assert all(((weights[name] == 0) == mask).all() for name, mask in masks[step].items())
        assert set(weights) - set(masks[step]) >= {"embedding.weight", "final_norm.weight"}
    in_use = [row["n_params"] - n + left[step] for step in range(1, 13)]
    assert row["n_params_average"] == pytest.approx(sum(in_use) / 12) and row["n_params_final"] == in_use[-1]
    plain = row["n_params"] - row["n_params_average"]
    assert row["flops_6nd"] == pytest.approx(6 * row["n_params_average"] * row["n_tokens"])
    assert row["flops"] == pytest.approx(254803968.0 - 6 * plain * row["n_tokens"])  # of the dense run
    assert row["density_by_role"]["head"] == 1 - masks[12]["head.weight"].float().mean().item()


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_a_stopped_run_goes_on_to_the_bit_across_events(trained, monkeypatch, kind):
    options = (*PRUNED, f"parallelism={kind}", "evaluation.rows=64")
    row, whole = trained(*options, runs="whole")
    for polls in (4, 9):  # once before the first event, once between two
        with monkeypatch.context() as patch:
            stop = StopGroup if kind == "fsdp" else StopAt
            patch.setattr(trainer, "Interrupts", lambda stop=stop, polls=polls: stop(polls))
            stopped, folder = trained(*options, runs="stopped")
        assert stopped["status"] == "preempted" and stopped["steps"] < 12
    again, _ = trained(*options, runs="stopped")
    assert_same_weights(whole, folder)
    here, there = (load_latest(one / "checkpoints").tensors["interventions"] for one in (whole, folder))
    for name, mask in here["magnitude_pruning"].items():
        assert torch.equal(mask, there["magnitude_pruning"][name])
    fields = ("val_loss", "n_params_average", "n_params_final", "density_by_role", "flops")
    assert [row[key] for key in fields] == [again[key] for key in fields]


def test_a_checkpoint_without_masks_is_refused(trained, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(9))
        _, folder = trained(*PRUNED)
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path, name: {})
    with pytest.raises(UserError, match="cannot be used: it lacks 'blocks.0.attention.q.weight'"):
        trained(*PRUNED)


def test_the_sharded_and_the_whole_run_prune_alike(trained):
    """One process that is a world: only the form of the tensors differs."""
    masks = [
        load_latest(trained(*PRUNED, f"parallelism={kind}", runs=kind)[1] / "checkpoints").tensors["interventions"]
        for kind in ("single", "fsdp")
    ]
    for name, mask in masks[0]["magnitude_pruning"].items():
        assert all(torch.equal(mask, other["magnitude_pruning"][name]) for other in masks[1:])


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_a_budget_of_flops_is_spent_on_the_weights_that_are_left(sparsity):
    words = [*TINY, f"{NAME}.sparsity={sparsity}", f"{NAME}.every_steps=10", "budget.steps=null"]
    run = compose([*words, "budget.flops=1e11"])
    model = run.model.resolved(16)
    steps, dense = steps_of(run, model), steps_of(compose([*TINY, "budget.steps=null", "budget.flops=1e11"]), model)
    n_params, pruned = count_params(model).n_params, pruned_of(run, model)
    spent = {t: 6 * t * (n_params - pruned(t)) * run.batch.tokens for t in range(steps - 2, steps + 3)}
    assert min(spent, key=lambda t: abs(spent[t] - 1e11)) == steps
    assert list(spent.values()) == sorted(spent.values()) and spent[steps] == pytest.approx(1e11, rel=1e-3)
    assert 1.2 * dense < steps < 2.5 * dense
    other = compose([*words, "budget.flops=1e11", "budget.params=n_params_non_embedding"])
    with pytest.raises(ConfigError, match="budget.params=n_params_non_embedding cannot be with budget.flops"):
        steps_of(other, model)


def test_more_steps_are_never_cheaper():
    run = compose([*TINY, f"{NAME}.sparsity=0.8", f"{NAME}.every_steps=7"])
    model = run.model.resolved(16)
    n_params, pruned = count_params(model).n_params, pruned_of(run, model)
    spent = [steps * (n_params - pruned(steps)) for steps in range(1, 400)]
    assert all(one < other for one, other in zip(spent, spent[1:], strict=False))


def test_the_plan_and_the_dry_run_have_the_flops_of_the_row(trained, tmp_path, capsys):
    row, _ = trained(*PRUNED[:2])
    (tmp_path / "grid.yaml").write_text(
        json.dumps({"overrides": [*TINY, PRUNED[1]], "axes": {f"{NAME}.sparsity": [0.5]}})
    )
    (planned,), _ = plan(load_sweep(str(tmp_path / "grid.yaml")))
    assert planned.flops == row["flops"] and planned.flops_6nd == planned.budget_flops_6nd == row["flops_6nd"]
    assert planned.n_params_average == row["n_params_average"]
    assert train_main(["--dry-run", *TINY, *PRUNED[:2]]) == 0
    assert f"training FLOPs   {row['flops']:.3g}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.tied_head=true"], "needs model.tied_head=false"),
        (
            ["model.linear=sigma_reparam", "model.qk_norm=none"],
            "cannot be with model.linear=sigma_reparam",
        ),
        ([f"{NAME}.structure=2:4", "model.d_ff=42"], "structure=2:4 needs inputs in groups of four; d_ff is 42"),
        ([f"{NAME}.begin=0.9"], r"interventions.magnitude_pruning.begin must be from 0 to end=0.75"),
    ],
)
def test_what_cannot_be_pruned_is_named(words, said):
    with pytest.raises(ConfigError, match=said):
        compose([*TINY, f"{NAME}.sparsity=0.5", *words])


def test_a_run_that_is_too_short_is_refused_before_anything_is_prepared(tiny):
    run, folder = tiny(f"{NAME}.sparsity=0.5")
    with pytest.raises(ConfigError, match="every_steps=100 is too long for a run of 12 steps"):
        trainer.train(run, quiet=True)


def test_curves_of_pruned_runs_are_no_points_of_laws():
    """An end of a shorter run it is not: its window of pruning would be another."""
    with pytest.raises(UserError, match="no training curve of a dense run: 2 runs prune weights"):
        points._of_runs(2 * [{"n_params": 1000, "n_params_average": 900.0}], SimpleNamespace(path="a"), [])


def test_laws_read_the_mean_number_of_parameters():
    row = {"val_loss": 2.5, "n_params": 1000, "n_params_non_embedding": 400, "n_params_no_input_embedding": 700,
           "n_tokens": 64_000, "n_params_average": 900.0, "flops": 7e8, "flops_6nd": 6.0 * 900 * 64_000}  # fmt: skip
    found = columns.derived(row)
    assert found["n_params"] == 1000 and found["n_params_average"] == 900 and found["flops"] == 6 * 900 * 64_000
    other = columns.derived(row, "n_params_no_input_embedding")
    assert other["n_params"] == 700 and other["n_params_average"] == 600
    # Of the hundred weights that are pruned on the mean, some are in the head.
    withheld = columns.derived(row, "n_params_non_embedding")
    assert withheld["n_params"] == 400 and withheld["n_params_average"] is None and withheld["flops"] is None
    dense = columns.derived({**row, "n_params_average": None}, "n_params_non_embedding")
    assert dense["n_params_average"] == 400 and dense["flops"] == 6 * 400 * 64_000
