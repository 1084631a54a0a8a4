"""Laws of the whole model."""

import math

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.errors import ConfigError
from scaling_testbed.kernels.qk_norm_rope.reference import rotary_tables
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.layers import Linear
from scaling_testbed.model.parametrization import ROLES
from scaling_testbed.model.parts import RESIDUALS
from scaling_testbed.model.transformer import Transformer

OPTIONS = [
    {},
    {"norm": "rmsnorm"},
    {"qk_norm": "none"},
    {"qk_norm": "rmsnorm"},
    {"qk_norm": "layernorm", "qk_norm_axis": "full"},
    {"qk_norm": "rmsnorm", "qk_norm_axis": "full", "n_kv_heads": 2},
    {"qk_norm": "none", "kappa": 4.0},
    {"mlp": "swiglu", "d_ff_rule": "swiglu_256"},
    {"mlp": "relu2"},
    {"n_kv_heads": 1},
    {"n_kv_heads": 2, "attention_impl": "reference"},
    {"d_head": 12, "d_ff": 20},
    {"tied_head": True},
    {"attention_softcap": 5.0},
    {"attention_softcap": 5.0, "n_kv_heads": 2},
    {"attention_normaliser": "relu2"},
    {"attention_normaliser": "relu2", "qk_norm": "none"},
    {"final_softcap": 3.0},
    {"embedding_gradient_scale": 0.1},
    {"linear": "sigma_reparam"},
    {"attention_scale": "inverse"},
    {"attention_impl": "reference"},
    {"attention_impl": "sdpa"},
    {"qkv_impl": "together"},
    {"qkv_impl": "together", "n_kv_heads": 2, "qk_norm": "none", "attention_softcap": 5.0},
    {"residual": "post"},
    {"residual": "reordered"},
    {"residual": "peri"},
    {"residual": "deepnorm"},
]
options = pytest.mark.parametrize("changes", OPTIONS, ids=str)


@options
def test_a_token_changes_no_logit_before_it_and_the_logits_at_it(build, tokens, changes):
    model = build(**changes)
    t, before = 9, tokens(16)
    after = before.clone()
    after[:, t] = (after[:, t] + 1) % model.config.vocab_size
    with torch.no_grad():
        difference_T = (model.logits(before) - model.logits(after)).abs().amax(dim=(0, 2))
    assert difference_T[:t].max() < 1e-6
    assert difference_T[t] > 1e-2
    assert difference_T[t + 1 :].min() > 1e-5


@options
def test_gradients_are_finite_and_reach_every_parameter(build, tokens, changes):
    model = build(**changes)
    tokens_BT = tokens(16, rows=8)
    loss = F.cross_entropy(model.logits(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_zero_queries_learn_at_once_and_keys_after_them(build, tokens):
    model = build("mup_full", qk_norm="none")
    model.logits(tokens(16)).square().mean().backward()
    attention = model.blocks[0].attention
    assert attention.q.weight.grad.abs().max() > 0
    assert attention.k.weight.grad.abs().max() == 0


@options
def test_every_parameter_carries_a_role_and_its_layer(build, changes):
    model = build(**changes)
    info = model.parameter_info()
    assert list(info) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert info[name].role in ROLES
        assert info[name].layer == (int(name.split(".")[1]) if name.startswith("blocks.") else None)
        if parameter.dim() == 2 and info[name].role != "embedding":
            assert info[name].fan_in == parameter.shape[1]
        assert (parameter.dim() == 1) == (info[name].role == "norm")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_residual_stream_is_fp32_under_bf16_autocast_unless_it_is_narrow(build, tokens, residual, narrow):
    model = build(residual=residual)
    model.narrow_residual = narrow
    stream, products = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: stream.extend((inputs[0].dtype, output.dtype)))
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens(16))
        logits = model.logits(tokens(16))
    assert hidden.dtype == logits.dtype == torch.float32
    assert set(stream) == {torch.bfloat16 if narrow else torch.float32} and set(products) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def rounded(x):
    return x.to(torch.bfloat16).float()


# The layouts on a stream of fp32 numbers that bf16 has: (stream, branch, norms, number of layers) -> stream.
NARROW_LAYOUTS = {
    "pre": lambda x, branch, norms, n: rounded(x + branch(norms[0](x))),
    "post": lambda x, branch, norms, n: rounded(norms[0](rounded(x + branch(x)))),
    "reordered": lambda x, branch, norms, n: rounded(x + norms[0](branch(x))),
    "peri": lambda x, branch, norms, n: rounded(x + norms[1](branch(norms[0](x)))),
    "deepnorm": lambda x, branch, norms, n: rounded(norms[0](rounded(rounded((2 * n) ** 0.25 * x) + branch(x)))),
}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("residual", NARROW_LAYOUTS)
def test_a_narrow_stream_is_the_wide_one_rounded_to_bf16_after_each_operation(build, tokens, residual, recomputed):
    model, layout = build(residual=residual), NARROW_LAYOUTS[residual]
    tokens_BT = tokens(16)
    with torch.autocast("cpu", torch.bfloat16):
        tables = rotary_tables(torch.arange(16), model.config.d_head, model.config.rope_base)
        x_BTD = rounded(model.embedding(tokens_BT))
        for block in model.blocks:
            x_BTD = layout(x_BTD, lambda y, block=block: block.attention(y, *tables), block.attention_norms, 2)
            x_BTD = layout(x_BTD, block.mlp, block.mlp_norms, 2)
        plain_BTD = model.final_norm(x_BTD)
        wide_BTD = model(tokens_BT)
        model.narrow_residual, model.recompute_every = True, 1 if recomputed else None
        found_BTD = model(tokens_BT)
    assert torch.equal(found_BTD, plain_BTD) and not torch.equal(found_BTD, wide_BTD)
    weights = torch.randn_like(found_BTD)
    grads = [torch.autograd.grad((x * weights).sum(), list(model.parameters())[:-1]) for x in (found_BTD, wide_BTD)]
    for found, wide in zip(*grads, strict=True):
        assert found.dtype is torch.float32 and (found - wide).norm() < 0.1 * wide.norm()


def test_a_narrow_stream_is_fp32_without_autocast(build, tokens):
    model = build()
    wide_BTD = model(tokens(16))
    model.narrow_residual = True
    assert torch.equal(model(tokens(16)), wide_BTD)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_bf16_autocast_changes_logits_by_no_more_than_its_rounding(build, tokens, impl):
    model = build(attention_impl=impl)
    exact = model.logits(tokens(16))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.logits(tokens(16))
    assert 0 < (exact - rounded).abs().max() < 0.05


def test_the_initial_loss_of_a_standard_head_is_ln_v_plus_a_half(build, tokens):
    for changes in ({}, {"residual": "post"}, {"residual": "reordered", "norm": "rmsnorm"}):
        model = build(d_model=128, vocab_size=1024, **changes)
        loss = mean_loss(model, tokens(65, rows=32, vocab_size=1024))
        assert loss == pytest.approx(math.log(1024) + 0.5, abs=0.1)


def test_the_initial_loss_under_mup_tends_to_ln_v(build, tokens):
    model = build("mup_full", base_width=8, d_model=128, vocab_size=1024)
    assert mean_loss(model, tokens(65, rows=32, vocab_size=1024)) == pytest.approx(math.log(1024) + 1 / 32, abs=0.03)


def mean_loss(model, tokens_BT):
    with torch.no_grad():
        return F.cross_entropy(model.logits(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten()).item()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(build):
    first, other = build(seed=7).state_dict(), build(seed=8).state_dict()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = build(seed=7).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert (weight == other[name]).float().mean() < 0.01, name


def test_initial_weights_depend_on_name_and_shape_but_not_on_what_else_is_built(build):
    shallow, deep = build().state_dict(), build(n_layers=5, mlp="swiglu", n_kv_heads=1).state_dict()
    shared = [name for name in shallow if name in deep and shallow[name].shape == deep[name].shape]
    assert "blocks.1.mlp.mlp_out.weight" in shared and "head.weight" in shared
    assert all(torch.equal(shallow[name], deep[name]) for name in shared)


def test_no_two_weights_start_alike(build):
    weights = [p.flatten()[:100] for p in build().parameters() if p.dim() == 2]
    for i, left in enumerate(weights):
        assert not any(torch.allclose(left, right) for right in weights[:i])


def test_a_model_made_on_the_meta_device_gets_the_same_weights(build, tiny):
    late = Transformer(tiny(), device="meta").to_empty(device="cpu")
    late.init_weights(0)
    expected = build(seed=0).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in late.state_dict().items())


def test_a_tied_head_is_the_embedding(build, tokens):
    tied, untied = build(tied_head=True), build()
    assert tied.head_weight_VD is tied.embedding.weight
    assert "head.weight" not in tied.state_dict()
    assert untied.head_weight_VD is untied.head.weight
    torch.testing.assert_close(tied.logits(tokens(8)), tied(tokens(8)) @ tied.embedding.weight.T)


@pytest.mark.parametrize("tied", [False, True])
def test_a_shrunk_embedding_gradient_is_a_part_of_the_whole_one_and_nothing_else_changes(build, tokens, tied):
    """The gradient of the look-up only: a tied matrix has another one as the head, which is the difference at a = 1."""
    ids, found = tokens(16), {}
    for scale in (None, 1.0, 0.5, 0.25, 0.1):
        model = build(embedding_gradient_scale=scale, tied_head=tied)
        logits = model.logits(ids)
        logits.square().mean().backward()
        found[scale] = {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}
    as_head = 2 * found[0.25]["embedding.weight"] - found[0.5]["embedding.weight"]  # at a = 0
    assert (as_head.abs().max() > 1e-6) == tied
    look_up = found[None]["embedding.weight"] - as_head
    for scale in (1.0, 0.5, 0.25, 0.1):
        torch.testing.assert_close(found[scale].pop("embedding.weight"), as_head + scale * look_up)
        for name, value in found[scale].items():
            assert torch.equal(value, found[None][name]), name


def test_the_final_softcap_bounds_the_logits_and_leaves_small_ones(build, tokens):
    capped, plain = build(final_softcap=0.5).logits(tokens(16)), build().logits(tokens(16))
    assert plain.abs().max() > 1 and capped.abs().max() < 0.5
    torch.testing.assert_close(capped, 0.5 * torch.tanh(plain / 0.5))


def test_logits_are_hidden_states_times_the_head(build, tokens):
    model = build()
    torch.testing.assert_close(model.logits(tokens(8)), model(tokens(8)) @ model.head_weight_VD.T)


@pytest.mark.parametrize("changes", [{}, {"attention_softcap": 20.0, "n_kv_heads": 2}], ids=str)
def test_evaluation_may_be_longer_than_training(build, tokens, changes):
    model = build(**changes)
    with torch.no_grad():
        short = model(tokens(16)[:, :8])
        long = model(tokens(16))
        torch.testing.assert_close(long[:, :8], short, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(tokens(16)[:, :8]), short)
        assert model(tokens(1000)).isfinite().all()
    assert not list(model.buffers())


def test_order_matters_through_the_positions(build, tokens):
    # Without positions, attention would see its past as a set.
    model, before = build(n_layers=1), tokens(8)
    swapped = before[:, [1, 0, *range(2, 8)]]
    with torch.no_grad():
        assert (model(before)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_the_zero_layer_model_sees_only_the_current_token(build, residual):
    model = build(n_layers=0, residual=residual)
    everything = torch.arange(model.config.vocab_size)[None]
    shuffled = everything[:, torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        logits_VV = model.logits(everything)[0]
        torch.testing.assert_close(model.logits(shuffled)[0], logits_VV[shuffled[0]])
    assert {info.role for info in model.parameter_info().values()} <= {"embedding", "head", "norm"}


def test_post_norm_layouts_have_no_further_final_norm_and_give_normed_hidden_states(build, tokens):
    for residual, shape in RESIDUALS.items():
        model = build(residual=residual)
        assert shape.final_norm == (residual not in ("post", "deepnorm"))
        assert any(name.startswith("final_norm") for name, _ in model.named_parameters()) == shape.final_norm
        hidden = model(tokens(8))
        torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 8), atol=1e-3, rtol=0)


def test_an_unresolved_config_is_refused():
    with pytest.raises(ConfigError, match="^vocab_size must be known"):
        Transformer(ModelConfig())


@pytest.mark.slow
def test_the_compiled_model_equals_the_eager_one_in_one_graph(build, tokens):
    for changes in ({"n_kv_heads": 2}, {"attention_softcap": 20.0}):
        model = build(**changes)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(tokens(16)), model(tokens(16)), atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert (compiled(tokens(16)) - model(tokens(16))).abs().max() < 0.05
