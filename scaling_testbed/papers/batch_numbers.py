"""Numbers of a study with several batches: critical batches, and the errors of predicted training curves.

N counts the parameters without embedding and head, as in Kaplan et al. 2020 (arXiv 2001.08361). Points of a curve count
from twice the warm-up on: the least of 60 steps of other laws would leave out most losses of the largest batch.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from scaling_testbed.analysis.laws.fitting import LSQ_LOG
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.prediction import beside_fitted, of_runs
from scaling_testbed.analysis.laws.study import Fitting
from scaling_testbed.analysis.rows.study import SIZE, Study
from scaling_testbed.analysis.trajectories.critical_batch import CriticalBatches, critical_batches
from scaling_testbed.analysis.trajectories.points import RUN, curves_of, law_points
from scaling_testbed.errors import UserError, listed
from scaling_testbed.papers.described import by_its_call
from scaling_testbed.papers.predictions import Number, Numbers

if TYPE_CHECKING:
    from scaling_testbed.papers.measures import Evidence

MIDDLE_BATCH, LARGEST_BATCH, LARGEST_SIZE = "the middle batch", "the largest batch", "the largest size"
LEVELS = [round(0.1 * place, 1) for place in range(60, 9, -1)]  # nats; those that no batch reaches give nothing
FITTING = Fitting(starts=8, bootstrap=0, size=SIZE)  # fixed starts, so that verdicts are reproducible and fast


def _first_step(study: Study) -> int:
    return max(1, 2 * max(curve.warmup for curve in curves_of(study)[0]))


def _found(study: Study) -> CriticalBatches:
    return critical_batches(study, levels=LEVELS, size=SIZE, first_step=_first_step(study))


def change_with_size(evidence: "Evidence") -> list[Number]:
    """The logarithm of the factor by which the critical batch changes from the smallest to the largest size at equal
    loss. Raises UserError if no loss has a critical batch at two sizes."""
    ratios = list(_found(evidence.study).ratio_of_sizes().values())
    if not ratios:
        raise UserError("no loss has a critical batch at two sizes")
    change = float(np.mean(ratios))
    return [Number(change, f"a factor of {math.exp(change):.3g} over the sizes")]


def exponent(evidence: "Evidence") -> list[Number]:
    """1/alpha_B in B_crit = B_star / L^(1/alpha_B). Raises UserError with fewer than two losses."""
    law = _found(evidence.study).power_law()
    if law is None:
        raise UserError("fewer than two losses have a critical batch")
    value = law["1/alpha_B"]["value"]
    return [Number(value, f"B_crit = {law['B_star']['value']:.3g} / L^{value:.3g}")]


@by_its_call
def curve_error(which: str) -> Numbers:
    """The mean relative error, over the points of each curve and then over curves, of the curves of one batch or size,
    predicted by the law of all other curves. Each size and batch has its best rate."""

    def measure(evidence: "Evidence") -> list[Number]:
        study = evidence.study
        rows = law_points(study, size=SIZE, first_step=_first_step(study), best_lr=True).rows
        key = "n_params" if which == LARGEST_SIZE else "batch_tokens"
        values = sorted({row[key] for row in rows})
        if len(values) < 3:
            there = listed([f"{value:,.0f}" for value in values])
            raise UserError(f"{which} is predicted from two others or more, and {key} is {there}")
        chosen = values[len(values) // 2 if which == MIDDLE_BATCH else -1]
        held = [row for row in rows if row[key] == chosen]
        law = LAWS["batch"]
        found = FITTING.fit(law, [row for row in rows if row[key] != chosen], LSQ_LOG, run=RUN)
        errors = of_runs([beside_fitted(found, row) for row in held], held, RUN, law.inputs)
        mean = float(np.mean([one["mean_error"] for one in errors]))
        last = ", ".join(f"{one['final_error']:+.1%}" for one in errors)
        return [Number(mean, f"{which} ({chosen:,.0f}): {mean:.2%} in the mean, at the ends {last}")]

    return measure
