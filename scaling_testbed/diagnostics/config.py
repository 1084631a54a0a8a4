"""What can be set about diagnostics, free of torch."""

from dataclasses import dataclass, field

from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import EXECUTION_ONLY


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """When the inside of a model is measured; switching it on or off changes no weight.

    every_steps: at the first, every so many, and the last step; 0: never. at_step: also at this step, whose values the
        row keeps as `diagnostics_at_step` (2000 in Wortsman et al. 2023, Fig. 9).
    last_steps: the row keeps the means over the measured ones of so many last steps, as `diagnostics_last_mean` (500
        in Fig. 11).
    sequences: of the step's batch that the extra forward pass sees; null: all of it, a micro-batch at a time.
    per_head: also the largest attention score of each head.
    """

    every_steps: int = field(default=0, metadata=EXECUTION_ONLY)
    at_step: int | None = field(default=None, metadata=EXECUTION_ONLY)
    last_steps: int = field(default=500, metadata=EXECUTION_ONLY)
    sequences: int | None = field(default=32, metadata=EXECUTION_ONLY)
    per_head: bool = field(default=False, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        if self.every_steps < 0:
            raise ConfigError(f"every_steps must not be negative; got {self.every_steps}")
        for key in ("at_step", "last_steps", "sequences"):
            check_positive(key, getattr(self, key))

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the update that makes `step` of `steps` is measured."""
        if step == self.at_step:
            return True
        return self.every_steps > 0 and (step % self.every_steps == 0 or step in (1, steps))
