"""Growth of a small model into one of twice the width, as AquilaMoE (arXiv 2408.06567) scales up: function-preserving
copies (FPI), or second copies from the next layer (AKI), both of bert2BERT (arXiv 2110.07143).

Here growth is judged at equal compute: a run from scratch has more steps, by the FLOPs of the small model. The noise
that lets the copies part is the testbed's own. The margin (0.01 nats) and the number of seeds were declared before any
run of the sweep, after exploratory runs of its cpu scale with the seeds 0 and 1. There, less the loss from scratch, FPI
with noise ended at -0.051 and -0.007 nats, FPI without noise at +0.143 and +0.152, and AKI at +0.024 and +0.061. So the
first claim is expected to agree narrowly or not to be told, and the third to disagree.
"""

from dataclasses import replace

from scaling_testbed.analysis.curves.grouping import Curve, shape_of
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.papers import measures as of
from scaling_testbed.papers.combinators import between, compare
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.paper import Claim, Experiment, Paper

WIDTH, NOISE = "start.grow.width", "start.grow.noise"
SCRATCH = {WIDTH: None, NOISE: None}
EQUAL = 0.01  # by how much the compute of two runs may differ


def compute_of(row: Row) -> float | None:
    """The FLOPs of a run and of its lineage; None if they are not known."""
    flops: float | None = row.get("flops" if row.get("start.run") is None else "flops_total")
    return flops


def without_equal_compute(evidence: Evidence, curve: Curve) -> list[str]:
    """The missing runs of a curve, and in what the runs of its shape do not have equal compute."""
    rows = [row for row in evidence.study.rows if row["status"] == "finished" and shape_of(row) == curve.shape]
    found = [compute_of(row) for row in rows]
    known = [flops for flops in found if flops is not None]
    gaps = list(curve.missing)
    if len(known) < len(found):
        gaps.append("flops_total of a grown run, which a lineage of an earlier version does not have")
    elif known and max(known) > (1 + EQUAL) * min(known):
        gaps.append(f"equal compute: the runs have {min(known):.4g} to {max(known):.4g} FLOPs, their lineage included")
    return gaps


LOSS = replace(of.LOSS, missing=without_equal_compute)

GROWTH = Experiment(
    name="growth",
    question="Does a model that is grown from a small one end lower than one from scratch, at equal compute?",
    group=[WIDTH, NOISE],
    claims=[
        Claim("A model grown by function-preserving copies with noise (here: noise 1) ends lower than one from scratch "
              "at equal compute.", between(LOSS, {WIDTH: "fpi", NOISE: 1}, SCRATCH)),
        Claim("Without noise the copies stay equal, and the model ends higher than one from scratch.",
              between(LOSS, SCRATCH, {WIDTH: "fpi", NOISE: 0})),
        Claim("A model grown by AKI ends lower than one from scratch at equal compute.",
              between(LOSS, {WIDTH: "aki", NOISE: 0}, SCRATCH)),
        Claim("AKI ends lower than function-preserving copies without noise.",
              compare(LOSS, WIDTH, "aki", "fpi", {NOISE: 0}), source="bert2BERT"),
    ],
)  # fmt: skip

PAPER = Paper(
    name="growing",
    authors="Zhang et al. 2024",
    title="AquilaMoE: efficient training for MoE models with scale-up and scale-out strategies",
    arxiv="2408.06567",
    experiments=[GROWTH],
)
