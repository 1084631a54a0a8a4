"""The command about planted strings: exposure."""

from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import Average, Json, OutTable, Step
from scaling_testbed.commands.tasks import RunDirs
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS

Others = Annotated[
    int,
    typer.Option(
        "--others", metavar="N", show_default=True, help="number of random secrets that each secret is compared with"
    ),
]


def exposure(
    run_dirs: RunDirs,
    others: Others = 1000,
    step: Step = None,
    average: Average = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """How well checkpoints know the strings by heart that data=canaries planted, by how often they were planted.

    A secret has a high exposure if its loss is lower than those of random secrets after the same prompt. --out writes a
    row for each string."""
    if others < 1:
        raise ConfigError(f"--others must be greater than zero; got {others}")
    output.check(out, ENDINGS)
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation import exposure as found
    from scaling_testbed.evaluation.curvature import run_folders

    rows, records = [], []
    for folder in run_folders(run_dirs):
        step_of_run, strings = found.exposures(recorded_run(folder), folder, others, step=step, average=average)
        about = {"run": folder.name, "step": step_of_run}
        rows += [about | row for row in found.summaries(strings)]
        records += [about | row for row in found.records(strings)]
    written = output.write(out, records)
    if as_json:
        output.print_json(rows)
        return
    from scaling_testbed import tables

    tables.show(rows)
    print(found.DEFINITION)
    output.say_written(written)
