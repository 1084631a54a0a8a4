"""Test whether one model is better than another: paired over documents, with training seeds as the second level."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of a minus the mean of b, with its bootstrap interval. p_value: two-sided, twice the share of resamples
    that contradict the sign of the difference."""

    mean: float
    low: float
    high: float
    p_value: float


def paired_difference(a_SD, b_SD, task_D=None, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Compare two models on the same documents by the bootstrap.

    a_SD, b_SD: [seeds, documents] of a value such as a loss, or 1 for a correct answer. task_D: the task of each
    document; None: all are of one task.

    Documents are resampled once for both models, because both saw the same ones, and within their task. Tasks are fixed
    and have equal weight. Seeds are resampled for each model separately, because the seeds of two models are
    independent. Resampling n seeds underestimates their spread; the factor sqrt(n / (n - 1)) corrects this. With one
    seed for each model, the interval does not cover the variation between seeds. Raises ValueError if the numbers of
    documents differ.
    """
    a_SD, b_SD = (np.atleast_2d(np.asarray(x, float)) for x in (a_SD, b_SD))
    if a_SD.shape[1] != b_SD.shape[1]:
        raise ValueError(f"{a_SD.shape[1]} and {b_SD.shape[1]} documents: both models must have seen the same ones")
    task_D = np.zeros(a_SD.shape[1]) if task_D is None else np.asarray(task_D)
    tasks = [np.flatnonzero(task_D == task) for task in np.unique(task_D)]
    rng = np.random.default_rng(seed)
    means = np.array([_resampled_difference(a_SD, b_SD, tasks, rng) for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = mean_over_tasks(a_SD, task_D) - mean_over_tasks(b_SD, task_D)
    contrary = min(np.sum(means <= 0), np.sum(means >= 0))
    return Difference(mean, float(low), float(high), float(min(1.0, 2 * (contrary + 1) / (resamples + 1))))


def mean_over_tasks(values_SD: np.ndarray, task_D: np.ndarray) -> float:
    """The mean over seeds and tasks of each task's mean over its documents."""
    return float(np.mean([values_SD[:, task_D == task].mean() for task in np.unique(task_D)]))


def _resampled_difference(a_SD: np.ndarray, b_SD: np.ndarray, tasks: list[np.ndarray], rng) -> float:
    weights_D = np.zeros(a_SD.shape[1])
    for places in tasks:
        drawn = np.bincount(rng.integers(len(places), size=len(places)), minlength=len(places))
        weights_D[places] = drawn / len(places) / len(tasks)
    return _seed_mean(a_SD @ weights_D, rng) - _seed_mean(b_SD @ weights_D, rng)


def _seed_mean(values_S: np.ndarray, rng: np.random.Generator) -> float:
    n_seeds = len(values_S)
    if n_seeds == 1:
        return float(values_S[0])
    mean = values_S.mean()
    drawn = values_S[rng.integers(n_seeds, size=n_seeds)].mean()
    return float(mean + (drawn - mean) * np.sqrt(n_seeds / (n_seeds - 1)))


def ratio_of_sums(values_B, weights_B) -> tuple[float | None, float | None]:
    """The sum of the values over the sum of the weights, such as losses of blocks over their tokens, and its standard
    error over blocks (Cochran, Sampling Techniques, 1977, equation 2.45).

    None for both without a weight; the error is None for one block.
    """
    values_B, weights_B = np.asarray(values_B, float), np.asarray(weights_B, float)
    number, total = len(values_B), float(weights_B.sum())
    if not total:
        return None, None
    ratio = float(values_B.sum()) / total
    if number < 2:
        return ratio, None
    square = float(((values_B - ratio * weights_B) ** 2).sum()) * number / (number - 1)
    return ratio, float(np.sqrt(square)) / total


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979). If all null hypotheses are true, the probability that one of
    them is below alpha is at most alpha."""
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(p_values)), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected.tolist()
