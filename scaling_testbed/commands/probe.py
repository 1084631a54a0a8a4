"""The command about hidden states: probe."""

from collections.abc import Sequence
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.lengths import ValidationTokens, whole_numbers
from scaling_testbed.commands.options import Average, Json, OutTable, Step
from scaling_testbed.commands.tasks import RunDirs
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS

ProbeTasks = Annotated[
    Sequence[str],
    typer.Option(
        "--task", metavar="NAME",
        help="next_class, past_class:K, or a FILE.jsonl of texts with labels; repeatable (default: next_class)",
    ),
]  # fmt: skip
Labels = Annotated[
    str, typer.Option("--labels", metavar="N,N", show_default=True, help="numbers of labels of each class")
]
Layer = Annotated[
    str,
    typer.Option("--layer", metavar="NAME,NAME", show_default=True, help="embedding, 0, 1, ..., final, or all"),
]
Draws = Annotated[
    int, typer.Option("--draws", metavar="N", show_default=True, help="how often the labels are drawn anew")
]


def probe(
    run_dirs: RunDirs,
    task: ProbeTasks = ("next_class",),
    labels: Labels = "4,16,64,256",
    layer: Layer = "all",
    draws: Draws = 4,
    tokens: ValidationTokens = 32768,
    step: Step = None,
    average: Average = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """What linear classifiers find in frozen hidden states, by layer, number of labels and run.

    Gaussian naive Bayes and logistic regression are fitted on the states of a checkpoint. next_class is the kind of the
    next token's first character; past_class:K is that of the token K before."""
    asked = whole_numbers("--labels", labels)
    for option, value in (("--draws", draws), ("--tokens", tokens)):
        if value < 1:
            raise ConfigError(f"{option} must be greater than zero; got {value}")
    output.check(out, ENDINGS)
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation import probe as found
    from scaling_testbed.evaluation.curvature import run_folders

    rows = []
    for folder in run_folders(run_dirs):
        step_of_run, more = found.probe(
            recorded_run(folder), folder, task or ("next_class",), labels=asked, layers=layer.split(","), draws=draws,
            tokens=tokens, step=step, average=average,
        )  # fmt: skip
        rows += [{"run": row["run"], "step": step_of_run, **row} for row in more]
    written = output.write(out, rows)
    if as_json:
        output.print_json(rows)
        return
    from scaling_testbed import tables

    tables.show(rows)
    print(found.DEFINITION)
    output.say_written(written)
