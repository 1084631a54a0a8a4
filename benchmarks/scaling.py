"""How costs grow: of a step with tokens, parameters, context and vocabulary; of a sweep with its runs.

    python -m benchmarks.scaling [--rounds N] [--seconds S] [--out DIR] [--quick]

The slope is that of the line through log(seconds) against log(size), by least squares. Beside it stands the slope of
the work that is counted: the FLOPs of a step, the runs of a sweep. A cost that grows faster than its counted work, such
as something quadratic, shows as a larger slope. Fixed costs lower the slope.

A step is timed inside whole runs (tokens_per_second of their row, which leaves out the first step), on one thread. The
sizes take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

import scaling_testbed as st
from benchmarks import harness
from benchmarks.report import Budget, Report, verdict

STEPS = 8
SLACK = 0.1  # how much larger than the slope of the counted work the slope may be
COLUMNS = [("median_s", "ms", "ms"), ("low_s", "min", "ms"), ("high_s", "max", "ms"), ("work", "counted work", "small")]
FEW = ["data=noise", "data.n_tokens=600000", "compute.device=cpu", "compute.threads=1", "logging.every_steps=1000"]
FEW += ["evaluation.every_steps=0", "evaluation.tokens=128", "checkpoint.every_steps=0", "checkpoint.at_end=false"]
NANO = ["model=nano_s", "data.vocab_size=257", "batch.sequences=32", "batch.sequence_length=128"]

# What varies in a step -> the overrides of each size.
STEP: dict[str, dict[str, list[str]]] = {
    "tokens": {f"{n * 128} tokens": [*NANO, f"batch.sequences={n}"] for n in (8, 16, 32, 64, 128)},
    "parameters": {
        f"d_model {d}": [*NANO, f"model.d_model={d}", f"model.n_heads={d // 16}"] for d in (32, 64, 128, 256)
    },
    "context": {
        f"context {length}": [*NANO, f"batch.sequences={8192 // length}", f"batch.sequence_length={length}"]
        for length in (64, 128, 256, 512, 1024)
    },
    "vocabulary": {f"vocabulary {v}": [*NANO, f"data.vocab_size={v}"] for v in (256, 1024, 4096, 16384)},
}
RUNS = (64, 256, 1024)


def time_step(overrides: Sequence[str], number: int) -> tuple[float, float]:
    """Seconds and counted FLOPs of a step. number: the seed, so that no run is taken for one that has ended."""
    row = st.train([*FEW, *overrides, f"budget.steps={STEPS}", f"seed={number}"])
    return row["n_tokens"] / STEPS / row["tokens_per_second"], row["flops"] / STEPS


def sweep_ways(row: dict) -> dict[str, Callable[[int], object]]:
    """What is done with a sweep -> a function of the number of its runs. row: of any run."""
    rates = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 3e-1]

    def plan(n: int) -> None:
        seeds = ",".join(map(str, range(n // 16)))
        assert len(st.plan("nano_lr", ["data=noise", f"seed={seeds}"])) == n

    def rows(n: int) -> list[dict]:
        return [
            row | {"run_id": f"{i:012x}", "seed": i // 8, "optimizer.lr": rates[i % 8], "val_loss": 2 + 0.01 * (i % 8)}
            for i in range(n)
        ]

    def law(n: int) -> list[dict[str, float]]:
        sizes = [10 ** (5 + 2 * (i % 4) / 3) for i in range(n)]
        tokens = [size * 20 * 2 ** (i // 4 % 8) for i, size in enumerate(sizes)]
        return [
            {"n_params": N, "n_tokens": D, "loss": 1.7 + 400 / N**0.34 + 410 / D**0.28 + 1e-3 * (i % 3)}
            for i, (N, D) in enumerate(zip(sizes, tokens, strict=True))
        ]

    return {
        "plan": plan,
        "lr_sensitivity": lambda n: st.lr_sensitivity(rows(n)),
        "fit, 16 starts": lambda n: st.fit(law(n), "chinchilla", starts=16, bootstrap=0),
    }


def compare_steps(report: Report, options, what: str, places: list[str], numbers: count, seconds: float) -> None:
    sizes = dict(list(STEP[what].items())[:2]) if options.quick else STEP[what]
    ways = {label: lambda words=words: time_step([*words, *places], next(numbers)) for label, words in sizes.items()}
    add(report, f"a step against {what}", ways, options, seconds)


def compare_sweeps(report: Report, options, what: str, way: Callable[[int], object], seconds: float) -> None:
    def timed(n: int) -> tuple[float, float]:
        began = time.perf_counter()
        way(n)
        return time.perf_counter() - began, n

    runs = RUNS[:2] if options.quick else RUNS
    way(runs[0])  # imports what it needs
    add(report, f"{what} against runs", {f"{n} runs": partial(timed, n) for n in runs}, options, seconds)


def add(
    report: Report, label: str, ways: dict[str, Callable[[], tuple[float, float]]], options, seconds: float
) -> None:
    """Time the sizes in turns, and add a case with a row for each and the two slopes."""
    times: dict[str, list[float]] = {size: [] for size in ways}
    work: dict[str, float] = {}
    budget = Budget(2 * seconds)
    for turn in range(options.rounds):
        names = list(ways)
        for size in names[turn % len(names) :] + names[: turn % len(names)]:
            taken, work[size] = ways[size]()
            times[size].append(taken)
        if budget.left() < 0:
            break
    rows = [
        {
            "variant": size,
            "ours": True,
            "status": "ok",
            "seconds": found,
            "median_s": statistics.median(found),
            "low_s": min(found),
            "high_s": max(found),
            "work": work[size],
        }
        for size, found in times.items()
    ]
    report.add({"label": label, "rows": rows, "notes": [judged(rows)]})


def judged(rows: Sequence[dict]) -> str:
    """The slopes of seconds and of counted work over the size, which is the number in the name of each row."""
    size = [float(next(word for word in row["variant"].split() if word.isdigit())) for row in rows]
    found, counted = (slope(size, [row[key] for row in rows]) for key in ("median_s", "work"))
    text = f"time grows with the power {found:.2f}, counted work with {counted:.2f} (aim: at most {SLACK} more)"
    return verdict(text, found <= counted + SLACK)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The power p of y ~ x^p, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=420, peers=False)
    machine = harness.describe_machine(harness.choose_device("cpu"))
    report = Report("scaling", machine, COLUMNS, out=options.out and Path(options.out), smoke=options.quick)
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:
        places = [f"runs_dir={folder}/runs", f"data_dir={folder}/data"]
        row = st.train([*FEW, *NANO, *places, "budget.steps=2"])
        work: dict[str, Callable[[float], object]] = {
            f"a step against {what}": partial(compare_steps, report, options, what, places, numbers)
            for what in (list(STEP)[:1] if options.quick else STEP)
        }
        work |= {
            f"{what} against runs": partial(compare_sweeps, report, options, what, way)
            for what, way in sweep_ways(row).items()
        }
        return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
