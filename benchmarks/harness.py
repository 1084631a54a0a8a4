"""Shared functions of the benchmarks: measured limits of the machine, fair timing, checked outputs.

    python -m benchmarks.harness        writes the tables of benchmarks/README.md from benchmarks/results/*.json

Every number follows these rules:

- Variants alternate, and their order shifts by one each round.
- Each round has new random inputs, which are made outside the timed region.
- The first round is not counted, because it includes compilation.
- A variant is timed only if its outputs agree with the definition.
- The median is reported with the fastest and the slowest time.
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
# The GPU sleeps longer than the launch of a call takes. When it wakes up, the whole call is queued, as in a training
# step, where the host is ahead of the GPU. If a call itself waits for the GPU, the measured time includes this wait.
SLEEP_CYCLES = 4_000_000
POISON_BYTES = 2**30
OUT_OF_MEMORY = "out of memory"

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """One implementation of a computation.

    run: inputs -> outputs by name. expects: the name of the trusted outputs with which the outputs must agree. ours:
    whether the implementation belongs to this project.
    """

    name: str
    run: Callable[..., Outputs]
    expects: str = "plain"
    ours: bool = False


# ------------------------------------------------------------------------------------------------ the machine


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU if PyTorch finds one, and the CPU otherwise."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name, memory and the two measured limits of `device`, for the head of a result."""
    found = {"machine": device_name(device), "device": device.type, "ceilings": measure_ceilings(device)}
    if device.type == "cuda":
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        found["machine"] += f", {cores} cores"
        found["threads"] = torch.get_num_threads()
    return found


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Measured upper limits of rates on this machine.

    These are the FLOP/s of a large matrix product (bf16 on a GPU, fp32 on a CPU), and the bytes read plus bytes written
    per second of a copy.
    """
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    size = 2**30 if on_gpu else 2**28
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = _median_seconds(lambda: torch.mm(a, b), device)
    # Random bytes: a GPU copies zeros with less power, and so at a higher clock rate.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    return {"product_flops_per_s": 2 * n**3 / product, "copy_bytes_per_s": 2 * size / copy}


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    seconds = [timed(call, device)[0] for _ in range(13)]
    return statistics.median(seconds[3:])


# ------------------------------------------------------------------------------------------------ one call


def timed(call: Callable[[], object], device: torch.device, clock=time.perf_counter) -> tuple[float, int | None]:
    """Seconds of one call, and on a GPU its peak memory in bytes beyond the memory in use before it.

    clock: how a CPU measures: time.process_time counts processor time, also on a machine that others use.
    """
    if device.type != "cuda":
        began = clock()
        call()
        return clock() - began, None
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Overwrite the caches, so that no variant finds inputs that the previous variant has loaded.
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
    """Bytes by which one call raises the resident memory of a forked process; None without Linux's /proc.

    Call `run` once before, so that the imports of a first call are not counted. The child has one thread, because a
    pool of threads does not survive a fork.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_peak_child, args=(sender, run, make_inputs))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None  # the system ended the child, probably because memory ran out; the timed run shows this
    finally:
        process.join()


def _peak_child(sender, run, make_inputs) -> None:
    torch.set_num_threads(1)
    peak = None
    with contextlib.suppress(Exception):
        inputs = make_inputs(0)
        _forget_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _resident("VmRSS")
        run(*inputs)
        peak = _resident("VmHWM") - before
    sender.send(peak)


def _forget_free_memory() -> None:
    """Return the allocator's free memory to the system. If a call used it again, it would not be counted."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def poison(device: torch.device) -> None:
    """Fill the memory of the next allocations with NaN, so that an output that is never written is detected.

    First return the memory that other variants have freed: the allocator would reuse it, and it holds correct outputs.
    """
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
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Check all variants, then time them alternately. Returns a row of results for each variant.

    make_inputs: seed -> new inputs. trusted: name that a variant `expects` -> outputs by the definition. pick: the part
    of an output that is compared with them. clock: as for `timed`. tolerance: output name (or "" for all others) ->
    largest relative error in norm. There are at least LEAST_ROUNDS rounds; after these, no round starts later than
    `seconds`.
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
                _time_once(variants[index], rows[index], inputs, device, clock, counted=number >= 0)
        del inputs
    for row in rows:
        if row["status"] == "ok":
            row |= {"median_s": statistics.median(row["seconds"])}
            row |= {"low_s": min(row["seconds"]), "high_s": max(row["seconds"])}
    return rows


def _time_once(variant: Variant, row: dict, inputs: tuple, device: torch.device, clock, counted: bool) -> None:
    with _attempt(row):
        _forget_gradients(inputs)
        seconds, peak = timed(lambda: variant.run(*inputs), device, clock)
        if counted:
            row["seconds"].append(seconds)
            row["peak_bytes"] = row["peak_bytes"] if peak is None else max(peak, row["peak_bytes"] or 0)


def _check(variants, rows, make_inputs, trusted, device, tolerance, pick) -> None:
    """Set the status of each row whose variant fails or disagrees. This call also triggers compilation."""
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
    """Turn an exception into the row's status, and free the memory.

    Raises DeviceLost if the GPU no longer responds, e.g. after an access out of bounds. This process can then time
    nothing more.
    """
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
    """The variants whose name contains none of the texts of --without."""
    return [variant for variant in variants if not any(text.lower() in variant.name.lower() for text in without)]


def arguments(
    doc: str,
    argv: Sequence[str] | None,
    seconds: float | None,
    *,
    peers: bool = True,
    more: dict[str, str] | None = None,
    flags: dict[str, str] | None = None,
) -> argparse.Namespace:
    """The options of all benchmarks. seconds: the default; None: the benchmark decides. peers: whether there is
    --without. more, flags: further options with and without a value, and their help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=seconds, help="start no new shape after so many seconds")
    parser.add_argument("--rounds", type=int, default=20, help="maximum number of rounds of each comparison")
    if peers:
        parser.add_argument(
            "--without", nargs="+", default=[], metavar="TEXT", help="leave out variants whose name contains this text"
        )
    parser.add_argument("--out", type=Path, help="folder for the result (default: benchmarks/results)")
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, for a test of the benchmark or a short time slot"
    )
    for option, about in (more or {}).items():
        parser.add_argument(option, help=about)
    for option, about in (flags or {}).items():
        parser.add_argument(option, action="store_true", help=about)
    return parser.parse_args(argv)


if __name__ == "__main__":
    write_readme_tables()
