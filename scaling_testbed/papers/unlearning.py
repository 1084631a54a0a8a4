"""Unlearning of random strings that a model knows by heart: by gradient ascent, by negative preference optimization
(NPO, arXiv 2404.05868) and by FLAT (arXiv 2410.11143), each judged against a model that never saw the strings and
against one that only goes on training without them.

The strings, the sizes and all limits are the testbed's own. They were declared before any run of the seeds 20 to 24,
after all arms had been run with the seeds 10 to 12. There, held-out text cost 2.39 nats after training on retained text
alone, 19.2 after ascent, 2.68 after ascent with retained text, 2.39 after NPO with it, and 5.02 and 2.40 after FLAT
without and with it. The strings cost 3.8 nats, 52.9, 50.9, 5.2, 9.5 and 10.0, and 6.1 in the model that never saw them.
So the claim about FLAT was expected to fail.
"""

from collections.abc import Mapping

from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.papers.combinators import between
from scaling_testbed.papers.measures import RATE, Evidence, Measure, Place, Value
from scaling_testbed.papers.paper import Claim, Experiment, Paper

OBJECTIVE, RETAIN, STEPS = "objective.name", "data.weights.retain", "budget.steps"
FORGET, KEPT = "forget", "retain"  # the sources


def arm(objective: str, retain: int) -> dict[str, object]:
    """The settings of the runs with an objective. retain: 1 with retained text in each step, else 0."""
    return {OBJECTIVE: objective, RETAIN: retain}


RETAIN_ONLY = arm("cross_entropy", 1)


def _loss(row: Row, source: str) -> float | None:
    found: Mapping[str, float] = row.get("val_loss_by_set") or {}
    return found.get(source)


def _value(by_seed: Mapping[int, float]) -> Value | None:
    return Value(by_seed, f"{sum(by_seed.values()) / len(by_seed):.3f}") if by_seed else None


def _kept(evidence: Evidence, place: Place) -> Value | None:
    found = {seed: _loss(row, KEPT) for seed, row in place.rows.items()}
    return _value({seed: loss for seed, loss in found.items() if loss is not None})


def _distance(evidence: Evidence, place: Place) -> Value | None:
    """The loss on the strings less that of the model that never saw them, by seed."""
    gold = {row["seed"]: _loss(row, FORGET) for row in evidence.study.rows if row.get("start.run") is None}
    found = {seed: (_loss(row, FORGET), gold.get(seed)) for seed, row in place.rows.items()}
    return _value({seed: own - its for seed, (own, its) in found.items() if own is not None and its is not None})


HELD_OUT = Measure("loss on held-out text", _kept, "loss", RATE)
DISTANCE = Measure(
    "distance of the loss on the strings from that of a model that never saw them", _distance, "loss", RATE, errors=True
)

UNLEARNING = Experiment(
    name="unlearning",
    question="Which objective forgets strings that a model knows by heart, and what does it cost?",
    group=[OBJECTIVE, RETAIN, STEPS],
    claims=[
        Claim("Gradient ascent alone destroys the model: held-out text costs 3 nats per token more than after training "
              "on retained text alone.", between(HELD_OUT, RETAIN_ONLY, arm("ascent", 0), margin=3.0)),
        Claim("With retained text in the same step it still costs 0.2 nats more.",
              between(HELD_OUT, RETAIN_ONLY, arm("ascent", 1), margin=0.2)),
        Claim("NPO with retained text costs at most 0.05 nats.",
              between(HELD_OUT, RETAIN_ONLY, arm("npo", 1), margin=0.05, contrary=True)),
        Claim("It ends nearer to the model that never saw the strings than training on retained text alone (here: by "
              "0.5 nats).", between(DISTANCE, arm("npo", 1), RETAIN_ONLY, margin=0.5)),
        Claim("NPO without retained text ends far nearer to the model that never saw the strings than ascent (here: by "
              "5 nats).", between(DISTANCE, arm("npo", 0), arm("ascent", 0), margin=5.0)),
        Claim("FLAT with retained text ends nearer to the model that never saw the strings than training on retained "
              "text alone (here: by 1 nat).",
              between(DISTANCE, arm("flat_tv", 1), RETAIN_ONLY, margin=1.0), source="FLAT"),
        Claim("FLAT without retained text costs 0.5 nats more on held-out text than with it.",
              between(HELD_OUT, arm("flat_tv", 1), arm("flat_tv", 0), margin=0.5)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="unlearning",
    authors="Zhang et al. 2024",
    title="Negative preference optimization: from catastrophic collapse to effective unlearning",
    arxiv="2404.05868",
    experiments=[UNLEARNING],
)
