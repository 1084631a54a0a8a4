"""The cost of an update with diagnostics, compared with a plain update.

    python -m benchmarks.diagnostics [--device cpu] [--seconds S] [--rounds N] [--out DIR]

For each size, plain and measured updates of one model alternate, on synthetic tokens. A measured update has an
additional forward pass over up to diagnostics.sequences (32) sequences of the batch. It computes the scores of every
head and statistics of every tensor, including the optimizer's moments. The note gives the added time of a run in which
every 100th update is measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.report import Budget, Report
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.world import World
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.training.parts import Parts, build_parts
from scaling_testbed.training.step import inputs, make_update

NANO = ["data.vocab_size=257", "batch.sequences=32", "batch.sequence_length=128"]
PROXY = ["data.vocab_size=32101", "batch.sequences=8", "batch.sequence_length=512"]
SIZES = {
    "nano_s, 32 x 128 tokens, vocabulary 257": ["model=nano_s", *NANO],
    "nano_l, 32 x 128 tokens, vocabulary 257": ["model=nano_l", *NANO],
    "proxy_2m, 8 x 512 tokens, vocabulary 32101": ["model=proxy_2m", *PROXY],
    "proxy_9m, 8 x 512 tokens, vocabulary 32101": ["model=proxy_9m", *PROXY],
}
PLAIN, MEASURED, EVERY = "plain", "measured", 100
COLUMNS = [("median_s", "ms", "ms"), ("low_s", "min", "ms"), ("high_s", "max", "ms"), ("ratio", "of plain", "ratio")]
QUIET = ["data=noise", "data.n_tokens=300000", "budget.steps=100000", "checkpoint.at_end=false"]


def one_update(parts: Parts, step: int, interrupts: Interrupts) -> None:
    """Make update number `step`, with its values on the way to the host."""
    make_update(parts, inputs(parts, step), interrupts, parts.micro_batch)


def measure(overrides: list[str], device, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each update, by kind. The first update of each kind is not counted."""
    found: dict[str, list[float]] = {PLAIN: [], MEASURED: []}
    with tempfile.TemporaryDirectory() as folder:
        places = [f"runs_dir={folder}/runs", f"data_dir={folder}/data", f"compute.device={device.type}"]
        run = compose([*QUIET, *overrides, *places])
        budget = Budget(seconds)
        with RunFolder(run_folder_path(run)) as records, Interrupts() as interrupts:
            plain = build_parts(run, records, Processes(World(), ParallelismConfig()), quiet=True)
            measured = dataclasses.replace(run, diagnostics=DiagnosticsConfig(every_steps=1))
            parts = {PLAIN: plain, MEASURED: dataclasses.replace(plain, run=measured)}
            for step in range(2 * (rounds + 1)):
                kind = (PLAIN, MEASURED)[(step + step // 2) % 2]  # each kind is first in every other pair
                taken, _ = harness.timed(partial(one_update, parts[kind], step, interrupts), device)
                if step >= 2:
                    found[kind].append(taken)
                if step % 2 and step >= 2 * harness.LEAST_ROUNDS and budget.left() < 0:
                    break
    return found


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=300, peers=False)
    device = harness.choose_device(options.device)
    sizes = dict(list(SIZES.items())[:1]) if options.quick else SIZES
    report = Report(
        "diagnostics",
        harness.describe_machine(device),
        COLUMNS,
        out=options.out and Path(options.out),
        smoke=options.quick,
    )
    work = {label: partial(compare, report, options, device, label, overrides) for label, overrides in sizes.items()}
    return report.run(work, Budget(options.seconds))


def compare(report: Report, options, device, label: str, overrides: list[str], seconds: float) -> None:
    found = measure(overrides, device, options.rounds, 2 * seconds)
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    rows = [
        {
            "variant": kind,
            "status": "ok",
            "seconds": times,
            "median_s": medians[kind],
            "low_s": min(times),
            "high_s": max(times),
            "ratio": medians[kind] / medians[PLAIN],
        }
        for kind, times in found.items()
    ]
    added = (medians[MEASURED] / medians[PLAIN] - 1) / EVERY
    report.add({"label": label, "rows": rows, "notes": [f"every {EVERY}th update measured: +{100 * added:.1f}%"]})


if __name__ == "__main__":
    sys.exit(main())
