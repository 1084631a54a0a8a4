"""Mirror the records of a run to Weights & Biases. Only this module imports wandb."""

import contextlib
import os
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_testbed.config.sections import LoggingConfig
from scaling_testbed.progress import say
from scaling_testbed.runs.folder import RunFolder

MODES = ("auto", "online", "offline", "shared", "disabled")  # auto: online with a key, else offline
WANDB_START_SECONDS = 20  # how long the start of a run may wait for Weights & Biases


class WandbMirror:
    """Sends records to Weights & Biases. It can neither stop nor delay a run: each failure is one warning."""

    def __init__(self, config: LoggingConfig, folder: RunFolder, run_id: str, name: str, flat_config: dict[str, Any]):
        self._run: Any = None
        if not config.wandb:
            return
        mode, said_by = _mode(config)
        if mode not in MODES:
            say(f"warning: wandb is off for this run: {said_by} is none of {', '.join(MODES)}", errors=True)
            return
        if mode == "disabled":
            say(f"wandb: {said_by}, so nothing is sent or recorded there")
            return
        if mode == "auto" and not _wandb_key():
            mode = "offline"
            say(f"wandb: no key found; recording offline. To upload it later: {sync_command(folder.path)}")
        self._run = self._guarded(
            lambda: _start_wandb(config, mode, folder.path, run_id, name, flat_config), WANDB_START_SECONDS
        )

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
            self._guarded(lambda: self._run.log(numbers, step=row["step"]), 5)

    def finish(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            summary = {key: row[key] for key in ("status", "val_loss", "val_bpb", "n_params", "n_tokens", "flops")}
            self._guarded(lambda: (self._run.summary.update(summary), self._run.finish()), 20)

    def _guarded(self, action: Callable[[], Any], seconds: float) -> Any:
        """Run `action` in a thread for at most `seconds`. After an error or a timeout the mirror is off."""
        outcome: dict[str, Any] = {}

        def attempt() -> None:
            try:
                outcome["value"] = action()
            except BaseException as error:  # wandb raises exceptions of its own, and SystemExit
                outcome["error"] = error

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)
        if "value" in outcome:
            return outcome["value"]
        error = outcome.get("error")
        reason = str(error or f"no answer in {seconds} s").splitlines()[0]
        if isinstance(error, ModuleNotFoundError) and error.name == "wandb":
            reason = "it is not installed; pip install wandb"
        say(f"warning: wandb is off for the rest of this run: {reason}", errors=True)
        self._run = None
        return None


def sync_command(folder: Path) -> str:
    """The command that uploads the offline records of a run in its `folder`."""
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def _start_wandb(
    config: LoggingConfig, mode: str, folder: Path, run_id: str, name: str, flat_config: dict[str, Any]
) -> Any:
    import wandb

    named: Any = None if mode == "auto" else mode  # one of wandb's own
    own = "WANDB_SILENT" in os.environ  # then this variable says whether wandb prints
    settings = wandb.Settings(init_timeout=15) if own else wandb.Settings(init_timeout=15, silent=True)
    return wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group or name,
        id=run_id,
        name=run_id,
        dir=str(folder),
        config=flat_config,
        mode=named,
        resume="allow",
        save_code=False,
        settings=settings,
    )


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
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    with contextlib.suppress(OSError):
        return "wandb" in netrc.read_text()
    return False
