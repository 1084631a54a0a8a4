"""The commands about the best runs for their compute: frontier and ladder."""

from typing import Annotated

import typer

from scaling_testbed.commands.laws import OutLaw, answer, law_rows, show_fit
from scaling_testbed.commands.options import (
    Curves,
    FirstStep,
    HoldOut,
    Json,
    Map,
    Rows,
    Size,
    Source,
    WarmupSteps,
    Where,
)

Method = Annotated[
    str,
    typer.Option(
        "--method", metavar="NAME", autocompletion=lambda: ["isoflop", "envelope"],
        help="isoflop (approach 2 of Hoffmann et al. 2022) or envelope (approach 1)",
    ),
]  # fmt: skip
Rungs = Annotated[int, typer.Option("--rungs", metavar="N", show_default=True, help="number of configurations")]


def frontier(
    rows: Rows,
    method: Method,
    where: Where = (),
    size: Size = "n_params",
    source: Source = None,
    map_: Map = (),
    curves: Curves = False,
    first_step: FirstStep = None,
    warmup_steps: WarmupSteps = None,
    as_json: Json = False,
    out: OutLaw = (),
) -> None:
    """The best size of each budget.

    Finds the size with the lowest loss at each budget of compute, and the law N = N0 (C/C0)^p through these sizes.
    isoflop uses the vertex of a parabola in ln N at each budget, envelope the envelope of the curves of all sizes, or
    with --curves of the training curves of all runs."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.figures.law_panels import frontier_panels
    from scaling_testbed.analysis.laws.best_runs import frontier_rows

    given = law_rows(
        rows, source, map_, size, out, curves=curves, first_step=first_step, warmup_steps=warmup_steps, decayed=True
    )
    found = frontier_rows(given, method, where=where, size=size)

    def show() -> None:
        tables.show(found.optima)
        show_fit(found.fit, [], found.warnings, resampled="runs" if curves else "runs of each budget")

    def draw():
        return frontier_panels(found.runs, found.optima, found.fit, method)

    answer(found.record(), found.optima, out, as_json, show, draw)


def ladder(
    rows: Rows,
    rungs: Rungs = 4,
    where: Where = (),
    hold_out: HoldOut = (),
    size: Size = "n_params",
    source: Source = None,
    map_: Map = (),
    as_json: Json = False,
    out: OutLaw = (),
) -> None:
    """The configurations of a grid search to scale up.

    Takes the best run of each size, then the Pareto frontier of these in compute. Fits L = E + (C0/C)^alpha to the
    frontier and picks, on each part of it, the configuration that follows the law most closely. --hold-out leaves runs
    of the frontier out of the fit."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.figures.law_panels import ladder_panels
    from scaling_testbed.analysis.laws.best_runs import ladder_rows

    given = law_rows(rows, source, map_, size, out)
    found = ladder_rows(given, rungs=rungs, where=where, hold_out=hold_out, size=size)

    def show() -> None:
        tables.show(found.frontier)
        show_fit(found.fit, [], found.warnings)

    answer(found.record(), found.frontier, out, as_json, show, lambda: ladder_panels(found.frontier, found.fit))
