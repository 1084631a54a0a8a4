"""Plan, run and watch grids of runs.

python -m scaling_testbed.sweep VERB sweep=NAME [key=value ...] [options]
"""

import sys

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()

from scaling_testbed.commands.app import application, run
from scaling_testbed.commands.sweep import collect, plan, retry, status, submit
from scaling_testbed.commands.sweep import run as run_here
from scaling_testbed.commands.sync import sync

app = application(__doc__, [plan, run_here, submit, retry, status, collect, sync])


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""
    return run(app, sys.argv[1:] if argv is None else argv, "scaling-testbed sweep")


if __name__ == "__main__":
    sys.exit(main())
