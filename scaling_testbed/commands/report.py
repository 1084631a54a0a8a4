"""The verb that writes a page: report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import Source, Where, out
from scaling_testbed.errors import ConfigError

Reported = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="runs/NAME, a file of rows, a kept law (.json), or a folder of kept laws"),
]
OutPage = Annotated[
    Sequence[Path],
    out(
        "the page (.html; default: report.html in the sweep's folder, or beside the file), and files for its figures "
        "(.png, .svg)"
    ),
]
Experiment = Annotated[
    str | None,
    typer.Option(
        "--experiment", metavar="[PAPER/]NAME", help="whose claims are judged (default: what the sweep's file names)"
    ),
]
Traces = Annotated[
    Path | None,
    typer.Option(
        "--traces", metavar="DIR", help="also what it looks at over the steps of each run, as DIR/RUN_ID.jsonl.gz"
    ),
]


def report(
    path: Reported,
    where: Where = (),
    experiment: Experiment = None,
    source: Source = None,
    traces: Traces = None,
    out: OutPage = (),
) -> None:
    """All of it as one page, with the paper's claims judged.

    One self-contained HTML file: of a sweep its question, claims, figures, tables, grid, versions, and the laws that
    are kept in its folder or its analysis/; of one kept law, or a folder of them, all that it says."""
    from scaling_testbed import api

    output.check(out, (*output.PAGE, *output.FIGURES))
    pages = [file for file in out if file.suffix in output.PAGE]
    if len(pages) > 1:
        raise ConfigError(f"--out {pages[1]}: the page is written to {pages[0]} already")
    figures = [file for file in out if file.suffix in output.FIGURES]
    page = pages[0] if pages else None
    said = api.report(path, page, where=where, experiment=experiment, source=source, figures=figures, traces=traces)
    for line in said:
        print(line)
