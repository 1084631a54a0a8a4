"""Tokenise a corpus into shards: `python -m scaling_testbed.prepare data=text_files data.files='*.md' tokenizer=bpe`

Training does this itself if needed. Prepare a large corpus once before training. If the command is killed, the same
command continues where it stopped. Exit status: 75 if a signal stopped it.
-q prints only warnings, errors and the description of the corpus; -v prints more.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()

from scaling_testbed.commands.doors import errors_reported, run_door, without_verbosity
from scaling_testbed.config.run import RunConfig
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.progress import verbosity


def command(run: RunConfig) -> int:
    """Prepare a corpus and describe it."""
    from scaling_testbed.data.preparing.preparation import prepare
    from scaling_testbed.data.shards import open_prepared
    from scaling_testbed.data.summary import describe, left_out_since

    folder = prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir), workers=run.data_workers, tell=False)
    data = open_prepared(folder)
    print(describe(data))
    if said := left_out_since(data.manifest, run.data.files_left_out()):
        print(said)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""

    def interruptible(run: RunConfig) -> int:
        with Interrupts() as interrupts, interrupts.at_once():
            return command(run)

    with errors_reported() as found:
        argv, level = without_verbosity(sys.argv[1:] if argv is None else argv)
    if found.status:
        return found.status
    with verbosity(level):
        return run_door(interruptible, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
