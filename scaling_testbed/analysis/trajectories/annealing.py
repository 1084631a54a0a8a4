"""Laws of the loss over the history of the learning rate, for runs of one model on one data set.

rates[s] is the rate of update s = 0, 1, ..., and S_k(t) = sum of rates[k:t]. A law gives the loss after t updates. The
warm-up is a part of the history: the rate rises in it, so its drops are negative.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitting import DELTA, Problem, refitted, weights_of_runs
from scaling_testbed.analysis.laws.forms import HUBER, Law, Param, Values
from scaling_testbed.analysis.trajectories.points import Curve
from scaling_testbed.errors import UserError

MOMENTUM = 0.999  # lambda of the momentum law, as in its paper
BLOCKS = 200  # of updates in a history: the drops of the rate within a block count as one
POINTS = 60  # the most evaluations of a run that are fitted
LEAST_RATE = 1e-6  # of the peak; a smaller rate counts as this, because a law has a negative power of it


def _momentum(p: Values, x: Values) -> Any:
    return p["L0"] + p["A"] * x["rate_sum"] ** -p["alpha"] - p["C"] * x["annealing"]


def _multi_power(p: Values, x: Values) -> Any:
    scale, inner, outer = (np.expand_dims(p[name], -1) for name in ("C", "gamma", "beta"))
    reached = 1 - (scale * x["drop_rate"] ** -inner * x["since_drop"] + 1) ** -outer
    return p["L0"] + p["A"] * x["rate_sum"] ** -p["alpha"] - p["B"] * np.sum(x["drop"] * reached, axis=-1)


_COMMON = (
    Param("L0", (0.1, 3.0)),
    Param("A", (0.1, 10.0), low=1e-6, high=1e6, log=True),
    Param("alpha", (0.2, 1.0), low=0.0, high=4.0),
)
ANNEALING: Mapping[str, Law] = {
    "momentum": Law(
        "momentum",
        "L = L0 + A S1^-alpha - C S2; S2 = sum of m, m_s = lambda m_(s-1) + (lr_(s-1) - lr_s)",
        "Tissue et al. 2024, arXiv 2408.11029; S1 is the sum of the rates",
        ("rate_sum", "annealing"),
        "loss",
        (*_COMMON, Param("C", (1e-2, 10.0), low=1e-9, high=1e6, log=True)),
        _momentum,
    ),
    "multi_power": Law(
        "multi_power",
        "L = L0 + A S1^-alpha - B sum_k (lr_(k-1) - lr_k) (1 - (C lr_k^-gamma S_k + 1)^-beta)",
        "Luo et al. 2025, arXiv 2503.12811; S_k is the sum of the rates from update k on",
        ("rate_sum", "drop", "drop_rate", "since_drop"),
        "loss",
        (
            *_COMMON,
            Param("B", (1.0, 1e3), low=1e-9, high=1e9, log=True),
            Param("C", (1e-3, 10.0), low=1e-9, high=1e6, log=True),
            Param("beta", (0.2, 1.0), low=1e-3, high=10.0),
            Param("gamma", (0.2, 1.0), low=0.0, high=4.0),
        ),
        _multi_power,
    ),
}


def history(rates: np.ndarray, steps: np.ndarray, momentum: float = MOMENTUM) -> dict[str, np.ndarray]:
    """What the laws take from the rates of a run up to each of `steps` [n], ascending from 1.

    rate_sum, annealing [n]: S1 and S2. drop, drop_rate, since_drop [n, n_blocks]: of each block of updates the fall of
    the rate, the rate after it, and the sum of the rates since; the fall is 0 before the block is complete.
    """
    rates = np.maximum(rates, 0.0)
    sums = np.concatenate([[0.0], np.cumsum(rates)])
    drops = -np.diff(rates, prepend=rates[0])
    kept, moved = 0.0, np.empty(len(rates))
    for place, drop in enumerate(drops):
        kept = momentum * kept + drop
        moved[place] = kept
    edges = np.unique(np.concatenate([[0], steps, np.linspace(0, steps[-1], BLOCKS + 1).round()])).astype(int)
    block = np.searchsorted(edges, np.arange(edges[-1]), side="right") - 1
    drops, size = drops[: edges[-1]], np.abs(drops[: edges[-1]])
    falls = np.bincount(block, drops, len(edges) - 1)
    total = np.bincount(block, size, len(edges) - 1)
    some = total > 0

    def mean(values: np.ndarray) -> np.ndarray:
        """The mean over the updates of each block that has drops, weighted by their size."""
        return np.bincount(block, size * values[: edges[-1]], len(edges) - 1)[some] / total[some]

    seen = edges[1:][some][None] <= steps[:, None]
    since = np.maximum(sums[steps][:, None] - mean(sums[:-1])[None], 0.0)
    return {
        "rate_sum": sums[steps],
        "annealing": np.cumsum(moved)[steps - 1],
        "drop": np.where(seen, falls[some][None], 0.0),
        "drop_rate": np.broadcast_to(np.maximum(mean(rates), LEAST_RATE * rates.max()), seen.shape),
        "since_drop": np.where(seen, since, 0.0),
    }


def _together(histories: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The histories of several runs, one after another. Runs with fewer blocks get blocks without a fall."""
    widest = max(one["drop"].shape[1] for one in histories)
    wide = {name: value for name, value in (("drop", 0.0), ("drop_rate", 1.0), ("since_drop", 0.0))}
    found: dict[str, list[np.ndarray]] = {}
    for one in histories:
        for name, values in one.items():
            if name in wide:
                room = ((0, 0), (0, widest - values.shape[1]))
                values = np.pad(values, room, constant_values=wide[name])
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}


@dataclass(frozen=True, kw_only=True)
class Annealed:
    """An annealing law fitted to training curves. momentum: lambda, which only the momentum law uses. objective: the
    sum of Huber's function of the log loss, each run with the same weight."""

    law: str
    params: dict[str, float]
    momentum: float
    objective: float
    n_runs: int
    n_points: int

    def losses(self, rates: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The predicted losses after `steps` [n] updates of a run with these rates [at least the last step]."""
        return ANNEALING[self.law].predict(self.params, history(rates, np.asarray(steps, int), self.momentum))


class Fitting:
    """The fit of an annealing law to some training curves, with any of the runs left out.

    points: the most evaluations of a run that are used, evenly spaced. starts: random starts of a fit. delta: where
    Huber's function turns linear. Raises UserError if there are fewer evaluations than parameters.
    """

    def __init__(
        self,
        law: str,
        curves: Sequence[Curve],
        *,
        momentum: float = MOMENTUM,
        points: int = POINTS,
        starts: int = 8,
        delta: float = DELTA,
    ):
        self.law, self.momentum, self.starts = ANNEALING[law], momentum, starts
        self.runs = [curve.run for curve in curves]
        places = [np.unique(np.linspace(0, len(one.steps) - 1, points).round().astype(int)) for one in curves]
        inputs = _together(
            [history(one.rates, one.steps[at], momentum) for one, at in zip(curves, places, strict=True)]
        )
        observed = np.concatenate([one.losses[at] for one, at in zip(curves, places, strict=True)])
        of = np.repeat(self.runs, [len(at) for at in places])
        self.problem = Problem(self.law, inputs, observed, HUBER, {}, delta, weights_of_runs(of), of)
        if len(observed) < len(self.law.params):
            raise UserError(f"{law} has {len(self.law.params)} parameters, but there are {len(observed)} evaluations")

    def without(self, run: str | None = None, start: Mapping[str, float] | None = None) -> Annealed:
        """The law fitted to all runs but `run`. start: parameters from which one more start begins. Raises UserError if
        no start leads to an optimum."""
        assert self.problem.runs is not None
        counts = np.where(self.problem.runs == run, 0.0, 1.0)[None]
        own = start or {one.name: float(np.sqrt(np.prod(one.start)) if one.log else np.mean(one.start))
                        for one in self.law.params}  # fmt: skip
        (theta,) = refitted(self.problem, counts, own, self.starts if start is None else 1)
        if not np.isfinite(theta).all():
            raise UserError(f"{self.law.name}: no start leads to an optimum; are the losses in nats per token?")
        params = {name: float(value) for name, value in self.problem.params(theta).items()}
        return Annealed(
            law=self.law.name,
            params=params,
            momentum=self.momentum,
            objective=float(self.problem.total(self.problem.residuals(theta), counts[0])),
            n_runs=len(set(self.runs) - {run}),
            n_points=int(counts.sum()),
        )
