"""The command about the size of the batch: critical_batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from scaling_testbed.commands import output
from scaling_testbed.commands.options import FirstStep, Json, Levels, Map, Rows, Size, Where, losses_in, out
from scaling_testbed.row_files import ENDINGS

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
    1812.06162, 2403.06563). Each seed chooses its own rates. Intervals over seeds are at 95 %. Without --levels the
    losses are round ones that batches reach."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.figures.batch_panels import critical_batch_panels
    from scaling_testbed.analysis.trajectories.critical_batch import critical_batches

    output.check(out, (*ENDINGS, *output.FIGURES), [rows])
    found = critical_batches(
        rows, levels=losses_in(levels), where=where, mapping=map_, size=size, first_step=first_step
    )
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
