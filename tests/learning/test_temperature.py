"""The loss after one temperature against its definition: sums, derivatives, and the fitted temperature."""

import math

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.learning import temperature as module
from scaling_testbed.learning.temperature import LADDER, fitted, ladder_sums


def tokens(seed, sharpness, n=400, d=8, v=11):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(n, d, generator=generator) * sharpness
    weight_VD = torch.randn(v, d, generator=torch.Generator().manual_seed(99))
    drawn = (hidden_ND @ weight_VD.T / (2 * sharpness)).softmax(-1)
    return hidden_ND, weight_VD, torch.multinomial(drawn, 1, generator=generator)[:, 0]


def total(hidden_ND, weight_VD, targets_N, temperature, softcap=None):
    logits = hidden_ND.double() @ weight_VD.T.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits / temperature, targets_N, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sums_and_derivatives_are_those_of_the_definition(softcap, monkeypatch):
    hidden_ND, weight_VD, targets_N = tokens(0, 0.7)
    targets_N[5] = -100
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 11 * 64)  # in parts
    found = ladder_sums(hidden_ND, weight_VD, targets_N, softcap=softcap)
    for row, temperature in zip(found, LADDER, strict=True):
        x = torch.tensor(-math.log(temperature), dtype=torch.float64, requires_grad=True)
        loss = total(hidden_ND, weight_VD, targets_N, torch.exp(-x), softcap)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (bend,) = torch.autograd.grad(slope, x)
        torch.testing.assert_close(row, torch.stack([loss, slope, bend]).detach(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("sharpness", [0.3, 0.9, 1.7])
def test_the_fitted_temperature_is_the_best_one_and_the_loss_that_of_other_tokens_at_it(sharpness):
    even, odd = tokens(0, sharpness), tokens(1, sharpness)
    temperature, loss = fitted(ladder_sums(*even).tolist(), ladder_sums(*odd).tolist())
    around = {factor: total(*even, temperature * factor) for factor in (0.999, 1.0, 1.001)}
    assert min(around, key=around.get) == 1.0 and LADDER[0] < temperature < LADDER[-1]
    assert loss / 400 == pytest.approx(total(*odd, temperature).item() / 400, abs=1e-6)


def test_a_temperature_beyond_the_ladder_is_its_end_and_what_is_not_finite_has_none():
    hidden_ND, weight_VD, _ = tokens(0, 1.0)
    best_N = (hidden_ND @ weight_VD.T).argmax(-1)
    sharp = ladder_sums(hidden_ND, weight_VD, best_N).tolist()
    assert fitted(sharp, sharp) == (1 / 8, pytest.approx(total(hidden_ND, weight_VD, best_N, 1 / 8).item(), rel=1e-5))
    worst = ladder_sums(hidden_ND, weight_VD, (hidden_ND @ weight_VD.T).argmin(-1)).tolist()
    assert fitted(worst, worst)[0] == 8
    assert fitted(ladder_sums(hidden_ND * torch.nan, weight_VD, best_N).tolist(), sharp) is None
