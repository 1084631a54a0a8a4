"""The claim of Liu et al. 2023 (arXiv 2210.14199) that of models with the same loss the larger one is flatter.

The paper compares the trace of the Hessian of masked language models at the end of training. Here it is the trace of
the Fisher information of a token, along runs at a constant rate, at losses that all sizes pass. These levels and the
margin were declared before any run of the sweep, after one exploratory run of each size.
"""

import math

import numpy as np

from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.rows.study import name_of
from scaling_testbed.analysis.trajectories.equal_loss import AtLoss, at_loss
from scaling_testbed.papers.lines import FALLS, along
from scaling_testbed.papers.measures import RATE, Evidence, Measure, Place, Value, size_name
from scaling_testbed.papers.paper import Claim, Experiment, Paper


def trace_at(level: float) -> Measure:
    """The measure of the Fisher trace at a loss in nats. It is missing for a run that does not pass this loss."""

    def found(evidence: Evidence, run_id: object) -> AtLoss:
        return at_loss(evidence.curvatures.get(str(run_id), []), level)

    def of(evidence: Evidence, place: Place) -> Value | None:
        values = {seed: found(evidence, row["run_id"]).value for seed, row in place.rows.items()}
        logs = {seed: math.log(value) for seed, value in values.items() if value is not None}
        return Value(logs, f"{math.exp(float(np.mean(list(logs.values())))):.3g}") if logs else None

    def missing(evidence: Evidence, curve: Curve) -> list[str]:
        notes = {name_of(row): found(evidence, row["run_id"]).note for row in curve.runs.values()}
        withheld = [f"{name} at {size_name(curve)}: {note}" for name, note in notes.items() if note]
        return [*curve.missing, *withheld]

    return Measure(f"Fisher trace at {level:g} nats", of, "recorded", RATE, ratio=True, missing=missing)


CURVATURE = Experiment(
    name="curvature",
    question="Of models with the same loss, is the larger one flatter?",
    claims=[
        Claim("Of models with the same loss the larger one is flatter (here: at 2.2 nats).",
              along(trace_at(2.2), "N", FALLS)),
        Claim("So it is at a lower loss (here: at 2.1 nats).", along(trace_at(2.1), "N", FALLS)),
        Claim("Early in training it is not so yet (here: at 2.8 nats; the paper does not ask this).",
              along(trace_at(2.8), "N", FALLS, contrary=True)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="implicit_bias",
    authors="Liu et al. 2023",
    title="Same pre-training loss, better downstream: implicit bias matters for language models",
    arxiv="2210.14199",
    experiments=[CURVATURE],
)
