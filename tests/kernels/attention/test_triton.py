"""The Triton attention is reference.attention: outputs, gradients and statistics, whatever the length and the tiles.

Without a GPU the kernels run in Triton's interpreter, which rounds fp32 to bf16 by cutting digits off.
"""

import math
from typing import NamedTuple

import pytest
import torch

from scaling_testbed.kernels import support
from scaling_testbed.kernels.attention import reference
from scaling_testbed.kernels.attention import triton as module
from scaling_testbed.kernels.attention.triton import attention
from tests.kernels.conftest import in_turn

DEVICE = "cpu" if support.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    support.why_not(torch.device(DEVICE)) is not None, reason=str(support.why_not(torch.device(DEVICE)))
)

# Norm of the error over norm of the value.
#   fp32: sums of up to some hundred roundings of 6e-8. The softcap's tanh has the absolute error of one rounding of 1,
#   which at softcap 50 is 3e-6 of a score and so of its weight.
#   bf16: one rounding of the result is 1.7e-3; cutting digits off, as the interpreter does, 2.5 times that. A gradient
#   carries the rounding of the output too, through delta. On a GPU the weights are rounded as well.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1.5e-3}
SOFTCAP_TOLERANCE = 1e-5


TABLES = (*module.TILES_BY_CAPABILITY.values(), module.TILES_SMALL, module.TILES_FP32)


class Case(NamedTuple):
    T: int
    d_head: int
    heads: int = 1
    groups: int = 1
    softcap: float | None = None
    window: int | None = None
    batch: int = 1
    documents: tuple[tuple[int, ...], ...] | None = None  # of each sequence the positions at which documents begin

    @property
    def options(self) -> dict:
        begins = None if self.documents is None else begins_of(self.documents, self.T)
        return {"scale": self.d_head**-0.5, "softcap": self.softcap, "window": self.window, "begins_BT": begins}


def begins_of(documents, T):
    """begins_BT of documents that begin at these positions."""
    rows = [[max(begin for begin in row if begin <= t) for t in range(T)] for row in documents]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


# Each tile edge, width, sharing of heads and feature is in one at least.
SHIPPED = [
    Case(1, 32, window=1),
    Case(37, 80, heads=2, batch=2),
    Case(127, 128, softcap=50.0),
    Case(129, 64, heads=4, groups=2),
    Case(129, 96, softcap=1.0, window=30),
    Case(257, 32, heads=3, window=100),
    Case(257, 32, heads=2, groups=1, batch=2, documents=((0, 1, 127, 128, 250), (0, 200))),
]
# With tiles of 16 and 32 a short sequence has tiles of every kind: unmasked, diagonal, before the window and cut off.
SMALL = [
    Case(1, 64),
    Case(16, 64, softcap=1.0),
    Case(70, 32, heads=4, groups=1, batch=2),
    Case(97, 32, heads=2, window=1),
    Case(97, 32, heads=2, groups=1, window=16),
    Case(97, 80, window=33, softcap=1.0),
    Case(64, 96, heads=6, groups=2, window=17, softcap=50.0),
    Case(65, 32, window=1000),
    Case(97, 32, heads=2, groups=1, batch=2, documents=((0, 5, 32, 33, 90), (0,))),
    Case(97, 80, batch=2, documents=((0, 48, 96), (0, 16, 64)), window=20, softcap=1.0),
    Case(33, 64, batch=1, documents=(tuple(range(33)),)),
]


@pytest.fixture
def small_tiles(monkeypatch):
    for table in TABLES:
        for kernel, width in table:
            size = (32, 16) if kernel == "queries" else (16, 32)
            monkeypatch.setitem(table, (kernel, width), module.Tiles(*size, 4, 1))


def inputs(case: Case, dtype=torch.float32, size: float = 1.0, seed: int = 0):
    """q, k, v as the model passes them, [B, T, H, K] in memory, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads):
        x = torch.randn(case.batch, case.T, heads, case.d_head, dtype=torch.float64, generator=generator)
        return x.to(DEVICE, dtype).transpose(1, 2)

    q, k, v, grad = (random(n) for n in (case.heads, case.groups, case.groups, case.heads))
    return [(size * q).requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def run(function, q, k, v, grad, **options):
    out = function(q, k, v, **options)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def exact(q, k, v, grad, **options):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    return run(reference.attention, q, k, v, grad.double(), **options)


def assert_near(found, expected, tolerance, grad):
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert x.isfinite().all(), name
        # A query that sees one key has no gradient: what cancels is as large as the output's.
        size = y.norm() if y.norm() > 1e-9 else grad.norm()
        assert (x.double() - y).norm() <= tolerance * size, name


def assert_is_the_definition(case, dtype):
    tensors = inputs(case, dtype)
    found = run(attention, *tensors, **case.options)
    assert all(x.dtype == dtype and x.transpose(1, 2).is_contiguous() for x in found)
    tolerance = TOLERANCE[dtype] if case.softcap is None else max(TOLERANCE[dtype], SOFTCAP_TOLERANCE)
    assert_near(found, exact(*tensors, **case.options), tolerance, tensors[3])


@pytest.mark.parametrize(("case", "dtype"), in_turn(SHIPPED, (torch.float32, torch.bfloat16)), ids=str)
def test_output_and_gradients_are_the_definition_s(case, dtype):
    assert_is_the_definition(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), in_turn(SMALL, (torch.float32, torch.bfloat16)), ids=str)
def test_output_and_gradients_are_the_definition_s_over_many_tiles(case, dtype, small_tiles):
    assert_is_the_definition(case, dtype)


def test_fp16_and_a_thousand_positions():
    assert_is_the_definition(Case(1001, 32), torch.float16)


OBSERVED = [
    Case(1, 64),
    Case(37, 32, heads=4, groups=1, batch=2),
    Case(49, 80, softcap=50.0),
    Case(65, 32, heads=2, groups=1, softcap=1.0, window=33),
    Case(65, 32, heads=2, groups=1, batch=2, documents=((0, 7, 40), (0, 64))),
    Case(65, 32, batch=1, window=9, documents=((0, 7, 40),)),
]


@pytest.mark.parametrize("case", OBSERVED, ids=str)
def test_statistics_are_the_definition_s_and_change_nothing_else(case, small_tiles):
    q, k, v, grad = inputs(case, torch.bfloat16, size=3.0)
    plain = run(attention, q, k, v, grad, **case.options)
    out, statistics = attention(q, k, v, **case.options, return_statistics=True)
    observed = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    assert all(torch.equal(x, y) for x, y in zip(plain, observed, strict=True))
    assert_are_statistics(statistics, q, k, 2e-6, **case.options)


def assert_are_statistics(statistics, q, k, tolerance, **options):
    expected = reference.attention_statistics(q.double(), k.double(), **options)
    for name, x, y in zip(expected._fields, statistics, expected, strict=True):
        assert x.dtype == torch.float32 and x.shape == y.shape and not x.requires_grad
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_the_largest_score_may_be_negative(small_tiles):
    q = inputs(Case(17, 32))[0].abs()
    statistics = attention(q, -q, q, scale=1.0, window=3, return_statistics=True)[1]
    assert statistics.largest_H < 0
    assert_are_statistics(statistics, q, -q, 2e-6, scale=1.0, window=3)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "window": 9}], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_statistics_show_what_is_not_a_number(options, small_tiles):
    q, k, v, _ = (x.detach() for x in inputs(Case(40, 32, heads=2, groups=2)))
    k[0, 1, 17, 3] = math.nan
    _, statistics = attention(q, k, v, scale=0.2, **options, return_statistics=True)
    for row_H in statistics:
        assert row_H.isnan().tolist() == [False, True]


def test_rows_too_far_apart_for_32_bits_are_copied():
    near, far = (torch.empty_strided((1, 1, 4, 32), (0, 0, step, 1), device="meta") for step in (2**23, 2**24))
    assert module._addressable(near).stride(2) == 2**23
    assert module._addressable(far).stride(2) == 32


def test_shipped_statistics_tiles_leave_the_output_alone():
    for width in (32, 64, 128):
        for table in TABLES:
            assert table["statistics", width].keys == table["forward", width].keys
    q, k, v, _ = inputs(Case(129, 128))
    observed, statistics = attention(q, k, v, scale=0.1, return_statistics=True)
    assert torch.equal(observed, attention(q, k, v, scale=0.1))
    assert_are_statistics(statistics, q, k, 2e-6, scale=0.1)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # as tanh goes to 1
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (50.0, None), (None, 20)])
def test_scores_of_ten_thousand_are_finite_and_right(softcap, window, small_tiles):
    # Small integers: the scores are exact in fp32. As exponents of two they have steps of 2e-3, their weights errors
    # of half of that.
    q, k, v, grad = inputs(Case(50, 64))
    q, k = ((60 * x.detach()).round().requires_grad_() for x in (q, k))
    options = {"scale": 0.25, "softcap": softcap, "window": window}
    assert (0.25 * (q @ k.transpose(-1, -2)).tril()).max() > 1e4
    assert_near(run(attention, q, k, v, grad, **options), exact(q, k, v, grad, **options), 1e-3, grad)
    statistics = attention(q, k, v, **options, return_statistics=True)[1]
    assert_are_statistics(statistics, q, k, 1e-5, **options)


def test_repetitions_give_the_same_bits(small_tiles):
    case = Case(40, 32, heads=2, groups=1, softcap=5.0, window=20)
    tensors = inputs(case, torch.bfloat16)
    first = run(attention, *tensors, **case.options)
    for _ in range(2 if support.INTERPRETED else 9):
        assert all(torch.equal(x, y) for x, y in zip(first, run(attention, *tensors, **case.options), strict=True))


def test_any_strides_give_the_same_bits(small_tiles):
    case = Case(40, 80, heads=2, groups=1)
    tensors = inputs(case)
    expected = run(attention, *tensors, **case.options)

    def every_second_feature(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), device=DEVICE)
        wide[..., ::2] = x.detach()
        return wide[..., ::2].requires_grad_(x.requires_grad)

    def inside_a_larger_one(x):
        large = torch.full((x.shape[0] + 1, *(size + 3 for size in x.shape[1:])), float("nan"), device=DEVICE)
        view = large[1:, 1:-2, 2:-1, 1:-2]
        view.copy_(x.detach())
        return view.requires_grad_(x.requires_grad)

    for change in (torch.Tensor.contiguous, every_second_feature, inside_a_larger_one):
        changed = [change(x) for x in tensors]
        found = run(attention, *changed, **case.options)
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True)), change.__name__
    ones = torch.ones_like(tensors[3])  # the gradient of a sum is one number, expanded
    expected = run(attention, *tensors[:3], ones, **case.options)
    found = run(attention, *tensors[:3], torch.ones((), device=DEVICE).expand_as(ones), **case.options)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.parametrize("window", [None, 20])
def test_the_future_and_what_left_the_window_change_nothing(window, small_tiles):
    case = Case(60, 32, heads=2, window=window)
    q, k, v, grad = inputs(case)
    before = run(attention, q, k, v, grad, **case.options)[0]
    for now in (1, 16, 33, 59):
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, now:] = 1e3
        assert torch.equal(attention(*changed, **case.options)[:, :, :now], before[:, :, :now])
        if window is not None and now > window:
            changed = [x.detach().clone() for x in (q, k, v)]
            for x in changed[1:]:
                x[:, :, : now - window + 1] = 1e3
            out = attention(*changed, **case.options)
            assert torch.equal(out[:, :, now:], before[:, :, now:])
            assert not torch.equal(out[:, :, now - 1], before[:, :, now - 1])
    early = grad.clone()
    early[:, :, 20:] = 0
    for gradient in run(attention, q, k, v, early, **case.options)[1:]:
        assert (gradient[:, :, 20:] == 0).all() and (gradient[:, :, :20] != 0).any()


def test_no_document_changes_a_bit_of_another(small_tiles):
    case = Case(97, 32, heads=2, documents=((0, 33, 60),))
    tensors = inputs(case)
    before = run(attention, *tensors, **case.options)
    for first, last in ((0, 33), (33, 60), (60, 97)):
        changed = [x.detach().clone() for x in tensors]
        for x in changed:
            x[:, :, first:last] = 3.0
        after = run(attention, *(x.requires_grad_() for x in changed), **case.options)
        for x, y in zip(before, after, strict=True):
            same = (x == y).flatten(0, 1).all(0).all(-1)
            assert same[:first].all() and same[last:].all()
        assert not torch.equal(before[0][:, :, first:last], after[0][:, :, first:last])


def test_inputs_that_it_cannot_take_are_refused():
    def refused(message, q=(1, 2, 8, 32), k=(1, 2, 8, 32), v=None, dtypes=(torch.float32,) * 3, scale=1.0, **options):
        tensors = [
            torch.zeros(shape, dtype=dtype, device=DEVICE) for shape, dtype in zip((q, k, v or k), dtypes, strict=True)
        ]
        with pytest.raises(ValueError, match=message):
            attention(*tensors, scale=scale, **options)

    refused("d_head must be one of 32, 64, 80, 96, 128 .* got 48", q=(1, 2, 8, 48), k=(1, 2, 8, 48))
    refused("multiple of key heads", q=(1, 3, 8, 32))
    refused("non-empty dimensions", q=(1, 2, 0, 32), k=(1, 2, 0, 32))
    refused(r"q \[B, H, T, K\] and k, v \[B, G, T, K\], got q \(1, 2, 8, 32\)", k=(1, 2, 9, 32))
    refused("takes q", v=(1, 1, 8, 32))
    refused("takes q", q=(2, 8, 32), k=(2, 8, 32))
    refused("all be fp32, bf16 or fp16, got .*bfloat16", dtypes=(torch.bfloat16, torch.float32, torch.float32))
    refused("all be fp32, bf16 or fp16", dtypes=(torch.float64,) * 3)
    refused("scale must be positive", scale=-1.0)
    refused("scale must be positive and finite, got nan", scale=math.nan)
    refused("softcap must be positive", softcap=0.0)
    refused("window must be at least 1", window=0)
    refused(r"begins must be \[B, T\] on .* got \(1, 7\)", begins_BT=torch.zeros(1, 7, dtype=torch.int32))
    refused("at most 65535 sequences and heads", q=(65536, 1, 1, 32), k=(65536, 1, 1, 32))


def test_where_triton_cannot_run_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETED", False)
    q = torch.zeros(1, 1, 4, 32)
    with pytest.raises(RuntimeError, match="attention_impl=triton cannot run: it needs a CUDA GPU"):
        attention(q, q, q, scale=1.0)


@pytest.mark.parametrize("options", [(None, None, False), (2.0, 5, True)])
def test_the_operators_keep_torch_s_rules(options, small_tiles):
    softcap, window, statistics = options
    q, k, v, grad = inputs(Case(20, 32, heads=2, groups=1))
    forward, backward = torch.ops.scaling_testbed.attention, torch.ops.scaling_testbed.attention_backward
    begins = begins_of(((0, 9),), 20) if statistics else None
    torch.library.opcheck(forward.default, (q, k, v, begins, 0.2, softcap, window, statistics))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, _ = forward(q, k, v, begins, 0.2, softcap, window, statistics)
    torch.library.opcheck(backward.default, (grad, q, k, v, out, lse, begins, 0.2, softcap, window))


def test_compiled_whole_it_gives_the_same_bits(small_tiles):
    case = Case(20, 32, heads=2, groups=1, softcap=2.0, window=9)
    tensors = inputs(case)

    def both(q, k, v):
        out, statistics = attention(q, k, v, **case.options, return_statistics=True)
        return out, *statistics

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found, expected = (run_all(function, *tensors) for function in (compiled, both))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def run_all(function, q, k, v, grad):
    out, *statistics = function(q, k, v)
    assert not any(x.requires_grad for x in statistics)
    return [out, *statistics, *torch.autograd.grad(out, (q, k, v), grad)]


def test_a_window_as_long_as_the_sequence_or_longer_is_none():
    q, k, v = (torch.randn(1, 1, 20, 32, device=DEVICE).requires_grad_() for _ in range(3))
    results = []
    for window in (None, 20, 2**31 - 1, 2**40):
        out = attention(q, k, v, scale=0.2, window=window)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, results[0], strict=True))
