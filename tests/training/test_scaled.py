"""ce_scaled of a run: asked for by a key or by a loss that is no cross-entropy, the same in every placement."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.cutting import Cutting
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.learning.objectives import CrossEntropyObjective
from scaling_testbed.training.run import train
from tests.training.conftest import TINY
from tests.training.test_run import assert_same_weights

ASKED = ("evaluation.ce_scaled=true", "evaluation.tokens=608", "evaluation.rows=5", "optimizer.lr=0.1")
PACKED = {"packing": "documents", "document_masking": True}
# 608 tokens are 38 windows of 16.


def of_odd_windows(folder, temperature):
    """The loss of the odd windows of validation at a temperature, by hand."""
    run = recorded_run(folder)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    there = (data.validation.n_tokens - 1) // 16
    rows = [data.validation.read(number * there // 38 * 16, 17).astype(np.int64) for number in range(1, 38, 2)]
    tokens = torch.from_numpy(np.stack(rows))
    with torch.no_grad():
        logits = model.logits(tokens[:, :-1]).double().flatten(0, 1)
    return F.cross_entropy(logits / temperature, tokens[:, 1:].flatten()).item()


def test_the_loss_after_one_temperature_is_that_of_the_odd_windows(trained):
    plain, without = trained(*ASKED[1:], runs="without")
    row, folder = trained(*ASKED)
    assert_same_weights(without, folder)
    assert plain["ce_scaled"] is plain["ce_scaled_temperature"] is None and row["run_id"] != plain["run_id"]
    assert row["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-5)
    assert row["ce_scaled"] == pytest.approx(of_odd_windows(folder, row["ce_scaled_temperature"]), abs=1e-5)
    assert row["ce_scaled_by_set"] == {"validation": row["ce_scaled"]} and row["ce_scaled_temperature"] != 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(("ce_scaled" in line) == ("val_loss" in line) for line in lines)
    assert row["ce_scaled"] == lines[-1]["ce_scaled"] != lines[0]["ce_scaled"]


def test_documents_and_padding_are_those_of_the_validation_loss(tmp_path, data_dir):
    lines = [json.dumps({"text": f"{n} is {n * n}, or {n} times {n}"[: 5 + n % 30]}) for n in range(900)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = ("data=text_files", f"data.files={tmp_path}/a.jsonl", "data.validation_fraction=0.3", "tokenizer=bytes")
    packed = ("batch.packing=documents", "batch.document_masking=true", "evaluation.tokens=1e9")
    places = (f"runs_dir={tmp_path}/runs", f"data_dir={data_dir}")
    (run,) = compose_many([[*TINY[3:], *ASKED, *corpus, *packed, *places]])
    row, folder = train(run, quiet=True), run_folder_path(run)
    run = recorded_run(folder)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    batches = ValidationBatches(
        data.validation, sequence_length=16, max_tokens=None, rows=10**9, cutting=Cutting(**PACKED)
    )
    batch = batches.batch(0)
    inputs, targets, begins = (torch.from_numpy(x[1::2]) for x in batch.tensors)
    with torch.no_grad():
        hidden = model(inputs[:, :-1], begins)
        logits = (hidden @ model.head_weight_VD.T).double().flatten(0, 1)
    expected = F.cross_entropy(logits / row["ce_scaled_temperature"], targets.flatten(), ignore_index=-100)
    assert (targets == -100).any() and row["ce_scaled"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_sharded_run_has_the_same_and_the_average_its_own(trained):
    row, _ = trained(*ASKED, "averaging=ema", runs="single")
    sharded, _ = trained(*ASKED, "averaging=ema", "parallelism=fsdp", runs="fsdp")
    for key in ("ce_scaled", "ce_scaled_temperature", "ce_scaled_average"):
        assert sharded[key] == pytest.approx(row[key], abs=2e-5)
    assert row["ce_scaled_average"] != row["ce_scaled"]


def test_a_loss_that_is_no_cross_entropy_has_it_without_asking(trained, monkeypatch):
    monkeypatch.setattr(CrossEntropyObjective, "is_cross_entropy", False)
    row, _ = trained("evaluation.tokens=16")
    assert row["ce_scaled"] is None and row["ce_scaled_by_set"] == {"validation": None}  # one window
    assert trained("evaluation.tokens=32")[0]["ce_scaled"] > 0
