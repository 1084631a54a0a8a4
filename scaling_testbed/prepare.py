"""Tokenise a corpus into shards: `python -m scaling_testbed.prepare data=text_files data.files='*.md' tokenizer=bpe`

Training does this by itself where it is needed; a large corpus is better prepared once, beforehand. Killed and
started again it goes on where it was.
"""

import sys
from pathlib import Path

from scaling_testbed.commands.doors import run_door
from scaling_testbed.config.run import RunConfig


def command(run: RunConfig) -> int:
    """Prepare and print what is there."""
    from scaling_testbed.data.preparing.preparation import prepare
    from scaling_testbed.data.shards import describe, open_prepared

    folder = prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir), workers=run.data_workers)
    print(describe(open_prepared(folder)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The door's main; returns the exit status."""
    return run_door(command, sys.argv[1:] if argv is None else argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
