"""The documents of a sequence are computed as if each were alone, on every path."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.kernels import support
from scaling_testbed.kernels.attention.reference import allowed_keys
from scaling_testbed.model.attention import documents_mask, sdpa_attention
from tests.conftest import KERNEL_DEVICE

HAS_TRITON = importlib.util.find_spec("triton") is not None and support.why_not(torch.device(KERNEL_DEVICE)) is None
triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton does not run here")
PATHS = [
    {"attention_impl": "reference", "qk_norm_impl": "reference"},
    {"attention_impl": "sdpa", "qk_norm_impl": "reference"},
    pytest.param({"attention_impl": "triton", "qk_norm_impl": "triton"}, marks=triton),
]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path["attention_impl"])
SPANS = [(0, 0, 7), (0, 7, 8), (0, 8, 40), (1, 0, 40), (2, 0, 33), (2, 33, 40)]  # sequence, first position, end


def begins():
    begins_BT = torch.zeros(3, 40, dtype=torch.int64)
    for row, first, last in SPANS:
        begins_BT[row, first:last] = first
    return begins_BT


def build_on(build, path, **changes):
    return build(d_model=64, n_heads=2, **path, **changes).to(
        KERNEL_DEVICE if path["attention_impl"] == "triton" else "cpu"
    )


def losses(model, tokens_BT, begins_BT=None):
    """The cross-entropy of the token at each position with itself as the target, [B, T]: any target will do."""
    return F.cross_entropy(model.logits(tokens_BT, begins_BT).mT, tokens_BT, reduction="none")


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@paths
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"n_kv_heads": 1, "qk_norm": "rmsnorm", "qk_norm_axis": "full"}, marks=pytest.mark.slow),
        pytest.param({"qk_norm": "none"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_document_has_the_logits_and_the_gradient_that_it_has_alone(build, tokens, path, changes):
    model = build_on(build, path, **changes)
    device = model.embedding.weight.device
    tokens_BT, begins_BT = tokens(40, 3).to(device), begins().to(device)
    together = losses(model, tokens_BT, begins_BT)
    alone = torch.zeros_like(together)
    for row, first, last in SPANS:
        alone[row, first:last] = losses(model, tokens_BT[row : row + 1, first:last])[0]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    for x, y in zip(gradients(model, together.sum()), gradients(model, alone.sum()), strict=True):
        assert (x - y).norm() <= 1e-6 * max(1.0, y.norm().item())
    assert not torch.allclose(losses(model, tokens_BT), alone, atol=1e-3)  # the documents of a sequence do matter


@paths
def test_positions_count_from_the_begin_of_each_document(build, tokens, path):
    """A rotation depends on distances alone, so other positions would show only as the rounding of large angles."""
    model = build_on(build, path)
    device, seen = model.embedding.weight.device, []
    model.blocks[1].attention.register_forward_pre_hook(lambda module, given: seen.extend(given[1:3]))
    model(tokens(40, 3).to(device), begins().to(device))
    model(tokens(40, 3).to(device))
    for own, shared in zip(seen[:2], seen[2:], strict=True):
        for row, first, last in SPANS:
            assert torch.equal(own[row, 0, first:last], shared[: last - first])


@paths
def test_a_token_changes_no_bit_of_the_logits_of_another_document(build, tokens, path):
    model = build_on(build, path)
    device = model.embedding.weight.device
    tokens_BT, begins_BT = tokens(40, 3).to(device), begins().to(device)
    with torch.no_grad():
        before = model.logits(tokens_BT, begins_BT)
        for row, first, last in SPANS:
            changed = tokens_BT.clone()
            changed[row, first] = (changed[row, first] + 1) % model.config.vocab_size
            same_BT = (model.logits(changed, begins_BT) == before).all(-1)
            same_BT[row, first:last] = ~same_BT[row, first:last]
            assert same_BT.all()


def test_the_mask_of_long_documents_lets_no_bit_through_in_pytorch_s_attention():
    """Over more than a thousand positions whole blocks of keys are masked, before and after the first that is seen."""
    begins_BT = torch.zeros(1, 1100, dtype=torch.int64)
    begins_BT[0, 700:] = 700
    q, k, v = (torch.randn(1, 2, 1100, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    out = sdpa_attention(q, k, v, scale=0.25, begins_BT=begins_BT)
    alone = sdpa_attention(*(x[:, :, 700:] for x in (q, k, v)), scale=0.25)
    torch.testing.assert_close(out[:, :, 700:], alone, rtol=1e-6, atol=1e-6)
    for x in (q, k, v):
        x[:, :, :700] = 5.0
    assert torch.equal(sdpa_attention(q, k, v, scale=0.25, begins_BT=begins_BT)[:, :, 700:], out[:, :, 700:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_layers_share_one_mask_in_the_type_in_which_attention_is_computed(build, tokens, precision):
    model, kept = build(attention_impl="sdpa", n_layers=3), {}

    def pack(x):
        if x.shape[-2:] == (40, 40):
            kept[x.data_ptr()] = x.dtype
        return x

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        model(tokens(40, 3), begins()).sum()
    assert list(kept.values()) == [torch.float32]  # a CPU widens small heads in bf16
    assert documents_mask(begins(), torch.bfloat16, d_head=512).dtype == torch.bfloat16


@paths
def test_recomputed_blocks_and_recorded_logits_know_the_documents(build, tokens, path):
    model = build_on(build, path)
    device = model.embedding.weight.device
    tokens_BT, begins_BT = tokens(40, 3).to(device), begins().to(device)
    kept = gradients(model, losses(model, tokens_BT, begins_BT).sum())
    model.recompute_every = 1
    recomputed = gradients(model, losses(model, tokens_BT, begins_BT).sum())
    assert all(torch.equal(x, y) for x, y in zip(kept, recomputed, strict=True))
    attention, seen = model.blocks[0].attention, []
    attention.records_logits, model.recompute_every = True, None
    hook = lambda module, given: seen.append(module.prepare(*module.products(module, given[0])[:2], *given[1:3]))  # noqa: E731
    attention.register_forward_pre_hook(hook)
    losses(model, tokens_BT, begins_BT)
    q, k = seen[0]
    scores = attention.scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2))
    allowed = allowed_keys(40, None, device, begins_BT)
    largest = scores.masked_fill(~allowed, float("-inf")).amax((0, 2, 3))
    torch.testing.assert_close(attention.take_largest_logits(), largest)
    statistics = attention.statistics(q, k, begins_BT)
    torch.testing.assert_close(statistics.largest_H, largest)
