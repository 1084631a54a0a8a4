"""Evaluate a checkpoint: `python -m scaling_testbed.evaluate RUN_DIR --tasks NAME`"""

import sys

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()

from scaling_testbed.commands.app import application, run
from scaling_testbed.commands.evaluate import evaluate

app = application(__doc__, [evaluate], plugins=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""
    return run(app, sys.argv[1:] if argv is None else argv, "scaling-testbed evaluate")


if __name__ == "__main__":
    sys.exit(main())
