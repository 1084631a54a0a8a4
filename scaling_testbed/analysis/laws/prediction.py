"""What a fitted law says of one run: of a new one by its inputs, and of a measured one beside what was measured."""

import math
from typing import Any

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.rows.study import Row, name_of
from scaling_testbed.errors import ConfigError

Record = dict[str, Any]


def predict(kept: Fit | Chain, row: Row) -> Record:
    """One new run as a flat row: its inputs, what the law or the two chained laws predict, the 95 % prediction interval
    and how far it lies beyond what was fitted. row: the law's inputs, or what they follow from (tokens_per_param,
    flops). Raises ConfigError as `inputs_of` does."""
    law = LAWS[(kept.loss if isinstance(kept, Chain) else kept).law]
    inputs = inputs_of(law, row)
    return kept.record(inputs) if isinstance(kept, Chain) else of_new(kept, inputs)


def inputs_of(law: Law, row: Row) -> dict[str, float]:
    """A law's inputs from a row of numbers. Raises ConfigError naming what is missing, of no use or no such number."""
    derived = columns.derived(row)
    missing = [key for key in law.inputs if derived.get(key) is None]
    if missing:
        raise ConfigError(f"{law.name} needs {', '.join(law.inputs)}; say --at {missing[0]}=VALUE")
    for key, value in row.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} must be a number greater than zero; got {value:g}")
    spare = {key for key in row if key not in law.inputs}
    enough = set(law.inputs) <= set(row) or {"flops", "tokens_per_param"} <= spare
    if spare - {"n_params", "n_tokens", "flops", "tokens_per_param"} or (spare and enough):
        raise ConfigError(f"{law.name} takes {', '.join(law.inputs)}; {', '.join(sorted(spare))} is more than it needs")
    return {key: derived[key] for key in law.inputs}


def of_new(found: Fit, inputs: dict[str, float]) -> Record:
    """A new run as a flat row, with its interval (None without resamples) and how far out it lies."""
    low, high = found.interval(inputs) or (None, None)
    predicted = {f"predicted_{LAWS[found.law].output}": float(found.predict(inputs))}
    return {**inputs, **predicted, "low": low, "high": high, "extrapolation": found.extrapolation(inputs)}


def beside_fitted(found: Fit, row: Row) -> Record:
    """A run that was fitted, beside what the law says of it."""
    inputs, actual = _measured(found, row)
    return {"run": _run(row), **inputs, **_error(actual, float(found.predict(inputs)))}


def beside_held_out(found: Fit, row: Row) -> Record:
    """A run that was not fitted beside its prediction, and whether it lies inside the interval."""
    inputs, actual = _measured(found, row)
    made = of_new(found, inputs)
    predicted = made.pop(f"predicted_{LAWS[found.law].output}")
    return {"run": _run(row), **made, **_error(actual, predicted), "inside": _inside(made, actual)}


def beside_chained(chain: Chain, row: Row) -> Record:
    """A run that was not fitted beside what two chained laws say from its size and tokens alone."""
    first, second = LAWS[chain.loss.law], LAWS[chain.downstream.law]
    inputs = {key: columns.check([row], key, first.inputs)[0] for key in first.inputs}
    (actual,) = columns.check([row], second.output, (second.output,))
    made = chain.record(inputs)
    error = {"actual": actual, "relative_error": abs(made["predicted"] - actual) / actual}
    return {"run": _run(row), **made, **error, "inside": _inside(made, actual)}


def _measured(found: Fit, row: Row) -> tuple[dict[str, float], float]:
    inputs, (actual,) = columns.values([row], LAWS[found.law])
    return {key: values[0] for key, values in inputs.items()}, actual


def _error(actual: float, predicted: float) -> Record:
    return {"actual": actual, "predicted": predicted, "relative_error": abs(predicted - actual) / actual}


def _inside(made: Record, actual: float) -> bool | None:
    return None if made["low"] is None else made["low"] <= actual <= made["high"]


def _run(row: Row) -> str:
    return name_of(row).removeprefix("run ")
