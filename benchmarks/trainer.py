"""The complete trainer: each loss path and each attention path at three sizes, and ten steps of proxy_5b.

    python -m benchmarks.trainer [--quick] [--device cpu] [--seconds S] [--out DIR]
    python -m benchmarks.trainer --nanogpt DIR [--threads N] [--device cpu] ...       beside nanoGPT and transformers

With --nanogpt, the folder of a checkout of github.com/karpathy/nanoGPT, this trainer is measured beside other trainers;
see benchmarks/beside.py. Without it, beside itself:

Every configuration runs in its own process with a time limit, so that a failure, or a lack of memory, affects one line
only. It trains on synthetic tokens (Zipf, vocabulary 50304) in temporary folders and writes no checkpoint. tokens/s,
utilisation and peak memory come from the run's row, whose clock starts after the first step. The time of a step is the
time between two records. Utilisation counts all scores of attention, as is usual (PaLM, arXiv 2204.02311, appendix B),
although half of them are masked and some kernels skip these. The first losses are compared with those of the first path
of the same size: a comparison of speed is valid only between paths that agree.

--quick: a few dozen steps for each configuration, which takes 200 seconds on one GPU. Without it, three times as many
steps, and compiled runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import OUT_OF_MEMORY
from benchmarks.report import Budget, Report, first_line

NEEDED = ("hydra", "omegaconf", "antlr4", "yaml", "rich", "numpy")
VOCABULARY = 50304
AGREEMENT = 2e-3  # relative difference of the first losses: bf16 logits against fp32 logits
LOSSES_KEPT = 5
# Bytes per parameter: fp32 weight, gradient and AdamW's two moments, and the bf16 copy that autocast keeps for a step.
BYTES_PER_PARAMETER, SPARE_BYTES = 4 * 4 + 2, 4 * 2**30
LEAST_SECONDS = 15  # no configuration starts with less time left
PATHS = [("reference", "sdpa"), ("chunked", "sdpa"), ("triton", "sdpa"), ("triton", "triton")]
COLUMNS = [
    ("tokens_per_second", "tokens/s", "count"),
    ("median_s", "ms a step", "ms"),
    ("low_s", "min", "ms"),
    ("high_s", "max", "ms"),
    ("mfu", "of data sheet FLOP/s", "percent"),
    ("over_product_rate", "of measured FLOP/s", "percent"),
    ("peak_bytes", "peak GiB", "GiB"),
    ("n_params", "parameters", "count"),
    ("steps", "steps", "count"),
    ("first_loss", "first loss", "loss"),
    ("loss_difference", "first losses differ by", "small"),
]


@dataclass(frozen=True)
class Size:
    """A model and its batch. overrides: of the configuration. limit: seconds after which a run is ended."""

    label: str
    overrides: tuple[str, ...]
    batch: tuple[int, int, int]  # sequences, sequences of a micro-batch, tokens of a sequence
    steps: int
    limit: float
    paths: tuple[tuple[str, str], ...] = tuple(PATHS)
    compiled: bool = False  # whether the benchmark without --quick also times it compiled


SIZES = [
    Size(
        "10M class (d_model 256, 8 layers)",
        ("model=nano_m", "model.d_model=256", "model.n_layers=8", "model.n_heads=4"),
        (128, 32, 1024),
        30,
        45,
        (*PATHS, ("triton", "reference")),
        compiled=True,
    ),
    Size("5B (proxy_5b)", ("model=proxy_5b",), (4, 1, 2048), 10, 150, (("triton", "sdpa"),)),
    Size("124M (proxy_85m, tied)", ("model=proxy_85m", "model.tied_head=true"), (64, 32, 1024), 30, 60, compiled=True),
    Size("1.3B (proxy_1b, tied)", ("model=proxy_1b", "model.tied_head=true"), (8, 4, 2048), 24, 75),
]
CPU_SIZES = [
    Size(
        "nano_s",
        ("model=nano_s", "model.d_model=64", "data.vocab_size=512", "data.n_tokens=100000"),
        (4, 2, 64),
        6,
        60,
        (("reference", "reference"), ("chunked", "sdpa"), ("triton", "sdpa"), ("chunked", "triton")),
    )
]
DATA = ["data=noise", "data.distribution=zipf", f"data.vocab_size={VOCABULARY}"]
QUIET = [
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
    "evaluation.every_steps=0",
    "logging.every_steps=1",
    "name=benchmark",
]


def overrides(size: Size, loss: str, attention: str, compiled: bool, steps: int) -> list[str]:
    """The arguments of `python -m scaling_testbed.train`, without the folders."""
    sequences, micro, length = size.batch
    return [
        *DATA,
        *QUIET,
        *size.overrides,
        f"loss.impl={loss}",
        f"model.attention_impl={attention}",
        f"model.qk_norm_impl={'reference' if loss == 'reference' else 'auto'}",
        f"compute.compile={str(compiled).lower()}",
        f"batch.sequences={sequences}",
        f"batch.micro_batch_sequences={micro}",
        f"batch.sequence_length={length}",
        f"evaluation.tokens={micro * length}",
        f"budget.steps={steps}",
    ]


# ------------------------------------------------------------------------------------------------ in the child


def run_one(arguments: list[str]) -> dict[str, Any]:
    """Train once in this process and return the columns of the table from the run's row, with its first losses."""
    from scaling_testbed.config.compose import compose
    from scaling_testbed.config.run import run_folder_path
    from scaling_testbed.training.run import train

    run = compose(arguments)
    if problem := too_large(run):
        return {"status": problem}
    row = train(run, quiet=True)
    written = map(json.loads, (run_folder_path(run) / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in written if "train_loss" in line]
    losses = [line["train_loss"] for line in steps]
    # Without the last step: its record may wait for the end of the run.
    times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(steps[:-1])]
    kept = ("tokens_per_second", "mfu", "n_params", "steps", "loss_impl", "attention_impl", "qk_norm_impl", "precision")
    return {key: row.get(key) for key in kept} | {
        "status": "ok" if row["status"] == "finished" else row["status"],
        "peak_bytes": row["peak_memory_bytes"],
        "flops_per_token": row["flops"] / row["n_tokens"] if row["n_tokens"] else None,
        "losses": losses[:LOSSES_KEPT],
        "median_s": statistics.median(times) if times else None,
        "low_s": min(times, default=None),
        "high_s": max(times, default=None),
    }


def too_large(run) -> str | None:
    """The reason why a run does not fit on this GPU even with an empty batch, or None."""
    from scaling_testbed.model.counting import count_params

    if not torch.cuda.is_available() or run.compute.device == "cpu":
        return None
    config = run.model.resolved(run.data.vocab_size)
    needed = BYTES_PER_PARAMETER * count_params(config).n_params + SPARE_BYTES
    there = torch.cuda.get_device_properties(0).total_memory
    if needed <= there:
        return None
    return f"too large: weights, gradients and AdamW's state need {needed / 2**30:.0f} GiB of {there / 2**30:.0f}"


def probe(device: str) -> dict[str, Any]:
    """The machine, measured in a child process: a parent must not initialise CUDA before it forks."""
    return harness.describe_machine(harness.choose_device(device))


def _child(sender, function, argument) -> None:
    try:
        answer = function(argument)
    except Exception as error:
        answer = {"status": OUT_OF_MEMORY if harness.is_out_of_memory(error) else f"failed: {first_line(error)}"}
    sender.send(answer)


# ------------------------------------------------------------------------------------------------ in the parent


def in_child(function, argument, limit: float, method: str = "fork") -> dict[str, Any]:
    """The result of function(argument) in its own process, which is ended after `limit` seconds.

    A forked process starts at once, with all imports done.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, argument))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(limit) else None
    except EOFError:
        process.join()
        answer = {"status": f"the process ended with {process.exitcode}"}
    if answer is not None:
        process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
    return answer or {"status": f"ended after {limit:.0f} s"}


def start_method(device: str) -> tuple[str, dict[str, Any]]:
    """The start method of child processes, and the machine.

    Spawning is slower, but also works where a forked process cannot use the GPU.
    """
    for method in ("fork", "spawn"):
        machine = in_child(probe, device, 60, method)
        if "machine" in machine:
            return method, machine
    raise SystemExit(f"cannot measure this machine: {machine['status']}")


def configurations(size: Size, quick: bool) -> list[tuple[str, str, bool]]:
    """The configurations of a size, as (loss, attention, compiled)."""
    plain = [(loss, attention, False) for loss, attention in size.paths]
    return plain + ([("triton", "sdpa", True)] if size.compiled and not quick else [])


def measure_size(report: Report, options, budget: Budget, method: str, folder: Path, size: Size, _seconds) -> None:
    """Measure the configurations of one size in turn while time is left, and write each result when it is done."""
    case = {"label": size.label, "batch": dict(zip(("sequences", "micro", "length"), size.batch, strict=True))}
    case["rows"] = rows = []
    report.add(case)
    product_rate = report.data["ceilings"]["product_flops_per_s"]
    asked = {
        f"loss {loss}, attention {attention}{', compiled' if compiled else ''}": (loss, attention, compiled)
        for loss, attention, compiled in configurations(size, options.quick)
    }
    waiting = [name for name in asked if not any(x.lower() in f"{size.label}: {name}".lower() for x in options.without)]
    try:
        while waiting and budget.left() >= LEAST_SECONDS:
            name = waiting[0]
            steps = size.steps if options.quick or len(size.paths) == 1 else 3 * size.steps
            arguments = overrides(size, *asked[name], steps)
            arguments += [f"runs_dir={folder}/{len(report.data['cases'])}-{len(rows)}", f"data_dir={folder}/data"]
            arguments += [f"compute.device={report.data['device']}"]
            limit = min(size.limit * (1 if options.quick else 3), budget.left())
            row = {"variant": name, "ours": True} | in_child(run_one, arguments, limit, method)
            rows.append(row)
            waiting.pop(0)
            judge(row, rows, product_rate)
            print(f"  {name}: {_line(row)}", flush=True)
            report.write()
    finally:
        report.data["not_reached"] += [f"{size.label}: {name}" for name in waiting]


def judge(row: dict[str, Any], rows: list[dict[str, Any]], product_rate: float) -> None:
    """Add the share of the measured matrix-product rate, and the difference of the first losses from the first row."""
    if row["status"] != "ok" or not row.get("losses"):
        return
    row["first_loss"] = row["losses"][0]
    if row["tokens_per_second"]:
        row["over_product_rate"] = row["tokens_per_second"] * row["flops_per_token"] / product_rate
    trusted = next(other for other in rows if other.get("losses"))
    pairs = zip(row["losses"], trusted["losses"], strict=False)
    row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
    first = abs(row["losses"][0] - trusted["losses"][0]) / abs(trusted["losses"][0])
    if not first <= AGREEMENT:
        row["status"] = f"wrong: first loss {row['losses'][0]:.4f}, not {trusted['losses'][0]:.4f}"


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return row["status"]
    rate = row["tokens_per_second"]
    return f"{rate:,.0f} tokens/s, first loss {row['first_loss']:.4f}" if rate else "ok"


def main(argv: Sequence[str] | None = None) -> int:
    more = {"--nanogpt": "measure beside nanoGPT, in this folder, and transformers", "--threads": "CPU threads of each"}
    options = harness.arguments(__doc__, argv, seconds=None, more=more)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"benchmarks.trainer needs {', '.join(missing)}: pip install hydra-core rich numpy", file=sys.stderr)
        return 2
    if options.nanogpt:
        from benchmarks import beside

        return beside.main(options, start_method(options.device)[1])
    importlib.import_module("scaling_testbed.training.run")  # so that forked children need not import it
    budget = Budget(options.seconds or 200)
    method, machine = start_method(options.device)
    on_gpu = machine["device"] == "cuda"
    report = Report("trainer", machine, COLUMNS, out=options.out, smoke=not on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        sizes = SIZES if on_gpu else CPU_SIZES
        measure = partial(measure_size, report, options, budget, method, Path(folder))
        return report.run({size.label: partial(measure, size) for size in sizes}, budget)


if __name__ == "__main__":
    sys.exit(main())
