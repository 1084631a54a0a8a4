"""Where a run begins: at step 0 with new weights, or in the state that another run has left at one of its steps.

Does not import torch. A run that begins in the state of another one is a run of its own, with a folder of its own. The
other run is its parent. It is read and never changed.
"""

import contextlib
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import read_json
from scaling_testbed.keys import EXECUTION_ONLY, key
from scaling_testbed.model.config import GrowthConfig

LAST = "last"
WEIGHTS, OPTIMIZER, STEP = TAKEN = ("weights", "optimizer", "step")
RUN_ID = re.compile(r"[0-9a-f]{12}")
STEP_FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,17})")  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The state in which a run begins.

    The identity of a run has the run_id of the parent and the step, and not the place of its folder. The row has the
    sha256 of the parent's weights too. looked_up: the keys that `resolved` gives a value.
    """

    looked_up: ClassVar[tuple[str, ...]] = ("step",)

    run: str | None = key(
        None,
        "The folder of the run to begin from, runs_dir/name/run_id. It may lie anywhere, and nothing is written into "
        "it. null: the run begins at step 0 with new weights.",
    )
    step: int | str = key(
        LAST,
        "The step of the parent whose checkpoint is taken. last: the newest one that is there now; the record of the "
        "run has its number. The parent keeps checkpoints of the steps in its checkpoint.keep_steps.",
    )
    take: list[str] = key(
        list(TAKEN),
        "What is taken. weights: always. optimizer: the moments, and the state of interventions; without it they are "
        "new. step: the number of steps made, so that schedule, data and budget go on from there; without it they "
        "begin at 0. With all three, a run with the same keys as its parent ends in the same bits.",
    )
    grow: dict[str, Any] = key(
        {},
        "How a larger model is made of the parent's weights: type +start.grow.width=fpi for twice the width, or "
        "+start.grow.depth=zero for more layers; see docs/runs.md. Moments cannot be taken then. {}: this run has the "
        "parent's model.",
    )
    rewarm: int = key(
        0,
        "Steps over which the rate rises linearly from zero to that of the schedule, from the first step of this run "
        "on. It is for a run that goes on with step and without optimizer.",
    )

    same_run: bool = key(
        False,
        "Whether the parent made the first steps of this very run, as a shared trunk does. Then the run has the run_id "
        "that it has without a start, because its result is the same. It is refused unless the parent differs only in "
        "its length and made these steps at the same rates.",
        identity=EXECUTION_ONLY,
    )

    def __post_init__(self) -> None:
        if isinstance(self.step, str) and self.step != LAST:
            raise ConfigError(f"start.step must be a step of the parent, or last; got {self.step!r}")
        if isinstance(self.step, int) and (isinstance(self.step, bool) or self.step < 0):
            raise ConfigError(f"start.step must not be negative; got {self.step}")
        if odd := [name for name in self.take if name not in TAKEN]:
            raise ConfigError(f"start.take must name some of {', '.join(TAKEN)}; got {odd[0]!r}")
        if WEIGHTS not in self.take:
            raise ConfigError(f"start.take must have weights; got [{','.join(self.take)}]")
        if self.growth is not None and OPTIMIZER in self.take:
            raise ConfigError("start.grow makes new matrices, which have no moments; type start.take=[weights]")
        if self.same_run and (set(self.take) != set(TAKEN) or self.rewarm):
            raise ConfigError("start.same_run=true needs all of start.take, and no start.rewarm")
        if self.rewarm < 0:
            raise ConfigError(f"start.rewarm must not be negative; got {self.rewarm}")
        if self.run is None:
            given = {"step": self.step != LAST, "take": self.take != list(TAKEN), "rewarm": self.rewarm != 0}
            given |= {"grow": self.growth is not None, "same_run": self.same_run}
            if changed := [name for name, is_set in given.items() if is_set]:
                raise ConfigError(f"start.{changed[0]} needs start.run=FOLDER, the run to begin from")
            return
        object.__setattr__(self, "run", os.path.expanduser(self.run))
        if not RUN_ID.fullmatch(self.run_id or ""):
            raise ConfigError(
                f"start.run must be the folder of a run, which is named by its run_id; got {self.run!r}, and "
                f"{self.run_id!r} is no run_id"
            )

    @property
    def run_id(self) -> str | None:
        """The run_id of the parent, which is the name of its folder."""
        return None if self.run is None else Path(os.path.normpath(self.run)).name

    @property
    def growth(self) -> GrowthConfig | None:
        """start.grow as a record; None if the run has the parent's model. Raises ConfigError for another key."""
        names = [field.name for field in fields(GrowthConfig)]
        if odd := [name for name in self.grow if name not in names]:
            raise ConfigError(f"start.grow has no key {odd[0]}; it has {', '.join(names)}")
        if not self.grow:
            return None
        how = GrowthConfig(**self.grow)
        if not (how.width or how.depth):
            raise ConfigError("start.grow needs width (fpi or aki) or depth (zero, repeat or stack)")
        return replace(how, noise=float(how.noise))  # 1 and 1.0 are the same run

    @property
    def first_step(self) -> int:
        """The number of steps made before the first step of this run: 0 unless start.take has step."""
        return self.number if self.run is not None and STEP in self.take else 0

    @property
    def number(self) -> int:
        """start.step as a number. Raises ConfigError if it is still to be looked up."""
        if isinstance(self.step, str):
            raise ConfigError(f"start.step={self.step} is not known yet; type the number of a step")
        return self.step

    @property
    def folder(self) -> Path:
        """The folder of the parent."""
        assert self.run is not None
        return Path(self.run)

    @property
    def checkpoint(self) -> Path:
        """The folder of the parent's checkpoint."""
        return checkpoint_of(self.folder, self.number)

    def share_of_rate(self, step: int) -> float:
        """What the rate of the schedule is multiplied by in update number `step` (from 0): 1 after start.rewarm."""
        done = step + 1 - (self.first_step if self.rewarm else 0)
        return 1.0 if done >= self.rewarm else done / self.rewarm

    def identity(self) -> dict[str, Any]:
        """What the identity of a run has of this section: the parent by its run_id, and no path."""
        found: dict[str, Any] = {"run": self.run_id, "step": self.step, "take": sorted(set(self.take))}
        found |= {"rewarm": self.rewarm} if self.rewarm else {}
        return found | ({"grow": asdict(growth)} if (growth := self.growth) else {})

    def resolved(self) -> "StartConfig":
        """This section with the number of the step in place of `last`. Raises ConfigError if the parent has none."""
        if self.run is None or self.step != LAST:
            return self
        steps = [*steps_saved(self.folder), *finished_at(self.folder)]
        if not steps:
            there = "it has no checkpoint" if self.folder.is_dir() else "there is no such folder"
            raise ConfigError(
                f"start.run={self.run}: {there}; give the folder of a run, or start.step=N before it exists"
            )
        return replace(self, step=max(steps))


def checkpoint_of(folder: Path, step: int) -> Path:
    """The folder of a run's checkpoint of a step."""
    return folder / "checkpoints" / f"step-{step:08d}"


def steps_saved(folder: Path) -> list[int]:
    """The steps of the checkpoints in the folder of a run, in order. Damaged ones are among them."""
    names = (STEP_FOLDER.fullmatch(path.name) for path in (folder / "checkpoints").glob("step-*"))
    return sorted(int(found[1]) for found in names if found)


def finished_at(folder: Path) -> list[int]:
    """The last step of a run that has finished, whether or not its checkpoint is still there."""
    with contextlib.suppress(UserError, LookupError, TypeError):
        row = read_json(folder / "result.json")
        return [int(row["steps"])] if row["status"] == "finished" else []
    return []
