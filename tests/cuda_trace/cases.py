"""The traced runs, and the figures that a step of them may not exceed, with PyTorch 2.11.

CUDA_TRACE_PYTHON=PATH python -m tests.cuda_trace.cases        records the figures anew
"""

import json
import os
import subprocess
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
CASES["10m, compiled"] = [*CASES["10m"], "compute.compile=true"]


class NotHere(Exception):
    """The message says why nothing can be traced here."""


class Tracer:
    """Runs modules of this folder on the stand-in, which it builds in `folder`. Raises NotHere."""

    def __init__(self, folder: Path):
        self.python, self.folder = os.environ.get(PYTHON, sys.executable), folder
        if reason := stand_in.build(self.python, folder):
            raise NotHere(f"{self.python}: {reason}; {PYTHON} may name a Python with a CUDA build of PyTorch and Hydra")

    def run(self, module: str, *arguments: str, **environment: str) -> Any:
        """The JSON that the module prints."""
        command = [self.python, "-m", f"tests.cuda_trace.{module}", *arguments]
        environment = stand_in.environment(self.folder) | environment
        done = subprocess.run(command, cwd=stand_in.ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    def trace(self, cases: dict[str, list[str]], **environment: str) -> dict[str, dict[str, Any]]:
        """What a step of each case asks of the GPU."""
        return self.run("step", json.dumps(cases), **environment)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tracer = Tracer(Path(folder))
        found = tracer.trace(CASES)
    if failed := {name: of["error"] for name, of in found.items() if "error" in of}:
        sys.exit(f"nothing was recorded: {failed}")
    figures = {name: {key: round(of[key]) for key in AT_MOST if key in of} for name, of in found.items()}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(FIGURES.read_text())


if __name__ == "__main__":
    main()
