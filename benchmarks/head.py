"""The linear cross-entropy head: forward and backward pass, this project's implementation beside its peers.

    python -m benchmarks.head [--device cpu] [--seconds S] [--out DIR] [--quick] [--widths D,D] [--chunk-mib N,N]
    python -m benchmarks.head --micro-batches N [...]

A call takes hidden states [N, D], the head's weight [V, D] and targets [N]. It returns the loss (summed, with z-loss if
the implementation has one) and both gradients. On a GPU both inputs are bf16. This project sums the head's gradient in
fp32 over all chunks and rounds it once; most peers do not. Peers that are not installed are named and left out.

--chunk-mib times the chunked head at further sizes of a chunk as well (loss.chunk_mib). On a GPU this always includes
half of its L2 cache: see cached_chunk_bytes in kernels/cross_entropy/chunked.py.

--micro-batches splits the tokens into N micro-batches, as a step of training does. The head and its gradient are fp32,
and autocast makes the products on a GPU bf16. The second and later micro-batches meet a .grad that exists. Either
autograd adds the head's gradient to it, which takes a second tensor of its size, or our forward pass does (`into`).
On a CPU the times are processor time, because the difference is small.

floor: the time of the three matrix products at the machine's measured rate, plus the time of one in-place pass over the
logits at its measured copy rate. A logit is written by the product (1 access), read for log Z (1), read and overwritten
by its gradient (2), and read by the products for the gradients of hidden states and weight (2). These are 6 accesses,
for bf16 12 V bytes per token.
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Outputs, Variant
from benchmarks.report import Budget, Report, first_line, verdict
from scaling_testbed.kernels.cross_entropy import chunked as our_chunked
from scaling_testbed.kernels.cross_entropy import reference

Shape = tuple[int, int, int]  # N, D, V

GPU_SHAPES = [
    (32768, D, V) for D, V in ((256, 50304), (768, 50304), (768, 128256), (2048, 128256), (2048, 256000), (128, 50304))
]
CPU_SHAPES = [(4096, 256, 50304)]
QUICK_SHAPES = {"cuda": [(4096, 128, 8192), (4096, 768, 8192)], "cpu": [(256, 64, 4096)]}
TRAINED = "ours, chunked"  # the default of training
ADDED = "straight into .grad"
Z_LOSS = 1e-2  # a hundred times the usual value, so that the check detects a missing or wrong z-loss
LOGIT_STD = 3.0  # the softmax is as peaked as in a trained model: few probabilities are large, most are near zero
# Relative errors in norm. bf16 logits near 12 have errors of up to 0.03, and so have their probabilities.
TOLERANCE = {"cuda": {"loss": 5e-3, "": 3e-2}, "cpu": {"loss": 1e-5, "": 1e-4}}
COLUMNS = [
    ("median_s", "ms", "ms"),
    ("low_s", "min", "ms"),
    ("high_s", "max", "ms"),
    ("peak_bytes", "peak MiB", "MiB"),
    ("best_peer_over_this", "best peer / this", "ratio"),
    ("floor_over_this", "floor / this", "ratio"),
    ("peak_over_leanest_peer", "peak / leanest peer", "ratio"),
]


# ------------------------------------------------------------------------------------------------ variants

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def variant(name: str, loss: Loss, *, z: bool = True, ours: bool = False) -> Variant:
    """The variant of a loss ([N, D], [V, D], [N] -> scalar), with its backward pass."""

    def run(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Outputs:
        value = loss(hidden_ND, weight_VD, targets_N)
        value.backward()
        return {"loss": value.detach(), "hidden gradient": hidden_ND.grad, "weight gradient": weight_VD.grad}

    return Variant(name if z else f"{name}, without z", run, "with z" if z else "without z", ours)


def plain_loss(hidden_ND, weight_VD, targets_N):
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N, reduction="sum")


def plain_loss_with_z(hidden_ND, weight_VD, targets_N):
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    ce = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    return ce + Z_LOSS * logits_NV.logsumexp(dim=-1).square().sum()


def our_loss(hidden_ND, weight_VD, targets_N, *, function, **options):
    return function(hidden_ND, weight_VD, targets_N, z_loss=Z_LOSS, **options).loss


def chunk_sizes(loss: Loss, chunk_mib: Sequence[int]) -> list[Variant]:
    """Variants of our chunked head that hold so many MiB of logits at once."""
    return [
        variant(f"ours, chunks of {mib} MiB", partial(loss, chunk_bytes=mib * 2**20), ours=True) for mib in chunk_mib
    ]


def cpu_variants(_shape: Shape, chunk_mib: Sequence[int]) -> tuple[list[Variant], list[str]]:
    """The variants to time on a CPU, and the reasons why others are left out."""
    chunked = partial(our_loss, function=our_chunked.linear_cross_entropy)
    native, absent = torch_native()
    return [
        variant("ours, chunked", chunked, ours=True),
        *chunk_sizes(chunked, chunk_mib),
        variant("F.cross_entropy + z", plain_loss_with_z),
        variant("F.cross_entropy", plain_loss, z=False),
        *native,
    ], absent


def gpu_variants(shape: Shape, chunk_mib: Sequence[int]) -> tuple[list[Variant], list[str]]:
    """The variants to time on a GPU for this shape, and the reasons why others are left out."""
    torch._dynamo.reset()  # a compiled variant is compiled for this shape only
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    found, absent = our_triton(shape, [our_chunked.cached_chunk_bytes(cache) // 2**20, *chunk_mib])
    chunked = partial(our_loss, function=our_chunked.linear_cross_entropy)
    found += [
        variant("ours, chunked, without Triton", chunked, ours=True),
        variant("F.cross_entropy + z", plain_loss_with_z),
        variant("F.cross_entropy + z, compiled", torch.compile(plain_loss_with_z, dynamic=False)),
    ]
    for peer in (torch_native, liger, cut_cross_entropy):
        variants, missing = peer()
        found, absent = found + variants, absent + missing
    return found, absent


def our_triton(shape: Shape, chunk_mib: Sequence[int]) -> tuple[list[Variant], list[str]]:
    heads, absent = triton_heads(shape)
    losses = {name: partial(our_loss, function=function) for name, function in heads.items()}
    found = [variant(f"ours, {name}", loss, ours=True) for name, loss in losses.items()]
    return found + (chunk_sizes(losses["chunked"], chunk_mib) if losses else []), absent


def triton_heads(shape: Shape) -> tuple[dict[str, Callable], list[str]]:
    """Our heads in Triton that support this shape, by name, or the reason why there are none."""
    try:
        from scaling_testbed.kernels.cross_entropy import triton as cross_entropy
    except ImportError as error:
        return {}, [f"ours in Triton: {first_line(error)}"]
    names = [
        name for name in cross_entropy.OPERATORS if name != "recompute" or shape[1] <= cross_entropy.WIDEST_RECOMPUTE
    ]
    return {name: partial(cross_entropy.linear_cross_entropy, variant=name) for name in names}, []


def micro_batches(shape: Shape, number: int, device: torch.device) -> tuple[list[Variant], list[str]]:
    """The variants to time in `number` micro-batches, and the reasons why others are left out."""
    heads, absent = {"chunked": our_chunked.linear_cross_entropy}, []
    if device.type == "cuda":
        heads, absent = triton_heads(shape)
    losses = {f"ours, {name}": partial(our_loss, function=function) for name, function in heads.items()}
    found = [
        in_micro_batches(f"{name}, {ADDED if straight else 'added by autograd'}", loss, number, straight)
        for name, loss in losses.items()
        for straight in (False, True)
    ]
    return [*found, in_micro_batches("F.cross_entropy + z", plain_loss_with_z, number, None)], absent


def in_micro_batches(name: str, loss: Loss, number: int, straight: bool | None) -> Variant:
    """The variant of a loss over micro-batches. straight: whether it adds to .grad itself; None: it is a peer's."""

    def run(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Outputs:
        rows = -(-len(hidden_ND) // number)
        parts = [part.requires_grad_() for part in hidden_ND.detach().split(rows)]
        values = []
        for part, targets in zip(parts, targets_N.split(rows), strict=True):
            more = {"into": our_chunked.AddInto(weight_VD.grad)} if straight and weight_VD.grad is not None else {}
            with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
                values.append(loss(part, weight_VD, targets, **more))
            values[-1].backward()
        value = torch.stack([value.detach() for value in values]).sum()
        grad_ND = torch.cat([part.grad for part in parts])
        return {"loss": value, "hidden gradient": grad_ND, "weight gradient": weight_VD.grad}

    return Variant(name, run, "with z", straight is not None)


def liger() -> tuple[list[Variant], list[str]]:
    """Liger's fused linear cross-entropy, with the head's gradient summed in bf16 (its default) or in fp32."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except Exception as error:
        return [], [_absence("liger-kernel", error)]

    def loss(hidden_ND, weight_VD, targets_N, *, accum_dtype):
        criterion = LigerFusedLinearCrossEntropyLoss(reduction="sum", lse_square_scale=Z_LOSS, accum_dtype=accum_dtype)
        return criterion(weight_VD, hidden_ND, targets_N)

    return [
        variant("Liger", partial(loss, accum_dtype=None)),
        variant("Liger, sums in fp32", partial(loss, accum_dtype=torch.float32)),
    ], []


def cut_cross_entropy() -> tuple[list[Variant], list[str]]:
    """Cut cross-entropy in two variants.

    `cce` skips blocks of small gradients. `cce_kahan_full_c` does not skip them for the head, and uses Kahan summation.
    The release on PyPI (25.1.1) has neither the second variant nor return_lse; later sources have both.
    """
    try:
        from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy
    except Exception as error:
        return [], [_absence("cut-cross-entropy", error)]
    z = "return_lse" in inspect.signature(linear_cross_entropy).parameters

    def loss(hidden_ND, weight_VD, targets_N, *, impl):
        if not z:
            return linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="sum", impl=impl)
        ce, log_z_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="sum", impl=impl, return_lse=True)
        return ce + Z_LOSS * log_z_N.square().sum()

    known = {member.name.lower() for member in LinearCrossEntropyImpl}
    wanted = ("cce", "cce_kahan_full_c")
    found = [variant(f"cut-cross-entropy {impl}", partial(loss, impl=impl), z=z) for impl in wanted if impl in known]
    return found, [f"cut-cross-entropy {impl}: not in this version" for impl in wanted if impl not in known]


def torch_native() -> tuple[list[Variant], list[str]]:
    """PyTorch's linear cross-entropy (2.13 and later), with its default options.

    Its other path is that of F.cross_entropy. It has no z-loss. With bf16 inputs on CPUs, its sum was observed to be a
    few percent too low.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [], [f"torch.nn.functional.linear_cross_entropy: not in torch {torch.__version__}"]
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden_ND, weight_VD, targets_N):
        return F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="sum", options=options)

    return [variant("torch's linear_cross_entropy", loss, z=False)], []


def _absence(package: str, error: Exception) -> str:
    """The reason why a peer is left out. With another version of Triton, its import can fail with any exception."""
    missing = isinstance(error, ImportError) and (error.name or "").split(".")[0] == package.replace("-", "_")
    return f"{package}: not installed" if missing else f"{package}: cannot be imported ({first_line(error)})"


# ------------------------------------------------------------------------------------------------ the truth


def trusted(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, z_loss: float, rows: int = 1024) -> Outputs:
    """The definition in fp32 on the same inputs, computed for `rows` tokens at a time so that it fits in memory."""
    weight = weight_VD.detach().float().requires_grad_()
    loss = hidden_ND.new_zeros((), dtype=torch.float32)
    grad_hidden_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
    grad_weight_VD = torch.zeros_like(weight)
    for begin in range(0, len(hidden_ND), rows):
        chunk = slice(begin, begin + rows)
        hidden = hidden_ND[chunk].detach().float().requires_grad_()
        ce_N, log_z_N = reference.linear_cross_entropy(hidden, weight, targets_N[chunk])
        part = ce_N.sum() + z_loss * log_z_N.square().sum()
        grad_hidden_ND[chunk], grad = torch.autograd.grad(part, (hidden, weight))
        grad_weight_VD += grad
        loss += part.detach()
    return {"loss": loss, "hidden gradient": grad_hidden_ND.detach(), "weight gradient": grad_weight_VD.detach()}


TRUSTED = {"with z": partial(trusted, z_loss=Z_LOSS), "without z": partial(trusted, z_loss=0.0)}


def make_inputs(seed: int, *, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    N, D, V = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=random, device=device, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=random, device=device, dtype=dtype).mul_(LOGIT_STD / D**0.5)
    return hidden_ND, weight_VD.requires_grad_(), torch.randint(V, (N,), generator=random, device=device)


def make_trained_inputs(seed: int, *, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """As in training: the head is fp32. Its values are those of make_inputs, so that its rounding changes nothing."""
    hidden_ND, weight_VD, targets_N = make_inputs(seed, shape=shape, device=device)
    return hidden_ND, weight_VD.detach().float().requires_grad_(), targets_N


# ------------------------------------------------------------------------------------------------ the figures


def floor_seconds(shape: Shape, dtype: torch.dtype, ceilings: dict[str, float]) -> float:
    """The lower bound of the time by the measured limits, as derived at the top of this file."""
    N, D, V = shape
    return 6 * N * D * V / ceilings["product_flops_per_s"] + 6 * dtype.itemsize * N * V / ceilings["copy_bytes_per_s"]


def compare_with_peers(rows: list[dict[str, Any]], floor: float) -> None:
    """Add to each row the ratios to the fastest peer, to the peer with the least memory, and to the floor."""
    timed = [row for row in rows if "median_s" in row]
    peers = [row for row in timed if not row["ours"]]
    lean = [row["peak_bytes"] for row in peers if row["peak_bytes"]]
    for row in timed:
        row["floor_over_this"] = floor / row["median_s"]
        if peers:
            row["best_peer_over_this"] = min(peer["median_s"] for peer in peers) / row["median_s"]
        if lean and row["peak_bytes"]:
            row["peak_over_leanest_peer"] = row["peak_bytes"] / min(lean)


def cpu_claim(rows: list[dict[str, Any]]) -> str:
    """The claim of this project about CPUs, compared with the measurement."""
    named = {row["variant"]: row for row in rows}
    ours, peer = named.get("ours, chunked", {}), named.get("F.cross_entropy + z", {})
    if "median_s" not in ours or "median_s" not in peer:
        return "the claim cannot be checked: one side was not timed"
    # Ratios round by round: other load on the machine slows both sides of a round.
    time = statistics.median(a / b for a, b in zip(ours["seconds"], peer["seconds"], strict=True))
    less = peer["peak_bytes"] / ours["peak_bytes"] if ours["peak_bytes"] and peer["peak_bytes"] else float("nan")
    return verdict(
        f"ours beside F.cross_entropy + z: peak memory 1/{less:.1f} (claimed: at most 1/15), "
        f"time {time:.2f}x in the median round (claimed: at most 1.1x)",
        less >= 15 and time <= 1.1,
    )


def gain_of_adding(rows: list[dict[str, Any]]) -> list[str]:
    """Of each of our heads: the time and the peak memory of adding straight into .grad beside adding by autograd."""
    named, notes = {row["variant"]: row for row in rows if "median_s" in row}, []
    for name in named:
        ours, plain = named[name], named.get(name.replace(ADDED, "added by autograd"))
        if ADDED not in name or plain is None:
            continue
        share = statistics.median(a / b for a, b in zip(ours["seconds"], plain["seconds"], strict=True))
        held = f", {ours['peak_bytes'] / plain['peak_bytes']:.2f} of its peak memory" if plain["peak_bytes"] else ""
        notes.append(f"{name}: {share:.3f} of the time of adding by autograd in the median round{held}")
    return notes


def gpu_aims(rows: list[dict[str, Any]], shape: Shape, budget_bytes: int) -> list[str]:
    """The aims for this shape, compared with the result of the head that training uses.

    budget_bytes: the size of its buffer of logits.
    """
    ours = next((row for row in rows if row["variant"] == TRAINED), {})
    if "best_peer_over_this" not in ours:
        return [f"{TRAINED}: no peer, or not timed itself; the aims cannot be checked"]
    wanted = 1.3 if shape[1] == 256 else 1.0
    faster, over_floor = ours["best_peer_over_this"], 1 / ours["floor_over_this"]
    peak = ours["peak_bytes"]
    most = peak / ours["peak_over_leanest_peer"] + budget_bytes
    return [
        verdict(f"{TRAINED}: best peer / this {faster:.2f} (aim: {wanted} or more)", faster >= wanted),
        verdict(f"{TRAINED}: this / floor {over_floor:.2f} (aim: 1.4 or less)", over_floor <= 1.4),
        verdict(
            f"{TRAINED}: peak {peak / 2**20:,.0f} MiB (aim: the leanest peer's and the budget, {most / 2**20:,.0f})",
            peak <= most,
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    more = {
        "--widths": "model widths D to measure, such as 96,256, in place of the standard shapes",
        "--chunk-mib": "further sizes of a chunk of logits, such as 16,32,64",
        "--micro-batches": "measure the head in so many micro-batches, whose gradients are added to .grad",
    }
    options = harness.arguments(__doc__, argv, seconds=110, more=more)
    options.chunk_mib = integers(options.chunk_mib)
    options.micro_batches = int(options.micro_batches or 1)
    device = harness.choose_device(options.device)
    # A floor is valid only if no other process uses the machine between its measurement and that of the calls.
    columns = [column for column in COLUMNS if device.type == "cuda" or column[0] != "floor_over_this"]
    if options.micro_batches > 1 and device.type == "cpu":
        columns = [(key, "CPU ms" if title == "ms" else title, form) for key, title, form in columns]
    # Three names, so that none takes the place of another.
    name = "micro_batches" if options.micro_batches > 1 else "widths" if options.widths else "head"
    machine = harness.describe_machine(device)
    report = Report(name, machine, columns, out=options.out, smoke=options.quick, module="head")
    shapes = QUICK_SHAPES[device.type] if options.quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    if options.widths:
        shapes = [(shapes[0][0], D, shapes[0][2]) for D in integers(options.widths)]
    labels = ("N {}, D {}, V {}".format(*shape) for shape in shapes)
    pieces = (partial(measure, report, options, device, shape) for shape in shapes)
    return report.run(dict(zip(labels, pieces, strict=True)), Budget(options.seconds))


def integers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def measure(report: Report, options, device: torch.device, shape: Shape, seconds: float) -> None:
    """Add the comparison of one shape to the report."""
    on_gpu, split = device.type == "cuda", options.micro_batches > 1
    if split:
        variants, absent = micro_batches(shape, options.micro_batches, device)
    else:
        variants, absent = (gpu_variants if on_gpu else cpu_variants)(shape, options.chunk_mib)
    report.data["absent"] = absent
    rows = harness.compare(
        harness.kept(variants, options.without),
        partial(make_trained_inputs if split else make_inputs, shape=shape, device=device),
        TRUSTED,
        device=device,
        tolerance=TOLERANCE[device.type],
        rounds=options.rounds,
        seconds=seconds,
        clock=time.process_time if split else time.perf_counter,
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    floor = floor_seconds(shape, dtype, report.data["ceilings"])
    compare_with_peers(rows, floor)
    if split:
        notes = gain_of_adding(rows)
    elif on_gpu:
        N, _, V = shape
        row_bytes = dtype.itemsize * V
        held = row_bytes * our_chunked.chunk_rows(N, row_bytes, 0, device)
        notes = gpu_aims(rows, shape, max(held, our_chunked.DEFAULT_CHUNK_BYTES["cuda"]))
    else:
        notes = [cpu_claim(rows)] if shape in CPU_SHAPES else []
    report.add(
        {
            "label": "N {}, D {}, V {}".format(*shape) + f", {options.micro_batches} micro-batches" * split,
            "dtype": str(dtype),
            "floor_s": floor,
            "rows": rows,
            "notes": notes,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
