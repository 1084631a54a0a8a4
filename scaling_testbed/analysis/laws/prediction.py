"""Predictions of a fitted law: for a new run from its inputs, and for a measured run beside its measured value."""

import math
from collections.abc import Sequence
from typing import Any

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.laws.selection import Selection
from scaling_testbed.analysis.rows.study import Row, name_of
from scaling_testbed.errors import ConfigError

Record = dict[str, Any]


def predict(kept: Fit | Chain | Selection, row: Row) -> Record:
    """Predict one new run, as a flat row.

    The row holds the inputs, the prediction of the law, of the two chained laws or of the compared laws, the 95 %
    prediction interval and the distance from the fitted rows. row: the law's inputs, or the numbers that determine them
    (tokens_per_param, flops). Raises ConfigError as `inputs_of` does.
    """
    inputs = inputs_of(LAWS[loss_law(kept).law], row)
    if isinstance(kept, Selection):
        return kept.predict(inputs)
    return kept.record(inputs) if isinstance(kept, Chain) else of_new(kept, inputs)


def loss_law(kept: Fit | Chain | Selection) -> Fit:
    """The law of the loss: of two chained laws the first, of compared laws the one with the largest share."""
    if isinstance(kept, Selection):
        return kept.laws[kept.best].fit
    return kept.loss if isinstance(kept, Chain) else kept


def inputs_of(law: Law, row: Row) -> dict[str, float]:
    """A law's inputs from a row of numbers.

    Raises ConfigError, which names the key, if an input is missing, a key is superfluous or a value is not a positive
    finite number.
    """
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"{key} must be a number greater than zero; got {value}")
    derived = columns.derived(row)
    missing = [key for key in law.inputs if derived.get(key) is None]
    if missing:
        raise ConfigError(f"{law.name} needs {', '.join(law.inputs)}; give --at {missing[0]}=VALUE")
    spare = {key for key in row if key not in law.inputs}
    enough = set(law.inputs) <= set(row) or {"flops", "tokens_per_param"} <= spare
    if spare - {"n_params", "n_tokens", "flops", "tokens_per_param"} or (spare and enough):
        raise ConfigError(f"{law.name} takes {', '.join(law.inputs)}; leave out {', '.join(sorted(spare))}")
    return {key: derived[key] for key in law.inputs}


def of_new(found: Fit, inputs: dict[str, float]) -> Record:
    """A new run as a flat row, with its interval (None without resamples) and its distance from the fitted rows."""
    low, high = found.interval(inputs) or (None, None)
    predicted = {f"predicted_{LAWS[found.law].output}": float(found.predict(inputs))}
    return {**inputs, **predicted, "low": low, "high": high, "extrapolation": found.extrapolation(inputs)}


def beside_fitted(found: Fit, row: Row) -> Record:
    """A fitted run beside the law's value."""
    inputs, actual = _measured(found, row)
    return {"run": _run(row), **inputs, **_error(actual, float(found.predict(inputs)))}


def beside_held_out(found: Fit, row: Row) -> Record:
    """A held-out run beside its prediction, and whether it lies inside the interval."""
    inputs, actual = _measured(found, row)
    made = of_new(found, inputs)
    predicted = made.pop(f"predicted_{LAWS[found.law].output}")
    return {"run": _run(row), **made, **_error(actual, predicted), "inside": _inside(made, actual)}


def of_runs(predictions: Sequence[Record], rows: Sequence[Row], run: str, inputs: Sequence[str]) -> list[Record]:
    """The predictions of points of training curves, run by run: the inputs at its last point, the number of points, the
    mean and the largest relative error, whatever its sign, and the relative error at the last point, positive where the
    prediction is too high. low, high, inside: as of the last point. run: the column that names the run of each row."""
    groups: dict[str, list[Record]] = {}
    for one, row in zip(predictions, rows, strict=True):
        groups.setdefault(str(row[run]), []).append(one)
    found = []
    for name, own in groups.items():
        errors, last = [one["predicted"] / one["actual"] - 1 for one in own], own[-1]
        sizes = [abs(error) for error in errors]
        ends: Record = {key: last[key] for key in ("low", "high", "actual", "predicted", "inside") if key in last}
        ends["final_error"] = errors[-1]
        of_curve = {"points": len(own), "mean_error": sum(sizes) / len(sizes), "largest_error": max(sizes)}
        found.append({"run": name, **{key: last[key] for key in inputs}, **of_curve, **ends})
    return found


def beside_selected(found: Selection, row: Row) -> Record:
    """A held-out run beside the prediction of several laws, and whether it lies inside the interval."""
    inputs, actual = _measured(loss_law(found), row)
    made = found.predict(inputs)
    predicted = made.pop("predicted_loss")
    return {"run": _run(row), **made, **_error(actual, predicted), "inside": _inside(made, actual)}


def beside_chained(chain: Chain, row: Row) -> Record:
    """A held-out run beside the prediction of two chained laws from its size and tokens alone."""
    first, second = LAWS[chain.loss.law], LAWS[chain.downstream.law]
    inputs = {key: columns.check([row], key, first.inputs)[0] for key in first.inputs}
    (actual,) = columns.check([row], second.output, (second.output,))
    made = chain.record(inputs)
    return {"run": _run(row), **made, **_error(actual, made["predicted"]), "inside": _inside(made, actual)}


def _measured(found: Fit, row: Row) -> tuple[dict[str, float], float]:
    inputs, (actual,) = columns.values([row], LAWS[found.law])
    return {key: values[0] for key, values in inputs.items()}, actual


def _error(actual: float, predicted: float) -> Record:
    """relative_error is None where the measured value is zero."""
    relative = abs(predicted - actual) / actual if actual else None
    return {"actual": actual, "predicted": predicted, "relative_error": relative}


def _inside(made: Record, actual: float) -> bool | None:
    return None if made["low"] is None else made["low"] <= actual <= made["high"]


def _run(row: Row) -> str:
    return name_of(row).removeprefix("run ")
