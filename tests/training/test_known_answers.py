"""Trained on sources whose answer is known, a model ends where it must: never below, and near."""

import math

import numpy as np
import pytest
import torch

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training.run import train
from tests.training.conftest import load_latest


def trained(tmp_path, *overrides):
    places = [f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/data"]
    (run,) = compose_many([[*places, "compute.threads=1", *overrides]])
    row = train(run, quiet=True)
    data = open_prepared(next((tmp_path / "data").glob("*/manifest.json")).parent)
    model = Transformer(run.model.resolved(data.vocab_size), run.parametrization)
    model.load_state_dict(load_latest(run_folder_path(run) / "checkpoints").tensors["model"])
    return row, model, data


@torch.no_grad()
def token_losses(model, data, length, tokens):
    """Cross-entropy of every validation target, [windows, length], in nats."""
    losses = []
    for batch in ValidationBatches(data.validation, sequence_length=length, max_tokens=tokens, rows=64):
        tokens_BS = torch.from_numpy(batch.tokens_BS)
        logits_BTV = model.logits(tokens_BS[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits_BTV.mT, tokens_BS[:, 1:], reduction="none"))
    return torch.cat(losses).double().numpy()


def standard_error(losses):
    """Of the mean over windows, which are nearly independent."""
    return np.std(losses.mean(axis=1)) / math.sqrt(len(losses))


def test_the_loss_on_a_markov_source_approaches_its_entropy_rate_from_above(tmp_path):
    row, model, data = trained(
        tmp_path,
        *(
            "data=markov",
            "data.vocab_size=16",
            "data.order=1",
            "data.n_tokens=300000",
            "data.n_validation_tokens=100000",
        ),
        *("model=nano_s", "batch.sequences=32", "batch.sequence_length=64", "budget.steps=150", "optimizer.lr=1e-2"),
        *("evaluation.every_steps=75", "evaluation.tokens=5e4"),
    )
    rate = data.manifest["entropy_rate_nats"]
    losses = token_losses(model, data, 64, 50_000)
    assert row["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert row["val_loss_best"] > rate - 3 * standard_error(losses)
    assert row["val_loss"] < rate + 0.03
    assert row["unigram_entropy_nats"] > rate + 0.2  # so that being near means having learnt the transitions


def test_independent_noise_scores_its_entropy(tmp_path):
    row, model, data = trained(
        tmp_path,
        *("data=noise", "data.vocab_size=16", "data.n_tokens=200000", "data.n_validation_tokens=50000"),
        *("model=nano_s", "batch.sequences=32", "batch.sequence_length=64", "budget.steps=60", "optimizer.lr=1e-2"),
    )
    entropy = data.manifest["entropy_rate_nats"]
    error = standard_error(token_losses(model, data, 64, 50_000))
    assert entropy - 3 * error < row["val_loss"] < entropy + 0.05


def test_the_second_half_of_copied_strings_is_solved_and_the_first_half_is_not(tmp_path):
    length = 8
    _, model, data = trained(
        tmp_path,
        *("data=copy", "data.vocab_size=8", f"data.length={length}", "data.n_tokens=1000000"),
        *("model=nano_s", "batch.sequences=64", f"batch.sequence_length={2 * length}", "budget.steps=400"),
        *("optimizer.lr=1e-2", "evaluation.every_steps=0"),
    )
    by_position = token_losses(model, data, 2 * length, 50_000).mean(axis=0)
    repeated = slice(length - 1, 2 * length - 1)  # the targets at these positions were all seen before
    assert by_position[repeated].max() < 0.1
    assert by_position[: length - 1].min() > math.log(8) - 0.1
