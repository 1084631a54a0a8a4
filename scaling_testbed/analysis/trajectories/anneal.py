"""An annealing law fitted to some runs, and the curves that it predicts: of other runs, and of a typed schedule."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.fitting import DELTA
from scaling_testbed.analysis.rows.names import number_in
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.analysis.trajectories.annealing import ANNEALING, MOMENTUM, POINTS, Annealed, Fitting
from scaling_testbed.analysis.trajectories.calibration import FEWEST, half_width
from scaling_testbed.analysis.trajectories.points import DECAYED, FEWEST_STEPS, RUN, Curve, rates_of
from scaling_testbed.errors import ConfigError, UserError, check_choice, listed
from scaling_testbed.learning.schedules import SCHEDULES

Record = dict[str, Any]
VARIES = ("schedule.", "optimizer.lr", "budget.", "evaluation.", "logging.", "checkpoint.", "diagnostics.")
FARTHEST = 2.0  # times the fitted peak rate, steps or sum of rates: no interval beyond
ONE_MODEL = ("n_params", "batch_tokens", "data_fingerprint", "dataset")  # an annealing law is of one of each


@dataclass(frozen=True, kw_only=True)
class AnnealReport:
    """A fitted annealing law. runs: each run beside its prediction. asked: the predicted run of a typed schedule, or
    None. curve: its predicted losses at 50 steps. errors: of the log of the final loss of each fitted run, when it is
    left out of the fit; empty if there are too few."""

    fitted: Annealed
    runs: list[Record]
    asked: Record | None
    curve: list[Record]
    errors: list[float]
    warnings: list[str]
    where: list[str] = field(default_factory=list)
    hold_out: list[str] = field(default_factory=list)

    def record(self) -> Record:
        """The content of a saved file."""
        law = ANNEALING[self.fitted.law]
        return {**asdict(self), **asdict(self.fitted), "formula": law.formula, "source": law.source}


def anneal(
    curves: Sequence[Curve],
    law: str = "multi_power",
    *,
    said: Sequence[str] = (),
    where: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    schedule: Sequence[str] = (),
    first_step: int | None = None,
    momentum: float = MOMENTUM,
    points: int = POINTS,
    starts: int = 8,
    delta: float = DELTA,
) -> AnnealReport:
    """Fit an annealing law to the curves that match all of `where` and none of `hold_out`, and predict the others.

    The curves are of one model, batch and data set. Points before `first_step` are left out (None: the end of the
    warm-up, and at least 60 steps). schedule: words as in `rates_typed`, for one more prediction. said: notes on the
    curves. momentum, points, starts, delta: as in Fitting. A prediction has an interval if at least five runs are
    fitted: it is as wide as the errors of final losses when each of them is left out. Raises UserError and ConfigError.
    """
    check_choice("--annealing-law", law, ANNEALING)
    if not 0 < momentum < 1:
        raise ConfigError(f"--momentum must lie between 0 and 1; got {momentum:g}")
    kept, held = _selected(curves, where, hold_out)
    mixed = _mixed(kept, held)
    used = [after for one in kept if len((after := _after(one, first_step)).steps)]
    if not used:
        raise UserError(f"no evaluation of the fitted runs lies at or after step {first_step or FEWEST_STEPS}")
    if not any(one.rates[one.warmup :].min() < one.peak * (1 - DECAYED) for one in used):
        raise UserError(
            "the rate of no fitted run falls after the warm-up, so what a decay gains is not determined; fit a run "
            "with a decay too"
        )
    early = sum(len(one.steps) for one in kept) - sum(len(one.steps) for one in used)
    asked_rates = rates_typed(schedule, kept) if schedule else None
    fitting = Fitting(law, used, momentum=momentum, points=points, starts=starts, delta=delta)
    found = fitting.without()
    errors = _left_out_errors(fitting, used, found) if len(used) >= FEWEST else []
    width = half_width(errors) if errors else None

    def near(rates: np.ndarray) -> float | None:
        return width if _beyond(rates, used) <= FARTHEST else None

    records = [_beside(found, _after(one, first_step), place >= len(kept), near(one.rates))
               for place, one in enumerate([*kept, *held])]  # fmt: skip
    notes = [text for one in held for text in _distant(one.run, one.rates, used)]
    asked, curve = None, []
    if asked_rates is not None:
        words, rates = asked_rates
        steps = np.unique(np.geomspace(max(1, len(rates) / 50), len(rates), 50).round().astype(int))
        losses = found.losses(rates, steps)
        notes += _distant("the typed schedule", rates, used)
        if not losses.min() > 0:
            raise UserError(
                f"{law} has no positive loss for this schedule; {'; '.join(notes) or 'fit it to other runs'}"
            )
        curve = [{"step": int(step), "lr": float(rates[step - 1]), "loss": float(loss)}
                 for step, loss in zip(steps, losses, strict=True)]  # fmt: skip
        asked = {"schedule": words, "steps": len(rates), "predicted": float(losses[-1]),
                 **_ends(float(losses[-1]), near(rates))}  # fmt: skip
    notes += [f"{early} points before the end of the warm-up are left out"] if early else []
    if not errors and (held or asked):
        notes.append(f"no interval: it needs the errors of {FEWEST} fitted runs that are left out in turn; {len(used)} "
                     "are fitted")  # fmt: skip
    return AnnealReport(
        fitted=found,
        runs=records,
        asked=asked,
        curve=curve,
        errors=errors,
        warnings=[*said, *notes, *mixed, *_at_bounds(found)],
        where=list(where),
        hold_out=list(hold_out),
    )


def _selected(
    curves: Sequence[Curve], where: Sequence[str], hold_out: Sequence[str]
) -> tuple[list[Curve], list[Curve]]:
    rows = [{**one.row, RUN: one.run, "steps": one.n_steps} for one in curves]
    kept, held = columns.select(rows, where, hold_out)
    by_run = {one.run: one for one in curves}
    return [by_run[row[RUN]] for row in kept], [by_run[row[RUN]] for row in held]


def _mixed(kept: Sequence[Curve], held: Sequence[Curve]) -> list[str]:
    """Warnings about settings in which the runs differ. Raises UserError if they are of several models or data sets."""
    rows = [one.row for one in (*kept, *held)]
    for key in ONE_MODEL:
        found = list(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None))
        if len(found) > 1:
            raise UserError(f"the runs have {len(found)} values of {key} ({listed(found)}), and an annealing law is of "
                            f"one; choose with --where {key}={found[0]}")  # fmt: skip
    keys = [
        key for key in dict.fromkeys(key for row in rows for key in row) if "." in key and not key.startswith(VARIES)
    ]
    differ = [key for key in keys if len({repr(row.get(key)) for row in rows}) > 1]
    said = [f"the runs also differ in {listed(differ)}: the law describes all of them"] if differ else []
    if len(peaks := {one.peak for one in kept}) > 1:
        said.append(
            f"the fitted runs have {len(peaks)} peak rates, and the laws were shown for runs of one: compare the "
            "errors, or choose with --where"
        )
    return said


def _after(curve: Curve, first_step: int | None) -> Curve:
    """The curve from the first step, or from the end of the warm-up."""
    if first_step is not None and (not isinstance(first_step, int) or first_step < 1):
        raise ConfigError(f"--first-step must be a whole number of at least 1; got {first_step!r}")
    late = curve.steps >= (max(curve.warmup, FEWEST_STEPS) if first_step is None else first_step)
    return Curve(**{**vars(curve), "steps": curve.steps[late], "losses": curve.losses[late]})


def _left_out_errors(fitting: Fitting, curves: Sequence[Curve], found: Annealed) -> list[float]:
    errors = []
    for one in curves:
        without = fitting.without(one.run, found.params)
        errors.append(math.log(float(without.losses(one.rates, one.steps[-1:])[0]) / float(one.losses[-1])))
    return errors


def _beside(found: Annealed, curve: Curve, held: bool, width: float | None) -> Record:
    """A run beside its prediction: the errors over its curve, and its final loss. The interval is for runs that were
    not fitted."""
    shown: Record = {RUN: curve.run, "held_out": held, "steps": int(curve.n_steps), "points": len(curve.steps)}
    if not len(curve.steps):
        return shown
    predicted = found.losses(curve.rates, curve.steps)
    apart = np.abs(predicted / curve.losses - 1)
    actual, last = float(curve.losses[-1]), float(predicted[-1])
    ends = _ends(last, width if held else None)
    inside = None if ends["low"] is None else bool(ends["low"] <= actual <= ends["high"])
    return {**shown, "mean_error": float(apart.mean()), "largest_error": float(apart.max()), "actual": actual,
            "predicted": last, **ends, "relative_error": abs(last - actual) / actual, "inside": inside}  # fmt: skip


def _beyond(rates: np.ndarray, curves: Sequence[Curve]) -> float:
    """The factor by which a schedule lies beyond those of some curves: in peak rate, steps, or sum of rates."""
    most = 1.0
    for size in (np.max, np.size, np.sum):
        own, known = float(size(rates)), [float(size(one.rates)) for one in curves]
        most = max(most, own / max(known), min(known) / own)
    return most


def _distant(name: str, rates: np.ndarray, curves: Sequence[Curve]) -> list[str]:
    far = _beyond(rates, curves)
    if far <= FARTHEST:
        return []
    return [
        f"{name} lies {far:.3g} times beyond the fitted runs in its peak rate, its steps or their sum of rates: no "
        f"interval past {FARTHEST:g} times, since the errors of such schedules are not known"
    ]


def _ends(predicted: float, width: float | None) -> Record:
    if width is None:
        return {"low": None, "high": None}
    return {"low": predicted * math.exp(-width), "high": predicted * math.exp(width)}


def _at_bounds(found: Annealed) -> list[str]:
    """A warning about parameters at a bound, which the curves do not determine."""
    ends = [(one.name, end) for one in ANNEALING[found.law].params for end in (one.low, one.high)]
    odd = [name for name, end in ends if math.isclose(found.params[name], end, rel_tol=1e-6, abs_tol=1e-12)]
    said = "the curves do not determine it; only predictions for schedules like the fitted ones count"
    return [f"{', '.join(odd)} at a bound: {said}"] if odd else []


def rates_typed(words: Sequence[str], curves: Sequence[Curve]) -> tuple[str, np.ndarray]:
    """The rates of a typed schedule, and its keys as text: schedule=NAME, schedule.KEY=VALUE, steps=N, optimizer.lr=X.

    A key that is not typed has the value that all `curves` have, else the schedule's default; steps and optimizer.lr
    must then be typed. Raises ConfigError, which names the word.
    """
    typed: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value) or key in typed:
            raise ConfigError(
                f"{word}: write KEY=VALUE once, e.g. schedule=wsd schedule.decay_fraction=0.2 steps=24000"
            )
        typed[key] = value
    common = {key: values.pop() for key in ("steps", "optimizer.lr") if len(values := _values(curves, key)) == 1}
    name = typed.pop("schedule", "")
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name}: choose one of {', '.join(SCHEDULES)}")
    known = {f"schedule.{one.name}": one for one in fields(SCHEDULES[name]) if one.name != "name"}
    if odd := [key for key in typed if key not in (*known, "steps", "optimizer.lr")]:
        raise ConfigError(f"{odd[0]}={typed[odd[0]]}: the keys are steps, optimizer.lr, {', '.join(known)}")
    found: dict[str, Any] = {}
    for key in ("steps", "optimizer.lr", *known):
        if key in typed:
            number = number_in(typed[key])
            is_text = key in known and isinstance(known[key].default, str)
            if number is None and not is_text:
                raise ConfigError(f"{key}={typed[key]}: it must be a number")
            found[key] = typed[key] if is_text else number
        elif key in known and len(values := _values(curves, key)) == 1:
            found[key] = values.pop()
    if "schedule.warmup" in typed and "schedule.warmup_tokens" not in typed:
        found.pop("schedule.warmup_tokens", None)
    batches = _values(curves, "batch_tokens")
    if found.get("schedule.warmup_tokens") is not None and len(batches) != 1:
        raise ConfigError(
            "schedule.warmup_tokens: the tokens of a batch of these runs are not known; type schedule.warmup"
        )
    steps, peak = found.pop("steps", common.get("steps")), found.pop("optimizer.lr", common.get("optimizer.lr"))
    for key, value in (("steps", steps), ("optimizer.lr", peak)):
        if value is None:
            raise ConfigError(f"the fitted runs have several values of {key}: type {key}=VALUE too")
        if not 0 < value < math.inf or (key == "steps" and value != int(value)):
            raise ConfigError(f"{key}={value:g}: it must be a {'whole ' * (key == 'steps')}number greater than zero")
    made = SCHEDULES[name](**{key.removeprefix("schedule."): value for key, value in found.items()})
    shown = {key: getattr(made, one.name) for key, one in known.items() if getattr(made, one.name) is not None}
    text = " ".join(f"{key}={value}" for key, value in shown.items())
    return f"schedule={name} optimizer.lr={peak:g} {text}", rates_of(
        made, int(steps), float(peak), next(iter(batches), None)
    )


def _values(curves: Sequence[Curve], key: str) -> set[Any]:
    """The values of a key of a run over some curves; of a table its warm-up and its rates are known."""

    def of(curve: Curve) -> Any:
        if key == "steps":
            return curve.n_steps
        if key == "optimizer.lr":
            return curve.peak
        row: Row = curve.row
        return row.get(key, curve.warmup if key == "schedule.warmup" and curve.warmup != 1 else None)

    return {value for value in map(of, curves) if value is not None}
