"""What the benchmarks share: the machine's ceilings, fair timing, checked outputs.

    python -m benchmarks.harness        writes the tables of benchmarks/README.md from benchmarks/results/*.json

The rules that every number obeys: variants take turns, in an order that moves on by one each round; each round has
fresh random inputs, made outside of what is timed; the first round is not counted, compilers work there; a variant
whose outputs do not agree with the definition is not timed; the median is reported beside the fastest and the slowest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import DeviceLost, first_line, write_readme_tables
from scaling_testbed.processes.device import device_name

LEAST_ROUNDS = 3
# Longer than launching a call takes: by the time the GPU wakes up the whole call is queued, as in a training step,
# where the host runs ahead of the GPU. A call that waits for the GPU itself still pays for it.
SLEEP_CYCLES = 4_000_000
POISON_BYTES = 2**30
OUT_OF_MEMORY = "out of memory"

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute something. run(*inputs) returns outputs by name; those that `expects` names must agree with
    them. `ours` tells this project's from its peers'."""

    name: str
    run: Callable[..., Outputs]
    expects: str = "plain"
    ours: bool = False


# ------------------------------------------------------------------------------------------------ the machine


def choose_device(name: str) -> torch.device:
    """auto is the GPU where PyTorch sees one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name, memory and the two measured ceilings of `device`, for the head of a result."""
    found = {"machine": device_name(device), "device": device.type, "ceilings": measure_ceilings(device)}
    if device.type == "cuda":
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        found["machine"] += f", {cores} cores"
        found["threads"] = torch.get_num_threads()
    return found


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Rates that nothing on this machine beats: FLOP/s of a large matrix product (bf16 on a GPU, fp32 on a CPU), and
    bytes read plus bytes written per second of a copy."""
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    size = 2**30 if on_gpu else 2**28
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = _median_seconds(lambda: torch.mm(a, b), device)
    # Random bytes: a GPU moves zeros with less power, and so at higher clocks.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    return {"product_flops_per_s": 2 * n**3 / product, "copy_bytes_per_s": 2 * size / copy}


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    seconds = [timed(call, device)[0] for _ in range(13)]
    return statistics.median(seconds[3:])


# ------------------------------------------------------------------------------------------------ one call


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Seconds that `call` took, and on a GPU the most bytes it held beyond those in use before it."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began, None
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # What the caches hold of the inputs is written over: no variant finds them warm from the one before.
    torch.empty(2**28, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3, torch.cuda.max_memory_allocated(device) - held


def peak_memory_in_child(run: Callable[..., Outputs], make_inputs: Callable[[int], tuple]) -> int | None:
    """Bytes by which one call raises the resident memory of a forked process; None where Linux's /proc is missing.

    To be asked after `run` has been called once, so that what a first call imports is not counted. The child has one
    thread: a pool of threads does not survive a fork.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_peak_child, args=(sender, run, make_inputs))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None  # the system ended it, most likely for want of memory; the timed run will tell
    finally:
        process.join()


def _peak_child(sender, run, make_inputs) -> None:
    torch.set_num_threads(1)
    peak = None
    with contextlib.suppress(Exception):
        inputs = make_inputs(0)
        _forget_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
        before = _resident("VmRSS")
        run(*inputs)
        peak = _resident("VmHWM") - before
    sender.send(peak)


def _forget_free_memory() -> None:
    """Give what earlier calls left in the allocator back to the system: used again, it would not be counted."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations get, so that an output that was not written shows. What other
    variants have freed goes back first: the allocator would prefer it, and it holds right answers."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.full((POISON_BYTES // 4,), float("nan"), device=device)


# ------------------------------------------------------------------------------------------------ a comparison


def compare(
    variants: Sequence[Variant],
    make_inputs: Callable[[int], tuple],
    trusted: dict[str, Callable[..., Outputs]],
    *,
    device: torch.device,
    tolerance: dict[str, float],
    rounds: int,
    seconds: float,
    pick: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[dict[str, Any]]:
    """Check all variants, then time them in turns; a row of results for each.

    make_inputs(seed) -> fresh inputs. trusted: what a variant `expects`, computed by the definition, of which only
    pick(output) is compared; tolerance: output name (or "" for all others) -> largest relative error in norm.
    Not fewer than LEAST_ROUNDS rounds, then no new round after `seconds`.
    """
    rows = [{"variant": v.name, "ours": v.ours, "status": "ok", "seconds": [], "peak_bytes": None} for v in variants]
    _check(variants, rows, make_inputs, trusted, device, tolerance, pick)
    if device.type == "cpu":
        for variant, row in zip(variants, rows, strict=True):
            row["peak_bytes"] = peak_memory_in_child(variant.run, make_inputs)
    began = time.monotonic()
    for number in range(-1, rounds):
        if number >= LEAST_ROUNDS and time.monotonic() - began > seconds:
            break
        inputs = make_inputs(number + 2)
        for place in range(len(variants)):
            index = (place + number) % len(variants)
            if rows[index]["status"] == "ok":
                _time_once(variants[index], rows[index], inputs, device, counted=number >= 0)
        del inputs
    for row in rows:
        if row["status"] == "ok":
            row |= {"median_s": statistics.median(row["seconds"])}
            row |= {"low_s": min(row["seconds"]), "high_s": max(row["seconds"])}
    return rows


def _time_once(variant: Variant, row: dict, inputs: tuple, device: torch.device, counted: bool) -> None:
    with _attempt(row):
        _forget_gradients(inputs)
        seconds, peak = timed(lambda: variant.run(*inputs), device)
        if counted:
            row["seconds"].append(seconds)
            row["peak_bytes"] = row["peak_bytes"] if peak is None else max(peak, row["peak_bytes"] or 0)


def _check(variants, rows, make_inputs, trusted, device, tolerance, pick) -> None:
    """Set the status of each row whose variant fails or disagrees; this call also compiles what gets compiled."""
    inputs = make_inputs(0)
    expected = {name: trusted[name](*inputs) for name in {variant.expects for variant in variants}}
    for variant, row in zip(variants, rows, strict=True):
        with _attempt(row):
            _forget_gradients(inputs)
            poison(device)
            outputs = variant.run(*inputs)
            wanted = expected[variant.expects]
            row["errors"] = {name: _relative_error(pick(outputs[name]), value) for name, value in wanted.items()}
            del outputs
            wrong = {
                name: error
                for name, error in row["errors"].items()
                if not error <= tolerance.get(name, tolerance.get("", 0.0))
            }
            if wrong:
                name, error = max(wrong.items(), key=lambda item: item[1])
                row["status"] = f"wrong, not timed: {name} off by {error:.1e}"
    _forget_gradients(inputs)


def _relative_error(value: Tensor, expected: Tensor) -> float:
    difference = value.detach().to(expected.dtype) - expected
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected)).item()


def _forget_gradients(inputs: tuple) -> None:
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None


@contextlib.contextmanager
def _attempt(row: dict):
    """Turn what goes wrong inside into the row's status, and give the memory back. Raises DeviceLost where the GPU
    answers no more, as after an access out of bounds: nothing of this process can be timed from then on."""
    try:
        yield
        return
    except Exception as error:
        row["status"] = OUT_OF_MEMORY if is_out_of_memory(error) else f"failed: {first_line(error)}"
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"the GPU was lost in {row['variant']} ({row['status']}); go on with --without") from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# ------------------------------------------------------------------------------------------------ options


def kept(variants: Sequence, without: Sequence[str]) -> list:
    """Those whose name holds none of the texts that the user wants to do without."""
    return [variant for variant in variants if not any(text.lower() in variant.name.lower() for text in without)]


def arguments(doc: str, argv: Sequence[str] | None, seconds: float, *, peers: bool = True) -> argparse.Namespace:
    """The options that all benchmarks have; --without only where there are `peers` to do without."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=seconds, help="start no new shape after this long")
    parser.add_argument("--rounds", type=int, default=20, help="at most so many rounds of each comparison")
    if peers:
        parser.add_argument(
            "--without", nargs="+", default=[], metavar="TEXT", help="leave out variants named like this"
        )
    parser.add_argument("--out", type=Path, help="folder for the result (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="smaller, to see that it works or to fit a short slot")
    return parser.parse_args(argv)


if __name__ == "__main__":
    write_readme_tables()
