"""Gradients and updates are what the optimizer saw and did."""

import copy

import pytest
import torch

from scaling_testbed.diagnostics.tensors import gradient_statistics, parameter_statistics, update_statistics
from scaling_testbed.learning.optimizers import AdamAtan2Config, AdamWConfig, SGDConfig, set_lr
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer

LR, EPS = 1e-2, 1e-4


@pytest.fixture
def stepped():
    """A model before and after three updates, the gradients of the last, and what was found there."""
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=20).resolved(20)
    model = Transformer(config)
    model.init_weights(0)
    config = AdamWConfig(lr=LR, eps=EPS, weight_decay=0.0)
    optimizer = config.build(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randint(-8, 2, (1,), generator=generator)
        before, found = copy.deepcopy(model), gradient_statistics(model, list) | parameter_statistics(model, list)
        set_lr(optimizer, LR)
        optimizer.step()
        found |= update_statistics(model, config, optimizer, found, list)
    return before, model, optimizer, found


def rms(x):
    return x.double().square().mean().sqrt().item()


def test_every_tensor_is_measured_as_it_is(stepped):
    before, after, optimizer, found = stepped
    old = dict(before.named_parameters())
    for name, p in after.named_parameters():
        assert found[f"grad_rms/{name}"] == pytest.approx(rms(p.grad), rel=1e-6)
        assert found[f"grad_norm/{name}"] == pytest.approx(p.grad.double().norm().item(), rel=1e-6)
        assert found[f"param_rms/{name}"] == pytest.approx(rms(old[name]), rel=1e-6)
        made = (old[name].double() - p.double()) / LR  # no decay
        assert found[f"update_rms/{name}"] == pytest.approx(rms(made), rel=1e-3, abs=1e-6)
        ratio = LR * rms(made) / rms(old[name])
        assert found[f"update_ratio/{name}"] == pytest.approx(ratio, rel=1e-3, abs=1e-6)
        second = (optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**3)).sqrt()
        assert found[f"below_eps/{name}"] == pytest.approx((second < EPS).double().mean().item())
    shares = {value for key, value in found.items() if key.startswith("below_eps/")}
    assert 0.0 in shares and 1.0 in shares


def test_a_gradient_too_small_for_fp32_squares_is_seen():
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.full((4, 4), 1e-25)
    assert gradient_statistics(model, list)["grad_rms/weight"] == pytest.approx(1e-25, rel=1e-6, abs=0)


def test_the_update_falls_as_the_closed_form_says_when_gradients_near_eps():
    """rho r / (r + eps) for a steady gradient of RMS r (section 3.4 of arXiv 2309.14322): half at r = eps."""
    found = {}
    for r in (1e-2, EPS, 1e-6):
        model = Transformer(ModelConfig(d_model=16, n_layers=0, n_heads=2, vocab_size=20).resolved(20))
        model.init_weights(0)
        config = AdamWConfig(lr=LR, eps=EPS)
        optimizer = config.build(model)
        for _ in range(200):
            for p in model.parameters():
                p.grad = torch.full_like(p, r)
            optimizer.step()
        found[r] = update_statistics(model, config, optimizer, {}, list)["update_rms/head.weight"]
    for r, value in found.items():
        assert value == pytest.approx(r / (r + EPS), rel=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(lr=LR, weight_decay=0.0, update_clipping=True),
        AdamWConfig(lr=LR, weight_decay=0.0, scale_lr_by_param_rms=True),
        AdamAtan2Config(lr=LR, weight_decay=0.0),
        AdamAtan2Config(lr=LR, weight_decay=0.0, scale_lr_by_param_rms=True),
        SGDConfig(lr=LR, weight_decay=0.0),
    ],
)
def test_the_ratio_is_that_of_the_step_where_each_tensor_has_a_rate(config):
    model = Transformer(ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=20).resolved(20))
    model.init_weights(0)
    optimizer = config.build(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * (1 + 30.0 * (step == 2))  # a spike, which is clipped
        before, found = copy.deepcopy(model), parameter_statistics(model, list)
        optimizer.step()
        found |= update_statistics(model, config, optimizer, found, list)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        made = rms(old.double() - new.double()) / rms(old)
        assert found[f"update_ratio/{name}"] == pytest.approx(made, rel=2e-3), name
    assert any(name.startswith("below_eps/") for name in found) == (config.name == "adamw")
