"""Tokenise a corpus into shards: `python -m scaling_testbed.prepare data=text_files data.files='*.md' tokenizer=bpe`

Training does this itself if needed. Prepare a large corpus once before training. If the command is killed, the same
command continues where it stopped.
"""

import sys
from pathlib import Path

from scaling_testbed.commands.doors import run_door
from scaling_testbed.config.run import RunConfig


def command(run: RunConfig) -> int:
    """Prepare a corpus and describe it."""
    from scaling_testbed.data.preparing.preparation import prepare
    from scaling_testbed.data.shards import open_prepared
    from scaling_testbed.data.summary import describe

    folder = prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir), workers=run.data_workers, tell=False)
    print(describe(open_prepared(folder)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""
    return run_door(command, sys.argv[1:] if argv is None else argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
