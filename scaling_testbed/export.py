"""Write a checkpoint for transformers and lm-evaluation-harness: `python -m scaling_testbed.export RUN_DIR OUT_DIR`"""

import argparse
import sys
from pathlib import Path

from scaling_testbed.commands.doors import errors_reported, without_plugins
from scaling_testbed.config.compose import recorded_run


def command(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    from scaling_testbed.exporting.hugging_face import export

    run = recorded_run(arguments.run_dir)
    for line in export(run, arguments.run_dir, arguments.out_dir, step=arguments.step):
        print(line)
    print(f"wrote {arguments.out_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The door's main; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scaling-testbed export", description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="runs/NAME/RUN_ID")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a folder that is not there yet, or empty")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    with errors_reported() as found:
        try:
            arguments = parser.parse_args(without_plugins(sys.argv[1:] if argv is None else argv))
        except SystemExit as exit_:  # argparse has said what is wrong, or helped
            return exit_.code or 0
        found.status = command(arguments)
    return found.status


if __name__ == "__main__":
    sys.exit(main())
