"""The experiment of Haegele et al. 2024 (arXiv 2405.18392) on budgets that share a trunk, and its claim.

The paper trains models of 33M to 1B parameters at a constant rate with a decay over the last 20 % of the steps, and
finds the loss of a cosine of the same length, also when several decays branch off one run. The limit of equality is
chosen here, and was declared before any run of the sweep.
"""

from scaling_testbed.papers import combinators as by
from scaling_testbed.papers import measures as of
from scaling_testbed.papers.paper import Claim, Experiment, Paper

WSD_BRANCHES = Experiment(
    name="wsd_branches",
    question="Do decays that branch off one trunk reach the losses of whole runs with a cosine?",
    group=["schedule.name", "budget.steps"],
    claims=[
        Claim("A run with a constant rate and a decay ends no higher than one with a cosine of the same length.",
              by.compare(of.BEST_LOSS, "schedule.name", "cosine", "wsd", contrary=True)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="fixed_durations",
    authors="Haegele et al. 2024",
    title="Scaling laws and compute-optimal training beyond fixed training durations",
    arxiv="2405.18392",
    experiments=[WSD_BRANCHES],
)
