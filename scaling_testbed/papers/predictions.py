"""Predictions of laws for a study's runs, one data set at a time, fitted as in Gadre et al. 2024 (Table 1).

The law of the loss is fitted to the four smallest sizes at 20 tokens per parameter and to the smallest size at 320. The
law of the error is fitted to these and to the fifth size at 20. Both fits use least squares. Sizes are counted by rank,
so that the recipe also applies to smaller testbeds, and a published mean over tasks is the mean over a study's own
tasks where its rows have only these. A relative error is |predicted - measured| / measured (section 3.4).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scaling_testbed.analysis.curves.grouping import NO_CONDITION_IN
from scaling_testbed.analysis.figures.panel import compact
from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.fitting import LSQ, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import Row, Study, name_of
from scaling_testbed.errors import UserError, listed
from scaling_testbed.papers.described import Described, by_its_call

if TYPE_CHECKING:
    from scaling_testbed.papers.measures import Evidence

FITTED_SIZES, OPTIMAL_M, LARGE_M = 4, 20, 320
PUBLISHED_MEANS = ("error_17", "error_46")  # over the tasks of the published testbed
OF_TASK = "error/"  # and the name of a task: a column
OVER_TRAINED, LARGEST_SIZE = "the dearest over-trained run", "the largest size"  # predictions


@dataclass(frozen=True)
class Number:
    """A result of a law for one data set. reach: compute of the predicted run divided by that of the fitted runs."""

    number: float
    words: str
    reach: float = math.inf


Numbers = Callable[["Evidence"], list[Number]]  # the results of laws, one for each data set


@dataclass(frozen=True)
class Point:
    """The runs of one size and multiplier. m: their tokens per parameter, rounded."""

    n_params: float
    m: int
    rows: list[Row]

    @property
    def flops(self) -> float:
        n_tokens: float = self.rows[0]["n_tokens"]
        return 6 * self.n_params * n_tokens

    def mean(self, column: str) -> float:
        """The mean of a column over the seeds. Raises UserError if a row has no such number."""
        return float(np.mean(columns.check(self.rows, column, (column,))))

    def __str__(self) -> str:
        return f"N={compact(self.n_params)} M={self.m}"


class DataSet:
    """The finished runs on one data set, and the laws fitted to them."""

    def __init__(self, name: str, rows: Sequence[Row]):
        self.name, self._rows = name, rows
        places: dict[tuple[float, int], list[Row]] = {}
        for row in rows:
            n, d = (columns.check([row], key, ("n_params", "n_tokens"))[0] for key in ("n_params", "n_tokens"))
            places.setdefault((n, round(d / n)), []).append(row)
        self.points = [Point(n, m, _alike(found)) for (n, m), found in sorted(places.items())]
        self.sizes = sorted({point.n_params for point in self.points})

    def point(self, rank: int, m: int) -> Point:
        """The point of the size with this rank. Raises UserError if it was not run."""
        n = self.sizes[rank] if rank < len(self.sizes) else None
        for point in self.points:
            if point.n_params == n and point.m == m:
                return point
        raise UserError(f"{self.name} has no run of its size number {rank + 1} at {m} tokens per parameter")

    def column(self, published: str) -> tuple[str, str]:
        """The column that a claim about a published one is asked of, and a note: the same column, or `error` in place
        of a mean over tasks that no row has."""
        if published not in PUBLISHED_MEANS or self._has(published) or not self._has("error"):
            return published, ""
        return "error", f"; error is the mean over the study's own tasks {listed(self.tasks)}".rstrip()

    @functools.cached_property
    def tasks(self) -> list[str]:
        """The tasks whose errors the rows have."""
        names = dict.fromkeys(key for row in self._rows for key in row if key.startswith(OF_TASK))
        return [name.removeprefix(OF_TASK) for name in names if self._has(name)]

    def _has(self, column: str) -> bool:
        return any(row.get(column) is not None for row in self._rows)

    @functools.cached_property
    def cheap(self) -> list[Point]:
        """The points that the law of the loss is fitted to."""
        return [*(self.point(rank, OPTIMAL_M) for rank in range(FITTED_SIZES)), self.point(0, LARGE_M)]

    @functools.cached_property
    def held_out(self) -> list[Point]:
        return [point for point in self.points if point not in self.cheap]

    @property
    def calibrated(self) -> list[Point]:
        """The points that the law of the error is fitted to."""
        return [*self.cheap, self.point(FITTED_SIZES, OPTIMAL_M)]

    def target(self, which: str) -> Point:
        """The point to predict, of a size that the law of the loss is not fitted to."""
        larger = [point for point in self.held_out if point.n_params > self.sizes[FITTED_SIZES - 1]]
        fits = [point for point in larger if (point.m > OPTIMAL_M if which == OVER_TRAINED else point.m == OPTIMAL_M)]
        if not fits:
            raise UserError(f"{self.name} has no run of {which}, beyond its {FITTED_SIZES} smallest sizes")
        return max(fits, key=lambda point: point.flops)

    @functools.cache  # noqa: B019 (as long as the data set lives)
    def loss_law(self, column: str = "loss") -> Fit:
        return self.fitted("over_training", self.cheap, loss=column)

    @functools.cache  # noqa: B019
    def error_law(self, column: str, calibrated: bool = True) -> Fit:
        return self.fitted("loss_to_error", self.calibrated if calibrated else self.cheap, error=column)

    def fitted(self, law: str, points: Sequence[Point], **renamed: str) -> Fit:
        """A law fitted from fixed starts and without intervals, so that verdicts are reproducible and fast."""
        rows = [row for point in points for row in point.rows]
        for theirs in renamed.values():
            if all(row.get(theirs) is None for row in rows):
                raise UserError(f"no run on {self.name} has {theirs}")
        rows = [row | {ours: row.get(theirs) for ours, theirs in renamed.items()} for row in rows]
        inputs, observed = columns.values(rows, LAWS[law])
        return fit(LAWS[law], inputs, observed, objective=LSQ, starts=8, bootstrap=0)

    def prediction(self, point: Point, column: str, calibrated: bool = True) -> Number:
        """The relative error of the prediction for a point: of a loss, or of a downstream error by way of the loss."""
        is_loss = column.startswith("loss")
        column, note = self.column(column)
        law = self.loss_law(column if is_loss else "loss")
        value = float(law.predict(point.rows[0]))
        if not is_loss:
            value = float(self.error_law(column, calibrated).predict({"loss": value}))
        fitted = self.cheap if is_loss or not calibrated else self.calibrated
        reach = point.flops / sum(row["flops"] for one in fitted for row in one.rows)
        actual = point.mean(column)
        error = abs(value / actual - 1)
        words = f"{self.name} {point}, of {reach:.3g} times the compute: predicted {value:.4f}, measured {actual:.4f}"
        bounds = "".join(f"; {said}" for said in law.warnings if "bound" in said)
        return Number(error, f"{words} ({error:.2%}{bounds}{note})", reach)

    @property
    def irreducible(self) -> float:
        """E of the law of the loss. Raises UserError if it is at a bound."""
        for said in self.loss_law().warnings:
            if said.startswith("E is at its"):
                raise UserError(f"{self.name}: {said}, so that its reducible loss is not known")
        return self.loss_law().params["E"]


def _alike(rows: list[Row]) -> list[Row]:
    """The rows. Raises UserError if runs of one size and multiplier differ in a setting; a mean would hide this."""
    settings = [key for key in rows[0] if "." in key and not key.startswith(NO_CONDITION_IN)]
    for key in settings:
        if len({text(row.get(key)) for row in rows}) > 1:
            names = " and ".join(map(name_of, rows[:2]))
            raise UserError(f"{names} are of one size and number of tokens and differ in {key}; choose with --where")
    return rows


def data_sets(study: Study) -> list[DataSet]:
    """The data sets of the runs that finished. Raises UserError if a run lacks a column that a law needs."""
    groups: dict[str, list[Row]] = {}
    for row in study.rows:
        if row.get("status") != "diverged":
            groups.setdefault(str(row.get("dataset") or row.get("data.name")), []).append(columns.derived(row))
    return [DataSet(name, rows) for name, rows in groups.items()]


def _of_each(number: Callable[[DataSet], Number]) -> Numbers:
    """The measure that gives the number of each data set."""
    return lambda evidence: [number(one) for one in evidence.data_sets]


@by_its_call
def error_at(which: str, column: str = "loss", data: str | None = None, calibrated: bool = True) -> Numbers:
    """The relative error of the prediction of a target, for each data set, or for `data` if there are several."""

    def measure(evidence: "Evidence") -> list[Number]:
        found = [one for one in evidence.data_sets if data in (None, one.name)]
        if not found and len(evidence.data_sets) > 1:
            raise UserError(f"several data sets, and none of them {data}")
        return [one.prediction(one.target(which), column, calibrated) for one in found or evidence.data_sets]

    return measure


@by_its_call
def mean_error(column: str = "loss", least_m: float = 0, most_m: float = math.inf, data: str | None = None) -> Numbers:
    """The mean relative error over the held-out points between two multipliers, for `data` or for each data set."""
    ms = f"M={least_m:g}" if least_m == most_m else f"M>={least_m:g}"

    def number(one: DataSet) -> Number:
        points = [point for point in one.held_out if least_m <= point.m <= most_m]
        if not points:
            raise UserError(f"{one.name} has no run of {ms} that is not fitted")
        errors = [one.prediction(point, column).number for point in points]
        off = f"{column} {np.mean(errors):.2%} off over {len(errors)} runs of {ms}, at most {max(errors):.2%}"
        return Number(float(np.mean(errors)), f"{one.name}: {off}")

    def measure(evidence: "Evidence") -> list[Number]:
        found = [one for one in evidence.data_sets if data in (None, one.name)]
        if not found:
            raise UserError(f"no run is of the data set {data}")
        return [number(one) for one in found]

    return measure


def _eta(one: DataSet) -> Number:
    value = one.loss_law().params["eta"]
    return Number(value, f"{one.name} {value:.4f}")


def _exponent_spread(one: DataSet) -> Number:
    slopes = {}
    for m in sorted({point.m for point in one.points if point.m >= OPTIMAL_M}):
        points = [point for point in one.points if point.m == m and point.n_params <= one.sizes[FITTED_SIZES - 1]]
        if len(points) >= 3:
            reducible = [point.mean("loss") - one.irreducible for point in points]
            slopes[m] = -float(np.polyfit(np.log([point.flops for point in points]), np.log(reducible), 1)[0])
    if len(slopes) < 2:
        raise UserError(f"{one.name} has fewer than two multipliers with three sizes each")
    shown = ", ".join(f"{slope:.3f} at M={m}" for m, slope in slopes.items())
    least, most = min(slopes.values()), max(slopes.values())
    return Number(most / least if least > 0 else math.inf, f"{one.name}: {shown}")


@by_its_call
def unexplained(column: str) -> Numbers:
    """The share of a downstream error's variance that a law fitted to all runs does not explain."""

    def number(one: DataSet) -> Number:
        own, note = one.column(column)
        law = one.fitted("loss_to_error", one.points, error=own)
        actual = np.array([row[own] for point in one.points for row in point.rows])
        left = float(np.sum(np.square(law.residuals)) / np.sum((actual - actual.mean()) ** 2))
        return Number(left, f"{one.name}: R2 {1 - left:.3f} over {len(actual)} runs{note}")

    return _of_each(number)


@by_its_call
def single_task_error(which: str, tasks: Sequence[str]) -> Numbers:
    """The median over single tasks of the relative error of their predictions: of `tasks`, or of the study's own where
    no row has these."""

    def number(one: DataSet) -> Number:
        asked = tasks if set(tasks) & set(one.tasks) or len(one.tasks) < 2 else one.tasks  # of one task, it is the mean
        errors = [one.prediction(one.target(which), f"{OF_TASK}{task}").number for task in asked]
        median = float(np.median(errors))
        words = ", ".join(f"{task} {error:.2%}" for task, error in zip(asked, errors, strict=True))
        return Number(median, words if asked is tasks else f"the study's own tasks {words}")

    return _of_each(number)


@by_its_call
def share_not_lower(column: str, data: str) -> Numbers:
    """The share of common sizes and multipliers at which `data` does not have a lower value than another data set."""

    def measure(evidence: "Evidence") -> list[Number]:
        own = next((one for one in evidence.data_sets if one.name == data), None)
        others = [one for one in evidence.data_sets if one is not own]
        if own is None or not others:
            raise UserError(f"{data} and another data set are to be compared")
        asked, note = own.column(column)
        found = []
        for other in others:
            theirs = {(point.n_params, point.m): point.mean(asked) for point in other.points}
            both = [
                (point.mean(asked), theirs[at]) for point in own.points if (at := (point.n_params, point.m)) in theirs
            ]
            lower = sum(mine < yours for mine, yours in both)
            words = f"{asked} of {data} below that of {other.name} at {lower} of {len(both)} places{note}"
            found.append(Number(1 - lower / max(len(both), 1), words))
        return found

    return measure


# EXPONENT_SPREAD: over all M >= 20, the largest exponent divided by the smallest.
ETA = Described("eta", _of_each(_eta))
EXPONENT_SPREAD = Described("exponent_spread", _of_each(_exponent_spread))
