"""Distillation from stored targets, after Dataset Reinforcement (arXiv 2303.08983): the training data are extended once
by the outputs of a teacher, and every later training on them gains without more compute.

The paper trains classifiers of images. Here a language model learns from a larger one: from all of its probabilities
(Hinton et al. 2015, arXiv 1503.02531), or from the stored four likeliest tokens, with the rest as one bucket, which is
the testbed's own. A student is judged at equal tokens, and against cross-entropy for twice the steps.

Margins and seeds were declared before any run with these seeds, after a first round with the seeds 0, 1 and 2. It had
been declared too, with a deviation of a seed of 0.01 nats, which was 0.03, so it could tell nothing. Its means:
cross-entropy 2.181, for twice the steps 2.019; all probabilities of teachers of width 16, 32 and 64 2.140, 2.076 and
2.071; half of the loss on all of them 2.102, on four stored tokens 2.130; all of the loss on four stored tokens 2.267.
So the third claim is expected to disagree.
"""

from scaling_testbed.papers import measures as of
from scaling_testbed.papers.combinators import compare
from scaling_testbed.papers.paper import Claim, Experiment, Paper

ARM = "logging.group"

TEACHERS = Experiment(
    name="distillation_teachers",
    question="Which losses do the teachers of the sweep distillation have?",
)

STUDENTS = Experiment(
    name="distillation",
    question="What does a small student gain from a teacher, at equal tokens and at equal compute, and from which one?",
    group=[ARM],
    claims=[
        Claim("A student on stored targets (here: half of the loss on four tokens and a bucket) ends lower than one on "
              "cross-entropy, at equal tokens and equal compute of its training (here: by 0.03 nats).",
              compare(of.LOSS, ARM, "half_top4_64", "ce", margin=0.03)),
        Claim("All probabilities of the teacher end lower than cross-entropy at equal tokens (here: by 0.05 nats).",
              compare(of.LOSS, ARM, "kl_64", "ce", margin=0.05), source="Hinton et al. 2015"),
        Claim("They end lower than cross-entropy for twice the steps, too.",
              compare(of.LOSS, ARM, "kl_64", "ce_twice"), source="here"),
        Claim("All of the loss on the teacher ends lower than half of it.",
              compare(of.LOSS, ARM, "kl_64", "half_64"), source="here"),
        Claim("Of half of the loss, all probabilities gain at most 0.03 nats over four stored tokens and a bucket.",
              compare(of.LOSS, ARM, "half_64", "half_top4_64", margin=0.03, contrary=True), source="here"),
        Claim("A teacher of width 64 teaches a student of width 16 better than one of its own size.",
              compare(of.LOSS, ARM, "kl_64", "kl_16"), source="here"),
        Claim("Over one of width 32 it gains at most 0.03 nats, although its own loss is lower by more.",
              compare(of.LOSS, ARM, "kl_64", "kl_32", margin=0.03, contrary=True), source="here"),
        Claim("All of the loss on four stored tokens ends higher than cross-entropy (here: by 0.03 nats).",
              compare(of.LOSS, ARM, "ce", "top4_64", margin=0.03), source="here"),
    ],
)  # fmt: skip

PAPER = Paper(
    name="distillation",
    authors="Faghri et al. 2023",
    title="Reinforce data, multiply impact: improved model accuracy and robustness with dataset reinforcement",
    arxiv="2303.08983",
    experiments=[TEACHERS, STUDENTS],
)
