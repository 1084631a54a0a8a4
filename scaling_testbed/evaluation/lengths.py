"""The loss of a checkpoint on windows of several lengths, shorter and longer than those in training, by position.

Positions are rotary and attention is causal, so a model can read any length. What it predicts at positions that it was
not trained on is what is measured. A model that sees only its last positions, as many as in training, is the arm to
compare with: see `by_length`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.cutting import NO_TARGET
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import ConfigError, UserError, listed
from scaling_testbed.evaluation.loading import build_anywhere, load_model
from scaling_testbed.evaluation.scoring import place_of
from scaling_testbed.evaluation.statistics import ratio_of_sums
from scaling_testbed.evaluation.token_losses import PASS_TOKENS, token_losses
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast

DEFINITION = (
    "loss is the cross-entropy of a target in windows of so many tokens, in nats; loss.A-B is that of the positions A\n"
    "to B, from 1 on. se is over blocks of text. difference is the loss minus that of the first row on the same blocks"
)


@dataclass(frozen=True, kw_only=True)
class ByLength:
    """What `by_length` finds. n_blocks: pieces of text, each of block_tokens targets. rows: one for each arm and
    length."""

    step: int
    train_length: int
    n_blocks: int
    block_tokens: int
    rows: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return dataclasses.asdict(self)

    def remarks(self) -> list[str]:
        """Which tokens the lengths predict."""
        shared = f"{self.n_blocks:,} blocks of {self.block_tokens:,} validation tokens"
        odd = [row["length"] for row in self.rows if self.block_tokens % row["length"]]
        if not odd:
            return [f"every length predicts the same tokens: {shared}"]
        lengths = listed([str(length) for length in dict.fromkeys(odd)])
        return [
            f"of {shared}, windows of {lengths} leave out the tokens after the last whole window; for the same tokens "
            f"at every length give lengths that divide {self.block_tokens}"
        ]


def by_length(
    run: RunConfig,
    folder: Path,
    lengths: Sequence[int],
    *,
    windows: Sequence[int] = (),
    tokens: int,
    step: int | None = None,
    average: bool = False,
) -> ByLength:
    """The loss of a checkpoint of `run` in its `folder`, the newest unless `step` is given, on windows of `lengths`.

    The validation split is cut into blocks of the longest length, of which at most `tokens` tokens are taken, spread
    evenly. A block is cut into windows of each length. A length that divides the longest one predicts all of its
    tokens; only the context differs. windows: each is a further arm in which a query sees only so many last positions
    (model.attention_window), whatever was trained. average: by the average of the weights.

    Raises ConfigError for lengths below 1 or given twice and for a run with document masking, and UserError if the
    checkpoint does not exist, its data have changed, the validation split is too short, or a loss is not finite.
    """
    lengths = checked_lengths("--lengths", lengths)
    windows = checked_lengths("--window", windows) if windows else []
    if run.batch.document_masking:
        raise ConfigError(
            f"{folder} was trained with batch.document_masking=true, so its positions count from the start of a "
            "document; --lengths measures windows across documents"
        )
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    blocks_BS, counted_BT = _blocks(data, lengths[-1], tokens)
    arms = [(run.model.attention_window, model)]
    arms += [(window, _with_window(run, data, model, window)) for window in windows if window != arms[0][0]]
    edges = sorted({*lengths, *(length for length in [run.batch.sequence_length] if length < lengths[-1])})
    rows: list[dict[str, Any]] = []
    for window, arm in arms:
        for length in lengths:
            losses = _losses(arm, blocks_BS, length, device, precision)
            if not np.isfinite(losses).all():
                raise UserError(f"step {step} of {folder} gives a loss that is not finite at length {length}")
            counted = _in_windows(counted_BT, length, length)
            rows.append({"attention_window": window, "length": length} | _summary(losses, counted, edges, rows))
    for row in rows:
        del row["_by_block"]
    return ByLength(
        step=step,
        train_length=run.batch.sequence_length,
        n_blocks=len(blocks_BS),
        block_tokens=lengths[-1],
        rows=rows,
    )


def checked_lengths(option: str, typed: Sequence[int]) -> list[int]:
    """The lengths in rising order. Raises ConfigError, which names the option, if one is below 1 or given twice."""
    if not typed or min(typed) < 1:
        raise ConfigError(f"{option} must be whole numbers above zero; got {','.join(map(str, typed)) or 'none'}")
    if len(set(typed)) < len(typed):
        raise ConfigError(f"{option} {','.join(map(str, typed))}: a number is given twice")
    return sorted(typed)


def _blocks(data: PreparedData, length: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [blocks, length + 1] of blocks that are spread evenly over the validation split, and whether each but
    the first of a block is a target [blocks, length]."""
    there = data.validation.n_tokens
    if there <= length:
        raise UserError(
            f"--lengths {length}: the validation split of {data.folder} has {there:,} tokens, which is too few for one "
            "window; give smaller lengths, or train with a larger validation split"
        )
    blocks = [*ValidationBatches(data.validation, sequence_length=length, max_tokens=tokens, rows=1)]
    targets_BT = np.concatenate([block.explicit().targets_BT for block in blocks])
    return np.concatenate([block.tokens_BS for block in blocks]), targets_BT != NO_TARGET


def _with_window(run: RunConfig, data: PreparedData, model: Transformer, window: int) -> Transformer:
    """A copy of `model` in which a query sees its last `window` positions."""
    limited = dataclasses.replace(run, model=dataclasses.replace(run.model, attention_window=window))
    found = build_anywhere(limited, data, next(model.parameters()).device)
    found.load_state_dict(model.state_dict())
    return found.eval()


def _losses(model: Transformer, blocks_BS: np.ndarray, length: int, device: torch.device, precision: str) -> np.ndarray:
    """The cross-entropy [blocks, windows of a block, length] of each token."""
    windows = _in_windows(blocks_BS, length, length + 1)
    windows_WS = torch.from_numpy(windows.reshape(-1, length + 1))
    found = []
    for tokens_BS in windows_WS.split(max(1, PASS_TOKENS // length)):
        with autocast(device, precision):
            found.append(token_losses(model, tokens_BS.to(device)))
    return torch.cat(found).view(*windows.shape[:2], length).numpy()


def _in_windows(blocks_BN: np.ndarray, stride: int, width: int) -> np.ndarray:
    """The whole windows [blocks, windows of a block, width] of blocks, one at each multiple of `stride`."""
    per_block = (blocks_BN.shape[1] - (width - stride)) // stride
    return blocks_BN[:, np.arange(per_block)[:, None] * stride + np.arange(width)]


def _summary(losses: np.ndarray, counted: np.ndarray, edges: Sequence[int], before: Sequence[dict]) -> dict[str, Any]:
    """The fields of a row. losses, counted: of each token, and whether it is a target, [blocks, windows, length].
    before: the rows so far, of which the first is the one to compare with."""
    length = losses.shape[2]
    losses, counted_B = np.where(counted, losses.astype(np.float64), 0.0), counted.sum((1, 2))
    of_block_B = losses.sum((1, 2))
    first_B = before[0]["_by_block"] if before else of_block_B
    mean, se = ratio_of_sums(of_block_B, counted_B)
    difference, difference_se = ratio_of_sums(of_block_B - first_B, counted_B)
    comparable = bool(before) and before[0]["tokens"] == counted.sum()  # else the losses are of other tokens
    found = {
        "tokens": int(counted.sum()),
        "loss": mean,
        "loss_se": se,
        "difference": difference if comparable else None,
        "difference_se": difference_se if comparable else None,
    }
    for first, last in itertools.pairwise([0, *edges]):
        if last <= length:
            n_here = int(counted[:, :, first:last].sum())
            found[f"loss.{first + 1}-{last}"] = float(losses[:, :, first:last].sum()) / n_here if n_here else None
    return found | {"_by_block": of_block_B}
