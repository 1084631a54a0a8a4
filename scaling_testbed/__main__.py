"""`scaling-testbed train ...` and `python -m scaling_testbed train ...`: the doors under one name."""

import importlib
import sys

DOORS = {
    "train": "train one model",
    "sweep": "plan, run, submit and watch grids of runs",
    "prepare": "tokenise a corpus into shards",
    "analyze": "learning-rate sensitivity, instabilities, laws, reports, a look into a checkpoint, task scores",
    "export": "write a checkpoint for Hugging Face's transformers",
}


def main() -> int:
    """Open the door named by the first argument; returns the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in DOORS:
        return importlib.import_module(f"scaling_testbed.{name}").main(sys.argv[2:])
    usage = "usage: scaling-testbed COMMAND [key=value ...]\n" + "\n".join(f"  {k:9}{v}" for k, v in DOORS.items())
    print(usage if name in ("-h", "--help") else f"error: there is no command {name!r}\n{usage}")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
