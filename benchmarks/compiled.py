"""What torch.compile gains in an update and costs at the start of a run.

    python -m benchmarks.compiled [--device cpu] [--seconds S] [--rounds N] [--out DIR]

For each size, updates of three models alternate, on synthetic tokens: eager; compiled by blocks, as
compute.compile=true does; and compiled as a whole, with plain logits. The note gives the CPU time of a run of one step
by a new interpreter: eager, with an empty cache of compiled code, and with the cache that this has left.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.diagnostics import SIZES, one_update
from benchmarks.report import Budget, Report
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.world import World
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.training.parts import Parts, build_parts

EAGER, BLOCKS, WHOLE = "eager", "compiled by blocks", "compiled as a whole, plain logits"
WAYS = {
    EAGER: ["compute.compile=false"],
    BLOCKS: ["compute.compile=true"],
    WHOLE: ["compute.compile=false", "loss.impl=reference"],
}
COLUMNS = [("median_s", "ms", "ms"), ("low_s", "min", "ms"), ("high_s", "max", "ms"), ("ratio", "of eager", "ratio")]
QUIET = ["data=noise", "data.n_tokens=300000", "evaluation.tokens=4096", "evaluation.every_steps=0"]
QUIET += ["checkpoint.at_end=false"]


def measure(overrides: list[str], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each update, by way. The first update of each way is not counted."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    budget = Budget(seconds)
    with Interrupts() as interrupts:
        parts = {way: build([*overrides, *words]) for way, words in WAYS.items()}
        parts[WHOLE].placed.forward.compile(fullgraph=True, dynamic=False)
        for step in range(rounds + 1):
            for way in list(WAYS)[step % 3 :] + list(WAYS)[: step % 3]:  # each way is first in every third round
                taken, _ = harness.timed(partial(one_update, parts[way], step, interrupts), parts[way].device)
                if step:
                    found[way].append(taken)
            if step >= harness.LEAST_ROUNDS and budget.left() < 0:
                break
    return found


def build(overrides: list[str]) -> Parts:
    run = compose([*overrides, "budget.steps=100000"])
    with RunFolder(run_folder_path(run)) as records:
        return build_parts(run, records, Processes(World(), ParallelismConfig()), quiet=True)


def start_seconds(overrides: list[str], folder: str, compiled: bool) -> float:
    """CPU seconds of a run of one step by a new interpreter, and of all that it starts."""

    def used() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    words = [*overrides, "budget.steps=1", f"compute.compile={str(compiled).lower()}", f"name={os.urandom(4).hex()}"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
    before = used()
    command = [sys.executable, "-m", "scaling_testbed.train", *words]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return used() - before


def compare(report: Report, options, device, label: str, overrides: list[str], seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [f"runs_dir={folder}/runs", f"data_dir={folder}/data", f"compute.device={device.type}"]
        words = [*QUIET, *overrides, *places]
        found = measure(words, options.rounds, seconds)
        eager, cold, warm = (start_seconds(words, folder, compiled) for compiled in (False, True, True))
    rows = [
        {
            "variant": way,
            "status": "ok",
            "seconds": times,
            "median_s": statistics.median(times),
            "low_s": min(times),
            "high_s": max(times),
            "ratio": statistics.median(times) / statistics.median(found[EAGER]),
        }
        for way, times in found.items()
    ]
    note = f"a run of one step: {eager:.1f} CPU-s eager, {cold:.1f} compiled first, {warm:.1f} compiled again"
    report.add({"label": label, "rows": rows, "notes": [note], "start_s": [eager, cold, warm]})


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=600, peers=False)
    device = harness.choose_device(options.device)
    sizes = dict(list(SIZES.items())[:1]) if options.quick else SIZES
    machine = harness.describe_machine(device)
    report = Report("compiled", machine, COLUMNS, out=options.out and Path(options.out), smoke=options.quick)
    work = {label: partial(compare, report, options, device, label, overrides) for label, overrides in sizes.items()}
    return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
