"""The recipe of FRUGAL in docs/extending.md, as it stands there: its updates, its moments and its runs."""

import dataclasses

import pytest
import torch

from scaling_testbed import plugins
from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.optimizers import OPTIMIZERS, AdamWConfig, set_lr
from scaling_testbed.model.parametrization import HIDDEN_ROLES
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training import run as trainer
from scaling_testbed.training.run import train
from tests.plugins.conftest import COMMON
from tests.plugins.strangers import RECIPES
from tests.training.test_run import StopAt, assert_same_bits, assert_same_weights

EVERY = 3


@pytest.fixture(scope="module", autouse=True)
def loaded_here_alone():
    """Other tests of this process find no plug-in, and no optimizer of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_loaded", dict(plugins._loaded))
        yield
    OPTIMIZERS.pop("frugal", None)
    OPTIMIZERS._modules.pop("frugal", None)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Returns a function from further words to a run with the recipe."""
    folder = tmp_path_factory.mktemp("frugal")
    (folder / "my_frugal.py").write_text(RECIPES["my_frugal.py"])
    (folder / "confs" / "optimizer").mkdir(parents=True)
    (folder / "confs" / "optimizer" / "frugal.yaml").write_text(RECIPES["confs/optimizer/frugal.yaml"])
    places = [f"plugins=[{folder}/my_frugal.py]", f"configs={folder}/confs", f"data_dir={folder}/data"]
    data = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000", "budget.steps=8"]

    def compose_it(*words):
        return compose([*places, *COMMON, *data, "optimizer=frugal", f"optimizer.every_steps={EVERY}", *words])

    return compose_it


@pytest.fixture(scope="module")
def run(composed):
    return composed()


def built(run, kind=None, **changes):
    """A model of `run`, its hidden matrices by name, and its optimizer with other values, or one of another kind."""
    model = Transformer(run.model.resolved(16), run.parametrization, device=torch.device("cpu"))
    model.init_weights(0)
    hidden = {name: p for name, p in model.named_parameters() if model.parameter_info()[name].role in HIDDEN_ROLES}
    config = kind(**changes) if kind else dataclasses.replace(run.optimizer, **changes)
    return model, hidden, config.build(model)


def steps(model, optimizer, n, lr=0.01):
    """Make updates with given gradients; yields after each."""
    for step in range(n):
        random = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step


def test_each_update_is_adamw_or_the_sign_by_hand(run):
    model, hidden, optimizer = built(run, sign_factor=0.2, lr=0.01, weight_decay=0.001)
    names, blocks = {p: name for name, p in model.named_parameters()}, []
    weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first, second, since = {}, {}, {}
    for step in steps(model, optimizer, 4 * EVERY + 1):
        with_moments = {names[p] for p in optimizer.state}
        blocks += [with_moments] if step % EVERY == 0 else []
        assert with_moments == blocks[-1] >= set(weights) - set(hidden)
        random = torch.Generator().manual_seed(step)
        for name, w in weights.items():
            g = torch.randn(w.shape, generator=random).double()
            if name not in with_moments:
                update = 0.2 * g.sign()
            else:
                if name in hidden and step % EVERY == 0:
                    since[name] = step
                n = step - since.setdefault(name, 0) + 1
                begins = n == 1
                first[name] = 0.1 * g if begins else 0.9 * first[name] + 0.1 * g
                second[name] = 0.05 * g**2 if begins else 0.95 * second[name] + 0.05 * g**2
                update = first[name] / (1 - 0.9**n) / ((second[name] / (1 - 0.95**n)).sqrt() + 1e-8)
            w.sub_(0.001 * w + 0.01 * update)  # decay=independent, at the peak rate
            assert torch.allclose(model.get_parameter(name).double(), w, rtol=1e-5, atol=1e-6), (step, name)
    assert any(a & b & set(hidden) for a, b in zip(blocks, blocks[1:], strict=False))  # drawn twice, and begun anew


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_a_draw_follows_from_seed_and_block_and_takes_no_more_than_its_share(run, share):
    _, hidden, optimizer = built(run, share=share)
    names = {p: name for name, p in hidden.items()}
    drawn = [{names[p] for p in optimizer.drawn(block)} for block in range(30)]
    whole = sum(p.numel() for p in hidden.values())
    assert all(0.5 * share < sum(hidden[name].numel() for name in one) / whole <= share for one in drawn)
    never = set(hidden) - set().union(*drawn)
    assert never == {name for name, p in hidden.items() if p.numel() > share * whole}
    assert len(set(map(frozenset, drawn))) > 3
    _, hidden, other = built(run, share=share, draw_seed=1)
    names = {p: name for name, p in hidden.items()}
    assert drawn != [{names[p] for p in other.drawn(block)} for block in range(30)]


def test_with_all_the_weights_it_is_adamw_and_with_none_it_is_the_sign(run):
    model, _, optimizer = built(run, every_steps=100, share=1)
    plain, _, adamw = built(run, AdamWConfig, fused=False)
    for _ in zip(steps(model, optimizer, 4), steps(plain, adamw, 4), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model, hidden, optimizer = built(run, share=0)
    list(steps(model, optimizer, 2))
    assert not set(hidden.values()) & set(optimizer.state)


def test_a_stopped_run_goes_on_to_the_bit_and_the_row_has_the_bytes(composed, tmp_path, monkeypatch):
    def trained(*words, runs):
        run = composed("checkpoint.every_steps=100", "evaluation.rows=64", f"runs_dir={tmp_path / runs}", *words)
        return train(run, quiet=True), run_folder_path(run), run

    row, whole, made = trained(runs="whole")
    for polls, steps_made in ((4, 2), (5, 3)):  # within a block, and before a draw
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "Interrupts", lambda polls=polls: StopAt(polls))
            stopped, folder, _ = trained(runs=f"stopped{polls}")
            assert (stopped["status"], stopped["steps"]) == ("preempted", steps_made)
        assert trained(runs=f"stopped{polls}")[0]["restarts"] == 1
        assert_same_bits(whole, folder)
    other, sharded, _ = trained("parallelism=fsdp", runs="sharded")  # one process that is a world
    assert_same_weights(whole, sharded)
    assert other["optimizer_state_bytes"] == row["optimizer_state_bytes"]

    _, hidden, optimizer = built(made)
    with_moments = sum(p.numel() for p in optimizer.drawn(7 // EVERY))
    outside = row["n_params"] - sum(p.numel() for p in hidden.values())
    assert row["optimizer_state_bytes"] == 8 * (outside + with_moments)
    model = made.model.resolved(outside // 64)  # of width 32, and so with gains that are too few for another symbol
    assert row["optimizer_state_bytes"] <= estimate_memory(made, model, row["n_params"], "fp32").optimizer
    assert "0.5 times the sign" in trained("optimizer.sign_factor=0.5", "budget.steps=1", runs="other")[0]["rate_means"]


@pytest.mark.parametrize("changes", [{"every_steps": 0}, {"share": -0.1}, {"sign_factor": -1}], ids=str)
def test_what_it_cannot_do_is_refused(run, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(run.optimizer, **changes)
