"""Mirror the records of a run to Weights & Biases. Only this module imports wandb."""

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.config.sections import LoggingConfig
from scaling_testbed.progress import say
from scaling_testbed.runs.mirrors.mirror import Mirror, Record, numbers

MODES = ("auto", "online", "offline", "shared", "disabled")  # auto: online with a key, else offline
START_SECONDS = 15  # how long Weights & Biases may take to start, beside the first steps


class Wandb:
    """A run in Weights & Biases. Online it gets the records that it lacks: those of an earlier start are there. Offline
    each start records all of them, so that the newest recording is whole and replaces what was uploaded before."""

    def __init__(
        self,
        config: LoggingConfig,
        mode: str,
        folder: Path,
        run_id: str,
        name: str,
        flat_config: dict[str, Any],
        rows: Sequence[Record],
    ):
        os.environ.setdefault("WANDB_SILENT", "true")  # the setting alone does not silence its login
        import wandb

        named: Any = None if mode == "auto" else mode  # one of wandb's own
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or name,
            tags=config.tags,
            notes=config.notes,
            id=run_id,
            name=run_id,
            dir=str(folder),
            config=flat_config,
            mode=named,
            resume=None if mode == "offline" else "allow",
            save_code=False,
            settings=wandb.Settings(init_timeout=START_SECONDS),
        )
        self._first = self._run.starting_step
        for row in rows:
            self.log(row)

    def log(self, row: Record) -> None:
        if row["step"] >= self._first:
            self._run.log(numbers(row), step=row["step"])

    def finish(self, row: dict[str, Any]) -> None:
        shown = ("status", "val_loss", "val_bpb", "n_params", "n_tokens", "flops")
        self._run.summary.update({key: row.get(key) for key in shown})
        self._run.finish()

    def fail(self) -> None:
        self._run.finish(exit_code=1)


def wandb_mirror(
    config: LoggingConfig, folder: Path, run_id: str, name: str, flat_config: dict[str, Any], rows: Sequence[Record]
) -> Mirror | None:
    """The mirror of a run with logging.wandb=true; None where wandb's variables or a wrong mode turn it off. name: of
    the sweep or folder that the run is filed in."""
    mode, said_by = _mode(config)
    if mode not in MODES:
        say(f"warning: wandb is off for this run: {said_by} is none of {', '.join(MODES)}", errors=True)
        return None
    if mode == "disabled":
        say(f"wandb: {said_by}, so nothing is sent or recorded there")
        return None
    if mode == "auto" and not _wandb_key():
        mode = "offline"
        say(f"wandb: no key found; recording offline. To upload it later: {sync_command(folder / 'wandb/latest-run')}")

    def start(rows: Sequence[Record]) -> Wandb:
        return Wandb(config, mode, folder, run_id, name, flat_config, rows)

    return Mirror("wandb", start, rows, give_up=_end_service)


def sync_command(recording: Path) -> str:
    """The command that uploads an offline recording."""
    return f"wandb sync {shlex.quote(str(recording))}"


def recording_to_sync(folder: Path) -> Path | None:
    """The newest recording of the run in `folder`, if it was made offline and not uploaded yet; else None. Older ones
    hold nothing that it lacks."""
    made = [path for path in folder.glob("wandb/*run-*") if path.name.startswith(("run-", "offline-run-"))]
    newest = max(made, key=lambda path: path.name.removeprefix("offline-"), default=None)
    if newest is None or newest.name.startswith("run-") or any(newest.glob("*.wandb.synced")):
        return None
    return newest


def _end_service() -> None:
    """End wandb's service. There are no public functions; without them the process waits for the service."""
    from wandb.sdk import wandb_setup

    setup: Any = wandb_setup
    connection = setup._singleton._connection
    connection._cleanup()  # removes the hook that would talk to the service at exit
    connection._proc._process.kill()


def _mode(config: LoggingConfig) -> tuple[str, str]:
    """How wandb records, and what says so. Its own variables come before `logging.wandb_mode`: they silence any run."""
    if (value := os.environ.get("WANDB_DISABLED", "").strip()).lower() in ("true", "1", "yes"):
        return "disabled", f"WANDB_DISABLED={value}"
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    mode = asked or config.wandb_mode
    said_by = f"WANDB_MODE={asked}" if asked else f"logging.wandb_mode={mode}"
    return {"dryrun": "offline", "run": "online"}.get(mode, mode), said_by  # names of earlier releases of wandb


def _wandb_key() -> bool:
    """Whether wandb would find a key: in its variable or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no file; no text; a user without a home folder
        return "wandb" in Path(os.environ.get("NETRC") or Path.home() / ".netrc").read_text()
    return False
