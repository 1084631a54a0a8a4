"""The critical batch size, from the steps that runs with several batches take to the same loss.

The number of steps S and of tokens E = S B to a loss obey (S/S_min - 1) (E/E_min - 1) = 1, and B_crit = E_min / S_min
(McCandlish et al. 2018, arXiv 1812.06162, eq. 2.11; Kaplan et al. 2020, arXiv 2001.08361, eq. 5.1). So S(B) = S_min
(1 + B_crit/B). By Su et al. 2024 (arXiv 2403.06563), B_crit = B_star / L^(1/alpha_B) depends on the loss alone.

Runs have a constant rate, so that each point of a curve is the end of a shorter run. At each size, batch and loss the
rate with the fewest steps counts. Each seed chooses its own rate and has its own B_crit. Their spread gives the
interval (Student's t), which thus contains the choice of the rate, as far as better rates were tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling_testbed.analysis.curves.intervals import interval
from scaling_testbed.analysis.laws.settings import varied
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.given import Given, study_of
from scaling_testbed.analysis.rows.names import number_in
from scaling_testbed.analysis.trajectories.points import DECAYED, FEWEST_STEPS, Curve, curves_of
from scaling_testbed.errors import ConfigError, UserError, listed

FEWEST_BATCHES = 3  # the hyperbola has two parameters
MOST_LEVELS = 8
STEPS_OF_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # nats
REACH = 100.0  # B_crit is searched from the smallest batch divided by this to the largest one times this
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The smoothed curve of one run: loss_K falls strictly as log_steps_K rises."""

    name: str
    n_params: float
    batch: float
    lr: float
    seed: int
    log_steps_K: np.ndarray
    loss_K: np.ndarray

    def log_steps(self, loss: float) -> float:
        """ln of the steps to a loss, linear in it between the knots; nan if it is not reached, or before the first."""
        if not self.loss_K[-1] <= loss <= self.loss_K[0]:
            return math.nan
        return float(np.interp(-loss, -self.loss_K, self.log_steps_K))


def monotone(log_steps_P: np.ndarray, loss_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve without its rises: the nearest sequence that does not rise, in least squares (isotonic regression, Ayer
    et al. 1955). Each of its levels is one knot, at the mean of the logarithms of its steps."""
    pools: list[list[float]] = []  # loss, ln steps, number of points
    for log_step, loss in zip(log_steps_P, loss_P, strict=True):
        pools.append([loss, log_step, 1.0])
        while len(pools) > 1 and pools[-2][0] <= pools[-1][0]:
            (loss_a, step_a, n_a), (loss_b, step_b, n_b) = pools[-2:]
            n = n_a + n_b
            pools[-2:] = [[(loss_a * n_a + loss_b * n_b) / n, (step_a * n_a + step_b * n_b) / n, n]]
    found = np.array(pools)
    return found[:, 1], found[:, 0]


def runs_of(curves: Sequence[Curve], first_step: int | None = None) -> tuple[list[Run], list[str]]:
    """The runs of curves that have tokens per batch, smoothed from `first_step` on (None: as points_of), and notes.

    Raises UserError, which names the run, if a rate decays, if a run has no batch, or if two runs have the same size,
    batch, rate and seed.
    """
    found: dict[tuple[float, float, float, int], Curve] = {}
    runs, short = [], []
    for curve in curves:
        late = curve.steps >= (max(2 * curve.warmup, FEWEST_STEPS) if first_step is None else first_step)
        if (curve.rates[curve.warmup :] < curve.peak * (1 - DECAYED)).any():
            kind = curve.row.get("schedule.name")
            raise UserError(
                f"{curve.run}: its rate decays{f' (schedule {kind})' if kind else ''}, and the loss in mid-run is that "
                "of no shorter run; train with schedule=constant, or leave such runs out with --where"
            )
        n_params, batch = (number_in(curve.row.get(key)) for key in ("n_params", "batch_tokens"))
        if not n_params or not batch:
            absent = "batch_tokens" if n_params else "n_params"
            unit = ", the batch in tokens" if n_params else ""
            raise UserError(f"{curve.run}: {absent} is not known; use --map {absent}=COLUMN{unit}")
        place = (float(n_params), float(batch), curve.peak, int(number_in(curve.row.get("seed")) or 0))
        if place in found:
            pair = [found[place].row, curve.row]
            differ = [key for key in varied(pair, list(dict.fromkeys([*pair[0], *pair[1]]))) if "." in key]
            said = f"they differ in {listed(differ)}; choose with --where" if differ else "leave one of them out"
            raise UserError(f"{found[place].run} and {curve.run} have one size, batch, rate and seed: {said}")
        found[place] = curve
        if np.sum(late) < 2:
            short.append(curve.run)
            continue
        runs.append(Run(curve.run, *place, *monotone(np.log(curve.steps[late]), curve.losses[late])))
    if not runs:
        raise UserError(f"no run has two evaluations after its warm-up: {listed(short)}; set evaluation.every_steps")
    said = f"{len(short)} runs have fewer than two evaluations after the warm-up and are left out: {listed(short)}"
    return runs, [said] if short else []


def hyperbola(batches_B: np.ndarray, log_steps_B: np.ndarray) -> tuple[float, float, float]:
    """ln S_min, ln B_crit and the largest relative misfit of ln S(B) = ln S_min + ln(1 + B_crit/B), fitted to the steps
    of at least three batches by least squares. nan if B_crit is not inside of the searched range."""
    logs = np.linspace(math.log(batches_B.min() / REACH), math.log(batches_B.max() * REACH), 601)

    def left(log_b: np.ndarray) -> np.ndarray:
        """The residuals [..., B] at each B_crit, with the best S_min."""
        apart = log_steps_B - np.log1p(np.exp(log_b)[..., None] / batches_B)
        return apart - apart.mean(axis=-1, keepdims=True)

    for _ in range(3):  # each round narrows the range by 200
        sums = np.sum(left(logs) ** 2, axis=-1)
        place = int(np.argmin(sums))
        if place in (0, len(logs) - 1):
            return math.nan, math.nan, math.nan
        logs = np.linspace(logs[place - 1], logs[place + 1], 601)
    log_b = float(logs[300])
    log_s = float(np.mean(log_steps_B - np.log1p(math.exp(log_b) / batches_B)))
    return log_s, log_b, float(np.max(np.abs(np.expm1(left(np.array(log_b))))))


@dataclass(frozen=True)
class Place:
    """What runs of one size have at one loss. log_steps, rates: the fewest steps and their rate, by batch and by seed.
    tried: the rates by batch. log_s_min, log_b_crit: by seed. misfit: the largest over seeds. why: the reason if there
    is no B_crit."""

    n_params: float
    loss: float
    log_steps: dict[float, dict[int, float]]
    rates: dict[float, dict[int, float]]
    tried: dict[float, list[float]]
    log_s_min: dict[int, float] = field(default_factory=dict)
    log_b_crit: dict[int, float] = field(default_factory=dict)
    misfit: float = math.nan
    why: str = ""

    def record(self) -> Record:
        """The place as a flat row: steps and tokens, with a 95 % interval over seeds of B_crit if there are several."""
        found: Record = {"n_params": self.n_params, "loss": self.loss}
        known = not self.why
        ends = interval(list(self.log_b_crit.values())) if known else None
        several = ends is not None and ends.n > 1
        s_min = math.exp(np.mean(list(self.log_s_min.values()))) if known else None
        b_crit = math.exp(ends.mean) if ends else None
        found |= {"critical_batch": b_crit, "low": math.exp(ends.low) if ends and several else None,
                  "high": math.exp(ends.high) if ends and several else None, "s_min": s_min,
                  "e_min": s_min * b_crit if s_min and b_crit else None,
                  "misfit": self.misfit if known else None, "n_seeds": len(self.log_b_crit)}  # fmt: skip
        for batch, steps in self.log_steps.items():
            found[f"steps/{batch:g}"] = math.exp(np.mean(list(steps.values()))) if steps else None
        for batch, rates in self.rates.items():
            found[f"best_lr/{batch:g}"] = math.exp(np.mean(np.log(list(rates.values())))) if rates else None
        return found | {"note": self.why or self._outside(b_crit)}

    def _outside(self, b_crit: float | None) -> str:
        batches = sorted(self.log_steps)
        if b_crit is not None and not batches[0] <= b_crit <= batches[-1]:
            return f"outside of the batches {batches[0]:g} to {batches[-1]:g}"
        return ""

    @property
    def at_end(self) -> int:
        """At how many batches the best rate of a seed is the lowest or the highest that was tried."""
        return sum(any(rate in (min(self.tried[batch]), max(self.tried[batch])) for rate in rates.values())
                   for batch, rates in self.rates.items())  # fmt: skip


def place_of(runs: Sequence[Run], loss: float) -> Place:
    """S_min and B_crit at a loss from the runs of one size. They are withheld, with the reason, if there are fewer than
    three batches, if a batch of a seed does not reach the loss, and if no B_crit fits."""
    batches = sorted({run.batch for run in runs})
    seeds = sorted({run.seed for run in runs})
    steps: dict[float, dict[int, float]] = {batch: {} for batch in batches}
    rates: dict[float, dict[int, float]] = {batch: {} for batch in batches}
    tried = {batch: sorted({run.lr for run in runs if run.batch == batch}) for batch in batches}
    without: dict[float, str] = {}
    for batch in batches:
        for seed in seeds:
            own = [run for run in runs if run.batch == batch and run.seed == seed]
            reached = [(run.log_steps(loss), run.lr) for run in own if not math.isnan(run.log_steps(loss))]
            if not own:
                without[batch] = f"seed {seed} was not run with a batch of {batch:g}"
            elif (first := min(run.loss_K[0] for run in own)) < loss:  # the fewest steps are fewer than its first step
                without[batch] = f"with a batch of {batch:g} the first point is lower already ({first:.4g})"
            elif not reached:
                least = min(run.loss_K[-1] for run in own)
                without[batch] = f"with a batch of {batch:g} it is not reached (lowest {least:.4g})"
            else:
                steps[batch][seed], rates[batch][seed] = min(reached)
    place = Place(runs[0].n_params, loss, steps, rates, tried)
    if len(batches) < FEWEST_BATCHES:
        return _withheld(place, f"{len(batches)} batches, and {FEWEST_BATCHES} are needed")
    if without:
        return _withheld(place, "; ".join(without.values()))
    found = {seed: hyperbola(np.array(batches), np.array([steps[b][seed] for b in batches])) for seed in seeds}
    if any(math.isnan(log_b) for _, log_b, _ in found.values()):
        return _withheld(place, "the steps do not fall with the batch as S_min (1 + B_crit/B)")
    log_s, log_b = ({seed: one[part] for seed, one in found.items()} for part in (0, 1))
    return Place(runs[0].n_params, loss, steps, rates, tried, log_s, log_b, max(one[2] for one in found.values()))


def _withheld(place: Place, why: str) -> Place:
    return Place(place.n_params, place.loss, place.log_steps, place.rates, place.tried, why=why)


def levels_of(runs: Sequence[Run]) -> list[float]:
    """Round losses, at most about MOST_LEVELS, from the highest to the lowest one that every batch of a size reaches.

    Raises UserError if there is none.
    """
    lows, highs = [], []
    for n_params in {run.n_params for run in runs}:
        own = [run for run in runs if run.n_params == n_params]
        groups = [[run for run in own if (run.batch, run.seed) == at] for at in {(run.batch, run.seed) for run in own}]
        lows.append(max(min(run.loss_K[-1] for run in group) for group in groups))
        highs.append(min(run.loss_K[0] for run in own))
    pairs = [(low, high) for low, high in zip(lows, highs, strict=True) if low <= high]
    if not pairs:
        raise UserError("no loss is reached by all batches of a size: train the small batches longer")
    low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
    step = next((one for one in STEPS_OF_LEVELS if (high - low) / one < MOST_LEVELS), STEPS_OF_LEVELS[-1])
    found = [round(place * step, 10) for place in range(math.floor(high / step), math.ceil(low / step) - 1, -1)]
    return found or [round(low, 3)]


@dataclass(frozen=True)
class CriticalBatches:
    """The critical batches of sizes and losses. notes: what was left out, and what the numbers do not show."""

    places: list[Place]
    notes: list[str]

    def records(self) -> list[Record]:
        """One flat row for each size and loss; all have the same columns."""
        found = [place.record() for place in self.places]
        keys = sorted({key for one in found for key in one if "/" in key}, key=lambda key: float(key.split("/")[1]))
        keys = [key for kind in ("steps/", "best_lr/") for key in keys if key.startswith(kind)]
        first = [key for key in found[0] if "/" not in key and key != "note"]
        return [{key: one.get(key) for key in (*first, *keys, "note")} for one in found]

    def power_law(self) -> Record | None:
        """B_star in tokens and 1/alpha_B of B_crit = B_star / L^(1/alpha_B), by least squares of the logarithms over
        all sizes and losses, one line for each seed, with 95 % intervals over seeds (None with one seed). None with
        fewer than two losses."""
        known = [place for place in self.places if not place.why]
        if len({place.loss for place in known}) < 2:
            return None
        lines = []
        for seed in set.intersection(*(set(place.log_b_crit) for place in known)):
            logs = [math.log(place.loss) for place in known], [place.log_b_crit[seed] for place in known]
            lines.append(np.polyfit(*logs, 1))
        if not lines:
            return None
        found: Record = {}
        for name, values in (("B_star", [line[1] for line in lines]), ("1/alpha_B", [-line[0] for line in lines])):
            ends, of = interval(values), math.exp if name == "B_star" else float
            several = ends.n > 1
            found[name] = {"value": of(ends.mean), "low": of(ends.low) if several else None,
                           "high": of(ends.high) if several else None}  # fmt: skip
        return found

    def ratio_of_sizes(self) -> dict[int, float]:
        """ln of B_crit of the largest size over that of the smallest at equal loss, by seed: the slope of ln B_crit in
        ln N with a mean of its own for each loss, over the range of N. Empty if no loss has two sizes."""
        known = [place for place in self.places if not place.why]
        alike = [[place for place in known if place.loss == loss] for loss in sorted({place.loss for place in known})]
        alike = [group for group in alike if len(group) > 1]
        if not alike:
            return {}
        seeds = set.intersection(*(set(place.log_b_crit) for group in alike for place in group))
        sizes_G = [np.log([place.n_params for place in group]) for group in alike]
        away = np.concatenate([sizes - sizes.mean() for sizes in sizes_G])
        reach, found = float(np.ptp(np.concatenate(sizes_G))), {}
        for seed in sorted(seeds):
            logs_G = [np.array([place.log_b_crit[seed] for place in group]) for group in alike]
            apart = np.concatenate([logs - logs.mean() for logs in logs_G])
            found[seed] = reach * float(away @ apart) / float(away @ away)
        return found


def critical_batches(
    given: Given,
    *,
    levels: Sequence[float] | None = None,
    where: Sequence[str] = (),
    mapping: Sequence[str] = (),
    size: str = "n_params",
    first_step: int | None = None,
) -> CriticalBatches:
    """The critical batch of each size at each loss, from the curves of the runs that match all of `where`.

    levels: losses in nats per token; None: round ones, see levels_of. mapping, size: as in points.curves_of.
    first_step: as in points.points_of. Raises ConfigError for a wrong level, and else as curves_of, runs_of and
    levels_of do.
    """
    curves, left_out = curves_of(study_of(given, where), mapping=mapping, size=size)
    runs, said = runs_of(curves, first_step)
    if levels is not None and (bad := [one for one in levels if not 0 < one < math.inf]):
        raise ConfigError(f"--levels must be losses greater than zero; got {text(bad[0])}")
    asked = sorted(set(levels), reverse=True) if levels else levels_of(runs)
    places = []
    for n_params in sorted({run.n_params for run in runs}):
        own = [run for run in runs if run.n_params == n_params]
        places += [place_of(own, loss) for loss in asked]
    return CriticalBatches(places, [*left_out, *said, *_notes(places)])


def _notes(places: Sequence[Place]) -> list[str]:
    known = [place for place in places if not place.why]
    if not known:
        return ["every critical batch is withheld: see the column note"]
    said = []
    if max(len(place.log_b_crit) for place in known) < 2:
        said.append("one seed, so there is no interval")
    if all(len(tried) == 1 for place in known for tried in place.tried.values()):
        said.append("one rate at each batch: a better rate of some batch changes its critical batch")
    elif at_end := sum(place.at_end for place in known):
        cells = sum(len(place.tried) for place in known)
        said.append(
            f"the best rate is the lowest or the highest that was tried at {at_end} of {cells} batches and losses: a "
            "better one may lie beyond, which no interval contains"
        )
    return said
