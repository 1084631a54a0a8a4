"""Whether the runs that `analyze next` chooses improve a prediction, in planted worlds and on tables of real runs.

usage: python scripts/next_runs.py [DATA] [--worlds N] [--out studies/next_runs]

Planted worlds: 30 runs of a known law with noise; a law is fitted, runs are chosen by it, made with new noise, and the
law is fitted again, by squares of logarithms. Its error at a target of 7 times the largest size is compared with that
after as many runs of the grid by chance, and after the whole grid again.

Real tables: a law is fitted to a few runs of a table, runs are chosen among the others, and the dearest ones, which
no fit sees, are predicted before and after; beside it, random choices of at most the same number and cost. The runs of
studies/archive/overtraining are a table. DATA, if given, holds copies of two public ones: gemstones_hot220.csv
(mcleish7/gemstone-scaling-laws) and datablations182.csv (huggingface/datablations; the runs without repeated tokens).
"""

import argparse
import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.fitting import fit, problem_of, refitted
from scaling_testbed.analysis.laws.forms import LAWS, LSQ_LOG
from scaling_testbed.analysis.laws.next_runs import checked_target, laws_that_count, next_runs, places_of
from scaling_testbed.analysis.laws.study import law_rows
from scaling_testbed.errors import UserError

STUDY = Path(__file__).resolve().parents[1] / "studies"
SIZES, RATIOS = np.geomspace(1e7, 1e9, 6), (10, 20, 40, 80, 160)
TARGET = checked_target((7e9, 1.4e11))
NOISE, STARTS = 0.003, 2
CHINCHILLA = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
WORLDS = {
    "chinchilla": CHINCHILLA,
    "over_training": {"E": 1.7, "a": 150.0, "b": 250.0, "eta": 0.13},
    "coupled": CHINCHILLA | {"A": 3e3, "B": 6e3, "k": 0.6},
}
# The law of the world, and the law that is fitted; the last one is wrong.
PAIRS = (("chinchilla", "chinchilla"), ("over_training", "over_training"), ("coupled", "chinchilla"))
BUDGETS = ((0.01, 10), (0.3, 10), (1.0, 30))  # shares of the grid's FLOPs, and the most runs
RUNS = 10  # on a real table
FIRST, HELD = 0.3, 0.2  # shares of a real table that are fitted first (cheapest half), and held out (dearest)
REPEATS, CHANCE = 20, 5
TABLES = {  # name -> path in DATA, the laws to fit
    "archive/overtraining": (STUDY / "archive" / "overtraining", ("chinchilla", "over_training")),
    "Gemstones": ("gemstones_hot220.csv", ("chinchilla", "coupled")),
    "Muennighoff et al.": ("datablations182.csv", ("chinchilla", "over_training")),
}
Rows = Sequence[dict[str, Any]]


def fitted(law: str, rows: Rows) -> Fit:
    inputs = {key: [float(row[key]) for row in rows] for key in ("n_params", "n_tokens")}
    observed = [float(row["loss"]) for row in rows]
    return fit(LAWS[law], inputs, observed, objective=LSQ_LOG, starts=STARTS, bootstrap=0)


def again(first: Fit, tables: Sequence[Rows], at: Rows) -> np.ndarray:
    """The law fitted to each of several tables: its predictions [tables, runs] of the runs `at`."""
    rows = [row for table in tables for row in table]
    inputs = {key: [float(row[key]) for row in rows] for key in ("n_params", "n_tokens")}
    problem = problem_of(LAWS[first.law], inputs, [float(row["loss"]) for row in rows], LSQ_LOG)
    own = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    thetas = refitted(problem, (own == np.arange(len(tables))[:, None]).astype(float), first.params, STARTS)
    params = {name: np.asarray(value)[..., None] for name, value in problem.params(thetas).items()}
    return LAWS[first.law].predict(params, {key: np.array([row[key] for row in at]) for key in inputs})


def trained(law: str, rows: Rows, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The rows with losses of a planted law and normal noise in ln L."""
    return [row | {"loss": float(LAWS[law].predict(WORLDS[law], row)) * float(np.exp(NOISE * rng.normal()))}
            for row in rows]  # fmt: skip


def cost(rows: Rows) -> float:
    return sum(6 * row["n_params"] * row["n_tokens"] for row in rows)


def at_most(rows: Rows, flops: float, runs: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows in random order, each where it can still be paid for."""
    found: list[dict[str, Any]] = []
    for place in rng.permutation(len(rows)):
        if len(found) < runs and cost([*found, rows[place]]) <= flops:
            found.append(rows[place])
    return found


def planted(worlds: int) -> Iterator[dict[str, Any]]:
    """Errors of ln L at the target: before, after the chosen runs, after runs of the grid by chance, as many and as
    dear at most, and after the whole grid again."""
    grid = [{"n_params": float(n), "n_tokens": float(n * ratio)} for n in SIZES for ratio in RATIOS]
    for truth, law in PAIRS:
        true = float(LAWS[truth].predict(WORLDS[truth], TARGET))
        for share, most in BUDGETS:
            off, said = [], []
            for seed in range(worlds):
                rng = np.random.default_rng(seed)
                base = trained(truth, grid, rng)
                first = fitted(law, base)
                laws = laws_that_count(first)
                found = next_runs(laws, TARGET, places_of(laws, TARGET), share * cost(grid), most)
                said.append(found.laws[0]["sd_after"] / found.laws[0]["sd_before"])
                chance = at_most(grid, share * cost(grid), len(found.runs), rng)
                more = [[], *(trained(truth, rows, rng) for rows in (found.runs, chance, grid))]
                off.append(np.log(again(first, [[*base, *rows] for rows in more], [TARGET])[:, 0] / true))
            errors = np.sqrt(np.mean(np.square(off), axis=0))
            told = {"world": truth, "law": law, "budget_share": share, "most_runs": most, "worlds": worlds}
            named = dict(zip(("before", "chosen", "chance", "whole_grid_again"), errors, strict=True))
            yield told | {f"error_{name}": f"{error:.5f}" for name, error in named.items()} | {
                "predicted_ratio_of_sd": f"{statistics.median(said):.3f}"}  # fmt: skip


def real(name: str, path: Path, laws: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Mean relative errors of the held-out runs before, after the chosen runs, and after random ones."""
    rows = [row for row in law_rows(path).rows if not row.get("U") or row["n_tokens"] <= 1.001 * float(row["U"])]
    rows = sorted(({key: float(row[key]) for key in ("n_params", "n_tokens", "loss")} for row in rows),
                  key=lambda row: cost([row]))  # fmt: skip
    cut = round((1 - HELD) * len(rows))
    pool, held = rows[:cut], rows[cut:]
    target = {key: held[-1][key] for key in ("n_params", "n_tokens")}
    for law in laws:
        found, refused = [], 0
        for seed in range(REPEATS):
            rng = np.random.default_rng(seed)
            begin = {int(one) for one in rng.permutation(len(rows) // 2)[: round(FIRST * len(rows))]}
            base, rest = [pool[at] for at in sorted(begin)], [row for at, row in enumerate(pool) if at not in begin]
            first, budget = fitted(law, base), cost(base)
            try:
                picked = next_runs(laws_that_count(first), target, rest, budget, RUNS).runs
            except UserError:  # the runs do not determine the parameters, and `next` says so
                refused += 1
                continue
            more = [[], picked, *(at_most(rest, budget, len(picked), rng) for _ in range(CHANCE)), rest]
            made = again(first, [[*base, *one] for one in more], held)
            found.append(np.mean(np.abs(made / np.array([row["loss"] for row in held]) - 1), axis=1))
        errors = np.array(found)
        chance = errors[:, 2:-1]
        means = {"before": errors[:, 0], "chosen": errors[:, 1], "chance": chance, "whole_pool": errors[:, -1]}
        about = {"table": name, "law": law, "runs": len(rows), "fitted_first": len(base), "held_out": len(held)}
        yield about | {f"error_{key}": f"{np.mean(one):.4f}" for key, one in means.items()} | {
            "better_than_chance": f"{np.mean(errors[:, 1:2] < chance):.2f}", "repeats": len(found),
            "refused": refused}  # fmt: skip


def tables(data: Path | None) -> Iterator[dict[str, Any]]:
    """`real` for each table that is at hand."""
    for name, (path, laws) in TABLES.items():
        if data or Path(path).is_absolute():
            yield from real(name, (data or Path()) / path, laws)


def write(path: Path, records: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--worlds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=STUDY / "next_runs")
    options = parser.parse_args()
    for name, records in (("planted_worlds", planted(options.worlds)), ("real_tables", tables(options.data))):
        found = []
        for record in records:
            print(record, flush=True)
            found.append(record)
        write(options.out / f"{name}.csv", found)


if __name__ == "__main__":
    main()
