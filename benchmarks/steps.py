"""One training step of this project: where its time goes, at five sizes, eager, as a CUDA graph, compiled, and both.
At short steps also with one product for queries, keys and values, and with the clip inside AdamW.

    python -m benchmarks.steps [--quick] [--device cpu] [--seconds S] [--out DIR]

Each variant is a run of `scaling_testbed.training.run.train` on synthetic tokens. After some steps to settle, steps are
timed together, from one wait for the GPU to the next. Then three are profiled (torch.profiler), and one of the eager
run is counted operator by operator (traffic.py). Weights are drawn on the device, which takes less time than this
project's own draws and does not change what a step costs.

ms a step   the time of the timed steps, divided by their number
busy        the time in which the GPU works on something, in the profiled steps
launches    the kernels, copies and fills of a profiled step
floor       the least time of the eager step's operators, one by one, at the measured rates of the machine
by class    the time of the kernels of a class. Products of the head are told from others by the operator that launches
            them. A CUDA graph has no operators, so there they count as matmul; and compiled code fuses across classes.
MFU         as in a run's row: model FLOPs with masked scores, over the data sheet's peak
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import harness
from benchmarks.report import Budget, Report, first_line, verdict
from benchmarks.sizes import SIZES
from benchmarks.traffic import (
    ATTENTION,
    CLASSES,
    COMM,
    COPIES,
    ELEMENTWISE,
    HEAD,
    MATMUL,
    OPTIMIZER,
    class_of,
    counting,
)
from benchmarks.trainer import in_child, probe

EAGER, GRAPH, COMPILED, BOTH = "eager", "graph", "compiled", "compiled graph"
ONE_PRODUCT, CLIP_INSIDE = "one qkv product", "clip inside AdamW"
VARIANTS = {
    EAGER: ["compute.compile=false", "compute.cuda_graph=false"],
    GRAPH: ["compute.compile=false", "compute.cuda_graph=true"],
    COMPILED: ["compute.compile=true", "compute.cuda_graph=false"],
    BOTH: ["compute.compile=true", "compute.cuda_graph=true"],
    ONE_PRODUCT: ["compute.compile=false", "compute.cuda_graph=false", "model.qkv_impl=together"],
    CLIP_INSIDE: [
        *("compute.compile=false", "compute.cuda_graph=false"),
        *("optimizer.fused=true", "optimizer.clip_impl=fused"),
    ],
}
# The first jobs tell most, in case time runs out. A graph pays where a step is short.
SHORT = ("proxy_2m", "openlm_11m", "10m")
JOBS = [
    *((size, EAGER) for size in ("10m", "124m", "1.3b", "openlm_11m", "proxy_2m")),
    *((size, GRAPH) for size in SHORT),
    *((size, COMPILED) for size in ("10m", "124m", "1.3b")),
    *((size, variant) for size in SHORT for variant in (COMPILED, BOTH) if (size, variant) != ("10m", COMPILED)),
    *((size, variant) for size in SHORT for variant in (ONE_PRODUCT, CLIP_INSIDE)),
]
NANO_S = ["model=nano_s", "data.vocab_size=257"]
CPU_SIZES = {
    "nano_s 4 x 64": [*NANO_S, "batch.sequences=4", "batch.sequence_length=64"],
    "nano_s 32 x 128": [*NANO_S, "batch.sequences=32", "batch.sequence_length=128"],
}
CPU_JOBS = [(size, variant) for size in CPU_SIZES for variant in (EAGER, ONE_PRODUCT, CLIP_INSIDE)]
MFU_AIMS = {"10m": 0.35, "124m": 0.45, "1.3b": 0.50}
SETTLING, TIMED, PROFILED = 4, 8, 3  # steps
JOB_SECONDS = 60  # after which a job is ended
LEAST_SECONDS = 8  # no job starts with less time left
QUIET = [
    "data=noise",
    "data.distribution=zipf",
    "data.n_tokens=1200000",
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
    "evaluation.every_steps=0",
    "evaluation.tokens=32768",
    "evaluation.rows=4",
    "optimizer.lr=1e-3",
    f"budget.steps={SETTLING + TIMED + PROFILED + 2}",
    "name=steps",
]
COLUMNS = [
    ("step_s", "ms a step", "ms"),
    ("busy_s", "busy", "ms"),
    ("floor_s", "floor", "ms"),
    ("launches", "launches", "count"),
    ("tokens_per_second", "tokens/s", "count"),
    ("mfu", "MFU", "percent"),
    ("peak_bytes", "peak GiB", "GiB"),
    *((f"{name}_s", name, "ms") for name in CLASSES),
]


# ------------------------------------------------------------------------------------------------ in the child


class Watch:
    """Times, profiles and counts steps of one run. `begin` is called before each of them."""

    def __init__(self, device: torch.device, count: bool, rates: dict[str, float]):
        self.device, self.counts = device, count
        self.rates = rates["copy_bytes_per_s"], rates["product_flops_per_s"]
        self.found: dict[str, Any] = {}
        self._step = 0
        self._began = 0.0
        self._open = contextlib.ExitStack()

    def begin(self) -> None:
        if self._step == SETTLING:
            self._synchronize()
            self._began = time.perf_counter()
        elif self._step == SETTLING + TIMED:
            self._synchronize()
            self.found["step_s"] = (time.perf_counter() - self._began) / TIMED
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = self._open.enter_context(torch.profiler.profile(activities=activities, acc_events=True))
        elif self._step == SETTLING + TIMED + PROFILED:
            self._synchronize()
            self._open.close()
            self.found |= of_profile(self._profile.events(), PROFILED)
            if self.counts:
                self._traffic = self._open.enter_context(counting(*self.rates))
        elif self._step == SETTLING + TIMED + PROFILED + 1 and self.counts:
            self._open.close()
            self.found["floor_s"] = self._traffic.total.seconds
            self.found["traffic"] = {name: vars(amount) for name, amount in self._traffic.by_class.items()}
        self._step += 1

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(overrides: list[str], variant: str, rates: dict[str, float]) -> dict[str, Any]:
    """A row of the table, from a run in this process."""
    from scaling_testbed.config.compose import compose
    from scaling_testbed.model.transformer import Transformer
    from scaling_testbed.processes.device import choose_device, peak_flops
    from scaling_testbed.training import run as training

    forget()
    run = compose([*QUIET, *overrides, *VARIANTS[variant]])
    device = choose_device(run.compute)
    watch = Watch(device, variant == EAGER, rates)
    real = training.inputs

    def inputs(*args):
        watch.begin()
        return real(*args)

    drawn = mock.patch.object(Transformer, "init_weights", draw_on_device)
    with drawn, mock.patch.object(training, "inputs", inputs):
        row = training.train(run, quiet=True)
    if row["status"] != "finished":
        return {"status": f"failed: {row['status']}: {row.get('error')}"}
    found = watch.found | {"status": "ok", "peak_bytes": row["peak_memory_bytes"]}
    rate = run.batch.tokens / watch.found["step_s"]
    flops_per_token = row["flops"] / row["n_tokens"]
    peak = peak_flops(device, row["precision"])
    found |= {"tokens_per_second": rate, "mfu": rate * flops_per_token / peak if peak else None}
    chosen = ("loss_impl", "attention_impl", "qk_norm_impl", "precision", "n_params")
    return found | {name: row[name] for name in chosen} | {"overrides": overrides}


@torch.no_grad()
def draw_on_device(model, seed: int) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02)


def forget() -> None:
    """Free what an earlier run has left in this process."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def of_profile(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Busy time, launches and time by class of a step, from the events of torch.profiler; nothing without a GPU.

    A kernel is listed twice: as an event of the GPU, and under the operator that has launched it. The kernels of a CUDA
    graph are listed once.
    """
    events = list(events)
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu = [event for event in on_gpu if not getattr(event, "is_user_annotation", False)]
    if not on_gpu:
        return {}
    microseconds = {name: 0.0 for name in CLASSES}
    rest: Counter[str] = Counter()
    for event in on_gpu:
        rest[event.name] += event.time_range.elapsed_us()
    for event in events:
        for kernel in event.kernels:
            microseconds[class_of_kernel(kernel.name, launched_by(event))] += kernel.duration
            rest[kernel.name] -= kernel.duration
    for name, left in rest.items():
        microseconds[class_of_kernel(name)] += max(0.0, left)
    busy = covered((event.time_range.start, event.time_range.end) for event in on_gpu)
    found = {f"{name}_s": value / 1e6 / steps for name, value in microseconds.items()}
    return found | {"busy_s": busy / 1e6 / steps, "launches": len(on_gpu) / steps}


def launched_by(event: Any) -> list[str]:
    """The names of an operator and of those around it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


# Parts of the names of kernels, in the order in which they are looked for.
KERNELS = {
    COMM: r"nccl",
    ATTENTION: r"flash|fmha|sdpa|attention|keys_values_kernel|queries_kernel|delta_kernel",
    HEAD: r"head_row_kernel|head_forward_kernel|head_weight_kernel",
    OPTIMIZER: r"multi_tensor_apply|[Aa]dam",
    MATMUL: r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitK",
    COPIES: r"Memcpy|Memset|copy_kernel|CatArray",
}


def class_of_kernel(name: str, operators: Sequence[str] = ()) -> str:
    """The class of a kernel, by the operators that have launched it where these tell, else by its name."""
    if any(operator.startswith("Optimizer.step") for operator in operators):
        return OPTIMIZER
    told = {class_of(operator) for operator in operators if "::" in operator}
    for kind in (HEAD, COMM, ATTENTION):
        if kind in told:
            return kind
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name)), ELEMENTWISE)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    length, end = 0.0, float("-inf")
    for begin, stop in sorted(intervals):
        length += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return length


def work(sender, jobs: list[tuple[str, str]], sizes: dict[str, list[str]], folder: str, device: str, rates) -> None:
    """In the child: measure the jobs one after another, and send each row when it is done."""
    for size, variant in jobs:
        # A run is not repeated in the same folder, and how it is executed does not make it another one.
        places = [f"runs_dir={folder}/{size}-{variant}", f"data_dir={folder}/data", f"compute.device={device}"]
        try:
            row = measure([*sizes[size], *places], variant, rates)
        except Exception as error:
            memory = harness.is_out_of_memory(error)
            row = {"status": harness.OUT_OF_MEMORY if memory else f"failed: {first_line(error)}"}
        sender.send(row)


# ------------------------------------------------------------------------------------------------ in the parent


def rows_of_jobs(jobs: list[tuple[str, str]], budget: Budget, *arguments) -> Iterable[tuple[tuple[str, str], dict]]:
    """Each job with its row. One process measures all of them, and a new one goes on after a job that ends it.

    Stops when the time is over. Jobs without a row were not reached.
    """
    jobs = list(jobs)
    while jobs and budget.left() >= LEAST_SECONDS:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        # Forked, so that it need not import anything. This process has not used the GPU.
        process = multiprocessing.get_context("fork").Process(target=work, args=(sender, jobs, *arguments))
        process.start()
        sender.close()
        try:
            while jobs and budget.left() >= LEAST_SECONDS:
                limit = min(JOB_SECONDS, budget.left())
                try:
                    row = receiver.recv() if receiver.poll(limit) else {"status": f"ended after {limit:.0f} s"}
                except EOFError:
                    process.join()
                    row = {"status": f"the process ended with {process.exitcode}"}
                yield jobs.pop(0), row
                if row["status"] not in ("ok", harness.OUT_OF_MEMORY):  # this process may have lost the GPU
                    break
        finally:
            process.kill()
            process.join()


def aim(size: str, rows: list[dict[str, Any]]) -> list[str]:
    """The aim of MFU for this size, compared with the fastest variant that was measured."""
    reached = [(row["mfu"], row["variant"]) for row in rows if row.get("mfu")]
    if size not in MFU_AIMS:
        return []
    if not reached:
        return [f"MFU was not measured (aim: {MFU_AIMS[size]:.0%})"]
    best, variant = max(reached)
    return [verdict(f"{size}, {variant}: MFU {best:.1%} (aim: {MFU_AIMS[size]:.0%} or more)", best >= MFU_AIMS[size])]


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=100)
    importlib.import_module("scaling_testbed.training.run")  # so that the forked process need not import it
    budget = Budget(options.seconds)
    machine = in_child(probe, options.device, 60)
    if "machine" not in machine:
        raise SystemExit(f"cannot measure this machine: {machine['status']}")
    on_gpu = machine["device"] == "cuda"
    report = Report("steps", machine, COLUMNS, out=options.out, smoke=options.quick or not on_gpu)
    sizes, jobs = (SIZES, JOBS) if on_gpu else (CPU_SIZES, CPU_JOBS)
    jobs = [job for job in jobs if not any(text.lower() in " ".join(job) for text in options.without)]
    cases = {size: {"label": size, "rows": []} for size, _ in jobs}
    report.data["cases"] = list(cases.values())
    with tempfile.TemporaryDirectory() as folder:
        waiting = report.data["not_reached"] = [f"{size}, {variant}" for size, variant in jobs]
        report.write()
        for (size, variant), row in rows_of_jobs(jobs, budget, sizes, folder, machine["device"], machine["ceilings"]):
            case = cases[size]
            case["rows"].append({"variant": variant, "ours": True} | row)
            case["notes"] = aim(size, case["rows"])
            waiting.remove(f"{size}, {variant}")
            print(f"{size}, {variant}: {_line(row)}", flush=True)
            report.write()
    report.data["cases"] = [case for case in cases.values() if case["rows"]]
    report.finish()
    return report.status


def _line(row: dict[str, Any]) -> str:
    return f"{row['step_s'] * 1e3:,.2f} ms a step" if row["status"] == "ok" else row["status"]


if __name__ == "__main__":
    sys.exit(main())
