"""The command line of lm-evaluation-harness, which finds runs as `--model scaling_testbed`:
`python -m scaling_testbed.lm_eval --model scaling_testbed --model_args run_dir=runs/NAME/RUN_ID --tasks NAME`"""

import sys

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()

from scaling_testbed.commands.doors import errors_reported
from scaling_testbed.commands.harness import harness_command_line


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` of lm_eval. Returns the exit status."""
    with errors_reported() as found:
        harness_command_line(sys.argv[1:] if argv is None else argv)
    return found.status


if __name__ == "__main__":
    sys.exit(main())
