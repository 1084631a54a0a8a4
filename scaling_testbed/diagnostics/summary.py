"""The diagnostics that the row takes from metrics.jsonl."""

import math
import statistics
from typing import Any, TypeGuard

from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.names import is_diagnostic


def names_in(row: dict[str, Any]) -> dict[str, float | None]:
    """The diagnostics of one line of metrics.jsonl."""
    return {key: value for key, value in row.items() if is_diagnostic(key)}


def summarize(config: DiagnosticsConfig, rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """diagnostics_at_step, diagnostics_last_mean and max_attention_logit from the metrics of a run of `steps` steps.

    A mean over the last steps ignores values that are not finite (null in the file) and records the range of its steps.
    Each field is None if nothing was measured.
    """
    measured = [(row["step"], _with_clipping(row, found)) for row in rows if (found := names_in(row))]
    at = next((found for step, found in measured if step == config.at_step), None)
    last = [(step, found) for step, found in measured if step > steps - config.last_steps]
    largest = [value for _, found in measured if _finite(value := found.get("attention_logit_max"))]
    return {
        "diagnostics_at_step": at and {"step": config.at_step, **at},
        "diagnostics_last_mean": _means(last) if last else None,
        "max_attention_logit": max(largest, default=None),
    }


def _with_clipping(row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Add grad_norm and clip_coefficient, which every line has, so that the row keeps them with the diagnostics."""
    return found | {key: row[key] for key in ("grad_norm", "clip_coefficient") if key in row}


def _means(measured: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    names = {name: None for _, found in measured for name in found}
    values = {name: [found[name] for _, found in measured if _finite(found.get(name))] for name in names}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    return {"steps": [measured[0][0], measured[-1][0]], "measured": len(measured), **means}


def _finite(value: Any) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
