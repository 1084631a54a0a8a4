"""The number of steps of a run, which with budget.hours the clock chooses while it trains.

The clock decides at the end of an update whether the rest of the schedule still fits. All else follows from the number
of updates: the rates of the whole run are then those of a run of so many steps.
"""

from scaling_testbed.config.run import RunConfig
from scaling_testbed.progress import Clock


class Length:
    """The number of steps of `run`.

    steps: those of the budget until the clock has chosen, which are its upper limit. chosen: the number that the clock
    chose; None before that, and without budget.hours. clock: that of the run's progress, over all its starts.
    """

    def __init__(self, run: RunConfig, steps: int):
        self.steps = steps
        self.chosen: int | None = None
        self.clock = Clock()
        self._run = run
        self._first: int | None = None
        self._since: tuple[int, float] | None = None

    @property
    def by_clock(self) -> bool:
        """Whether the run has budget.hours."""
        return self._run.budget.hours is not None

    def shortest(self, made: int) -> int:
        """The steps of the run if it ends as soon as it can, one update or more after `made`, and at most all."""
        tokens = self._run.batch.tokens
        found = self._run.schedule.shortest(made + 1, self._run.schedule.warmup_steps(self.steps, tokens))
        assert found is not None, "the configuration refuses a schedule that cannot end early"
        return min(found, self.steps)

    def is_due(self, made: int) -> bool:
        """Whether by this process's clock the run must end as soon as it can after `made` updates, because it would not
        end in time if it made one more before. The seconds of a step are the mean of this start, evaluations and
        checkpoints included, from its second update on."""
        if not self.by_clock or self.chosen is not None:
            return False
        now = self.clock.wall_seconds
        if self._first is None:
            self._first = made
        elif self._since is None and made > self._first:
            self._since = made, now
        steps, seconds = (made - self._since[0], now - self._since[1]) if self._since else (0, 0.0)
        left = 3600 * (self._run.budget.hours or 0.0) - now
        return left <= (self.shortest(made + 1) - made) * (seconds / steps if steps else 0.0)

    def choose(self, made: int) -> str | None:
        """End the run as soon as it can after `made` updates, of which every process has made as many. Returns what to
        say; None if the budget ends the run as soon."""
        if self.chosen is not None or (steps := self.shortest(made)) >= self.steps:
            return None
        self.restore(steps)
        return f"budget.hours={self._run.budget.hours:g} ends the run at step {steps:,}; {made:,} are made"

    def restore(self, chosen: int | None) -> None:
        """Take the number that the clock chose in an earlier start, if it is not None."""
        if chosen is not None:
            self.steps = self.chosen = chosen
