"""Results of the benchmarks: written as JSON, printed as tables, gathered in README.md."""

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
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "numpy")
# How a column prints its number.
FORMATS: dict[str, Callable[[float], str]] = {
    "ms": lambda x: f"{x * 1e3:,.2f}" if x < 1 else f"{x * 1e3:,.0f}",
    "MiB": lambda x: f"{x / 2**20:,.0f}",
    "GiB": lambda x: f"{x / 2**30:.1f}",
    "ratio": lambda x: f"{x:.2f}",
    "percent": lambda x: f"{100 * x:.1f}%",
    "tera": lambda x: f"{x / 1e12:,.0f}",
    "count": lambda x: f"{x:,.0f}",
    "loss": lambda x: f"{x:.5f}",
    "small": lambda x: f"{x:.1e}",
}


class Report:
    """One result, written after every shape so that nothing measured is lost.

    columns: (key of a row, title, name in FORMATS). smoke: too small to mean anything; written only where `out` says,
    and never shown in the README.
    """

    def __init__(self, bench: str, machine: dict[str, Any], columns: Sequence[tuple], *, out: Path | None, smoke: bool):
        folder = out or (None if smoke else HERE / "results")
        slug = re.sub(r"[^a-z0-9]+", "-", machine["machine"].lower()).strip("-")
        date = time.strftime("%Y-%m-%d")
        self.path = folder and folder / f"{bench}-{slug}-{date}.json"
        self.data = {"bench": bench, **machine, "date": date, "commit": _commit(), "smoke": smoke}
        self.data |= {"command": f"python -m benchmarks.{bench} {' '.join(sys.argv[1:])}".strip()}
        self.data |= {"versions": _versions(), "columns": list(columns), "absent": [], "cases": [], "not_reached": []}
        ceilings = machine["ceilings"]
        print(f"{machine['machine']}: {describe_ceilings(ceilings)}", flush=True)

    def add(self, case: dict[str, Any]) -> None:
        """case: label, rows, notes, and whatever else is worth keeping."""
        self.data["cases"].append(case)
        print(
            f"{case['label']}: " + "; ".join(map(_short, case["rows"])), *case.get("notes", []), sep="\n  ", flush=True
        )
        self.write()

    @contextlib.contextmanager
    def attempt(self, label: str):
        """What goes wrong inside costs this shape, not the ones after it."""
        try:
            yield
        except Exception as error:
            self.data["not_reached"].append(f"{label} ({first_line(error)})")
            print(self.data["not_reached"][-1], flush=True)

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def finish(self) -> None:
        self.write()
        print("\n" + table(self.data))
        if self.path:
            print(f"\nwritten: {self.path}")


def _short(row: dict[str, Any]) -> str:
    return f"{row['variant']} {FORMATS['ms'](row['median_s'])} ms" if "median_s" in row else f"{row['variant']}"


def describe_ceilings(ceilings: dict[str, float]) -> str:
    product, copy = ceilings["product_flops_per_s"], ceilings["copy_bytes_per_s"]
    return f"matrix product {product / 1e12:.3g} TFLOP/s, copy {copy / 1e9:,.0f} GB/s (measured)"


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
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
    for title, names in (("left out", result["absent"]), ("not reached in time", result["not_reached"])):
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
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------ the README


def write_readme_tables(readme: Path = HERE / "README.md", results: Path = HERE / "results") -> None:
    """Fill what lies between `<!-- results: BENCH DEVICE -->` and `<!-- end -->` from the results there are."""
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
    head = f"{result['machine']}; {describe_ceilings(result['ceilings'])}; {result['date']}, commit {result['commit']}"
    return f"{head}; {versions}. `{result['command']}`\n\n{table(result)}"


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")[:120]
