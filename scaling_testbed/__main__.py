"""All commands under one name: `scaling-testbed train ...` and `python -m scaling_testbed train ...`."""

import functools
import importlib
import os
import sys

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "scaling-testbed":  # before the imports that take time
    from scaling_testbed.processes.interpreter import end_at_once
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()
    end_at_once()

from scaling_testbed import analyze, sweep
from scaling_testbed.commands.app import add_door, add_verb, application, run
from scaling_testbed.commands.evaluate import evaluate
from scaling_testbed.commands.export import export
from scaling_testbed.commands.sample import sample
from scaling_testbed.processes.interpreter import planned

NAME = "scaling-testbed"
ABOUT = "Pretrain small language models in grids, and analyse the results."


def _open(name: str, words: list[str]) -> int:
    """Run a command whose arguments are for another library. Its module is imported only now."""
    return importlib.import_module(f"scaling_testbed.{name}").main(words)


app = application(ABOUT, groups={"sweep": sweep.app, "analyze": analyze.app}, completion=True)
for name, about in {
    "train": "Train one model.",
    "prepare": "Tokenise a corpus into shards.",
    "lm_eval": "The command line of lm-evaluation-harness, with --model scaling_testbed.",
}.items():
    add_door(app, name, about, functools.partial(_open, name))
add_verb(app, evaluate, plugins=True)
add_verb(app, export, plugins=True)
add_verb(app, sample, plugins=True)


def main() -> int:
    """Run the command that the first argument names. Returns the exit status. If a shell asks for completion by its
    environment variable, answers it."""
    if f"_{NAME}_COMPLETE".replace("-", "_").upper() in os.environ:
        app(prog_name=NAME)
    return planned(run(app, sys.argv[1:] or ["--help"], NAME))


if __name__ == "__main__":
    sys.exit(main())
