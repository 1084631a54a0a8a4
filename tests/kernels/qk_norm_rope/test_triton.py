"""The fused norm and rotation equals its definition, whatever the size, the type and the layout.

Truth is reference.qk_norm_rope (or apply_rotary, kind "none") in float64 on the same, already rounded inputs. Without a
GPU the kernels run in Triton's interpreter. Tolerances are relative, by norm:
  WIDE    1e-6: fp32 sums of at most 256 terms, and of some hundred rows for a gain; 1e-7 is usual. Gradients of gains
          are never rounded to less, so it is theirs in every type.
  BF16    6e-3: one rounding to 8 bits. To nearest that is 1.7e-3; the interpreter's cast truncates, which is 4.5e-3.
  FP16    5e-4: one rounding to 11 bits, 2e-4.
"""

import pytest
import torch

from scaling_testbed.kernels import support
from scaling_testbed.kernels.qk_norm_rope import reference
from scaling_testbed.kernels.qk_norm_rope import triton as qk_norm_rope
from tests.conftest import KERNEL_DEVICE
from tests.kernels.conftest import in_turn

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WIDE = 1e-6
TOLERANCE = {FP32: WIDE, BF16: 6e-3, FP16: 5e-4}
KINDS = ("layernorm", "rmsnorm", "none")
# Norms over all heads of a position together. Here the gains of a head are multiples of those that the heads share.
OF_ALL_HEADS = ("layernorm of all heads", "rmsnorm of all heads")
each_kind = pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(x, marks=pytest.mark.slow) for x in OF_ALL_HEADS)])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_projected(x):
    """`x` [B, heads, T, K] as the model has it: a view of [B, T, heads * K]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def inputs(d_head=32, T=37, H=3, G=1, dtype=FP32, scale=1.0, centre=0.5):
    """q, k, their gains, cos and sin, with gradients where the kernel has them."""
    q = as_projected(scale * random(2, H, T, d_head, seed=1) + centre).to(KERNEL_DEVICE, dtype).requires_grad_()
    k = as_projected(scale * random(2, G, T, d_head, seed=2) - centre).to(KERNEL_DEVICE, dtype).requires_grad_()
    gains = [(1 + 0.5 * random(d_head, seed=seed)).to(KERNEL_DEVICE).requires_grad_() for seed in (3, 4)]
    tables = reference.rotary_tables(torch.arange(T), d_head, 100.0)
    return q, k, *gains, *(x.to(KERNEL_DEVICE) for x in tables)


def named(kind, q, k, q_gain, k_gain):
    """The gains, and the options, that stand for `kind`."""
    if kind not in OF_ALL_HEADS:
        return (q_gain, k_gain), {"kind": kind}
    pairs = ((q, q_gain), (k, k_gain))
    gains = [torch.outer(torch.arange(1, x.shape[1] + 1).to(gain), gain).flatten() for x, gain in pairs]
    return gains, {"kind": kind.split()[0], "heads_together": True}


def call(kind, q, k, q_gain, k_gain, cos, sin, eps=1e-6, out_dtype=None):
    if kind == "none":
        return qk_norm_rope.rotary(q, k, cos, sin, out_dtype=out_dtype)
    gains, options = named(kind, q, k, q_gain, k_gain)
    return qk_norm_rope.qk_norm_rope(q, k, *gains, cos, sin, eps=eps, out_dtype=out_dtype, **options)


def define(kind, q, k, q_gain, k_gain, cos, sin, eps=1e-6):
    if kind == "none":
        return tuple(reference.apply_rotary(x, cos, sin) for x in (q, k))
    gains, options = named(kind, q, k, q_gain, k_gain)
    return reference.qk_norm_rope(q, k, *gains, cos, sin, eps=eps, **options)


def leaves(kind, arguments):
    """Those of `arguments` that have a gradient."""
    return arguments[:2] if kind == "none" else arguments[:4]


def gradients_of(outputs):
    """Some gradient of each output, in its type."""
    return [as_projected(random(*x.shape, seed=5 + index).to(x)) for index, x in enumerate(outputs)]


def results(kind, arguments, **options):
    """q, k, dq, dk, and with a norm the gradients of q's and of k's gain."""
    out = call(kind, *arguments, **options)
    return *out, *torch.autograd.grad(out, leaves(kind, arguments), gradients_of(out))


def truth(kind, arguments, out_dtype=None, **options):
    out_dtype = out_dtype or arguments[0].dtype
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in arguments]
    out = define(kind, *exact, **options)
    grads = [x.double() for x in gradients_of([x.to(out_dtype) for x in out])]
    return *out, *torch.autograd.grad(out, leaves(kind, exact), grads)


NAMES = ("q", "k", "dq", "dk", "the gradient of q's gain", "the gradient of k's gain")


def assert_near(found, expected, out_tolerance, grad_tolerance=None, gain_tolerance=WIDE):
    tolerances = [out_tolerance] * 2 + [grad_tolerance or out_tolerance] * 2 + [gain_tolerance] * 2
    assert len(found) == len(expected)
    for name, tolerance, one, other in zip(NAMES, tolerances, found, expected, strict=False):
        assert one.isfinite().all(), f"{name} is not finite"
        error = (one.double() - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def assert_same(found, expected):
    assert len(found) == len(expected)
    for name, one, other in zip(NAMES, found, expected, strict=False):
        assert torch.equal(one, other), f"{name} differs"


@each_kind
@pytest.mark.parametrize(("d_head", "dtype"), in_turn([6, 8, 32, 64, 80, 96, 128, 256], [FP32, BF16, FP16]))
def test_results_and_gradients_equal_the_definition(kind, dtype, d_head):
    arguments = inputs(d_head, T=11, dtype=dtype)
    found = results(kind, arguments, eps=1e-3)
    assert all(x.dtype == dtype for x in found[:4]) and all(x.dtype == FP32 for x in found[4:])
    assert_near(found, truth(kind, arguments, eps=1e-3), TOLERANCE[dtype])


@each_kind
@pytest.mark.parametrize(("heads", "T"), in_turn([(1, 1), (4, 4), (6, 2), (5, 1), (2, 3)], [37, 1, 129]))
def test_every_row_has_its_own_position_whatever_their_number(kind, heads, T):
    H, G = heads
    arguments = inputs(16, T, H, G)
    assert_near(results(kind, arguments), truth(kind, arguments), WIDE)


# Heads, width of a head, type, pairs of a tile: several positions in a tile, one, padded heads and features, one key
# head.
SHAPES = [((4, 4), 32, FP32, 256), ((6, 2), 24, FP32, 64), ((3, 1), 6, BF16, 64), ((5, 5), 16, FP16, 8)]


@pytest.mark.parametrize(("shape", "kind"), in_turn(SHAPES, OF_ALL_HEADS))
def test_all_heads_of_a_position_are_normed_together(kind, shape, monkeypatch):
    heads, d_head, dtype, pairs = shape
    monkeypatch.setattr(qk_norm_rope, "FORWARD_PAIRS", pairs)
    monkeypatch.setattr(qk_norm_rope, "BACKWARD_PAIRS", pairs)
    monkeypatch.setattr(qk_norm_rope, "ENOUGH_PROGRAMS", 4)
    arguments = inputs(d_head, 7, *heads, dtype=dtype)
    assert_near(results(kind, arguments, eps=0.0), truth(kind, arguments, eps=0.0), TOLERANCE[dtype])


@each_kind
def test_how_rows_are_cut_among_programs_changes_no_result_but_the_sums_order(kind, monkeypatch):
    arguments = inputs(32, T=65, H=3, G=1)
    expected = results(kind, arguments)
    # 390 rows of q and 130 of k: 4 tiles a program and 2 for k, the last ones cut short.
    monkeypatch.setattr(qk_norm_rope, "FORWARD_PAIRS", 256)
    monkeypatch.setattr(qk_norm_rope, "BACKWARD_PAIRS", 512)
    monkeypatch.setattr(qk_norm_rope, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(qk_norm_rope, "MOST_TILES", 4)
    found = results(kind, arguments)
    assert_near(found, truth(kind, arguments), WIDE)
    assert_near(found, [x.double() for x in expected], 1e-7, gain_tolerance=WIDE)


@each_kind
def test_bf16_inputs_give_unrounded_fp32_results(kind):
    arguments = inputs(64, dtype=BF16)
    found = results(kind, arguments, out_dtype=FP32)
    assert found[0].dtype == found[1].dtype == FP32 and found[2].dtype == BF16
    assert_near(found, truth(kind, arguments, out_dtype=FP32), WIDE, TOLERANCE[BF16])


@each_kind
def test_gradients_of_fp32_inputs_are_not_rounded_where_results_are(kind):
    arguments = inputs(64)
    found = results(kind, arguments, out_dtype=BF16)
    assert found[0].dtype == found[1].dtype == BF16 and found[2].dtype == FP32
    assert_near(found, truth(kind, arguments, out_dtype=BF16), TOLERANCE[BF16], WIDE)


def feature_strided(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def from_fused_projection(x):
    """Rows of one projection's output that has more in it, before and after."""
    return torch.cat([x + 1, x, x + 2], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, x.shape[1] : -x.shape[1]]


def misaligned(x):
    """Starts one element after an aligned address."""
    x_BTHK = x.transpose(1, 2)
    return torch.cat([x.new_zeros(1), x_BTHK.flatten()])[1:].view(x_BTHK.shape).transpose(1, 2)


LAYOUTS = {
    "packed": torch.Tensor.contiguous,
    "feature strided": feature_strided,
    "fused projection": from_fused_projection,
    "misaligned": misaligned,
    "positions first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "odd row stride": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "features first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}


@pytest.mark.parametrize("kind", ["layernorm", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_inputs_and_gradients_changes_no_bit(kind, layout):
    q, k, *others = inputs(16, H=4, G=2, dtype=BF16)
    expected = results(kind, (q, k, *others))
    lay = LAYOUTS[layout]
    arguments = lay(q.detach()).requires_grad_(), lay(k.detach()).requires_grad_(), *others
    assert torch.equal(arguments[0], q) and arguments[0].stride() != q.stride() or layout == "misaligned"
    out = call(kind, *arguments)
    grads = [lay(x) for x in gradients_of(out)]
    assert_same((*out, *torch.autograd.grad(out, leaves(kind, arguments), grads)), expected)


def test_a_gradient_may_be_one_number_for_all():
    arguments = inputs(16)
    out = call("layernorm", *arguments)
    expanded = torch.autograd.grad(sum(x.sum() for x in out), arguments[:4], retain_graph=True)
    assert_same((*out, *expanded), (*out, *torch.autograd.grad(out, arguments[:4], [torch.ones_like(x) for x in out])))


@each_kind
def test_inputs_are_read_in_place_and_results_lie_as_projections_do(kind, monkeypatch):
    arguments = inputs(16, H=4, G=2)
    grads = gradients_of(arguments[:2])
    copied = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.ndim == 4) or x)
    out = call(kind, *arguments)
    found = *out, *torch.autograd.grad(out, leaves(kind, arguments), grads)
    assert copied and not any(copied)  # gains and tables are contiguous already
    for x in found[:4]:
        assert x.transpose(1, 2).stride() == (x.shape[2] * x.shape[1] * 16, x.shape[1] * 16, 16, 1)


@pytest.mark.parametrize("kind", qk_norm_rope.KINDS)
def test_eps_is_added_under_the_root(kind):
    arguments = inputs(scale=0.1, centre=0.0)
    assert_near(results(kind, arguments, eps=0.02), truth(kind, arguments, eps=0.02), WIDE)
    assert results(kind, arguments, eps=0.02)[0].norm() < 0.9 * results(kind, arguments, eps=0.0)[0].norm()


@pytest.mark.parametrize("kind", qk_norm_rope.KINDS)
def test_without_eps_rows_that_pad_the_last_tile_leave_no_trace(kind):
    arguments = inputs(48, T=3)
    assert_near(results(kind, arguments, eps=0.0), truth(kind, arguments, eps=0.0), WIDE)


@each_kind
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_values_of_ten_thousand_are_fine(kind, dtype):
    arguments = inputs(64, T=5, dtype=dtype, scale=1e4, centre=0.0)
    # Such a norm's gradients, of 1e-4, are below what fp16 holds with all of its bits: 6e-5.
    tolerance = 5e-3 if dtype == FP16 and kind != "none" else None
    assert_near(results(kind, arguments), truth(kind, arguments), TOLERANCE[dtype], tolerance)


def test_a_mean_of_ten_thousand_is_subtracted_before_squares_are_taken():
    """As a difference of mean squares the variance, 1 beside 1e8, would be lost. The mean itself is good to 1e-3."""
    arguments = inputs(64, T=5, centre=1e4)
    assert_near(results("layernorm", arguments), truth("layernorm", arguments), 2e-3, 2e-3, 2e-3)


@each_kind
def test_a_normed_row_of_zeros_gives_zeros(kind):
    q, k, *others = inputs()
    arguments = torch.zeros_like(q).requires_grad_(), k, *others
    assert_near(results(kind, arguments), truth(kind, arguments), WIDE)


@each_kind
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_ten_repeats_are_bitwise_equal(kind, dtype):
    arguments = inputs(64, T=45 if KERNEL_DEVICE == "cuda" else 5, dtype=dtype)
    first = results(kind, arguments)
    for _ in range(9):
        assert_same(results(kind, arguments), first)


@each_kind
def test_a_result_that_is_not_used_sends_no_gradient(kind):
    arguments = inputs()
    q_out, _ = call(kind, *arguments)
    grads = torch.autograd.grad(q_out.sum(), leaves(kind, arguments))
    assert all(((x == 0).all() if index % 2 else (x != 0).any()) for index, x in enumerate(grads))


@each_kind
def test_the_tables_have_no_gradient(kind):
    *others, cos, sin = inputs()
    cos.requires_grad_()
    out = call(kind, *others, cos, sin)
    assert torch.autograd.grad(out[0].sum(), cos, allow_unused=True) == (None,)


@each_kind
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_rows_give_no_rows(kind, shape):
    B, T = shape
    q, k, q_gain, k_gain, cos, sin = inputs(T=4)
    arguments = *(x[:B, :, :T].detach().requires_grad_() for x in (q, k)), q_gain, k_gain, cos[:T], sin[:T]
    found = results(kind, arguments)
    assert found[0].shape == found[2].shape == (B, 3, T, 32)
    assert all((x == 0).all() for x in found[4:])


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_pass_pytorchs_own_checks(kind):
    arguments = inputs(8, T=3, H=2)
    q, k, *gains, cos, sin = arguments
    gains, _ = ([None, None], {}) if kind == "none" else named(kind, q, k, *gains)
    options = kind.split()[0], 1e-6, kind in OF_ALL_HEADS
    torch.library.opcheck(qk_norm_rope.forward_operator, (q, k, *gains, cos, sin, *options, FP32))
    saved = (None, None, None, None) if kind == "none" else [x.detach() for x in (q, k, *gains)]
    grads = [torch.ones_like(x.detach()) for x in (q, k)]
    torch.library.opcheck(qk_norm_rope.backward_operator, (*grads, *saved, cos, sin, *options, BF16))


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_takes_the_whole_of_it(kind):
    arguments = inputs(16, T=5)

    def both(q, k, *others):
        q, k = call(kind, torch.tanh(q), 2 * k, *others)
        return q * 3, torch.sigmoid(k)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for one, other in zip(both(*arguments), compiled(*arguments), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
    grads = [
        torch.autograd.grad(sum(x.square().sum() for x in function(*arguments)), leaves(kind, arguments))
        for function in (both, compiled)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", [*qk_norm_rope.KINDS, *OF_ALL_HEADS])
def test_the_definition_s_gradient_is_its_derivative(kind):
    *leaves, cos, sin = (x.detach().double() for x in inputs(6, T=3, H=2))

    def outputs(*leaves):
        return define(kind, *leaves, cos, sin, eps=1e-2)

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("kind", qk_norm_rope.KINDS)
def test_the_definition_norms_then_rotates_and_rounds_once(kind):
    q, k, q_gain, k_gain, cos, sin = inputs(dtype=BF16)
    found = reference.qk_norm_rope(q, k, q_gain, k_gain, cos, sin, kind=kind, eps=1e-6)
    unrounded = reference.qk_norm_rope(q, k, q_gain, k_gain, cos, sin, kind=kind, eps=1e-6, out_dtype=FP32)
    for x, gain, one, other in zip((q, k), (q_gain, k_gain), found, unrounded, strict=True):
        expected = reference.apply_rotary(reference.qk_norm(x, gain, kind, 1e-6), cos, sin)
        assert torch.equal(other, expected) and torch.equal(one, expected.bfloat16())


BAD = {
    "do not fit": {"k": lambda k: k[:, :, 1:]},
    "q .B, H, T, K. and": {"q": lambda q: q[0]},
    "both be fp32, bf16 or fp16, got torch.float32 and torch.bfloat16": {"k": torch.Tensor.bfloat16},
    "both be fp32, bf16 or fp16, got torch.float64": dict.fromkeys("qk", torch.Tensor.double),
    "d_head must be even and at most 256, got 31": dict.fromkeys("qk", lambda x: x[..., 1:]),
    "d_head must be even and at most 256, got 288": dict.fromkeys("qk", lambda x: x.repeat(1, 1, 1, 9)),
    "cos must be fp32 .37, 16.": {"cos": lambda cos: cos[1:]},
    "sin must be fp32 .37, 16. on .*, got torch.bfloat16": {"sin": torch.Tensor.bfloat16},
}
BAD_GAINS = {
    "q_gain must be fp32 .32.": {"q_gain": lambda gain: gain[1:]},
    "k_gain must be fp32 .32. on .*, got torch.bfloat16": {"k_gain": torch.Tensor.bfloat16},
}


@pytest.mark.parametrize(
    ("kind", "message", "changes"),
    [(kind, *bad) for kind in KINDS for bad in (BAD if kind == "none" else BAD | BAD_GAINS).items()],
)
def test_arguments_that_do_not_fit_are_named(kind, message, changes):
    arguments = dict(zip(("q", "k", "q_gain", "k_gain", "cos", "sin"), inputs(), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        call(kind, **arguments)


def test_unknown_kinds_and_types_are_named_and_so_is_a_missing_gpu(monkeypatch):
    arguments = [x.cpu() for x in inputs()]
    monkeypatch.setattr(support, "INTERPRETED", True)
    with pytest.raises(ValueError, match="kind must be layernorm or rmsnorm, got 'l2'"):
        call("l2", *arguments)
    with pytest.raises(ValueError, match="out_dtype must be fp32, bf16 or fp16, got torch.float64"):
        call("rmsnorm", *arguments, out_dtype=torch.float64)
    with monkeypatch.context() as patched:
        patched.setattr(qk_norm_rope, "WIDEST_ROW", 64)
        with pytest.raises(ValueError, match="all heads of a position must be at most 64 padded features, got 128"):
            call(OF_ALL_HEADS[0], *arguments)
        gains, options = named("rmsnorm of all heads", *arguments[:4])
        with pytest.raises(ValueError, match="k_gain must be fp32 .32."):
            patched.setattr(qk_norm_rope, "WIDEST_ROW", 128)
            qk_norm_rope.qk_norm_rope(*arguments[:2], gains[0], gains[0], *arguments[4:], eps=1e-6, **options)
    monkeypatch.setattr(support, "INTERPRETED", False)
    for kind in KINDS:
        with pytest.raises(RuntimeError, match="qk_norm_impl=triton cannot run: it needs a CUDA GPU, not cpu"):
            call(kind, *arguments)


@each_kind
def test_each_sequence_may_have_positions_of_its_own(kind):
    """The tables of a sequence are those of its positions, so that other sequences need not have the same."""
    *tensors, cos, sin = inputs(T=37)
    positions_BT = torch.stack([torch.arange(37) % 10, torch.arange(37)]).to(KERNEL_DEVICE)
    arguments = (*tensors, cos[positions_BT][:, None], sin[positions_BT][:, None])
    found, expected = results(kind, arguments), results(kind, (*tensors, cos, sin))
    # The second sequence has the positions of the shared tables, and so the same bits.
    assert all(torch.equal(x[1], y[1]) for x, y in zip(found[:4], expected[:4], strict=True))
    assert not torch.equal(found[0][0], expected[0][0])
    assert_near(found, truth(kind, arguments), WIDE)
