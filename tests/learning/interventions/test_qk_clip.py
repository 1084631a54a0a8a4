"""Heads whose logits grew too large, and what is left of them."""

import pytest
import torch

from scaling_testbed.kernels.attention.reference import allowed_keys
from scaling_testbed.kernels.qk_norm_rope.reference import rotary_tables
from scaling_testbed.learning.interventions.qk_clip import clip_queries_and_keys, record_logits, take_largest_logits
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer

H, T, LIMIT = 4, 19, 5.0
TOKENS = torch.randint(50, (3, T), generator=torch.Generator().manual_seed(0))


def model(grow=(1.0, 6.0, 1.0, 3.0), **fields):
    """One layer, with the queries of its heads blown up."""
    config = ModelConfig(d_model=32, n_layers=1, n_heads=H, qk_norm="none", **fields).resolved(50)
    built = Transformer(config)
    built.init_weights(0)
    with torch.no_grad():
        built.blocks[0].attention.q.weight.unflatten(0, (H, -1)).mul_(torch.tensor(grow)[:, None, None])
    return built


def scores(built):
    """[H, every pair of a query and a key that it sees] of the first layer."""
    attention, found = built.blocks[0].attention, []
    with torch.no_grad():
        tables = rotary_tables(torch.arange(T), built.config.d_head, built.config.rope_base)
        x_BTD = built.blocks[0].attention_norms[0](built.embedding(TOKENS))
        q, k = attention.prepare(attention.q(x_BTD), attention.k(x_BTD), *tables)
        every = attention.scale * q @ k.repeat_interleave(H // k.shape[1], 1).mT
        found = every[:, :, allowed_keys(T, built.config.attention_window)]
    return found.transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    "fields", [{}, {"attention_window": 4}, {"n_kv_heads": 2}, {"attention_softcap": 2.0}], ids=str
)
def test_the_recorder_finds_the_largest_causal_logit_of_each_head_over_all_batches_with_a_gradient(fields):
    built = model(**fields)
    record_logits(built)
    for rows in TOKENS.split(1):
        built(rows)
    with torch.no_grad():
        built(torch.zeros(1, 4 * T, dtype=torch.long))  # an evaluation is not looked at
    torch.testing.assert_close(torch.tensor(take_largest_logits(built)), scores(built).amax(1))
    built(TOKENS[:1])
    assert take_largest_logits(built)[1] <= scores(built)[1].max()


def test_recording_changes_no_bit():
    results = []
    for records in (False, True):
        built = model()
        if records:
            record_logits(built)
        loss = built.logits(TOKENS).square().mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in built.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_a_head_beyond_the_limit_comes_to_it_and_the_others_keep_their_logits(n_kv_heads):
    built = model(n_kv_heads=n_kv_heads)
    before, weights = scores(built), [p.detach().clone() for p in built.parameters()]
    largest = before.amax(1)
    clip_queries_and_keys(built, LIMIT, largest.tolist())
    after = scores(built)
    assert (largest > LIMIT).sum() in (1, 2, 3)
    gamma = (LIMIT / largest).clamp(max=1)
    torch.testing.assert_close(after, gamma[:, None] * before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.amax(1), largest.clamp(max=LIMIT), rtol=1e-4, atol=0)
    assert all((now.abs() <= then.abs()).all() for now, then in zip(built.parameters(), weights, strict=True))


def test_without_sharing_queries_and_keys_shrink_alike():
    built = model()
    attention = built.blocks[0].attention
    before = [attention.q.weight.detach().clone(), attention.k.weight.detach().clone()]
    clip_queries_and_keys(built, LIMIT, [4 * LIMIT, 1.0, -3.0, LIMIT])
    for weight, then in zip((attention.q.weight, attention.k.weight), before, strict=True):
        now_HK, then_HK = weight.unflatten(0, (H, -1)), then.unflatten(0, (H, -1))
        assert torch.equal(now_HK[0], 0.5 * then_HK[0]) and torch.equal(now_HK[1:], then_HK[1:])
