"""The definitions of qk-norm and rotation agree with slower, plainer ones."""

import math

import pytest
import torch

from scaling_testbed.kernels.qk_norm_rope import reference, rotation
from tests.kernels.conftest import random


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_qk_norm_divides_by_the_deviation_or_the_rms(kind):
    x, gain = random(3, 4, 10) + 1, random(10, seed=1)
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt()
    torch.testing.assert_close(reference.qk_norm(x, gain, kind, 0.01), expected * gain)
    torch.testing.assert_close(reference.qk_norm(x, None, kind, 0.01), expected)
    assert reference.qk_norm(x.bfloat16(), None, kind, 0.01).dtype == torch.float32


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_of_all_heads_together_is_that_of_their_features_side_by_side(kind):
    q, k, cos, sin = random(2, 3, 5, 4), random(2, 1, 5, 4), torch.ones(5, 2), torch.zeros(5, 2)
    gains = random(12, seed=1), random(4, seed=2)
    found = reference.qk_norm_rope(q, k, *gains, cos, sin, kind=kind, eps=0.01, heads_together=True)
    for x, gain, out in zip((q, k), gains, found, strict=True):
        row = torch.cat(list(x[1, :, 3]))  # of one position
        expected = reference.qk_norm(row, gain, kind, 0.01)
        torch.testing.assert_close(torch.cat(list(out[1, :, 3])), expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_rotation_of_training_has_the_bits_of_the_definition(dtype, contiguous):
    """Of value and gradient, and in the same layout, which the products that follow read."""
    tables = reference.rotary_tables(torch.arange(7), 10, 100.0)
    grad = random(2, 7, 3, 10, dtype=dtype, seed=1).transpose(1, 2)  # as attention gives it

    def both(rotate):
        leaf = random(2, 7, 3, 10, dtype=dtype).transpose(1, 2)
        leaf = (leaf.contiguous() if contiguous else leaf).requires_grad_()
        out = rotate(leaf, *tables)
        return out, *torch.autograd.grad(out, leaf, grad)

    for found, expected in zip(both(rotation.rotate), both(reference.apply_rotary), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype == dtype


def test_the_rotation_of_training_has_a_second_derivative():
    tables = reference.rotary_tables(torch.arange(3), 4, 100.0)
    x = random(1, 1, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: rotation.rotate(x.square(), *tables), x)
