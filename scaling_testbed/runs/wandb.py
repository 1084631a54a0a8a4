"""Mirror the records of a run to Weights & Biases. Only this module imports wandb."""

import atexit
import contextlib
import os
import queue
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_testbed.config.sections import LoggingConfig
from scaling_testbed.errors import first_line
from scaling_testbed.progress import say
from scaling_testbed.runs.folder import RunFolder

MODES = ("auto", "online", "offline", "shared", "disabled")  # auto: online with a key, else offline
START_SECONDS = 15  # how long Weights & Biases may take to start, beside the first steps
END_SECONDS = 10  # how long the end of a run waits for it


class WandbMirror:
    """Sends records to Weights & Biases from a thread of its own. It cannot stop a run, and delays only its end, by
    END_SECONDS at most. A failure is one warning, after which the mirror is off."""

    def __init__(self, config: LoggingConfig, folder: RunFolder, run_id: str, name: str, flat_config: dict[str, Any]):
        self._folder = folder.path
        self._todo: queue.SimpleQueue[Callable[[Any], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._off = threading.Event()
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

        def start() -> Any:
            return _start_wandb(config, mode, folder.path, run_id, name, flat_config)

        self._thread = threading.Thread(target=self._work, args=(start,), daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Send the numbers of a record."""
        numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
        self._ask(lambda run: run.log(numbers, step=row["step"]))

    def finish(self, row: dict[str, Any]) -> None:
        """Send the row of the run, and wait until everything is sent."""
        summary = {key: row.get(key) for key in ("status", "val_loss", "val_bpb", "n_params", "n_tokens", "flops")}
        self._ask(lambda run: (run.summary.update(summary), run.finish()))
        self._end()

    def _fail(self) -> None:
        """End the mirror of a run that has no row."""
        self._ask(lambda run: run.finish(exit_code=1))
        self._end()

    def _ask(self, action: Callable[[Any], object]) -> None:
        if self._thread is not None and not self._off.is_set():
            self._todo.put(action)

    def _work(self, start: Callable[[], Any]) -> None:
        """Start the mirror and do what is asked, in a thread."""
        try:
            run = start()
            atexit.register(self._fail)  # registered after wandb's own hook, so it runs before that
            while (action := self._todo.get()) is not None:
                action(run)
        except BaseException as error:  # wandb raises exceptions of its own, and SystemExit
            reason = first_line(error)
            if isinstance(error, ModuleNotFoundError) and error.name == "wandb":
                reason = "it is not installed; pip install wandb"
            self._give_up(reason)

    def _end(self) -> None:
        """Wait for what was asked. What is not sent then is given up, so that the process can end."""
        if self._thread is None or self._off.is_set():
            return
        self._todo.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"no answer in {END_SECONDS} s at the end of the run")
        self._off.set()

    def _give_up(self, reason: str) -> None:
        if self._off.is_set():
            return
        self._off.set()
        say(f"warning: wandb is off for the rest of this run: {reason}; metrics.jsonl has all", errors=True)
        with contextlib.suppress(Exception):  # no public functions; without them the process waits for the service
            from wandb.sdk import wandb_setup

            setup: Any = wandb_setup
            connection = setup._singleton._connection
            connection._cleanup()  # removes the hook that would talk to the service at exit
            connection._proc._process.kill()


def sync_command(folder: Path) -> str:
    """The command that uploads the offline records of a run in its `folder`."""
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def _start_wandb(
    config: LoggingConfig, mode: str, folder: Path, run_id: str, name: str, flat_config: dict[str, Any]
) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")  # the setting alone does not silence its login
    import wandb

    named: Any = None if mode == "auto" else mode  # one of wandb's own
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
        settings=wandb.Settings(init_timeout=START_SECONDS),
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
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no file; no text; a user without a home folder
        return "wandb" in Path(os.environ.get("NETRC") or Path.home() / ".netrc").read_text()
    return False
