"""The command that chooses the runs that narrow a prediction most: next."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.laws import FitFile, Flops, show_predictions
from scaling_testbed.commands.options import Json, number, out
from scaling_testbed.row_files import ENDINGS

SWEEP = ".yaml"
Target = Annotated[
    str, typer.Option("--target", metavar="N,D", help="parameters and tokens of the run to predict: 7B,140B")
]
Runs = Annotated[int, typer.Option("--runs", metavar="N", help="at most so many runs", show_default=True)]
FlopsPerRun = Annotated[
    float | None, typer.Option("--flops-per-run", metavar="C", parser=number, help="6 N D of one run at most")
]
Models = Annotated[
    str | None,
    typer.Option("--models", metavar="A,B,C", help="the models to choose from, by name or as a pattern: nano_*"),
]
Sizes = Annotated[
    str | None, typer.Option("--sizes", metavar="N,N,N", help="the sizes to choose from, in place of --models")
]
Ratios = Annotated[
    str | None,
    typer.Option(
        "--tokens-per-param", metavar="M,M,M", help="tokens per parameter to choose from (default: as were fitted)"
    ),
]
Override = Annotated[
    Sequence[str],
    typer.Option("--override", metavar="KEY=VALUE", help="a setting of every run of the sweep file; repeatable"),
]
OutSweep = Annotated[
    Sequence[Path],
    out("save the runs: a sweep file (.yaml), all that is printed (.json), or a table (.csv, .jsonl, .parquet)"),
]


def next_(
    fit: FitFile,
    target: Target,
    flops: Flops,
    runs: Runs = 10,
    flops_per_run: FlopsPerRun = None,
    models: Models = None,
    sizes: Sizes = None,
    tokens_per_param: Ratios = None,
    override: Override = (),
    as_json: Json = False,
    out: OutSweep = (),
) -> None:
    """The runs that narrow a prediction most for their cost.

    Chooses sizes and tokens of runs that cost at most --flops together, by the slopes of the law, or of each law that
    `analyze laws` kept. Shows the standard deviation of the predicted ln L at the target before and after each. With
    --models, --out FILE.yaml is a sweep."""
    from scaling_testbed import api, tables
    from scaling_testbed.files import write_text
    from scaling_testbed.sweeps.chosen import sweep_text

    output.check(out, (*ENDINGS, SWEEP), [fit])
    found = api.next_runs(
        fit,
        tuple(_listed("--target", target)),  # type: ignore[arg-type]  # its length is checked there
        flops,
        runs=runs,
        flops_per_run=flops_per_run,
        models=models.split(",") if models else (),
        sizes=_listed("--sizes", sizes),
        tokens_per_param=_listed("--tokens-per-param", tokens_per_param),
        overrides=list(override),
    )
    for path in [path for path in out if path.suffix == SWEEP]:
        write_text(path, sweep_text(found, override))
    written = output.write(out, found.runs, document=found.record())
    if as_json:
        output.print_json(found.record())
        return
    tables.show(found.runs)
    tables.show(found.laws)
    for text in found.notes():
        print(text)
    show_predictions([], found.warnings)
    output.say_written(written)


def _listed(option: str, typed: str | None) -> list[float]:
    """The numbers of a list with commas between them."""
    from scaling_testbed.errors import ConfigError

    try:
        return [number(one.strip()) for one in typed.split(",")] if typed else []
    except typer.BadParameter as error:
        raise ConfigError(f"{option} {typed}: {error}") from None
