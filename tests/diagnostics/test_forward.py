"""What the probe says of a forward pass is what a plain recomputation of that pass says."""

import dataclasses
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.diagnostics.forward import ForwardProbe
from scaling_testbed.diagnostics.reductions import LARGEST, MEAN, RMS, SMALLEST, Reductions
from scaling_testbed.kernels.attention import reference
from scaling_testbed.kernels.qk_norm_rope.reference import rotary_tables
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer
from tests.conftest import KERNEL_DEVICE

SHAPE = ModelConfig(d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, vocab_size=50)


def alone(values):
    return list(values)


def probed(model, tokens_BT, **options):
    found = Reductions()
    with torch.no_grad(), ForwardProbe(model, found, **options):
        model(tokens_BT)
    return found.result(alone, alone)


@pytest.fixture
def case():
    """Returns a function from fields of a ModelConfig to (model, tokens)."""

    def make(**fields):
        model = Transformer(dataclasses.replace(SHAPE, **fields).resolved(50))
        model.init_weights(0)
        with torch.no_grad():
            for block in model.blocks:
                block.attention.q.weight.mul_(9)  # scores that are worth measuring
                for norm in (block.attention.q_norm, block.attention.k_norm):
                    if hasattr(norm, "weight"):  # gains that differ, the largest of them negative
                        norm.weight.copy_(torch.linspace(-3, 2, norm.weight.numel()).view_as(norm.weight))
        return model, torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))

    return make


def rms(x):
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def stream(model, tokens_BT):
    """The residual stream before the first and after each block, and the outputs of each block's attention and MLP."""
    x_BTD = model.embedding(tokens_BT)
    tables = rotary_tables(torch.arange(tokens_BT.shape[1]), model.config.d_head, model.config.rope_base)
    streams, branches = [x_BTD], []
    for block in model.blocks:
        attended = block.attention(block.attention_norms[0](x_BTD), *tables)
        branches.append((attended, block.mlp(block.mlp_norms[0](x_BTD + attended))))
        x_BTD = block(x_BTD, *tables)
        streams.append(x_BTD)
    return streams, branches, tables


@pytest.mark.parametrize("qkv_impl", ["separate", "together"])
@pytest.mark.parametrize("qk_norm", ["layernorm", "none"])
def test_every_number_is_that_of_the_pass(case, qk_norm, qkv_impl):
    model, tokens_BT = case(qk_norm=qk_norm, qkv_impl=qkv_impl)
    found = probed(model, tokens_BT, per_head=True)
    streams, branches, tables = stream(model, tokens_BT)
    for number, block in enumerate(model.blocks):
        attention = block.attention
        normed_BTD = block.attention_norms[0](streams[number])
        q, k = attention.prepare(attention.q(normed_BTD), attention.k(normed_BTD), *tables)
        scores = attention.scale * (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2))
        seen = torch.ones(11, 11, dtype=torch.bool).tril()
        here = scores[..., seen]
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        before, after = attention.normed_heads(attention.q(normed_BTD), attention.k(normed_BTD))
        cosine = F.cosine_similarity(before, after.repeat_interleave(2, 1), dim=-1)
        expected = {
            "attention_logit_max": here.max().item(),
            "attention_logit_mean": here.mean().item(),
            "attention_logit_rms": rms(here),
            "attention_entropy": torch.special.entr(weights).sum(-1).mean().item(),
            "q_rms": rms(attention.q(normed_BTD)),
            "k_rms": rms(attention.k(normed_BTD)),
            "q_normed_rms": rms(before),
            "k_normed_rms": rms(after),
            "qk_cosine": cosine.mean().item(),
            "attention_out_rms": rms(branches[number][0]),
            "mlp_out_rms": rms(branches[number][1]),
            "residual_rms": rms(streams[number + 1]),
        }
        expected = {f"{name}/{number}": value for name, value in expected.items()}
        expected |= {f"attention_logit_max/{number}/{h}": here[:, h].max().item() for h in range(4)}
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert found.get(f"qk_gain_max/{number}") == (None if qk_norm == "none" else pytest.approx(3.0))
    assert found["attention_logit_max"] == max(found["attention_logit_max/0"], found["attention_logit_max/1"])
    logits = model.logits(tokens_BT).double()
    log_z = logits.logsumexp(-1)
    for name, value in {
        "final_norm_input_rms": rms(streams[-1]),
        "output_logit_mean": logits.mean().item(),
        "output_logit_rms": rms(logits),
        "output_logit_max": logits.max().item(),
        "output_logit_min": logits.min().item(),
        "log_z_mean": log_z.mean().item(),
        "log_z_mean_square": log_z.square().mean().item(),
    }.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_pieces_give_the_numbers_of_the_whole(case, monkeypatch):
    """Attention a key head and a sequence at a time, logits some tokens at a time, the batch in two passes."""
    model, tokens_BT = case()
    whole = probed(model, tokens_BT, per_head=True)
    monkeypatch.setattr(reference, "SCORES_BYTES", 3 * 4 * 11 * 4 * 5)  # five queries at a time
    monkeypatch.setattr("scaling_testbed.diagnostics.forward.LOGITS_BYTES", 4 * 50 * 7)
    pieces = probed(model, tokens_BT, per_head=True)
    assert whole.keys() == pieces.keys()
    for name, value in whole.items():
        assert pieces[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(KERNEL_DEVICE == "cuda", reason="there the kernel gathers them on every path")
def test_the_kernels_statistics_are_those_of_the_reference(case):
    """In Triton's interpreter."""
    model, tokens_BT = case(attention_impl="triton", d_head=32, attention_softcap=3.0, attention_window=5)
    by_kernel = probed(model, tokens_BT, per_head=True)
    plain, _ = case(attention_impl="reference", d_head=32, attention_softcap=3.0, attention_window=5)
    expected = probed(plain, tokens_BT, per_head=True)
    for name, value in expected.items():
        assert by_kernel[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_probe_that_is_left_leaves_no_hook_and_no_tensor(case):
    model, tokens_BT = case(residual="deepnorm")
    probe = ForwardProbe(model, Reductions())
    with probe, torch.no_grad():
        model(tokens_BT)
    assert not any(module._forward_hooks for module in model.modules()) and not probe._raw


def test_a_bigram_model_has_logits_and_no_attention(case):
    model, tokens_BT = case(n_layers=0)
    found = probed(model, tokens_BT)
    assert "log_z_mean" in found and not any("attention" in name for name in found)


def test_reductions_are_over_batches_and_ranks():
    ranks = []
    for values in (((1.0, 2), (3.0, 2)), ((5.0, 1), (9.0, 3), (-100.0, 0))):
        found = Reductions()
        for value, weight in values:
            found.weight = weight
            for way in (MEAN, RMS, LARGEST, SMALLEST):
                found.add(way, way, torch.tensor(value))
        ranks.append(found)
    said = []
    ranks[1].result(lambda values: said.append(values) or values, lambda values: said.append(values) or values)

    def both(values, way):
        return [way(pair) for pair in zip(values, next(one for one in said if len(one) == len(values)), strict=True)]

    result = ranks[0].result(lambda v: both(v, sum), lambda v: both(v, max))
    mean = (2 * 1 + 2 * 3 + 1 * 5 + 3 * 9) / 8
    assert result == {"mean": mean, "rms": math.sqrt(mean), "largest": 9.0, "smallest": 1.0}
    assert Reductions().result(alone, alone) == {}


def test_what_is_not_a_number_stays_so_unless_it_says_nothing():
    found = Reductions()
    found.add("a", RMS, torch.tensor(math.nan))
    assert math.isnan(found.result(alone, alone)["a"])
    found = Reductions()
    for found.weight, value in ((1, 3.0), (0, math.nan)):
        found.add("a", MEAN, torch.tensor(value))
        found.add("b", LARGEST, torch.tensor(value))
    assert found.result(alone, alone) == {"a": 3.0, "b": 3.0}
