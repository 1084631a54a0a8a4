"""On a real GPU: the kernels' bf16 errors beside PyTorch's own, sizes past 32 bits, the compiler and the trainer."""

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.kernels.attention import reference
from scaling_testbed.kernels.cross_entropy import reference as head_reference
from scaling_testbed.kernels.qk_norm_rope import reference as norm_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
BF16 = torch.bfloat16


def random(*shape, seed=0, dtype=BF16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def with_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def test_every_path_trains_to_the_same_losses_in_bf16(tmp_path):
    """bf16 products, 2^-9 each, in another order: single losses agree to 2e-3 over twenty updates."""
    from scaling_testbed.config.compose import compose
    from scaling_testbed.training.run import train

    common = ["data=markov", "model=nano_m", "model.d_head=32", "batch.sequences=32", "budget.steps=20"]
    common += [f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "checkpoint.at_end=false"]
    paths = {
        "plain": ["loss.impl=reference", "model.attention_impl=reference", "model.qk_norm_impl=reference"],
        "auto": [],
        "triton": ["loss.impl=triton", "model.attention_impl=triton", "model.qk_norm_impl=triton"],
        "compiled": ["loss.impl=triton", "model.attention_impl=triton", "compute.compile=true"],
    }
    rows = {name: train(compose([*common, *path, f"name={name}"]), quiet=True) for name, path in paths.items()}
    assert rows["auto"]["loss_impl"] == rows["auto"]["qk_norm_impl"] == "triton"
    for name, row in rows.items():
        assert row["status"] == "finished" and row["precision"] == "bf16", name
        assert row["val_loss"] == pytest.approx(rows["plain"]["val_loss"], rel=2e-3), name
        assert row["val_loss_initial"] == pytest.approx(rows["plain"]["val_loss_initial"], rel=1e-3), name


@pytest.mark.parametrize("T", [1, 129, 2048])
@pytest.mark.parametrize("d_head", [32, 64, 80, 96, 128])
def test_attention_is_as_exact_as_sdpa(d_head, T):
    """Against float64 on the same bf16 inputs: outputs within 1.3 and gradients within 1.5 times SDPA's own error."""
    from scaling_testbed.kernels.attention.triton import attention

    q, k, v, grad = (random(2, heads, T, d_head, seed=i) for i, heads in enumerate((4, 2, 2, 4)))
    scale = d_head**-0.5
    truth = with_gradients(
        lambda *x: reference.attention(*x, scale=scale), [x.double() for x in (q, k, v)], grad.double()
    )
    ours = with_gradients(lambda *x: attention(*x, scale=scale), (q, k, v), grad)
    sdpa = with_gradients(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, scale=scale, enable_gqa=True), (q, k, v), grad
    )
    for index, (one, other, exact) in enumerate(zip(ours, sdpa, truth, strict=True)):
        if exact.norm() == 0:  # of one key the softmax is one, whatever q and k are
            assert one.abs().max() <= 1e-2
            continue
        factor = 1.3 if index == 0 else 1.5
        assert relative(one, exact) <= factor * relative(other, exact) + 1e-6, ("out", "dq", "dk", "dv")[index]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_with_statistics_equals_the_definition(softcap, window):
    from scaling_testbed.kernels.attention.triton import attention

    q, k, v, grad = (random(2, 4, 777, 64, seed=i) for i in range(4))
    options = {"scale": 0.125, "softcap": softcap, "window": window}
    truth = with_gradients(lambda *x: reference.attention(*x, **options), [x.double() for x in (q, k, v)], grad)
    found = with_gradients(lambda *x: attention(*x, **options, return_statistics=True)[0], (q, k, v), grad)
    plain = with_gradients(lambda *x: attention(*x, **options), (q, k, v), grad)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert max(relative(one, exact) for one, exact in zip(found, truth, strict=True)) < 1e-2
    _, statistics = attention(q, k, v, **options, return_statistics=True)
    for one, exact in zip(statistics, reference.attention_statistics(q.double(), k.double(), **options), strict=True):
        torch.testing.assert_close(one, exact.float(), rtol=1e-4, atol=1e-4)


def head_truth(hidden, weight, targets, z_loss, weights_N):
    """loss, grad_hidden, grad_weight in float64, 1024 tokens at a time."""
    weight = weight.double().requires_grad_()
    loss, grads, grad_weight = 0.0, [], torch.zeros_like(weight)
    for rows, picked, of_tokens in zip(*(x.split(1024) for x in (hidden, targets, weights_N)), strict=True):
        rows = rows.detach().double().requires_grad_()
        ce_N, log_z_N = head_reference.linear_cross_entropy(rows, weight, picked)
        part = (of_tokens * ce_N).sum() + z_loss * log_z_N.square().sum()
        grad_rows, grad = torch.autograd.grad(part, (rows, weight))
        loss, grad_weight = loss + part.item(), grad_weight + grad
        grads.append(grad_rows)
    return loss, torch.cat(grads), grad_weight


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("variant", "d", "v"),
    [("chunked", 256, 50304), ("chunked", 768, 50257), ("wide_rows", 768, 50257), ("recompute", 128, 50304)],
)
def test_the_head_is_exact(variant, d, v, weighted):
    """Loss within 1e-6 relative, the head's gradient within 2e-3, to the bit again, at a young model's logits. Weights
    are of both signs, and their sum does not cancel."""
    from scaling_testbed.kernels.cross_entropy.triton import linear_cross_entropy

    n = 8192
    hidden, weight = random(n, d), (random(v, d, seed=1, dtype=torch.float32) / d**0.5).to(BF16)
    targets = torch.randint(v, (n,), device="cuda")
    weights_N = 1 + 2 * random(n, seed=2, dtype=torch.float32) if weighted else None
    ones_N = torch.ones(n, device="cuda") if weights_N is None else weights_N
    loss, grad_hidden, grad_weight = head_truth(hidden, weight, targets, 1e-4, ones_N)
    options = {"z_loss": 1e-4, "variant": variant, "chunk_bytes": 4096 * v * 2, "weights_N": weights_N}
    results = []
    for _ in range(2):
        inputs = hidden.float().requires_grad_(), weight.float().requires_grad_()
        with torch.autocast("cuda", BF16):
            found = linear_cross_entropy(*inputs, targets, **options).loss
        results.append((found.detach(), *torch.autograd.grad(found, inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert abs(results[0][0].item() - loss) <= (2e-6 if weighted else 1e-6) * loss
    assert relative(results[0][1], grad_hidden) <= 3e-3
    assert relative(results[0][2], grad_weight) <= 2e-3


def test_a_chunk_of_more_than_2_to_the_31_logits_is_addressed_right():
    from scaling_testbed.kernels.cross_entropy.triton import linear_cross_entropy

    n, d, v = 43_000, 64, 50_304
    hidden, weight = random(n, d), random(v, d, seed=1) / 8
    targets = torch.randint(v, (n,), device="cuda")
    results = []
    for chunk_bytes in (2**33, 2**28):
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        found = linear_cross_entropy(*inputs, targets, variant="chunked", chunk_bytes=chunk_bytes)
        results.append((found.ce_N, *torch.autograd.grad(found.loss, inputs)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("heads_together", [False, True])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_qk_norm_and_rotation_equal_the_definition(kind, heads_together):
    from scaling_testbed.kernels.qk_norm_rope.triton import qk_norm_rope

    q, k = (random(2, 513, heads, 64, seed=heads).transpose(1, 2) for heads in (6, 2))
    widths = (6 * 64, 2 * 64) if heads_together else (64, 64)
    gains = [1 + 0.1 * random(width, seed=seed, dtype=torch.float32) for seed, width in enumerate(widths, 3)]
    tables = norm_reference.rotary_tables(torch.arange(513, device="cuda"), 64, 1e4)

    def weighted(function, *inputs):
        outs = function(*inputs, *tables, kind=kind, eps=1e-6, heads_together=heads_together)
        return sum((out.double() * random(*out.shape, seed=9).double()).sum() for out in outs)

    inputs = (q, k, *gains)
    truth = [x.detach().double().requires_grad_() for x in inputs]
    found = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(weighted(norm_reference.qk_norm_rope, *truth), truth)
    for one, exact in zip(torch.autograd.grad(weighted(qk_norm_rope, *found), found), expected, strict=True):
        assert relative(one, exact) < 4e-3
