"""Memory or learning in context: what a model does with tasks of its training and with others, by their number.

Kirsch et al. 2022 train transformers on random projections of images and find that a model memorises few tasks, and
learns to learn in context from many. Here a task is a random table of 16 symbols and 8 labels (data=in_context_tasks).
The sizes, the rate and all limits are the testbed's own. They were declared before any run of the sweep, after one
exploratory run at 64 tasks and width 32 (after 400 of its 800 steps, accuracy .78 on new symbols of train tasks and .87
on seen symbols of unseen tasks), and one with other code at each of 4, 64, 512 and 8,192 tasks at width 32: 1.00, .90,
.21 and .12 on new symbols of train tasks, and .22, .87, .995 and 1.00 on seen symbols of unseen ones.
"""

import math

import numpy as np

from scaling_testbed.analysis.rows.study import number
from scaling_testbed.papers.combinators import between, positive
from scaling_testbed.papers.lines import RISES, along
from scaling_testbed.papers.measures import RATE, Evidence, Measure, Place, Value
from scaling_testbed.papers.paper import Claim, Experiment, Paper

TASKS = "data.n_tasks"
FEWEST, BETWEEN, MOST = 2, 64, 8192
HALF = 0.5
NEW_OF_TRAIN, SEEN_OF_UNSEEN = "train_task_new", "unseen_task_seen"  # only memory, only the sequence answers these


def _by_seed(place: Place, group: str) -> dict[int, float]:
    found = {seed: row.get("accuracy_by_group") for seed, row in place.rows.items()}
    return {seed: of[group] for seed, of in found.items() if of and of.get(group) is not None}


def accuracy(group: str, name: str, above: float = 0.0) -> Measure:
    """The accuracy on a group of answers, less `above`."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        values = _by_seed(place, group)
        less = {seed: value - above for seed, value in values.items()}
        return Value(less, f"{np.mean(list(values.values())):.2f}") if values else None

    return Measure(name, of, "share", RATE)


def _crossing(evidence: Evidence, place: Place) -> Value | None:
    """The binary logarithm of the number of tasks at which the accuracy on seen symbols of unseen tasks first rises to
    one half, for each seed, by straight lines between the numbers that were run. Taken at the fewest tasks."""
    if number(place.curve.settings, TASKS) != FEWEST:
        return None
    line = [curve for curve in evidence.curves if curve.shape == place.curve.shape and curve.runs]
    line.sort(key=lambda curve: number(curve.settings, TASKS))
    points = [(math.log2(number(one.settings, TASKS)), _by_seed(Place(one, place.lr), SEEN_OF_UNSEEN)) for one in line]
    found = {seed: value for seed in place.rows if (value := rises_to_half(points, seed)) is not None}
    if len(found) < len(place.rows):
        return None
    return Value(found, f"2^{np.mean(list(found.values())):.2f} tasks")


def rises_to_half(points: list[tuple[float, dict[int, float]]], seed: int) -> float | None:
    """Where the values of a seed first rise to one half, between points (x, value of each seed); None if nowhere."""
    own = [(x, values[seed]) for x, values in points if seed in values]
    for (x, low), (beyond, high) in zip(own, own[1:], strict=False):
        if low < HALF <= high:
            return x + (beyond - x) * (HALF - low) / (high - low)
    return None


MEMORY = accuracy(NEW_OF_TRAIN, "accuracy on new symbols of train tasks")
IN_CONTEXT = accuracy(SEEN_OF_UNSEEN, "accuracy on seen symbols of unseen tasks")
MEMORY_OVER_HALF = accuracy(NEW_OF_TRAIN, f"{MEMORY.name}, less one half", HALF)
IN_CONTEXT_OVER_HALF = accuracy(SEEN_OF_UNSEEN, f"{IN_CONTEXT.name}, less one half", HALF)
CROSSING = Measure("log2 of the tasks at which learning in context reaches one half", _crossing, "octaves", RATE)

IN_CONTEXT_TASKS = Experiment(
    name="in_context_tasks",
    question="With how many tasks does a model learn in context, and does it still remember tasks?",
    group=[TASKS],
    against=TASKS,
    claims=[
        Claim("Few tasks are remembered and many are not: the label of a new symbol of a train task (here: 2 and 8,192 "
              "tasks, by 0.3).", between(MEMORY, {TASKS: MOST}, {TASKS: FEWEST}, margin=0.3)),
        Claim("Many tasks teach to learn an unseen one from the sequence, and few do not (here: by 0.3).",
              between(IN_CONTEXT, {TASKS: FEWEST}, {TASKS: MOST}, margin=0.3)),
        Claim("In between (here: 64 tasks) a model remembers: more than half of the new symbols of train tasks.",
              positive(MEMORY_OVER_HALF, {TASKS: BETWEEN})),
        Claim("The same model learns in context: more than half of the seen symbols of unseen tasks.",
              positive(IN_CONTEXT_OVER_HALF, {TASKS: BETWEEN})),
        Claim("A wider model, which can remember more, needs more tasks before it learns in context (here: half an "
              "octave for ten times the parameters).", along(CROSSING, "N", RISES, {TASKS: FEWEST})),
    ],
)  # fmt: skip

PAPER = Paper(
    name="gpicl",
    authors="Kirsch et al. 2022",
    title="General-purpose in-context learning by meta-learning transformers",
    arxiv="2212.04458",
    experiments=[IN_CONTEXT_TASKS],
)
