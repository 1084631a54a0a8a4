"""The row of a run that has ended before, which is served in place of training. Does not import torch."""

import warnings
from typing import Any

from scaling_testbed.config.run import RunConfig
from scaling_testbed.progress import say
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.runs.identity import check_own, check_same
from scaling_testbed.runs.row import FINAL


def final_row(folder: RunFolder, run: RunConfig, *, quiet: bool) -> dict[str, Any] | None:
    """The row of a run that has finished or diverged, or None. Says so in a line, and what of its data could not be
    compared; if `quiet`, only the latter, as a warning. Raises UserError if its data or plug-ins have changed, or if it
    is the row of another run."""
    check_own(folder.row_of_another(), run, folder.path)
    row = folder.result()
    if not row or row["status"] not in FINAL:
        return None
    unknown = check_same(row, run, folder.path)
    if not quiet:
        say(f"run {folder.path} has {row['status']} before and is not trained again; to repeat it, delete its folder")
    if unknown:
        line = f"{folder.path} was not compared with its data: {unknown}"
        warnings.warn(line, stacklevel=2) if quiet else say(f"warning: {line}", errors=True)
    return row
