"""A wrong value is refused with its field's name; a missing one follows its rule."""

import subprocess
import sys
from pathlib import Path

import pytest

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig


@pytest.mark.parametrize(
    "field, changes",
    [
        ("d_model", {"d_model": 0}),
        ("d_model", {"d_model": 66, "n_heads": 4}),
        ("n_layers", {"n_layers": -1}),
        ("n_heads", {"n_heads": 0}),
        ("n_kv_heads", {"n_kv_heads": 3}),
        ("n_kv_heads", {"n_kv_heads": -2}),
        ("d_head", {"d_head": 15}),
        ("d_head", {"d_model": 12, "n_heads": 4}),
        ("d_head", {"d_head": 0}),
        ("d_ff", {"d_ff": 0}),
        ("d_ff_rule", {"d_ff_rule": "5x"}),
        ("vocab_size", {"vocab_size": 0}),
        ("norm", {"norm": "batchnorm"}),
        ("norm_eps", {"norm_eps": 0.0}),
        ("qk_norm", {"qk_norm": "l2"}),
        ("qk_norm_axis", {"qk_norm_axis": "heads"}),
        ("kappa", {"kappa": 100.0}),
        ("kappa", {"kappa": -1.0}),
        ("mlp", {"mlp": "geglu"}),
        ("attention_scale", {"attention_scale": "sqrt"}),
        ("attention_softcap", {"attention_softcap": 0.0}),
        ("attention_normaliser", {"attention_normaliser": "sigmoid"}),
        ("attention_impl", {"attention_impl": "flash"}),
        ("attention_impl", {"attention_impl": "sdpa", "attention_softcap": 50.0}),
        ("attention_impl", {"attention_impl": "sdpa", "attention_window": 5}),
        ("attention_impl", {"attention_impl": "triton", "d_head": 48}),
        ("attention_impl", {"attention_impl": "sdpa", "attention_normaliser": "relu2"}),
        ("attention_impl", {"attention_impl": "triton", "attention_normaliser": "relu2", "d_head": 32}),
        ("attention_window", {"attention_window": 0}),
        ("qk_norm_impl", {"qk_norm_impl": "fused"}),
        ("qkv_impl", {"qkv_impl": "fused"}),
        ("qkv_impl", {"qkv_impl": "together", "linear": "sigma_reparam"}),
        ("qk_norm_impl", {"qk_norm_impl": "triton", "d_head": 258}),
        ("final_softcap", {"final_softcap": -30.0}),
        ("embedding_gradient_scale", {"embedding_gradient_scale": 0.0}),
        ("embedding_gradient_scale", {"embedding_gradient_scale": 1.5}),
        ("linear", {"linear": "spectral"}),
        ("residual", {"residual": "parallel"}),
        ("rope_base", {"rope_base": 0.0}),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field, changes):
    with pytest.raises(ConfigError, match=rf"^{field} must (be|lie) ") as refusal:
        ModelConfig(**changes)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("field, changes", [("name", {"name": "mup"}), ("base_width", {"base_width": 0})])
def test_a_wrong_parametrization_is_refused(field, changes):
    with pytest.raises(ConfigError, match=rf"^{field} must be "):
        ParametrizationConfig(**changes)


def test_what_is_not_given_follows_its_rule():
    config = ModelConfig(d_model=96, n_heads=4).resolved(1000)
    assert (config.n_kv_heads, config.d_head, config.d_ff, config.vocab_size) == (4, 24, 384, 1000)
    assert config.resolved(1000) == config


def test_what_is_given_stands():
    config = ModelConfig(d_model=96, n_heads=5, n_kv_heads=1, d_head=10, d_ff=7, vocab_size=1024).resolved(1000)
    assert (config.n_kv_heads, config.d_head, config.d_ff, config.vocab_size) == (1, 10, 7, 1024)


@pytest.mark.parametrize(
    "d_model, d_ff", [(96, 256), (512, 1536), (576, 1536), (1024, 2816), (2048, 5632), (4096, 11008)]
)
def test_the_swiglu_256_rule_rounds_8d_over_3_up_to_a_multiple_of_256(d_model, d_ff):
    assert ModelConfig(d_model=d_model, d_ff_rule="swiglu_256").resolved(10).d_ff == d_ff


def test_a_vocabulary_smaller_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="^vocab_size must be at least the data's 257, got 256"):
        ModelConfig(vocab_size=256).resolved(257)


def test_planning_needs_no_torch():
    modules = ("config", "counting", "parametrization", "parts")
    imports = "; ".join(f"import scaling_testbed.model.{module}" for module in modules)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_defaults_are_those_of_the_proxies_paper():
    """Wortsman et al. 2023, section 2.1; eps is Flax's, the base of the rotation the usual one."""
    config = ModelConfig()
    assert (config.norm, config.norm_eps, config.qk_norm, config.qk_norm_axis) == (
        "layernorm",
        1e-6,
        "layernorm",
        "head",
    )
    assert (config.mlp, config.d_ff_rule, config.residual, config.tied_head) == ("gelu", "4x", "pre", False)
    assert (config.rope_base, config.attention_scale, config.kappa) == (10000.0, "inverse_sqrt", None)
    assert config.attention_softcap is None and config.final_softcap is None
