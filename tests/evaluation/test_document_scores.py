"""Document scores against a loop over tokens, the table they make, and the corpus that conditions make of it."""

import json
import math
from pathlib import Path

import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.documents import documents
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.evaluation.document_scores import named_runs
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.training.run import train

LENGTHS = (3, 40, 15, 16, 17, 70, 1)


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs on a corpus of lines of many lengths, and the folder of the corpus."""
    words = "the cat sat on the mat and a dog ran to the red hat " * 3
    lines = [f"{n} {words}"[:length] for n, length in enumerate(LENGTHS * 6)]
    for name, text in (("t", lines), ("v", [words + "x", words + "y"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    data = [f"data.files={tmp_path}/t.jsonl", f"data.validation_files={tmp_path}/v.jsonl"]
    places = [f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "evaluation.every_steps=0", "compute.threads=1"]
    small = ["model=nano_s", "batch.sequences=4", "batch.sequence_length=16", "optimizer.lr=1e-2"]

    def make(*overrides):
        (run,) = compose_many([["data=text_files", *data, *places, *small, *overrides]])
        train(run, quiet=True)
        return run_folder_path(run)

    folders = make("budget.steps=2"), make("budget.steps=20", "model.attention_normaliser=relu2")
    return *folders, next(path for path in (tmp_path / "data").iterdir() if path.is_dir())


def by_hand(folder, text):
    """Loss, EL2N and the norm of the gradient of a document, a piece at a time."""
    run = recorded_run(folder)
    _, model, _ = load_model(run, folder, step=None, device=torch.device("cpu"))
    ids, losses, errors = [256, *text], [], []
    for first in range(0, len(text), 16):
        piece = torch.tensor(ids[first : first + 17])
        logits_TV = model.logits(piece[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits_TV, piece[1:], reduction="none"))
        wrong = logits_TV.softmax(-1) - torch.nn.functional.one_hot(piece[1:], logits_TV.shape[1])
        errors.append(wrong.norm(dim=-1))
    loss = torch.cat(losses).mean()
    loss.backward()
    squares = sum(one.grad.square().sum() for one in model.parameters())
    return loss.item(), torch.cat(errors).mean().item(), math.sqrt(squares)


def test_scores_are_those_of_a_loop_and_conditions_make_a_corpus(runs, tmp_path, capsys):
    small, large, corpus = runs
    table, kept = tmp_path / "scores.jsonl", tmp_path / "kept.json"
    words = ["score-documents", f"small={small}", f"large={large}", "--data", str(corpus), "--gradient"]
    assert analyze.main([*words, "--out", str(table)]) == 0
    said = capsys.readouterr().out
    assert "42 documents of the train split" in said and "loss_per_token" in said
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    texts = [tokens.tolist() for _, tokens, _ in documents(open_prepared(corpus))]
    assert [row["n_tokens"] for row in rows] == [length + 1 for length in LENGTHS * 6] == [len(text) for text in texts]
    for place in range(len(LENGTHS)):
        for name, folder in (("small", small), ("large", large)):
            found = [rows[place][f"{kind}_{name}"] for kind in ("loss", "el2n", "gradient_norm")]
            assert found == pytest.approx(by_hand(folder, texts[place]), rel=1e-4)
    command = ["select_documents", str(table), "--data", str(corpus), "--out", str(kept)]
    more = ["--column", "gap=loss_small-loss_large", "--column", "share=ordered(loss_small,loss_large)"]
    assert analyze.main([*command, *more, "--where", "gap>0 and n_tokens>2", "--where", "share=1"]) == 0
    wanted = [row["document"] for row in rows if row["loss_small"] > row["loss_large"] and row["n_tokens"] > 2]
    assert f"kept {len(wanted)} of 42 documents" in capsys.readouterr().out and 0 < len(wanted) < 42
    assert json.loads(kept.read_text())["documents"] == wanted
    run = recorded_run(small)
    (filtered,) = compose_many([[
        "data=filtered", f"data.corpus={corpus}", f"data.documents={kept}", f"data_dir={run.data_dir}",
        f"runs_dir={run.runs_dir}", "model=nano_s", "batch.sequences=2", "batch.sequence_length=16", "budget.steps=2",
    ]])  # fmt: skip
    row = train(filtered, quiet=True)
    original = json.loads((small / "result.json").read_text())
    assert row["data_fingerprint"] != original["data_fingerprint"] and row["val_bpb"] is not None
    assert row["data_inputs"] is not None and row["status"] == "finished"
    assert train(filtered, quiet=True) == row  # it is served again


def test_what_cannot_be_scored_or_chosen_is_one_line(runs, tmp_path, capsys, whole):
    small, _, corpus = runs
    table = tmp_path / "scores.jsonl"
    data = ["--data", str(corpus)]
    for words, status, said in [
        (["score_documents", str(whole()[1]), *data], 1, "was trained with another tokenizer than that of"),
        (["score_documents", f"a-b={small}", *data], 2, "write NAME=RUN_DIR, with a NAME of letters"),
        (["score_documents", f"a={small}", f"a={small}", *data], 2, "another run is named a"),
        (["score_documents", str(small), *data, "--split", "test"], 2, "--split must be"),
        (["score_documents", str(small), *data, "--limit", "0"], 2, "--limit must be greater than zero"),
    ]:
        assert analyze.main(words) == status
        assert said in capsys.readouterr().err
    assert analyze.main(["score_documents", str(small), *data, "--limit", "5", "--out", str(table)]) == 0
    capsys.readouterr()
    choose = ["select_documents", str(table), *data, "--out", str(tmp_path / "k.json")]
    assert analyze.main(choose) == 2 and "--where is missing" in capsys.readouterr().err
    assert analyze.main([*choose, "--where", "n_tokens>0"]) == 1
    assert "has 5 documents, and the train split of" in capsys.readouterr().err
    assert analyze.main(["score_documents", str(small), *data, "--out", str(table)]) == 0
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines[1:], lines[0]]))
    capsys.readouterr()
    assert analyze.main([*choose, "--where", "n_tokens>0"]) == 1
    assert "row 1 is not document 0 of" in capsys.readouterr().err
    table.write_text("".join(lines))
    conditions = ["--column", "x=-n_tokens", "--where", "n_tokens=2", "--where", "x=-4"]
    assert analyze.main([*choose, *conditions]) == 1
    assert "no document fits all conditions" in capsys.readouterr().err


def test_runs_are_named_by_their_folder_unless_they_are_named(tmp_path):
    assert named_runs([f"{tmp_path}/abc123", "x=y/z"]) == {"abc123": tmp_path / "abc123", "x": Path("y/z")}
