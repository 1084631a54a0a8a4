"""The final losses of the unfinished runs of a sweep, predicted from its finished runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scaling_testbed.analysis.trajectories.final_loss import FinalLoss, predict_final
from scaling_testbed.analysis.trajectories.points import Curve, curve_of_run, evaluations
from scaling_testbed.errors import UserError
from scaling_testbed.runs.folder import METRICS, read_metrics
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.status import RunState

UNFINISHED = ("running", "stopped", "queued", "hopeless")


def with_predictions(states: Sequence[RunState]) -> list[RunState]:
    """The states, with a predicted final loss of each run that has begun and is not finished.

    The curves are read from metrics.jsonl, and only if there is such a run."""
    begun = [state for state in states if state.state in UNFINISHED and state.step > 0]
    if not begun:
        return list(states)
    finished = [
        curve for state in states if state.state == "finished" and (curve := curve_so_far(state.run)) is not None
    ]
    made = {state.run.run_id: _predicted(state.run, finished) for state in begun}
    return [replace(state, final=made.get(state.run.run_id)) for state in states]


def withheld(states: Sequence[RunState]) -> list[str]:
    """One line for each reason why runs that have begun have no predicted final loss."""
    reasons = Counter(state.final.withheld for state in states if state.final and state.final.withheld)
    return [f"no predicted final loss of {count} runs: {reason}" for reason, count in reasons.items()]


def _predicted(run: PlannedRun, finished: Sequence[Curve]) -> FinalLoss:
    if _by_clock(run):
        return FinalLoss(withheld="budget.hours ends them, so their number of steps is not known")
    curve = curve_so_far(run)
    if curve is None and run.config.get("start.run") is not None:
        return FinalLoss(withheld="they began in the state of another run, so their curves have no beginning")
    if curve is None:
        return FinalLoss(withheld="its curve or its configuration cannot be read")
    return predict_final(curve, finished)


def _by_clock(run: PlannedRun) -> bool:
    """Whether the clock chooses the steps of a run, which the plan then does not know."""
    return run.config.get("budget.hours") is not None


def curve_so_far(run: PlannedRun) -> Curve | None:
    """The curve of a run so far; None if its files or its schedule cannot be read, if the clock ends it, or if the plan
    is of an older version."""
    if "schedule.name" not in run.config or _by_clock(run):
        return None
    row = {**run.config, "run_id": run.run_id, "steps": run.steps, "steps_planned": run.steps, "n_params": run.n_params}
    try:
        steps, losses, _ = evaluations(read_metrics(Path(run.folder) / METRICS), run.run_id)
        return curve_of_run(row, steps, losses)
    except UserError:
        return None
