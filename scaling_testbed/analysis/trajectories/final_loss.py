"""The final loss of an unfinished run, predicted from its last evaluation and from the finished runs of its sweep.

The log of a loss falls by nearly the same amount over the rest of a run in runs of the same schedule, at the same
fraction of their steps: the final loss is the last one times the mean factor by which finished runs fell from there.
The interval is as wide as the errors of this prediction for each finished run from the others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.analysis.trajectories.calibration import FEWEST, half_width
from scaling_testbed.analysis.trajectories.points import Curve

MOST = 40  # finished runs that a prediction uses, the most similar ones first


@dataclass(frozen=True, kw_only=True)
class FinalLoss:
    """A predicted final loss in nats per token, with a 95 % interval for a run that does not diverge.

    step: of the evaluation that it is from. n_runs: the finished runs behind it. like: what these have in common with
    the run. withheld: why there is no prediction; loss, low and high are then None.
    """

    loss: float | None = None
    low: float | None = None
    high: float | None = None
    step: int = 0
    n_runs: int = 0
    like: str = ""
    withheld: str | None = None

    def record(self) -> dict[str, Any]:
        """The prediction as fields of a flat object."""
        return {f"predicted_{key}": value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        if self.loss is None or self.low is None or self.high is None:
            return ""
        width = (self.high - self.low) / 2
        digits = 4 if width < 1e-3 else max(0, 1 - math.floor(math.log10(width)))  # two of the width
        return f"{self.loss:.{digits}f} ± {width:.{digits}f}"


def predict_final(curve: Curve, finished: Sequence[Curve]) -> FinalLoss:
    """The final loss of a run from its curve so far. finished: the curves of finished runs, which did not diverge.

    Runs of another schedule are not used. Of the others, the most similar ones are taken that are FEWEST or more: equal
    in all but the seed, else of the same size of model, else of any.
    """
    if not len(curve.steps):
        return FinalLoss(withheld="no evaluation yet; set evaluation.every_steps in the sweep")
    step = int(curve.steps[-1])
    if step <= curve.warmup:
        return FinalLoss(step=step, withheld="no evaluation after the warm-up yet")
    part = step / len(curve.rates)
    alike = [one for one in finished if _schedule(one) == _schedule(curve) and one.run != curve.run]
    falls = {one.run: fall for one in alike if (fall := _fall_from(one, part)) is not None}
    found = 0
    for like, same in KINDS:
        runs = [one.run for one in alike if one.run in falls and same(one.row, curve.row)][:MOST]
        found = len(runs)
        if found < FEWEST:
            continue
        known = np.array([falls[run] for run in runs])
        errors = [fall - float(np.mean(np.delete(known, place))) for place, fall in enumerate(known)]
        middle, width = math.log(float(curve.losses[-1])) + float(known.mean()), half_width(errors)
        low, loss, high = (math.exp(middle + width * side) for side in (-1, 0, 1))
        return FinalLoss(loss=loss, low=low, high=high, step=step, n_runs=found, like=like)
    return FinalLoss(step=step, n_runs=found, withheld=f"{found} finished runs of this schedule have a curve from "
                     f"there on; {FEWEST} are needed")  # fmt: skip


def _schedule(curve: Curve) -> tuple[Any, ...]:
    """What decides the rates over fractions of a run, but their peak."""
    keys = {key: value for key, value in curve.row.items() if key.startswith("schedule.")}
    return tuple(sorted((key, str(value)) for key, value in keys.items()))


def _fall_from(curve: Curve, part: float) -> float | None:
    """The change of the log of the loss from a part of the steps to the end; None where the curve does not reach."""
    step = part * curve.n_steps
    if len(curve.steps) < 2 or curve.steps[0] > step or curve.steps[-1] != curve.n_steps:
        return None
    logs = np.log(curve.losses)
    return float(logs[-1] - np.interp(math.log(step), np.log(curve.steps), logs))


def _same_but_seed(one: Row, other: Row) -> bool:
    keys = {key for key in (*one, *other) if "." in key and not key.startswith(("logging.", "diagnostics."))}
    return _same_size(one, other) and all(one.get(key) == other.get(key) for key in keys)


def _same_size(one: Row, other: Row) -> bool:
    return one.get("n_params") == other.get("n_params")


Same = Callable[[Row, Row], bool]
KINDS: tuple[tuple[str, Same], ...] = (
    ("all but the seed", _same_but_seed),
    ("the schedule and the size", _same_size),
    ("the schedule", lambda one, other: True),
)
