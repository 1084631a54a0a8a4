"""The traces of Fisher information and Hessian against their definitions, and where they may be compared."""

import json
import statistics

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed import analyze
from scaling_testbed.config.compose import recorded_run
from scaling_testbed.data.cutting import NO_TARGET, Batch
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation import curvature as module
from scaling_testbed.evaluation.curvature import curvature
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer

V, T = 6, 5


def small(**keys):
    """A model of some hundred parameters, on the paths that `curvature` takes."""
    sizes = {"n_layers": 1, "d_model": 4, "n_heads": 2, "d_ff": 8, "vocab_size": V, "d_head": 2}
    config = ModelConfig(name="small", **(sizes | keys), attention_impl="reference", qk_norm_impl="reference")
    model = Transformer(config.resolved(V))
    model.init_weights(seed=3)
    return model


def batch(seed, rows=2):
    return torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))


def measure(model, tokens, seed, **options):
    """module.measure of these token ids [B, T + 1], one tensor for each batch."""
    return module.measure(model, [Batch(tokens_BS=tokens_BS) for tokens_BS in tokens], seed, **options)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_the_trace_of_the_fisher_information_is_that_of_its_definition():
    """The expectation over the labels is written out: every label at every position, by its probability."""
    model, tokens = small(), batch(0)
    parameters, exact = list(model.parameters()), 0.0
    for log_p in model.logits(tokens[:, :-1]).flatten(0, 1).log_softmax(-1):
        for value in log_p:
            gradient = flat(torch.autograd.grad(value, parameters, retain_graph=True))
            exact += value.exp().item() * gradient.square().sum().item() / (2 * T)
    found = measure(model, [tokens] * 300, seed=0)
    assert found.fisher.se < 0.05 * exact and abs(found.fisher.mean - exact) < 3 * found.fisher.se
    assert found.n_tokens == 3000 and found.hessian is None
    loss = F.cross_entropy(model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    one, again, other = (measure(model, [tokens] * 3, seed) for seed in (5, 5, 6))
    assert one == again != other


def test_uniform_logits_have_the_known_trace():
    """With a head of zeros only it has a gradient, (p - e_y) h: tr F = (1 - 1/V) d for hidden states of unit RMS."""
    model = small(d_model=32, d_head=16, norm="rmsnorm")
    with torch.no_grad():
        model.head.weight.zero_()
    found = measure(model, [batch(seed, rows=8) for seed in range(80)], seed=0).fisher
    assert found.mean == pytest.approx((1 - 1 / V) * 32, abs=3 * found.se) and found.se < 1.5


def test_the_trace_of_the_hessian_is_the_mean_of_quadratic_forms_of_signs(monkeypatch):
    """For independent signs z, E z.Hz = tr H (Hutchinson 1989). H is written out by its rows."""
    model, tokens, signs = small(mlp="swiglu"), batch(1), []
    parameters, real = list(model.parameters()), module._signs
    loss = F.cross_entropy(model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    slope = flat(torch.autograd.grad(loss, parameters, create_graph=True))
    options = {"retain_graph": True, "materialize_grads": True}
    hessian = torch.stack([flat(torch.autograd.grad(one, parameters, **options)) for one in slope])

    def recorded(*arguments):
        signs.append(real(*arguments))
        return signs[-1]

    monkeypatch.setattr(module, "_signs", recorded)
    found = measure(model, [tokens] * 30, seed=0, hutchinson=True).hessian
    z_RP = torch.stack([flat(z) for z in signs])
    forms_R = (z_RP @ hessian * z_RP).sum(1)
    assert found.mean == pytest.approx(forms_R.mean().item(), rel=1e-3)
    assert found.se == pytest.approx((forms_R.std() / 30**0.5).item(), rel=1e-3)
    assert (z_RP.abs() == 1).all() and z_RP.mean().abs() < 4 / z_RP.numel() ** 0.5
    correlations = (z_RP.T @ z_RP / 30).tril(-1)
    assert correlations.square().sum() / (z_RP.shape[1] * (z_RP.shape[1] - 1) / 2) == pytest.approx(1 / 30, rel=0.1)


def test_the_standard_error_is_the_spread_over_other_tokens_and_labels():
    """Over 60 measurements of 6 batches each. Their spread has a relative error of 9 %."""
    model = small()
    found = [measure(model, [batch(100 * n + k) for k in range(6)], seed=n).fisher for n in range(60)]
    spread = statistics.stdev(one.mean for one in found)
    mean_square = statistics.fmean(one.se**2 for one in found) ** 0.5
    assert mean_square == pytest.approx(spread, rel=0.25)


def test_batches_count_by_their_tokens_and_one_batch_has_no_standard_error():
    found = module._estimate([1.0, 4.0], [30, 10])
    assert found.mean == 1.75 and found.se == pytest.approx((2 * (0.75**2 * 0.75**2 + 0.25**2 * 2.25**2)) ** 0.5)
    assert measure(small(), [batch(0)], seed=0).fisher.se is None


def test_the_trace_is_of_one_parametrisation():
    """A gain times a and a head divided by a are the same function. Of the trace the head's part is then times a^2, the
    gain's divided by a^2, and the rest as it was: three measurements tell the fourth."""

    def trace(a):
        model = small()
        with torch.no_grad():
            model.final_norm.weight.mul_(a)
            model.head.weight.div_(a)
        return measure(model, [batch(n) for n in range(3)], seed=0).fisher.mean

    half, one, two, four = map(trace, (0.5, 1.0, 2.0, 4.0))
    head, gain, rest = torch.linalg.solve(
        torch.tensor([[0.25, 4.0, 1.0], [1.0, 1.0, 1.0], [4.0, 0.25, 1.0]], dtype=torch.float64),
        torch.tensor([half, one, two], dtype=torch.float64),
    ).tolist()
    assert min(head, gain, rest) > 0 and four == pytest.approx(16 * head + gain / 16 + rest, rel=1e-4)


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_a_checkpoint_is_measured_by_its_folder(whole, capsys, tmp_path, kind):
    _, folder = whole(*([f"parallelism={kind}"] if kind == "fsdp" else []))
    words = [str(folder), "--tokens", "600", "--step", "8", "--hutchinson", "--json", "--out", str(tmp_path / "c.csv")]
    assert analyze.main(["curvature", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert found == curvature(recorded_run(folder), folder, tokens=600, step=8, hutchinson=True)
    assert found["step"] == 8 and found["tokens"] == 592 and found["fisher_trace"] > 0
    assert found["fisher_trace_se"] is None and found["hessian_trace"] != found["fisher_trace"]
    assert "fisher_trace" in (tmp_path / "c.csv").read_text()


def test_runs_that_cannot_be_compared_are_told(trained, capsys):
    _, plain = trained("budget.steps=1")
    _, wide = trained("budget.steps=1", "model.d_model=64", "seed=1")
    _, other = trained("budget.steps=1", "model.norm=rmsnorm", "data.n_tokens=21000")
    assert analyze.main(["curvature", str(plain), str(wide), "--tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out and "labels drawn from the model" in out
    assert analyze.main(["curvature", str(plain), str(other), "--tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "warning: model.norm varies (layernorm, rmsnorm)" in out and "warning: the runs have different data" in out
    assert analyze.main(["curvature", str(plain), "--tokens", "0"]) == 2
    assert "--tokens must be greater than zero" in capsys.readouterr().err


def test_a_model_that_is_not_finite_has_no_curvature(trained, monkeypatch):
    _, folder = trained("budget.steps=1")
    real = module.load_model

    def broken(*arguments, **options):
        step, model, data = real(*arguments, **options)
        with torch.no_grad():
            model.final_norm.weight.fill_(float("nan"))
        return step, model, data

    monkeypatch.setattr(module, "load_model", broken)
    with pytest.raises(UserError, match="step 1 of .* gives a curvature that is not finite: has the run diverged"):
        curvature(recorded_run(folder), folder, tokens=64)


def test_all_checkpoints_of_a_sweeps_folder_are_measured_and_traces_are_given_at_equal_loss(trained, capsys, tmp_path):
    """A run without checkpoints is left out with its reason, and a loss that a run does not pass is withheld."""
    words = ["checkpoint.every_steps=0", "evaluation.every_steps=0"]
    _, folder = trained("budget.steps=9", "checkpoint.keep_steps=[1,4]", *words)
    _, without = trained("budget.steps=1", "checkpoint.at_end=false", "seed=1", *words)
    table, command = tmp_path / "c.csv", ["curvature", str(folder.parent), "--tokens", "256"]
    assert analyze.main([*command, "--all-steps", "--json", "--out", str(table)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [one["step"] for one in found["checkpoints"]] == [1, 4, 9] and found["at_levels"] == []
    assert found["checkpoints"][1] == curvature(recorded_run(folder), folder, tokens=256, step=4)
    assert (
        f"left out: {without}/checkpoints holds no checkpoint" in found["warnings"][0] and len(found["warnings"]) == 1
    )
    assert "curvature: 2 of 2 runs, 3 checkpoints" in said.err and len(table.read_text().splitlines()) == 4
    first, second, _ = found["checkpoints"]
    middle = (first["loss"] + second["loss"]) / 2
    assert analyze.main([*command, "--levels", f"{middle},1e-3", "--json"]) == 0
    at = json.loads(capsys.readouterr().out)["at_levels"]
    ends = sorted((first["fisher_trace"], second["fisher_trace"]))
    assert ends[0] < at[0]["fisher_trace"] < ends[1] and at[0]["run"] == str(folder)
    assert at[1]["fisher_trace"] is None and "its 3 checkpoints have losses from" in at[1]["note"]
    assert analyze.main(["curvature", str(without), "--all-steps"]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["2.2,two", "0", "2.2,", "-1"])
def test_levels_must_be_losses_and_a_step_is_one_checkpoint(whole, capsys, typed):
    _, folder = whole()
    assert analyze.main(["curvature", str(folder), "--levels", typed]) == 2
    assert "--levels must be losses, such as 2.2,2.5" in capsys.readouterr().err
    assert analyze.main(["curvature", str(folder), "--step", "8", "--levels", "2.2"]) == 2
    assert "--step 8 is one checkpoint; leave out --levels" in capsys.readouterr().err


def test_a_position_without_a_target_and_another_document_change_nothing():
    """A document and padding behind it, as batch.packing=documents has them, beside the document alone."""
    model, tokens, n = small(), batch(0, rows=1), 3
    targets_BT = tokens[:, 1:].clone()
    targets_BT[:, n:] = NO_TARGET
    begins_BT = torch.tensor([[0] * n + [n] * (T - n)])
    packed = Batch(tokens_BS=tokens, targets_BT=targets_BT, begins_BT=begins_BT)
    found = module.measure(model, [packed] * 4, seed=0, hutchinson=True)
    alone = measure(model, [tokens[:, : n + 1]] * 4, seed=0, hutchinson=True)
    assert found.n_tokens == alone.n_tokens == 4 * n
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    assert found.fisher.mean == pytest.approx(alone.fisher.mean, rel=1e-4)
    assert found.hessian.mean == pytest.approx(alone.hessian.mean, rel=1e-3, abs=1e-4)
