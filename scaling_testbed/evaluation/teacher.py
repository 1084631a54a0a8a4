"""A finished run as a teacher: what identifies it, and its likeliest next tokens at each position of a corpus.

Shapes in names: N tokens, K of the vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling_testbed.config.compose import recorded_run
from scaling_testbed.config.run import RunConfig, outcome_of, run_id
from scaling_testbed.config.start import checkpoint_of
from scaling_testbed.data import targets as stored
from scaling_testbed.data.cutting import Cut
from scaling_testbed.data.manifest import fingerprint_of
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.data.targets import Layout, Targets, Writer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model, load_model_for
from scaling_testbed.evaluation.scoring import place_of
from scaling_testbed.evaluation.token_losses import PASS_TOKENS, logits_in_parts
from scaling_testbed.model.counting import count_params, forward_flops
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast, to_device
from scaling_testbed.progress import Progress
from scaling_testbed.runs import checkpoint
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.runs.identity import weights_sha256


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that is not trained. about: run_id, step, weights_sha256, n_params, val_loss (None at a step before its
    last), and n_tokens and flops of its training with all runs of its lineage, None where they are not known."""

    model: Transformer
    data: PreparedData
    about: dict[str, Any]


def check_finished(folder: Path) -> None:
    """Raise UserError if the run in `folder` has not finished."""
    row = RunFolder(folder).result()
    if row is None or row["status"] != "finished":
        said = outcome_of(folder) or "the run has no row yet"
        raise UserError(f"{folder} is no finished run: {said}; a teacher must have finished")


def open_teacher(run: RunConfig, folder: Path, *, step: int | None, device: torch.device) -> Teacher:
    """The checkpoint of a finished `run` in its `folder`, the newest unless `step` is given, on `device`.

    Raises UserError if the run has not finished, if the checkpoint does not exist or is damaged, or if the data have
    changed.
    """
    check_finished(folder)
    step, model, data = load_model(run, folder, step=step, device=device)
    return Teacher(model=model.requires_grad_(False), data=data, about=_about(run, folder, step, model))


def frozen_model(
    folder: Path, *, step: int, device: torch.device, data: PreparedData
) -> tuple[Transformer, dict[str, Any]]:
    """The model of a step of the finished run in a folder, on `device` and without gradients, to read `data`; and
    Teacher.about. Raises as `open_teacher`, and UserError if `data` have another tokenizer. The data of that run are
    not needed."""
    run = recorded_run(folder)
    check_finished(folder)
    step, model = load_model_for(run, folder, data, step=step, device=device)
    return model.requires_grad_(False), _about(run, folder, step, model)


def _about(run: RunConfig, folder: Path, step: int, model: Transformer) -> dict[str, Any]:
    """Teacher.about of the checkpoint of a step."""
    path, row = checkpoint_of(folder, step), RunFolder(folder).result() or {}
    saved = checkpoint.read_state(path)
    spent = [*saved.get("lineage", []), saved.get("spent", {})]
    totals = {key: [part.get(key) for part in spent] for key in ("n_tokens", "flops")}
    return {
        "run_id": run_id(run),
        "step": step,
        "weights_sha256": weights_sha256(path),
        "val_loss": row.get("val_loss") if row.get("steps") == step else None,
        "n_params": count_params(model.config).n_params,
        **{key: None if None in values else sum(values) for key, values in totals.items()},
    }


def prepare_targets(
    run: RunConfig,
    folder: Path,
    *,
    top_k: int,
    temperature: float = 1.0,
    step: int | None = None,
    corpus: Path | None = None,
    out: Path | None = None,
    max_bytes: int,
) -> tuple[Targets, bool]:
    """The `top_k` likeliest next tokens and their log-probabilities by a finished `run`, at each position of the
    training sequences of its data, or of `corpus`; and whether they were there before.

    The sequences are those of the run: its length, packing and document masking. Probabilities are those of the logits,
    divided by `temperature`. They are written into a folder of their own in `out`, else beside the shards. Its name has
    a hash of all that decides them. A pass that was stopped goes on with the parts that are missing. Shows the progress
    on standard error.

    Raises ConfigError for a top_k that the vocabulary does not have or targets of more than `max_bytes`, and UserError
    if the run has not finished, its checkpoint is gone or damaged, or the corpus has another tokenizer or is a mixture.
    """
    device, precision = place_of(run)
    teacher = open_teacher(run, folder, step=step, device=device)
    data = teacher.data if corpus is None else open_prepared(corpus)
    _check_corpus(folder, teacher.data, data)
    length, cutting = run.batch.sequence_length, run.batch.cutting
    cut = cutting.of(data.train, length)
    if not 1 <= top_k < data.vocab_size:
        raise ConfigError(f"--top-k must be from 1 to {data.vocab_size - 1}, below the vocabulary; got {top_k}")
    layout = Layout(n_sequences=cut.number, length=length, top_k=top_k, vocab_size=data.vocab_size)
    if layout.n_bytes > max_bytes:
        raise ConfigError(
            f"the targets need {layout.n_bytes / 2**30:,.3g} GiB, and --max-gib allows {max_bytes / 2**30:,.3g}; give "
            f"--max-gib {math.ceil(layout.n_bytes / 2**30 * 1000) / 1000:g} or a smaller --top-k"
        )
    about = {
        "teacher": teacher.about,
        **stored.grid_of(data, length, cutting),
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "temperature": float(temperature),
        "precision": precision,
        "pass_flops": float(forward_flops(teacher.model.config, length)) * cut.number * length,
    }
    name = f"{teacher.about['run_id']}-top{top_k}-{fingerprint_of([about, top_k])[:8]}"
    place = (data.folder / stored.FOLDER if out is None else out) / name
    if (place / stored.NAME).exists():
        return stored.open_targets(place), True
    _make(Writer(place, layout), teacher.model, cut, temperature, precision, about)
    return stored.open_targets(place), False


def _check_corpus(folder: Path, own: PreparedData, data: PreparedData) -> None:
    if (own.tokenizer_fingerprint, own.vocab_size) != (data.tokenizer_fingerprint, data.vocab_size):
        raise UserError(f"{folder} was trained with another tokenizer than that of {data.folder}")
    if sources := sorted(data.sources()):
        raise UserError(
            f"{data.folder} is a mixture, whose sequences are those of its sources; give one of them by --data, such "
            f"as --data {data.sources()[sources[0]].folder}"
        )


def _make(
    writer: Writer, model: Transformer, cut: Cut, temperature: float, precision: str, about: dict[str, Any]
) -> None:
    """Write the parts that are missing, and the manifest."""
    layout, missing = writer.layout, set(writer.missing())
    parts = layout.parts()
    done = sum(len(numbers) for place, numbers in enumerate(parts) if place not in missing)
    progress = Progress(prefix="prepare_targets: ", errors=True)
    progress.start(layout.n_sequences, done)
    if done:
        progress.say(f"{done:,} of {layout.n_sequences:,} sequences are there already")
    rows = max(1, PASS_TOKENS // layout.length)
    for place in sorted(missing):
        found = []
        for first in range(parts[place].start, parts[place].stop, rows):
            numbers = np.arange(first, min(first + rows, parts[place].stop))
            found.append(_likeliest(model, cut, numbers, layout.top_k, temperature, precision))
            done += len(numbers)
            progress.move(done, f"{done:,} of {layout.n_sequences:,} sequences")
        ids, log_p = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        writer.write(place, ids, log_p)
        if not progress.has_bar:
            progress.say(f"{done:,} of {layout.n_sequences:,} sequences  {progress.left(done)}".rstrip())
    progress.close()
    writer.finish(about)


@torch.no_grad()
def _likeliest(
    model: Transformer, cut: Cut, numbers: np.ndarray, top_k: int, temperature: float, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """The ids and log-probabilities [sequences, T, K] of the likeliest tokens, the likeliest first. Raises UserError if
    one is not finite."""
    device = next(model.parameters()).device
    tokens_BS, _, begins_BT = cut.batch(numbers).map(lambda x: to_device(x, device)).tensors
    with autocast(device, precision):
        hidden_ND = model(tokens_BS[:, :-1], begins_BT).flatten(0, 1)
        parts = [
            (logits_NV / temperature).log_softmax(-1).topk(top_k)
            for logits_NV, _ in logits_in_parts(model, hidden_ND, tokens_BS[:, 1:].flatten())
        ]
    log_p_NK, ids_NK = (torch.cat(found).cpu().numpy() for found in zip(*parts, strict=True))
    if not np.isfinite(log_p_NK).all():
        raise UserError(f"the teacher gives a probability that is not finite in the sequences from {numbers[0]:,} on")
    shape = (len(numbers), -1, top_k)
    return ids_NK.reshape(shape), log_p_NK.reshape(shape)
