"""Decisions from small runs: how often the order of two values of a setting at a small size is that at a large one.

The decision accuracy is the share of pairs of values whose order at the target size is the one that smaller runs
predict (Magnusson et al. 2025, DataDecide, arXiv 2504.11393, section 2). The order at the target is that of the means
over seeds, with the learning rate tuned for each value, in all protocols: this is the decision that one wants to take.
Smaller runs predict it by their own means ("ranking"), or by a law of the loss that is fitted to each value and seed at
the sizes up to theirs, and extrapolated ("law"). Their learning rate is chosen by one of three protocols:

- tuned: for each value and size the best rate of the grid, less the bias of the minimum over noisy losses;
- one rate: the same for all values and sizes;
- small rate: the same small one for all, which keeps the order of tuned large models better than one of usual size
  (Wang et al. 2025, arXiv 2512.24503).

A pair counts if the seeds of the target tell it from a tie, by Tukey's honestly significant difference. The interval of
an accuracy is one for the accuracy of the same runs without noise: its lower end is the share of pairs whose right
order the seeds of the small runs tell from a tie as well, its upper end leaves out those whose wrong order they tell.
Nothing is resampled, because a bootstrap of three seeds covers far less than it says.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves.intervals import has_scipy, honest_difference, noise_of
from scaling_testbed.analysis.curves.rate_meaning import curve_meaning
from scaling_testbed.analysis.curves.setting_grid import SettingGrid, equal_rate, setting_grid
from scaling_testbed.analysis.rows.study import SIZE, Study
from scaling_testbed.errors import ConfigError, UserError

TUNED, ONE_RATE, SMALL_RATE = "tuned", "one rate", "small rate"
RANKING, LAW = "ranking", "law"
FEWEST_SIZES = 3  # of a law
LINE, FLOOR = "ln L = a - alpha ln N", "L = E + A/N^alpha"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How well one way to decide from small runs agrees with the target.

    n_params: of the largest runs it uses. compute_share: FLOPs of all runs it uses, as a share of those of all runs at
    the target; None if the rows do not tell. lr: the rate, None if it is tuned. form: of the law. accuracy: None if no
    pair counts. low, high: the interval, None with one seed. pairs: that count. unresolved: pairs that the seeds of the
    target do not tell from a tie; None with one seed, where all pairs count. ties: pairs that are equal to the last
    digit in the small runs or at the target; they do not count. noise_to_signal: the standard deviation over seeds,
    without what a seed adds to all values, divided by that of the means over values.
    """

    n_params: float
    compute_share: float | None
    protocol: str
    lr: float | None
    method: str
    form: str | None
    accuracy: float | None
    low: float | None
    high: float | None
    pairs: int
    unresolved: int | None
    ties: int
    noise_to_signal: float | None

    def record(self) -> dict[str, object]:
        """The decision as one flat row for tables, CSV and JSON."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """The decisions of a study about one setting. target: N of the target. remarks: what a reader must know."""

    setting: str
    values: list[str]
    seeds: list[int]
    target: float
    decisions: list[Decision]
    remarks: list[str]

    def records(self) -> list[dict[str, object]]:
        """The decisions as flat rows."""
        return [one.record() for one in self.decisions]


@dataclass(frozen=True)
class Ranking:
    """The losses [values, seeds] of one size, and which pairs of values their seeds tell apart.

    sign_VV: +1 where the value of the row has the higher mean. told_VV: whether a pair is told from a tie; None with
    one seed or without scipy.
    """

    values_VS: np.ndarray
    sign_VV: np.ndarray
    told_VV: np.ndarray | None

    @classmethod
    def of(cls, values_VS: np.ndarray) -> "Ranking":
        mean_V = values_VS.mean(axis=1)
        difference_VV = mean_V[:, None] - mean_V
        told = values_VS.shape[1] > 1 and has_scipy()
        told_VV = np.abs(difference_VV) > honest_difference(values_VS) if told else None
        return cls(values_VS, np.sign(difference_VV), told_VV)

    @property
    def noise_to_signal(self) -> float | None:
        """The spread over seeds divided by the spread over values; None with one seed, or where all values are one."""
        signal = float(self.values_VS.mean(axis=1).std(ddof=1))
        return noise_of(self.values_VS) / signal if self.values_VS.shape[1] > 1 and signal > 0 else None


def agreement(small: Ranking, target: Ranking) -> dict[str, float | int | None]:
    """Accuracy, low, high, pairs, unresolved and ties of the pairs of two rankings of the same values."""
    upper = np.triu_indices(len(small.sign_VV), 1)
    predicted, true = small.sign_VV[upper], target.sign_VV[upper]
    resolved = target.told_VV[upper] if target.told_VV is not None else np.ones(len(true), bool)
    tied = resolved & ((predicted == 0) | (true == 0))
    counts = resolved & ~tied
    pairs, right = int(counts.sum()), predicted == true
    found: dict[str, float | int | None] = {
        "accuracy": float(right[counts].mean()) if pairs else None,
        "low": None,
        "high": None,
        "pairs": pairs,
        "unresolved": None if target.told_VV is None else int((~resolved).sum()),
        "ties": int(tied.sum()),
    }
    if pairs and small.told_VV is not None:
        told = small.told_VV[upper]
        found["low"] = float((right & told)[counts].mean())
        found["high"] = 1 - float((~right & told)[counts].mean())
    return found


def extrapolated(n_params: Sequence[float], losses: Sequence[float], target: float) -> float:
    """The loss at the target by a law through the losses of at least three sizes.

    It is L = E + A/N^alpha, with E and A of at least zero, by least squares; with three sizes, a line in log-log, so
    that a degree of freedom is left. Raises UserError without scipy.
    """
    x, y = np.log(np.asarray(n_params, float)), np.asarray(losses, float)
    if len(x) < FEWEST_SIZES:
        raise ValueError(f"a law needs {FEWEST_SIZES} sizes, got {len(x)}")
    center = float(x.mean())
    if len(x) == FEWEST_SIZES:
        slope, level = np.polyfit(x - center, np.log(y), 1)
        return math.exp(level + slope * (math.log(target) - center))
    try:
        from scipy.optimize import minimize_scalar, nnls
    except ImportError:
        raise UserError("a law of the loss needs scipy: pip install -e '.[analysis]'") from None

    def terms(alpha: float, at: np.ndarray) -> np.ndarray:
        return np.stack([np.ones_like(at), np.exp(-alpha * (at - center))], axis=1)

    best = minimize_scalar(lambda alpha: nnls(terms(alpha, x), y)[1], bounds=(0.01, 3.0), method="bounded")
    weights, _ = nnls(terms(best.x, x), y)
    return float((terms(best.x, np.array([math.log(target)])) @ weights)[0])


def decide(
    study: Study,
    setting: Sequence[str],
    target_size: float | None = None,
    *,
    lr: float | None = None,
    small_lr: float | None = None,
    validation_set: str | None = None,
    size: str = SIZE,
) -> Decisions:
    """The decision accuracy of all smaller sizes of a study, by each protocol and method.

    setting: the keys whose values are compared. target_size: N of the target, by default the largest. lr: the only rate
    of the protocol "one rate", by default each in turn. small_lr: by default the lowest of the grid. validation_set: a
    set of evaluation.sets whose loss is compared, by default the run's own. Raises ConfigError and UserError, with one
    line, where there is nothing to decide, or where the losses of the values cannot be compared.
    """
    grid = setting_grid(study, setting, target_size, validation_set, size)
    rates, remarks = _rates(grid, lr, small_lr)
    target = Ranking.of(grid.losses(len(grid.sizes) - 1, None))
    decisions = []
    for last in range(len(grid.sizes) - 1):
        for protocol, rate in rates:
            decisions += _decisions(grid, last, protocol, rate, target)
    names = {LINE: "with three sizes", FLOOR: "with four sizes or more"}
    forms = dict.fromkeys(one.form for one in decisions if one.form)
    laws = [f"{form} {names[form]}" for form in forms]
    return Decisions(
        setting=", ".join(setting),
        values=grid.values,
        seeds=grid.seeds,
        target=grid.sizes[-1],
        decisions=decisions,
        remarks=[
            *_about_target(grid, target),
            *grid.remarks,
            *remarks,
            f"law: {'; '.join(laws)}" if laws else f"no law: it needs {FEWEST_SIZES} sizes below the target",
        ],
    )


def _laws(grid: SettingGrid, last: int, lr: float | None) -> np.ndarray:
    """The losses [values, seeds] that laws of the sizes up to `last` predict for the target."""
    losses_KVS = np.array([grid.losses(size, lr) for size in range(last + 1)])
    predicted_VS = np.empty(losses_KVS.shape[1:])
    for (v, s), _ in np.ndenumerate(predicted_VS):
        sizes = [found[v].n_params for found in grid.curves[: last + 1]]
        predicted_VS[v, s] = extrapolated(sizes, losses_KVS[:, v, s].tolist(), grid.curves[-1][v].n_params)
    return predicted_VS


def _decisions(grid: SettingGrid, last: int, protocol: str, lr: float | None, target: Ranking) -> list[Decision]:
    whole = grid.flops([len(grid.sizes) - 1], None)

    def one(method: str, form: str | None, used: Iterable[int], values_VS: np.ndarray) -> Decision:
        small, spent = Ranking.of(values_VS), grid.flops(used, lr)
        return Decision(
            n_params=grid.sizes[last],
            compute_share=spent / whole if spent is not None and whole else None,
            protocol=protocol,
            lr=lr,
            method=method,
            form=form,
            noise_to_signal=small.noise_to_signal,
            **agreement(small, target),  # type: ignore[arg-type]
        )

    found = [one(RANKING, None, [last], grid.losses(last, lr))]
    if last + 1 >= FEWEST_SIZES:
        form = LINE if last + 1 == FEWEST_SIZES else FLOOR
        found.append(one(LAW, form, range(last + 1), _laws(grid, last, lr)))
    return found


def _rates(
    grid: SettingGrid, lr: float | None, small_lr: float | None
) -> tuple[list[tuple[str, float | None]], list[str]]:
    """The protocols with their rates, and remarks. Raises ConfigError for a rate that cannot be one for all."""
    common = grid.common_rates()
    reason = _not_one_rate(grid, common)
    for option, typed in (("--lr", lr), ("--small-lr", small_lr)):
        if typed is not None and (reason or equal_rate(typed, common) is None):
            known = f"these are: {', '.join(f'{one:g}' for one in common)}"
            raise ConfigError(f"{option} {typed:g} is no rate of all values at all small sizes: {reason or known}")
    if reason:
        return [(TUNED, None)], [f"tuned only: {reason}"]
    small = common[0] if small_lr is None else small_lr
    others = [lr] if lr is not None else [one for one in common if equal_rate(small, [one]) is None]
    best = sorted({grid.best_lr(curve) for curve in grid.curves[0]})
    named = f"{best[0]:g}" if len(best) == 1 else f"between {best[0]:g} and {best[-1]:g}"
    how = ", the lowest that all values have" if small_lr is None else ""
    said = f"small rate: {small:g}{how}; the best rates of the smallest size are {named}"
    return [(TUNED, None), (SMALL_RATE, small), *((ONE_RATE, one) for one in others)], [said]


def _not_one_rate(grid: SettingGrid, common: Sequence[float]) -> str | None:
    """The reason why values cannot be compared at one rate, or None."""
    meanings: dict[str, list[str]] = {}
    for value, curve in zip(grid.values, grid.curves[0], strict=True):
        meanings.setdefault(curve_meaning(curve) or "differs between its rows", []).append(value)
    if len(meanings) > 1:
        said = "; ".join(f"{', '.join(values)}: {meaning}" for meaning, values in meanings.items())
        return f"the learning rate means different things ({said}); choose values of one meaning by --where"
    if not common:
        return "no rate was run for all values at all small sizes"
    if all(curve.lrs == common for found in grid.curves for curve in found) and len(common) == 1:
        return f"one rate was run, {common[0]:g}, so each is the tuned one"
    return None


def _about_target(grid: SettingGrid, target: Ranking) -> list[str]:
    """What is said of the target: the order, what its seeds resolve, and where rates end."""
    order = [grid.values[v] for v in np.argsort(target.values_VS.mean(axis=1), kind="stable")]
    pairs = len(order) * (len(order) - 1) // 2
    said = f"target N={grid.sizes[-1]:,.0f}, tuned, the best first: {', '.join(order)}"
    if target.told_VV is None:
        why = "one seed" if len(grid.seeds) == 1 else "without scipy"
        return [said, f"{why}: no intervals, and all {pairs} pairs count, also those that differ by noise alone"]
    resolved = int(np.triu(target.told_VV, 1).sum())
    ratio = target.noise_to_signal
    more = "" if ratio is None else f", noise to signal {ratio:.2g}"
    said = f"{said}; its {len(grid.seeds)} seeds resolve {resolved} of {pairs} pairs{more}"
    at_ends = [
        f"{value} at N={curve.n_params:,.0f} ({best:g})"
        for curves_V in grid.curves
        for value, curve in zip(grid.values, curves_V, strict=True)
        if len(curve.lrs) > 1 and (best := grid.best_lr(curve)) in (curve.lrs[0], curve.lrs[-1])
    ]
    rest = f" and {len(at_ends) - 3} more" if len(at_ends) > 3 else ""
    return [said, *([f"the best rate is at an end of the grid: {'; '.join(at_ends[:3])}{rest}"] if at_ends else [])]
