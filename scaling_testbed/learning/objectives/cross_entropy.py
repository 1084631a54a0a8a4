"""Plain cross-entropy, the objective of pretraining."""

from dataclasses import dataclass
from typing import ClassVar

from scaling_testbed.learning.objectives.base import OBJECTIVES, Built, Objective, Surroundings


@OBJECTIVES.register("cross_entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropyObjective(Objective):
    """The cross-entropy of the next token, with the z-loss of `loss`."""

    is_cross_entropy: ClassVar[bool] = True

    name: str = "cross_entropy"

    def build(self, surroundings: Surroundings) -> Built:
        return Built()
