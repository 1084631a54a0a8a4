"""Mirror the records of a run to event files of TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.runs.mirrors.mirror import Record, numbers

FLUSH_SECONDS = 10  # how old the file may be that TensorBoard reads during a run


class TensorBoard:
    """The event file in `folder`. It replaces those of earlier starts."""

    def __init__(self, folder: Path, rows: Sequence[Record]):
        from torch.utils import tensorboard  # needs the package tensorboard

        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._writer: Any = tensorboard.writer.SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
        for row in rows:
            self.log(row)

    def log(self, row: Record) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, float(value), row["step"])

    def finish(self, row: dict[str, Any]) -> None:
        self._writer.close()

    def fail(self) -> None:
        self._writer.close()
