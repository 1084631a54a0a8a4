"""Runs that know the documents of their corpus: exact, counted honestly, and refused where they cannot be."""

import json
import math

import numpy as np
import pytest
import torch

from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.config.run import run_folder_path, run_id
from scaling_testbed.data.cutting import NO_TARGET
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.errors import ConfigError
from scaling_testbed.evaluation.inspection import inspect
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training import run as trainer
from scaling_testbed.training.data import open_training_batches
from scaling_testbed.training.parts import why_no_graph
from tests.training.conftest import TINY, StopAt, metrics
from tests.training.test_run import assert_same_bits

PACKED = ("batch.packing=documents", "batch.document_masking=true")
EOS = 256


@pytest.fixture
def tiny(tmp_path, data_dir):
    """As tests.training.conftest.tiny, without its data."""

    def make(*overrides, runs="runs"):
        (run,) = compose_many([[*TINY[3:], f"runs_dir={tmp_path / runs}", f"data_dir={data_dir}", *overrides]])
        return run, run_folder_path(run)

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Overrides for a corpus of short documents of unequal length, most of them shorter than a sequence of 16."""
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    draw = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two"]
    documents = [f"{n} " + " ".join(draw.choice(words, size=draw.integers(1, 7))) for n in range(1500)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return ("data=text_files", f"data.files={path}", "data.validation_fraction=0.3", "tokenizer=bytes")


@pytest.mark.parametrize("words", [PACKED, PACKED[1:], PACKED[:1]], ids=str)
def test_a_stopped_run_ends_in_the_same_bits(trained, text, words):
    row, whole = trained(*text, *words, runs="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(30))
        assert trained(*text, *words)[0]["status"] == "preempted"
    again, folder = trained(*text, *words)
    assert again["restarts"] == 1 and again["val_loss"] == row["val_loss"] < row["val_loss_initial"]
    assert_same_bits(whole, folder)


def test_tokens_are_counted_without_padding_everywhere(trained, text):
    row, folder = trained(*text, *PACKED, runs="whole")
    _, split = trained(*text, *PACKED, "batch.micro_batch_sequences=2", runs="split")
    lines = metrics(folder)
    tokens = [line["tokens"] for line in lines[1:]]
    assert row["n_tokens"] == tokens[-1] < 12 * 128
    assert row["padding_share"] == 1 - row["n_tokens"] / (12 * 128) > 0
    assert all(100 < more - fewer <= 128 for fewer, more in zip([0, *tokens], tokens, strict=False))
    assert row["flops_6nd"] == 6 * row["n_params"] * row["n_tokens"]
    plain, _ = trained(*text, runs="plain")
    assert plain["padding_share"] is None and plain["flops"] == row["flops"]  # FLOPs are those of all positions
    for one, other in zip(lines, metrics(split), strict=True):
        assert one.get("tokens") == other.get("tokens")
        for key in ("train_loss", "grad_norm", "val_loss"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=2e-4)


def test_the_loss_of_a_step_is_the_mean_over_its_targets(tiny, trained, text, data_dir):
    words = (*text, *PACKED, "loss.z_loss=0", "budget.steps=1")
    (run, _), (row, folder) = tiny(*words), trained(*words)
    batch = open_training_batches(run, open_prepared(data_dir / row["data_folder"])).batch(0).map(torch.from_numpy)
    tokens_BS, targets_BT, begins_BT = batch.tensors
    model = Transformer(run.model.resolved(257), run.parametrization, device=torch.device("cpu"))
    model.init_weights(run.seed)
    logits_BTV = model.logits(tokens_BS[:, :-1], begins_BT)
    loss = torch.nn.functional.cross_entropy(logits_BTV.mT, targets_BT, ignore_index=NO_TARGET)
    assert (targets_BT == NO_TARGET).any()
    assert metrics(folder)[1]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert metrics(folder)[1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def lone_documents(data):
    """Each document of the validation split behind an EOS token, as pieces of at most 16 targets."""
    tokens = data.validation.read(0, data.validation.n_tokens).astype(np.int64)
    for document in np.split(tokens, np.flatnonzero(tokens == EOS)[:-1] + 1):
        padded = np.concatenate([[EOS], document])
        for begin in range(0, len(document), 16):
            yield torch.from_numpy(padded[begin : begin + 17])[None]


def test_the_validation_loss_is_that_of_each_document_alone(tiny, trained, text):
    """The plain path computes it: a model that is trained with masking needs nothing to be used."""
    run, _ = tiny(*text, *PACKED, "evaluation.tokens=1e7")
    row, folder = trained(*text, *PACKED, "evaluation.tokens=1e7")
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens_1S in lone_documents(data):
            logits_TV = model.logits(tokens_1S[:, :-1])[0].double()
            total += torch.nn.functional.cross_entropy(logits_TV, tokens_1S[0, 1:], reduction="sum").item()
            count += tokens_1S.shape[1] - 1
    assert count == data.validation.n_tokens
    assert row["val_loss"] == pytest.approx(total / count, rel=1e-6)
    # `analyze inspect` measures the same sequences, and its gradient is that of their mean loss.
    step, found = inspect(run, folder, sequences=10**6)
    assert step == 12 and math.isfinite(found["grad_norm"])


def test_masking_changes_the_loss_of_windows_and_no_count(trained, text):
    plain, folder = trained(*text, runs="plain")
    masked, other = trained(*text, *PACKED[1:], runs="masked")
    assert plain["n_tokens"] == masked["n_tokens"] == 12 * 128 and masked["padding_share"] is None
    assert plain["epochs"] == masked["epochs"] and plain["flops"] == masked["flops"]
    assert plain["val_loss_initial"] != masked["val_loss_initial"]
    assert metrics(folder)[1]["train_loss"] != metrics(other)[1]["train_loss"]


def test_what_is_measured_knows_the_documents(trained, text):
    on = ("diagnostics=basic", "diagnostics.every_steps=4", "model.qk_norm=none", "optimizer.qk_clip=1")
    runs = [(*PACKED, "model.attention_impl=reference"), (*PACKED, "model.attention_impl=sdpa"), PACKED[:1]]
    folders = [trained(*text, *words, *on, runs=str(number))[1] for number, words in enumerate(runs)]
    one, other, plain = (metrics(folder)[4] for folder in folders)
    for name in ("attention_entropy/0", "attention_logit_mean/1", "attention_logit_max", "train_loss"):
        assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert one["attention_entropy/0"] < 0.9 * plain["attention_entropy/0"]  # a query sees fewer keys


def test_the_start_says_how_documents_became_sequences(tiny, text, capsys):
    run, _ = tiny(*text, *PACKED, "budget.steps=1")
    trainer.train(run)
    said = capsys.readouterr().out
    assert "documents" in said and "is padding" in said


def test_what_cannot_know_documents_is_refused_by_name(trained, tiny, text):
    for words in (PACKED[:1], PACKED[1:]):
        with pytest.raises(ConfigError, match="needs the ends of documents, and data=markov has no EOS"):
            trained(*TINY[:3], *words)
    for words in (["data=token_files", "data.vocab_size=60"], ["data=mixture", "data.sources={a: {name: noise}}"]):
        with pytest.raises(ConfigError, match="batch.document_masking=true needs the ends of documents, and data="):
            compose([*words, "batch.document_masking=true"])
    with pytest.raises(ConfigError, match="attention_normaliser=relu2, whose weights depend on the length"):
        compose(["batch.document_masking=true", "model.attention_normaliser=relu2"])
    with pytest.raises(ConfigError, match="packing must be one of windows, documents"):
        compose(["batch.packing=docs"])
    run, _ = tiny(*text, *PACKED[:1])
    assert "another number of targets" in why_no_graph(run, torch.device("cuda"))


def test_a_run_does_not_go_on_with_the_steps_of_another_packing(trained, text):
    _, parent = trained(*text, "checkpoint.keep_steps=[6]", runs="parent")
    with pytest.raises(ConfigError, match=r"steps of another batch.*batch\.packing"):
        trained(*text, *PACKED, f"start.run={parent}", "start.step=6")


def test_the_keys_are_part_of_the_identity_only_where_they_are_set():
    assert run_id(compose(["batch.packing=windows", "batch.document_masking=false"])) == run_id(compose([]))
    ids = {run_id(compose([word])) for word in ("seed=0", *PACKED)}
    assert len(ids) == 3
