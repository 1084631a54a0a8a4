"""The loss by length is that of a plain loop over windows, and only the context differs between lengths."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaling_testbed import evaluate
from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation import lengths as module
from scaling_testbed.evaluation.lengths import by_length
from scaling_testbed.evaluation.loading import load_model


def by_hand(folder, length, n_blocks, block):
    """The loss of each token of the first blocks, a window at a time."""
    run = recorded_run(folder)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    there = (data.validation.n_tokens - 1) // block
    found = []
    for number in range(n_blocks):
        tokens = data.validation.read(number * there // n_blocks * block, block + 1).astype(np.int64)
        for first in range(0, block - length + 1, length):
            ids = torch.from_numpy(tokens[first : first + length + 1])
            with torch.no_grad():
                found.append(F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="none"))
    return torch.stack(found)


def test_each_length_is_what_a_loop_over_windows_finds(whole, monkeypatch):
    _, folder = whole("model.final_softcap=3.0")
    monkeypatch.setattr(module, "PASS_TOKENS", 100)
    found = by_length(recorded_run(folder), folder, [64, 8, 16, 48], tokens=700)
    assert (found.step, found.train_length, found.n_blocks, found.block_tokens) == (12, 16, 10, 64)
    assert [row["length"] for row in found.rows] == [8, 16, 48, 64]
    for row in found.rows:
        losses_WT = by_hand(folder, row["length"], 10, 64)
        assert row["tokens"] == losses_WT.numel() and row["attention_window"] is None
        assert row["loss"] == pytest.approx(losses_WT.mean().item(), abs=1e-5)
        for key in [key for key in row if key.startswith("loss.")]:
            first, last = map(int, key.removeprefix("loss.").split("-"))
            assert row[key] == pytest.approx(losses_WT[:, first - 1 : last].mean().item(), abs=1e-5)
    assert [key for key in found.rows[-1] if "-" in key] == ["loss.1-8", "loss.9-16", "loss.17-48", "loss.49-64"]
    shortest, _, odd, longest = found.rows
    blocks = by_hand(folder, 64, 10, 64).mean(1) - by_hand(folder, 8, 10, 64).view(10, -1).mean(1)
    assert longest["difference"] == pytest.approx(blocks.mean().item(), abs=1e-5)
    assert longest["difference_se"] == pytest.approx(blocks.std().item() / 10**0.5, rel=1e-3)
    assert (
        shortest["difference"] is odd["difference"] is odd["difference_se"] is None
        and odd["tokens"] == 480
        and longest["tokens"] == 640
    )
    assert found.remarks()[0].startswith("of 10 blocks of 64 validation tokens, windows of 48 leave out")


def test_a_window_at_evaluation_is_that_of_the_attention(whole):
    """Of one position it is a model that reads the last token only, at any length."""
    _, folder = whole()
    run = recorded_run(folder)
    found = by_length(run, folder, [16, 64], windows=[1, 64], tokens=600)
    arms = {(row["attention_window"], row["length"]): row["loss"] for row in found.rows}
    assert arms[1, 64] == pytest.approx(by_hand(folder, 1, 9, 64).mean().item(), abs=1e-5)
    assert arms[64, 64] == pytest.approx(arms[None, 64], abs=1e-6) and arms[1, 64] != pytest.approx(arms[None, 64])
    assert found.remarks() == ["every length predicts the same tokens: 9 blocks of 64 validation tokens"]


def test_the_door_prints_a_table_and_writes_it(whole, capsys, tmp_path):
    _, folder = whole()
    words = [str(folder), "--lengths", "16,32", "--window", "train", "--tokens", "512", "--step", "8"]
    assert evaluate.main([*words, "--out", str(tmp_path / "l.csv")]) == 0
    said = capsys.readouterr().out
    assert "step 8 of" in said and "trained on sequences of 16 tokens" in said and "loss.17-32" in said
    assert "every length predicts the same tokens: 16 blocks of 32" in said
    assert (tmp_path / "l.csv").read_text().startswith("attention_window,length,tokens,loss,loss_se,difference")
    assert evaluate.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = recorded_run(folder)
    assert found["rows"] == by_length(run, folder, [16, 32], windows=[16], tokens=512, step=8).rows
    assert [(row["attention_window"], row["length"]) for row in found["rows"]] == [
        *((None, length) for length in (16, 32)), *((16, length) for length in (16, 32))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lengths", "16,x"], "--lengths must be whole numbers, such as 64,128; got '16,x'"),
        (["--lengths", "0"], "--lengths must be whole numbers above zero; got 0"),
        (["--lengths", "16,16"], "--lengths 16,16: a number is given twice"),
        (["--lengths", "16", "--window", "all"], "--window must be whole numbers, such as 64,128; got 'all'"),
        (["--lengths", "16", "--window", "0"], "--window must be whole numbers above zero; got 0"),
        (["--lengths", "16", "--tokens", "0"], "--tokens must be greater than zero"),
    ],
)
def test_what_cannot_be_measured_is_one_line(whole, capsys, words, said):
    assert evaluate.main([str(whole()[1]), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_split_that_is_too_short_and_a_model_that_is_not_finite_are_named(whole, monkeypatch):
    _, folder = whole()
    run = recorded_run(folder)
    with pytest.raises(UserError, match="--lengths 5000: the validation split of .* has 4,000 tokens"):
        by_length(run, folder, [5000], tokens=64)
    (masked,) = compose_many([["batch.document_masking=true"]])
    with pytest.raises(ConfigError, match="was trained with batch.document_masking=true"):
        by_length(masked, folder, [8], tokens=100)
    with pytest.raises(ConfigError, match="got none"):
        by_length(run, folder, [], tokens=64)
    monkeypatch.setattr(module, "token_losses", lambda model, tokens: torch.full((len(tokens), 16), torch.nan))
    with pytest.raises(UserError, match="step 12 of .* not finite at length 16"):
        by_length(run, folder, [16], tokens=64)
