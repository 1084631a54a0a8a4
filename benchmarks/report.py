"""Results of the benchmarks, written as JSON, printed as tables and collected in README.md."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "transformers",
    "accelerate",
    "numpy",
    "datasets",
    "tokenizers",
)
# The formats of numbers in columns.
FORMATS: dict[str, Callable[[float], str]] = {
    "ms": lambda x: f"{x * 1e3:,.2f}" if x < 1 else f"{x * 1e3:,.0f}",
    "s": lambda x: f"{x:,.2f}",
    "MiB": lambda x: f"{x / 2**20:,.0f}",
    "GiB": lambda x: f"{x / 2**30:.1f}",
    "ratio": lambda x: f"{x:.2f}",
    "percent": lambda x: f"{100 * x:.1f}%",
    "tera": lambda x: f"{x / 1e12:,.0f}",
    "count": lambda x: f"{x:,.0f}",
    "loss": lambda x: f"{x:.5f}",
    "small": lambda x: f"{x:.1e}",
    "yes": lambda x: "yes" if x else "no",
}


class Budget:
    """The time budget of a benchmark in seconds. Each shape gets a share of the remaining time."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, shapes_left: int) -> float:
        """Seconds for timing one of `shapes_left` shapes. About half of the time is for compilation and checks."""
        return max(0.0, self.left()) / max(1, shapes_left) / 2


class DeviceLost(RuntimeError):
    """This process can no longer use the device."""


class Report:
    """One result. It is written after every shape, so that no measurement is lost.

    columns: (key of a row, title, name in FORMATS). smoke: whether the sizes are too small to be meaningful; such a
    result is written only to `out`, and never shown in the README. module: the module that is run, if its name is not
    `bench`.
    """

    def __init__(
        self,
        bench: str,
        machine: dict[str, Any],
        columns: Sequence[tuple],
        *,
        out: Path | None,
        smoke: bool,
        module: str | None = None,
    ):
        folder = out or (None if smoke else HERE / "results")
        slug = re.sub(r"[^a-z0-9]+", "-", machine["machine"].lower()).strip("-")
        date = time.strftime("%Y-%m-%d")
        self.path = folder and folder / f"{bench}-{slug}-{date}.json"
        self.data = {"bench": bench, **machine, "date": date, "commit": _commit(), "smoke": smoke}
        self.data |= {"command": f"python -m benchmarks.{module or bench} {' '.join(sys.argv[1:])}".strip()}
        self.data |= {"versions": _versions(), "columns": list(columns), "absent": [], "cases": [], "not_reached": []}
        ceilings = machine["ceilings"]
        print(f"{machine['machine']}: {describe_ceilings(ceilings)}", flush=True)

    def keep(self, same: Sequence[str]) -> list[str]:
        """Take over the cases that are `done` in a result of this day, and return their labels.

        Its commit and the entries `same` must equal those of this result, and no file may differ from the commit.
        """
        if not self.path or not self.path.is_file() or (self.data["commit"] or "with changes").endswith("with changes"):
            return []
        before = json.loads(self.path.read_text())
        if any(before.get(name) != self.data[name] for name in ("commit", *same)):
            return []
        self.data["cases"] = [case for case in before["cases"] if case.get("done")]
        return [case["label"] for case in self.data["cases"]]

    def add(self, case: dict[str, Any]) -> None:
        """Add a case: a dict with label, rows, optionally notes, and further data to save."""
        self.data["cases"].append(case)
        print(
            f"{case['label']}: " + "; ".join(map(_short, case["rows"])), *case.get("notes", []), sep="\n  ", flush=True
        )
        self.write()

    def run(self, work: dict[str, Callable[[float], object]], budget: Budget) -> int:
        """Run the pieces of work while time is left, and return the exit status.

        work: label -> function of the seconds that it may take, which adds its cases. An exception ends its piece only;
        an interrupt or a lost device also ends the remaining pieces. The result names the pieces that were not
        finished. The exit status is 1 after an exception, or if a variant of this project fails or is wrong.
        """
        self.data["not_reached"] = list(work)
        status = 0
        for place, (label, piece) in enumerate(work.items()):
            if budget.left() <= 0:
                break
            try:
                piece(budget.share(len(work) - place))
                self.data["not_reached"].remove(label)
            except (Exception, KeyboardInterrupt) as error:
                status = 1
                where = self.data["not_reached"].index(label)
                self.data["not_reached"][where] = f"{label} ({first_line(error)})"
                print(self.data["not_reached"][where], flush=True)
                if isinstance(error, DeviceLost | KeyboardInterrupt):
                    break
        self.finish()
        return self.status or status

    @property
    def status(self) -> int:
        """The exit status: 1 if a variant of this project fails or is wrong."""
        return int(any(_broken(row) for case in self.data["cases"] for row in case["rows"]))

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_suffix(".partial")  # an interrupted write leaves the previous file intact
            whole.write_text(json.dumps(self.data, indent=1) + "\n")
            whole.replace(self.path)

    def finish(self) -> None:
        self.write()
        print("\n" + table(self.data))
        if self.path:
            print(f"\nwritten: {self.path}")


def _broken(row: dict[str, Any]) -> bool:
    return bool(row.get("ours")) and row["status"].startswith(("failed", "wrong", "the process"))


def verdict(text: str, met: bool) -> str:
    """The text of an aim and its result, followed by whether the aim is met."""
    return f"{text}: {'met' if met else 'NOT met'}"


def _short(row: dict[str, Any]) -> str:
    return f"{row['variant']} {FORMATS['ms'](row['median_s'])} ms" if "median_s" in row else f"{row['variant']}"


def describe_ceilings(ceilings: dict[str, float]) -> str:
    product, copy = ceilings["product_flops_per_s"], ceilings["copy_bytes_per_s"]
    return f"matrix product {product / 1e12:.3g} TFLOP/s, copy {copy / 1e9:,.0f} GB/s (measured)"


def table(result: dict[str, Any]) -> str:
    """The table of a result in Markdown."""
    columns = result["columns"]
    lines = ["| case | variant | " + " | ".join(title for _, title, _ in columns) + " |"]
    lines += ["|---|---|" + "---:|" * len(columns)]
    for case in result["cases"]:
        for row in case["rows"]:
            cells = [_cell(row, key, form) for key, _, form in columns]
            if row["status"] != "ok":
                cells = [row["status"], *[""] * (len(columns) - 1)]
            lines.append(" | ".join([f"| {case['label']}", row["variant"], *cells]) + " |")
    lines += [f"\n{case['label']}: {note}" for case in result["cases"] for note in case.get("notes", [])]
    for title, names in (("left out", result["absent"]), ("not measured", result["not_reached"])):
        lines += [f"\n{title}: {', '.join(names)}"] if names else []
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else FORMATS[form](value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _commit() -> str | None:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")  # untracked files do not count as changes
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------ the README


def write_readme_tables(readme: Path = HERE / "README.md", results: Path = HERE / "results") -> None:
    """Write the results between `<!-- results: BENCH DEVICE -->` and `<!-- end -->` into the README."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]

    def fill(match: re.Match) -> str:
        bench, device = match[1], match[2]
        newest = {r["machine"]: r for r in found if (r["bench"], r["device"], r["smoke"]) == (bench, device, False)}
        text = "\n\n".join(_described(result) for result in newest.values()) or "Not yet measured."
        return f"<!-- results: {bench} {device} -->\n{text}\n<!-- end -->"

    pattern = r"<!-- results: (\w+) (\w+) -->\n.*?<!-- end -->"
    readme.write_text(re.sub(pattern, fill, readme.read_text(), flags=re.DOTALL))


def _described(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = f"commit {result['commit']}" if result["commit"] else "commit not known"
    head = f"{result['machine']}; {describe_ceilings(result['ceilings'])}; {result['date']}, {commit}"
    return f"{head}; {versions}. `{result['command']}`\n\n{table(result)}"


def first_line(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")[:120]
