"""Initialisation and learning rate by role."""

import dataclasses
import math

import pytest

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import PARAMETRIZATIONS, ModelConfig, ParametrizationConfig
from scaling_testbed.model.parametrization import (
    HIDDEN_ROLES,
    ROLES,
    ParameterInfo,
    attention_scale,
    init_std,
    lr_multiplier,
)
from scaling_testbed.model.transformer import Transformer

WIDE = {"d_model": 512, "n_heads": 8, "n_layers": 1, "mlp": "swiglu", "d_ff": 1024}


def weights_by_role(model):
    return {model.parameter_info()[name].role: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_measured_std_is_one_over_root_fan_in_after_truncation(build, name):
    weights = weights_by_role(build(name, base_width=128, **WIDE))
    assert set(weights) == set(ROLES)
    expected = {role: 1 / math.sqrt(512) for role in ROLES} | {"mlp_out": 1 / math.sqrt(1024)}
    if name in ("mup_intermediate", "mup_full"):
        expected["head"] = math.sqrt(128) / 512
    for role, weight in weights.items():
        if role == "norm":
            assert (weight == 1).all()
        elif role == "q" and name == "mup_full":
            assert (weight == 0).all()
        else:
            assert weight.std().item() == pytest.approx(expected[role], rel=0.02), role
            assert abs(weight.mean().item()) < 0.02 * expected[role]


def test_all_but_embeddings_are_cut_at_two_sigma_of_the_untruncated_normal(build):
    for role, weight in weights_by_role(build(**WIDE)).items():
        if role == "norm":
            continue
        largest = weight.abs().max() / weight.std()
        if role == "embedding":
            assert largest > 3
        else:
            assert 2.2 < largest < 2.35, role  # 2 / 0.8796 = 2.274


def test_deepnorm_divides_the_init_of_mlp_output_and_value_projections(build):
    plain, deep = build(**WIDE | {"n_layers": 2}), build(residual="deepnorm", **WIDE | {"n_layers": 2})
    plain, deep = weights_by_role(plain), weights_by_role(deep)
    for role in ROLES:
        shrunk = role in ("v", "attn_out", "mlp_in", "mlp_gate", "mlp_out")
        if role != "norm":
            ratio = (plain[role].std() / deep[role].std()).item()
            assert ratio == pytest.approx((8 * 2) ** 0.25 if shrunk else 1.0, rel=1e-4), role


def info(role, fan_in=1024):
    return ParameterInfo(role=role, fan_in=fan_in, layer=0)


MODEL = ModelConfig(d_model=1024, n_heads=16).resolved(100)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_learning_rate_of_linear_layers_falls_as_base_fan_in_over_fan_in(name):
    parametrization = ParametrizationConfig(name=name, base_width=256)
    scaled = 1.0 if name == "standard" else 0.25
    for role in (*HIDDEN_ROLES, "head"):
        assert lr_multiplier(parametrization, info(role), MODEL) == scaled
    assert lr_multiplier(parametrization, info("mlp_out", fan_in=4096), MODEL) == scaled
    assert lr_multiplier(parametrization, info("embedding"), MODEL) == 1.0
    assert lr_multiplier(parametrization, info("norm", fan_in=1), MODEL) == 1.0


def test_whether_the_head_is_a_linear_layer_is_a_choice():
    without = ParametrizationConfig(name="mup_full", scale_head_lr=False)
    assert lr_multiplier(without, info("head"), MODEL) == 1.0
    assert lr_multiplier(without, info("q"), MODEL) == 0.25


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_at_the_base_width_only_the_full_rules_differ_from_standard(name):
    parametrization = ParametrizationConfig(name=name, base_width=1024)
    for role in ROLES:
        assert lr_multiplier(parametrization, info(role), MODEL) == 1.0
        if not (role == "q" and name == "mup_full"):
            assert init_std(parametrization, info(role), MODEL) == pytest.approx(0.0 if role == "norm" else 1 / 32)


def test_attention_scale_is_one_over_d_head_when_asked_for_or_under_mup_full():
    inverse = dataclasses.replace(MODEL, attention_scale="inverse")
    for name in PARAMETRIZATIONS:
        parametrization = ParametrizationConfig(name=name)
        assert attention_scale(parametrization, inverse) == 1 / 64
        assert attention_scale(parametrization, MODEL) == (1 / 64 if name == "mup_full" else 1 / 8)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_the_model_computes_with_the_parametrization_s_attention_scale(build, name):
    model = build(name)
    assert all(block.attention.scale == attention_scale(model.parametrization, model.config) for block in model.blocks)


@pytest.mark.parametrize("name", ["mup_intermediate", "mup_full"])
def test_a_tied_head_cannot_have_an_init_of_its_own(tiny, name):
    with pytest.raises(ConfigError, match="^tied_head must be false"):
        Transformer(tiny(tied_head=True), ParametrizationConfig(name=name))
