"""The checkpoint of another run in whose state a run begins (start.run). It is verified and read, and never changed."""

from typing import Any

from scaling_testbed.config.start import StartConfig, steps_saved
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.runs import checkpoint


def read_parent(start: StartConfig) -> dict[str, Any]:
    """The plain data of the checkpoint to begin from. Raises UserError if it is not there, is damaged, or is of another
    run."""
    path = start.checkpoint
    if not path.is_dir():
        there = steps_saved(start.folder)
        kept = f"it has checkpoints of {', '.join(map(str, there))}" if there else "it has no checkpoint"
        kept = kept if start.folder.is_dir() else "there is no such folder"
        raise UserError(
            f"start.run={start.run} has no checkpoint of step {start.number}: {kept}; a run keeps those of "
            "checkpoint.keep_steps=[...], and is trained again if its folder is deleted"
        )
    checkpoint.check_whole(path)
    plain = checkpoint.read_state(path)
    if (there_id := plain.get("run_id", start.run_id)) != start.run_id:
        raise UserError(f"checkpoint {path} is of the run {there_id}, and start.run says {start.run_id}")
    return plain


def check_tokenizer(start: StartConfig, plain: dict[str, Any], data: PreparedData) -> None:
    """Raise ConfigError if the weights of the checkpoint with these plain data are for another tokenizer than that of
    `data`."""
    was, now = plain.get("tokenizer_fingerprint"), data.tokenizer_fingerprint
    if "tokenizer_fingerprint" in plain and was != now:
        raise ConfigError(
            f"start.run={start.run} has weights for another tokenizer: its tokenizer_fingerprint is {was}, and that of "
            f"{data.folder} is {now}; use its tokenizer"
        )
