"""The experiments of Jin et al. 2025 (arXiv 2501.12486) on pruning in pre-training, and their claims.

Limits were declared before any run of the sweeps, after an exploratory grid at width 48. There the loss of the windows
differed by 0.39 and 0.45 nats at S = 0.8, and by 0.02 between seeds; at S = 0.5 the losses were within 0.005 of the
dense line in the mean of two seeds, and at S = 0.8 they were 0.065 above it.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scaling_testbed.analysis.laws.columns import derived
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import UserError
from scaling_testbed.papers import law_claims as by
from scaling_testbed.papers.combinators import compare
from scaling_testbed.papers.measures import BEST_LOSS
from scaling_testbed.papers.paper import Claim, Experiment, Paper
from scaling_testbed.papers.predictions import Number

if TYPE_CHECKING:
    from scaling_testbed.papers.measures import Evidence

BEGIN = "interventions.magnitude_pruning.begin"
COUNTED = "n_params_no_input_embedding"  # N: the weights that may be pruned, and the gains


def gap_to_dense_line(evidence: "Evidence") -> list[Number]:
    """How far the mean loss of the pruned runs of each mean number of parameters is above that of dense runs: above the
    line in ln N between the dense sizes on both sides. Raises UserError where there are not two."""
    needed = ("loss", "n_params", "n_params_average")
    rows = [derived(row, COUNTED) for row in evidence.study.rows]
    rows = [row for row in rows if all(row.get(key) is not None for key in needed)]
    dense = [row for row in rows if row["n_params_average"] == row["n_params"]]
    at, line = _means(dense)
    found = []
    pruned = [row for row in rows if row["n_params_average"] < row["n_params"]]
    for average, loss in zip(*_means(pruned), strict=True):
        if not any(n <= average for n in at) or not any(n >= average for n in at):
            raise UserError(f"no dense sizes are on both sides of {average:,.0f} parameters")
        gap = loss - float(np.interp(math.log(average), np.log(at), line))
        found.append(Number(gap, f"{average:,.0f} parameters in the mean: {gap:+.3f} nats from the dense line"))
    if not found:
        raise UserError("no run has pruned weights")
    return found


def _means(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """The values of n_params_average, rising, and the mean loss of each."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(row["n_params_average"], []).append(row["loss"])
    at = sorted(losses)
    return at, [float(np.mean(losses[n])) for n in at]


PRUNING_WINDOW = Experiment(
    name="pruning_window",
    question="At which part of the compute should pruning begin and end?",
    group=[BEGIN],
    claims=[
        Claim("Pruning in the last quarter of the compute ends with a higher loss than pruning over all of it.",
              compare(BEST_LOSS, BEGIN, 0, 0.75)),
        Claim("Pruning over all of the compute ends with a higher loss than pruning from 25% to 75% of it.",
              compare(BEST_LOSS, BEGIN, 0.25, 0)),
    ],
)  # fmt: skip
AVERAGE_PARAMS = Experiment(
    name="average_params",
    question="Does a pruned model have the loss of a dense one with its average number of parameters?",
    claims=[
        Claim("A model pruned to half of its weights has the loss of a dense model with its average number of "
              "parameters (here: to 0.03 nats).", by.near(gap_to_dense_line, 0.03, unit_of="loss")),
    ],
)  # fmt: skip

PAPER = Paper(
    name="sparse_pretraining",
    authors="Jin et al. 2025",
    title="The journey matters: average parameter count over pre-training unifies sparse and dense scaling laws",
    arxiv="2501.12486",
    settings={"data.name": "c4", "interventions.magnitude_pruning.every_steps": 100},
    experiments=[PRUNING_WINDOW, AVERAGE_PARAMS],
)
