"""Train one model: `python -m scaling_testbed.train model=nano_m optimizer.lr=1e-2 ...`

Every key=value is a Hydra override; --cfg job prints the whole configuration, --help the choices.
Exit status: 0 finished or diverged, 75 stopped by a signal or owned by another process, 2 a wrong key or value, 1
anything else.
"""

import os
import sys

from scaling_testbed.config.compose import run_door
from scaling_testbed.config.schema import RunConfig, run_folder_path
from scaling_testbed.running.world import is_main_process


def command(run: RunConfig) -> int:
    """Train and print the row."""
    # Threads that spin while they wait starve each other on a busy machine: with one other process on two cores a
    # nano step took 0.28 s, and 0.10 s with this, which costs 9% on an idle one. It is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from scaling_testbed.running.records import describe_row
    from scaling_testbed.running.trainer import train

    row = train(run)
    if is_main_process():
        print(describe_row(row, run_folder_path(run)))
    return 75 if row["status"] == "preempted" else 0


def main(argv: list[str] | None = None) -> int:
    """The door's main; returns the exit status."""
    return run_door(command, sys.argv[1:] if argv is None else argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
