"""Load a saved model from the folder of its run."""

import contextlib
import dataclasses
from pathlib import Path

import torch

from scaling_testbed.config.run import RunConfig, outcome_of, run_id
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.errors import UserError
from scaling_testbed.learning.averaging import Averages
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.runs import checkpoint, state


def open_checkpoint(run: RunConfig, folder: Path, step: int | None) -> tuple[checkpoint.Checkpoint, PreparedData]:
    """A checkpoint of `run` in its `folder`, the newest unless `step` is given, and the data it was trained on. Raises
    UserError if the checkpoint does not exist or is damaged, or if the data has changed."""
    saved = checkpoint.load(path := _find(folder, step))
    # A folder keeps its name if its config.yaml is changed by hand, such as a path in it.
    checkpoint.check_run(path, saved.state, {run_id(run), folder.resolve().name})
    data = open_prepared(_prepared(run, saved))
    checkpoint.check_same_data(saved.state, data, folder)
    return saved, data


def _prepared(run: RunConfig, saved: checkpoint.Checkpoint) -> Path:
    """The folder of a run's prepared data. If the source texts no longer exist, it is found by its fingerprints."""
    try:
        return prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir), quiet=True)
    except UserError:
        for manifest in sorted(Path(run.data_dir).glob("*/manifest.json")):
            with contextlib.suppress(UserError):
                found = checkpoint.fingerprints(open_prepared(manifest.parent))
                if all(saved.state.get(key) == value for key, value in found.items()):
                    return manifest.parent
        raise


def load_model(
    run: RunConfig,
    folder: Path,
    *,
    step: int | None,
    device: torch.device,
    reference: bool = False,
    average: bool = False,
) -> tuple[int, Transformer, PreparedData]:
    """The step, the model and the data of a checkpoint. Raises the errors of `open_checkpoint`. The model uses paths
    that are available on `device`, so a machine without Triton can load a run that used it. reference: see
    `build_anywhere`. average: with the average of the weights; raises UserError if the checkpoint has none."""
    saved, data = open_checkpoint(run, folder, step)
    model = build_anywhere(run, data, device, reference=reference)
    state.load_weights(model, saved.tensors.get("model"), folder)
    if average:
        averages = Averages(run.averaging, dict(model.named_parameters()))
        if not averages.tensors:
            raise UserError(
                f"{folder} has no average of its weights: it was trained with averaging={run.averaging.name}"
            )
        state.restore_averages(folder, saved, averages)
        if not averages:
            raise UserError(f"step {saved.step} of {folder} has no average of its weights yet")
        averages.into_parameters()
    return saved.step, model.eval(), data


def load_model_for(
    run: RunConfig, folder: Path, data: PreparedData, *, step: int | None, device: torch.device
) -> tuple[int, Transformer]:
    """The step and the model of a checkpoint for other `data`. Those that it was trained on need not be there. Raises
    UserError if the checkpoint does not exist or is damaged, or is of another tokenizer."""
    saved = checkpoint.load(path := _find(folder, step))
    checkpoint.check_run(path, saved.state, {run_id(run), folder.resolve().name})
    was, now = saved.state.get("tokenizer_fingerprint"), data.tokenizer_fingerprint
    if was != now:
        raise UserError(
            f"{folder} was trained with another tokenizer than that of {data.folder}: its tokenizer_fingerprint is "
            f"{was}, and there it is {now}"
        )
    model = build_anywhere(run, data, device)
    state.load_weights(model, saved.tensors.get("model"), folder)
    return saved.step, model.eval()


def pruned_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Name of each parameter from which the run in `folder` has pruned weights -> whether each weight is pruned, at
    `step`. Empty for a run that prunes none."""
    kept = checkpoint.read_tensors(_find(folder, step), "interventions")
    return kept.get("magnitude_pruning", {})


def build_anywhere(run: RunConfig, data: PreparedData, device: torch.device, *, reference: bool = False) -> Transformer:
    """Build the model of a run, without its saved weights, with paths that are available on `device`. reference: with
    the paths in plain PyTorch, which have second derivatives."""
    config = run.model.with_auto_paths().resolved(data.vocab_size)
    if reference:
        config = dataclasses.replace(config, attention_impl="reference", qk_norm_impl="reference")
    model = Transformer(config, run.parametrization, device=device)
    model.narrow_residual = run.compute.residual_dtype == "bf16"
    return model


def _find(folder: Path, step: int | None) -> Path:
    checkpoints = folder / "checkpoints"
    there = checkpoint.by_step(checkpoints)
    if not there:
        if outcome := outcome_of(folder):
            raise UserError(f"{folder} holds no checkpoint: {outcome}")
        raise UserError(
            f"{checkpoints} holds no checkpoint; run with checkpoint.at_end=true or checkpoint.every_steps="
        )
    if step is not None and step not in there:
        raise UserError(f"{checkpoints} holds no step {step}; there are {', '.join(map(str, there))}")
    return there[max(there) if step is None else step]
