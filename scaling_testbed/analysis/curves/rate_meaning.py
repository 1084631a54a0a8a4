"""The meaning of a row's learning rate.

S compares two curves only if the learning rate means the same in both (Wortsman et al. 2023, arXiv 2309.14322,
Appendix B).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.optimizers import AS_ADAMW, OPTIMIZERS, AdamWConfig, OptimizerConfig, rate_meaning


def meaning_of(row: Row) -> str:
    """The meaning of one unit of a row's learning rate.

    The row states it in `rate_means`. For rows of earlier versions it follows from the `optimizer.*` columns. A row
    without an optimizer, e.g. of another project's table, counts as one of the default optimizer, AdamW.
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
    """The optimizer's fields in a row, without fields that can be null, a list or a mapping.

    A cell of a table does not store those reliably. No optimizer of rows without `rate_means` depends on them.
    """
    fields = [field for field in dataclasses.fields(kind) if isinstance(field.default, (bool, int, float, str))]
    found = {field.name: row.get(f"optimizer.{field.name}") for field in fields}
    return {name: value for name, value in found.items() if value is not None}


def curve_meaning(curve: Curve) -> str | None:
    """The meaning of a curve's learning rate, from its rows, or from its planned runs; None if these differ in it."""
    rows = curve.runs or curve.planned
    meanings = {meaning_of(row) for row in rows.values()}
    return meanings.pop() if len(meanings) == 1 else None


def incomparable(meanings: Sequence[str | None]) -> list[str | None]:
    """For each curve, the reason why its S is not comparable with that of the other curves, or None.

    If all meanings are equal, all curves are comparable. Otherwise only curves with AdamW's meaning are comparable, and
    if there is none of these, no curve is.
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
