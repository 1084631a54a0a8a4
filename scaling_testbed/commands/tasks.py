"""The commands about saved checkpoints: diagnostics, curvature, multiple-choice tasks, and comparison of models on
them; and one that makes tasks of a corpus."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import (
    Average,
    Json,
    Levels,
    MaxLength,
    OutTable,
    RunDir,
    Step,
    check_max_length,
    losses_in,
    out,
)
from scaling_testbed.errors import ConfigError, check_choice
from scaling_testbed.row_files import ENDINGS

OutDocuments = Annotated[
    Sequence[Path],
    out("save the log-likelihoods of each document (.jsonl, which compare reads; .json, .csv, .parquet)"),
]
DataDir = Annotated[Path, typer.Argument(metavar="DATA_DIR", help="a prepared corpus, data/NAME")]
Questions = Annotated[
    int, typer.Option("--questions", metavar="N", show_default=True, help="number of questions of each kind")
]
TaskSeed = Annotated[int, typer.Option("--seed", metavar="N", show_default=True, help="seed of the questions")]
TaskDir = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="the folder for the three files")]
Sequences = Annotated[
    int, typer.Option("--sequences", metavar="N", show_default=True, help="maximum number of validation sequences")
]
Hutchinson = Annotated[
    bool,
    typer.Option(
        "--hutchinson", help="also the trace of the Hessian by Hutchinson's estimator, which takes three times as long"
    ),
]
RunDirs = Annotated[
    Sequence[Path], typer.Argument(metavar="RUN_DIR", help="folders runs/NAME/RUN_ID, or runs/NAME for all runs in it")
]
AllSteps = Annotated[
    bool, typer.Option("--all-steps", help="at all saved checkpoints of each run (default: at the newest)")
]
Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", show_default=True, help="maximum number of validation tokens")
]
Tasks = Annotated[
    Sequence[Path],
    typer.Argument(
        metavar="TASK.jsonl",
        help="files of tasks; each file is one task. Or continuation, identifier, bracket: a task of the run's corpus",
    ),
]
Models = Annotated[
    Sequence[str],
    typer.Option(
        "--model", metavar="NAME=FILE[,FILE]",
        help="a name and files of `score --out`, one for each seed; give this option once for each model",
    ),
]  # fmt: skip
Measure = Annotated[
    str,
    typer.Option(
        "--measure", metavar="NAME", show_default=True,
        autocompletion=lambda: ["error", "error_per_byte", "gold_loss", "margin"],
        help="error, error_per_byte, gold_loss (minus the log-likelihood of the right choice) or margin (its "
        "log-likelihood less that of the likeliest other choice), in nats",
    ),
]  # fmt: skip
Against = Annotated[
    str | None, typer.Option("--against", metavar="NAME", help="compare each other model with this one only")
]


AT_LEVELS = "at these losses: ln fisher_trace is a line in ln loss between the neighbouring checkpoints of a run"


def inspect(
    run_dir: RunDir, step: Step = None, sequences: Sequences = 32, as_json: Json = False, out: OutTable = ()
) -> None:
    """The diagnostics of a saved checkpoint.

    Measures attention scores, activations, logits, gradients and parameters in a forward and a backward pass over the
    run's validation data, and shows the last update of training. --json and --out hold all numbers, also those of
    single heads."""
    if sequences < 1:
        raise ConfigError(f"--sequences must be greater than zero; got {sequences}")
    from scaling_testbed.config.compose import recorded_run

    run = recorded_run(run_dir)
    output.check(out, ENDINGS)
    from scaling_testbed.evaluation.inspection import by_place, inspect

    step, found = inspect(run, run_dir, step=step, sequences=sequences)
    finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
    document = {"step": step, **finite}
    table = [{"quantity": name, "value": value} for name, value in finite.items()]
    written = output.write(out, table, document=document)
    if as_json:
        output.print_json(document)
        return
    from scaling_testbed import tables

    print(f"step {step:,} of {run_dir}, {found.pop('sequences'):,} validation sequences")
    for records in by_place(found):
        tables.show(records)
    output.say_written(written)


def curvature(
    run_dirs: RunDirs,
    tokens: Tokens = 32768,
    step: Step = None,
    all_steps: AllSteps = False,
    levels: Levels = None,
    hutchinson: Hutchinson = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """The curvature of the loss at saved checkpoints: the trace of the Fisher information, by labels that are drawn
    from the model.

    It uses the run's validation data. Compare traces at equal loss, and of runs that differ only in their size. With
    --levels it measures all checkpoints of each run and shows the traces at these losses, between neighbouring
    checkpoints. A run that does not pass a loss has none there."""
    losses = losses_in(levels)
    if tokens < 1:
        raise ConfigError(f"--tokens must be greater than zero; got {tokens}")
    if step is not None and (all_steps or losses):
        raise ConfigError(f"--step {step} is one checkpoint; leave out {'--all-steps' if all_steps else '--levels'}")
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation import curvature as found

    folders = found.run_folders(run_dirs)
    runs = [recorded_run(folder) for folder in folders]
    output.check(out, ENDINGS)
    if all_steps or losses:
        records, left_out = found.curvatures(runs, folders, tokens=tokens, hutchinson=hutchinson)
    else:
        records = [
            found.curvature(run, folder, tokens=tokens, step=step, hutchinson=hutchinson)
            for run, folder in zip(runs, folders, strict=True)
        ]
        left_out = []
    warnings = [*left_out, *found.warnings(runs, records)]
    from scaling_testbed.analysis.trajectories.equal_loss import equal_losses

    at_levels = equal_losses(records, losses or [])
    document = {"checkpoints": records, "warnings": warnings, "at_levels": at_levels}
    written = output.write(out, records, document=document)
    if as_json:
        output.print_json(document)
        return
    from scaling_testbed import tables

    tables.show([{key: value for key, value in one.items() if key != "data_fingerprint"} for one in records])
    print(found.DEFINITION)
    if at_levels:
        tables.show(at_levels)
        print(AT_LEVELS)
    if hutchinson:
        print(found.OF_HESSIAN)
    for text in warnings:
        print(f"warning: {text}")
    output.say_written(written)


def tasks(data_dir: DataDir, out_dir: TaskDir, questions: Questions = 400, seed: TaskSeed = 0) -> None:
    """Make multiple-choice tasks of a corpus, for models that are too small for published ones.

    The questions come from the validation split. Three files: continuation.jsonl (which of four texts follows),
    identifier.jsonl (which of four names follows) and bracket.jsonl (which closing bracket follows). `score` reads
    them."""
    if questions < 1:
        raise ConfigError(f"--questions must be greater than zero; got {questions}")
    from scaling_testbed.evaluation.corpus_tasks import make_tasks

    paths = make_tasks(data_dir, out_dir, questions, seed)
    print(f"{questions} questions of each kind, seed {seed}, from the validation split of {data_dir}")
    output.say_written(list(paths.values()))


def score(
    run_dir: RunDir,
    tasks: Tasks,
    step: Step = None,
    average: Average = False,
    max_length: MaxLength = None,
    as_json: Json = False,
    out: OutDocuments = (),
) -> None:
    """Top-1 error of a checkpoint on multiple-choice tasks.

    The score of a choice is its log-likelihood after the context, summed and per byte. A line of a task is {"context":
    "...", "choices": ["...", "..."], "gold": 0}. A task of the run's corpus has the questions that evaluation.tasks
    makes in this run. Context and choice are tokenised together; white space between them is
    part of the choice. An empty context becomes the end-of-document token."""
    check_max_length(max_length)
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation.corpus_tasks import read_named
    from scaling_testbed.evaluation.multiple_choice import ChoiceTask, remarks

    run, read = recorded_run(run_dir), read_named(tasks)
    files = [task for task in read if isinstance(task, ChoiceTask)]
    output.check(out, ENDINGS, [task.path for task in files])
    from scaling_testbed.evaluation.scoring import DEFINITION, place_of, score, summaries

    step, scored = score(run, run_dir, read, step=step, average=average, max_length=max_length)
    rows, precision = summaries(scored), place_of(run)[1]
    written = output.write(out, [one.record() for one in scored])
    if as_json:
        output.print_json({"step": step, "precision": precision, "tasks": rows})
        return
    from scaling_testbed import tables

    print(f"step {step:,} of {run_dir}, in {precision}")
    tables.show(rows)
    print(DEFINITION)
    for text in remarks(files):
        print(f"warning: {text}")
    output.say_written(written)


def compare(
    model: Models,
    measure: Measure = "error",
    against: Against = None,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """Compare models on the same documents.

    Differences come from a paired bootstrap over documents, with training seeds as the second level, and with Holm's
    correction for the number of comparisons."""
    from scaling_testbed import tables
    from scaling_testbed.evaluation import comparison

    check_choice("--measure", measure, comparison.MEASURES)
    files = named_files(model)
    output.check(out, ENDINGS, [file for some in files.values() for file in some])
    models, task_D = comparison.read_models(files, measure)
    records = comparison.compare(models, task_D, against)
    written = output.write(out, records)
    if as_json:
        output.print_json(records)
        return
    tables.show(records)
    print(f"{measure}: {comparison.DEFINITION}")
    alone = [model.name for model in models if len(model.values_SD) == 1]
    if alone:
        print(f"one seed of {', '.join(alone)}: the interval does not cover other seeds")
    output.say_written(written)


def named_files(given: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each --model NAME=FILE,FILE. Raises ConfigError for another spelling and for a name given twice."""
    found: dict[str, list[Path]] = {}
    for typed in given:
        name, _, files = typed.partition("=")
        if not (name and files):
            raise ConfigError(f"--model {typed}: write --model NAME=FILE, or NAME=FILE,FILE for several seeds")
        if name in found:
            raise ConfigError(f"--model {name} is given twice; put all its files after one")
        found[name] = [Path(files)] if Path(files).exists() else [Path(file) for file in files.split(",")]
    return found
