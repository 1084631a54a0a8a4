"""The recipes of objectives in docs/extending.md, as they stand there: their gradients by the formulas of the papers in
fp64, and runs."""

import json
import math

import pytest
import torch

from scaling_testbed import plugins
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.objectives import OBJECTIVES, Given, Weighted
from scaling_testbed.training.run import train
from tests.plugins.conftest import COMMON
from tests.plugins.strangers import RECIPES, lines
from tests.training.test_run import final_weights

Z_LOSS = 1e-2
NAMES = ("comp_sum", "dco")
each_path = pytest.mark.parametrize("impl", ["reference", "chunked"])


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder with both recipes, which other tests of this process do not find."""
    folder = tmp_path_factory.mktemp("objectives")
    for name in ("my_comp_sum.py", "my_dco.py", "confs/objective/gce.yaml", "confs/objective/dco.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(RECIPES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_loaded", dict(plugins._loaded))
        plugins.load_plugins([f"{folder}/my_comp_sum.py", f"{folder}/my_dco.py"])
        yield folder
    for name in NAMES:
        OBJECTIVES.pop(name, None)
        OBJECTIVES._modules.pop(name, None)


def micro_batch(impl, dtype=torch.float64, scale=1.0):
    """Three sequences of five positions and 11 tokens. The first has two targets, the second has none."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = (torch.randn(3, 5, 4, generator=generator) * scale).to(dtype).requires_grad_()
    weight_VD = torch.randn(11, 4, generator=generator).to(dtype).requires_grad_()
    tokens_BS = torch.randint(11, (3, 6), generator=generator)
    targets_BT = tokens_BS[:, 1:].clone()
    targets_BT[0, :3], targets_BT[1] = -100, -100
    config = CrossEntropyConfig(z_loss=Z_LOSS, impl=impl)
    return Given(
        tokens_BS=tokens_BS,
        hidden_BTD=hidden_BTD,
        weight_VD=weight_VD,
        targets_BT=targets_BT,
        begins_BT=None,
        softcap=8.0,
        loss=config,
        beside={},
    )


def by_hand(given, value_of):
    """The value of an objective, the plain cross-entropy, and gradients of value and z-loss, by autograd. value_of:
    from log p of the targets of a sequence."""
    logits_BTV = 8.0 * torch.tanh(given.hidden_BTD @ given.weight_VD.T / 8.0)
    log_p_BT = logits_BTV.log_softmax(-1).gather(-1, given.targets_BT.clamp_min(0)[..., None])[..., 0]
    parts = [log_p_T[valid_T] for log_p_T, valid_T in zip(log_p_BT, given.valid_BT, strict=True) if valid_T.any()]
    value = sum(value_of(part) for part in parts)
    z_loss = Z_LOSS * logits_BTV.logsumexp(-1)[given.valid_BT].square().sum()
    inputs = given.hidden_BTD, given.weight_VD
    return value, -sum(part.sum() for part in parts), *torch.autograd.grad(value + z_loss, inputs)


def of(objective, given):
    terms = objective.build(None).terms(given)
    assert terms.n_tokens == given.valid_BT.sum()
    return terms.objective, terms.ce, *torch.autograd.grad(terms.loss, (given.hidden_BTD, given.weight_VD))


def assert_close(found, expected, tolerance=1e-9):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def comp_sum(tau):
    """Mao, Mohri and Zhong 2023, equation of the comp-sum losses, in terms of 1/p."""
    if tau == 1:
        return lambda log_p: -log_p.sum()
    return lambda log_p: (((1 / log_p.exp()) ** (1 - tau) - 1) / (1 - tau)).sum()


def coverage(n):
    """Chen et al. 2025: minus the logarithm of pass@N."""
    return lambda log_p: -(1 - (1 - log_p.sum().exp()) ** n).log()


@each_path
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.9])
def test_comp_sum_has_the_gradient_of_its_formula(impl, tau):
    given = micro_batch(impl)
    assert_close(of(OBJECTIVES["comp_sum"](tau=tau), given), by_hand(given, comp_sum(tau)))


@each_path
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_coverage_has_the_gradient_of_its_formula(impl, n, scale):
    given = micro_batch(impl, scale=scale)
    # P is 1e-9 and more, and 1 - (1 - P)^N loses 1e-16 in fp64.
    assert_close(of(OBJECTIVES["dco"](n=n), given), by_hand(given, coverage(n)), 2e-7)


@pytest.mark.parametrize("n", [2, 64])
def test_coverage_is_exact_from_certain_to_impossible_answers_in_fp32(n):
    """P from 1 - 1e-6 to 1e-300, which is 0 in fp32. F is compared with fp64, where N P > 1e-290 is no loss."""
    surprise_B1 = torch.logspace(-6, math.log10(690), 400)[:, None]
    p_B1 = (-surprise_B1.double()).exp()
    log_fail_B1 = torch.log1p(-p_B1)
    covered_B1 = -torch.expm1(n * log_fail_B1)
    expected_B1 = n * p_B1 * torch.exp((n - 1) * log_fail_B1) / covered_B1
    objective, valid = OBJECTIVES["dco"](n=n), torch.ones(400, 1, dtype=torch.bool)
    torch.testing.assert_close(objective.weights(surprise_B1, valid).double(), expected_B1, rtol=1e-5, atol=3e-7)
    values = [objective.value(one[None], valid[:1]) for one in surprise_B1]
    torch.testing.assert_close(torch.stack(values).double(), -covered_B1.log()[:, 0], rtol=1e-5, atol=3e-6)


def test_a_sequence_without_targets_and_one_of_certain_tokens_weigh_finite_numbers():
    for n in (1, 2, 10**6):
        objective, ce_BT = OBJECTIVES["dco"](n=n), torch.zeros(2, 3)
        assert objective.weights(ce_BT, ce_BT > 0).isfinite().all() and objective.value(ce_BT, ce_BT > 0).abs() < 1e-6


@each_path
def test_weights_may_be_anything_where_there_is_no_target(impl):
    """As with a plug-in that divides by the number of a sequence's targets, where a sequence has none."""

    class PerTarget(Weighted):
        def weights(self, ce_BT, valid_BT):
            n_B1 = valid_BT.sum(1, keepdim=True).to(ce_BT.dtype)
            return (1 / n_B1).expand_as(ce_BT).where(valid_BT, float("nan"))

    given, objective = micro_batch(impl), PerTarget()
    expected = by_hand(given, lambda log_p: -log_p.mean())
    assert_close(of(objective, given), expected)
    direct = given.cross_entropy(objective.weights(given.ce_BT(), given.valid_BT))
    assert_close([direct.objective], expected[:1])


def test_a_tau_or_n_outside_their_ranges_is_refused():
    for tau in (-0.1, 2, 2.5, float("nan")):
        with pytest.raises(ConfigError, match="tau must be at least 0 and less than 2"):
            OBJECTIVES["comp_sum"](tau=tau)
    with pytest.raises(ConfigError, match="n must be greater than zero"):
        OBJECTIVES["dco"](n=0)


@pytest.fixture(scope="module")
def trained(folder):
    """Returns a function from words to a row and the folder of its run."""
    names = f"{folder}/my_comp_sum.py,{folder}/my_dco.py"
    places = [f"plugins=[{names}]", f"configs={folder}/confs", f"data_dir={folder}/data", f"runs_dir={folder}/runs"]
    data = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000"]

    def train_it(*words):
        run = compose([*places, *COMMON, *data, *words])
        return train(run, quiet=True), run_folder_path(run)

    return train_it


def test_a_run_with_tau_one_ends_in_the_bits_of_cross_entropy(trained):
    plain, where = trained()
    row, folder = trained("objective=gce", "objective.tau=1")
    for name, tensor in final_weights(where)["model"].items():
        assert torch.equal(tensor, final_weights(folder)["model"][name]), name
    assert row["val_loss"] == plain["val_loss"] and row["objective.name"] == "comp_sum"
    assert all(line["train_objective"] == line["train_loss"] for line in lines(folder, "train_loss"))


def test_a_run_records_its_objective_beside_the_cross_entropy_and_the_scaled_loss(trained):
    plain, _ = trained()
    row, folder = trained("objective=gce")
    assert row["objective.tau"] == 1.3 and row["ce_scaled"] > 0 and plain["ce_scaled"] is None
    assert row["flops"] > plain["flops"]
    for line in lines(folder, "train_loss"):
        assert 0 < line["train_objective"] < min(line["train_loss"], 1 / 0.3)


def test_coverage_of_whole_texts_is_their_cross_entropy_and_ends_in_the_same_weights_nearly(trained):
    plain, _ = trained()
    row, folder = trained("objective=dco")
    assert row["objective.n"] == 64 and row["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)
    for line in lines(folder, "train_loss"):
        assert line["train_objective"] == pytest.approx(line["train_loss"] - math.log(64) / 16, abs=1e-5)
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
