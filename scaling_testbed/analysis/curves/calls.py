"""Calls: which learning rates will harm a size that was not trained, from smaller sizes; and whether they were right.

A rate harms a size if the mean loss over seeds is at least `excess` above the best of that size, see critical_rate.py.
It is called in two ways (Wortsman et al. 2023, section 3.3, does the first):

- by the quantity, e.g. the largest attention score: its fit in log N at this rate, extrapolated, passes a threshold,
  which is learnt from the fitted sizes: it divides harmed places from others with the fewest errors.
- by the critical rate: a straight line through its logarithm against log N, of all seeds, is extrapolated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from scaling_testbed.analysis.curves import instability, lr_sensitivity
from scaling_testbed.analysis.curves.critical_rate import EXCESS
from scaling_testbed.analysis.curves.grouping import Curve, curves
from scaling_testbed.analysis.curves.instability import Quantity, fit_log_log
from scaling_testbed.analysis.curves.intervals import exact_share
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity, capped, final_loss
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import SIZE, Row, Study, number
from scaling_testbed.errors import UserError

HARMED, FINE = "harmed", "fine"


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is predicted for one condition, size and rate.

    excess: the loss above the best, in nats, from which a rate harms. predicted, low, high: the quantity and its 95 %
    prediction interval; None where it has no fit. threshold: above it a rate harms. critical_lr, critical_low,
    critical_high: of the size, None if it cannot be extrapolated. by_quantity, by_critical_rate: harmed | fine; None
    where there is no prediction.
    """

    condition: dict[str, str]
    model: str
    n_params: float
    lr: float
    excess: float
    quantity: str
    threshold: float
    predicted: float | None
    low: float | None
    high: float | None
    by_quantity: str | None
    critical_lr: float | None
    critical_low: float | None
    critical_high: float | None
    by_critical_rate: str | None

    def record(self) -> dict[str, object]:
        """The call as one flat row for tables, CSV and JSON."""
        own = {key: value for key, value in vars(self).items() if key != "condition"}
        return {**self.condition, **own}


def make_calls(
    study: Study,
    group: Sequence[str],
    quantity: Quantity,
    model: str,
    n_params: Callable[[Row], float],
    excess: float = EXCESS,
    lr_range: tuple[float, float] = lr_sensitivity.DEFAULT_RANGE,
) -> list[Call]:
    """The calls for a model at each rate of the study, from all sizes below it.

    n_params: the N of the model in a condition, told by one of its rows. Raises UserError if the study has no smaller
    size, or no row with the quantity.
    """
    every = lr_sensitivity.analyse(study, group, lr_range=lr_range, excess=excess)
    found = []
    for condition in dict.fromkeys(tuple(one.curve.condition.items()) for one in every):
        own = [one for one in every if tuple(one.curve.condition.items()) == condition and one.curve.runs]
        if not own:  # only planned
            continue
        target = n_params(own[0].curve.settings)
        smaller = [one for one in own if 0 < one.curve.n_params < target]
        if not smaller:
            raise UserError(f"{study.path} has no size below {model}, N={target:g}, to predict it from")
        found += _calls(study, group, quantity, model, target, smaller, excess)
    return found


def _calls(
    study: Study,
    group: Sequence[str],
    quantity: Quantity,
    model: str,
    target: float,
    smaller: Sequence[Sensitivity],
    excess: float,
) -> list[Call]:
    condition = smaller[0].curve.condition
    rows = [row for one in smaller for row in one.curve.runs.values()]
    series, _ = instability.analyse(Study(**{**vars(study), "rows": rows, "missing": []}), group, quantity)
    threshold = learnt_threshold(*places_of([one.curve for one in smaller], quantity, excess), quantity.threshold)
    critical, low, high = _critical_rate(smaller, target)
    calls = []
    for one in sorted(series, key=lambda one: one.lr):
        predicted = one.fit.predict(target) if one.fit else (None, None, None)
        by_quantity = None if predicted[0] is None else HARMED if predicted[0] > threshold else FINE
        by_critical = None if critical is None else HARMED if one.lr > critical else FINE
        call = Call(
            condition=condition,
            model=model,
            n_params=target,
            lr=one.lr,
            excess=excess,
            quantity=quantity.name,
            threshold=threshold,
            predicted=predicted[0],
            low=predicted[1],
            high=predicted[2],
            by_quantity=by_quantity,
            critical_lr=critical,
            critical_low=low,
            critical_high=high,
            by_critical_rate=by_critical,
        )
        calls.append(call)
    return calls


def harmed(curve: Curve, excess: float = EXCESS) -> dict[float, bool]:
    """Whether each rate of a curve harms it: the mean over the seeds that were run at it is `excess` above the best. A
    diverged seed counts as its loss at initialisation."""
    means = {}
    for lr in curve.lrs:
        rows = curve.rows(lr)
        if rows:
            losses = capped([final_loss(row) for row in rows], [number(row, "val_loss_initial") for row in rows])
            means[lr] = float(losses.mean())
    return {lr: mean >= min(means.values()) + excess for lr, mean in means.items()}


def places_of(found: Sequence[Curve], quantity: Quantity, excess: float) -> tuple[list[float], list[bool]]:
    """The geometric mean of the quantity over seeds, and whether the rate harms, for each size and rate."""
    values, bad = [], []
    for curve in found:
        for lr, is_harmed in harmed(curve, excess).items():
            known = [value for row in curve.rows(lr) if (value := instability.value_of(row, quantity)) is not None]
            if known:
                values.append(math.exp(float(np.mean(np.log(known)))))
                bad.append(is_harmed)
    return values, bad


def learnt_threshold(values: Sequence[float], bad: Sequence[bool], default: float) -> float:
    """The threshold above which `bad` holds with the fewest errors: the geometric mean of its two neighbours.

    Of several such thresholds, the middle one. `default`, if all or none are bad.
    """
    if len(set(bad)) < 2:
        return default
    order = np.argsort(values)
    value, is_bad = np.asarray(values, float)[order], np.asarray(bad)[order]
    # A cut after place i calls i + 1 values fine, and all others bad.
    errors = [int(is_bad[: i + 1].sum() + (~is_bad[i + 1 :]).sum()) for i in range(len(value) - 1)]
    best = [i for i, count in enumerate(errors) if count == min(errors)]
    at = best[len(best) // 2]
    return math.sqrt(value[at] * value[at + 1])


def _critical_rate(found: Sequence[Sensitivity], target: float) -> tuple[float | None, float | None, float | None]:
    """The extrapolated critical rate of a size, and its 95 % prediction interval for one seed; None if unknown.

    Two sizes always lie on a line, so they give no interval.
    """
    points = [
        (one.curve.n_params, value)
        for one in found
        for value in (one.critical.by_seed.values() if one.critical else ())
    ]
    sizes = {n for n, _ in points}
    if len(sizes) < 2 or not all(math.isfinite(value) for _, value in points):
        return None, None, None
    n_params, values = zip(*points, strict=True)
    if fit := fit_log_log(n_params, np.exp(values).tolist(), degree=1):
        return fit.predict(target)
    slope, level = np.polyfit(np.log(n_params), values, 1)
    return math.exp(level + slope * math.log(target)), None, None


OUTCOMES = ("measured", "right_by_quantity", "right_by_critical_rate")
NO_CONDITION = {"row", *OUTCOMES, *(one.name for one in fields(Call))}  # columns of calls


@dataclass(frozen=True)
class Outcomes:
    """Calls beside what was measured.

    records: a call each, with OUTCOMES: `measured` (harmed | fine), and whether each way to call was right; None where
    it is not known. unbounded: how many are not known because not every called rate of their size was run.
    """

    records: list[dict[str, object]]
    unbounded: int = 0

    def notes(self) -> list[str]:
        """For each way to call, how many calls were right, with the exact 95 % interval; and of these, how many of the
        decided ones, whose interval leaves one answer."""
        said = []
        for way in ("by_quantity", "by_critical_rate"):
            known = [row for row in self.records if row.get(f"right_{way}") is not None]
            if not known:
                continue
            right = sum(bool(row[f"right_{way}"]) for row in known)
            low, high = exact_share(right, len(known))
            words = f"{way.replace('_', ' ')}: {right} of {len(known)} calls right, {right / len(known):.0%}"
            decided = [bool(row[f"right_{way}"]) for row in known if _is_decided(row, way)]
            words += f" [{low:.0%}, {high:.0%}]; their interval decides {len(decided)}, {sum(decided)} of them rightly"
            said.append(words)
        said += ["the intervals take calls as independent; those of one size are not quite"] if said else []
        said = said or ["no call has an outcome yet"]
        if self.unbounded:
            why = "not every called rate of their size was run with all seeds, so a lower loss may be found"
            said.append(f"without an outcome, though they look fine: {self.unbounded}; {why}")
        return said


def _is_decided(row: Row, way: str) -> bool:
    """Whether both ends of the 95 % interval of a call lie on one side of its threshold: of the quantity, or the rate
    for the critical rate."""
    low, high, at = ("low", "high", "threshold") if way == "by_quantity" else ("critical_low", "critical_high", "lr")
    ends = [math.nan if row.get(end) is None else number(row, end) for end in (low, high)]
    return all(end > number(row, at) for end in ends) or all(end < number(row, at) for end in ends)


def outcomes(calls: Sequence[Row], study: Study, group: Sequence[str] = (), excess: float = EXCESS) -> Outcomes:
    """The calls of `Call.record`, each with its outcome in a study that has the called sizes.

    A rate has an outcome if all seeds of its size were run at it. Whether it is fine is known only if all rates that
    were called for the size were run: another one may be better. That it is harmed is known before.
    group: the keys of the condition, by default those that the calls have. excess: of calls that do not tell theirs.
    """
    keys = group or [key for key in dict.fromkeys(key for row in calls for key in row) if key not in NO_CONDITION]
    found = {
        (tuple(curve.condition.items()), round(curve.n_params)): curve
        for curve in curves(study, keys, SIZE)
        if not curve.missing
    }

    def place_of(row: Row) -> tuple[tuple[tuple[str, str], ...], int]:
        return tuple((key, text(row.get(key))) for key in keys), round(number(row, "n_params"))

    called: dict[object, set[str]] = {}
    for row in calls:
        called.setdefault(place_of(row), set()).add(f"{number(row, 'lr'):g}")
    records, unbounded = [], 0
    for row in calls:
        bad = _measured(found.get(place_of(row)), number(row, "excess") if row.get("excess") else excess)
        is_bad = bad.get(f"{number(row, 'lr'):g}")
        is_whole = called[place_of(row)] <= set(bad)
        measured = HARMED if is_bad else FINE if is_bad is False and is_whole else None
        unbounded += is_bad is False and not is_whole
        right = {
            f"right_{way}": None if measured is None or not row.get(way) else row[way] == measured
            for way in ("by_quantity", "by_critical_rate")
        }
        records.append({**row, "measured": measured, **right})
    return Outcomes(records, unbounded)


def _measured(curve: Curve | None, excess: float) -> dict[str, bool]:
    """Whether each rate that was run with all seeds of its size harms it."""
    if curve is None:
        return {}
    whole = [lr for lr in curve.lrs if all((lr, seed) in curve.runs for seed in curve.seeds)]
    return {f"{lr:g}": is_bad for lr, is_bad in harmed(replace(curve, lrs=whole), excess).items()}
