"""Train one model: `python -m scaling_testbed.train model=nano_m optimizer.lr=1e-2 ...`

Every key=value is a Hydra override. --cfg job prints the whole configuration, --help the choices, and --help optimizer
the keys of a section.
plugins=[MODULE_OR_FILE.py] loads plug-ins. configs=DIR adds a folder that is searched for choices.
--dry-run prints parameters, steps, FLOPs and memory per GPU, and does not train.
Exit status: 0 finished or diverged, 75 stopped by a signal or owned by another process, 2 a wrong key or value, 1
anything else.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()

from scaling_testbed.commands.doors import errors_reported, run_door
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import RunConfig, run_folder_path
from scaling_testbed.errors import DONE, STOPPED, ConfigError
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.world import is_main_process
from scaling_testbed.progress import release_streams, say

ASSUMED_VOCABULARY = 50432  # GPT-NeoX's, padded; for a dry run before the data is prepared


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--dry-run" in argv:
        return run_door(dry_run, [argument for argument in argv if argument != "--dry-run"], __doc__)
    with Interrupts() as interrupts:  # before anything that takes time, such as loading torch
        if any(argument.startswith("-") for argument in argv):  # --help, and Hydra's own options
            return run_door(lambda run: report(run, load_train()(run, interrupts)), argv, __doc__)
        # Composed here and not in another function, so that few frames lie between the command and the model.
        with errors_reported(of_ranks=True) as found:
            run = compose(argv)
            train = load_train()
            found.status = report(run, train(run, interrupts))
        return found.status


def load_train() -> Callable[..., dict[str, Any]]:
    """Import training.run.train, which imports torch."""
    # Threads that spin while they wait slow each other down on a busy machine. With one other process on two cores, a
    # nano step took 0.28 s without this and 0.10 s with it. On an idle machine it costs 9%. torch reads it at import.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from scaling_testbed.training.run import train

    return train


def report(run: RunConfig, row: dict[str, Any]) -> int:
    """Print the row of `run`, and return its exit status."""
    from scaling_testbed.runs.row import describe_row

    if is_main_process():
        say(describe_row(row, run_folder_path(run)))
        release_streams()  # a run ends with its own status, whatever becomes of the output
    return STOPPED if row["status"] == "preempted" else DONE


def dry_run(run: RunConfig) -> int:
    """Print parameters, steps, FLOPs and memory of a run."""
    from scaling_testbed.sweeps.dry_run import describe_run
    from scaling_testbed.sweeps.plan import planned_train_tokens, planned_vocab_size

    try:
        vocab_size = planned_vocab_size(run)
    except ConfigError:
        vocab_size = ASSUMED_VOCABULARY
        print(f"the vocabulary is not known before the data is prepared; {vocab_size:,} is assumed")
    print(describe_run(run, vocab_size, planned_train_tokens(run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
