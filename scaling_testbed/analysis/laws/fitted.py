"""A law that has been fitted: its parameters with their intervals, what it predicts, and how it is kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.forms import LAWS, LSQ
from scaling_testbed.errors import UserError

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. params: all, fixed ones too. ci95: of the free ones, None where rows are too few. objective: its
    name and value. starts: how many were tried and how many reached the best optimum. optima: others of near-equal
    quality. smallest, largest: of each input among the fitted rows, and of what with_ratios adds. residuals: of these
    rows. draws: the parameters of each bootstrap resample. size: the convention that counts N."""

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

    def summary(self) -> str:
        """The optimum in a line: its objective, how many starts reached it, what N counts."""
        value = f"{self.objective['name']} {self.objective['value']:.6g} over {self.n_rows} rows"
        return f"{value}; {self.starts['reached_best']} of {self.starts['tried']} starts reached it; N is {self.size}"

    def about_intervals(self, resampled: str = "rows") -> list[str]:
        """What low and high are in a table of parameters; nothing where there are none."""
        return [f"low and high: 95 % over {len(self.draws)} resamples of the {resampled}"] if self.draws else []

    def table(self) -> list[dict[str, Any]]:
        """Its parameters as flat rows."""
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
        """Bounds of a 95 % prediction interval for one new run: quantiles over the resamples' predictions, each with
        every residual of the fit added (widened by sqrt(n/(n-p)), as fitted residuals are too small); None without
        resamples."""
        if not self.draws:
            return None
        found = self.samples(inputs)
        if not np.isfinite(found).any():
            return None
        low, high = np.quantile(found[np.isfinite(found)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def samples(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """What one new run may turn out as: each resample's prediction with each residual added, flat. An input may be
        a vector of equally likely values."""
        draws = {name: np.array([draw[name] for draw in self.draws])[:, None] for name in self.params}
        middle = LAWS[self.law].predict(draws, {key: np.atleast_1d(value) for key, value in inputs.items()})
        middle = np.broadcast_to(middle, np.broadcast_shapes(middle.shape, (len(self.draws), 1)))[:, :, None]
        free = len(self.params) - len(self.fixed)
        noise = np.array(self.residuals) * math.sqrt(self.n_rows / (self.n_rows - free))
        return (middle - noise if self.objective["name"] == LSQ else middle * np.exp(-noise)).ravel()

    def extrapolation(self, inputs: Mapping[str, float]) -> float:
        """How far beyond the fitted rows: the largest ratio of an input, of compute or of tokens per parameter to its
        largest fitted value, or of its smallest fitted value to it; at least 1."""
        reached = with_ratios(inputs)
        above = [float(reached[key]) / most for key, most in self.largest.items()]
        below = [least / float(reached[key]) for key, least in self.smallest.items()]
        return max(1.0, *above, *below)


def with_ratios(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """With compute and tokens per parameter, which may be far from all rows where neither N nor D is."""
    if not {"n_params", "n_tokens"} <= set(inputs):
        return dict(inputs)
    n, d = inputs["n_params"], inputs["n_tokens"]
    return {**inputs, "flops": 6 * n * d, "tokens_per_param": d / n}


def from_record(record: Mapping[str, Any]) -> Fit:
    """A fit from what its dataclass was written as; what is not there and has a default takes it. Raises KeyError and
    TypeError where something is missing, ValueError for parameters that are not those of its law, UserError for a law
    that is not known here."""
    if record["law"] not in LAWS:
        raise UserError(f"there is no law {record['law']!r} here; name the plug-in that adds it: --plugins NAME")
    known = [param.name for param in LAWS[record["law"]].params]
    if list(record["params"]) != known or not all(map(math.isfinite, record["params"].values())):
        raise ValueError(f"{record['law']} has the parameters {', '.join(known)}, each a number")
    for key in ("largest", "smallest"):
        if any(not math.isfinite(value) for value in record.get(key, {}).values()):
            raise ValueError(f"{key} must hold numbers")
    if any(sorted(draw) != sorted(known) for draw in record.get("draws", [])):
        raise ValueError(f"each of the draws must have {', '.join(known)}")
    return Fit(**{one.name: record[one.name] for one in fields(Fit) if one.name in record})
