"""The best runs for their compute.

The best size of each budget follows two approaches of Hoffmann et al. 2022 (arXiv 2203.15556, sections 3.1 and 3.2).
The ladder of configurations from a grid search follows Gadre et al. 2024 (arXiv 2403.08540, section 3).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError, UserError

SAME_BUDGET = 1.1  # neighbours whose FLOPs differ by less belong to one budget
WHOLE_BUDGET = 1.4  # a chain of neighbours that spans a larger factor is not one budget: its compute varies
WINDOW = 4.0  # a parabola is fitted to sizes within this factor of its vertex, or to the five nearest
APART = 0.15  # a vertex and an interpolated minimum that differ by more are said to
ENVELOPE_POINTS = 100  # number of budgets at which the envelope is evaluated


@dataclass(frozen=True)
class Optimum:
    """The best size for a budget, and its number of tokens.

    n_params: the vertex of the parabola, or the size on the envelope. check: the minimum of an interpolating curve
    through the same points, which does not assume a parabola. curvature: that of the parabola,
    loss = minimum + curvature (ln N - ln n_params)^2. fitted: the ends of the sizes that it is fitted to. note: the
    reason not to trust this optimum, or empty.
    """

    flops: float
    n_params: float
    n_tokens: float
    loss: float
    n_sizes: int
    check: float | None = None
    curvature: float | None = None
    fitted: tuple[float, float] | None = None
    note: str = ""

    def record(self) -> dict[str, object]:
        """The optimum as one flat row."""
        ratio = {"n_tokens": self.n_tokens, "tokens_per_param": self.n_tokens / self.n_params}
        named = {"flops": self.flops, "n_params": self.n_params, **ratio, "loss": self.loss, "n_sizes": self.n_sizes}
        low, high = self.fitted or (None, None)
        parabola = {"curvature": self.curvature, "fitted_from": low, "fitted_to": high}
        return {**named, "interpolated_n_params": self.check, **parabola, "note": self.note}


def isoflop(rows: Sequence[Row]) -> list[Optimum]:
    """Approach 2: fit a parabola in ln N to the losses of each budget; its vertex is the best size.

    A loss is no parabola over a wide range of sizes: with the constants of Hoffmann et al., nine sizes from a
    thirty-second to 32 times the best one put the vertex 8 % too high, and 3 % within a factor WINDOW. Raises UserError
    if no budget has three sizes.
    """
    found = [_parabola(budget) for budget in by_budget(rows) if len({row["n_params"] for row in budget}) >= 3]
    if not found:
        near = f"in one budget, neighbours differ by at most 10 % in FLOPs and all runs by a factor {WHOLE_BUDGET:g}"
        raise UserError(f"isoflop needs a budget with three sizes; {near}")
    return found


def by_budget(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each budget, in the order of FLOPs."""
    starts = budget_starts([row["flops"] for row in rows])
    budgets: dict[float, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["flops"]):
        budgets[starts[row["flops"]]].append(row)
    return list(budgets.values())


def budget_starts(values: Sequence[float]) -> dict[float, float]:
    """A mapping from each value to the smallest value of its budget.

    A budget is a chain of values: neighbours differ by at most a tenth, and all of them by at most a factor
    WHOLE_BUDGET. In a wider chain each value is its own budget.
    """
    chains = _chains(values)
    return {value: chain[0] if chain[-1] <= WHOLE_BUDGET * chain[0] else value for chain in chains for value in chain}


def loose(values: Sequence[float], key: str) -> list[str]:
    """A warning about values that lie close together and yet form no budget."""
    wide = [chain for chain in _chains(values) if chain[-1] > WHOLE_BUDGET * chain[0]]
    spans = "; ".join(f"{len(chain)} from {chain[0]:.3g} to {chain[-1]:.3g}" for chain in wide)
    return [f"{key} varies without a gap ({spans}): there are no budgets, each value is its own"] if wide else []


def _chains(values: Sequence[float]) -> list[list[float]]:
    """The sorted values, split where a value is more than a tenth above the previous one."""
    chains: list[list[float]] = []
    for value in sorted(values):
        if chains and value <= SAME_BUDGET * chains[-1][-1]:
            chains[-1].append(value)
        else:
            chains.append([value])
    return chains


def middle(budget: Sequence[Row]) -> float:
    """The geometric mean of the FLOPs of a budget's rows, which names the budget."""
    return math.exp(sum(math.log(row["flops"]) for row in budget) / len(budget))


def _parabola(budget: Sequence[Row]) -> Optimum:
    x, y = _mean_by_size(budget)
    flops = middle(budget)
    tokens = np.polyfit(*_logs(budget), 1)  # a line; its slope is -1 if C is 6ND
    place = int(np.argmin(y))
    if (valley := _valley(x, y)) is None:
        best = math.exp(x[place]), math.exp(np.polyval(tokens, x[place]))
        return Optimum(flops, *best, float(y[place]), len(x), note="no valley: this is the best size that was trained")
    vertex, loss, curve, near = valley
    note = "" if x[0] <= vertex <= x[-1] else "the vertex lies outside the sizes"
    best = math.exp(vertex), math.exp(np.polyval(tokens, vertex))
    ends = math.exp(near[0]), math.exp(near[-1])
    return Optimum(flops, *best, loss, len(x), _interpolated(x, y), curve, ends, note)


def _valley(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, np.ndarray] | None:
    """Vertex, minimum and curvature of a parabola through the points near its vertex, and the x of these points.

    The window follows the vertex, which it must not leave far behind: ten moves at most. None if there is no minimum.
    """
    vertex, found = float(x[np.argmin(y)]), None
    for _ in range(10):
        count = max(min(5, len(x)), int(np.sum(np.abs(x - vertex) <= math.log(WINDOW))))
        near = np.sort(np.argsort(np.abs(x - vertex), kind="stable")[:count])
        middle = x[near].mean()
        curve, slope, level = np.polyfit(x[near] - middle, y[near], 2)
        if curve <= 0:
            return found
        before, vertex = vertex, float(middle - slope / (2 * curve))
        found = vertex, float(level - slope**2 / (4 * curve)), float(curve), x[near]
        if abs(vertex - before) < 1e-9:
            break
        vertex = min(max(vertex, float(x[0])), float(x[-1])) if abs(vertex - before) > math.log(WINDOW) else vertex
    return found


def disagreeing(optima: Sequence[Optimum]) -> list[str]:
    """A warning about vertices that differ from the minimum of an interpolating curve by more than APART."""
    wide = [one for one in optima if one.check and not one.note and abs(one.n_params / one.check - 1) > APART]
    if not wide:
        return []
    most = max(wide, key=lambda one: abs(math.log(one.n_params / (one.check or one.n_params))))
    return [
        f"at {len(wide)} budgets the vertex of the parabola differs by more than {APART:.0%} from the minimum of a "
        f"curve through all points, most at {most.flops:.3g} FLOPs: {most.n_params:.4g} and {most.check:.4g}"
    ]


def resampled(rows: Sequence[Row], count: int, seed: int = 0) -> list[list[tuple[float, float]]]:
    """For `count` bootstrap resamples of the runs of each budget, the FLOPs and the vertex of each budget that has one
    among its sizes."""
    rng, budgets = np.random.default_rng(seed), by_budget(rows)
    known = [(middle(budget), *_logs(budget)[:1], np.array([row["loss"] for row in budget])) for budget in budgets]
    return [[place for budget in known if (place := _redrawn(*budget, rng))] for _ in range(count)]


def _redrawn(flops: float, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
    drawn = rng.integers(len(x), size=len(x))
    sizes, place = np.unique(x[drawn], return_inverse=True)
    if len(sizes) < 3:
        return None
    valley = _valley(sizes, np.bincount(place, y[drawn]) / np.bincount(place))
    return (flops, math.exp(valley[0])) if valley and sizes[0] <= valley[0] <= sizes[-1] else None


def _logs(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """ln N and ln D."""
    return np.log([float(row["n_params"]) for row in rows]), np.log([_tokens(row) for row in rows])


def _tokens(row: Row) -> float:
    return float(row.get("n_tokens") or row["flops"] / (6 * row["n_params"]))


def _mean_by_size(budget: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """ln N, and the mean loss over the runs of each size."""
    losses = defaultdict(list)
    for row in budget:
        losses[row["n_params"]].append(row["loss"])
    sizes = sorted(losses)
    return np.log(np.array(sizes, float)), np.array([float(np.mean(losses[n])) for n in sizes])


def _interpolated(x: np.ndarray, y: np.ndarray) -> float | None:
    """The size at the minimum of a smooth curve through every point.

    None if the minimum is at an end, or if there are only three points: the curve is then the parabola itself.
    """
    if len(x) < 4:
        return None
    from scipy.interpolate import Akima1DInterpolator, CubicSpline

    grid = np.linspace(x[0], x[-1], 2001)
    values = (Akima1DInterpolator if len(x) >= 5 else CubicSpline)(x, y)(grid)
    place = int(np.argmin(values))
    return None if place in (0, len(grid) - 1) else math.exp(grid[place])


@dataclass(frozen=True)
class Lines:
    """Curves of loss against compute at the budgets of an envelope.

    budgets [n_budgets], sizes [n_curves]; losses and tokens [n_curves, n_budgets], nan where a curve does not reach.
    """

    budgets: np.ndarray
    sizes: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray


def envelope(rows: Sequence[Row], run: str | None = None) -> list[Optimum]:
    """Approach 1: at each of 100 budgets, the size with the lowest curve of loss against compute.

    Curves are interpolated in logarithms. run: the column that names the run of a row, if the rows are points of
    training curves: each run is a curve, and the lowest one counts, as in the paper. None: the rows of a size are its
    curve, from runs of several lengths. Raises UserError if fewer than two sizes have a curve.
    """
    return _optima(_lines(rows, run))


def resampled_envelope(rows: Sequence[Row], run: str, count: int, seed: int = 0) -> list[list[tuple[float, float]]]:
    """For `count` bootstrap resamples of whole runs, the FLOPs and the best size of each budget that has one among its
    sizes. run: as for `envelope`."""
    rng, lines, found = np.random.default_rng(seed), _lines(rows, run), []
    for _ in range(count):
        drawn = np.unique(rng.integers(len(lines.sizes), size=len(lines.sizes)))  # a copy changes no minimum
        one = Lines(lines.budgets, lines.sizes[drawn], lines.losses[drawn], lines.tokens[drawn])
        try:
            found.append([(optimum.flops, optimum.n_params) for optimum in _optima(one) if not optimum.note])
        except UserError:  # one size is the best at every budget
            found.append([])
    return found


def _lines(rows: Sequence[Row], run: str | None) -> Lines:
    curves: dict[Any, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        curves[(row["n_params"], row[run] if run else None)][row["flops"]].append(row)
    known = {key: [_point(points[c]) for c in sorted(points)] for key, points in curves.items() if len(points) > 1}
    if len({n for n, _ in known}) < 2:
        what = "a run with at least two points" if run else "runs of at least two lengths"
        raise UserError(f"envelope needs two sizes with {what} each")
    low, high = min(points[0][0] for points in known.values()), max(points[-1][0] for points in known.values())
    budgets = np.geomspace(low, high, ENVELOPE_POINTS)
    losses, tokens = np.full((2, len(known), len(budgets)), math.nan)
    for place, points in enumerate(known.values()):
        compute, y, seen = np.array(points).T
        reached = (compute[0] <= budgets * (1 + 1e-9)) & (budgets <= compute[-1] * (1 + 1e-9))
        for values, into in ((y, losses), (seen, tokens)):
            into[place, reached] = np.exp(np.interp(np.log(budgets[reached]), np.log(compute), np.log(values)))
    return Lines(budgets, np.array([n for n, _ in known]), losses, tokens)


def _point(rows: Sequence[Row]) -> tuple[float, float, float]:
    """FLOPs, mean loss and tokens of the runs of one length."""
    return rows[0]["flops"], float(np.mean([row["loss"] for row in rows])), _tokens(rows[0])


def _optima(lines: Lines) -> list[Optimum]:
    return _inner([_lowest(lines, place) for place in range(len(lines.budgets))])


def _lowest(lines: Lines, place: int) -> Optimum | None:
    reached = np.flatnonzero(np.isfinite(lines.losses[:, place]))
    sizes = np.unique(lines.sizes[reached])
    if len(sizes) < 2:
        return None
    best = reached[np.argmin(lines.losses[reached, place])]
    n = float(lines.sizes[best])
    end = {float(sizes[-1]): "largest", float(sizes[0]): "smallest"}.get(n)
    note = f"the best size is the {end} that was trained so long: the true best may lie beyond it" if end else ""
    loss, tokens = float(lines.losses[best, place]), float(lines.tokens[best, place])
    return Optimum(float(lines.budgets[place]), n, tokens, loss, len(sizes), note=note)


def _inner(optima: Sequence[Optimum | None]) -> list[Optimum]:
    """The optima of budgets that several sizes have reached. A budget with one size gives no information."""
    found = [one for one in optima if one is not None]
    if len({one.n_params for one in found}) < 2:
        raise UserError("envelope: at every budget that several sizes have reached, the same size is the best")
    return found


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The Pareto frontier of the best runs of each size: no cheaper run has a lower loss. In the order of FLOPs."""
    best: dict[float, Row] = {}
    for row in rows:
        if row["n_params"] not in best or row["loss"] < best[row["n_params"]]["loss"]:
            best[row["n_params"]] = row
    front: list[Row] = []
    for row in sorted(best.values(), key=lambda row: (row["flops"], row["loss"])):
        if not front or row["loss"] < front[-1]["loss"]:
            front.append(row)
    return front


def rungs(front: Sequence[Row], predicted: Sequence[float], count: int) -> list[int]:
    """Indices of the configurations that follow a fit of the frontier most closely.

    Targets are evenly spaced in ln C from the first configuration of the frontier to the last. Each target takes one
    configuration that is not taken yet. Among those closer to it than to the next target, it takes the one whose loss
    has the smallest relative distance to the fit. If there is none, it takes the one nearest in ln C. Raises
    ConfigError if `count` exceeds the number of configurations.
    """
    if not 1 <= count <= len(front):
        raise ConfigError(f"--rungs must be between 1 and the {len(front)} configurations of the frontier; got {count}")
    compute = np.log([row["flops"] for row in front])
    away = [abs(row["loss"] / value - 1) for row, value in zip(front, predicted, strict=True)]
    targets, picked = np.linspace(compute[0], compute[-1], count), []
    reach = (compute[-1] - compute[0]) / max(2 * (count - 1), 1)
    for target in targets:
        free = [place for place in range(len(front)) if place not in picked]
        near = [place for place in free if abs(compute[place] - target) <= reach]
        picked.append(min(near, key=away.__getitem__) if near else min(free, key=lambda i: abs(compute[i] - target)))
    return sorted(picked)
