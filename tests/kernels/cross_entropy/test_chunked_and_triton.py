"""The chunked, Triton and recomputing heads equal their definition, whatever the size, the type and the chunks.

Truth, inputs and tolerances are in heads.py. Without a GPU the Triton kernels run in Triton's interpreter.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.kernels import support
from scaling_testbed.kernels.cross_entropy import chunked, reference
from scaling_testbed.kernels.cross_entropy import triton as cross_entropy
from tests.conftest import KERNEL_DEVICE
from tests.kernels.cross_entropy.heads import (
    BF16,
    FP32,
    IGNORE,
    OPERATORS,
    PATHS,
    TOLERANCE,
    assert_near,
    each_path,
    inputs,
    outputs,
    truth,
)


@each_path
@pytest.mark.parametrize("softcap", [None, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_terms_and_gradients_equal_the_definition(path, dtype, softcap):
    arguments = inputs(dtype=dtype)
    assert_near(outputs(path, *arguments, softcap=softcap), truth(*arguments, softcap=softcap), *TOLERANCE[dtype])


@each_path
@pytest.mark.parametrize(
    ("n", "d", "v"), [(1, 8, 3), (127, 16, 50), (129, 65, 129), pytest.param(3, 64, 50257, marks=pytest.mark.slow)]
)
def test_odd_sizes_are_handled(path, n, d, v):
    arguments = inputs(n, d, v, ignored=0)
    assert_near(outputs(path, *arguments), truth(*arguments), *TOLERANCE[FP32])


@pytest.mark.parametrize("path", ["triton", "wide_rows"])
def test_a_row_may_take_several_tiles_or_one(path):
    arguments = inputs(3, 8, 5001, ignored=1)
    assert cross_entropy.ROW_TILE["BLOCK_V"] < 5001 < cross_entropy.WIDE_ROW_TILE["BLOCK_V"]
    assert_near(outputs(path, *arguments, softcap=20.0), truth(*arguments, softcap=20.0), *TOLERANCE[FP32])


@pytest.mark.parametrize("v", [5001, 10007, 16385])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_row_that_fits_a_tile_is_read_once_with_the_same_result(monkeypatch, v, softcap):
    """The kernel takes another way through such a row. Longer rows are read twice."""
    arguments = inputs(3, 8, v, ignored=1)
    real, ways = cross_entropy.head_row_kernel, []

    class ReadTwice:
        def __getitem__(self, grid):
            def launch(*values, ONE_TILE, **constants):
                ways.append(ONE_TILE)
                real[grid](*values, ONE_TILE=False, **constants)

            return launch

    once = outputs("wide_rows", *arguments, softcap=softcap)
    monkeypatch.setattr(cross_entropy, "head_row_kernel", ReadTwice())
    twice = outputs("wide_rows", *arguments, softcap=softcap)
    assert ways == [v <= cross_entropy.WIDEST_ROW_TILE]
    assert_near(once, truth(*arguments, softcap=softcap), 2e-6, 2e-5)
    for left, right in zip(once, twice, strict=True):
        # A compiler may fuse products and sums in another way.
        torch.testing.assert_close(left, right, rtol=1e-5 * (KERNEL_DEVICE == "cuda"), atol=0)


# recompute has no chunks.
each_chunked_path = pytest.mark.parametrize("path", ["torch", "triton"])


@each_chunked_path
def test_the_size_of_the_chunks_changes_nothing(path):
    arguments = inputs(40, 16, 33)
    one, many = (outputs(path, *arguments, chunk_bytes=size) for size in (2**30, 17 * 33 * 4))
    assert_near(many, truth(*arguments), *TOLERANCE[FP32])
    for left, right in zip(one, many, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@each_chunked_path
def test_the_head_s_gradient_is_summed_wide_over_chunks(path):
    """A bf16 sum would be off by 1e-2 after 64 chunks, and more after more."""
    hidden, weight, targets = inputs(128, 16, 33, dtype=BF16, scale=0.2, ignored=0)
    errors = []
    for chunk_bytes in (2**30, 2 * 33 * 2):
        grad = outputs(path, hidden, weight.detach().float().requires_grad_(), targets, chunk_bytes=chunk_bytes)[-1]
        exact = truth(hidden, weight, targets)[-1]
        errors.append(((grad - exact).norm() / exact.norm()).item())
    assert grad.dtype == FP32
    assert errors[1] <= 1.3 * errors[0]


@each_path
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_logits_of_ten_thousand_stay_finite_and_right(path, dtype):
    hidden, weight, targets = inputs(dtype=dtype, scale=2e3)
    winners = slice(10, 20)  # tokens whose target wins by far: log Z is its logit, which is known exactly
    with torch.no_grad():
        weight[targets[winners]] = hidden[winners] * 2.0**-10
    found, expected = outputs(path, hidden, weight, targets), truth(hidden, weight, targets)
    assert all(x.isfinite().all() for x in found)
    assert expected[2].max() > 1e4
    torch.testing.assert_close(found[2][winners].double(), expected[2][winners], rtol=1e-6, atol=0)
    assert (found[1][winners].abs() < 1e-2).all()
    # Gradients are not compared: a logit of 1e4 rounded to 8 bits is off by 32, and p by anything.
    assert_near(found[:3], expected[:3], 2e-6 if dtype == FP32 else 1e-2, 0)


@each_path
def test_without_z_loss_the_loss_is_cross_entropy(path):
    hidden, weight, targets = inputs()
    loss, ce_N, _, *grads = outputs(path, hidden, weight, targets, z_loss=0.0)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE)
    assert torch.equal(loss, ce_N.sum())
    assert_near(
        (loss, ce_N, loss, *grads),
        (expected, truth(hidden, weight, targets)[1], expected, *torch.autograd.grad(3 * expected, (hidden, weight))),
        *TOLERANCE[FP32],
    )


@each_path
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_ignored_tokens_have_exactly_no_loss_and_no_gradient_and_touch_no_other(path, dtype):
    hidden, weight, targets = inputs(dtype=dtype, ignored=6)
    loss, ce_N, log_z_N, grad_hidden, grad_weight = outputs(path, hidden, weight, targets)
    for values in (ce_N, log_z_N, grad_hidden):
        assert (values[:6] == 0).all() and (values[6:] != 0).any(-1 if values.ndim > 1 else 0).all()
    with torch.no_grad():
        hidden[:6] = 1e3
    again = outputs(path, hidden, weight, targets)
    assert torch.equal(again[0], loss) and torch.equal(again[4], grad_weight)


@pytest.mark.parametrize("path", ["triton", "recompute"])
@pytest.mark.parametrize("wrong", [-1, 300])
def test_a_target_that_is_no_column_makes_the_loss_nan_and_touches_no_other(path, wrong):
    hidden, weight, targets = inputs(ignored=0)
    expected = PATHS[path](hidden, weight, targets).ce_N
    targets[7] = wrong
    found = PATHS[path](hidden, weight, targets)
    assert found.loss.isnan() and found.ce_N[7].isnan()
    assert torch.equal(found.ce_N[torch.arange(37) != 7], expected[torch.arange(37) != 7])


@each_path
def test_all_tokens_ignored_gives_zero_and_zero_gradients(path):
    found = outputs(path, *inputs(ignored=37))
    assert all((x == 0).all() for x in found)


@each_path
def test_no_tokens_at_all_give_zero(path):
    hidden, weight, targets = inputs(n=37)
    found = outputs(path, hidden[:0].detach().requires_grad_(), weight, targets[:0])
    assert found[0] == 0 and (found[4] == 0).all()


@each_path
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_repeats_are_bitwise_equal(path, dtype):
    arguments = inputs(50 if KERNEL_DEVICE == "cuda" else 17, 16, 129, dtype=dtype)
    first = outputs(path, *arguments, chunk_bytes=8 * 129 * 4)
    for _ in range(9 if KERNEL_DEVICE == "cuda" else 2):
        again = outputs(path, *arguments, chunk_bytes=8 * 129 * 4)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@each_path
def test_inputs_need_not_be_contiguous(path):
    hidden, weight, targets = inputs()
    expected = outputs(path, hidden, weight, targets)
    strided = (hidden.detach().T.contiguous().T, torch.cat([weight.detach()] * 2, 1)[:, : weight.shape[1]])
    found = outputs(path, *(x.requires_grad_() for x in strided), torch.stack([targets, targets + 1], 1)[:, 0])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    same = outputs(path, hidden, weight, targets[-1:].expand(len(targets)))
    assert_near(same, outputs(path, hidden, weight, targets[-1:].repeat(len(targets))), 0, 0)


@each_path
@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_softcap_that_is_none_is_refused(path, softcap):
    with pytest.raises(ValueError, match="softcap must be positive and finite"):
        PATHS[path](*inputs(), softcap=softcap)


@each_path
def test_a_second_derivative_is_refused(path):
    hidden, weight, targets = inputs()
    (grad,) = torch.autograd.grad(PATHS[path](hidden, weight, targets).loss, hidden)
    assert not grad.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(PATHS[path](hidden, weight, targets).loss, hidden, create_graph=True)


@each_path
def test_only_the_gradients_that_are_wanted_are_formed(path):
    hidden, weight, targets = inputs()
    *_, grad_hidden, grad_weight = outputs(path, hidden, weight, targets)
    PATHS[path](hidden.detach(), weight, targets, z_loss=1e-2).loss.backward()
    torch.testing.assert_close(3 * weight.grad, grad_weight)
    frozen = weight.detach()
    (only,) = torch.autograd.grad(3 * PATHS[path](hidden, frozen, targets, z_loss=1e-2).loss, hidden)
    torch.testing.assert_close(only, grad_hidden)


@each_path
def test_the_head_s_gradient_becomes_grad_without_a_copy(path, monkeypatch):
    """Autograd keeps the tensor that the forward pass wrote. It does not clone it, although an operator returned it."""
    hidden, weight, targets = inputs()
    head = torch.nn.Parameter(weight.detach())
    scale, scaled = torch.Tensor.mul_, []
    monkeypatch.setattr(torch.Tensor, "mul_", lambda x, by: scaled.append((x.shape, x.data_ptr())) or scale(x, by))
    PATHS[path](hidden, head, targets).loss.backward()
    assert (head.grad.shape, head.grad.data_ptr()) in scaled


@each_path
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_later_micro_batch_adds_its_gradient_straight_into_grad(path, dtype, softcap):
    hidden, weight, targets = inputs(dtype=dtype)
    head = torch.nn.Parameter(weight.detach().float())
    parts = [(hidden[rows].detach().requires_grad_(), targets[rows]) for rows in (slice(0, 21), slice(21, None))]
    losses, sums = [], []
    for part, picked in parts:
        into = None if head.grad is None else chunked.AddInto(head.grad, scale=3.0)
        options = {"z_loss": 1e-2, "softcap": softcap, "chunk_bytes": 8 * 300 * 4, "into": into}
        losses.append(PATHS[path](part, head, picked, **options))
        (3.0 * losses[-1].loss).backward()
        sums.append(head.grad.data_ptr())
    assert len(set(sums)) == 1
    found = [sum(x.loss for x in losses), *(torch.cat([x[i] for x in losses]) for i in (1, 2))]
    found += [torch.cat([part.grad for part, _ in parts]), head.grad]
    assert_near(found, truth(hidden, weight, targets, softcap=softcap), *TOLERANCE[dtype])


@each_path
def test_what_cannot_be_added_to_is_refused(path):
    hidden, weight, targets = inputs()
    call = partial(PATHS[path], hidden, weight, targets)
    grad = torch.zeros_like(weight)
    for wrong in (grad[1:], grad.bfloat16(), grad.T.contiguous().T):
        with pytest.raises(ValueError, match=r"the sum must be contiguous torch.float32 \[300, 24\]"):
            call(into=chunked.AddInto(wrong))
    with torch.no_grad(), pytest.raises(ValueError, match="takes no gradient here"):
        call(into=chunked.AddInto(grad))
    assert (grad == 0).all()


@each_path
def test_without_gradients_bf16_logits_are_not_rounded(path):
    """A validation loss is as exact as fp32 sums of bf16 products are."""
    hidden, weight, targets = inputs(dtype=BF16)
    with torch.no_grad():
        found = PATHS[path](hidden, weight, targets, z_loss=1e-2)
    assert_near(found, truth(hidden, weight, targets)[:3], 2e-6, 0)


@each_path
def test_under_autocast_fp32_weights_get_fp32_gradients_of_bf16_products(path):
    hidden, weight, targets = inputs(dtype=BF16)
    wide = (hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    with torch.autocast(KERNEL_DEVICE, BF16):
        found = outputs(path, *wide, targets)
    assert all(x.dtype == FP32 for x in found)
    assert_near(found, truth(hidden, weight, targets), *TOLERANCE[BF16])


@each_path
def test_a_second_backward_pass_is_refused_rather_than_wrong(path):
    hidden, weight, targets = inputs()
    loss = PATHS[path](hidden, weight, targets).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        (2 * loss).backward()
    # These hide from autograd that what it saved has changed.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = PATHS[path](hidden, weight, targets).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        (2 * loss).backward()


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_pass_pytorchs_own_checks(path):
    arguments = (*inputs(5, 8, 17, ignored=1), None, 1e-2, 30.0, IGNORE, FP32, 0, True, True)
    # The backward pass scales what was saved in place, so it cannot be run twice through one graph as that check does.
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS[path], arguments, test_utils=names)


@each_path
def test_torch_compile_takes_the_whole_of_it(path):
    hidden, weight, targets = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(hidden, weight):
        return PATHS[path](torch.tanh(hidden), weight, targets, z_loss=1e-2).loss * 2

    eager = PATHS[path](torch.tanh(hidden), weight, targets, z_loss=1e-2).loss * 2
    compiled = loss_of(hidden, weight)
    assert torch.equal(compiled, eager)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (compiled, eager)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_definition_s_gradient_is_its_derivative():
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in inputs(5, 4, 7, ignored=1))

    def loss(hidden, weight):
        ce_N, log_z_N = reference.linear_cross_entropy(hidden, weight, targets, softcap=3.0)
        return ce_N.sum() + 0.1 * log_z_N.square().sum()

    assert torch.autograd.gradcheck(loss, (hidden.detach().requires_grad_(), weight.detach().requires_grad_()))


@pytest.mark.parametrize("n", [1, 100, 1000, 5000])
@pytest.mark.parametrize("chunk_bytes", [0, 1, 10**6, 10**9])
def test_chunks_are_even_and_keep_to_the_budget(n, chunk_bytes):
    row_bytes = 200_000
    rows = chunked.chunk_rows(n, row_bytes, chunk_bytes, torch.device("cpu"))
    assert rows >= 1 and (rows == 1 or rows * row_bytes <= (chunk_bytes or 64 * 2**20))
    chunks = -(-n // rows)
    assert n > rows * (chunks - 1)  # none is empty


def test_half_of_a_cache_is_for_logits():
    """Chunks of C tokens move fewer bytes than large ones where 8 V D / C < 12 V: on an H100 up to D = 390."""
    rows = chunked.chunk_rows(32768, 2 * 50304, chunked.cached_chunk_bytes(50 * 2**20), torch.device("cpu"))
    assert rows * 2 * 50304 <= 25 * 2**20 and 380 <= 1.5 * rows <= 390


@each_path
def test_shapes_that_do_not_fit_are_named(path):
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        PATHS[path](hidden[:, 1:], weight, targets)
    with pytest.raises(ValueError, match="targets must be int64"):
        PATHS[path](hidden, weight, targets[1:])


def test_triton_names_what_it_cannot_do(monkeypatch):
    hidden, weight, targets = (x.cpu() for x in inputs(d=200))
    monkeypatch.setattr(support, "INTERPRETED", True)
    with pytest.raises(ValueError, match="variant=recompute needs a width of at most 128, got 200"):
        cross_entropy.linear_cross_entropy(hidden, weight, targets, variant="recompute")
    with pytest.raises(ValueError, match="variant must be"):
        cross_entropy.linear_cross_entropy(hidden, weight, targets, variant="fast")
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=f"computes in fp32 or bf16, got {dtype}"):
            cross_entropy.linear_cross_entropy(hidden.to(dtype), weight, targets)
    monkeypatch.setattr(support, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="loss.impl=triton cannot run: it needs a CUDA GPU, not cpu"):
        cross_entropy.linear_cross_entropy(hidden, weight, targets)


def test_what_memory_held_before_is_in_no_gradient_in_bf16(monkeypatch):
    """Processors with AMX read the columns after the vocabulary."""
    made, empty = [], torch.empty

    def poisoned(*shape, **options):
        made.append(empty(*shape, **options).fill_(float("nan")))
        return made[-1]

    hidden, weight = torch.randn(100, 32, requires_grad=True), torch.randn(257, 32, requires_grad=True)
    monkeypatch.setattr(chunked.torch, "empty", poisoned)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked.linear_cross_entropy(hidden, weight, torch.randint(257, (100,)))
    found.loss.backward()
    (logits,) = [tensor for tensor in made if tensor.dtype == torch.bfloat16 and tensor.shape[-1] == 320]
    assert not logits[:, 257:].any()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
