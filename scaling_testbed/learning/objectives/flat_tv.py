"""FLAT: unlearning by the total variation between good answers to a prompt and those to forget."""

from __future__ import annotations

from dataclasses import dataclass

from scaling_testbed.keys import key
from scaling_testbed.learning.objectives.base import OBJECTIVES
from scaling_testbed.learning.objectives.unlearning import Part, Rows, Unlearning


@OBJECTIVES.register("flat_tv")
@dataclass(frozen=True, kw_only=True)
class FlatTV(Unlearning):
    """F is the mean of tanh(P) / 2 over the documents to forget, less that over the documents of a template (Wang et
    al. 2024, arXiv 2410.11143, the f-divergence of total variation). P is the mean probability of the targets of a
    document."""

    name: str = "flat_tv"
    template: str = key("template", "The source in data.sources that has good answers to the same prompts.")

    @property
    def roles(self) -> dict[str, str]:
        return {"forget": self.forget, "template": self.template}

    def part(self, role: str, rows: Rows) -> Part:
        valid_BT = rows.valid_BT.to(rows.ce_BT.dtype)
        p_BT = (-rows.ce_BT).exp() * valid_BT
        n_BT = rows.sums(valid_BT).clamp(min=1)
        tanh_BT = (rows.sums(p_BT) / n_BT).tanh()
        sign = 0.5 if role == "forget" else -0.5
        return Part(-sign * (1 - tanh_BT**2) * p_BT / n_BT, rows.once(sign * tanh_BT))
