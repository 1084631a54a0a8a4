"""Registers, spills and shared memory of every Triton kernel, from its compilation. This needs no GPU.

    python -m benchmarks.kernel_resources [--sm 80 90 100] [--only TEXT ...] [--json]

Each case calls an operator on CPU tensors and compiles the kernels instead of launching them. Types, alignment and
strides are specialised as in a real launch. Every compilation has its own process, because the compiler may abort.
`shared` is the shared memory that a launch requests. `stack` is the local memory in bytes per thread, i.e. spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # an operator's first call imports it; import it once here and not in each process

from scaling_testbed.kernels import support

# Maximum bytes of shared memory of one block, by compute capability (CUDA C Programming Guide, table 30).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")


class Job(NamedTuple):
    """A call that launches kernels, to be compiled for compute capability `sm`."""

    name: str
    call: Callable[[], object]
    sm: int


def jobs(sms: list[int]) -> list[Job]:
    """Every case for every compute capability."""
    return [Job(name, call, sm) for sm in sms for name, call in cases().items()]


def cases() -> dict[str, Callable[[], object]]:
    """Name -> a call that launches kernels, for every tile configuration in use."""
    return {**_attention_cases(), **_cross_entropy_cases(), **_qk_norm_rope_cases()}


def _attention_cases() -> dict[str, Callable[[], object]]:
    """The cases of attention.

    In bf16, d_head 128, which needs the most registers, has every combination of features, and other widths have the
    plain kernel. All widths and types have softcap with window, with and without documents and statistics. Heads are
    grouped if there is a window.
    """
    import scaling_testbed.kernels.attention.triton  # noqa: F401 - it defines the operators that the cases call
    from scaling_testbed.kernels.limits import ATTENTION_D_HEADS

    found = {}
    features = list(itertools.product((None, 50.0), (None, 100), (False, True), (False, True)))
    for d_head, dtype in itertools.product(ATTENTION_D_HEADS, (torch.bfloat16, torch.float32)):
        for softcap, window, documents, statistics in features:
            named = " softcap" * bool(softcap) + " window" * bool(window) + " documents" * documents
            named += " stats" * statistics
            every = dtype == torch.bfloat16 and (d_head == 128 or named == "")
            if not every and not (softcap and window):
                continue
            name = f"d{d_head} {_short(dtype)}{named}"
            arguments = (d_head, dtype, softcap, window, documents)
            found[f"attention forward {name}"] = partial(_call_attention, *arguments, statistics)
            name = name.removesuffix(" stats")
            found[f"attention backward {name}"] = partial(_call_attention_backward, *arguments)
    return found


def _attention_inputs(d_head: int, dtype: torch.dtype, window: int | None):
    heads, groups = (4, 2) if window else (2, 2)
    return (torch.empty(1, 256, n, d_head, dtype=dtype).transpose(1, 2) for n in (heads, groups, groups))


def _begins(documents: bool) -> torch.Tensor | None:
    return torch.zeros(1, 256, dtype=torch.int32) if documents else None


def _call_attention(d_head, dtype, softcap, window, documents, statistics) -> None:
    tensors = *_attention_inputs(d_head, dtype, window), _begins(documents)
    torch.ops.scaling_testbed.attention(*tensors, d_head**-0.5, softcap, window, statistics)


def _call_attention_backward(d_head, dtype, softcap, window, documents) -> None:
    q, k, v = _attention_inputs(d_head, dtype, window)
    tensors = q, q, k, v, q, torch.empty(q.shape[:3]), _begins(documents)
    torch.ops.scaling_testbed.attention_backward(*tensors, d_head**-0.5, softcap, window)


def _cross_entropy_cases() -> dict[str, Callable[[], object]]:
    from scaling_testbed.kernels.cross_entropy import triton as cross_entropy
    from scaling_testbed.kernels.cross_entropy.chunked import AddInto

    found = {}
    for variant, width, columns in (
        ("chunked", 768, 50257),
        ("chunked", 768, 4096),
        ("wide_rows", 768, 50257),
        ("wide_rows", 768, 8192),
        ("wide_rows", 768, 16384),
        ("recompute", 64, 50257),
        ("recompute", 96, 50257),
        ("recompute", 128, 50257),
    ):
        for dtype, softcap, want, weighted in (
            (torch.bfloat16, None, True, False),
            (torch.bfloat16, 30.0, True, False),
            (torch.bfloat16, 30.0, True, True),
            (torch.bfloat16, 30.0, False, False),
            (torch.float32, 30.0, True, False),
            (torch.float32, 30.0, True, True),
        ):
            V = -(-columns // 64) * 64 if dtype == torch.bfloat16 else columns
            weights = torch.empty(16) if weighted else None
            arguments = (weights, 1e-4, softcap, -100, dtype, 0, want, want)
            row = "" if columns == 50257 else f" V {columns}"
            features = row + " softcap" * bool(softcap) + " weights" * weighted + " no gradient" * (not want)
            call = partial(_call_cross_entropy, cross_entropy.OPERATORS[variant], width, V, arguments)
            found[f"cross_entropy {variant} d{width} {_short(dtype)}{features}"] = call
            if variant == "recompute" and want:  # the other variants add in a matrix product
                compute = partial(cross_entropy.COMPUTE[variant], into=AddInto(torch.empty(V, width), 0.5))
                call = partial(_call_cross_entropy, compute, width, V, arguments)
                found[f"cross_entropy {variant} d{width} {_short(dtype)}{features} added"] = call
    return found


def _call_cross_entropy(operator, width: int, V: int, arguments: tuple) -> None:
    dtype = arguments[4]
    hidden, weight = torch.empty(16, width, dtype=dtype), torch.empty(V, width, dtype=dtype)
    operator(hidden, weight, torch.zeros(16, dtype=torch.int64), *arguments)


def _qk_norm_rope_cases() -> dict[str, Callable[[], object]]:
    cases = [(f"{kind} d64", kind, 64, (12, 4), False, torch.bfloat16) for kind in ("rmsnorm", "none")]
    # Layernorm needs the most registers.
    for d_head, dtype in [(d_head, torch.bfloat16) for d_head in (32, 64, 80, 96, 128)] + [(64, torch.float32)]:
        cases.append((f"layernorm d{d_head}", "layernorm", d_head, (12, 4), False, dtype))
    # Of all heads together: padded heads, padded features, grouped heads, and the widest model of each paper.
    for heads, d_head in (((12, 12), 64), ((4, 4), 24), ((8, 8), 72), ((12, 4), 64), ((32, 32), 128), ((64, 64), 64)):
        name = f"of {heads[0]} and {heads[1]} heads d{d_head}"
        cases.append((f"layernorm {name}", "layernorm", d_head, heads, True, torch.bfloat16))
    cases.append(("rmsnorm of 12 and 12 heads d64", "rmsnorm", 64, (12, 12), True, torch.bfloat16))
    cases.append(("layernorm of 12 and 12 heads d64", "layernorm", 64, (12, 12), True, torch.float32))
    # The widest row that is supported.
    cases.append(("layernorm of 64 and 64 heads d128", "layernorm", 128, (64, 64), True, torch.bfloat16))
    found = {}
    for name, *arguments, dtype in cases:
        name = f"qk_norm_rope {name} {_short(dtype)}"
        found[f"{name} forward"] = partial(_call_qk_norm_rope, *arguments, dtype, backward=False)
        found[f"{name} backward"] = partial(_call_qk_norm_rope, *arguments, dtype, backward=True)
    return found


def _call_qk_norm_rope(
    kind: str, d_head: int, heads: tuple[int, int], together: bool, dtype: torch.dtype, *, backward: bool
) -> None:
    from scaling_testbed.kernels.qk_norm_rope import triton as qk_norm_rope

    # As in the model: views of the projections' outputs, with more positions than one program processes.
    q, k = (torch.empty(2, 4096, n, d_head, dtype=dtype).transpose(1, 2) for n in heads)
    gains = [None if kind == "none" else torch.empty(d_head * (n if together else 1)) for n in heads]
    tables = (torch.empty(4096, d_head // 2),) * 2
    if backward:
        inputs = (None, None) if kind == "none" else (q, k)
        qk_norm_rope.backward_operator(q, k, *inputs, *gains, *tables, kind, 1e-6, together, dtype)
    else:
        qk_norm_rope.forward_operator(q, k, *gains, *tables, kind, 1e-6, together, dtype)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def measure(jobs: list[Job]) -> list[dict]:
    """The resources of every kernel that the jobs launch, in the order of the jobs.

    Runs one job per processor at a time. A job that fails gives one row with an `error`.
    """
    waiting, running, found = list(enumerate(jobs)), {}, {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            index, job = waiting.pop(0)
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=_child, args=(job, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (index, process)
        for receiver in multiprocessing.connection.wait(running):
            index, process = running.pop(receiver)
            try:
                found[index] = receiver.recv()
            except EOFError:
                process.join()
                found[index] = [{"kernel": "?", "error": f"the compiler ended with {process.exitcode}"}]
            process.join()
    return [{"sm": job.sm, "case": job.name} | row for index, job in enumerate(jobs) for row in found[index]]


def _child(job: Job, sender) -> None:
    try:
        sender.send(_compiled_rows(job.call, job.sm))
    except Exception as error:
        sender.send([{"kernel": "?", "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}])


def _compiled_rows(call, sm: int) -> list[dict]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    rows, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        rows.append(_resources(self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(_Offline(sm))
    JITFunction.run = compile_only
    call()
    return rows


class _Offline:
    """The functions of a driver that Triton needs for compilation, without a GPU."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)


def _resources(name: str, kernel) -> dict:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()
    found = {key: len(re.findall(rf"\b{key}\b", printed)) for key in MATRIX_INSTRUCTIONS}
    return {
        "kernel": name,
        "triton": triton.__version__,
        "warps": kernel.metadata.num_warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "matrix": " ".join(f"{key}:{count}" for key, count in found.items() if count),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel and line")
    arguments = parser.parse_args()
    if support.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = measure([job for job in jobs(arguments.sm) if any(text in job.name for text in arguments.only)])
    for row in rows if arguments.json else []:
        print(json.dumps(row))
    if not arguments.json:
        _print_table(rows)
    return int(any("error" in row for row in rows))


def _print_table(rows: list[dict]) -> None:
    print(f"sm   {'case':<48} {'kernel':<24} warps registers stack  shared matrix instructions")
    for row in rows:
        start = f"{row['sm']:<4} {row['case']:<48} {row['kernel']:<24}"
        if "error" in row:
            print(start + row["error"])
        else:
            numbers = (("warps", 6), ("registers", 10), ("stack", 6), ("shared", 8))
            print(start + "".join(f"{row[key]:>{width}}" for key, width in numbers), row["matrix"])


if __name__ == "__main__":
    sys.exit(main())
