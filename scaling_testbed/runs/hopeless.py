"""The call that an unfinished run is hopeless: hopeless.json in its folder says why the run was asked to save and end.

The driver of a sweep writes the file, and then sends the signal. A run that a signal stops reads the file and takes the
status hopeless; without the file its status is preempted. A start of the run deletes the file. The row of a run that
has ended before the signal came is final, whatever the file says.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from scaling_testbed.errors import UserError
from scaling_testbed.files import cannot_write, read_json, write_json
from scaling_testbed.runs.row import is_number

HOPELESS_FILE = "hopeless.json"


@dataclass(frozen=True, kw_only=True)
class Hopeless:
    """Why a run was called hopeless. Losses are in nats per token.

    step: of the evaluation behind the prediction. predicted_loss, predicted_low, predicted_high: the final loss that
    was predicted, and its 95 % interval. predicted_n_runs, predicted_like: the finished runs behind it, and what they
    have in common with the run. best_loss, best_run: the lowest final loss of the finished runs of the same size,
    tokens and data, and the id of its run. margin: the low end lies above best_loss by more than this.
    """

    step: int
    predicted_loss: float
    predicted_low: float
    predicted_high: float
    predicted_n_runs: int
    predicted_like: str
    best_loss: float
    best_run: str
    margin: float

    @property
    def excess(self) -> float:
        """By how much the low end of the interval lies above the best loss."""
        return self.predicted_low - self.best_loss

    def __str__(self) -> str:
        return (
            f"predicted final loss {self.predicted_low:.4g} to {self.predicted_high:.4g} at step {self.step:,}, more "
            f"than {self.margin:g} nats above {self.best_loss:.4g} of run {self.best_run}"
        )

    def write(self, folder: Path) -> None:
        """Write hopeless.json into the folder of the run. Raises UserError if it cannot be written."""
        write_json(folder / HOPELESS_FILE, asdict(self))


def read_call(folder: Path) -> Hopeless | None:
    """What hopeless.json in the folder of a run says; None if there is no such file, or if it is damaged: the run then
    counts as stopped, and continues."""
    kinds = get_type_hints(Hopeless)
    try:
        found = read_json(folder / HOPELESS_FILE)
    except UserError:
        return None
    if set(found) != {one.name for one in fields(Hopeless)}:
        return None
    for name, value in found.items():
        if not (isinstance(value, str) if kinds[name] is str else _is_finite(value)):
            return None
        if kinds[name] is int and not isinstance(value, int):
            return None
    return Hopeless(**found)


def _is_finite(value: object) -> bool:
    return is_number(value) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def forget_call(folder: Path) -> None:
    """Delete hopeless.json: the run continues. Raises UserError if this fails."""
    path = folder / HOPELESS_FILE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
