"""What the row takes from the lines of metrics.jsonl: losses of evaluations and diagnostics."""

import base64
import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Self, TypeGuard

import numpy as np

from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.names import is_diagnostic

_EVALUATION = (
    *("step", "val_loss", "val_bpb", "val_loss_by_set", "error_by_task"),
    *("val_loss_average", "val_loss_average_by_set"),
    *("ce_scaled", "ce_scaled_temperature", "ce_scaled_by_set", "ce_scaled_average", "accuracy_by_group"),
)


def names_in(row: dict[str, Any]) -> dict[str, float | None]:
    """The diagnostics of one line of metrics.jsonl."""
    return {key: value for key, value in row.items() if is_diagnostic(key)}


class Summary:
    """What the row needs of the records so far. A checkpoint holds it, so that a row needs no line of metrics.jsonl.

    val_loss_initial: of the first evaluation, and val_loss_best: the lowest, both in nats per token or None.
    evaluation: the last record with a validation loss, or {}.
    """

    def __init__(self, config: DiagnosticsConfig):
        self._config = config
        self.val_loss_initial: float | None = None
        self.val_loss_best: float | None = None
        self.evaluation: dict[str, Any] = {}
        self._at_step: dict[str, Any] | None = None
        self._last: deque[tuple[int, dict[str, Any]]] = deque()
        self._largest_logit: float | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Take in a line of metrics.jsonl. Lines come in the order of their steps."""
        step = record["step"]
        if "val_loss" in record:
            loss = record["val_loss"]
            if not self.evaluation:  # the weights before the first step of this run
                self.val_loss_initial = loss
            if _finite(loss):
                self.val_loss_best = min(loss, loss if self.val_loss_best is None else self.val_loss_best)
            self.evaluation = {key: record.get(key) for key in _EVALUATION}
        if not (found := names_in(record)):
            return
        if _finite(logit := found.get("attention_logit_max")):
            self._largest_logit = max(logit, logit if self._largest_logit is None else self._largest_logit)
        # Every line has these two. The row keeps them with the diagnostics.
        found |= {key: record[key] for key in ("grad_norm", "clip_coefficient") if key in record}
        if step == self._config.at_step and self._at_step is None:
            self._at_step = {"step": step, **found}
        self._last.append((step, found))
        # The record of an update that diverged is of one step more than the run makes.
        while self._last[0][0] < step - self._config.last_steps:
            self._last.popleft()

    def diagnostics(self, steps: int) -> dict[str, Any]:
        """diagnostics_at_step, diagnostics_last_mean and max_attention_logit of a run that has made `steps` steps.

        A mean over the last steps ignores values that are not finite (null in the file) and records the range of its
        steps. Each field is None if nothing was measured.
        """
        last = [(step, found) for step, found in self._last if step > steps - self._config.last_steps]
        return {
            "diagnostics_at_step": self._at_step,
            "diagnostics_last_mean": _means(last) if last else None,
            "max_attention_logit": self._largest_logit,
        }

    def state(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {
            "val_loss_initial": self.val_loss_initial,
            "val_loss_best": self.val_loss_best,
            "evaluation": self.evaluation,
            "at_step": self._at_step,
            "last": _packed(self._last),
            "largest_logit": self._largest_logit,
        }

    @classmethod
    def of_state(cls, config: DiagnosticsConfig, state: dict[str, Any]) -> Self:
        """The summary whose `state` was kept. Raises LookupError, TypeError or ValueError if it is none."""
        found = cls(config)
        found.val_loss_initial, found.val_loss_best = state["val_loss_initial"], state["val_loss_best"]
        found.evaluation = {**state["evaluation"]}
        found._at_step, found._largest_logit = state["at_step"], state["largest_logit"]
        found._last = deque(_unpacked(state["last"]))
        numbers = (found.val_loss_initial, found.val_loss_best, found._largest_logit, found.evaluation.get("val_loss"))
        if not all(isinstance(value, (int, float, type(None))) for value in numbers):
            raise TypeError("a loss or a logit of its summary is no number")
        if not isinstance(found._at_step, (dict, type(None))):
            raise TypeError("at_step of its summary holds no diagnostics")
        return found

    @classmethod
    def of_records(cls, config: DiagnosticsConfig, records: Iterable[dict[str, Any]]) -> Self:
        """The summary of these lines of metrics.jsonl."""
        found = cls(config)
        for record in records:
            found.add(record)
        return found


def _packed(measured: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Measured steps as plain data: steps, names, and the values as float64 in base64, which is a quarter of their JSON
    and takes a tenth of its time. A value that is missing or None is NaN, which a mean ignores too."""
    measured = list(measured)
    names = list({name: None for _, found in measured for name in found})
    table = [[math.nan if found.get(name) is None else found[name] for name in names] for _, found in measured]
    content = base64.b64encode(np.array(table, "<f8").tobytes()).decode()
    return {"steps": [step for step, _ in measured], "names": names, "values": content}


def _unpacked(packed: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    steps, names = packed["steps"], packed["names"]
    if not all(type(step) is int for step in steps) or not all(isinstance(name, str) for name in names):
        raise TypeError("last of its summary holds no diagnostics")
    table = np.frombuffer(base64.b64decode(packed["values"], validate=True), "<f8").reshape(len(steps), len(names))
    return [(step, dict(zip(names, values, strict=True))) for step, values in zip(steps, table.tolist(), strict=True)]


def _means(measured: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    names = {name: None for _, found in measured for name in found}
    values = {name: [found[name] for _, found in measured if _finite(found.get(name))] for name in names}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    return {"steps": [measured[0][0], measured[-1][0]], "measured": len(measured), **means}


def _finite(value: Any) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
