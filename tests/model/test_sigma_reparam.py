"""Weights divided by their largest singular value."""

import pytest
import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.layers import SigmaReparamLinear

SIGMA = {"linear": "sigma_reparam"}


@pytest.fixture
def layer():
    made = SigmaReparamLinear(24, 16, role="mlp_in")
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(0))
        for _ in range(20):
            made.start()
    return made


def test_the_first_forward_pass_is_the_plain_models(build, tokens):
    torch.testing.assert_close(build(**SIGMA).logits(tokens(16)), build().logits(tokens(16)), atol=1e-5, rtol=1e-5)


def test_gamma_is_the_largest_singular_value_whatever_the_size_of_the_weights(layer):
    for _ in range(200):
        layer.follow()
    for gamma, size in ((0.5, 1.0), (3.0, 1.0), (3.0, 100.0)):
        with torch.no_grad():
            layer.weight.mul_(size)
            layer.gamma.weight.fill_(gamma)
        assert torch.linalg.svdvals(layer.effective_weight())[0].item() == pytest.approx(gamma, rel=1e-4)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ layer.effective_weight().T)


def test_the_start_is_near_the_largest_singular_value_and_an_iteration_goes_nearer(layer):
    layer.start()
    largest = torch.linalg.svdvals(layer.weight)[0].item()
    assert 0.95 * largest < layer.gamma.weight.item() <= largest * 1.0001
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(5))
    estimates = [layer.sigma().item()]
    for _ in range(30):
        layer.follow()
        estimates.append(layer.sigma().item())
    assert all(later >= before * 0.9999 for before, later in zip(estimates, estimates[1:], strict=False))
    assert estimates[0] < 0.7 * estimates[-1]


def test_a_forward_pass_changes_nothing_and_the_gradient_is_the_derivative_with_fixed_vectors(layer):
    layer.double()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(3, 24, dtype=torch.float64)

    def loss(weight, gamma):
        return torch.func.functional_call(layer, {"weight": weight, "gamma.weight": gamma}, (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, (layer.weight, layer.gamma.weight))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    # W_hat does not know the size of W: its gradient has no part along W.
    (gradient,) = torch.autograd.grad(loss(layer.weight, layer.gamma.weight), layer.weight)
    assert abs((gradient * layer.weight).sum()) < 1e-9 * gradient.norm() * layer.weight.norm()


def test_sigma_is_computed_in_fp32_under_autocast(layer):
    exact = layer.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_weight(), exact)
        assert layer(torch.ones(2, 24)).dtype == torch.bfloat16


def test_queries_that_start_at_zero_are_refused(build):
    with pytest.raises(ConfigError, match="linear must be plain with mup_full"):
        build(parametrization="mup_full", **SIGMA)
