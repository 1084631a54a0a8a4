"""The time of a grid: runs that start from a warm parent, runs that start fresh, and an earlier commit.

    python -m benchmarks.grid [--earlier FOLDER] [--rounds N] [--seconds S] [--out DIR] [--quick]

Two grids, each with two runs at a time: nano_lr (16 runs of 200 steps, the demo of that commit), and 16 runs of one
step, to show what a start costs. The variants take turns. A variant is timed from the start of the command to its end:
wall seconds, and processor seconds of all its processes. The corpora are prepared before.

Each version runs the demo's grid as it ships it, so that a change of its evaluations counts. The losses of the last
update must be the same in all variants that read the same corpus, and the validation losses with warm and with fresh
processes.

--earlier: a folder with another commit, made by `git worktree add FOLDER COMMIT`; it runs with the packages that are
installed here. The aims are judged against it, where it is 8bd9ca3.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.report import Budget, Report, verdict

ROOT = Path(__file__).resolve().parent.parent
DEMO, STARTS = "the demo's grid, 16 runs of 200 steps", "16 runs of one step"
GRIDS = {STARTS: ["budget.steps=1", "evaluation.every_steps=0", "evaluation.tokens=4096"], DEMO: []}
BASELINE = "8bd9ca3"  # the last commit before runs started warm
AIMS = {DEMO: 0.65, STARTS: 0.2}  # of its time
WARM, FRESH, EARLIER = "warm workers", "fresh processes", "an earlier commit"
COLUMNS = [
    ("median_s", "wall s", "s"),
    ("cpu_s", "CPU s", "s"),
    ("low_s", "min wall", "s"),
    ("high_s", "max wall", "s"),
]
COLUMNS += [("ratio", "wall, of the last", "ratio")]
COLUMNS += [("cpu_ratio", "CPU, of the last", "ratio"), ("per_run_s", "CPU s of a run", "s")]
N_RUNS = 16
VARIED = ("model.name", "model.qk_norm", "optimizer.lr")


@dataclass
class Variant:
    """One way to run a grid. place: the folder of its version. data: its own folder of corpora, because an earlier
    version does not read what a later one has prepared. options: of its command line."""

    name: str
    place: Path
    data: Path
    options: list[str]
    times: list[tuple[float, float]] = field(default_factory=list)
    rows: dict[tuple, dict[str, Any]] = field(default_factory=dict)

    def command(self, runs: Path, overrides: list[str]) -> list[str]:
        words = ["sweep=nano_lr", "data=python_stdlib", "name=grid", f"runs_dir={runs}", f"data_dir={self.data}"]
        words.append("compute.device=cpu")  # also on a machine with a GPU
        return [sys.executable, "-m", "scaling_testbed.sweep", "run", *words, *overrides, *self.options]

    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.place), "OMP_NUM_THREADS": "1"}


def variants_of(earlier: str | None, folder: Path) -> list[Variant]:
    here = [
        Variant(WARM, ROOT, folder / "here", ["--workers", "2"]),
        Variant(FRESH, ROOT, folder / "here", ["--workers", "2", "--fresh"]),
    ]
    if earlier is None:
        return here
    place = Path(earlier).resolve()
    if not (place / "scaling_testbed" / "sweep.py").exists():
        raise SystemExit(
            f"--earlier {earlier}: no checkout of this project; `git worktree add {earlier} COMMIT` makes it"
        )
    # Until the commands became typed functions, options of `sweep` were written as overrides.
    has_options = (place / "scaling_testbed" / "commands").is_dir()
    return [*here, Variant(EARLIER, place, folder / "earlier", ["--workers", "2"] if has_options else ["workers=2"])]


def prepare(variant: Variant) -> None:
    command = [sys.executable, "-m", "scaling_testbed.prepare", "data=python_stdlib", f"data_dir={variant.data}"]
    subprocess.run(command, cwd=variant.place, env=variant.environment(), check=True, stdout=subprocess.DEVNULL)


def measure(variant: Variant, folder: Path, overrides: list[str]) -> None:
    """Run the grid once, and keep its wall seconds, its processor seconds and its rows."""
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        before, began = used(), time.monotonic()
        done = subprocess.run(
            variant.command(Path(runs), overrides),
            cwd=variant.place,
            env=variant.environment(),
            capture_output=True,
            text=True,
        )
        variant.times.append((time.monotonic() - began, used() - before))
        if done.returncode:
            raise RuntimeError(f"{variant.name}: {done.stderr.strip() or done.stdout.strip()}")
        rows = [json.loads(path.read_text()) for path in Path(runs).glob("*/*/result.json")]
    variant.rows = {tuple(row[key] for key in VARIED): row for row in rows}
    if len(variant.rows) != N_RUNS:
        raise RuntimeError(f"{variant.name}: {len(variant.rows)} of {N_RUNS} runs have a row")


def used() -> float:
    """Processor seconds of all processes that this one has waited for."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def compare(report: Report, options, label: str, overrides: list[str], folder: Path, seconds: float) -> None:
    variants, budget = variants_of(options.earlier, folder), Budget(2 * seconds)
    for turn in range(options.rounds):
        began = budget.left()
        for place in range(len(variants)):
            measure(variants[(turn + place) % len(variants)], folder, overrides)
        if budget.left() < began - budget.left():  # a further round would not fit
            break
    found = {
        variant.name: [statistics.median(kind) for kind in zip(*variant.times, strict=True)] for variant in variants
    }
    last = found[variants[-1].name]
    rows = [
        {
            "variant": variant.name,
            "status": "ok",
            "median_s": found[variant.name][0],
            "cpu_s": found[variant.name][1],
            "low_s": min(wall for wall, _ in variant.times),
            "high_s": max(wall for wall, _ in variant.times),
            "ratio": found[variant.name][0] / last[0],
            "cpu_ratio": found[variant.name][1] / last[1],
            "per_run_s": found[variant.name][1] / N_RUNS,
            "times": variant.times,
        }
        for variant in variants
    ]
    report.add({"label": label, "rows": rows, "notes": notes(label, variants, rows)})


def notes(label: str, variants: list[Variant], rows: list[dict[str, Any]]) -> list[str]:
    """What the numbers are of, and the verdict on the aim."""
    warm, fresh = variants[:2]
    said = [
        f"{len(warm.times)} rounds; warm and fresh: validation losses at most {apart(warm, fresh, 'val_loss')} apart"
    ]
    if len(variants) == 2:
        return said
    earlier, aim, ratio = variants[2], AIMS[label], rows[0]["ratio"]
    if len({row["data_fingerprint"] for one in (warm, earlier) for row in one.rows.values()}) == 1:
        said.append(f"warm and the earlier commit: losses of the last update at most {apart(warm, earlier)} apart")
    else:
        said.append("the earlier commit prepares another corpus; its losses are not compared")
    commit = commit_of(earlier.place)
    text = f"wall time {ratio:.2f} of that of {commit}"
    return [
        *said,
        verdict(f"{text} (aim: at most {aim})", round(ratio, 2) <= aim) if commit.startswith(BASELINE) else text,
    ]


def apart(one: Variant, other: Variant, key: str = "train_loss_last") -> str:
    return f"{max(abs(row[key] - other.rows[what][key]) for what, row in one.rows.items()):.1e}"


def commit_of(place: Path) -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=place, capture_output=True, text=True)
    return found.stdout.strip() or "an earlier commit"


def main(argv: list[str] | None = None) -> int:
    more = {"--earlier": "a folder with another commit"}
    options = harness.arguments(__doc__, argv, seconds=720, peers=False, more=more)
    report_to = options.out and Path(options.out)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepared: set[Path] = set()
        for variant in variants_of(options.earlier, folder):
            if variant.data not in prepared:
                prepare(variant)
                prepared.add(variant.data)
        machine = harness.describe_machine(harness.choose_device("cpu"))
        report = Report("grid", machine, COLUMNS, out=report_to, smoke=options.quick)
        grids = {STARTS: GRIDS[STARTS]} if options.quick else GRIDS
        work = {label: partial(compare, report, options, label, words, folder) for label, words in grids.items()}
        return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
