"""The configuration of diagnostics, without torch."""

from dataclasses import dataclass

from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import EXECUTION_ONLY, key


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """When diagnostics of the model are measured. A measurement changes no weight."""

    every_steps: int = key(
        0, "Measure at the first step, every so many steps, and at the last step. 0: never.", identity=EXECUTION_ONLY
    )
    at_step: int | None = key(
        None,
        "Measure also at this step. The row keeps its values as diagnostics_at_step (step 2000 in Wortsman et al. "
        "2023, Fig. 9).",
        identity=EXECUTION_ONLY,
    )
    last_steps: int = key(
        500,
        "The row keeps the mean over the measured steps among so many last ones, as diagnostics_last_mean (500 in "
        "Wortsman et al. 2023, Fig. 11).",
        identity=EXECUTION_ONLY,
    )
    sequences: int | None = key(
        32,
        "Sequences of the step's batch that the extra forward pass sees. null: all of them, a micro-batch at a time.",
        identity=EXECUTION_ONLY,
    )
    per_head: bool = key(
        False, "Whether the largest attention score of each head is recorded too.", identity=EXECUTION_ONLY
    )

    def __post_init__(self):
        if self.every_steps < 0:
            raise ConfigError(f"every_steps must not be negative; got {self.every_steps}")
        for name in ("at_step", "last_steps", "sequences"):
            check_positive(name, getattr(self, name))

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the update that completes `step` of `steps` is measured."""
        if step == self.at_step:
            return True
        return self.every_steps > 0 and (step % self.every_steps == 0 or step in (1, steps))
