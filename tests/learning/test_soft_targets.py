"""The loss against a teacher and its gradient, against autograd of the definition in fp64."""

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.loss import loss_terms
from scaling_testbed.learning.soft_targets import Full, Stored, soft_cross_entropy

N, D, V, K = 37, 6, 19, 4


def drawn(dtype=torch.float64, ids=V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    teacher = torch.randn(N, 9, generator=generator, dtype=dtype), torch.randn(V, 9, generator=generator, dtype=dtype)
    return hidden, weight, targets, teacher


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def stored(teacher, temperature, cap):
    """Top-k ids and rounded log-probabilities of the teacher."""
    log_q, ids = (capped(teacher[0] @ teacher[1].T, cap) / temperature).log_softmax(-1).topk(K)
    return ids, log_q.half()


def definition(hidden, weight, targets, soft, *, alpha, temperature, z_loss, cap):
    """The loss as it is printed. soft: log r [N, V] -> S [N]."""
    y = capped(hidden @ weight.T, cap)
    valid = targets != -100
    ce = F.cross_entropy(y, targets.clamp_min(0), reduction="none")
    s = soft((y / temperature).log_softmax(-1))
    value = ((1 - alpha) * ce + alpha * temperature**2 * s)[valid].sum()
    return value + z_loss * y.logsumexp(-1)[valid].square().sum(), value, ce[valid].sum()


def soft_of(kind, teacher, temperature, cap):
    if kind == "full":
        q = (capped(teacher[0] @ teacher[1].T, cap) / temperature).softmax(-1)
        return lambda log_r: -(q * log_r).sum(-1)
    ids, log_q = stored(teacher, temperature, cap)
    q = log_q.double().exp()
    u = (1 - q.sum(-1)).clamp_min(0)

    def bucketed(log_r):
        r = log_r.gather(1, ids)
        return -(q * r).sum(-1) - u * (1 - r.exp().sum(-1)).log()

    return bucketed


@pytest.mark.parametrize("kind", ["full", "stored"])
@pytest.mark.parametrize(
    ("alpha", "temperature", "z_loss", "cap"),
    [(0.5, 1.0, 0.0, None), (1.0, 1.0, 1e-2, None), (0.3, 2.0, 1e-2, 1.5), (0.0, 1.0, 1e-2, None)],
)
@pytest.mark.parametrize("rows", [N, 8])
def test_loss_and_gradients_are_those_of_the_definition(kind, alpha, temperature, z_loss, cap, rows):
    hidden, weight, targets, teacher = drawn()
    numbers = {"alpha": alpha, "temperature": temperature, "z_loss": z_loss}
    teach = Full.of(*teacher, cap, temperature) if kind == "full" else Stored(*stored(teacher, temperature, cap))
    found = soft_cross_entropy(hidden, weight, targets, teach, softcap=cap, chunk_bytes=rows * 5 * V * 8, **numbers)
    (found.loss * 0.7).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    loss, value, ce = definition(hidden, weight, targets, soft_of(kind, teacher, temperature, cap), cap=cap, **numbers)
    (loss * 0.7).backward()
    all_found, all_wanted = (found.loss, found.value, found.ce_sum, *grads), (loss, value, ce, hidden.grad, weight.grad)
    for got, wanted in zip(all_found, all_wanted, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-11)
    assert (found.log_z_N[::5] == 0).all() and (hidden.grad[::5] == 0).all()


def test_without_a_teacher_it_is_the_cross_entropy_of_the_kernels():
    hidden, weight, targets, teacher = drawn(torch.float32)
    found = soft_cross_entropy(
        hidden, weight, targets, Full.of(*teacher, None, 1.0), alpha=0, temperature=1, z_loss=1e-2
    )
    terms = loss_terms(CrossEntropyConfig(z_loss=1e-2, impl="reference"), hidden, weight, targets)
    assert found.loss.item() == pytest.approx(terms.loss.item(), rel=1e-6)
    assert found.ce_sum.item() == pytest.approx(terms.ce.item(), rel=1e-6)


def test_a_student_that_is_the_teacher_has_no_gradient_and_its_entropy_as_loss():
    hidden, weight, targets, _ = drawn()
    own = hidden.detach(), weight.detach()
    found = soft_cross_entropy(hidden, weight, targets, Full.of(*own, None, 2.0), alpha=1, temperature=2.0)
    found.loss.backward()
    assert hidden.grad.abs().max() < 1e-12
    p = (own[0] @ own[1].T / 2)[targets != -100].softmax(-1)
    assert found.value.item() == pytest.approx(-4 * (p * p.log()).sum().item())


def test_a_tail_without_mass_and_one_without_digits_are_finite():
    hidden, weight, targets, _ = drawn(torch.float32)
    ids = torch.arange(2).expand(N, 2)
    sure = torch.tensor([0.0, -6.0]).half().expand(N, 2)  # the sum is above 1, so the bucket is empty
    half = torch.tensor([-0.7, -2.0]).half().expand(N, 2)
    with torch.no_grad():
        weight[:2] += 100  # 1 - sum r is 0 in fp32, and its logarithm is not
        hidden.abs_().add_(1)
    for log_q in (sure, half):
        hidden.grad = weight.grad = None
        found = soft_cross_entropy(hidden, weight, targets, Stored(ids, log_q), alpha=1, temperature=1)
        found.loss.backward()
        assert found.loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
        log_r = (hidden @ weight.T).log_softmax(-1)[targets != -100, :2]
        q, u = log_q[0].float().exp(), 0.0 if log_q is sure else None
        assert (found.value > 1e4) == (u is None)
        if u == 0:
            assert found.value.item() == pytest.approx(-(q * log_r).sum().item(), rel=1e-5)


def test_under_autocast_it_is_close_to_fp32_and_saves_no_logits():
    hidden, weight, targets, teacher = drawn(torch.float32)
    exact = soft_cross_entropy(hidden, weight, targets, Full.of(*teacher, None, 1.0), alpha=0.5, temperature=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft_cross_entropy(hidden, weight, targets, Full.of(*teacher, None, 1.0), alpha=0.5, temperature=1)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)  # bf16 has 8 binary digits
    assert sum(saved.numel() for saved in found.loss.grad_fn.saved_tensors) == hidden.numel() + weight.numel()
