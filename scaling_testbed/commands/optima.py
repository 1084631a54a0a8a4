"""The command about the best learning rates and batches: optima."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import Json, Map, Rows, Size, Source, Where, out
from scaling_testbed.row_files import ENDINGS

Near = Annotated[
    float,
    typer.Option(
        "--near", metavar="X", show_default=True,
        help="the relative rise of the loss up to which a rate or batch is near the best one",
    ),
]  # fmt: skip
OutOptima = Annotated[Sequence[Path], out("save the optima (.csv, .jsonl, .parquet), or all of it (.json)")]


def optima(
    rows: Rows,
    near: Near = 0.01,
    where: Where = (),
    size: Size = "n_params",
    source: Source = None,
    map_: Map = (),
    as_json: Json = False,
    out: OutOptima = (),
) -> None:
    """The best learning rate and batch of each size, and whether they extrapolate.

    Fits a quadratic in ln(lr), or in ln(lr) and ln(batch), to the losses near the best one, for each size, number of
    tokens and setting. Shows its vertex with a 95 % interval, and the rise of the loss, in nats, where the rate or
    the batch is wrong by a factor of two. Leaves the largest size out, and predicts its optimum by line and curve."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.laws.study import law_rows
    from scaling_testbed.analysis.laws.tuning import tuning_rows

    output.check(out, ENDINGS, [rows])
    found = tuning_rows(law_rows(rows, source=source, mapping=map_, size=size), near=near, where=where)
    record = found.record()
    written = output.write(out, record["optima"], document=record)
    if as_json:
        output.print_json(record)
        return
    tables.show(record["optima"])
    for one in found.extrapolations:
        if one is found.extrapolations[0]:
            print()
        for line in one.lines():
            print(line)
    for text in found.warnings:
        print(f"warning: {text}")
    output.say_written(written)
