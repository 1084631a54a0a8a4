"""The objectives, one file each. Importing them does not import torch, so that a grid can be planned without torch."""

from scaling_testbed.learning.objectives import ascent, flat_tv, npo  # noqa: F401  # they register themselves
from scaling_testbed.learning.objectives.base import (
    OBJECTIVES,
    Asked,
    Built,
    Given,
    Objective,
    Stream,
    Surroundings,
    Weighted,
)
from scaling_testbed.learning.objectives.cross_entropy import CrossEntropyObjective
from scaling_testbed.learning.objectives.distill import DistillObjective

__all__ = [
    "OBJECTIVES",
    "Asked",
    "Built",
    "CrossEntropyObjective",
    "DistillObjective",
    "Given",
    "Objective",
    "Stream",
    "Surroundings",
    "Weighted",
]
