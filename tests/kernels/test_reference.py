"""The definitions agree with slower, plainer ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.kernels import reference


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_by_loops(q, k, scale, softcap=None, window=None):
    """For each (b, h, t): the scores of the keys that it sees, before the softcap, their weights, and the keys."""
    heads_per_group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
                scores = scale * (k[b, h // heads_per_group, seen] @ q[b, h, t])
                capped = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                yield (b, h, t), scores, capped.exp() / capped.exp().sum(), seen


def attention_by_loops(q, k, v, **options):
    out = torch.zeros_like(q)
    for (b, h, t), _, weights, seen in weights_by_loops(q, k, **options):
        out[b, h, t] = weights @ v[b, h // (q.shape[1] // k.shape[1]), seen]
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 11])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_the_softmax_over_the_past(groups, softcap, window):
    q, k, v = random(2, 6, 11, 8), random(2, groups, 11, 8, seed=1), random(2, groups, 11, 8, seed=2)
    options = {"scale": 0.7, "softcap": softcap, "window": window}
    torch.testing.assert_close(reference.attention(q, k, v, **options), attention_by_loops(q, k, v, **options))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_statistics_are_those_of_the_scores_and_weights_of_each_head(softcap, window):
    q, k = random(2, 4, 7, 8).requires_grad_(), random(2, 2, 7, 8, seed=1)
    options = {"scale": -0.7, "softcap": softcap, "window": window}
    found = reference.attention_statistics(q, k, **options)
    scores, entropies = [[] for _ in range(4)], [[] for _ in range(4)]
    for (_, h, _), seen_scores, weights, _ in weights_by_loops(q.detach(), k, **options):
        scores[h].append(seen_scores)
        entropies[h].append(-(weights * weights.log()).sum())
    for h in range(4):
        of_head = torch.cat(scores[h])
        values = of_head.max(), of_head.mean(), of_head.square().mean().sqrt(), torch.stack(entropies[h]).mean()
        torch.testing.assert_close(torch.stack(found)[:, h], torch.stack(values).float())
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in found)


@pytest.mark.parametrize("window", [None, 3])
def test_statistics_of_a_part_of_the_queries_at_a_time_are_those_of_all(monkeypatch, window):
    q, k = random(2, 4, 13, 8), random(2, 2, 13, 8, seed=1)
    options = {"scale": 0.7, "window": window}
    whole = torch.stack(reference.attention_statistics(q, k, **options))
    held = []
    real = reference._scores
    monkeypatch.setattr(reference, "_scores", lambda *args: held.append(real(*args)) or held[-1])
    monkeypatch.setattr(reference, "SCORES_BYTES", 8 * 2 * 4 * 13 * 3)
    torch.testing.assert_close(torch.stack(reference.attention_statistics(q, k, **options)), whole)
    torch.testing.assert_close(reference.largest_scores(q, k, **options), whole[0])
    assert len(held) == 2 * 5 and max(scores.nbytes for scores in held) <= reference.SCORES_BYTES


@pytest.mark.parametrize("window", [None, 4])
def test_pointwise_attention_weighs_each_key_by_its_score_alone(window):
    """E.11: the sum over the past of L^(-1/2) relu(z)^2 v, L the length of the sequence."""
    q, k, v = random(2, 4, 11, 8), random(2, 2, 11, 8, seed=1), random(2, 2, 11, 8, seed=2)
    expected = torch.zeros_like(q)
    for (b, h, t), scores, _, seen in weights_by_loops(q, k, scale=0.7, window=window):
        expected[b, h, t] = scores.clamp(min=0).square() / math.sqrt(11) @ v[b, h // 2, seen]
    found = reference.attention(q, k, v, scale=0.7, window=window, normaliser="relu2")
    torch.testing.assert_close(found, expected)


def test_attention_statistics_survive_weights_of_zero():
    q = 1e3 * random(1, 1, 5, 8, dtype=torch.float32)
    assert torch.stack(reference.attention_statistics(q, q, scale=1.0)).isfinite().all()


def test_attention_rounds_only_its_result_even_under_autocast():
    q, k, v = (5 * random(1, 2, 32, 16, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = reference.attention(q, k, v, scale=0.25)
    exact = reference.attention(q.float(), k.float(), v.float(), scale=0.25)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())


def test_a_softcap_bounds_scores_keeps_their_order_and_leaves_small_ones():
    scores = torch.linspace(-200, 200, 101, dtype=torch.float64)
    capped = reference.softcap_scores(scores, 50.0)
    assert capped.abs().max() < 50 and (capped.diff() > 0).all()
    torch.testing.assert_close(reference.softcap_scores(scores / 1e4, 50.0), scores / 1e4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_qk_norm_divides_by_the_deviation_or_the_rms(kind):
    x, gain = random(3, 4, 10) + 1, random(10, seed=1)
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt()
    torch.testing.assert_close(reference.qk_norm(x, gain, kind, 0.01), expected * gain)
    torch.testing.assert_close(reference.qk_norm(x, None, kind, 0.01), expected)
    assert reference.qk_norm(x.bfloat16(), None, kind, 0.01).dtype == torch.float32


def test_qk_norm_refuses_another_kind():
    with pytest.raises(ValueError, match="kind must be"):
        reference.qk_norm(torch.ones(2), None, "l2", 1e-6)


def test_rotary_turns_feature_pairs_by_position_over_wavelength():
    x = random(1, 1, 5, 6, dtype=torch.float32)
    out = reference.rotary(x, 100.0)
    for t in range(5):
        for r in range(3):
            angle = t * 100.0 ** (-2 * r / 6)
            a, b = x[0, 0, t, r], x[0, 0, t, r + 3]
            torch.testing.assert_close(out[0, 0, t, r], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(out[0, 0, t, r + 3], b * math.cos(angle) + a * math.sin(angle))


def test_rotated_scores_depend_on_the_distance_only():
    q, k = random(1, 1, 1, 16, dtype=torch.float32), random(1, 1, 1, 16, dtype=torch.float32, seed=1)

    def score(i, j):
        return (reference.rotary(q, 1e4, torch.tensor([i])) * reference.rotary(k, 1e4, torch.tensor([j]))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    assert (score(3, 1) - score(4, 1)).abs() > 1e-3


def test_rotary_keeps_lengths_and_types_and_reads_given_positions():
    x = random(2, 3, 7, 8, dtype=torch.bfloat16)
    assert reference.rotary(x, 1e4).dtype == torch.bfloat16
    x = x.float()
    torch.testing.assert_close(reference.rotary(x, 1e4).norm(dim=-1), x.norm(dim=-1))
    tail = reference.rotary(x[:, :, 4:], 1e4, positions=torch.arange(4, 7))
    torch.testing.assert_close(tail, reference.rotary(x, 1e4)[:, :, 4:])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_equals_torch_s_and_log_z_is_the_normaliser(softcap):
    hidden, weight = random(9, 6), random(17, 6, seed=1)
    targets = torch.arange(9)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ce, log_z = reference.linear_cross_entropy(hidden, weight, targets, softcap=softcap)
    torch.testing.assert_close(ce, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(log_z, logits.exp().sum(-1).log())


def test_ignored_targets_have_neither_loss_nor_log_z_nor_gradient():
    hidden = random(5, 6, dtype=torch.bfloat16).requires_grad_()
    targets = torch.tensor([3, -100, 0, -100, 16])
    ce, log_z = reference.linear_cross_entropy(hidden, random(17, 6, dtype=torch.bfloat16, seed=1), targets)
    assert ce.dtype == log_z.dtype == torch.float32
    (ce + log_z).sum().backward()
    ignored = targets == -100
    for values in (ce, log_z, hidden.grad):
        assert (values[ignored] == 0).all() and (values[~ignored] != 0).any()


@pytest.mark.parametrize("normaliser", reference.NORMALISERS)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 3), (2.0, 3)])
def test_the_gradient_of_attention_is_its_derivative(softcap, window, normaliser):
    q, k, v = (random(1, heads, 5, 4, seed=seed).requires_grad_() for seed, heads in enumerate((2, 1, 1)))
    assert torch.autograd.gradcheck(
        lambda *x: reference.attention(*x, scale=0.7, softcap=softcap, window=window, normaliser=normaliser), (q, k, v)
    )
