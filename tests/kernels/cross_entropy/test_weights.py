"""A weight of each token multiplies its cross-entropy in the loss and in both gradients, and nothing else.

Truth is autograd through the definition in float64. Tolerances are those of heads.py.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaling_testbed.kernels.cross_entropy import chunked, reference
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


def weights(n=37, ignored=5):
    """Of both signs, with zeros; those of the ignored tokens are no numbers."""
    values_N = 2 * torch.randn(n, generator=torch.Generator().manual_seed(n))
    values_N[::4], values_N[:ignored:2], values_N[1:ignored:2] = 0, float("nan"), float("inf")
    return values_N.to(KERNEL_DEVICE)


def assert_exact(path, arguments, values, gradients, **options):
    """Outputs are near the truth. A loss of both signs cancels, so its error is measured beside the sum of sizes."""
    found, expected = outputs(path, *arguments, **options), truth(*arguments, **options)
    sizes = 2 * (options["weights_N"].nan_to_num(0, 0).abs() * expected[1]).sum()
    assert_near((found[0] + sizes, *found[1:]), (expected[0] + sizes, *expected[1:]), values, gradients)


@each_path
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_terms_and_gradients_equal_the_definition(path, dtype, softcap):
    assert_exact(path, inputs(dtype=dtype), *TOLERANCE[dtype], weights_N=weights(), softcap=softcap)


@each_path
@pytest.mark.parametrize(("n", "d", "v"), [(1, 8, 3), (127, 16, 50), (129, 65, 129), (3, 8, 5001)])
def test_odd_sizes_are_handled(path, n, d, v):
    """The last one takes several tiles of the row kernel, or one wide tile."""
    assert_exact(path, inputs(n, d, v, ignored=0), *TOLERANCE[FP32], weights_N=weights(n, 0) + 0.5)


@each_path
def test_the_gradient_of_each_token_is_exact_beside_huge_and_tiny_weights(path):
    arguments = inputs()
    weights_N = torch.logspace(-30, 30, 37, device=KERNEL_DEVICE) * torch.tensor([1.0, -1.0]).repeat(19)[:37]
    found = outputs(path, *arguments, z_loss=0.0, weights_N=weights_N)[3]
    expected = truth(*arguments, z_loss=0.0, weights_N=weights_N)[3]
    errors_N = (found.double() - expected)[5:].norm(dim=1) / expected[5:].norm(dim=1)
    assert errors_N.max() < 2e-5


@each_path
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_terms_of_each_token_have_no_weight(path, dtype):
    hidden, weight, targets = inputs(dtype=dtype)
    plain, weighted = (PATHS[path](hidden, weight, targets, weights_N=w) for w in (None, weights()))
    assert torch.equal(plain.ce_N, weighted.ce_N) and torch.equal(plain.log_z_N, weighted.log_z_N)


@each_path
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_z_loss_has_no_weight(path, softcap):
    """With weights of zero the z-loss is the whole loss, and without z-loss there is none and no gradient."""
    arguments = inputs()
    zeros_N = torch.zeros(37, device=KERNEL_DEVICE)
    found = outputs(path, *arguments, softcap=softcap, weights_N=zeros_N)
    assert_near(found, truth(*arguments, softcap=softcap, weights_N=zeros_N), *TOLERANCE[FP32])
    torch.testing.assert_close(found[0], 1e-2 * found[2].square().sum())
    loss, _, _, *gradients = outputs(path, *arguments, softcap=softcap, z_loss=0.0, weights_N=zeros_N)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@each_path
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_weights_of_one_give_the_bits_of_none(path, dtype, softcap):
    arguments = inputs(dtype=dtype)
    ones = outputs(path, *arguments, softcap=softcap, weights_N=torch.ones(37, device=KERNEL_DEVICE))
    for one, other in zip(ones, outputs(path, *arguments, softcap=softcap), strict=True):
        # A compiler may fuse products and sums in another way.
        torch.testing.assert_close(one, other, rtol=1e-2 * (KERNEL_DEVICE == "cuda"), atol=0)


@each_path
def test_what_stands_at_ignored_tokens_changes_nothing(path):
    arguments, others_N = inputs(), weights()
    others_N[:5] = 7.0
    found, again = (outputs(path, *arguments, weights_N=w) for w in (weights(), others_N))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert (found[3][:5] == 0).all() and found[0].isfinite()


@each_path
def test_all_tokens_ignored_or_none_at_all_give_zero(path):
    hidden, weight, targets = inputs(ignored=37)
    assert all((x == 0).all() for x in outputs(path, hidden, weight, targets, weights_N=weights(ignored=37)))
    hidden = hidden[:0].detach().requires_grad_()
    found = outputs(path, hidden, weight, targets[:0], weights_N=torch.ones(0, device=KERNEL_DEVICE))
    assert found[0] == 0 and (found[4] == 0).all()


@each_path
def test_weights_need_not_be_contiguous(path):
    arguments, weights_N = inputs(), weights()
    pairs = (
        (torch.stack([weights_N, weights_N + 1], 1)[:, 0], weights_N),
        (weights_N[-1].expand(37), weights_N[-1:].repeat(37)),
    )
    for strided_N, packed_N in pairs:
        found, expected = (outputs(path, *arguments, weights_N=w) for w in (strided_N, packed_N))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_chunks_take_the_weights_of_their_tokens(path):
    hidden, weight, targets = inputs(40, 16, 33)
    one, many = (
        outputs(path, hidden, weight, targets, chunk_bytes=n * 33 * 4, weights_N=weights(40)) for n in (40, 17)
    )
    for left, right in zip(one, many, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@each_path
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_later_micro_batch_adds_its_weighted_gradient_into_grad(path, dtype):
    hidden, weight, targets = inputs(dtype=dtype)
    head, weights_N = torch.nn.Parameter(weight.detach().float()), weights()
    for rows in (slice(0, 21), slice(21, None)):
        into = None if head.grad is None else chunked.AddInto(head.grad, scale=3.0)
        options = {"z_loss": 1e-2, "into": into, "weights_N": weights_N[rows]}
        (3.0 * PATHS[path](hidden[rows], head, targets[rows], **options).loss).backward()
    assert_near([head.grad], truth(hidden, weight, targets, weights_N=weights_N)[4:], TOLERANCE[dtype][1], 0)


@each_path
def test_under_autocast_weights_are_fp32(path):
    hidden, weight, targets = inputs(dtype=BF16)
    wide = (hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    with torch.autocast(KERNEL_DEVICE, BF16):
        found = outputs(path, *wide, targets, weights_N=weights())
    assert all(x.dtype == FP32 for x in found)
    assert_near(found[1:], truth(hidden, weight, targets, weights_N=weights())[1:], 1.2e-2, 1.2e-2)


def test_in_fp64_the_chunked_head_is_the_definition():
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in inputs())
    arguments = hidden.detach().requires_grad_(), weight.detach().requires_grad_(), targets
    assert_exact("torch", arguments, 1e-13, 1e-13, weights_N=weights().double(), softcap=20.0)


def test_memory_holds_the_logits_of_one_chunk_with_weights_too():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.numbers = max([self.numbers, *made])
            return result

    hidden, weight, targets = inputs(256, 8, 512)
    with Largest() as largest:
        options = {"chunk_bytes": 32 * 512 * 4, "weights_N": weights(256)}
        chunked.linear_cross_entropy(hidden, weight, targets, **options).loss.backward()
    assert largest.numbers == 32 * 512


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_pass_pytorchs_own_checks(path):
    arguments = (*inputs(5, 8, 17, ignored=0), weights(5, 0), 1e-2, 30.0, IGNORE, FP32, 0, True, True)
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS[path], arguments, test_utils=names)


@each_path
def test_torch_compile_takes_the_whole_of_it(path):
    hidden, weight, targets = inputs()

    def loss_of(hidden, weight, weights_N):
        return PATHS[path](torch.tanh(hidden), weight, targets, z_loss=1e-2, weights_N=weights_N).loss * 2

    eager = loss_of(hidden, weight, weights())
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(hidden, weight, weights())
    assert torch.equal(compiled, eager)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (compiled, eager)), strict=True):
        torch.testing.assert_close(one, other)


@each_path
def test_weights_that_do_not_fit_are_refused(path):
    arguments, weights_N = inputs(), weights()
    for wrong in (weights_N[1:], weights_N[:, None], weights_N.double(), weights_N.bfloat16(), weights_N > 0):
        with pytest.raises(ValueError, match=r"weights must be torch.float32 \[37\], got torch\.\S+ \[\d+(, 1)?\]$"):
            PATHS[path](*arguments, weights_N=wrong)
    with pytest.raises(ValueError, match=r"require one: give weights.detach\(\)$"):
        PATHS[path](*arguments, weights_N=weights_N.requires_grad_())


def test_the_definition_s_gradient_is_its_derivative():
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in inputs(5, 4, 7, ignored=1))
    weights_N = reference.valid_weights(weights(5, 1).double(), hidden, targets)

    def loss(hidden, weight):
        return reference.summed(*reference.linear_cross_entropy(hidden, weight, targets, softcap=3.0), 0.1, weights_N)

    assert torch.autograd.gradcheck(loss, (hidden.detach().requires_grad_(), weight.detach().requires_grad_()))
