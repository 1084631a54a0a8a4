"""What the state of an optimizer is worth when a run goes on: a question of Experience of Training a 1.7B-Parameter
LLaMa Model From Scratch (arXiv 2412.13335), which restarted runs with and without it.

The paper reports it for one run. Claims, limits and the number of steps are chosen here and were declared before any
run of the sweep, after an exploratory run of three seeds: a mean of 20 training losses .014 to .035 nats higher, and
.001 to .003 nats at the end.
"""

from scaling_testbed.papers import combinators as by
from scaling_testbed.papers import measures as of
from scaling_testbed.papers.measures import Trace
from scaling_testbed.papers.paper import Claim, Experiment, Paper

WITH, WITHOUT = '["weights", "optimizer", "step"]', '["weights", "step"]'  # start.take
FIRST = 20  # steps


def mean_of_the_first_steps(trace: Trace) -> float | None:
    """The mean of the first FIRST values; None if there are fewer."""
    values = [value for _, value in trace[:FIRST]]
    return sum(values) / FIRST if len(values) == FIRST else None


FIRST_LOSSES = of.traced(mean_of_the_first_steps, "train_loss", ratio=False, margin="loss")

OPTIMIZER_STATE = Experiment(
    name="optimizer_state",
    question="What is the state of the optimizer worth when a run goes on from a checkpoint?",
    group=["start.take", "start.rewarm"],
    traces=["train_loss"],
    claims=[
        Claim(f"Without the state the training loss is higher (here: in the mean of the first {FIRST} steps).",
              by.compare(FIRST_LOSSES, "start.take", WITH, WITHOUT, {"start.rewarm": 0})),
        Claim("A rate that rises again lowers this loss.",
              by.compare(FIRST_LOSSES, "start.rewarm", 30, 0, {"start.take": WITHOUT})),
        Claim("At the end little is left: the loss is higher by no more than a margin without the state (here: 0.005 "
              "nats).",
              by.compare(of.LOSS, "start.take", WITH, WITHOUT, {"start.rewarm": 0}, contrary=True)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="resuming",
    authors="Li et al. 2024",
    title="Experience of training a 1.7B-parameter LLaMa model from scratch",
    arxiv="2412.13335",
    experiments=[OPTIMIZER_STATE],
)
