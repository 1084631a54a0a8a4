"""The time that checkpoints take from a run: written at once, and by a thread beside training.

    python -m benchmarks.saves [--device cpu] [--seconds S] [--rounds N] [--out DIR] [--quick]

For each size, whole runs of STEPS updates alternate: without a checkpoint before the end, with one every EVERY updates
written at once, and with checkpoint.asynchronous=true. They are timed from the first update to the last checkpoint on
the disk. `a save` is the median time for which training stops at a checkpoint before the end. `in saves` is all such
time, with that of the last checkpoint, for which a run waits both ways. The rest of what checkpoints cost is that the
thread and training share the processor. The losses must be the same.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.report import Budget, Report
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.runs.writer import Writer
from scaling_testbed.training import run as trainer

STEPS, EVERY = 60, 10
TOKENS = ["batch.sequences=8", "batch.sequence_length=128", "evaluation.tokens=1024", f"budget.steps={STEPS}"]
SIZES = {
    "nano_xl, 8 x 128 tokens, vocabulary 257": ["model=nano_xl", "data.vocab_size=257", *TOKENS],
    "proxy_2m, 8 x 128 tokens, vocabulary 8192": ["model=proxy_2m", "data.vocab_size=8192", *TOKENS],
}
NONE, AT_ONCE, BESIDE = "no checkpoint", "at once", "asynchronous"
VARIANTS = {
    NONE: ["checkpoint.every_steps=0", "checkpoint.at_end=false"],
    AT_ONCE: [f"checkpoint.every_steps={EVERY}"],
    BESIDE: [f"checkpoint.every_steps={EVERY}", "checkpoint.asynchronous=true"],
}
COLUMNS = [
    ("median_s", "s", "s"),
    ("low_s", "min", "s"),
    ("high_s", "max", "s"),
    ("ratio", "of none", "ratio"),
]
COLUMNS += [("save_s", "a save, ms", "ms"), ("waits_s", "in saves, s", "s"), ("share", "in saves", "percent")]
QUIET = ["data=noise", "data.n_tokens=100000", "logging.every_steps=30", "evaluation.every_steps=0"]


class Timed:
    """The seconds that each call of a function has taken. began: the first call."""

    def __init__(self, function):
        self.function, self.began = function, None
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        self.began = self.began or began
        try:
            return self.function(*arguments)
        finally:
            self.seconds.append(time.perf_counter() - began)


def one_run(overrides: list[str], data: Path) -> tuple[float, list[float], float, int]:
    """Seconds of the loop, seconds for which it stops at each checkpoint, the final loss, bytes of a checkpoint."""
    save, wait, update = trainer.save, Writer.wait, trainer.make_update
    saves, updates = Timed(save), Timed(update)
    at_end: list[float] = []

    def last(writer: Writer) -> None:
        began = time.perf_counter()
        wait(writer)
        at_end.append(time.perf_counter() - began)

    trainer.save, trainer.make_update = saves, updates
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = compose([*QUIET, *overrides, f"runs_dir={folder}", f"data_dir={data}"])
            Writer.wait = last  # type: ignore[method-assign]
            row = trainer.train(run, quiet=True)
            ended = time.perf_counter()
            if row["status"] == "preempted":  # a run takes a signal for a wish to stop
                raise KeyboardInterrupt
            files = sorted((run_folder_path(run) / "checkpoints").glob("*/*"))
            size = sum(path.stat().st_size for path in files if path.parent == files[-1].parent)
    finally:
        trainer.save, trainer.make_update = save, update
        Writer.wait = wait  # type: ignore[method-assign]
    stops = saves.seconds
    if run.checkpoint.asynchronous:
        stops[-1] += at_end[-2]  # the very last is that of the context, which has nothing to wait for
    return ended - (updates.began or ended), stops, row["val_loss"], size


def compare(report: Report, options, device, label: str, overrides: list[str], seconds: float) -> None:
    found: dict[str, list[tuple[float, list[float]]]] = {kind: [] for kind in VARIANTS}
    losses, sizes, budget = set(), set(), Budget(seconds)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, options.rounds):
            for kind in list(VARIANTS)[number % 3 :] + list(VARIANTS)[: number % 3]:
                words = [*overrides, *VARIANTS[kind], f"compute.device={device.type}"]
                taken, stops, loss, size = one_run(words, Path(folder))
                losses.add(loss)
                if size:
                    sizes.add(size)
                if number >= 0:
                    found[kind].append((taken, stops))
            if number >= harness.LEAST_ROUNDS and budget.left() < 0:
                break
    medians = {kind: statistics.median(taken for taken, _ in times) for kind, times in found.items()}
    rows = [
        {
            "variant": kind,
            "status": "ok" if len(losses) == 1 else "wrong: the losses differ",
            "seconds": [taken for taken, _ in times],
            "median_s": medians[kind],
            "low_s": min(taken for taken, _ in times),
            "high_s": max(taken for taken, _ in times),
            "ratio": medians[kind] / medians[NONE],
            "save_s": statistics.median([one for _, stops in times for one in stops[:-1]] or [0.0]),
            "waits_s": statistics.median(sum(stops) for _, stops in times),
            "share": statistics.median(sum(stops) / taken for taken, stops in times),
        }
        for kind, times in found.items()
    ]
    stops = {row["variant"]: row["save_s"] for row in rows}
    notes = [f"{max(sizes) / 1e6:.1f} MB in a checkpoint, {STEPS // EVERY} of them"]
    notes.append(f"training stops {stops[AT_ONCE] / stops[BESIDE]:.1f} times longer where one is written at once")
    report.add({"label": label, "rows": rows, "notes": notes})


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=300, peers=False)
    device = harness.choose_device(options.device)
    report = Report(
        "saves", harness.describe_machine(device), COLUMNS, out=options.out and Path(options.out), smoke=options.quick
    )
    sizes = dict(list(SIZES.items())[:1]) if options.quick else SIZES
    work = {label: partial(compare, report, options, device, label, overrides) for label, overrides in sizes.items()}
    return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
