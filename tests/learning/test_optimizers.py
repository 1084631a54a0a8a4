"""Decay, groups, and what is done to an update and its rate."""

import dataclasses
import math

import pytest
import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.config import AdamAtan2Config, AdamWConfig, CrossEntropyConfig, MuonConfig
from scaling_testbed.learning.optimizers import build_optimizer, parameter_groups, set_lr
from scaling_testbed.learning.schedules import SCHEDULES
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.transformer import Transformer


def model(parametrization=None, **fields):
    config = ModelConfig(d_model=32, n_layers=1, n_heads=2, **fields).resolved(50)
    built = Transformer(config, parametrization or ParametrizationConfig())
    built.init_weights(0)
    return built


def weights_after(config, lrs, transformer=None, gradients=1.0):
    """The weights after one step per rate in `lrs`, with fixed random gradients of that size."""
    transformer = transformer or model()
    optimizer = build_optimizer(config, transformer)
    for index, lr in enumerate(lrs):
        generator = torch.Generator().manual_seed(index)
        for parameter in transformer.parameters():
            parameter.grad = gradients * torch.randn(parameter.shape, generator=generator)
        set_lr(optimizer, lr)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}


def test_independent_1e_4_equals_coupled_0_1_at_lr_1e_3_exactly():
    independent = weights_after(AdamWConfig(lr=1e-3, decay="independent", weight_decay=1e-4), [1e-3, 5e-4])
    coupled = weights_after(AdamWConfig(lr=1e-3, decay="coupled", weight_decay=0.1), [1e-3, 5e-4])
    assert all(torch.equal(independent[name], coupled[name]) for name in coupled)


DECAYING = [
    (AdamWConfig, {}),
    (AdamWConfig, {"update_clipping": True}),
    (AdamWConfig, {"scale_lr_by_param_rms": True}),
    (AdamAtan2Config, {}),
    (MuonConfig, {}),
    (MuonConfig, {"lr_adjustment": "original"}),
]


@pytest.mark.parametrize("lr", [3e-4, 1e-2, 3e-1])
@pytest.mark.parametrize(("kind", "fields"), DECAYING, ids=str)
def test_independent_decay_shrinks_a_weight_by_the_schedule_and_not_by_the_rate(lr, kind, fields):
    """With a zero gradient a step is w <- w (1 - s lambda), s the schedule's factor."""
    transformer = model()
    weights = (transformer.head_weight_VD, transformer.blocks[0].mlp.mlp_in.weight)
    before = [weight.detach().clone() for weight in weights]
    config = kind(lr=lr, weight_decay=0.01, **fields)
    optimizer = build_optimizer(config, transformer)
    for parameter in transformer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for factor in (1.0, 0.5):
        set_lr(optimizer, lr * factor)
        optimizer.step()
    for weight, start in zip(weights, before, strict=True):
        assert torch.allclose(weight, start * (1 - 0.01) * (1 - 0.005), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cut", [1, 4])
def test_decay_stated_for_a_length_shrinks_a_weight_as_much_over_any_other(cut):
    """Also where the run takes only a part of its schedule: then as much as the whole run up to that step."""
    schedule = SCHEDULES["cosine"](warmup=0.05, min_lr=0.0, steps=1000 if cut > 1 else None)

    def shrunk(config, steps):
        (group,) = parameter_groups(config.for_length(schedule.length(steps)), model(norm="rmsnorm"))
        rates = [schedule.lr(step, steps, config.lr) for step in range(steps)]
        return math.prod(1 - rate * group["weight_decay"] for rate in rates)

    stated = AdamWConfig(lr=1e-2, weight_decay=1e-3, weight_decay_steps=1000)
    assert shrunk(stated, 1000) == pytest.approx(shrunk(AdamWConfig(lr=1e-2, weight_decay=1e-3), 1000), rel=1e-12)
    if cut > 1:
        assert shrunk(stated, 1000 // cut) == shrunk(AdamWConfig(lr=1e-2, weight_decay=1e-3), 1000 // cut)
    else:
        assert shrunk(stated, 250) == pytest.approx(shrunk(stated, 1000), rel=1e-2)
        assert shrunk(dataclasses.replace(stated, weight_decay_steps=None), 250) > 1.3 * shrunk(stated, 250)


def test_only_the_named_roles_decay():
    transformer = model()
    groups = parameter_groups(AdamWConfig(decay_roles=["q", "mlp_in"]), transformer)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    info = transformer.parameter_info()
    for name, parameter in transformer.named_parameters():
        assert (id(parameter) in decayed) == (info[name].role in ("q", "mlp_in"))


def test_role_multipliers_scale_the_rate_of_their_role_only():
    transformer = model()
    optimizer = build_optimizer(AdamWConfig(lr=1e-2, lr_multipliers={"embedding": 0.1}), transformer)
    set_lr(optimizer, 1e-3)
    lr_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    info = transformer.parameter_info()
    for name, parameter in transformer.named_parameters():
        assert lr_of[id(parameter)] == pytest.approx(1e-4 if info[name].role == "embedding" else 1e-3)


@pytest.mark.parametrize("scale_decay", [True, False])
def test_muparam_decay_follows_the_layers_rate_only_if_asked(scale_decay):
    parametrization = ParametrizationConfig(name="mup_simple", base_width=8, scale_weight_decay_with_lr=scale_decay)
    transformer = model(parametrization)
    groups = parameter_groups(AdamWConfig(lr=1e-2, weight_decay=1e-4), transformer)
    q = transformer.blocks[0].attention.q.weight
    group = next(group for group in groups if any(p is q for p in group["params"]))
    assert group["lr_multiplier"] == 0.25
    shrink = 1e-2 * group["lr_multiplier"] * group["weight_decay"]  # of one step at the peak rate
    assert shrink == pytest.approx(1e-4 * (0.25 if scale_decay else 1.0))


def test_every_parameter_is_in_exactly_one_group():
    transformer = model(ParametrizationConfig(name="mup_simple", base_width=8))
    groups = parameter_groups(AdamWConfig(decay_roles=["q"], lr_multipliers={"k": 2.0}), transformer)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in transformer.parameters())


def test_update_clipping_changes_nothing_while_the_update_rms_is_below_one():
    """A constant gradient has g^2 equal to its own second moment: RMS is 1 and nothing is clipped."""

    def run(update_clipping):
        transformer = model()
        optimizer = build_optimizer(AdamWConfig(lr=1e-2, update_clipping=update_clipping), transformer)
        for _ in range(3):
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
        return transformer.head_weight_VD

    assert torch.allclose(run(True), run(False), atol=1e-6)


def test_update_clipping_divides_the_step_after_a_gradient_spike_by_its_rms():
    def steps(update_clipping):
        transformer = model()
        optimizer = build_optimizer(
            AdamWConfig(lr=1e-3, weight_decay=0.0, update_clipping=update_clipping), transformer
        )
        for size in (1e-3, 1e-3, 1.0):
            before = transformer.head_weight_VD.detach().clone()
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, size)
            optimizer.step()
        return transformer.head_weight_VD.detach() - before

    second = (0.05 * 0.95**2 * 1e-6 + 0.05 * 0.95 * 1e-6 + 0.05) / (1 - 0.95**3)
    rms = 1.0 / second**0.5
    assert rms > 1.5
    assert torch.allclose(steps(True) * rms, steps(False), rtol=1e-4)


def test_a_rate_scaled_by_the_weights_gives_each_tensor_steps_in_proportion_to_its_rms():
    """max(RMS(w), 1e-3) times AdamW's step, E.14: also of a tensor of zeros."""
    names, steps = None, []
    for scaled in (False, True):
        transformer = model()
        with torch.no_grad():
            transformer.blocks[0].attention.q.weight.zero_()
        before = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
        config = AdamWConfig(lr=1e-3, weight_decay=0.0, scale_lr_by_param_rms=scaled)
        after = weights_after(config, [1e-3], transformer)
        names = list(before)
        steps.append([after[name] - before[name] for name in names])
    for name, plain, scaled in zip(names, *steps, strict=True):
        factor = max(before[name].square().mean().sqrt().item(), 1e-3)
        assert torch.allclose(scaled, factor * plain, rtol=1e-3, atol=1e-7), name
        assert scaled.any()


def test_coupled_decay_is_not_scaled_by_the_rms_of_the_weights():
    transformer = model()
    before = transformer.head_weight_VD.detach().clone()
    config = AdamWConfig(lr=0.1, decay="coupled", weight_decay=0.5, scale_lr_by_param_rms=True)
    after = weights_after(config, [0.1], transformer, gradients=0.0)
    torch.testing.assert_close(after["head.weight"], before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("fields", [{}, {"update_clipping": True}, {"scale_lr_by_param_rms": True}], ids=str)
def test_the_step_of_a_tensor_at_a_time_is_pytorchs_but_for_the_factor_of_its_rate(fields):
    """With weights and updates of RMS one the factors are one too."""
    weights = []
    for options in ({}, fields):
        transformer = model()
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.div_(parameter.square().mean().sqrt())
        weights.append(weights_after(AdamWConfig(lr=1e-3, eps=1e-3, **options), [1e-3], transformer))
    for name, plain in weights[0].items():
        assert torch.allclose(weights[1][name], plain, rtol=1e-4, atol=1e-6), name


def test_adam_atan2_is_adam_for_a_constant_gradient_and_bounded_for_a_spike():
    """atan2(m, sqrt(v)) = pi / 4 where m = sqrt(v); after tiny gradients a large one gives at most a pi / 2."""

    def steps(config):
        transformer, taken = model(), []
        optimizer = build_optimizer(config, transformer)
        for size in (1e-4, 1e-4, 1.0):
            before = transformer.head_weight_VD.detach().clone()
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, size)
            optimizer.step()
            taken.append((before - transformer.head_weight_VD.detach()) / 1e-3)
        return taken

    adam = steps(AdamWConfig(lr=1e-3, weight_decay=0.0, eps=1e-30))
    atan2 = steps(AdamAtan2Config(lr=1e-3, weight_decay=0.0))
    for mine, its in zip(atan2[:2], adam[:2], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    ratio = adam[2]
    torch.testing.assert_close(atan2[2], 4 / math.pi * torch.atan(ratio), rtol=1e-3, atol=1e-4)
    half = steps(AdamAtan2Config(lr=1e-3, weight_decay=0.0, a=0.5, b=2.0))[0]
    torch.testing.assert_close(half, torch.full_like(half, 0.5 * math.atan(0.5)), rtol=1e-3, atol=1e-4)


def test_adam_atan2_does_not_know_the_size_of_gradients_and_survives_none():
    """AdamW's eps makes tiny gradients matter less; here there is none."""
    transformer = model()
    start = transformer.head_weight_VD.detach().clone()
    still = weights_after(AdamAtan2Config(weight_decay=0.0), [1e-3], transformer, gradients=0.0)
    assert torch.equal(still["head.weight"], start)
    for config, same in ((AdamAtan2Config(), True), (AdamWConfig(), False)):
        large, tiny = (weights_after(config, [1e-3] * 2, gradients=size) for size in (1.0, 2.0**-36))
        assert all(torch.equal(large[name], tiny[name]) for name in large) == same


def test_muon_gives_matrices_of_the_blocks_orthogonal_steps_and_all_else_adamws():
    """The step of a matrix of A x B has singular values near one, times 0.2 sqrt(max(A, B)) times the rate."""
    steps = []
    for config in (MuonConfig(lr=1e-3, weight_decay=0.0), AdamWConfig(lr=1e-3, weight_decay=0.0)):
        transformer = model()
        before = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
        after = weights_after(config, [1e-3], transformer)
        steps.append({name: after[name] - before[name] for name in before})
    muon, adamw = steps
    info = transformer.parameter_info()
    for name, step in muon.items():
        if info[name].role in ("norm", "embedding", "head"):
            assert torch.equal(step, adamw[name]), name
        else:
            values = torch.linalg.svdvals(step) / (1e-3 * 0.2 * max(step.shape) ** 0.5)
            assert values.min() > 0.5 and values.max() < 1.3, name
            assert step.square().mean().sqrt() == pytest.approx(0.2e-3, rel=0.25)  # the RMS of AdamW's in training


def test_muon_goes_on_from_a_state_dict_in_the_same_bits():
    config, lrs = MuonConfig(lr=1e-3), [1e-3, 5e-4]
    whole, stopped, resumed = model(), model(), model()
    optimizers = [build_optimizer(config, transformer) for transformer in (whole, stopped, resumed)]

    def step(number, transformer, optimizer):
        generator = torch.Generator().manual_seed(number)
        for parameter in transformer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_lr(optimizer, lrs[number])
        optimizer.step()

    for number in (0, 1):
        step(number, whole, optimizers[0])
    step(0, stopped, optimizers[1])
    resumed.load_state_dict(stopped.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    step(1, resumed, optimizers[2])
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


def test_impossible_settings_are_refused_by_name():
    for fields, key in (
        ({"lr": 0.0}, "lr"),
        ({"beta2": 1.0}, "beta2"),
        ({"decay": "both"}, "decay"),
        ({"decay_roles": ["queries"]}, "decay_roles"),
        ({"lr_multipliers": {"q": -1.0}}, "lr_multipliers.q"),
        ({"update_clipping": True, "fused": True}, "fused"),
        ({"scale_lr_by_param_rms": True, "fused": True}, "fused"),
        ({"skip_spikes_sigmas": 0.0}, "skip_spikes_sigmas"),
        ({"skip_spikes_window": 3}, "skip_spikes_window"),
    ):
        with pytest.raises(ConfigError, match=key):
            AdamWConfig(**fields)
    for fields, key in (({"a": 0.0}, "a"), ({"b": -1.0}, "b"), ({"beta1": 1.0}, "beta1")):
        with pytest.raises(ConfigError, match=key):
            AdamAtan2Config(**fields)
    for fields, key in (({"ns_steps": 0}, "ns_steps"), ({"lr_adjustment": "adam"}, "lr_adjustment")):
        with pytest.raises(ConfigError, match=key):
            MuonConfig(**fields)


def test_the_defaults_are_those_of_the_proxies_paper():
    """Wortsman et al. 2023, section 2.1; the learning rate is what the paper sweeps."""
    config, schedule, loss = AdamWConfig(), SCHEDULES["cosine"](), CrossEntropyConfig()
    assert (config.beta1, config.beta2, config.eps, config.clip_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert (config.weight_decay, config.decay, config.decay_roles) == (1e-4, "independent", None)
    assert (schedule.warmup, schedule.min_lr, loss.z_loss) == (5000 / 1e5, 1e-5, 1e-4)
