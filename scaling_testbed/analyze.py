"""Read what a sweep found: `python -m scaling_testbed.analyze COMMAND SWEEP_DIR [options]`"""

import sys

from scaling_testbed.commands.analyze import parse
from scaling_testbed.commands.doors import errors_reported, without_plugins


def main(argv: list[str] | None = None) -> int:
    """The door's main; returns the exit status."""
    with errors_reported() as found:
        try:
            arguments = parse(without_plugins(sys.argv[1:] if argv is None else argv), __doc__)
        except SystemExit as exit_:  # argparse has said what is wrong, or helped
            return exit_.code or 0
        found.status = arguments.command(arguments)
    return found.status


if __name__ == "__main__":
    sys.exit(main())
