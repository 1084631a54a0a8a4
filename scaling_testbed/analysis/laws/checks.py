"""Warnings about differences between rows that a law ignores, and about predictions far beyond the fitted rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws.fitted import Fit, with_ratios
from scaling_testbed.analysis.laws.forms import LAWS, Law, Param
from scaling_testbed.analysis.laws.settings import unseen
from scaling_testbed.analysis.rows.study import Row, several_sources

DATA = ("data_fingerprint", "dataset")
FAR = 10  # times beyond the fitted rows: the warning starts here


def odd_exponents(found: Fit) -> list[str]:
    """A warning about fitted exponents above 1, which losses in nats do not have."""
    law = LAWS[found.law]
    odd = {param.name: found.params[param.name] for param in law.params if _is_exponent(param)
           and found.params[param.name] > 1 and param.name not in found.fixed}  # fmt: skip
    if not odd or law.output != "loss":
        return []
    values = ", ".join(f"{name} is {value:.3g}" for name, value in odd.items())
    return [f"{values}: an exponent above 1 is unusual; is the loss in nats, and does each column count ones?"]


def _is_exponent(param: Param) -> bool:
    return (
        not param.log and param.centre is None and param.high > param.start[1] > 0 == param.low and param.start[1] <= 1
    )


def mixed_data(rows: Sequence[Row]) -> list[str]:
    """A warning if the rows have several data sets, versions of a plug-in or precisions: a law describes one."""
    for key in DATA:
        found = {str(row[key]) for row in rows if row.get(key)}
        if len(found) > 1:
            return [f"the rows have {len(found)} values of {key}: a law describes one data set; use --where"]
    several = several_sources(rows)
    return [f"the rows were made with {several}: a law describes the runs of one"] if several else []


def mixed_settings(rows: Sequence[Row], law: Law) -> list[str]:
    """A warning if rows with equal inputs differ in a setting, and in the output by more than one percent.

    A law uses its inputs only, so it cannot describe such a difference.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in law.inputs), []).append(row)
    keys: dict[str, None] = {}
    most = 0.0
    for group in groups.values():
        settings = dict.fromkeys(key for row in group for key in row if "." in key or key == "lr")
        differ = [key for key in settings if len({repr(row.get(key)) for row in group}) > 1 and key not in law.inputs]
        outputs = [row[law.output] for row in group]
        if differ and max(outputs) > 1.01 * min(outputs):
            keys |= dict.fromkeys(key for key in differ if not (key == "lr" and "optimizer.lr" in differ))
            most = max(most, max(outputs) - min(outputs))
    if not keys:
        return []
    named = ", ".join(keys) if len(keys) < 4 else f"{', '.join(list(keys)[:3])} and others"
    alike = f"rows of the same {' and '.join(law.inputs)} differ in {named}"
    return [f"{alike}, and by up to {most:.3g} in {law.output}: the law describes all of them; select with --where"]


def unseen_settings(rows: Sequence[Row], found: Fit, run: str | None = None) -> list[str]:
    """A warning about a setting that explains much of the residuals of a fit to `rows`: see settings.unseen. Data sets
    that `mixed_data` names are left out. run: the column that names the run of a point. The residuals of a run are not
    independent, so their mean counts, at its last point."""
    residuals, but = found.residuals, DATA if mixed_data(rows) else ()
    if run is not None:
        of_run: dict[str, list[float]] = {}
        for row, residual in zip(rows, residuals, strict=True):
            of_run.setdefault(row[run], []).append(residual)
        last = {row[run]: row for row in rows}
        rows, residuals, but = list(last.values()), [float(np.mean(of_run[name])) for name in last], (*but, run, "lr")
    inputs = {key: [float(row[key]) for row in rows] for key in LAWS[found.law].inputs}
    ratios = with_ratios({key: np.array(values) for key, values in inputs.items()})
    return unseen(rows, ratios, residuals, but)


def mixed_ends(rows: Sequence[Row], run: str) -> list[str]:
    """A warning about points of training curves at the peak rate beside ends of runs whose rate has decayed. run: the
    column that names the run of a point; lr_share is its rate as a share of the peak."""
    peak = {row[run] for row in rows if row["lr_share"] == 1}
    decayed = {row[run] for row in rows if row["lr_share"] < 1}
    if not (peak and decayed):
        return []
    return [
        f"points at the peak rate ({len(peak)} runs) stand beside ends of runs whose rate has decayed "
        f"({len(decayed)}), whose loss is lower: "
        'choose with --where "lr_share=1" or "lr_share<1"'
    ]


def doubts(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about the prediction farthest beyond the fitted rows, if it is a factor FAR or more, and about those
    below zero, which neither a loss nor an error can be."""
    found = []
    most = max(predictions, key=lambda one: one["extrapolation"], default=None)
    if most is not None and most["extrapolation"] >= FAR:
        found.append(f"a prediction lies {most['extrapolation']:.3g} times beyond what was fitted{_of(most)}")
    if bad := [one for one in predictions if (one.get("predicted") or 0) < 0]:
        least = min(bad, key=lambda one: one["predicted"])
        are = "a prediction is" if len(bad) == 1 else f"{len(bad)} predictions are"
        found.append(f"{are} below zero, down to {least['predicted']:.3g}{_of(least)}: the law does not hold there")
    return found


def _of(prediction: Mapping[str, Any]) -> str:
    return f" ({prediction['run']})" if prediction.get("run") else ""
