"""A fitted law: its parameters with their intervals, its predictions, and its form in a file."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.forms import HUBER, LAWS, LSQ, LSQ_LOG
from scaling_testbed.errors import UserError

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law.

    params: all parameters, including the fixed ones. ci95: 95 % intervals of the free parameters that the rows
    determine; None if there are too few rows. objective: its name and value, and whether rows weigh by their errors.
    starts: how many were tried and how many reached the best optimum. optima: other optima of nearly equal quality.
    smallest, largest: the range of each input over the fitted rows, and of the quantities that with_ratios adds.
    residuals: those of the fitted rows. draws: the parameters of each bootstrap resample. size: the convention that
    counts N. fitted_inputs: the inputs of the fitted rows. n_runs: the number of runs, if the rows are points of
    training curves; else None.
    """

    law: str
    params: dict[str, float]
    ci95: dict[str, tuple[float, float]] | None
    objective: dict[str, Any]
    n_rows: int
    starts: dict[str, int]
    warnings: list[str]
    fixed: dict[str, float] = field(default_factory=dict)
    optima: list[dict[str, Any]] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    residuals: list[float] = field(default_factory=list)
    draws: list[dict[str, float]] = field(default_factory=list)
    size: str = "n_params"
    fitted_inputs: dict[str, list[float]] = field(default_factory=dict)
    n_runs: int | None = None

    def summary(self) -> str:
        """One line about the optimum: its objective, how many starts reached it, what N counts."""
        value = f"{self.objective['name']} {self.objective['value']:.6g} over {self.n_rows} {self.rows}"
        return f"{value}; {self.starts['reached_best']} of {self.starts['tried']} starts reached it; N is {self.size}"

    @property
    def rows(self) -> str:
        """What the rows are, for a sentence."""
        return "rows" if self.n_runs is None else f"points of {self.n_runs} runs"

    def about_intervals(self, resampled: str = "rows") -> list[str]:
        """A note on the columns low and high of a table of parameters; empty without intervals."""
        if self.draws and self.objective.get("by_errors"):
            return [f"low and high: 95 % over {len(self.draws)} draws of the optima by their errors"]
        return [f"low and high: 95 % over {len(self.draws)} resamples of the {resampled}"] if self.draws else []

    def table(self) -> list[dict[str, Any]]:
        """The parameters as flat rows."""
        ends = self.ci95 or {}
        return [
            {"parameter": name, "value": value, "low": ends.get(name, (None,))[0], "high": ends.get(name, (None,))[-1],
             "note": "fixed" if name in self.fixed else ""}
            for name, value in self.params.items()
        ]  # fmt: skip

    def predict(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """The law's output for its inputs."""
        return LAWS[self.law].predict(self.params, inputs)

    def interval(self, inputs: Mapping[str, float]) -> tuple[float, float] | None:
        """Bounds of a 95 % prediction interval for one new run; None without resamples.

        The bounds are quantiles of the predictions of all resamples, each with every residual of the fit added. The
        residuals are multiplied by sqrt(n/(n-p)), because residuals of a fit are too small.
        """
        if not self.draws:
            return None
        found = self.samples(inputs)
        if not np.isfinite(found).any():
            return None
        low, high = np.quantile(found[np.isfinite(found)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def samples(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Possible values of one new run, as a flat array: each resample's prediction with each residual added.

        An input may be an array [..., n_draws] of values for each resample.
        """
        draws = {name: np.array([draw[name] for draw in self.draws]) for name in self.params}
        middle = LAWS[self.law].predict(draws, inputs)
        middle = np.broadcast_to(middle, np.broadcast_shapes(np.shape(middle), (len(self.draws),)))[..., None]
        free = len(self.params) - len(self.fixed)
        noise = np.array(self.residuals) * math.sqrt(self.n_rows / (self.n_rows - free))
        return (middle - noise if self.objective["name"] == LSQ else middle * np.exp(-noise)).ravel()

    def extrapolation(self, inputs: Mapping[str, float]) -> float:
        """The factor by which a run lies beyond the fitted rows; at least 1.

        It is the largest ratio of an input, of compute or of tokens per parameter to its largest fitted value, or of
        its smallest fitted value to it.
        """
        reached = with_ratios(inputs)
        above = [float(reached[key]) / most for key, most in self.largest.items()]
        below = [least / float(reached[key]) for key, least in self.smallest.items()]
        return max([1.0, *above, *below])


def with_ratios(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with compute, tokens per parameter and epochs (at least one), which can lie far from all rows even if
    N and D do not."""
    if {"n_params", "steps", "batch_tokens"} <= set(inputs):
        inputs = {**inputs, "n_tokens": inputs["steps"] * inputs["batch_tokens"]}
    if not {"n_params", "n_tokens"} <= set(inputs):
        return dict(inputs)
    n, d = inputs["n_params"], inputs["n_tokens"]
    epochs = {"epochs": np.maximum(d / inputs["unique_tokens"], 1.0)} if "unique_tokens" in inputs else {}
    return {**inputs, "flops": 6 * n * d, "tokens_per_param": d / n, **epochs}


def _numbers(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [None]
    return all(isinstance(one, (int, float)) and not isinstance(one, bool) and abs(one) < 1e300 for one in values)


def _entries(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _intervals(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, Mapping)
        and all(isinstance(one, (list, tuple)) and len(one) == 2 and _numbers(list(one)) for one in value.values())
    )


# The fields of a saved fit, beside its law, and whether a value is one.
SHAPES: dict[str, Callable[[Any], bool]] = {
    "params": lambda value: isinstance(value, Mapping) and _numbers(value),
    "ci95": _intervals,
    "objective": lambda value: (
        isinstance(value, Mapping) and value.get("name") in (HUBER, LSQ, LSQ_LOG) and _numbers([value.get("value")])
    ),
    "n_rows": lambda value: isinstance(value, int) and value > 0,
    "starts": lambda value: isinstance(value, Mapping) and _numbers(value) and {"tried", "reached_best"} <= set(value),
    "warnings": lambda value: _entries(value, lambda one: isinstance(one, str)),
    "fixed": lambda value: isinstance(value, Mapping) and _numbers(value),
    "optima": lambda value: _entries(value, lambda one: isinstance(one, Mapping)),
    "largest": lambda value: isinstance(value, Mapping) and _numbers(value) and all(v > 0 for v in value.values()),
    "smallest": lambda value: isinstance(value, Mapping) and _numbers(value) and all(v > 0 for v in value.values()),
    "residuals": lambda value: isinstance(value, list) and _numbers(value),
    "draws": lambda value: _entries(value, lambda one: isinstance(one, Mapping) and _numbers(one)),
    "size": lambda value: isinstance(value, str),
    "fitted_inputs": lambda value: (
        isinstance(value, Mapping) and all(isinstance(one, list) and _numbers(one) for one in value.values())
    ),
    "n_runs": lambda value: value is None or isinstance(value, int) and value > 0,
}


def from_record(record: Mapping[str, Any]) -> Fit:
    """A fit from its saved fields; an absent field with a default takes the default.

    Raises KeyError or TypeError if a field is missing, ValueError if a field is damaged or the parameters are not those
    of the law, and UserError if the law is unknown.
    """
    for name, fits in SHAPES.items():
        if name in record and not fits(record[name]):
            raise ValueError(f"{name} is damaged")
    if not isinstance(record["law"], str) or record["law"] not in LAWS:
        raise UserError(f"the law {record['law']!r} is unknown; name the plug-in that adds it: --plugins NAME")
    known = [param.name for param in LAWS[record["law"]].params]
    if list(record["params"]) != known or not set(record.get("fixed", ())) <= set(known):
        raise ValueError(f"{record['law']} has the parameters {', '.join(known)}")
    if record["n_rows"] <= len(known) - len(record.get("fixed", ())) and record.get("draws"):
        raise ValueError("n_rows is damaged")
    if record.get("draws") and not record.get("residuals"):
        raise ValueError("residuals is damaged")
    inputs = {name: 1.0 for name in LAWS[record["law"]].inputs}
    rows = record.get("fitted_inputs") or _inputs_of(record.get("fitted"), list(inputs))
    if rows and (set(rows) != set(inputs) or {len(one) for one in rows.values()} != {record["n_rows"]}):
        raise ValueError(f"fitted_inputs must have {', '.join(inputs)} of {record['n_rows']} rows")
    if any(set(record.get(key, ())) - set(with_ratios(inputs)) for key in ("largest", "smallest")):
        raise ValueError(f"largest and smallest are of {', '.join(inputs)}")
    if any(sorted(draw) != sorted(known) for draw in record.get("draws", [])):
        raise ValueError(f"each of the draws must have {', '.join(known)}")
    found = {one.name: record[one.name] for one in fields(Fit) if one.name in record}
    for name in ("params", "fixed", "largest", "smallest"):  # NumPy has no integers over 64 bits
        found |= {name: {key: float(value) for key, value in record[name].items()}} if name in record else {}
    found |= {"fitted_inputs": {key: [float(one) for one in values] for key, values in rows.items()}}
    for name in ("residuals", "draws"):
        found |= {name: [_floats(one) for one in record[name]]} if name in record else {}
    return Fit(**found)


def _inputs_of(runs: Any, names: list[str]) -> dict[str, list[float]]:
    """The inputs in the saved rows of the fitted runs: files before version 0.2 have them only there."""
    if not runs or not all(isinstance(run, Mapping) and set(names) <= set(run) for run in runs):
        return {}
    return {name: [run[name] for run in runs] for name in names}


def _floats(value: Any) -> Any:
    return {key: float(one) for key, one in value.items()} if isinstance(value, Mapping) else float(value)
