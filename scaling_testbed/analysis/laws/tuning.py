"""The tuned learning rates and batches of a study: their optima, and whether they extrapolate along a line or a curve.

Zhang et al. 2026 (arXiv 2606.29158) find that the best learning rate curves upwards in N, and less so in D, so that a
line through small models gives the large ones too low a rate. Here both forms are fitted to the optima, weighted by
their errors, without those of the largest size (or number of tokens), and predict these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.checks import mixed_data
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.optima import AXES, NEAR, Axis, Tuned, tuned
from scaling_testbed.analysis.laws.quadratic import t_factor
from scaling_testbed.analysis.laws.study import Rows
from scaling_testbed.errors import UserError

INPUTS = ("n_params", "n_tokens")
LEAST = 4  # values of an input: the curved form has three coefficients, and one value is left out
LINE, CURVED = "log_linear", "curved"


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """The optima at the largest value of an input, predicted by a line and by a quadratic in its logarithm.

    value: the largest value, whose optima are left out. measured: their geometric mean. predicted, low, high: by form,
    with the 95 % interval for what is measured. curvature: of the logarithm of all optima in that of the input, with
    its interval. verdict: which form holds what was measured.
    """

    output: str
    input: str
    setting: Mapping[str, Any]
    value: float
    measured: float
    predicted: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    curvature: float
    curvature_low: float
    curvature_high: float

    def holds(self, form: str) -> bool:
        """Whether the interval of a form holds what was measured."""
        return self.low[form] <= self.measured <= self.high[form]

    @property
    def verdict(self) -> str:
        held = [form for form in (LINE, CURVED) if self.holds(form)]
        nearest = min((LINE, CURVED), key=lambda form: abs(math.log(self.predicted[form] / self.measured)))
        if len(held) != 1:
            return "neither holds the largest" if not held else "it cannot be told: both hold the largest"
        if held != [nearest]:  # a wide interval holds anything
            return f"it cannot be told: {held[0].replace('_', '-')} holds the largest, and the other is nearer to it"
        if nearest == CURVED and self.curvature_low <= 0 <= self.curvature_high:
            return "it cannot be told: curved holds the largest, and its curvature may be zero"
        return f"{nearest.replace('_', '-')} extrapolates better: the other misses the largest"

    def lines(self) -> list[str]:
        """Lines for a terminal."""
        where = "".join(f"{key}={value}, " for key, value in self.setting.items())
        forms = [
            f"  {form.replace('_', '-')}: {self.predicted[form]:.4g}, {self.low[form]:.4g} to {self.high[form]:.4g}"
            for form in (LINE, CURVED)
        ]
        bend = f"{self.curvature:.3g}, {self.curvature_low:.3g} to {self.curvature_high:.3g}"
        return [
            f"{where}{self.output} at {self.input}={self.value:,.0f} is {self.measured:.4g}; by the others, at 95 %:",
            *forms,
            f"  curvature in ln {self.input}, of all: {bend}; {self.verdict}",
        ]

    def record(self) -> dict[str, Any]:
        """One flat row."""
        forms = {f"{form}{end}": ends[form] for form in (LINE, CURVED)
                 for end, ends in (("", self.predicted), ("_low", self.low), ("_high", self.high))}  # fmt: skip
        named = {**self.setting, "output": self.output, "input": self.input, "left_out": self.value}
        bend = {"curvature": self.curvature, "curvature_low": self.curvature_low, "curvature_high": self.curvature_high}
        return {**named, "measured": self.measured, **forms, **bend, "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """The optima of a study, how they extrapolate, and warnings."""

    optima: list[Tuned]
    extrapolations: list[Extrapolation]
    warnings: list[str]
    near: float
    origin: str
    where: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """What is kept in a file."""
        return {
            "optima": [one.record() for one in self.optima],
            "extrapolations": [one.record() for one in self.extrapolations],
            "warnings": self.warnings,
            "near": self.near,
            "rows": self.origin,
            "where": self.where,
        }


def tuning_rows(given: Rows, *, near: float = NEAR, where: Sequence[str] = ()) -> TuningReport:
    """The optimum of each size, number of tokens and setting, and how the optima extrapolate.

    near: as in optima.tuned. Raises ConfigError and UserError, also if no size has several learning rates or batches.
    """
    rows, _ = columns.select(given.rows, where, [])
    needed = [key for key in ("n_params", "n_tokens", "loss") if any(row.get(key) is not None for row in rows)]
    said = [*given.said, *columns.check_sizes_and_losses(rows, needed, given.mapping)]
    rows, empty = columns.without_output(rows, LAWS["compute"])
    found, notes = tuned(rows, near)
    if not found:
        raise UserError(
            f"no size has runs at several {' or '.join(AXES)}; name their columns with --map {AXES[0]}=COLUMN"
        )
    if any("diverged" in text for text in said):
        said.append("other seeds may have diverged at a best rate or batch")
    extrapolated, short = extrapolations(found)
    return TuningReport(
        optima=found,
        extrapolations=extrapolated,
        warnings=[*said, *empty, *mixed_data(rows), *notes, *short],
        near=near,
        origin=given.origin,
        where=list(where),
    )


def extrapolations(found: Sequence[Tuned]) -> tuple[list[Extrapolation], list[str]]:
    """For each setting, output and input with enough optima, how both forms extrapolate; and notes on the others."""
    every, said = [], list[str]()
    settings = {repr(one.setting): one.setting for one in found}
    for name, setting in settings.items():
        for output in dict.fromkeys(output for one in found for output in one.axes):
            own = [(one.row, one.axes[output]) for one in found if repr(one.setting) == name and output in one.axes]
            good = [(row, axis) for row, axis in own if axis.best is not None]
            made = [one for key in INPUTS if (one := _extrapolation(good, output, key, setting)) is not None]
            every += made
            if not made:
                where = " ".join(f"{key}={value}" for key, value in setting.items())
                said.append(f"{output}{f' at {where}' if where else ''}: {len(good)} optima of {len(own)}; whether it "
                            f"curves needs optima at {LEAST} sizes or numbers of tokens")  # fmt: skip
    return every, said


def _extrapolation(
    good: Sequence[tuple[Mapping[str, Any], Axis]], output: str, key: str, setting: Mapping[str, Any]
) -> Extrapolation | None:
    """None if the input has too few values, or if the optima do not tell it from the other input."""
    logs = {name: np.log([float(row[name]) for row, _ in good]) for name in INPUTS
            if all(row.get(name) is not None for row, _ in good)}  # fmt: skip
    if key not in logs or len(set(logs[key])) < LEAST:
        return None
    others = [values for name, values in logs.items() if name != key and len(set(values)) > 1]
    x, held = logs[key] - logs[key].mean(), logs[key] == logs[key].max()
    line = np.column_stack([np.ones_like(x), x, *others])
    if others and _is_singular(line):  # D grows with N, so a law of N is one of both
        if key != INPUTS[0]:
            return None
        line = line[:, :2]
    curved = np.column_stack([line, x**2])
    if _is_singular(line[~held]) or _is_singular(curved[~held]):
        return None
    y = np.log([axis.best or math.nan for _, axis in good])
    error, freedom = np.array([axis.error for _, axis in good]), np.array([axis.freedom for _, axis in good])
    predicted, low, high = {}, {}, {}
    for form, design in ((LINE, line), (CURVED, curved)):
        gain = np.linalg.pinv(design[~held] / error[~held, None]) / error[~held]
        weights = np.zeros(len(y))
        weights[~held] = design[held].mean(axis=0) @ gain
        reach = _reach(weights - held / held.sum(), error, freedom)
        middle = float(weights @ y)
        predicted[form], low[form], high[form] = (math.exp(middle + side * reach) for side in (0, -1, 1))
    gain = (np.linalg.pinv(curved / error[:, None]) / error)[-1]
    bend, reach = float(gain @ y), _reach(gain, error, freedom)
    return Extrapolation(
        output=output,
        input=key,
        setting=setting,
        value=math.exp(logs[key].max()),
        measured=math.exp(float(y[held].mean())),
        predicted=predicted,
        low=low,
        high=high,
        curvature=bend,
        curvature_low=bend - reach,
        curvature_high=bend + reach,
    )


def _is_singular(design: np.ndarray) -> bool:
    """Whether the columns are no more than the rows allow, or depend on each other; tokens that whole steps have
    rounded do not count as independent of the size."""
    scaled = design / np.linalg.norm(design, axis=0)
    return len(design) < design.shape[1] or bool(np.linalg.svd(scaled, compute_uv=False)[-1] < 1e-3)


def _reach(weights: np.ndarray, error: np.ndarray, freedom: np.ndarray) -> float:
    """Half the 95 % interval of a weighted sum of optima with these standard errors and degrees of freedom
    (Satterthwaite 1946, Biometrics Bulletin 2:110)."""
    parts = (weights * error) ** 2
    return t_factor(float(parts.sum() ** 2 / np.sum(parts**2 / freedom))) * math.sqrt(parts.sum())
