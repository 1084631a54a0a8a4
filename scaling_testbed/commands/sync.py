"""The command that uploads what the runs of a sweep have recorded offline for Weights & Biases."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands.sweep import Words, asked, planned
from scaling_testbed.errors import UserError

ShowCommands = Annotated[bool, typer.Option("--dry-run", help="only print the commands")]


def sync(words: Words = (), dry_run: ShowCommands = False) -> int:
    """Upload to Weights & Biases what the runs have recorded offline: print and run `wandb sync` for each run.

    The newest recording of a run holds the whole run, so it alone is uploaded. Runs that train now, and recordings that
    were uploaded before, are left out. Exit status: 0 if all is uploaded, 1 if an upload failed."""
    from scaling_testbed.runs.lease import owner_of
    from scaling_testbed.runs.mirrors.wandb import recording_to_sync, sync_command
    from scaling_testbed.sweeps.plan import remembered, sweep_folder, told_apart

    chosen = asked(words, False)
    runs = planned(chosen, shown_only=True)
    if not chosen.narrowed:
        runs = told_apart([*runs, *remembered(sweep_folder(runs))])
    found = [(Path(run.folder), recording_to_sync(Path(run.folder))) for run in runs]
    recordings = [(folder, recording) for folder, recording in found if recording is not None]
    busy = [folder for folder, _ in recordings if owner_of(folder / "lock") is not None]
    due = [recording for folder, recording in recordings if folder not in busy]
    failed = 0
    for recording in due:
        print(sync_command(recording), flush=True)
        if not dry_run:
            failed += not _upload(recording)
    told = f"{len(due)} of {len(runs)} runs to upload" if dry_run else f"{len(due) - failed} of {len(runs)} uploaded"
    told += f"; {failed} failed, and the same command tries them again" if failed else ""
    told += f"; {len(busy)} train now: type the command again when they have ended" if busy else ""
    print(told)
    return 1 if failed else 0


def _upload(recording: Path) -> bool:
    """Whether `wandb sync` of the recording succeeded. Its own output is shown."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed; pip install wandb")
    return subprocess.run([sys.executable, "-m", "wandb", "sync", str(recording)]).returncode == 0
