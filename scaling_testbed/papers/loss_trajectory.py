"""The experiment of Su et al. 2024 (arXiv 2403.06563) on the critical batch size, and its claims.

The paper fits L(N, S, B) to the curves of models of 1M to 60M parameters and predicts whole curves of larger ones. A
limit that it does not give is chosen here, and its claim says "here". Limits were declared before any run of the sweep:
errors of curves at the upper ends of an exploratory grid of nine runs, which had 0.5 to 2 %, 3 to 5 % and 1 to 3 %; and
a factor of 1.4, as that grid's critical batches changed by 20 to 40 % where one rate was another.
"""

from scaling_testbed.papers import batch_numbers as of
from scaling_testbed.papers import law_claims as by
from scaling_testbed.papers.paper import Claim, Experiment, Paper

CRITICAL_BATCH = Experiment(
    name="critical_batch",
    question="How does the critical batch depend on loss and size, and does L(N, S, B) predict whole curves?",
    traces=["val_loss"],
    claims=[
        Claim("At equal loss the critical batch does not depend on the size (here: by less than a factor of 1.4 over "
              "the sizes).", by.near(of.change_with_size, 1.4, ratio=True)),
        Claim("It grows as the loss falls (here: faster than 1/L).", by.within(of.exponent, 1.0, beyond=True)),
        Claim("The law of the other runs predicts whole curves of the middle batch (here: to 2% in the mean).",
              by.within(of.curve_error(of.MIDDLE_BATCH), 0.02)),
        Claim("It predicts those of the largest batch (here: to 5%).",
              by.within(of.curve_error(of.LARGEST_BATCH), 0.05)),
        Claim("It predicts those of the largest size (here: to 3%).",
              by.within(of.curve_error(of.LARGEST_SIZE), 0.03)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="loss_trajectory",
    authors="Su et al. 2024",
    title="Unraveling the mystery of scaling laws: Part I",
    arxiv="2403.06563",
    settings={"data.name": "c4", "schedule.name": "constant"},
    experiments=[CRITICAL_BATCH],
)
