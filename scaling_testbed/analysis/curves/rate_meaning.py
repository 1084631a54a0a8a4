"""What the learning rate of a row means. S sets two curves beside each other only where both mean the same by it
(Wortsman et al. 2023, arXiv 2309.14322, Appendix B)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.optimizers import AS_ADAMW, OPTIMIZERS, AdamWConfig, OptimizerConfig, rate_meaning


def meaning_of(row: Row) -> str:
    """What one unit of a row's learning rate is.

    A row says it itself (`rate_means`). One of an earlier version is asked through its `optimizer.*` columns; one that
    names no optimizer, as in others' tables, is read as that of the default optimizer, AdamW.
    """
    if row.get("rate_means"):
        return str(row["rate_means"])
    name = row.get("optimizer.name")
    kind = AdamWConfig if name is None else OPTIMIZERS.get(str(name))
    if kind is None:
        return f"unknown: there is no optimizer {name} here"
    try:
        return rate_meaning(kind(**_settings(row, kind)), row.get("model.linear") or "plain")
    except (ConfigError, TypeError) as error:
        return f"unknown: its optimizer.* columns are none of {kind().name} ({error})"


def _settings(row: Row, kind: type[OptimizerConfig]) -> dict[str, Any]:
    """The fields of an optimizer that a row has, but for those that can be null or hold a list or a mapping, of which a
    cell of a table says nothing reliable. No optimizer that rows without `rate_means` may have is told by these."""
    fields = [field for field in dataclasses.fields(kind) if isinstance(field.default, (bool, int, float, str))]
    found = {field.name: row.get(f"optimizer.{field.name}") for field in fields}
    return {name: value for name, value in found.items() if value is not None}


def curve_meaning(curve: Curve) -> str | None:
    """What the learning rate of a curve means; None where its rows do not agree. Of one without rows, what was planned
    tells."""
    rows = curve.runs or curve.planned
    meanings = {meaning_of(row) for row in rows.values()}
    return meanings.pop() if len(meanings) == 1 else None


def incomparable(meanings: Sequence[str | None]) -> list[str | None]:
    """For each curve's meaning of the learning rate, why its S cannot stand beside that of the other curves, or None.

    Where all mean the same, all can. Else only those can that mean what AdamW does, and where none does, no curve can.
    """
    if None not in meanings and len(set(meanings)) < 2:
        return [None] * len(meanings)
    others = "AdamW's" if AS_ADAMW in meanings else "that of the other curves"
    reasons: list[str | None] = []
    for meaning in meanings:
        if meaning is None:
            reasons.append("its rows mean different things by the learning rate")
        elif meaning == AS_ADAMW:
            reasons.append(None)
        else:
            reasons.append(f"its learning rate is another quantity than {others} ({meaning})")
    return reasons
