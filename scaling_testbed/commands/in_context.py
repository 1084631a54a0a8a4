"""The command about groups of answers: in_context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.lengths import DEFAULT_TOKENS, ValidationTokens
from scaling_testbed.commands.options import Average, Json, OutTable, Step
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS

RunDirs = Annotated[
    Sequence[Path],
    typer.Argument(metavar="RUN_DIR", help="finished runs; the folder of a sweep stands for all its runs"),
]


def in_context(
    run_dirs: RunDirs,
    tokens: ValidationTokens = DEFAULT_TOKENS,
    step: Step = None,
    average: Average = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """The accuracy of checkpoints on groups of answers: learned in the sequence, or from training.

    For data=in_context_tasks: answers in the second half of a sequence, for tasks of the train split and unseen ones,
    and for symbols that the sequence has had and new ones. Only memory answers a new symbol, and only the sequence
    answers an unseen task. Of several runs, the table has the keys in which they differ."""
    if tokens < 1:
        raise ConfigError(f"--tokens must be greater than zero; got {tokens}")
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation import target_groups as found
    from scaling_testbed.evaluation.curvature import run_folders

    folders = run_folders(run_dirs)
    runs = [recorded_run(folder) for folder in folders]
    output.check(out, ENDINGS)
    rows = []
    for run, folder, varied in zip(runs, folders, found.differing(runs), strict=True):
        made = found.of_run(run, folder, tokens=tokens, step=step, average=average)
        rows += [{"run": row.pop("run"), **varied, **row} for row in made]
    written = output.write(out, rows)
    if as_json:
        output.print_json({"groups": rows})
        return
    from scaling_testbed import tables

    tables.show(rows)
    print(found.DEFINITION)
    output.say_written(written)
