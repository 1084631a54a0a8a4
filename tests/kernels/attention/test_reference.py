"""The definition of attention agrees with slower, plainer ones."""

import math

import pytest
import torch

from scaling_testbed.kernels.attention import reference
from scaling_testbed.model.parts import relu_squared
from tests.kernels.conftest import random


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
    found = reference.attention(q, k, v, scale=0.7, window=window, normaliser=relu_squared)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("at_once", [1, 3, 11])
def test_a_part_of_the_queries_is_weighed_as_in_the_whole_sequence(monkeypatch, at_once):
    """A normaliser that knows the sequence's length gives the same entropy however many queries are held at a time."""

    def even(scores_BHMN, allowed_MN, n_positions):
        return allowed_MN.expand_as(scores_BHMN) / n_positions

    q, k = random(1, 2, 11, 8), random(1, 1, 11, 8, seed=1)
    monkeypatch.setattr(reference, "SCORES_BYTES", 8 * 2 * 11 * at_once)
    found = reference.attention_statistics(q, k, scale=1.0, normaliser=even)
    torch.testing.assert_close(found.entropy_H, torch.full((2,), 6 * math.log(11) / 11))  # six keys on average


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


@pytest.mark.parametrize("normaliser", [reference.softmax, relu_squared])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 3), (2.0, 3)])
def test_the_gradient_of_attention_is_its_derivative(softcap, window, normaliser):
    q, k, v = (random(1, heads, 5, 4, seed=seed).requires_grad_() for seed, heads in enumerate((2, 1, 1)))
    assert torch.autograd.gradcheck(
        lambda *x: reference.attention(*x, scale=0.7, softcap=softcap, window=window, normaliser=normaliser), (q, k, v)
    )


@pytest.mark.parametrize("window", [None, 3])
def test_each_document_of_a_sequence_is_attended_as_if_it_were_alone(monkeypatch, window):
    q, k, v = random(2, 4, 13, 8), random(2, 2, 13, 8, seed=1), random(2, 2, 13, 8, seed=2)
    spans = ((0, 0, 5), (0, 5, 6), (0, 6, 13), (1, 0, 13))  # sequence, first position, position after the last
    begins_BT = torch.zeros(2, 13, dtype=torch.int64)
    for row, first, last in spans:
        begins_BT[row, first:last] = first
    options = {"scale": 0.7, "softcap": 2.0, "window": window}
    whole = reference.attention(q, k, v, **options, begins_BT=begins_BT)
    for row, first, last in spans:
        alone = reference.attention(*(x[row : row + 1, :, first:last] for x in (q, k, v)), **options)
        torch.testing.assert_close(whole[row : row + 1, :, first:last], alone)
    found = reference.attention_statistics(q, k, **options, begins_BT=begins_BT)
    monkeypatch.setattr(reference, "SCORES_BYTES", 1)  # one query at a time
    in_parts = reference.attention_statistics(q, k, **options, begins_BT=begins_BT)
    torch.testing.assert_close(torch.stack(found), torch.stack(in_parts))
    scores = [torch.empty(0) for _ in range(4)]
    for row, first, last in spans:
        part = (x[row : row + 1, :, first:last] for x in (q, k))
        for (_, h, _), seen, _, _ in weights_by_loops(*part, **options):
            scores[h] = torch.cat([scores[h], seen])
    values = torch.stack([torch.stack([x.max(), x.mean(), x.square().mean().sqrt()]) for x in scores], dim=1)
    torch.testing.assert_close(torch.stack(found)[:3], values.float())
    largest = reference.largest_scores(q, k, scale=0.7, window=window, begins_BT=begins_BT)
    torch.testing.assert_close(largest, values[0].float())
