"""The commands about single documents of tasks: pass_at, margins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.lengths import whole_numbers
from scaling_testbed.commands.options import Average, Json, OutTable, RunDir, Step, out
from scaling_testbed.commands.tasks import MaxLength, Models, named_files
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS

SHOWN = 10  # documents of a table on the terminal
Samples = Annotated[
    str, typer.Option("--samples", metavar="N,N", show_default=True, help="the numbers N of pass@N, such as 1,64,256")
]
Temperatures = Annotated[
    str,
    typer.Option("--temperatures", metavar="X,X", show_default=True, help="each divides the logits of the samples"),
]
OrAnswers = Annotated[
    Sequence[Path],
    typer.Argument(metavar="[TASK.jsonl]", help="files of tasks; none: the answers of the run's validation split"),
]
OutLikely = Annotated[
    Sequence[Path], out("save log P of each document and temperature: .csv, .json, .jsonl or .parquet")
]


def pass_at(
    run_dir: RunDir,
    tasks: OrAnswers = (),
    samples: Samples = "1,16,256",
    temperatures: Temperatures = "1",
    step: Step = None,
    average: Average = False,
    max_length: MaxLength = None,
    as_json: Json = False,
    out: OutLikely = (),
) -> None:
    """pass@N of a checkpoint on tasks with one right text, exactly and without sampling.

    It is the mean of 1 - (1 - P)^N over the documents, with P the probability that a sample begins with the right
    choice. The other choices of a document are not read.

    Without a task, the documents are the answers in the validation split of the run's own data, where these leave
    prompts out of the loss: data=arithmetic, data.prompt_field, data.answers_only. At most 2,000 are taken, spread
    evenly."""
    asked = whole_numbers("--samples", samples)
    if min(asked) < 1 or len(set(asked)) < len(asked):
        raise ConfigError(f"--samples must be different whole numbers above zero; got {samples}")
    try:
        divisors = [float(word) for word in temperatures.split(",")]
    except ValueError:
        raise ConfigError(f"--temperatures must be numbers, such as 1,1.5; got {temperatures!r}") from None
    if max_length is not None and max_length < 1:
        raise ConfigError(f"--max-length must be greater than zero; got {max_length}")
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation.multiple_choice import read_tasks

    run, read = recorded_run(run_dir), read_tasks(tasks)
    output.check(out, ENDINGS, tasks)
    from scaling_testbed.evaluation import pass_at as found
    from scaling_testbed.evaluation.scoring import place_of

    found.check_temperatures(divisors)
    step, likely = found.likelihoods_of_right(
        run, run_dir, read, divisors, step=step, average=average, max_length=max_length
    )
    rows, precision = found.summaries(likely, asked), place_of(run)[1]
    written = output.write(out, found.records(likely))
    if as_json:
        output.print_json({"step": step, "precision": precision, "tasks": rows})
        return
    from scaling_testbed import tables

    print(f"step {step:,} of {run_dir}, in {precision}")
    tables.show(rows)
    print(found.DEFINITION)
    output.say_written(written)


def margins(model: Models, as_json: Json = False, out: OutTable = ()) -> None:
    """The margin of each document over a ladder of models: right choice against the likeliest other one.

    Name the models from the weakest to the strongest, with the files that `score --out` kept. --out writes a row for
    each document. `compare --measure margin` compares two models on these values, paired."""
    from scaling_testbed import tables
    from scaling_testbed.evaluation import comparison
    from scaling_testbed.evaluation import margins as found

    files = named_files(model)
    output.check(out, ENDINGS, [file for some in files.values() for file in some])
    rows = found.table(comparison.read_models(files, "margin")[0])
    summary = found.summaries(rows)
    written = output.write(out, rows)
    if as_json:
        output.print_json({"tasks": summary, "documents": rows})
        return
    tables.show(summary)
    if worst := found.worst(rows, SHOWN):
        print(f"of the documents that all models get wrong, the first {len(worst)}:")
        tables.show(worst)
    print(found.DEFINITION)
    output.say_written(written)
