"""Gradient ascent on what is to be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scaling_testbed.learning.objectives.base import OBJECTIVES
from scaling_testbed.learning.objectives.unlearning import Part, Rows, Unlearning


@OBJECTIVES.register("ascent")
@dataclass(frozen=True, kw_only=True)
class Ascent(Unlearning):
    """F is minus the mean cross-entropy over the tokens to forget. It has no lower bound."""

    name: str = "ascent"

    by_document: ClassVar[bool] = False

    def part(self, role: str, rows: Rows) -> Part:
        return Part(-rows.valid_BT.to(rows.ce_BT.dtype), -rows.ce_BT)
