"""Which runs of a sweep are hopeless while they train, by their predicted final losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.trajectories.final_loss import FinalLoss, predict_final
from scaling_testbed.analysis.trajectories.points import Curve
from scaling_testbed.runs.hopeless import Hopeless
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.predicted import curve_so_far
from scaling_testbed.sweeps.status import RunState, last_metrics

EARLIEST = 0.25  # of the steps: the intervals of earlier predictions were not measured, and those of a run at a rate
# unlike the finished ones are too narrow there
SAME = (
    "data.",
    "tokenizer.",
    "evaluation.",
    "batch.sequence_length",
    "start.take",
    "start.grow",
)  # what decides on which windows a loss is


def hopeless(run: PlannedRun, final: FinalLoss, finished: Sequence[RunState], margin: float) -> Hopeless | None:
    """The call that a run is hopeless, or None.

    It is if the low end of its predicted final loss lies more than `margin` nats above the lowest final loss of the
    finished runs with the same size of model, the same tokens and the same data and evaluation. None without such a
    run, and where the prediction is withheld.
    """
    rivals = [
        (one.loss, one.run.run_id) for one in finished if one.loss is not None and _setting(one.run) == _setting(run)
    ]
    if not rivals or final.loss is None or final.low is None or final.high is None:
        return None
    best_loss, best_run = min(rivals)
    if final.low - best_loss <= margin:
        return None
    return Hopeless(
        step=final.step,
        predicted_loss=final.loss,
        predicted_low=final.low,
        predicted_high=final.high,
        predicted_n_runs=final.n_runs,
        predicted_like=final.like,
        best_loss=best_loss,
        best_run=best_run,
        margin=margin,
    )


def _setting(run: PlannedRun) -> tuple[Any, ...]:
    """The size, the tokens, the data and the evaluation of a run: final losses of equal ones can be compared."""
    keys = sorted(key for key in run.config if key.startswith(SAME))
    return (run.n_params, run.n_tokens, *((key, str(run.config[key])) for key in keys))


class Judge:
    """Calls runs hopeless by one margin, in nats.

    It looks at a run once for each evaluation from EARLIEST of its steps on, and reads the curve of a finished run
    once. A part of a trunk is never called, because other runs need its end. others: states of runs of the sweep beside
    those that it is asked about.
    """

    def __init__(self, margin: float, others: Sequence[RunState] = ()):
        self.margin = margin
        self._others = [state for state in others if state.state == "finished"]
        self._curves: dict[str, Curve | None] = {}
        self._seen: dict[str, int] = {}

    def begin(self, run: PlannedRun) -> None:
        """Take the evaluations that a run has when it starts as seen: what it did before may be done again."""
        self._seen[run.run_id] = self._evaluated(run)

    def call(self, run: PlannedRun, states: Sequence[RunState]) -> Hopeless | None:
        """The call after a new evaluation of a run; None without one. states: of the runs of the sweep."""
        step = self._evaluated(run)
        if run.is_part or step <= self._seen.get(run.run_id, 0) or not EARLIEST * run.steps <= step < run.steps:
            return None
        self._seen[run.run_id] = step
        curve = curve_so_far(run)
        if curve is None:
            return None
        known = [*self._others, *(state for state in states if state.state == "finished")]
        finished = [state for state in known if not state.run.is_part]
        curves = [found for state in finished if (found := self._curve(state.run)) is not None]
        return hopeless(run, predict_final(curve, curves), finished, self.margin)

    def _curve(self, run: PlannedRun) -> Curve | None:
        if run.run_id not in self._curves:
            self._curves[run.run_id] = curve_so_far(run)
        return self._curves[run.run_id]

    @staticmethod
    def _evaluated(run: PlannedRun) -> int:
        """The step of the last evaluation, from the last step of metrics.jsonl; 0 if a run evaluates only its end."""
        every = run.config.get("evaluation.every_steps")
        return int(last_metrics(Path(run.folder)).get("step", 0)) // every * every if every else 0
