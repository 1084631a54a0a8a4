"""Attention: what its preparation bounds, and that its paths and groupings agree."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.errors import ConfigError
from scaling_testbed.kernels import support
from scaling_testbed.kernels.qk_norm_rope import reference
from scaling_testbed.model.attention import sdpa_attention
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parts import LINEARS, NORMALISERS, Linear, choose_impl
from tests.conftest import KERNEL_DEVICE

T = 23


def queries_and_keys(model, scale_weights=1.0):
    """q_BHTK, k_BGTK of block 0 for random inputs, with the projections blown up by `scale_weights`."""
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.q.weight.mul_(scale_weights)
        attention.k.weight.mul_(scale_weights)
        x_BTD = torch.randn(2, T, model.config.d_model, generator=torch.Generator().manual_seed(3))
        tables = reference.rotary_tables(torch.arange(T), model.config.d_head, model.config.rope_base)
        return attention.prepare(attention.q(x_BTD), attention.k(x_BTD), *tables)


@pytest.mark.parametrize("qk_norm", ["layernorm", "rmsnorm"])
def test_qk_norm_bounds_every_score_by_the_root_of_d_head(build, qk_norm):
    model = build(qk_norm=qk_norm)
    q, k = queries_and_keys(model, scale_weights=1000.0)
    scores = model.blocks[0].attention.scale * (q @ k.transpose(-1, -2)).abs()
    bound = math.sqrt(model.config.d_head)
    assert 0.6 * bound < scores.max() <= bound * 1.0001


def test_without_qk_norm_scores_grow_with_the_weights(build):
    q, k = queries_and_keys(build(qk_norm="none"), scale_weights=1000.0)
    assert (q @ k.transpose(-1, -2)).abs().max() > 1e5


@pytest.mark.parametrize("qk_norm", ["layernorm", "rmsnorm"])
def test_the_head_axis_norms_each_head_and_the_full_axis_all_of_them_together(build, qk_norm):
    per_head, _ = queries_and_keys(build(qk_norm=qk_norm, qk_norm_axis="head"))
    full, _ = queries_and_keys(build(qk_norm=qk_norm, qk_norm_axis="full"))
    torch.testing.assert_close(per_head.square().mean(-1), torch.ones(2, 4, T), atol=1e-3, rtol=0)
    torch.testing.assert_close(full.square().mean((1, 3)), torch.ones(2, T), atol=1e-3, rtol=0)
    assert full.square().mean(-1).std() > 0.1


def test_gains_are_one_d_head_for_all_heads_or_the_full_width_of_queries_and_keys(build):
    per_head, full = (build(n_kv_heads=2, qk_norm_axis=axis).blocks[0].attention for axis in ("head", "full"))
    assert per_head.q_norm.weight.shape == per_head.k_norm.weight.shape == (8,)
    assert full.q_norm.weight.shape == (32,) and full.k_norm.weight.shape == (16,)


def test_the_norm_comes_before_the_rotation(build):
    model = build()
    gain = torch.linspace(0.5, 2.0, 8)
    with torch.no_grad():
        model.blocks[0].attention.q_norm.weight.copy_(gain)
    q_BHTK, _ = queries_and_keys(model)
    unrotated = reference.rotary(q_BHTK, model.config.rope_base, positions=-torch.arange(T))
    torch.testing.assert_close((unrotated / gain).square().mean(-1), torch.ones(2, 4, T), atol=1e-3, rtol=0)


@pytest.mark.parametrize("axis", ["head", "full"])
@pytest.mark.parametrize("kappa", [1.0, 1000.0])
def test_kappa_fixes_the_rms_of_queries_and_keys_of_each_head(build, kappa, axis):
    model = build(kappa=kappa, qk_norm="none", qk_norm_axis=axis, n_kv_heads=2)
    for x in queries_and_keys(model, scale_weights=37.0):
        torch.testing.assert_close(x.square().mean(-1), torch.full(x.shape[:-1], kappa), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "qk_norm": "none"}, {"d_head": 6}], ids=str
)
def test_sdpa_equals_reference_in_output_and_gradient(build, tokens, changes):
    results = []
    for impl in ("reference", "sdpa"):
        model = build(attention_impl=impl, **changes)
        logits = model.logits(tokens(T))
        logits.square().mean().backward()
        results.append((logits.detach(), model.blocks[0].attention.q.weight.grad))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "qk_norm": "none", "d_head": 6},
        {"qk_norm": "rmsnorm", "qk_norm_axis": "full"},
        {"attention_softcap": 5.0, "residual": "peri"},
    ],
    ids=str,
)
def test_one_product_equals_three_in_output_and_in_every_gradient(build, tokens, changes, precision):
    """Of the same parameters. Sums of products of fp32 or bf16 numbers come in another order."""
    results = []
    for impl in ("separate", "together"):
        model = build(qkv_impl=impl, **changes)
        calls = []
        model.blocks[0].attention.q.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        start = {name: x.detach().clone() for name, x in model.named_parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden_BTD = model(tokens(T))
        hidden_BTD.cos().mean().backward()
        assert len(calls) == (impl == "separate") and model.qkv_impl == impl
        gradients = {f"gradient of {name}": x.grad for name, x in model.named_parameters() if name != "head.weight"}
        results.append({"hidden": hidden_BTD.detach(), **gradients, **start})
    assert results[0].keys() == results[1].keys()
    for name, left in results[0].items():
        rounding = 2e-2 if precision == "bf16" else 1e-5
        torch.testing.assert_close(left, results[1][name], atol=rounding * left.abs().max().item(), rtol=0, msg=name)


def test_a_linear_layer_that_does_more_than_a_product_has_its_own_products(monkeypatch):
    """Whoever registers one need not know of the path."""
    monkeypatch.setitem(LINEARS, "planted", Linear(LINEARS["plain"].make))
    with pytest.raises(ConfigError, match="^qkv_impl must be auto or separate with linear=planted, got together"):
        ModelConfig(qkv_impl="together", linear="planted")
    assert (
        choose_impl("qkv_impl", ModelConfig(linear="planted")) == "separate" == choose_impl("qkv_impl", ModelConfig())
    )


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values(build, tokens):
    grouped, full = build(n_kv_heads=2), build(seed=1)
    weights = grouped.state_dict()
    for name in list(weights):
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            by_group = weights[name].unflatten(0, (2, 8))
            weights[name] = by_group.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped.logits(tokens(T)), full.logits(tokens(T)), atol=1e-5, rtol=1e-4)


def test_the_softcap_reaches_the_scores(build, tokens):
    # Enormous queries make attention one-hot; a tiny cap makes it nearly uniform all the same.
    model = build(attention_softcap=1e-4, qk_norm="none")
    uniform = build(qk_norm="none")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q.weight.mul_(100.0)
        for block in uniform.blocks:
            block.attention.q.weight.zero_()
    torch.testing.assert_close(model.logits(tokens(T)), uniform.logits(tokens(T)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("qk_norm", ["none", "layernorm"])
def test_pointwise_attention_reads_what_its_scores_weigh(build, tokens, qk_norm):
    """Its weights do not sum to one: with queries of zero nothing is read, and with twice the scores four times as
    much, where a softmax would go on reading the same amount."""
    model, ids = build(attention_normaliser="relu2", qk_norm=qk_norm, n_layers=1), tokens(T)
    attention, read = model.blocks[0].attention, []
    attention.attn_out.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    for scale in (attention.scale, 2 * attention.scale, 0.0):
        attention.scale = scale
        model(ids)
    torch.testing.assert_close(read[1], 4 * read[0])
    assert read[0].abs().max() > 1e-3 and not read[2].any()


def test_attention_scale_reaches_the_scores(build, tokens):
    # d_head is 8: scale 1/8 with queries sqrt(8) times larger is scale 1/sqrt(8).
    inverse, inverse_sqrt = build(attention_scale="inverse", qk_norm="none"), build(qk_norm="none")
    assert not torch.allclose(inverse.logits(tokens(T)), inverse_sqrt.logits(tokens(T)), atol=1e-4)
    with torch.no_grad():
        for block in inverse.blocks:
            block.attention.q.weight.mul_(math.sqrt(8))
    torch.testing.assert_close(inverse.logits(tokens(T)), inverse_sqrt.logits(tokens(T)), atol=1e-5, rtol=1e-4)


CPU = torch.device("cpu")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("n_positions", "widened"), [(1024, True), (1025, False)])
def test_small_bf16_heads_on_a_cpu_are_computed_in_fp32_and_rounded_once(n_positions, widened, autocast):
    """16,384 numbers in the keys of a head are few. The gradient passes through the same path."""
    found, wanted = [], []
    generator = torch.Generator().manual_seed(0)
    for x in (torch.randn(1, heads, n_positions, 16, generator=generator) for heads in (2, 1, 1)):
        found.append(x.to(torch.bfloat16).requires_grad_())
        wanted.append(found[-1].detach().to(torch.float32 if widened else torch.bfloat16).requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = sdpa_attention(*found, scale=0.3)
    plain = F.scaled_dot_product_attention(*wanted, is_causal=True, scale=0.3, enable_gqa=True)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (plain * weights.to(plain.dtype)).sum().backward()
    assert out.dtype is torch.bfloat16 and torch.equal(out, plain.to(torch.bfloat16))
    for left, right in zip(found, wanted, strict=True):
        assert torch.equal(left.grad, right.grad.to(torch.bfloat16))


def test_auto_is_sdpa_where_it_can_and_else_the_reference_on_a_cpu(build, tiny):
    assert build().attention_impl == "sdpa" and build().qk_norm_impl == "reference"
    assert build(attention_softcap=50.0).attention_impl == build(attention_window=5).attention_impl == "reference"
    assert choose_impl("attention_impl", tiny(attention_impl="reference"), CPU) == "reference"
    assert build(attention_normaliser="relu2").attention_impl == "reference"
    for option in ({"softcap": 5.0}, {"window": 3}, {"normaliser": NORMALISERS["relu2"].function}):
        with pytest.raises(ValueError, match="sdpa has no softcap"):
            sdpa_attention(*[torch.zeros(1, 1, 2, 4)] * 3, scale=1.0, **option)


def test_auto_on_a_gpu_is_triton_for_what_sdpa_cannot(tiny, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(support, "why_not", lambda device: None)
    heads = {"d_head": 32}
    assert choose_impl("attention_impl", tiny(**heads), gpu) == "sdpa"
    assert choose_impl("attention_impl", tiny(**heads, attention_softcap=50.0), gpu) == "triton"
    assert choose_impl("attention_impl", tiny(**heads, attention_window=5), gpu) == "triton"
    assert choose_impl("attention_impl", tiny(d_head=48, attention_window=5), gpu) == "reference"  # no such kernel
    assert choose_impl("attention_impl", tiny(**heads, attention_normaliser="relu2"), gpu) == "reference"
    assert choose_impl("qk_norm_impl", tiny(), gpu) == "triton"
    assert choose_impl("qk_norm_impl", tiny(d_head=258), gpu) == "reference"
    wide = {"d_head": 96, "n_heads": 65, "qk_norm_axis": "full"}  # 128 heads of 128 with padding
    assert choose_impl("qk_norm_impl", tiny(**wide), gpu) == "reference"
    assert choose_impl("qk_norm_impl", tiny(**wide | {"n_heads": 64}), gpu) == "triton"
    assert choose_impl("qk_norm_impl", tiny(**wide | {"qk_norm": "none"}), gpu) == "triton"  # only a rotation
    monkeypatch.setattr(support, "why_not", lambda device: "it is too old")
    assert choose_impl("attention_impl", tiny(**heads, attention_softcap=50.0), gpu) == "reference"
    assert choose_impl("qk_norm_impl", tiny(), gpu) == "reference"


@pytest.mark.parametrize("key", ["attention_impl", "qk_norm_impl"])
def test_a_named_path_that_cannot_run_says_why(build, monkeypatch, key):
    monkeypatch.setattr(support, "INTERPRETED", False)
    with pytest.raises(ConfigError, match=rf"model\.{key}=triton cannot run: it needs a CUDA GPU, not cpu.*use model"):
        build(d_head=32, **{key: "triton"})


def test_the_window_reaches_the_scores(build, tokens):
    model = build(attention_window=3)
    ids = tokens(T)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    # Two layers of windows of 3 see 4 positions back.
    same = (model.logits(ids) == model.logits(changed)).all(-1).all(0)
    assert same[5:].all() and not same[:5].any()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "rmsnorm", "n_kv_heads": 2, "attention_window": 7},
        {"qk_norm": "none", "attention_softcap": 2.0},
        {"qk_norm": "rmsnorm", "qk_norm_axis": "full", "n_heads": 3, "n_kv_heads": 1},
        {"qk_norm": "none", "kappa": 3.0},
    ],
    ids=str,
)
def test_triton_equals_reference_in_output_and_gradient(build, tokens, changes):
    results = []
    for impl in ("reference", "triton"):
        impls = {"attention_impl": impl, "qk_norm_impl": impl}
        shape = {"d_head": 32, "n_heads": 2} | changes
        model, ids = build(device=KERNEL_DEVICE, **impls, **shape), tokens(T).to(KERNEL_DEVICE)
        model.logits(ids).square().mean().backward()
        results.append({"logits": model.logits(ids).detach()} | {n: p.grad for n, p in model.named_parameters()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": "none", "attention_softcap": 2.0, "attention_window": 9}], ids=str)
def test_torch_compile_takes_a_block_with_the_triton_kernels_whole(build, changes):
    model = build(d_head=32, n_heads=2, attention_impl="triton", qk_norm_impl="triton", device=KERNEL_DEVICE, **changes)
    block = model.blocks[0]
    x_BTD = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE)
    tables = reference.rotary_tables(torch.arange(T, device=KERNEL_DEVICE), 32, 1e4)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        out_BTD = function(x_BTD, *tables)
        out_BTD.square().mean().backward()
        results.append([out_BTD.detach(), *(p.grad.clone() for p in block.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
