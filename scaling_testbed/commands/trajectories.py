"""The command about training curves: anneal."""

from collections.abc import Sequence
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import (
    Delta,
    FirstStep,
    HoldOut,
    Json,
    Map,
    OutTable,
    Rows,
    Starts,
    WarmupSteps,
    Where,
)
from scaling_testbed.row_files import ENDINGS


def _laws() -> list[str]:
    from scaling_testbed.analysis.trajectories.annealing import ANNEALING

    return list(ANNEALING)


ScheduleWords = Annotated[
    Sequence[str],
    typer.Argument(
        metavar="KEY=VALUE", help="a schedule to predict: schedule=NAME steps=N, schedule.KEY=VALUE, optimizer.lr=X"
    ),
]
AnnealingLaw = Annotated[
    str,
    typer.Option(
        "--annealing-law", metavar="NAME", autocompletion=_laws, show_default=True, help="multi_power or momentum"
    ),
]
Momentum = Annotated[
    float, typer.Option("--momentum", metavar="X", show_default=True, help="lambda of the momentum law")
]


def anneal(
    rows: Rows,
    schedule: ScheduleWords = (),
    annealing_law: AnnealingLaw = "multi_power",
    where: Where = (),
    hold_out: HoldOut = (),
    first_step: FirstStep = None,
    warmup_steps: WarmupSteps = None,
    momentum: Momentum = 0.999,
    starts: Starts = 8,
    delta: Delta = 1e-3,
    map_: Map = (),
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """Predict training curves under another schedule.

    Fits a law of the loss over the history of the learning rate to the training curves of runs of one model. Shows each
    held-out run beside its prediction, and predicts the run of a typed schedule."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.trajectories import anneal as found_by
    from scaling_testbed.analysis.trajectories.annealing import ANNEALING
    from scaling_testbed.analysis.trajectories.points import curves_of

    output.check(out, ENDINGS, [rows])
    curves, said = curves_of(rows, mapping=map_, warmup_steps=warmup_steps)
    found = found_by.anneal(
        curves,
        annealing_law,
        said=said,
        where=where,
        hold_out=hold_out,
        schedule=schedule,
        first_step=first_step,
        momentum=momentum,
        starts=starts,
        delta=delta,
    )
    written = output.write(out, found.runs, document=found.record())
    if as_json:
        output.print_json(found.record())
        return
    law, fitted = ANNEALING[annealing_law], found.fitted
    print(f"{law.formula}    [{law.source}]")
    tables.show([{"parameter": name, "value": value} for name, value in fitted.params.items()])
    print(f"huber_log {fitted.objective:.6g} over {fitted.n_points} points of {fitted.n_runs} runs")
    tables.show(found.runs)
    for held, name in ((False, "fitted"), (True, "held-out")):
        errors = [one["mean_error"] for one in found.runs if one["held_out"] == held and one["points"]]
        if errors:
            print(f"mean relative error of the curves of {len(errors)} {name} runs: {sum(errors) / len(errors):.3%}")
    if found.asked:
        tables.show([found.asked])
    for text in found.warnings:
        print(f"warning: {text}")
    output.say_written(written)
