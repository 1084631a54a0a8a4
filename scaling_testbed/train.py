"""Train one model: `python -m scaling_testbed.train model=nano_m optimizer.lr=1e-2 ...`

Every key=value is a Hydra override. --cfg job prints the whole configuration, --help the choices, --help optimizer what
the keys of a section mean.
plugins=[MODULE_OR_FILE.py] loads what someone else wrote, configs=DIR is searched for choices too.
--dry-run prints parameters, steps, FLOPs and memory per GPU, and does nothing.
Exit status: 0 finished or diverged, 75 stopped by a signal or owned by another process, 2 a wrong key or value, 1
anything else.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from scaling_testbed.commands.doors import errors_reported, run_door
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import RunConfig, run_folder_path
from scaling_testbed.errors import DONE, STOPPED, ConfigError
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.world import is_main_process

ASSUMED_VOCABULARY = 50432  # GPT-NeoX's, padded; for a dry run where only preparing could tell


def main(argv: list[str] | None = None) -> int:
    """The door's main; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--dry-run" in argv:
        return run_door(dry_run, [argument for argument in argv if argument != "--dry-run"], __doc__)
    with Interrupts() as interrupts:  # before anything that takes time, such as loading torch
        if any(argument.startswith("-") for argument in argv):  # --help, and Hydra's own options
            return run_door(lambda run: report(run, load_train()(run, interrupts)), argv, __doc__)
        # Here and not in a function that composes, so that few frames lie between the command and the model.
        with errors_reported() as found:
            run = compose(argv)
            train = load_train()
            found.status = report(run, train(run, interrupts))
        return found.status


def load_train() -> Callable[..., dict[str, Any]]:
    """training.run.train, and torch with it."""
    # Threads that spin while they wait starve each other on a busy machine: with one other process on two cores a
    # nano step took 0.28 s, and 0.10 s with this, which costs 9% on an idle one. It is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from scaling_testbed.training.run import train

    return train


def report(run: RunConfig, row: dict[str, Any]) -> int:
    """Print the row of `run`; returns the exit status that it means."""
    from scaling_testbed.runs.row import describe_row

    if is_main_process():
        print(describe_row(row, run_folder_path(run)))
    return STOPPED if row["status"] == "preempted" else DONE


def dry_run(run: RunConfig) -> int:
    """Print what the run would be."""
    from scaling_testbed.sweeps.dry_run import describe_run
    from scaling_testbed.sweeps.plan import planned_vocab_size

    try:
        vocab_size = planned_vocab_size(run)
    except ConfigError:
        vocab_size = ASSUMED_VOCABULARY
        print(f"the vocabulary is not known before data is prepared: {vocab_size:,} is assumed")
    print(describe_run(run, vocab_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
