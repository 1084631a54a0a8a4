"""The machine: its name, its memory, the versions, and the measured limits of its rates.

python -m benchmarks.machine [--device cpu] [--out DIR]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import harness
from benchmarks.report import Report


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=20)
    machine = harness.describe_machine(harness.choose_device(options.device))
    report = Report("machine", machine, [], out=options.out, smoke=True)
    report.write()
    for name, version in report.data["versions"].items():
        print(f"{name} {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
