"""The curvature at equal loss: between the checkpoints of a run, from the table of `analyze curvature --all-steps`.

A study keeps that table as curvature.csv beside its rows.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.study import Row, Study, number
from scaling_testbed.analysis.rows.tables import read_table
from scaling_testbed.errors import UserError, listed

TABLE, TRACE = "curvature.csv", "fisher_trace"
ALIKE = ("tokens", "data_fingerprint")  # what all traces of a comparison have in common


@dataclass(frozen=True)
class AtLoss:
    """A trace at a loss; None if it is withheld, and then `note` says why."""

    value: float | None
    note: str = ""


def at_loss(checkpoints: Sequence[Mapping[str, Any]], level: float) -> AtLoss:
    """The trace of a run at a loss of `level` nats: ln of the trace is a line in ln of the loss between the first two
    neighbouring checkpoints on both sides of it, so that a power law of the loss is met exactly.

    checkpoints: records of evaluation.curvature of one run. It is never extrapolated. It is withheld if the loss lies
    between no two neighbours, or if one of them has no finite trace.
    """
    points = sorted(checkpoints, key=lambda one: one["step"])
    losses = [one["loss"] for one in points]
    for first, second in itertools.pairwise(points):
        high, low = first["loss"], second["loss"]
        if high >= level >= low:
            if not all(one[TRACE] is not None and 0 < one[TRACE] < math.inf for one in (first, second)):
                return AtLoss(None, f"a trace at step {first['step']} or {second['step']} is not finite")
            share = math.log(high / level) / math.log(high / low) if high > low else 0.0
            return AtLoss(math.exp((1 - share) * math.log(first[TRACE]) + share * math.log(second[TRACE])))
    if len(points) < 2:
        return AtLoss(None, f"{len(points)} checkpoint{'s' * (len(points) != 1)}, and it takes two")
    return AtLoss(None, f"its {len(points)} checkpoints have losses from {max(losses):.3f} to {min(losses):.3f}")


def equal_losses(records: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> list[dict[str, Any]]:
    """For each run and loss: run, n_params, loss, fisher_trace (None if withheld) and a note with the reason."""
    found = []
    for run, own in itertools.groupby(records, key=lambda one: one["run"]):
        checkpoints = list(own)
        for level in levels:
            at = at_loss(checkpoints, level)
            known = {"run": run, "n_params": checkpoints[0]["n_params"], "loss": level}
            found.append({**known, TRACE: at.value, "note": at.note})
    return found


def table_of(study: Study) -> Path:
    """The path of the table of a study, which need not exist."""
    return (study.path if study.path.is_dir() else study.path.parent) / TABLE


def curvatures_of(study: Study) -> dict[str, list[Row]]:
    """Run id -> the records of its checkpoints, from the table of a study. Raises UserError, which names the file, if
    there is none, if a column is missing, or if the runs were measured on different tokens."""
    path = table_of(study)
    if not path.exists():
        made_by = f"python -m scaling_testbed.analyze curvature {path.parent} --all-steps --out {path}"
        raise UserError(f"{path} does not exist; `{made_by}` makes it of the sweep's checkpoints")
    rows = read_table(path)
    if lacking := [key for key in ("run", "step", "loss", TRACE, *ALIKE) if any(key not in row for row in rows)]:
        raise UserError(f"{path} has no column {lacking[0]}; it is the table of `analyze curvature --all-steps --out`")
    for key in ALIKE:
        values = list(dict.fromkeys(str(row[key]) for row in rows))
        if len(values) > 1:
            raise UserError(f"{path} has several {key} ({listed(values)}), so its traces cannot be compared")
    found: dict[str, list[Row]] = {}
    for row in rows:
        checked = {key: number({**row, "label": str(path)}, key) for key in ("step", "loss")}
        found.setdefault(Path(str(row["run"])).name, []).append({**row, **checked})
    return found
