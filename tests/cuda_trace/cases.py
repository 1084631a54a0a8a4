"""The traced runs, and the figures that a step of them may not exceed, with PyTorch 2.11.

CUDA_TRACE_PYTHON=PATH python -m tests.cuda_trace.cases        records the figures anew
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sizes import SIZES
from tests.cuda_trace import stand_in

PYTHON = "CUDA_TRACE_PYTHON"  # names the Python with a CUDA build of PyTorch, if it is not this one
FIGURES = Path(__file__).with_name("figures.json")
AT_MOST = ("launches", "bytes_per_token", "peak_bytes")
SHORT = ["evaluation.tokens=32768", "evaluation.rows=4"]
CASES = {name: [*overrides, *SHORT] for name, overrides in SIZES.items()}


class NotHere(Exception):
    """The message says why nothing can be traced here."""


class Tracer:
    """Runs modules of this folder on the stand-in, which it builds in `folder`. Raises NotHere."""

    def __init__(self, folder: Path):
        self.python, self.folder = os.environ.get(PYTHON, sys.executable), folder
        if reason := stand_in.build(self.python, folder):
            raise NotHere(f"{self.python}: {reason}; {PYTHON} may name a Python with a CUDA build of PyTorch and Hydra")

    def run(self, module: str, *arguments: str, timeout: float = 900) -> Any:
        """The JSON that the module prints."""
        done = stand_in.run(self.python, self.folder, ["-m", f"tests.cuda_trace.{module}", *arguments], timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    def trace(self, cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        """What a step of each case asks of the GPU."""
        return self.run("step", json.dumps(cases))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tracer = Tracer(Path(folder))
        found = tracer.trace(CASES)
    figures = {name: {key: round(traced[key]) for key in AT_MOST} for name, traced in found.items()}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(FIGURES.read_text())


if __name__ == "__main__":
    main()
