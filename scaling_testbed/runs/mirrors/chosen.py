"""The mirrors of metrics.jsonl that a run asks for."""

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scaling_testbed.config.run import RunConfig, flatten, run_id
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.runs.mirrors.csv_file import CsvFile
from scaling_testbed.runs.mirrors.mirror import Mirror, Record
from scaling_testbed.runs.mirrors.tensorboard import TensorBoard
from scaling_testbed.runs.mirrors.wandb import wandb_mirror


def open_mirrors(run: RunConfig, folder: RunFolder, rows: Sequence[Record]) -> list[Mirror]:
    """Open the mirrors of a start of `run`, beside its first steps. rows: the lines of metrics.jsonl so far."""
    found: list[Mirror | None] = []
    if run.logging.csv:
        found.append(Mirror("csv", partial(CsvFile, folder.path), rows))
    if run.logging.tensorboard:
        found.append(Mirror("tensorboard", partial(TensorBoard, folder.path / "tensorboard"), rows))
    if run.logging.wandb:
        flat = flatten(run)
        config = flat | axes(folder.path, flat)
        found.append(wandb_mirror(run.logging, folder.path, run_id(run), run.name, config, rows))
    return [mirror for mirror in found if mirror is not None]


def axes(folder: Path, flat_config: dict[str, Any]) -> dict[str, Any]:
    """What the sweep of the run in `folder` varies, as axes.KEY -> the value of this run; {} for a run without a sweep.
    flat_config: of the run. A key that it lacks, such as model, has its text from plan.jsonl in the sweep's folder."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        for line in (folder.parent / "plan.jsonl").read_bytes().splitlines():
            if folder.name.encode() in line and (planned := json.loads(line))["run_id"] == folder.name:
                return {f"axes.{key}": flat_config.get(key, text) for key, text in planned["varied"].items()}
    return {}
