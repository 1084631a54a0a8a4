"""Train one model: `python -m scaling_testbed.train model=nano_m optimizer.lr=1e-2 ...`

Every key=value is a Hydra override. --cfg job prints the whole configuration, --help the choices, and --help optimizer
the keys of a section.
plugins=[MODULE_OR_FILE.py] loads plug-ins. configs=DIR adds a folder that is searched for choices.
--dry-run prints parameters, steps, FLOPs and memory per GPU, and does not train.
-q prints only warnings, errors and the result; -v prints more, such as the kernels and the memory that was found.
Exit status: 0 finished or diverged, 75 stopped by a signal or owned by another process, 2 a wrong key or value, 1
anything else.
"""

import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interpreter import end_at_once
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()
    end_at_once()

from scaling_testbed.commands.doors import errors_reported, run_door, without_verbosity
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import RunConfig, check_planned, run_folder_path
from scaling_testbed.errors import DONE, STOPPED, ConfigError
from scaling_testbed.processes.interpreter import importing_torch, planned
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.processes.world import check_world, is_main_process, world_from_environment
from scaling_testbed.progress import RESULT, release_streams, say, verbosity

ASSUMED_VOCABULARY = 50432  # GPT-NeoX's, padded; for a dry run before the data is prepared


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""
    with errors_reported(of_ranks=True) as found:
        argv, level = without_verbosity(sys.argv[1:] if argv is None else argv)
    if found.status:
        return found.status
    if "--dry-run" in argv:
        return run_door(dry_run, [argument for argument in argv if argument != "--dry-run"], __doc__)
    with verbosity(level), Interrupts() as interrupts:  # before anything that takes time, such as loading torch
        if any(argument.startswith("-") for argument in argv):  # --help, and Hydra's own options
            return run_door(lambda run: report(run, load_train()(run, interrupts)), argv, __doc__)
        # Composed here and not in another function, so that few frames lie between the command and the model.
        with errors_reported(of_ranks=True) as found:
            run = compose(argv)
            row = served(run)
            if row is None:
                train = load_train()
                row = train(run, interrupts)
            found.status = report(run, row)
        return found.status


def served(run: RunConfig) -> dict[str, Any] | None:
    """The row of `run` if it has ended before and this is its only process, else None. Does not import torch."""
    from scaling_testbed.runs.finished import final_row
    from scaling_testbed.runs.folder import RunFolder

    world = world_from_environment()
    check_world(world, run.parallelism, run.batch.sequences)
    check_planned(run)
    return final_row(RunFolder(run_folder_path(run)), run, quiet=False) if world.size == 1 else None


def load_train() -> Callable[..., dict[str, Any]]:
    """Import training.run.train, which imports torch."""
    with importing_torch():
        from scaling_testbed.training.run import train

    return train


def report(run: RunConfig, row: dict[str, Any]) -> int:
    """Print the row of `run`, and return its exit status."""
    from scaling_testbed.runs.row import STOPPED_EARLY, describe_row

    if is_main_process():
        say(describe_row(row, run_folder_path(run)), level=RESULT)
        release_streams()  # a run ends with its own status, whatever becomes of the output
    return STOPPED if row["status"] in STOPPED_EARLY else DONE


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
    sys.exit(planned(main()))
