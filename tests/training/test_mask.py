"""A run on data with a mask is trained and judged on the targets alone, and counts the tokens that it reads."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.cutting import NO_TARGET
from scaling_testbed.data.documents import documents
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.corpus_tasks import validation_texts
from scaling_testbed.evaluation.document_scores import open_scorer, score_documents
from scaling_testbed.evaluation.lengths import by_length
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.training import run as trainer
from scaling_testbed.training.data import open_training_batches
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt
from tests.training.test_run import assert_same_bits

PACKED = ("batch.packing=documents", "batch.document_masking=true")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Overrides for a corpus of questions with answers, of which the answers are targets."""
    path = tmp_path_factory.mktemp("pairs") / "a.jsonl"
    draw = np.random.default_rng(0).integers(0, 500, size=(900, 2)).tolist()
    rows = [{"q": f"{a}+{b}=", "text": str(a + b)} for a, b in draw]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("data=text_files", f"data.files={path}", "data.prompt_field=q", "data.validation_fraction=0.3")


@pytest.fixture(scope="module")
def answered(tmp_path_factory, pairs):
    """Returns a function from further overrides to (row, run folder), trained once."""
    done, places = {}, tmp_path_factory.mktemp("answered")

    def run_it(*overrides):
        if overrides not in done:
            where = [f"runs_dir={places}", f"data_dir={places / 'data'}"]
            (run,) = compose_many([[*TINY[3:], *where, *pairs, "evaluation.ce_scaled=true", *overrides]])
            done[overrides] = train(run, quiet=True), run_folder_path(run)
        return done[overrides]

    return run_it


def losses_by_hand(folder, batches):
    """The cross-entropy of each target of a set, in its order."""
    run = recorded_run(folder)
    _, model, _ = load_model(run, folder, step=None, device=torch.device("cpu"))
    found = []
    for batch in batches:
        tokens_BS, targets_BT, begins_BT = batch.map(torch.from_numpy).tensors
        with torch.no_grad():
            logits_BTV = model.logits(tokens_BS[:, :-1], begins_BT)
        there_BT = targets_BT != NO_TARGET
        found.append(F.cross_entropy(logits_BTV[there_BT], targets_BT[there_BT], reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize("words", [(), PACKED], ids=str)
def test_losses_are_over_targets_and_budgets_over_tokens(answered, words):
    row, folder = answered(*words)
    run = recorded_run(folder)
    data = open_prepared(next(path for path in (folder.parents[1] / "data").iterdir() if path.is_dir()))
    batches = open_training_batches(run, data)
    arrays = [batches.batch(step) for step in range(row["steps"])]
    n_targets = sum(int((batch.targets_BT != NO_TARGET).sum()) for batch in arrays)
    assert row["n_targets"] == n_targets < row["n_tokens"] / 1.5
    if not words:
        assert row["n_tokens"] == 12 * 8 * 16
    assert row["flops_6nd"] == 6 * row["n_params"] * row["n_tokens"]
    assert row["val_bpb"] is None and "validation tokens are no targets" in row["val_bpb_withheld"]
    sets = ValidationBatches(data.validation, sequence_length=16, max_tokens=1024, rows=8, cutting=run.batch.cutting)
    by_hand = losses_by_hand(folder, sets)
    assert len(by_hand) == sets.n_tokens
    assert row["val_loss"] == pytest.approx(by_hand.mean().item(), abs=1e-5)
    assert row["val_loss"] < row["val_loss_initial"] and row["ce_scaled"] < row["val_loss"]


def test_micro_batches_with_unequal_numbers_of_targets_give_the_same_losses(answered):
    one, other = answered()[0], answered("batch.micro_batch_sequences=2")[0]
    assert one["val_loss"] == pytest.approx(other["val_loss"], abs=2e-5)


def test_a_stopped_run_on_masked_data_ends_in_the_same_bits(tmp_path, answered):
    row, whole = answered()
    run = dataclasses.replace(recorded_run(whole), runs_dir=str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(30))
        assert train(run, quiet=True)["status"] == "preempted"
    again = train(run, quiet=True)
    assert again["restarts"] == 1 and again["n_targets"] == row["n_targets"]
    assert_same_bits(whole, run_folder_path(run))


def test_losses_by_length_are_over_targets(answered):
    _, folder = answered()
    run = recorded_run(folder)
    _, _, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    found = by_length(run, folder, [8, 32], tokens=640)
    blocks = [*ValidationBatches(data.validation, sequence_length=32, max_tokens=640, rows=1)]
    for row in found.rows:
        halves = []
        for block in blocks:
            for first in range(0, 32, row["length"]):
                here = slice(first, first + row["length"])
                inputs = block.tokens_BS[:, first : first + row["length"] + 1]
                halves.append(dataclasses.replace(block, tokens_BS=inputs, targets_BT=block.targets_BT[:, here]))
        by_hand = losses_by_hand(folder, halves)
        assert row["tokens"] == len(by_hand) and row["loss"] == pytest.approx(by_hand.mean().item(), abs=1e-5)
    assert found.rows[1]["difference"] is not None


def test_document_scores_and_chosen_documents_keep_to_the_mask(answered, tmp_path, capsys):
    _, folder = answered()
    run = recorded_run(folder)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    rows = score_documents([open_scorer("a", run, folder, data)], data, "train", gradient=True, limit=5)
    for row, document in zip(rows, documents(data), strict=False):
        ids = torch.tensor([256, *document.tokens.tolist()])
        losses = F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="none")[document.counted]
        assert row["n_targets"] == int(document.counted.sum()) == len(losses) < row["n_tokens"]
        assert row["loss_a"] == pytest.approx(losses.mean().item(), abs=1e-5)
        model.zero_grad()
        losses.mean().backward()
        norm = math.sqrt(sum(one.grad.square().sum() for one in model.parameters()))
        assert row["gradient_norm_a"] == pytest.approx(norm, rel=1e-4)
    table, kept = tmp_path / "scores.jsonl", tmp_path / "kept.json"
    words = [str(data.folder), "--out"]
    assert analyze.main(["score-documents", f"a={folder}", "--data", *words, str(table)]) == 0
    assert analyze.main(["select-documents", str(table), "--data", *words, str(kept), "--where", "document<3"]) == 0
    (made,) = compose_many([["data=filtered", f"data.corpus={data.folder}", f"data.documents={kept}"]])
    from scaling_testbed.data.preparing.preparation import prepare

    found = open_prepared(prepare(made.data, made.tokenizer, data_dir=tmp_path, quiet=True))
    for one, other in zip(documents(found), documents(data), strict=False):
        assert one.tokens.tolist() == other.tokens.tolist() and one.counted.tolist() == other.counted.tolist()
    assert found.manifest["splits"]["train"]["n_targets"] == sum(int(one.counted.sum()) for one in documents(found))


def test_tasks_are_not_made_of_texts_that_are_partly_prompts(answered):
    folder = next(path for path in (answered()[1].parents[1] / "data").iterdir() if path.is_dir())
    with pytest.raises(UserError, match="some of its tokens are no targets of the loss .* name a file of a task"):
        validation_texts(folder)
