"""Training curves: the recorded evaluations of each run, each a row with its step, its tokens and its rate.

A law of finished runs can use a point in mid-run only where it is the end of a shorter run: after the warm-up, and
before the rate decays. Laws over the history of the rate (annealing.py) use every point.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.best_runs import at_best_rates
from scaling_testbed.analysis.laws.study import Rows
from scaling_testbed.analysis.rows.given import Given, study_of
from scaling_testbed.analysis.rows.names import is_text, nearest_first, number_in, plain_name
from scaling_testbed.analysis.rows.study import Row, Study, name_of, number
from scaling_testbed.errors import ConfigError, UserError, listed
from scaling_testbed.learning.schedules import SCHEDULES

RUN = "run"  # the column of a point that names its run
FEWEST_STEPS = 60  # earlier points are not fitted, however short the warm-up is
DECAYED = 1e-6  # a rate that lies below its peak by a larger share has decayed
MOST_STEPS = 1e8  # no run has so many updates
TOTALS = ("n_tokens", "flops", "flops_6nd")  # of a run; they grow with its steps


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The training curve of one run.

    row: the columns of the run. steps [n]: the updates before each evaluation, rising, from 1. losses [n]: in nats per
    token. rates: the learning rate of every update up to the last step of the run, as planned: rates[s] is that of the
    update after s updates. warmup: the number of warm-up steps. n_steps: the steps of the whole run.
    """

    run: str
    row: Row
    steps: np.ndarray
    losses: np.ndarray
    rates: np.ndarray
    warmup: int
    n_steps: int

    @property
    def peak(self) -> float:
        """The largest rate of the run."""
        return float(self.rates.max())

    @property
    def at_peak(self) -> np.ndarray:
        """For each evaluation, whether the rate has not fallen below the peak by then."""
        return self.rates[self.steps - 1] >= self.peak * (1 - DECAYED)

    def point(self, place: int) -> Row:
        """One evaluation as a row: the columns of the run with the step, tokens, compute, rate and loss there."""
        step, loss = int(self.steps[place]), float(self.losses[place])
        rate = float(self.rates[step - 1])
        share = {key: self.row[key] * step / self.n_steps for key in TOTALS if number_in(self.row.get(key)) is not None}
        row = {key: value for key, value in self.row.items() if key not in ("tokens_per_param", "derived")}
        of_peak = 1.0 if self.at_peak[place] else rate / self.peak
        row |= {**share, "step": step, "steps": step, "lr": rate, "lr_share": of_peak, "loss": loss}
        if "val_loss" in row:
            row["val_loss"] = loss
        if share.get("n_tokens") and row.get("n_params"):
            row["tokens_per_param"] = share["n_tokens"] / row["n_params"]
        return {**row, RUN: self.run, "label": f"{self.run} step {step}"}


def curves_of(
    given: Given, *, mapping: Sequence[str] = (), size: str = "n_params", warmup_steps: int | None = None
) -> tuple[list[Curve], list[str]]:
    """The training curves of the finished runs of a study, or of a table with one row for each step; and notes.

    A table needs the columns step, lr and loss, and one that names the run if there are several (--map run=COLUMN).
    Rates between its points are interpolated. warmup_steps: the linear warm-up from zero before the first point of each
    run of a table; None: the rate is taken as constant there. mapping, size: as in columns.read. Raises UserError if
    there are no curves, or if the steps of a run repeat or fall, and ConfigError as columns.read does.
    """
    if warmup_steps is not None and (not isinstance(warmup_steps, int) or warmup_steps < 0):
        raise ConfigError(f"--warmup-steps must be a whole number of at least 0; got {warmup_steps!r}")
    study = study_of(given)
    rows, said = columns.of_study(study, mapping, size, of_steps=True)
    if any("step" in row for row in rows):
        return _of_table(rows, study, said, warmup_steps)
    if all(row.get("schema_version") is None for row in rows):
        there = nearest_first("step", columns.as_in_the_table(rows))
        raise UserError(f"{study.path} has no column step; use --map step=COLUMN; the columns are {there}")
    if warmup_steps is not None:
        raise ConfigError("--warmup-steps is for tables; runs of this testbed record their warm-up")
    if mapped := [typed for typed in mapping if typed.partition("=")[0] in ("loss", "step", RUN, "lr")]:
        raise ConfigError(f"--map {mapped[0]}: curves of runs have the step, lr and val_loss of metrics.jsonl")
    return _of_runs(rows, study, said)


def _of_runs(rows: Sequence[Row], study: Study, said: list[str]) -> tuple[list[Curve], list[str]]:
    dense = [row for row in rows if row.get("n_params_average") == row.get("n_params")]
    pruned = f"{len(rows) - len(dense)} runs prune weights, so N changes along their curves, and are left out"
    said = [*said, *([pruned] if len(dense) < len(rows) else [])]
    if not dense:
        raise UserError(f"{study.path} holds no training curve of a dense run: {pruned}")
    begun = [row for row in dense if row.get("start.run") is not None]
    if begun:
        branches = f"{len(begun)} runs began in the state of another run (start.run), so their curves have no beginning"
        if len(begun) == len(dense):
            raise UserError(f"{study.path} holds no training curve of a whole run: {branches}")
        said = [*said, f"{branches}, and are left out"]
        dense = [row for row in dense if row.get("start.run") is None]
    found = [(row, *_evaluations(study, row)) for row in dense]
    curves = [curve_of_run(row, steps, losses) for row, steps, losses, _ in found if len(steps)]
    without, odd = [name_of(row) for row, steps, _, _ in found if not len(steps)], sum(bad for *_, bad in found)
    if not curves:
        raise UserError(
            f"{study.path} holds no training curve: no run has a metrics.jsonl with evaluations after step 0; give "
            "runs/NAME, and set evaluation.every_steps in the sweep"
        )
    said = [*said, *([f"{len(without)} runs have no curve and are left out: {listed(without)}"] if without else [])]
    return curves, [*said, *_left_out(odd)]


def _left_out(odd: int) -> list[str]:
    return [f"{odd} evaluations have no finite loss and are left out"] if odd else []


def _evaluations(study: Study, row: Row) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps and losses of a run's evaluations after step 0, and the number of those without a finite loss."""
    return evaluations(study.trace(row), name_of(row))


def evaluations(records: Sequence[Mapping[str, Any]], run: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps [n] and validation losses [n] of the records of metrics.jsonl after step 0, and the number of evaluations
    that are left out because their loss is not finite. Raises UserError if steps repeat or fall."""
    seen = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record and record["step"] > 0]
    kept = [(step, loss) for step, loss in seen if loss is not None and math.isfinite(loss)]
    _check_rising([step for step, _ in seen], run)
    steps, losses = np.array([step for step, _ in kept], int), np.array([loss for _, loss in kept], float)
    return steps, losses, len(seen) - len(kept)


def _check_rising(steps: Sequence[int], run: str) -> None:
    for before, after in zip(steps, steps[1:], strict=False):
        if after <= before:
            what = f"step {after} is there twice" if after == before else f"step {after} follows step {before}"
            raise UserError(
                f"{run}: {what}; the steps of a run must rise: sort the table, or name the column of the run"
            )


def curve_of_run(row: Row, steps: np.ndarray, losses: np.ndarray) -> Curve:
    """The curve of a run of this testbed from its row or its plan. Raises UserError if its schedule is not known, or if
    it began in the state of another run: the rates of its first steps are not in its row."""
    if row.get("start.run") is not None:
        raise UserError(f"{name_of(row)} began in the state of another run (start.run), so its curve has no beginning")
    schedule = schedule_of(row)
    n_steps = int(number(row, "steps_planned" if row.get("steps_planned") is not None else "steps"))
    batch = number(row, "batch.sequences") * number(row, "batch.sequence_length")
    rates = rates_of(schedule, n_steps, number(row, "optimizer.lr"), batch)
    done = int(number(row, "steps"))
    if len(steps) and steps[-1] > n_steps:
        raise UserError(f"{name_of(row)}: step {steps[-1]} of its curve lies after its last step {n_steps}")
    return Curve(run=name_of(row).removeprefix("run "), row=row, steps=steps, losses=losses, rates=rates,
                 warmup=schedule.warmup_steps(n_steps, batch), n_steps=done)  # fmt: skip


def schedule_of(row: Row) -> Any:
    """The schedule in a row's configuration. Raises UserError if it is not registered, as one of a plug-in."""
    name = str(row.get("schedule.name"))
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise UserError(
            f"{name_of(row)}: there is no schedule {name!r} (known: {known}); load its plug-in by --plugins"
        )
    keys = {one.name: row[f"schedule.{one.name}"] for one in fields(SCHEDULES[name]) if f"schedule.{one.name}" in row}
    return SCHEDULES[name](**keys)


def rates_of(schedule: Any, n_steps: int, peak: float, batch_tokens: float | None = None) -> np.ndarray:
    """The rate of each update of a run of `n_steps` updates [n_steps]. batch_tokens: tokens of a batch, for a warm-up
    that is given in tokens."""
    return np.array([schedule.lr(step, n_steps, peak, batch_tokens) for step in range(n_steps)])


# Tables of other tools.


def _of_table(
    rows: Sequence[Row], study: Study, said: list[str], warmup_steps: int | None
) -> tuple[list[Curve], list[str]]:
    for key in ("lr", "loss"):
        if not any(key in row for row in rows):
            there = nearest_first(key, columns.as_in_the_table(rows))
            raise UserError(f"{study.path} has no column {key}; use --map {key}=COLUMN; the columns are {there}")
    rows = [row for row in rows if number(row, "step") != 0]
    column = _run_column(rows)
    said = [*said, *([f"the column {column} tells the runs apart"] if column else [])]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(column)) if column else study.name, []).append(row)
    curves, odd = [], 0
    for run, points in groups.items():
        curve, left_out = _curve_of_table(run, points, warmup_steps)
        odd += left_out
        curves += [curve] if len(curve.steps) else []
    if not curves:
        raise UserError(f"{study.path}: no row has a finite loss after step 0")
    if warmup_steps is None and (late := [one for one in curves if not one.warmup and one.steps[0] > 1]):
        first = late[0]
        said.append(
            f"the rate before the first point of {first.run} (step {first.steps[0]}) is taken as {first.rates[0]:.3g}; "
            "type a linear warm-up from zero with --warmup-steps N"
        )
    return curves, [*said, *_left_out(odd)]


def _run_column(rows: Sequence[Row]) -> str | None:
    """The column that names the run of each row; None if the rows are of one run.

    It is `run`, else one whose name says so, else the one column of texts within whose values the steps rise. Raises
    UserError if there is none, or if several columns of texts divide the rows in different ways.
    """
    names = list(dict.fromkeys(key for row in rows for key in row if key not in ("row", "label")))
    if RUN in names:
        return RUN
    if named := [name for name in names if columns.RUN.search(plain_name(name)) and _rises(rows, name)]:
        return named[0]
    if _rises(rows, None):
        return None
    texts = [name for name in names if is_text(name) or any(isinstance(row.get(name), str) for row in rows)]
    fits = [name for name in texts if _rises(rows, name)]
    ways = {tuple(str(row.get(name)) for row in rows): name for name in fits}
    if len(ways) == 1:
        return fits[0]
    if not fits:
        raise UserError(
            "the steps repeat or fall, and no column tells the runs apart; name one with --map run=COLUMN; the columns "
            f"are {nearest_first(RUN, names)}"
        )
    raise UserError(f"{' and '.join(ways.values())} divide the rows into different runs; choose with --map run=COLUMN")


def _rises(rows: Sequence[Row], column: str | None) -> bool:
    """Whether the steps rise within each value of a column, or from the first row to the last."""
    last: dict[str, float] = {}
    for row in rows:
        run, step = str(row.get(column)) if column else "", number(row, "step")
        if step <= last.get(run, 0.0):
            return False
        last[run] = step
    return True


def _curve_of_table(run: str, rows: Sequence[Row], warmup_steps: int | None) -> tuple[Curve, int]:
    """The curve of the rows of one run, and the number of rows without a finite loss. The last row is that of the run:
    a column of totals that grows is taken as it is there."""
    steps = [number(row, "step") for row in rows]
    for step, row in zip(steps, rows, strict=True):
        if not (step > 0 and step == int(step)):
            raise UserError(f"{name_of(row)}: step must be a whole number of updates; got {row['step']}")
        if not 0 <= number(row, "lr") < math.inf:
            raise UserError(f"{run} step {step:g}: lr must be a number of at least 0; got {row.get('lr')}")
    _check_rising([int(step) for step in steps], run)
    if steps[-1] > MOST_STEPS:
        raise UserError(
            f"{run}: step {steps[-1]:.3g} is no number of updates; are these tokens? "
            '--map "step=step/TOKENS_OF_A_BATCH"'
        )
    known = np.array([number(row, "lr") for row in rows])
    if known.max() == 0:
        raise UserError(f"{run}: lr is 0 at every step; use --map lr=COLUMN")
    losses, at = np.array([number(row, "loss") for row in rows]), np.array(steps, int)
    rates = np.interp(np.arange(1, at[-1] + 1), at, known)
    top = int(np.argmax(known))
    rises = top > 0 and bool(np.all(np.diff(known[: top + 1]) > 0))
    if warmup_steps:
        line = known[0] * np.arange(1, warmup_steps + 1)[: len(rates)] / warmup_steps
        rates[:warmup_steps] = np.minimum(rates[:warmup_steps], line)
    warmup = warmup_steps if warmup_steps is not None else int(at[top]) if rises else 0
    kept = np.isfinite(losses)
    row = {**rows[-1], **{key: _total(rows, key, at) for key in TOTALS if key in rows[-1]}}
    batch, tokens = number_in(row.get("batch_tokens")), number_in(row.get("n_tokens"))
    if batch and tokens and not math.isclose(batch * int(at[-1]), tokens, rel_tol=0.02):
        raise UserError(
            f"{run}: {int(at[-1])} steps of {batch:g} tokens are not its {tokens:g} tokens; is the batch in sequences? "
            '--map "batch_tokens=COLUMN*SEQUENCE_LENGTH"'
        )
    if batch and not tokens:
        row = columns.derived({**row, "n_tokens": batch * int(at[-1])})
    elif tokens and not batch:
        row = {**row, "batch_tokens": tokens / int(at[-1])}
    return Curve(run=run, row=row, steps=at[kept], losses=losses[kept], rates=rates, warmup=warmup,
                 n_steps=int(at[-1])), int(np.sum(~kept))  # fmt: skip


def _total(rows: Sequence[Row], key: str, steps: np.ndarray) -> Any:
    """The tokens or the compute of a run at its last row. Raises UserError if they neither grow as its steps do nor are
    the same in every row, as the total of a run is."""
    values = [number_in(row.get(key)) for row in rows]
    if None in values:
        return None
    found = np.array(values, float)
    if not (np.allclose(found, found[-1], rtol=1e-6) or np.allclose(found, found[-1] * steps / steps[-1], rtol=0.02)):
        raise UserError(f"{name_of(rows[0])}: {key} does not grow in proportion to the steps; use --map {key}=COLUMN")
    return found[-1]


# The points that laws of finished runs can use.


def law_points(
    given: Given,
    *,
    mapping: Sequence[str] = (),
    size: str = "n_params",
    first_step: int | None = None,
    warmup_steps: int | None = None,
    decayed: bool = False,
    best_lr: bool = False,
) -> Rows:
    """Rows of points for laws of the loss. decayed: as in `points_of`. best_lr: only of the runs that at_best_rates
    keeps. Raises as that function, `curves_of` and `points_of` do."""
    curves, said = curves_of(given, mapping=mapping, size=size, warmup_steps=warmup_steps)
    if best_lr:
        chosen, why = at_best_rates([{**curve.row, RUN: curve.run} for curve in curves])
        names = {row[RUN] for row in chosen}
        curves, said = [curve for curve in curves if curve.run in names], [*said, *why]
    rows, left_out = points_of(curves, first_step=first_step, decayed=decayed)
    return Rows(rows=rows, said=[*said, *left_out], origin=str(study_of(given).path), mapping=mapping, run=RUN)


def points_of(
    curves: Sequence[Curve], *, first_step: int | None = None, decayed: bool = False
) -> tuple[list[Row], list[str]]:
    """The evaluations that are ends of shorter runs, as rows, and notes on those that are left out.

    Left out are points before `first_step` (None: twice the warm-up and at least 60 steps), and points where the rate
    has decayed, except the last one of each run: a run that had decayed by then would have had another rate before.
    decayed: keep these too, for an envelope, which takes the lowest run. Raises ConfigError for a wrong `first_step`,
    and UserError if no point is left.
    """
    if first_step is not None and (not isinstance(first_step, int) or first_step < 1):
        raise ConfigError(f"--first-step must be a whole number of at least 1; got {first_step!r}")
    rows, early, falling = [], 0, 0
    for curve in curves:
        begin = max(2 * curve.warmup, FEWEST_STEPS) if first_step is None else first_step
        late, last = curve.steps >= begin, np.arange(len(curve.steps)) == len(curve.steps) - 1
        whole = last & (curve.steps == curve.n_steps)
        kept = late & (curve.at_peak | whole | decayed)
        early, falling = early + int(np.sum(~late)), falling + int(np.sum(late & ~kept))
        rows += [curve.point(int(place)) for place in np.flatnonzero(kept)]
    rule = f"step {first_step}" if first_step is not None else f"twice the warm-up, or {FEWEST_STEPS} steps,"
    said = [f"{early} points before {rule} are left out; --first-step N sets another"] if early else []
    if falling:
        said.append(
            f"{falling} points after the rate has begun to decay are left out: they are no ends of shorter runs"
        )
    if not rows:
        raise UserError("; ".join(["no point of the curves can be used", *said]))
    return rows, said
