"""Compare models on the same multiple-choice documents, from the files that `analyze score --out` writes.

Shapes in names: S seeds, D documents.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.multiple_choice import MEAN
from scaling_testbed.evaluation.statistics import LEVEL, holm, mean_over_tasks, paired_difference
from scaling_testbed.files import parse_json

MEASURES = {
    "error": lambda one: one["predicted"] != one["gold"],
    "error_per_byte": lambda one: one["predicted_per_byte"] != one["gold"],
    "gold_loss": lambda one: -one["log_likelihoods"][one["gold"]],
    "margin": lambda one: margin(one["log_likelihoods"], one["gold"]),
}
SEEDS = "give one file for each seed"
DEFINITION = (
    f"difference is a - b. low and high: {LEVEL:.0%} bootstrap interval over documents (the same for both models) and\n"
    "over the seeds of each model. p_value is two-sided; p_holm is corrected for the number of rows (Holm 1979)"
)


@dataclass(frozen=True)
class Model:
    """The values of one model on every document. Each seed is one file. documents: task and line of each."""

    name: str
    values_SD: np.ndarray
    documents: tuple[tuple[str, int], ...] = ()


def margin(log_likelihoods: Sequence[float], gold: int) -> float:
    """How much more likely the right choice is than the likeliest other one, in nats; negative for a wrong answer."""
    others = [value for place, value in enumerate(log_likelihoods) if place != gold]
    return log_likelihoods[gold] - max(others)


def read_models(files: Mapping[str, Sequence[Path]], measure: str) -> tuple[list[Model], np.ndarray]:
    """Read the models, and the task of each document. Raises UserError, which names the file, for a file that `score`
    did not write or that has other documents than the first file, and ConfigError for a file given twice."""
    first: Path | None = None
    asked: list[tuple] = []
    models = []
    for name, paths in files.items():
        if len({path.resolve() for path in paths}) < len(paths):
            raise ConfigError(f"--model {name}: a file is given twice; {SEEDS}")
        values_SD: list[list[float]] = []
        seen: list[list[dict[str, Any]]] = []
        for path in paths:
            documents = _read(path)
            own = list(map(_identity, documents))
            if first is None:
                first, asked = path, own
            elif own != asked:
                raise UserError(f"{path} and {first} have different documents: {_first_apart(own, asked)}")
            values_SD.append([float(MEASURES[measure](one)) for one in documents])
            if documents in seen:
                same = paths[seen.index(documents)]
                raise UserError(f"--model {name}: {path} is a copy of {same}; {SEEDS}")
            seen.append(documents)
        models.append(Model(name, np.array(values_SD), tuple((task, line) for task, line, *_ in asked)))
    return models, np.array([task for task, *_ in asked])


def _identity(one: Mapping[str, Any]) -> tuple:
    """A key that is equal for two records of the same document."""
    return (one["task"], one["line"], one["gold"], *one["n_bytes"])


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        documents = [parse_json(line, path) for line in path.read_text().split("\n") if line.strip()]
        for one in documents:
            values = [measure(one) for measure in MEASURES.values()]
            if not all(map(math.isfinite, values)) or not _identity(one):
                raise ValueError("a value is not finite")
            if not (isinstance(one["task"], str) and isinstance(one["line"], int)):
                raise ValueError("task must be text, line a whole number")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UserError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} was not written by `analyze score --out` ({error})") from None
    if not documents:
        raise UserError(f"{path} holds no document")
    seen = Counter((one["task"], one["line"]) for one in documents)
    (task, line), times = seen.most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} holds {task} line {line} {times} times; {SEEDS}")
    return sorted(documents, key=lambda one: (one["task"], one["line"]))


def _first_apart(own: Sequence[tuple], asked: Sequence[tuple]) -> str:
    for one, other in zip(own, asked, strict=False):
        if one != other:
            return f"{one[0]} line {one[1]} in the first, {other[0]} line {other[1]} in the second"
    return f"{len(own)} in the first, {len(asked)} in the second"


def compare(models: Sequence[Model], task_D: np.ndarray, against: str | None = None) -> list[dict[str, Any]]:
    """One row for each pair of models and each task, and with several tasks for their unweighted mean. against: only
    pairs with this model. Raises ConfigError for fewer than two models or an unknown name."""
    names = [model.name for model in models]
    if len(models) < 2:
        raise ConfigError(f"--model: a comparison needs two models; got {', '.join(names)}")
    if against is not None and against not in names:
        raise ConfigError(f"--against must be one of {', '.join(names)}; got {against!r}")
    pairs = [(a, b) for a, b in itertools.combinations(models, 2) if against is None or against in (a.name, b.name)]
    pairs = [(b, a) if a.name == against else (a, b) for a, b in pairs]
    tasks = list(dict.fromkeys(task_D.tolist()))
    rows = [_row(a, b, task, task_D) for a, b in pairs for task in (tasks if len(tasks) == 1 else [*tasks, None])]
    corrected = holm([row["p_value"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def _row(a: Model, b: Model, task: str | None, task_D: np.ndarray) -> dict[str, Any]:
    chosen_D = np.ones(len(task_D), bool) if task is None else task_D == task
    a_SD, b_SD, task_D = a.values_SD[:, chosen_D], b.values_SD[:, chosen_D], task_D[chosen_D]
    found = paired_difference(a_SD, b_SD, task_D)
    return {
        "a": a.name,
        "b": b.name,
        "task": MEAN if task is None else task,
        "documents": int(chosen_D.sum()),
        "seeds_a": len(a_SD),
        "seeds_b": len(b_SD),
        "mean_a": mean_over_tasks(a_SD, task_D),
        "mean_b": mean_over_tasks(b_SD, task_D),
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
    }
