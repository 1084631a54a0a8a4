"""A profile of some steps of a run by torch.profiler: a trace of time and a table of operators."""

import os
from collections.abc import Callable
from typing import Any

import torch

from scaling_testbed.errors import UserError, first_line
from scaling_testbed.files import write_text
from scaling_testbed.progress import WARNING
from scaling_testbed.training.parts import Parts

OPERATORS = 60  # rows of the table


class StepProfile:
    """Profiles the updates of compute.profile_steps on rank 0. It changes no number that a step computes.

    The files in the folder of the run are named by the steps that they hold, which are fewer if the run begins or stops
    within them. They cannot stop the run: a failure is one line.
    """

    def __init__(self, parts: Parts, say: Callable[..., None]):
        self._folder, self._say = parts.folder.path, say
        self._device, steps = parts.device.type, parts.run.compute.steps_to_profile
        self._steps = steps if parts.processes.world.is_main else None
        self._first, self._made = 0, 0
        self._open: Any = None
        if self._steps is not None and self._steps[0] >= parts.steps:
            say(f"compute.profile_steps={parts.run.compute.profile_steps} is after the last step; nothing is profiled")

    def begin(self, made: int) -> None:
        """Begin the profile if the next update is one of it. made: the number of updates so far."""
        if self._steps is None or self._open is not None or not self._steps[0] <= made < self._steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:  # the profiler calls it an error that there is no GPU
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        self._first = self._made = made
        self._open = torch.profiler.profile(activities=activities)
        self._open.start()

    def end(self, made: int) -> None:
        """End the profile if its last update is made, which the host then waits for. made: as in `begin`."""
        self._made = made
        if self._open is not None and self._steps is not None and made >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the profile if it is open."""
        if (profile := self._open) is None:
            return
        self._steps = self._open = None
        profile.stop()
        if self._made == self._first:
            return
        name = f"profile-{self._first}-{self._made}"
        trace, table = self._folder / f"{name}.trace.json", self._folder / f"{name}.operators.txt"
        try:
            work = trace.with_name(f"{trace.name}.tmp")
            profile.export_chrome_trace(str(work))
            os.replace(work, trace)
            by = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
            write_text(table, profile.key_averages().table(sort_by=by, row_limit=OPERATORS) + "\n")
        except (OSError, RuntimeError, UserError) as error:
            self._say(f"warning: the profile cannot be written: {first_line(error)}", WARNING)
            return
        self._say(f"profile of the steps after {self._first:,} up to {self._made:,}: {trace.name}, {table.name}")
