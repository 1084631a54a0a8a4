"""The command that writes a page: report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import LrRange, Source, Where, Width, ends, out
from scaling_testbed.errors import ConfigError

Reported = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="runs/NAME, a file of rows, a saved law (.json), or a folder of saved laws"),
]
OutPage = Annotated[
    Sequence[Path],
    out(
        "the page (.html; default: report.html in the sweep's folder, or beside the file, and no page with figures "
        "only), and files for its figures (.png, .svg, .pdf)"
    ),
]
Experiment = Annotated[
    str | None,
    typer.Option(
        "--experiment",
        metavar="[PAPER/]NAME",
        help="the experiment whose claims are shown (default: that of the sweep); only declared ones are judged",
    ),
]
Traces = Annotated[
    Path | None,
    typer.Option(
        "--traces", metavar="DIR", help="also save the traces that the experiment uses, as DIR/RUN_ID.jsonl.gz"
    ),
]


def report(
    path: Reported,
    where: Where = (),
    experiment: Experiment = None,
    source: Source = None,
    traces: Traces = None,
    lr_range: LrRange = None,
    out: OutPage = (),
    width: Width = None,
) -> None:
    """One page about a sweep or a law, with verdicts on the paper's claims.

    Writes one self-contained HTML file. The page of a sweep holds its question, claims, figures, tables, grid,
    versions, and the laws that are saved in its folder or in its analysis/. The page of a saved law, or of a folder of
    laws, holds their whole content."""
    from scaling_testbed import api

    output.check(out, (*output.PAGE, *output.FIGURES))
    pages = [file for file in out if file.suffix in output.PAGE]
    if len(pages) > 1:
        raise ConfigError(f"--out {pages[1]}: give one page only; {pages[0]} is already the page")
    figures = [file for file in out if file.suffix in output.FIGURES]
    page = pages[0] if pages else None
    said = api.report(
        path,
        page,
        where=where,
        experiment=experiment,
        source=source,
        figures=figures,
        traces=traces,
        lr_range=ends(lr_range) if lr_range else None,
        width=width,
    )
    for line in said:
        print(line)
