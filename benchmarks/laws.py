"""Resamples of a law's rows, fitted together, beside SciPy's L-BFGS-B, which fits one after another.

    python -m benchmarks.laws [--quick] [--seconds S] [--rounds N] [--out DIR]

240 rows with noise of heavy tails, Huber's function, and descents from the optimum of all rows, as `analyze fit` makes
its intervals. Both ways use the same exact gradients. SciPy fits the first resamples only. The time is CPU time, so
that other processes on the machine matter less. "above the other's" is the largest part by which an objective is above
the one that the other way found for the same resample.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize

from benchmarks import harness
from benchmarks.report import Budget, Report
from scaling_testbed.analysis.laws.fitting import HUBER, Problem
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.solver import minimise

OURS, PEER = "this project, together", "SciPy, one by one"
PLANTED = {
    "chinchilla": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    "over_training": {"E": 1.5, "a": 140.0, "b": 190.0, "eta": 0.12},
    "kaplan_nd": {"Nc": 6.4e13, "Dc": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
}
ROWS, RESAMPLES, FOR_PEER = 240, 1000, 25
COLUMNS = [
    ("median_s", "CPU ms for 1,000", "ms"),
    ("low_s", "min", "ms"),
    ("high_s", "max", "ms"),
    ("ratio", "of ours", "ratio"),
    ("above", "above the other's", "small"),
]


def planted(name: str, rows: int, seed: int = 0) -> Problem:
    """A law with noise of half a percent: sizes over four decades, 5 to 640 tokens per parameter."""
    rng = np.random.default_rng(seed)
    n_params = np.exp(rng.uniform(np.log(1e6), np.log(1e10), rows))
    inputs = {"n_params": n_params, "n_tokens": n_params * np.exp(rng.uniform(np.log(5), np.log(640), rows))}
    observed = LAWS[name].predict(PLANTED[name], inputs) * np.exp(0.005 * rng.standard_t(3, rows))
    return Problem(LAWS[name], inputs, observed, HUBER, {})


def together(problem: Problem, start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return minimise(problem, np.repeat(start[None], len(counts), axis=0), counts, 1e-10)[0]


def one_by_one(problem: Problem, start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    unit, bounds = problem.delta**2, np.array(problem.bounds).T
    options = {"maxiter": 2000, "maxfun": 3000, "ftol": 1e-15, "gtol": 1e-10}

    def of(count: np.ndarray, theta: np.ndarray):
        residuals, slopes = problem.linearised(theta)
        pull = count * problem.derivatives(residuals)[0]
        return problem.total(residuals, count) / unit, pull @ slopes / unit

    solve = partial(minimize, x0=start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.array([solve(partial(of, count)).fun * unit for count in counts])


def compare(report: Report, rounds: int, name: str, resamples: int, for_peer: int, seconds: float) -> None:
    """Add the case of one law: rounds of both ways in turn, as many as the time allows."""
    problem = planted(name, ROWS)
    truth = [np.log(PLANTED[name][one.name]) if one.log else PLANTED[name][one.name] for one in problem.free]
    start = minimise(problem, np.array([truth]))[1][0]
    rng = np.random.default_rng(1)
    counts = rng.multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=resamples)
    ways = {OURS: (together, counts), PEER: (one_by_one, counts[:for_peer])}
    times: dict[str, list[float]] = {way: [] for way in ways}
    values: dict[str, np.ndarray] = {}
    budget = Budget(seconds)
    for number in range(rounds):
        if number and budget.left() < 0:
            break
        for way, (solve, taken) in ways.items():
            began = time.process_time()
            values[way] = solve(problem, start, taken)
            times[way].append((time.process_time() - began) * 1000 / len(taken))
    both = {way: found[:for_peer] for way, found in values.items()}
    medians = {way: statistics.median(found) for way, found in times.items()}
    rows = [
        {
            "variant": way,
            "ours": way == OURS,
            "status": "ok",
            "seconds": times[way],
            "median_s": medians[way],
            "low_s": min(times[way]),
            "high_s": max(times[way]),
            "ratio": medians[way] / medians[OURS],
            "above": float(np.max(both[way] / both[PEER if way == OURS else OURS] - 1)),
        }
        for way in ways
    ]
    report.add({"label": f"{name}, {ROWS} rows", "rows": rows})


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=120, peers=False)
    resamples, for_peer = (40, 4) if options.quick else (RESAMPLES, FOR_PEER)
    machine = harness.describe_machine(torch.device("cpu"))
    report = Report("laws", machine, COLUMNS, out=options.out, smoke=options.quick)
    work = {name: partial(compare, report, min(options.rounds, 5), name, resamples, for_peer) for name in PLANTED}
    return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
