"""Predict an instability from smaller models (Wortsman et al. 2023, section 3.3, Figures 9 and 11).

The measured quantity is the largest attention score at one step, or the RMS of a gradient. At each learning rate its
logarithm is fitted by a quadratic in log N, where N is the number of non-embedding parameters, with the runs of all
seeds as points. The fit is extrapolated, with a prediction interval for one run, to sizes that were not trained. In the
paper, runs with attention scores above 1e4 diverged. If a gradient is below AdamW's eps, the updates of its weights are
smaller than they should be.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves.grouping import Curve, curves
from scaling_testbed.analysis.curves.intervals import p_larger_variance, t_factor
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.names import truth
from scaling_testbed.analysis.rows.study import SIZE, Row, Study, name_of, number
from scaling_testbed.errors import ConfigError, UserError

AT_STEP, LAST_MEAN = "diagnostics_at_step", "diagnostics_last_mean"
FIRST_MLP = "grad_rms/blocks.0.mlp.mlp_in.weight"
THRESHOLD, EPS = 1e4, 1e-8  # the threshold of attention scores, and AdamW's eps


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity to extrapolate, and the threshold beyond which it is unstable.

    name: its name in the records, e.g. attention_logit_max/0. field: the field of the row that holds it, at the named
    step or as the mean over the last steps. above: whether unstable means above the threshold, or below it.
    """

    name: str = "attention_logit_max/0"
    field: str = AT_STEP
    threshold: float = THRESHOLD
    above: bool = True

    def passes(self, value: float) -> bool:
        return value > self.threshold if self.above else value < self.threshold

    @property
    def label(self) -> str:
        return self.name if self.field == AT_STEP else f"{self.name}, mean of the last steps"


def chosen_quantity(
    known: Sequence[Quantity], name: str | None = None, threshold: float | None = None, eps: float | None = None
) -> Quantity:
    """The quantity to extrapolate.

    Without arguments it is the first of `known`, the quantities of the study. With `threshold`, values above it at the
    named step are unstable (default: THRESHOLD for the largest attention score). With `eps`, means over the last steps
    below it are unstable (default: a gradient of `known`, or that of the first MLP). Raises ConfigError if both are
    given.
    """
    if known and name is None and threshold is None and eps is None:
        return known[0]
    if eps is None:
        threshold = _positive("--threshold", THRESHOLD if threshold is None else threshold)
        return Quantity(name=name or Quantity.name, field=AT_STEP, threshold=threshold)
    if threshold is not None:
        raise ConfigError("give --threshold or --eps, not both: unstable is above --threshold, or below --eps")
    gradients = [one.name for one in known if not one.above]
    name = name or next(iter(gradients), FIRST_MLP)
    return Quantity(name=name, field=LAST_MEAN, threshold=_positive("--eps", eps), above=False)


def _positive(option: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{option} must be a number greater than zero; got {value}")
    return value


@dataclass(frozen=True)
class Fit:
    """ln(value) as a polynomial in ln N at one learning rate.

    The degree is 2, or 1 if there are only three sizes. coefficients: constant first. residual: standard error of the
    residuals. inverse_gram: (X'X)^-1 of the design in centred ln N. note: why the fit is not quadratic, or why the
    spread over seeds does not bound its error, or None.
    """

    coefficients: np.ndarray
    center: float
    residual: float
    degrees_of_freedom: int
    inverse_gram: np.ndarray
    note: str | None

    def predict(self, n_params: float) -> tuple[float, float, float]:
        """The value at N and the bounds of its 95 % prediction interval (Student's t)."""
        x = (math.log(n_params) - self.center) ** np.arange(len(self.coefficients))
        middle = float(x @ self.coefficients)
        error = self.residual * math.sqrt(1 + float(x @ self.inverse_gram @ x))
        reach = t_factor(self.degrees_of_freedom) * error
        return _exp(middle), _exp(middle - reach), _exp(middle + reach)


@dataclass(frozen=True)
class Series:
    """The sizes of one condition and learning rate, with the geometric mean over seeds at each, and the fit.

    by_seed: the values of the seeds at each size; the fit is to these. diverged: whether the run of any seed diverged,
    None if the rows do not tell. held_out: sizes left out of the fit. fit: None with fewer than three sizes.
    unmeasured: names of runs without a value.
    """

    condition: dict[str, str]
    lr: float
    n_params: list[float]
    values: list[float]
    diverged: list[bool | None]
    held_out: list[float]
    fit: Fit | None
    unmeasured: list[str]
    by_seed: list[dict[int, float]]


@dataclass(frozen=True)
class Prediction:
    """A prediction for a size outside the fit. run: the planned run, or None for a held-out size that was measured."""

    series: Series
    n_params: float
    run: str | None
    predicted: float | None
    low: float | None
    high: float | None
    measured: float | None
    verdict: str

    @property
    def measured_by_seed(self) -> dict[int, float]:
        """The measured values of the seeds of a held-out size."""
        return dict(zip(self.series.n_params, self.series.by_seed, strict=True)).get(self.n_params, {})

    @property
    def inside(self) -> bool | None:
        """Whether the measured value lies in the interval."""
        if self.measured is None or self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high

    def record(self) -> dict[str, object]:
        """The prediction as one flat row for tables, CSV and JSON."""
        fit = self.series.fit
        return {
            **self.series.condition,
            "lr": self.series.lr,
            "n_params": self.n_params,
            "run": self.run or "held out",
            "fitted_sizes": sum(n not in self.series.held_out for n in self.series.n_params),
            "degree": len(fit.coefficients) - 1 if fit else None,
            "degrees_of_freedom": fit.degrees_of_freedom if fit else None,
            "predicted": self.predicted,
            "low": self.low,
            "high": self.high,
            "measured": self.measured,
            "inside": self.inside,
            "verdict": self.verdict,
            "note": fit.note if fit else "fewer than three sizes: no fit",
        }


@dataclass(frozen=True)
class Extrapolation:
    """The result of `analyse` for one quantity of a study."""

    quantity: Quantity
    series: list[Series]
    predictions: list[Prediction]

    def records(self) -> list[dict[str, object]]:
        """The predictions as flat rows."""
        return [one.record() for one in self.predictions]

    def notes(self) -> list[str]:
        """Notes on the degree of the fits, on rates without a fit, and on runs without a value."""
        return notes(self.series, self.quantity)


def fit_log_log(n_params: Sequence[float], values: Sequence[float], degree: int = 2) -> Fit | None:
    """Fit ln(value) as a polynomial in ln N by least squares; None with fewer than three sizes.

    A size may occur several times, once for each seed. The fit is of the given degree, but a line with three sizes, so
    that at least one degree of freedom is left for the residual error. Where the seeds tell that the polynomial misses
    the sizes (F test of the lack of fit at 5 %), their spread does not bound the error of the extrapolation; the fit is
    then to the means of the sizes. Values must be finite and positive.
    """
    sizes = sorted(set(n_params))
    if len(sizes) < 3:
        return None
    note = "a line: three sizes are too few for a quadratic" if len(sizes) < 4 and degree > 1 else None
    degree = degree if len(sizes) >= 4 else 1
    x, y = np.log(np.asarray(n_params, float)), np.log(np.asarray(values, float))
    means = np.array([y[np.asarray(n_params) == n].mean() for n in sizes])
    if (p := _lack_of_fit(x, y, np.log(sizes), means, degree)) < 0.05:
        said = f"the fit misses the sizes by more than their seeds differ (p {p:.2g}): it is to the mean of each size"
        return _fit(np.log(sizes), means, degree, "; ".join(filter(None, (note, said))))
    return _fit(x, y, degree, note)


def _fit(x: np.ndarray, y: np.ndarray, degree: int, note: str | None) -> Fit:
    center = float(x.mean())
    design = (x - center)[:, None] ** np.arange(degree + 1)
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    freedom = len(x) - degree - 1
    residual = math.sqrt(float(np.sum((y - design @ coefficients) ** 2)) / freedom)
    return Fit(coefficients, center, residual, freedom, np.linalg.inv(design.T @ design), note)


def _lack_of_fit(x: np.ndarray, y: np.ndarray, sizes: np.ndarray, means: np.ndarray, degree: int) -> float:
    """The p-value of the F test that the polynomial explains the means of the sizes; 1 without repeated sizes."""
    pure = float(sum(np.sum((y[x == at] - mean) ** 2) for at, mean in zip(sizes, means, strict=True)))
    of_pure, of_lack = len(x) - len(sizes), len(sizes) - degree - 1
    if of_pure < 1 or of_lack < 1:
        return 1.0
    fit = _fit(x, y, degree, None)
    lack = max(fit.residual**2 * fit.degrees_of_freedom - pure, 0.0)
    return p_larger_variance(lack / of_lack, of_lack, pure / of_pure, of_pure)


def value_of(row: Row, quantity: Quantity) -> float | None:
    """The quantity of a row; None if it was not measured or is not a positive finite number.

    A hand-made table holds it in the column `value`.
    """
    value = row["value"] if "value" in row else measured(row, quantity.field).get(quantity.name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value > 0 else None


def measured(row: Row, field: str) -> Row:
    """The numbers that a row holds in a field of diagnostics, by name. Raises UserError if the field is no mapping."""
    found = row.get(field) or {}
    if not isinstance(found, dict):
        raise UserError(f"{name_of(row)}: {field} must hold numbers by name, got {text(found)}")
    return found


def measured_names(study: Study, field: str) -> list[str]:
    """The quantities that some row holds, in the order of the records."""
    about = ("step", "steps", "measured")  # these describe when the numbers were measured
    return list(dict.fromkeys(key for row in study.rows for key in measured(row, field) if key not in about))


def analyse(
    study: Study, group: Sequence[str], quantity: Quantity, hold_out_largest: bool = False, size: str = SIZE
) -> tuple[list[Series], list[Prediction]]:
    """Fit each condition and learning rate, and predict the planned runs without a row, or the largest size.

    Raises UserError if no row has the quantity, and ConfigError if there is no size to hold out.
    """
    if not any(value_of(row, quantity) for row in study.rows):
        known = ", ".join(measured_names(study, quantity.field)[:6])
        holds = f", which holds {known}" if known else "; a table of your own has it in a column named value"
        raise UserError(f"no row of {study.path} has {quantity.name} in {quantity.field}{holds}")
    by_series: dict[tuple, list[Curve]] = {}
    for curve in curves(study, group, size):
        for lr in curve.lrs if curve.n_params else ():  # a model without layers has N = 0, so no ln N
            by_series.setdefault((*curve.condition.items(), lr), []).append(curve)
    largest = _largest(by_series.values(), study) if hold_out_largest else {}
    fitted = {
        key: _series(found, key[-1], quantity, largest.get(key[:-1], math.inf)) for key, found in by_series.items()
    }
    predictions = [one for key, found in by_series.items() for one in _predictions(found, fitted[key], quantity)]
    return list(fitted.values()), predictions


def _largest(groups: Iterable[Sequence[Curve]], study: Study) -> dict[tuple, float]:
    """The largest measured size of each condition with several sizes.

    It depends on the condition: with the gains of a qk-norm, a model of the same width and depth has a few more
    parameters. Raises ConfigError if no condition has several sizes.
    """
    sizes: dict[tuple, set[float]] = {}
    for curve in (curve for found in groups for curve in found if curve.runs):
        sizes.setdefault(tuple(curve.condition.items()), set()).add(curve.n_params)
    largest = {condition: max(found) for condition, found in sizes.items() if len(found) > 1}
    if not largest:
        raise ConfigError(f"--hold-out-largest: {study.path} has one size only")
    return largest


def _series(found: Sequence[Curve], lr: float, quantity: Quantity, largest: float) -> Series:
    n_params, values, diverged, unmeasured, held_out, by_seed = [], [], [], [], [], []
    for curve in sorted(found, key=lambda one: one.n_params):
        rows = curve.rows(lr)
        own = {seed: curve.runs[lr, seed] for seed in curve.seeds if (lr, seed) in curve.runs}
        known = {seed: value for seed, row in own.items() if (value := value_of(row, quantity)) is not None}
        unmeasured += [name_of(row) for row in rows if value_of(row, quantity) is None]
        held_out += [curve.n_params] if rows and curve.n_params >= largest else []
        if known:
            n_params.append(curve.n_params)
            values.append(math.exp(sum(map(math.log, known.values())) / len(known)))
            by_seed.append(known)
            diverged.append(_any_diverged(rows))
    points = [(n, value) for n, own in zip(n_params, by_seed, strict=True) if n < largest for value in own.values()]
    fit = fit_log_log([n for n, _ in points], [value for _, value in points])
    return Series(found[0].condition, lr, n_params, values, diverged, held_out, fit, unmeasured, by_seed)


def _any_diverged(rows: Sequence[Row]) -> bool | None:
    """Whether any row diverged; None if the rows do not tell.

    A row diverged if its status or the column `diverged` of a hand-made table says so, or if its final loss is not
    below its initial loss.
    """
    if all("status" not in row and row.get("diverged") is None for row in rows):
        return None
    return any(row.get("status") == "diverged" or _said_diverged(row) or _ended_no_better(row) for row in rows)


def _ended_no_better(row: Row) -> bool:
    """Whether the final loss is not below the initial loss, or not finite. False if one of the columns is absent."""
    if row.get("val_loss_initial") is None or "val_loss" not in row:
        return False
    return number(row, "val_loss") >= number(row, "val_loss_initial") or not math.isfinite(number(row, "val_loss"))


def _said_diverged(row: Row) -> bool:
    said = row.get("diverged")
    if said is None:
        return False
    if (answer := truth(said)) is None:
        raise UserError(f"{name_of(row)}: diverged must be true or false, got {said!r}")
    return answer


def _predictions(found: Sequence[Curve], series: Series, quantity: Quantity) -> list[Prediction]:
    values = dict(zip(series.n_params, series.values, strict=True))
    made = [_prediction(series, n, None, values.get(n), quantity) for n in series.held_out]
    for curve in found:
        for seed in curve.seeds:
            row = curve.planned.get((series.lr, seed))
            if row is not None:
                made.append(_prediction(series, curve.n_params, name_of(row), None, quantity))
    return made


def _prediction(series: Series, n_params: float, run: str | None, measured: float | None, quantity: Quantity):
    if series.fit is None:
        return Prediction(series, n_params, run, None, None, None, measured, "cannot tell")
    middle, low, high = series.fit.predict(n_params)
    both = quantity.passes(low), quantity.passes(high)
    verdict = "crosses" if all(both) else "cannot tell" if any(both) else "does not cross"
    return Prediction(series, n_params, run, middle, low, high, measured, verdict)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a bound of an interval may exceed the largest float


def measured_records(series: Sequence[Series]) -> list[dict[str, object]]:
    """The measured values, one flat row for each condition, rate and size."""
    return [
        {**one.condition, "lr": one.lr, "n_params": n, "value": value, "diverged": bad, "held_out": n in one.held_out}
        for one in series
        for n, value, bad in zip(one.n_params, one.values, one.diverged, strict=True)
    ]


def notes(series: Sequence[Series], quantity: Quantity) -> list[str]:
    """Notes on the degree of the fits, on rates without a fit, and on runs without a value."""
    said = [f"{quantity.label}; unstable {'above' if quantity.above else 'below'} {quantity.threshold:g}"]
    for degree, words in ((3, "quadratic in log N"), (2, "line in log N, because there are only three sizes")):
        rates = [f"{one.lr:g}" for one in series if one.fit and len(one.fit.coefficients) == degree]
        said += [f"{words}: lr={', '.join(dict.fromkeys(rates))}"] if rates else []
    unfitted = dict.fromkeys(f"{one.lr:g}" for one in series if one.fit is None)
    said += [f"no fit, fewer than three sizes: lr={', '.join(unfitted)}"] if unfitted else []
    unmeasured = [name for one in series for name in one.unmeasured]
    said += [f"without a value: {'; '.join(unmeasured)}"] if unmeasured else []
    return said
