"""The command about the size of the batch: critical_batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import FirstStep, Json, Map, Rows, Size, Where, number, out
from scaling_testbed.row_files import ENDINGS

Levels = Annotated[
    str | None,
    typer.Option("--levels", metavar="L,L", help="losses in nats per token (default: round ones that batches reach)"),
]
OutBatches = Annotated[
    Sequence[Path],
    out("save the table (.csv, .jsonl, .parquet), all of it (.json), or the figures (.png, .svg, .pdf)"),
]
HIDDEN = "best_lr/"  # columns that only files hold


def critical_batch(
    rows: Rows,
    levels: Levels = None,
    where: Where = (),
    size: Size = "n_params",
    map_: Map = (),
    first_step: FirstStep = None,
    as_json: Json = False,
    out: OutBatches = (),
) -> None:
    """The critical batch size, from the steps of several batches to equal losses.

    Reads the training curves of runs with a constant rate. For each size and loss, the steps of each batch at its best
    rate, the fewest steps S_min and tokens E_min, and B_crit = E_min / S_min, by (S/S_min - 1)(E/E_min - 1) = 1 (arXiv
    1812.06162, 2403.06563). Each seed chooses its own rates. Intervals over seeds are at 95 %."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.figures.batch_panels import critical_batch_panels
    from scaling_testbed.analysis.trajectories.critical_batch import critical_batches
    from scaling_testbed.errors import ConfigError

    output.check(out, (*ENDINGS, *output.FIGURES), [rows])
    try:
        losses = None if levels is None else [number(one) for one in levels.split(",")]
    except typer.BadParameter:
        raise ConfigError(f"--levels must be losses, such as 2.2,2.5; got {levels!r}") from None
    found = critical_batches(rows, levels=losses, where=where, mapping=map_, size=size, first_step=first_step)
    records, law = found.records(), found.power_law()
    document = {"rows": records, "power_law": law, "notes": found.notes, "size": size}
    written = output.write(out, records, document=document, indent=1, draw=lambda: critical_batch_panels(records))
    if as_json:
        output.print_json(document)
        return
    tables.show([{key: value for key, value in one.items() if not key.startswith(HIDDEN)} for one in records])
    if law:
        print("B_crit = B_star / L^(1/alpha_B) over all sizes: " + ", ".join(
            f"{name} {one['value']:.4g}" + (f" [{one['low']:.4g}, {one['high']:.4g}]" if one["low"] is not None else "")
            for name, one in law.items()))  # fmt: skip
    print(f"N counts {size}; batches and tokens in tokens; low and high: 95 % over seeds, each with its own best rates")
    for note in found.notes:
        print(note)
    output.say_written(written)
