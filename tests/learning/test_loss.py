"""The loss terms follow their formulas, on both paths."""

import importlib.util

import pytest
import torch

from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.loss import IGNORE, cross_entropy, loss_terms
from tests.conftest import KERNEL_DEVICE

N, D, V = 37, 24, 101
# The least chunk is 1 MiB of fp32 logits: 1024 rows of V = 256, so that 3,000 tokens make three chunks.
CHUNKED_N, CHUNKED_V = 3000, 256


def inputs(n=N, d=D, v=V, dtype=torch.float64, ignored=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    targets[:ignored] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def terms_and_gradients(impl, hidden, weight, targets, *, z_loss=1e-2, softcap=None):
    config = CrossEntropyConfig(z_loss=z_loss, impl=impl, chunk_mib=1)
    terms = loss_terms(config, hidden, weight, targets, softcap=softcap)
    return terms, torch.autograd.grad(3.0 * terms.loss, (hidden, weight))


@pytest.mark.parametrize("softcap", [None, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunked_loss_equals_reference_in_value_and_gradient(dtype, softcap):
    hidden, weight, targets = inputs(CHUNKED_N, D, CHUNKED_V, dtype)
    expected, expected_grads = terms_and_gradients("reference", hidden, weight, targets, softcap=softcap)
    found, found_grads = terms_and_gradients("chunked", hidden, weight, targets, softcap=softcap)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6  # the order of summation differs between the paths
    for one, other in zip((*expected[:3], *expected_grads), (*found[:3], *found_grads), strict=True):
        assert (one - other).abs().max() <= tolerance * one.abs().max()
    assert found.n_tokens == expected.n_tokens == CHUNKED_N - 5


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_paths_equal_reference_and_recompute_is_another_kernel():
    arguments = [x.detach().to(KERNEL_DEVICE).requires_grad_(x.requires_grad) for x in inputs(dtype=torch.float32)]
    expected, expected_grads = terms_and_gradients("reference", *arguments, softcap=50.0)
    for impl in ("triton", "recompute"):
        found, found_grads = terms_and_gradients(impl, *arguments, softcap=50.0)
        for one, other in zip((*expected[:3], *expected_grads), (*found[:3], *found_grads), strict=True):
            assert (one - other).abs().max() <= 5e-6 * one.abs().max()
    with pytest.raises(ValueError, match="variant=recompute needs a width of at most 128, got 200"):
        terms_and_gradients("recompute", *(x.to(KERNEL_DEVICE) for x in inputs(d=200, dtype=torch.float32)))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_cross_entropy_equals_pytorchs_own(impl):
    hidden, weight, targets = inputs()
    terms, _ = terms_and_gradients(impl, hidden, weight, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    assert terms.ce.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_weights_of_tokens_enter_the_loss_and_no_term_beside_it(impl, softcap):
    hidden, weight, targets = inputs()
    weights_N = torch.randn(N, dtype=torch.float64)
    weights_N[:5] = float("nan")  # of tokens that do not count
    logits_NV = hidden @ weight.T
    logits_NV = logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)
    log_z_N = logits_NV.logsumexp(-1)[5:]
    ce_N = log_z_N - logits_NV[torch.arange(5, N), targets[5:]]
    loss = (weights_N[5:] * ce_N).sum() + 1e-2 * log_z_N.square().sum()
    config = CrossEntropyConfig(z_loss=1e-2, impl=impl)
    found = cross_entropy(config, hidden, weight, targets, weights_N=weights_N, softcap=softcap)
    assert not found.ce_N.requires_grad and not found.log_z_N.requires_grad
    pairs = (found.loss, loss), (found.ce_N[5:], ce_N), (found.log_z_N[5:], log_z_N)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (found.loss, loss))
    for one, other in (*pairs, *zip(*gradients, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_weights_that_take_a_gradient_are_refused(impl):
    weights_N = torch.ones(N, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="factors without a gradient"):
        cross_entropy(CrossEntropyConfig(impl=impl), *inputs(), weights_N=weights_N)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_z_loss_gradient_equals_its_formula(impl):
    """d/dy_i of c log^2 Z is 2 c log Z p_i; cross-entropy alone has none along a uniform shift of the logits."""
    coefficient = 1e-2
    logits = inputs(ignored=0)[1][:7, :11].detach().clone().requires_grad_()  # hidden = logits under an identity head
    head, targets = torch.eye(11, dtype=torch.float64, requires_grad=True), torch.arange(7)
    terms = loss_terms(CrossEntropyConfig(z_loss=coefficient, impl=impl), logits, head, targets)
    (gradient,) = torch.autograd.grad(terms.loss, logits)
    log_z = logits.logsumexp(-1, keepdim=True)
    expected = (1 + 2 * coefficient * log_z) * logits.softmax(-1) - torch.eye(11, dtype=torch.float64)[:7]
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert torch.allclose(gradient.sum(-1), 2 * coefficient * log_z[:, 0], atol=1e-12)
    assert terms.z_loss.item() == pytest.approx(coefficient * log_z.square().sum().item())


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_ignored_tokens_count_in_no_term_and_get_no_gradient(impl):
    hidden, weight, targets = inputs(ignored=5)
    terms, (grad_hidden, _) = terms_and_gradients(impl, hidden, weight, targets)
    kept, _ = terms_and_gradients(impl, hidden[5:], weight, targets[5:])
    assert torch.allclose(torch.stack(terms[:3]), torch.stack(kept[:3]))
    assert (grad_hidden[:5] == 0).all() and (grad_hidden[5:] != 0).any()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_all_ignored_gives_zero_loss_and_zero_gradients(impl):
    hidden, weight, targets = inputs(ignored=N)
    terms, gradients = terms_and_gradients(impl, hidden, weight, targets)
    assert terms.loss == terms.n_tokens == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_large_logits_stay_finite(impl):
    hidden, weight, targets = inputs(dtype=torch.float32, scale=1e3)
    terms, gradients = terms_and_gradients(impl, hidden, weight, targets)
    assert all(value.isfinite().all() for value in (terms.loss, *gradients))


def test_chunked_gradients_reach_only_what_needs_them():
    hidden, weight, targets = inputs()
    terms = loss_terms(CrossEntropyConfig(impl="chunked"), hidden.detach(), weight, targets)
    terms.loss.backward()
    assert hidden.grad is None and weight.grad is not None


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_under_autocast_the_terms_are_fp32_and_near_the_fp32_loss(impl):
    hidden, weight, targets = inputs(dtype=torch.float32, scale=0.2)
    config = CrossEntropyConfig(impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss_terms(config, hidden, weight, targets)
        terms.loss.backward()
    exact = loss_terms(config, hidden, weight, targets)
    assert terms.loss.dtype == weight.grad.dtype == torch.float32
    # bf16 keeps 8 bits: each product is off by up to 2^-8 relative, and the sum over tokens averages it out.
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
