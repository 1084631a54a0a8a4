"""Weights of a mixture that follow from the losses on its sources: are losses above a known entropy the better guide?

Skill-It (Chen et al. 2023) weights sources by their losses. A source that cannot be learned has the highest loss. The
four sources, one of them noise, the excess over the entropy and all limits are the testbed's own. They were declared
before any run of the sweep, after one exploratory run of each of four arms: a mean loss on the three sources that can
be learned of 2.51 with uniform weights, 2.27 by excess, 2.52 by raw losses at a quarter of eta, and 2.41 with equal
weights without noise.
"""

import numpy as np

from scaling_testbed.papers.combinators import between, positive
from scaling_testbed.papers.measures import RATE, Evidence, Measure, Place, Value
from scaling_testbed.papers.paper import Claim, Experiment, Paper

LEARNABLE, NOISE = ("first", "second", "third"), "noise"
EQUAL_SHARE = 0.25  # of each source, with uniform weights
SCORE, ETA, EVERY = "data.online.score", "data.online.eta", "data.online.every_steps"
SHARES = tuple(f"data.weights.{name}" for name in (*LEARNABLE, NOISE))
EQUAL = dict.fromkeys(SHARES, 1)
UNIFORM = {**EQUAL, SCORE: None, ETA: None, EVERY: None}
EXCESS, RAW = ({**EQUAL, SCORE: score, ETA: 1, EVERY: 100} for score in ("excess", "raw"))
WITHOUT_NOISE = {**UNIFORM, f"data.weights.{NOISE}": 0}


def _learned(evidence: Evidence, place: Place) -> Value | None:
    found = {seed: row.get("val_loss_by_set") for seed, row in place.rows.items()}
    means = {seed: float(np.mean([losses[name] for name in LEARNABLE])) for seed, losses in found.items() if losses}
    return Value(means, f"{np.mean(list(means.values())):.3f}") if means else None


def _fed(evidence: Evidence, place: Place) -> Value | None:
    found = {seed: row.get("tokens_by_source") for seed, row in place.rows.items()}
    shares = {seed: tokens[NOISE] / sum(tokens.values()) for seed, tokens in found.items() if tokens}
    above = {seed: share - EQUAL_SHARE for seed, share in shares.items()}
    return Value(above, f"{np.mean(list(shares.values())):.2f}") if shares else None


LEARNED = Measure("mean loss on the sources that can be learned", _learned, "loss", RATE)
FED = Measure(f"share of tokens that are noise, less {EQUAL_SHARE:g}", _fed, "share", RATE)

ONLINE = Experiment(
    name="online_mixtures",
    question="Which weights, static or by losses, train best on four sources of which one is noise?",
    group=[SCORE, *SHARES],
    claims=[
        Claim("Weights by the loss above the entropy beat uniform weights on the sources that can be learned (here: by "
              "0.05 nats).", between(LEARNED, EXCESS, UNIFORM)),
        Claim("Weights by the loss itself, as printed, do not: they gain at most 0.02 nats over uniform weights.",
              between(LEARNED, RAW, UNIFORM, contrary=True, margin=0.02)),
        Claim("By the loss itself more of the tokens are noise than with uniform weights (here: 0.33, not 0.25).",
              positive(FED, RAW)),
        Claim("Weights by the excess beat equal weights of the sources that can be learned, too (here: by 0.05 nats).",
              between(LEARNED, EXCESS, WITHOUT_NOISE)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="skill_it",
    authors="Chen et al. 2023",
    title="Skill-It! A data-driven skills framework for understanding and training language models",
    arxiv="2307.14430",
    experiments=[ONLINE],
)
