"""Decay, groups, and what every optimizer answers for itself."""

import ast
import dataclasses
import math
import weakref
from pathlib import Path

import pytest
import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.optimizers import (
    AS_ADAMW,
    OPTIMIZERS,
    AdamAtan2Config,
    AdamWConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
    create_state,
    parameter_groups,
    set_lr,
)
from scaling_testbed.learning.schedules import SCHEDULES
from scaling_testbed.model.config import ParametrizationConfig
from scaling_testbed.runs.state import restore_whole
from tests.learning.optimizers.conftest import model, weights_after

PACKAGE = Path(__file__).resolve().parents[3] / "scaling_testbed"


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
    (SGDConfig, {}),
    (SGDConfig, {"nesterov": True}),
]


@pytest.mark.parametrize("lr", [3e-4, 1e-2, 3e-1])
@pytest.mark.parametrize(("kind", "fields"), DECAYING, ids=str)
def test_independent_decay_shrinks_a_weight_by_the_schedule_and_not_by_the_rate(lr, kind, fields):
    """With a zero gradient a step is w <- w (1 - s lambda), s the schedule's factor."""
    transformer = model()
    weights = (transformer.head_weight_VD, transformer.blocks[0].mlp.mlp_in.weight)
    before = [weight.detach().clone() for weight in weights]
    config = kind(lr=lr, weight_decay=0.01, **fields)
    optimizer = config.build(transformer)
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
    optimizer = AdamWConfig(lr=1e-2, lr_multipliers={"embedding": 0.1}).build(transformer)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_a_state_dict_in_the_same_bits(name):
    config, lrs = OPTIMIZERS[name](lr=1e-3), [1e-3, 5e-4]
    whole, stopped, resumed = model(), model(), model()
    optimizers = [config.build(transformer) for transformer in (whole, stopped, resumed)]

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
        ({"clip_impl": "inside"}, "clip_impl"),
        ({"clip_impl": "fused"}, "clip_impl must be separate unless fused=true"),
        ({"clip_impl": "fused", "fused": False}, "clip_impl must be separate unless fused=true"),
        ({"clip_impl": "fused", "update_clipping": True}, "clip_impl must be separate unless fused=true"),
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
    for fields, key in (({"momentum": 1.0}, "momentum"), ({"momentum": 0.0, "nesterov": True}, "nesterov")):
        with pytest.raises(ConfigError, match=key):
            SGDConfig(**fields)


def test_the_defaults_are_those_of_the_proxies_paper():
    """Wortsman et al. 2023, section 2.1; the learning rate is what the paper sweeps."""
    config, schedule, loss = AdamWConfig(), SCHEDULES["cosine"](), CrossEntropyConfig()
    assert (config.beta1, config.beta2, config.eps, config.clip_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert (config.weight_decay, config.decay, config.decay_roles) == (1e-4, "independent", None)
    assert (schedule.warmup, schedule.min_lr, loss.z_loss) == (5000 / 1e5, 1e-5, 1e-4)


OPTIONS = [(name, {}) for name in OPTIMIZERS]
OPTIONS += [("adamw", {"scale_lr_by_param_rms": True}), ("muon", {"lr_adjustment": "original"})]
OPTIONS += [("sgd", {"momentum": 0.0}), ("sgd", {"nesterov": True})]


@pytest.mark.parametrize(("name", "fields"), OPTIONS, ids=str)
def test_the_state_takes_the_bytes_that_are_said(name, fields):
    config, transformer = OPTIMIZERS[name](**fields), model()
    optimizer = config.build(transformer)
    for parameter in transformer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    info = transformer.parameter_info()
    for key, parameter in transformer.named_parameters():
        kept = sum(x.nbytes for x in optimizer.state.get(parameter, {}).values() if x is not None and x.dim())
        assert kept == config.bytes_per_weight(info[key].role) * parameter.numel(), key


STARTS = [*OPTIONS, ("adamw", {"fused": True}), ("adamw", {"fused": False})]


@pytest.mark.parametrize(("name", "fields"), STARTS, ids=str)
def test_state_that_is_there_before_the_first_step_is_the_one_that_the_step_creates(name, fields):
    """Every bit of it, with the sign of a zero, and so every bit of the weights."""
    config = OPTIMIZERS[name](lr=1e-2, **fields)
    early, late = model(), model()
    optimizers = [config.build(transformer) for transformer in (early, late)]
    create_state(config, optimizers[0])
    for number in range(4):
        for transformer, optimizer in zip((early, late), optimizers, strict=True):
            generator = torch.Generator().manual_seed(number)
            for parameter in transformer.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad.flatten()[:2] = torch.tensor([-0.0, 0.0])
            if number:
                optimizer.step()
        if number:
            assert facts_and_bits(early, optimizers[0]) == facts_and_bits(late, optimizers[1])
        else:
            created = [facts for facts, _ in facts_and_bits(early, optimizers[0])]
    assert created == [facts for facts, _ in facts_and_bits(late, optimizers[1])]
    assert len(created) > len(list(early.parameters())) or fields.get("momentum") == 0.0


def facts_and_bits(transformer, optimizer):
    """Of the weights and the state: what a tensor is, and its bits."""
    found = []
    for name, parameter in transformer.named_parameters():
        for key, x in {"weights": parameter.detach(), **optimizer.state.get(parameter, {})}.items():
            found.append(((name, key, x.dtype, x.device, x.shape, x.stride(), x.requires_grad), x.numpy().tobytes()))
    return found


def test_the_momentum_after_the_first_step_has_the_sign_of_zero_that_torch_gives_it():
    """torch.optim.SGD copies the first gradient."""
    config, ours, theirs = SGDConfig(lr=0.1, weight_decay=0.0), model(), model()
    optimizer = config.build(ours)
    create_state(config, optimizer)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for transformer in (ours, theirs):
        for parameter in transformer.parameters():
            parameter.grad = torch.full_like(parameter, -0.0)
    optimizer.step()
    other.step()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        buffers = optimizer.state[one]["momentum_buffer"], other.state[two]["momentum_buffer"]
        assert torch.signbit(buffers[0]).all() and torch.signbit(buffers[1]).all()


@pytest.mark.parametrize(("name", "fields"), OPTIONS, ids=str)
def test_a_state_dict_without_state_is_continued_as_a_new_run(name, fields):
    """As a checkpoint that an earlier version has made before its first step."""
    config, one, other = OPTIMIZERS[name](lr=1e-2, **fields), model(), model()
    optimizers = [config.build(transformer) for transformer in (one, other)]
    create_state(config, optimizers[0])
    optimizers[0].load_state_dict(config.build(model()).state_dict())
    assert not optimizers[0].state
    for transformer, optimizer in zip((one, other), optimizers, strict=True):
        for parameter in transformer.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    assert facts_and_bits(one, optimizers[0]) == facts_and_bits(other, optimizers[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_before_is_gone_when_another_is_loaded(name):
    """Both together would need more memory than the run."""
    config, transformer = OPTIMIZERS[name](), model()
    optimizer, saved = config.build(transformer), config.build(model())
    create_state(config, optimizer)
    create_state(config, saved)
    before = [weakref.ref(x) for state in optimizer.state.values() for x in state.values()]
    tensors = {"model": transformer.state_dict(), "optimizer": saved.state_dict()}
    alive = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: alive.append(sum(x() is not None for x in before)))
    restore_whole(Path("checkpoint"), tensors, transformer, optimizer, torch.device("cpu"))
    assert before and alive == [0]


@pytest.mark.parametrize(("name", "fields"), OPTIONS, ids=str)
def test_before_the_first_step_there_is_no_update_to_measure(name, fields):
    config, transformer = OPTIMIZERS[name](**fields), model()
    optimizer = config.build(transformer)
    create_state(config, optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            update = config.update_of(group, optimizer.state.get(parameter, {}))
            assert update is None or not update.direction.any()


@pytest.mark.parametrize(("name", "fields"), OPTIONS, ids=str)
def test_the_update_is_what_moved_the_weights(name, fields):
    """But for the decay, which is none here, and where it is not told."""
    config, transformer = OPTIMIZERS[name](lr=1e-2, weight_decay=0.0, **fields), model()
    optimizer = config.build(transformer)
    for step in range(3):
        before = [parameter.detach().double() for parameter in transformer.parameters()]
        generator = torch.Generator().manual_seed(step)
        for parameter in transformer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    told = 0
    for parameter, old in zip(transformer.parameters(), before, strict=True):
        update = config.update_of(group_of[parameter], optimizer.state.get(parameter, {}))
        if update is not None:
            rate = float(config.rate_of(optimizer, group_of[parameter], parameter))
            torch.testing.assert_close(rate * update.direction, old - parameter.detach(), rtol=1e-3, atol=1e-7)
            told += 1
    assert (told == len(before)) == (name != "muon" and not fields.get("nesterov") and fields.get("momentum") != 0)
    for parameter in transformer.parameters():  # as it is before the first step
        assert config.update_of(group_of[parameter], {}) is None


def test_rates_of_one_meaning_are_those_of_updates_of_about_one():
    """A steady gradient moves a weight by the rate, whatever its size."""
    for name, fields in OPTIONS:
        config = OPTIMIZERS[name](lr=1e-3, weight_decay=0.0, **fields)
        moved = []
        for size in (1e-2, 1.0):
            transformer = model()
            start = transformer.head_weight_VD.detach().clone()
            weights = transformer.blocks[0].mlp.mlp_in.weight
            first = weights.detach().clone()
            optimizer = config.build(transformer)
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, size)
            optimizer.step()
            steps = (transformer.head_weight_VD.detach() - start, weights.detach() - first)
            moved += [step.mean().item() / -1e-3 for step in steps]
        as_adamw = all(abs(each - 1) < 1e-2 for each in moved)
        assert as_adamw == (config.rate_means == AS_ADAMW), name


def test_what_changes_the_size_of_a_step_changes_what_a_rate_means():
    for kind, one, other in (
        (SGDConfig, {"momentum": 0.9}, {"momentum": 0.5}),
        (AdamAtan2Config, {}, {"a": 1.0}),
        (AdamAtan2Config, {}, {"scale_lr_by_param_rms": True}),
        (MuonConfig, {}, {"lr_adjustment": "original"}),
    ):
        assert kind(**one).rate_means != kind(**other).rate_means
    assert AdamAtan2Config(a=1 / math.atan(0.5), b=2.0).rate_means == AS_ADAMW  # a constant gradient has an update of 1


def test_an_optimizer_says_itself_whether_it_can_be_sharded():
    for name, kind in OPTIMIZERS.items():
        assert (kind.needs_whole_tensors is None) == (name != "muon")
    assert OptimizerConfig.needs_whole_tensors  # one that says nothing is refused


def test_no_other_file_asks_for_an_optimizer_by_name():
    """Neither its class nor its name; AdamW is the default that rows without a name are read as."""
    kinds = {kind.__name__ for kind in OPTIMIZERS.values()}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith("learning/optimizers/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.Attribute | ast.alias):
                name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", "")))
                found |= {(place, name)} if name in kinds else set()
            elif isinstance(node, ast.Constant) and node.value in OPTIMIZERS:
                found.add((place, node.value))
    assert found == {("analysis/curves/rate_meaning.py", "AdamWConfig")}
