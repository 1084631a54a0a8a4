"""The margin of each document over a ladder of models, from the files that `analyze score --out` writes.

The margin is the log-likelihood of the right choice less that of the likeliest other one, in nats. Nothing here says
that a given answer is false: a model that is wrong more often than the labels cannot judge them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from scaling_testbed.errors import ConfigError
from scaling_testbed.evaluation.comparison import Model

PREFIX = "margin."
DEFINITION = (
    "margin is the log-likelihood of the right choice less that of the likeliest other one, in nats, the mean over\n"
    "the seeds of a model. wrong: no file has a positive margin. falls, rises: at every step from model to model"
)


def table(models: Sequence[Model]) -> list[dict[str, Any]]:
    """One row for each document, in the order of the files. models: of the measure margin, from the weakest to the
    strongest. Raises ConfigError for fewer than two models."""
    if len(models) < 2:
        raise ConfigError(f"--model: margins need two models or more, the weakest first; got {len(models)}")
    rows = []
    for place, (task, line) in enumerate(models[0].documents):
        by_model = {model.name: float(model.values_SD[:, place].mean()) for model in models}
        steps = [after - before for before, after in itertools.pairwise(by_model.values())]
        rows.append(
            {"task": task, "line": line}
            | {f"{PREFIX}{name}": value for name, value in by_model.items()}
            | {
                "wrong": all((model.values_SD[:, place] <= 0).all() for model in models),
                "falls": max(steps) < 0,
                "rises": min(steps) > 0,
            }
        )
    return rows


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task: how many documents rise, fall, are wrong for all, and both wrong and falling.

    by_chance is the share of documents whose margins would fall at every step if the models had no order: one in k! for
    k models.
    """
    n_models = sum(key.startswith(PREFIX) for key in rows[0])
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        found.append(
            {
                "task": task,
                "documents": len(here),
                "rises": sum(row["rises"] for row in here),
                "falls": sum(row["falls"] for row in here),
                "wrong": sum(row["wrong"] for row in here),
                "wrong_and_falls": sum(row["wrong"] and row["falls"] for row in here),
                "by_chance": 1 / math.factorial(n_models),
            }
        )
    return found


def worst(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The documents that every model gets wrong, those that fall first, then by the margin of the last model."""
    last = [key for key in rows[0] if key.startswith(PREFIX)][-1]
    wrong = [row for row in rows if row["wrong"]]
    return sorted(wrong, key=lambda row: (not row["falls"], row[last]))[:most]
