"""Causal attention, and qk-norm with rotary embedding: the kernels of this project beside those of PyTorch.

    python -m benchmarks.attention [--device cpu] [--seconds S] [--out DIR] [--quick]

attention: 32768 tokens in sequences of 1k to 8k, with 16 heads of 64 or 8 heads of 128, in bf16. The benchmark times
the forward pass as in training (it keeps the tensors for the backward pass), and both passes. TFLOP/s count the causal
half: two products of T^2/2 scores in the forward pass, five more in the backward pass. Inputs have the memory layout of
the projections' outputs, [B, T, H, K]. Gradients are not accumulated. FlexAttention compiles for each shape, so it is
compared at one length only.

qk-norm + rotary: from the projections' output, in bf16, to the input of attention, with a norm of each head and with
one of all heads together (model.qk_norm_axis=full). In the forward pass, bandwidth counts one read and one write of q
and k each. In the backward pass it counts one read of the incoming gradient, one read of the input and one write of the
gradient.

On a CPU the benchmark only shows that all code runs. With TRITON_INTERPRET=1 this includes the Triton kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from benchmarks.harness import Outputs, Variant
from benchmarks.report import Budget, Report, first_line, verdict
from scaling_testbed.kernels.attention import reference
from scaling_testbed.kernels.qk_norm_rope.reference import qk_norm_rope as definition_of_norm
from scaling_testbed.kernels.qk_norm_rope.reference import rotary_tables

SOFTCAP = 30.0
EPS = 1e-6
STATISTICS_AIM, BANDWIDTH_AIM = 1.10, 0.85
FLEX_LENGTH = 2048
# Relative errors in norm. Inputs are fp32 in the interpreter and on CPUs, and bf16 on GPUs.
TOLERANCE = {"cuda": {"": 2e-2}, "cpu": {"": 1e-4}}
COLUMNS = [
    ("median_s", "ms", "ms"),
    ("low_s", "min", "ms"),
    ("high_s", "max", "ms"),
    ("peak_bytes", "peak MiB", "MiB"),
    ("flops_per_s", "TFLOP/s", "tera"),
    ("over_copy_rate", "of copy rate", "percent"),
    ("best_peer_over_this", "best peer / this", "ratio"),
    ("this_over_ours", "this / ours", "ratio"),
]


class Shape(NamedTuple):
    """B sequences of T tokens, H heads of K features."""

    B: int
    T: int
    H: int
    K: int

    def __str__(self) -> str:
        return f"d_head {self.K}, T {self.T}"


def attention_shapes(device: torch.device, quick: bool) -> list[Shape]:
    """The shapes, with the most informative lengths first, in case time runs out."""
    if device.type == "cpu":
        return [Shape(1, 128, 2, 64)]
    lengths = (2048,) if quick else (2048, 8192, 1024, 4096)
    return [Shape(32768 // T, T, 1024 // K, K) for T in lengths for K in (64, 128)]


def norm_shapes(device: torch.device) -> list[tuple[Shape, bool]]:
    """Each shape, and whether the norm goes over all heads together."""
    if device.type == "cpu":
        return [(Shape(1, 128, 2, 64), False), (Shape(1, 128, 2, 64), True)]
    return [(Shape(16, 2048, 16, 64), False), (Shape(16, 2048, 16, 64), True), (Shape(16, 2048, 8, 128), False)]


def norm_title(together: bool) -> str:
    return "qk-norm of all heads + rotary" if together else "qk-norm + rotary"


# ------------------------------------------------------------------------------------------------ attention


class Way(NamedTuple):
    """A function q_BHTK, k_BHTK, v_BHTK -> out_BHTK with scale 1/sqrt(K), and whether it caps the scores."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    capped: bool = False
    ours: bool = False


def our_ways(device: torch.device) -> tuple[list[Way], list[str]]:
    if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return [], ["ours: needs a GPU, or TRITON_INTERPRET=1"]
    try:
        from scaling_testbed.kernels.attention.triton import attention
    except ImportError as error:
        return [], [f"ours: {first_line(error)}"]

    def call(q, k, v, **options):
        result = attention(q, k, v, scale=q.shape[-1] ** -0.5, **options)
        return result[0] if isinstance(result, tuple) else result

    return [
        Way("ours", call, ours=True),
        Way("ours with statistics", partial(call, return_statistics=True), ours=True),
        Way("ours with softcap", partial(call, softcap=SOFTCAP), capped=True, ours=True),
    ], []


def sdpa(q, k, v, backend: SDPBackend | None = None):
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex_ways(shape: Shape, device: torch.device) -> list[Way]:
    """FlexAttention with a causal block mask, compiled for this shape: plain, and with the softcap as score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, shape.T, shape.T, device=device)

    def cap(score, b, h, q, k):
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    return [
        Way("FlexAttention, compiled", partial(flex, block_mask=causal)),
        Way("FlexAttention with softcap, compiled", partial(flex, block_mask=causal, score_mod=cap), capped=True),
    ]


def ways(device: torch.device) -> tuple[list[Way], list[str]]:
    """The implementations to time for any shape, and the reasons why others are left out."""
    found, absent = our_ways(device)
    if device.type == "cpu":
        return [*found, Way("SDPA", sdpa), Way("reference", partial(definition, softcap=None))], absent
    return [
        *found,
        Way("SDPA cuDNN", partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
        Way("SDPA flash", partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    ], absent


def definition(q, k, v, softcap):
    return reference.attention(q, k, v, scale=q.shape[-1] ** -0.5, softcap=softcap)


def attention_inputs(seed: int, *, shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, heads side by side in memory."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(seed)
    size = (shape.B, shape.T, shape.H, shape.K)
    q, k, v, grad_out = (
        torch.randn(size, generator=random, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad_out


def run_attention(q, k, v, grad_out, *, function, backward: bool) -> Outputs:
    out = function(q, k, v)
    if not backward:
        return {"out": out}
    names = ("q gradient", "k gradient", "v gradient")
    return {"out": out} | dict(zip(names, torch.autograd.grad(out, (q, k, v), grad_out), strict=True))


def last_head(x: Tensor) -> Tensor:
    """The last head of the last sequence. It is independent of all others, and a wrong offset would change it."""
    return x[-1:, -1:]


def trusted_attention(q, k, v, grad_out, *, softcap, backward: bool) -> Outputs:
    """The definition in fp32 on the last head only: the scores of all heads would not fit in memory."""
    inputs = (last_head(x).detach().float().requires_grad_() for x in (q, k, v))
    function = partial(definition, softcap=softcap)
    return run_attention(*inputs, last_head(grad_out).float(), function=function, backward=backward)


def attention_flops(shape: Shape, backward: bool) -> float:
    """FLOPs of a call: 4 T^2 K per head and sequence forward, halved by causality.

    The backward pass has five matrix products, the forward pass two.
    """
    return 2 * shape.B * shape.H * shape.T**2 * shape.K * (3.5 if backward else 1)


def measure_attention(shape: Shape, backward: bool, found: list[Way], seconds: float, device, options, title) -> dict:
    """One comparison of attention, as a case of the report."""
    variants = [
        Variant(
            way.name,
            partial(run_attention, function=way.function, backward=backward),
            "capped" if way.capped else "plain",
            way.ours,
        )
        for way in found
    ]
    trusted = {
        name: partial(trusted_attention, softcap=softcap, backward=backward)
        for name, softcap in (("plain", None), ("capped", SOFTCAP))
    }
    rows = harness.compare(
        variants,
        partial(attention_inputs, shape=shape, device=device),
        trusted,
        device=device,
        tolerance=TOLERANCE[device.type],
        rounds=options.rounds,
        seconds=seconds,
        pick=last_head,
    )
    for row, way in zip(rows, found, strict=True):
        row["capped"] = way.capped
        if "median_s" in row:
            row["flops_per_s"] = attention_flops(shape, backward) / row["median_s"]
    compare_with_peers(rows)
    notes = _statistics_note(rows) if device.type == "cuda" else []
    return {"label": f"{title} {_passes(backward)}, {shape}", "rows": rows, "notes": notes}


def compare_with_peers(rows: list[dict[str, Any]]) -> None:
    """Add to each row the ratios to the fastest peer that computes the same, and to this project's plain kernel."""
    ours = next((row["median_s"] for row in rows if row["variant"] == "ours" and "median_s" in row), None)
    for row in (row for row in rows if "median_s" in row):
        same = [peer for peer in rows if not peer["ours"] and peer.get("capped") == row.get("capped")]
        peers = [peer["median_s"] for peer in same if "median_s" in peer]
        row["best_peer_over_this"] = min(peers) / row["median_s"] if peers else None
        row["this_over_ours"] = row["median_s"] / ours if ours else None


def _statistics_note(rows: list[dict[str, Any]]) -> list[str]:
    row = next((row for row in rows if row["variant"] == "ours with statistics"), {})
    ratio = row.get("this_over_ours")
    if ratio is None:
        return ["ours with or without statistics was not timed; the aim cannot be checked"]
    return [
        verdict(f"with statistics / without: {ratio:.2f} (aim: {STATISTICS_AIM:.2f} or less)", ratio <= STATISTICS_AIM)
    ]


def _passes(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


# ------------------------------------------------------------------------------------------------ qk-norm + rotary


def norm_inputs(seed: int, *, shape: Shape, together: bool, device: torch.device) -> tuple[Tensor, ...]:
    """q and k as the projections return them [B, T, H, K], gains, rotary tables, and the gradients of both outputs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size, kind=dtype):
        return torch.randn(size, generator=random, device=device, dtype=kind)

    B, T, H, K = shape
    width = H * K if together else K
    leaves = [normal(B, T, H, K), normal(B, T, H, K), *(1 + 0.1 * normal(width, kind=torch.float32) for _ in range(2))]
    tables = rotary_tables(torch.arange(T, device=device), K, 10000.0)
    return (*(x.requires_grad_() for x in leaves), *tables, normal(B, H, T, K), normal(B, H, T, K))


def run_norm(q, k, q_gain, k_gain, cos, sin, grad_q, grad_k, *, function, backward: bool) -> Outputs:
    out_q, out_k = function(q.transpose(1, 2), k.transpose(1, 2), q_gain, k_gain, cos, sin, out_dtype=grad_q.dtype)
    outputs = {"q": out_q, "k": out_k}
    if backward:
        torch.autograd.backward((out_q, out_k), (grad_q, grad_k))
        names = ("q gradient", "k gradient", "q gain's gradient", "k gain's gradient")
        outputs |= {name: x.grad for name, x in zip(names, (q, k, q_gain, k_gain), strict=True)}
    return outputs


def trusted_norm(*inputs: Tensor, function, backward: bool) -> Outputs:
    wide = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    return run_norm(*wide, function=function, backward=backward)


def norm_variants(device: torch.device, together: bool) -> tuple[list[tuple], list[str]]:
    """The implementations as (name, function, ours), the definition first, and the reasons why others are left out."""
    options = {"kind": "layernorm", "eps": EPS, "heads_together": together}
    eager, title = partial(definition_of_norm, **options), norm_title(together)
    found, absent = [(f"{title}, eager", eager, False)], []
    if device.type == "cuda":
        torch._dynamo.reset()
        found.append((f"{title}, compiled", torch.compile(eager, dynamic=False), False))
    elif not os.environ.get("TRITON_INTERPRET"):
        return found, ["ours: needs a GPU, or TRITON_INTERPRET=1"]
    try:
        from scaling_testbed.kernels.qk_norm_rope.triton import qk_norm_rope
    except ImportError as error:
        return found, [f"ours: {first_line(error)}"]
    return [*found, ("ours", partial(qk_norm_rope, **options), True)], absent


def measure_norm(
    shape: Shape, together: bool, backward: bool, found, seconds: float, device, options, copy_rate: float
) -> dict:
    """One comparison of qk-norm + rotary, as a case of the report."""
    variants = [
        Variant(name, partial(run_norm, function=function, backward=backward), "norm", ours)
        for name, function, ours in found
    ]
    rows = harness.compare(
        harness.kept(variants, options.without),
        partial(norm_inputs, shape=shape, together=together, device=device),
        {"norm": partial(trusted_norm, function=found[0][1], backward=backward)},
        device=device,
        tolerance=TOLERANCE[device.type],
        rounds=options.rounds,
        seconds=seconds,
    )
    size = 2 if device.type == "cuda" else 4
    moved = 2 * (5 if backward else 2) * shape.B * shape.T * shape.H * shape.K * size
    for row in (row for row in rows if "median_s" in row):
        row["over_copy_rate"] = moved / row["median_s"] / copy_rate
    compare_with_peers(rows)
    notes = _bandwidth_note(rows) if device.type == "cuda" else []
    return {"label": f"{norm_title(together)} {_passes(backward)}, {shape}", "rows": rows, "notes": notes}


def _bandwidth_note(rows: list[dict[str, Any]]) -> list[str]:
    reached = next((row["over_copy_rate"] for row in rows if row["ours"] and "over_copy_rate" in row), None)
    if reached is None:
        return ["ours was not timed; the aim cannot be checked"]
    return [
        verdict(f"ours: {reached:.0%} of the copy rate (aim: {BANDWIDTH_AIM:.0%} or more)", reached >= BANDWIDTH_AIM)
    ]


# ------------------------------------------------------------------------------------------------ the door


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=90)
    budget = Budget(options.seconds)
    device = harness.choose_device(options.device)
    smoke = options.quick or device.type == "cpu"
    report = Report("attention", harness.describe_machine(device), COLUMNS, out=options.out, smoke=smoke)
    found, absent = ways(device)
    report.data["absent"] = absent
    work = {
        f"{norm_title(together)}, {shape}": partial(norms, report, options, device, shape, together)
        for shape, together in norm_shapes(device)
    }
    shapes = attention_shapes(device, options.quick)
    work |= {f"attention, {shape}": partial(attentions, report, options, device, shape, found) for shape in shapes}
    if device.type == "cuda":  # last, because most of its time is compilation
        work |= {
            f"attention beside FlexAttention, {shape}": partial(beside_flex, report, options, device, shape, found)
            for shape in shapes
            if shape.T == FLEX_LENGTH
        }
    return report.run(work, budget)


def norms(report: Report, options, device: torch.device, shape: Shape, together: bool, seconds: float) -> None:
    """Measure the forward pass, then both passes, with the same compiled function."""
    copy_rate = report.data["ceilings"]["copy_bytes_per_s"]
    found, absent = norm_variants(device, together)
    report.data["absent"] += [text for text in absent if text not in report.data["absent"]]
    for backward in (False, True):
        report.add(measure_norm(shape, together, backward, found, seconds / 2, device, options, copy_rate))


def attentions(
    report: Report, options, device: torch.device, shape: Shape, found: list[Way], seconds: float, title="attention"
) -> None:
    """Measure the forward pass, then both passes, with the same compiled functions."""
    found = harness.kept(found, options.without)
    for backward in (False, True):
        report.add(measure_attention(shape, backward, found, seconds / 2, device, options, title))


def beside_flex(report: Report, options, device: torch.device, shape: Shape, found: list[Way], seconds: float) -> None:
    found = [way for way in found if way.ours] + flex_ways(shape, device)
    attentions(report, options, device, shape, found, seconds, "attention beside FlexAttention,")


if __name__ == "__main__":
    sys.exit(main())
