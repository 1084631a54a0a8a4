"""The closed forms equal the modules, and torch's own count of FLOPs."""

from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import count_params, flops_per_token, forward_flops, weights_by_role
from scaling_testbed.model.parametrization import ROLES
from scaling_testbed.model.transformer import Transformer

CONFIG_NAMES = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "configs" / "model").glob("*.yaml"))

VARIANTS = [
    {},
    {"n_layers": 0},
    {"n_layers": 0, "residual": "post"},
    {"tied_head": True},
    {"mlp": "swiglu", "d_ff_rule": "swiglu_256"},
    {"mlp": "relu2", "d_ff": 40},
    {"norm": "rmsnorm", "qk_norm": "rmsnorm", "qk_norm_axis": "full"},
    {"n_kv_heads": 2, "qk_norm_axis": "full"},
    {"n_kv_heads": 1, "qk_norm": "none", "mlp": "swiglu"},
    {"d_head": 12, "n_kv_heads": 2, "residual": "peri"},
    {"residual": "post"},
    {"residual": "reordered", "n_layers": 3},
    {"residual": "deepnorm", "tied_head": True},
    {"kappa": 10.0, "qk_norm": "none"},
    {"linear": "sigma_reparam"},
    {"linear": "sigma_reparam", "mlp": "swiglu", "tied_head": True},
]


def numel(model, *without):
    return sum(p.numel() for name, p in model.named_parameters() if model.parameter_info()[name].role not in without)


def assert_counts_equal(config):
    model = Transformer(config, device="meta")
    counts = count_params(config)
    assert counts.n_params == numel(model)
    assert counts.n_params_non_embedding == numel(model, "embedding", "head")
    head = model.head_weight_VD.numel()
    assert counts.n_params_no_input_embedding == numel(model, "embedding", "head") + head
    qk_gains = sum(p.numel() for name, p in model.named_parameters() if ".q_norm." in name or ".k_norm." in name)
    assert counts.n_params - counts.n_params_no_qk_gains == qk_gains
    roles = dict.fromkeys(ROLES, 0)
    for name, parameter in model.named_parameters():
        roles[model.parameter_info()[name].role] += parameter.numel()
    assert roles == {"mlp_gate": 0, **weights_by_role(config)}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_counts_equal_the_modules(tiny, changes):
    assert_counts_equal(tiny(**changes))


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_counts_equal_the_modules_for_every_config_file(from_yaml, name):
    config = from_yaml(name)
    assert config.name == name
    assert_counts_equal(config.resolved(config.vocab_size or 32101))


@pytest.mark.parametrize(
    "name, n_params",
    [
        ("openlm_11m", 10_569_312),
        ("openlm_79m", 78_914_048),
        ("openlm_154m", 153_677_376),
        ("openlm_412m", 411_616_256),
        ("openlm_1b", 1_439_795_200),
        ("openlm_7b", 6_889_410_560),
    ],
)
def test_open_lm_models_have_exactly_the_published_counts(from_yaml, name, n_params):
    counts = count_params(from_yaml(name))
    assert counts.n_params_no_qk_gains == n_params
    # The published params_no_embed keeps the head.
    qk_gains = counts.n_params - n_params
    assert counts.n_params_no_input_embedding - qk_gains == n_params - 50432 * from_yaml(name).d_model


@pytest.mark.parametrize(
    "name, width, layers",
    [
        ("nano_s", 32, 2),
        ("nano_m", 64, 2),
        ("nano_l", 128, 2),
        ("proxy_2m", 256, 3),
        ("proxy_9m", 512, 3),
        ("proxy_19m", 512, 6),
        ("proxy_42m", 768, 6),
        ("proxy_85m", 768, 12),
        ("proxy_300m", 1024, 24),
        ("proxy_1b", 2048, 24),
        ("proxy_5b", 4096, 24),
    ],
)
def test_default_shapes_have_12_l_d_squared_weights_and_their_gains(from_yaml, name, width, layers):
    config = from_yaml(name).resolved(32101)
    gains = (2 * layers + 1) * width + 2 * layers * config.d_head
    assert config.d_head == (16 if name.startswith("nano") else 64)
    assert count_params(config).n_params_non_embedding == 12 * layers * width**2 + gains


def test_counting_refuses_an_unknown_vocabulary():
    with pytest.raises(ConfigError, match="^vocab_size must be known"):
        count_params(ModelConfig())


def counted_flops(model, tokens_BT, backward):
    """torch's count, per token. The counter does not know the CPU's fused attention kernel, so sdpa takes its
    unfused path here."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.logits(tokens_BT).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops() / tokens_BT.numel()


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_equal_torch_s_counter(build, tokens, changes, impl):
    model = build(attention_impl=impl, **changes)
    assert counted_flops(model, tokens(24), backward=False) == forward_flops(model.config, 24)
    assert counted_flops(model, tokens(24), backward=True) == flops_per_token(model.config, 24)


@pytest.mark.parametrize(
    "changes",
    [{"attention_softcap": 5.0}, {"final_softcap": 5.0, "d_ff": 7}, {"attention_normaliser": "relu2"}],
    ids=str,
)
def test_softcaps_and_normalisers_cost_no_product(build, tokens, changes):
    model = build(**changes)
    assert counted_flops(model, tokens(24), backward=True) == flops_per_token(model.config, 24)


def test_flops_grow_with_sequence_length_only_through_attention(tiny):
    config = tiny(n_kv_heads=2)
    per_position = 4 * config.n_layers * config.n_heads * config.d_head
    assert forward_flops(config, 101) - forward_flops(config, 100) == per_position
