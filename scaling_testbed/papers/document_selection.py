"""Choosing documents of a corpus with three kinds of planted junk by the losses of a ladder of models: which choice
trains the better model?

PreSelect (Shum et al. 2025) keeps the documents whose losses order a ladder of models as their abilities do. It trains
a fastText classifier on these scores, which is left out here. The corpus, the sizes and the margin (0.02 nats) are the
testbed's own. In one exploratory run of each choice, with other code, the losses were 2.184 at random, 2.146 by low
loss, 2.126 by gap, 2.109 by the middle half, 2.081 by PreSelect's share, and 1.969 without junk.
"""

from scaling_testbed.papers.combinators import between, compare
from scaling_testbed.papers.measures import LOSS
from scaling_testbed.papers.paper import Claim, Experiment, Paper

CHOSEN, CORPUS = "data.documents", "data.name"
RANDOM, LOW, MIDDLE, GAP, PRESELECT = (
    f"selection/{name}.json" for name in ("random", "low_loss", "middle_loss", "gap", "preselect")
)

SELECTION = Experiment(
    name="document_selection",
    question="Which choice of half of the documents trains the better model, where 30% of them are junk?",
    group=[CHOSEN, CORPUS],
    claims=[
        Claim("Documents that order the ladder (PreSelect's share, high) train a better model than a random half.",
              compare(LOSS, CHOSEN, PRESELECT, RANDOM)),
        Claim("They train a better model than those of low loss.", compare(LOSS, CHOSEN, PRESELECT, LOW)),
        Claim("They train a better model than those with a large gap between the weakest and the strongest model.",
              compare(LOSS, CHOSEN, PRESELECT, GAP)),
        Claim("The middle half by loss trains a better model than the lower half, which keeps easy text.",
              compare(LOSS, CHOSEN, MIDDLE, LOW)),
        Claim("A corpus without junk is still better.",
              between(LOSS, {CHOSEN: None, CORPUS: "planted_clean"}, {CHOSEN: PRESELECT, CORPUS: "filtered"})),
    ],
)  # fmt: skip

PAPER = Paper(
    name="document_selection",
    authors="Shum et al. 2025",
    title="Predictive data selection: the data that predicts is the data that teaches",
    arxiv="2503.00808",
    experiments=[
        Experiment(name="document_ladder", question="What do four models, from weak to strong, say of each document?"),
        SELECTION,
    ],
)
