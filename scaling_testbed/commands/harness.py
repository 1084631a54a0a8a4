"""What lm-evaluation-harness finds for a checkpoint, as `evaluate --tasks` shows it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import check_max_length
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.row_files import ENDINGS

TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAME[,NAME]",
        help="tasks of lm_eval, .jsonl files as `analyze score` reads them, and continuation, identifier, bracket",
    ),
]
Include = Annotated[
    Path | None, typer.Option("--include", metavar="DIR", help="a folder with further tasks as YAML files of lm_eval")
]
FewShot = Annotated[
    int | None,
    typer.Option("--fewshot", metavar="N", help="examples in front of each question (default: as the task says)"),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="only the first N questions of each task")]


def show_tasks(
    run_dir: Path,
    tasks: str,
    include: Path | None,
    fewshot: int | None,
    limit: int | None,
    step: int | None,
    average: bool,
    max_length: int | None,
    as_json: bool,
    out: Sequence[Path],
) -> None:
    """Print what lm_eval finds for the tasks, and write it."""
    check_max_length(max_length)
    check_positive("--limit", limit)
    if fewshot is not None and fewshot < 0:
        raise ConfigError(f"--fewshot must not be negative; got {fewshot}")
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include {include} is no folder")
    names = [Path(name) for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task")
    output.check(out, ENDINGS)
    from scaling_testbed.evaluation.corpus_tasks import read_named

    own = read_named([name for name in names if _is_own(name)])
    harness = _harness()
    model = harness.RunLM(str(run_dir), step=step, average=average, max_length=max_length)
    theirs = [str(name) for name in names if not _is_own(name)]
    found = harness.evaluate(model, theirs, own, include=include, fewshot=fewshot, limit=limit)
    rows = _rows(found)
    document = {
        "step": model.step,
        "precision": model.precision,
        "lm_eval": found["lm_eval_version"],
        "results": found["results"],
        "n_samples": found["n-samples"],
    }
    written = output.write(out, rows, document=document)
    if as_json:
        output.print_json(document)
        return
    from scaling_testbed import tables

    print(f"{model.name}, in {model.precision}, by lm_eval {document['lm_eval']}")
    tables.show(rows)
    print(harness.DEFINITION)
    output.say_written(written)


def _is_own(name: Path) -> bool:
    from scaling_testbed.config.sections import TASKS_OF_CORPUS

    return name.suffix == ".jsonl" or str(name) in TASKS_OF_CORPUS


def _harness() -> Any:
    """The module evaluation.harness. Raises UserError if lm_eval is not installed."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from scaling_testbed.evaluation import harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(
            "lm_eval is not installed: pip install -e '.[harness]' (`analyze score` scores .jsonl files and tasks of "
            "the corpus without it)"
        ) from None
    return harness


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each number that lm_eval found: task, metric, value, its standard error, questions."""
    rows: list[dict[str, Any]] = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            row = {"task": task, "metric": metric, "filter": kind, "value": value}
            row |= {"stderr": error if isinstance(error, float) else None}
            rows.append(row | {"documents": found["n-samples"].get(task, {}).get("effective")})
    return rows


def harness_command_line(argv: Sequence[str]) -> None:
    """The command line of lm_eval with the model `scaling_testbed`. Raises UserError if lm_eval is not installed."""
    harness = _harness()
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)
    harness.command_line(argv)
