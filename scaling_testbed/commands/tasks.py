"""The commands of `analyze` about multiple-choice tasks: score and compare."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed import tables
from scaling_testbed.errors import ConfigError
from scaling_testbed.evaluation import comparison
from scaling_testbed.files import write_text


def add_commands(commands) -> None:
    """Add the commands to argparse's subparsers."""
    _add_score(commands)
    _add_compare(commands)


def _add_score(commands) -> None:
    help_ = "top-1 error of a saved checkpoint on multiple-choice tasks"
    parser = commands.add_parser("score", help=help_, description=do_score.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_score)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="runs/NAME/RUN_ID")
    parser.add_argument("tasks", type=Path, nargs="+", metavar="TASK.jsonl", help="a file is a task of its own")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    longest = "tokens that the model reads at most; a context loses its beginning (default: as in training)"
    parser.add_argument("--max-length", type=int, metavar="N", help=longest)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="keep the log-likelihoods of each document")
    parser.add_argument("--json", action="store_true", help="one object")


def _add_compare(commands) -> None:
    help_ = "which of some models is better on the same documents"
    parser = commands.add_parser("compare", help=help_, description=do_compare.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_compare)
    files = "a name, and what `score --out` kept: a file a seed; give it for each model"
    parser.add_argument("--model", nargs="+", action="append", required=True, metavar=("NAME", "FILE"), help=files)
    measure = "gold_loss is minus the log-likelihood of the right choice, in nats (default: %(default)s)"
    parser.add_argument("--measure", choices=comparison.MEASURES, default="error", help=measure)
    parser.add_argument("--against", metavar="NAME", help="compare the others with this one only")
    parser.add_argument("--json", action="store_true", help="a list, and nothing else")


def do_score(arguments: argparse.Namespace) -> int:
    """Top-1 error by the log-likelihood of each choice after its context, summed and per byte. A line of a task is
    {"context": "...", "choices": ["...", "..."], "gold": 0}. Context and choice are tokenised together, white space
    between them as part of the choice; an empty context is the end of a document."""
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation.multiple_choice import read_tasks
    from scaling_testbed.evaluation.scoring import DEFINITION, place_of, score, summaries

    if arguments.max_length is not None and arguments.max_length < 1:
        raise ConfigError(f"--max-length must be greater than zero; got {arguments.max_length}")
    run, tasks = recorded_run(arguments.run_dir), read_tasks(arguments.tasks)
    if arguments.out is not None:
        tables.check_out(arguments.out, arguments.tasks)
        tables.prepare(arguments.out.parent)
    step, scored = score(run, arguments.run_dir, tasks, step=arguments.step, max_length=arguments.max_length)
    rows, precision = summaries(scored), place_of(run)[1]
    if arguments.out is not None:
        write_text(arguments.out, "".join(json.dumps(one.record()) + "\n" for one in scored))
    if arguments.json:
        print(json.dumps({"step": step, "precision": precision, "tasks": rows}))
        return 0
    print(f"step {step:,} of {arguments.run_dir}, in {precision}")
    tables.show(rows)
    print(DEFINITION)
    if arguments.out is not None:
        print(f"wrote {arguments.out}")
    return 0


def do_compare(arguments: argparse.Namespace) -> int:
    """Differences between models by a paired bootstrap over documents, with training seeds as the second level, and
    Holm's correction for the number of comparisons."""
    models, task_D = comparison.read_models(_named_files(arguments.model), arguments.measure)
    records = comparison.compare(models, task_D, arguments.against)
    if arguments.json:
        print(json.dumps(records))
        return 0
    tables.show(records)
    print(f"{arguments.measure}: {comparison.DEFINITION}")
    alone = [model.name for model in models if len(model.values_SD) == 1]
    if alone:
        print(f"one seed of {', '.join(alone)}: the interval says nothing of other seeds")
    return 0


def _named_files(given: Sequence[Sequence[str]]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name, *files in given:
        if not files:
            raise ConfigError(f"--model {name}: write --model NAME FILE [FILE ...]")
        if name in found:
            raise ConfigError(f"--model {name} is given twice; put all its files after one")
        found[name] = [Path(file) for file in files]
    return found
