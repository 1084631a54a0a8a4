"""Figures of the critical batch: steps against tokens at equal loss, and the critical batch against the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_testbed.analysis.figures.panel import Line, Panel, compact

Records = Sequence[Mapping[str, Any]]
CURVE_POINTS = 60
STEPS = "steps/"  # and a batch: the columns of the steps


def critical_batch_panels(records: Records) -> list[Panel]:
    """One panel for each size with steps against tokens, and one with the critical batch of all sizes.

    records: those of CriticalBatches. Losses whose critical batch is withheld are left out, and the panel says so.
    """
    sizes = sorted({one["n_params"] for one in records})
    losses = [one["loss"] for one in records if one["critical_batch"] is not None]
    ends = (min(losses), max(losses)) if losses else None
    return [*(_steps_against_tokens(records, n, ends) for n in sizes), _against_loss(records, sizes)]


def _steps_against_tokens(records: Records, n_params: float, losses: tuple[float, float] | None) -> Panel:
    own = [one for one in records if one["n_params"] == n_params]
    lines = []
    for one in (one for one in own if one["critical_batch"] is not None):
        at = {float(key.removeprefix(STEPS)): value for key, value in one.items() if key.startswith(STEPS) and value}
        tokens = [batch * steps for batch, steps in at.items()]
        lines.append(Line(x=tokens, y=list(at.values()), label="measured", n_params=one["loss"], joined=False))
        batches = np.geomspace(min(at), max(at), CURVE_POINTS)
        steps = one["s_min"] * (1 + one["critical_batch"] / batches)
        lines.append(Line(x=list(steps * batches), y=list(steps), n_params=one["loss"], markers=False))
    return Panel(
        lines=lines,
        x_label="E, tokens",
        y_label="S, steps",
        y_log=True,
        color_name="loss",
        color_range=losses,
        title=f"Equal loss, N = {compact(n_params)}",
        caption="Points: the fewest steps of each batch to a loss, the mean over seeds. Curves: "
        "(S/S_min - 1)(E/E_min - 1) = 1.",
        left_out=_left_out(own),
    )


def _against_loss(records: Records, sizes: Sequence[float]) -> Panel:
    lines = []
    for n_params in sizes:
        own = [one for one in records if one["n_params"] == n_params and one["critical_batch"] is not None]
        if own:
            known = all(one["low"] is not None for one in own)
            band = ([one["low"] for one in own], [one["high"] for one in own]) if known else None
            x, y = [one["loss"] for one in own], [one["critical_batch"] for one in own]
            lines.append(Line(x=x, y=y, n_params=n_params, band=band))
    shaded = " Shaded: the 95 % interval over seeds." if any(line.band for line in lines) else ""
    return Panel(
        lines=lines,
        x_label="loss",
        y_label="critical batch, tokens",
        y_log=True,
        title="The critical batch",
        caption=f"One line for each size.{shaded}",
        left_out=_left_out(records),
    )


def _left_out(records: Records) -> list[str]:
    count = sum(one["critical_batch"] is None for one in records)
    return [f"{count} losses have no critical batch: see the column note."] if count else []
