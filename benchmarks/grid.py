"""The time of a grid: runs that start from a warm parent, runs that start fresh, and an earlier commit.

    python -m benchmarks.grid [--earlier FOLDER] [--rounds N] [--seconds S] [--out DIR] [--quick]

Two grids, each with two runs at a time: the demo's (sweep=nano_lr, 16 runs of 200 steps), and 16 runs of one step. The
variants take turns. A variant is timed from the start of the command to its end: wall seconds, and processor seconds of
all its processes. The corpus is prepared before. All variants must end with the same losses.

--earlier: a folder with another commit, made by `git worktree add FOLDER COMMIT`; it runs with the packages that are
installed here.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.report import Budget, Report

ROOT = Path(__file__).resolve().parent.parent
ONE_STEP = ["budget.steps=1", "evaluation.every_steps=0"]
GRIDS = {"the demo's grid, 16 runs of 200 steps": [], "16 runs of one step": ONE_STEP}
WARM, FRESH, EARLIER = "warm workers", "fresh processes", "an earlier commit"
COLUMNS = [("median_s", "wall s", "s"), ("cpu_s", "CPU s", "s"), ("ratio", "wall, of the last", "ratio")]
COLUMNS += [("cpu_ratio", "CPU, of the last", "ratio"), ("per_run_s", "CPU s of a run", "s")]
N_RUNS = 16


def command(variant: str, folder: Path, overrides: list[str]) -> list[str]:
    data = data_of(variant, folder.parent)
    words = ["sweep=nano_lr", "data=python_stdlib", "name=grid", f"runs_dir={folder}/runs", f"data_dir={data}"]
    fresh = ["--fresh"] if variant == FRESH else []
    return [sys.executable, "-m", "scaling_testbed.sweep", "run", *words, *overrides, "--workers", "2", *fresh]


def data_of(variant: str, folder: Path) -> Path:
    """Of each version its own: an earlier one does not read what a later one has prepared."""
    return folder / ("earlier" if variant == EARLIER else "here")


def measure(variant: str, place: Path, data: Path, overrides: list[str]) -> tuple[float, float, dict[str, float]]:
    """Wall seconds and processor seconds of a grid, and the losses of its runs."""
    with tempfile.TemporaryDirectory(dir=data) as folder:
        before, began = used(), time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command(variant, Path(folder), overrides), cwd=place, env=environment, capture_output=True, text=True
        )
        wall, cpu = time.monotonic() - began, used() - before
        if done.returncode:
            raise RuntimeError(f"{variant}: {done.stderr.strip() or done.stdout.strip()}")
        rows = [json.loads(path.read_text()) for path in Path(folder).glob("runs/*/*/result.json")]
    losses = {row["run_id"]: row["val_loss"] for row in rows}
    if len(losses) != N_RUNS:
        raise RuntimeError(f"{variant}: {len(losses)} of {N_RUNS} runs have a row")
    return wall, cpu, losses


def used() -> float:
    """Processor seconds of all processes that this one has waited for."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def compare(report: Report, options, label: str, overrides: list[str], data: Path, seconds: float) -> None:
    places = {WARM: ROOT, FRESH: ROOT}
    if options.earlier:
        places[EARLIER] = Path(options.earlier).resolve()
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in places}
    losses: dict[str, dict[str, float]] = {}
    budget = Budget(2 * seconds)
    for turn in range(options.rounds):
        order = list(places)[turn % len(places) :] + list(places)[: turn % len(places)]
        for variant in order:
            wall, cpu, losses[variant] = measure(variant, places[variant], data, overrides)
            found[variant].append((wall, cpu))
        if budget.left() <= 0:
            break
    medians = {one: [statistics.median(kind) for kind in zip(*times, strict=True)] for one, times in found.items()}
    last = medians[list(places)[-1]]
    rows = []
    for variant, times in found.items():
        wall, cpu = medians[variant]
        more = {"times": times, "losses": losses[variant], "ratio": wall / last[0], "cpu_ratio": cpu / last[1]}
        rows.append(
            {"variant": variant, "status": "ok", "median_s": wall, "cpu_s": cpu, "per_run_s": cpu / N_RUNS, **more}
        )
    apart = max(abs(losses[WARM][run] - losses[FRESH][run]) for run in losses[WARM])
    notes = [f"warm and fresh: losses at most {apart:.1e} apart; {len(times)} rounds"]
    report.add({"label": label, "rows": rows, "notes": notes})


def main(argv: list[str] | None = None) -> int:
    more = {"--earlier": "a folder with another commit"}
    options = harness.arguments(__doc__, argv, seconds=1200, peers=False, more=more)
    device = harness.choose_device("cpu")
    machine = harness.describe_machine(device)
    report = Report("grid", machine, COLUMNS, out=options.out and Path(options.out), smoke=options.quick)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare = [sys.executable, "-m", "scaling_testbed.prepare", "data=python_stdlib"]
        places = {WARM: ROOT} | ({EARLIER: Path(options.earlier).resolve()} if options.earlier else {})
        for variant, place in places.items():
            environment = os.environ | {"PYTHONPATH": str(place)}
            subprocess.run([*prepare, f"data_dir={data_of(variant, data)}"], cwd=place, env=environment, check=True)
        grids = dict(list(GRIDS.items())[1:]) if options.quick else GRIDS
        work = {label: partial(compare, report, options, label, words, data) for label, words in grids.items()}
        return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
