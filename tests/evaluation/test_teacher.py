"""Stored targets against a loop over windows, a pass that is stopped, and what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data import targets as stored
from scaling_testbed.data.cutting import Cutting
from scaling_testbed.evaluation import teacher
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.files import sha256_of
from scaling_testbed.runs.identity import weights_sha256
from scaling_testbed.training.run import train
from tests.training.conftest import TINY

GIB = 2**30


@pytest.fixture
def on(tmp_path, data_dir):
    """Returns a function that trains a tiny run on other data and returns its folder."""

    def make(*words):
        places = [f"data_dir={data_dir}", f"runs_dir={tmp_path}/runs"]
        (run,) = compose_many([[*TINY[3:], *places, *words]])
        train(run, quiet=True)
        return run_folder_path(run)

    return make


@pytest.fixture
def lines(tmp_path):
    """Overrides of a corpus of lines of many lengths."""
    text = [f"{n} the cat sat on the mat and a dog ran to it"[: 3 + n % 40] for n in range(300)]
    for name, rows in (("t", text), ("v", [f"v{row}" for row in text[:99]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return "data=text_files", f"data.files={tmp_path}/t.jsonl", f"data.validation_files={tmp_path}/v.jsonl"


def corpus_of(folder):
    run, row = recorded_run(folder), json.loads((folder / "result.json").read_text())
    return Path(run.data_dir) / row["data_folder"]


def prepared(folder, out, **how):
    return teacher.prepare_targets(recorded_run(folder), folder, **{"top_k": 3, "max_bytes": GIB, "out": out} | how)


def by_hand(folder, numbers, temperature=1.0):
    """The log-probabilities of the whole vocabulary, a window of the run at a time."""
    run = recorded_run(folder)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    batch = run.batch.cutting.of(data.train, 16).batch(numbers).map(torch.from_numpy)
    begins = [None] * len(numbers) if batch.begins_BT is None else batch.begins_BT.split(1)
    with torch.no_grad():
        rows = [
            model.logits(tokens[:, :-1], begin) for tokens, begin in zip(batch.tokens_BS.split(1), begins, strict=True)
        ]
    return (torch.cat(rows) / temperature).log_softmax(-1)


@pytest.mark.parametrize(("words", "temperature"), [((), 1.0), (("model.final_softcap=3",), 2.0)])
def test_targets_are_the_likeliest_tokens_of_the_definition(whole, tmp_path, words, temperature, monkeypatch):
    monkeypatch.setattr(stored, "PART_BYTES", 16 * 3 * 4 * 500)  # 500 sequences, so there are several parts
    row, folder = whole(*words)
    found, was_there = prepared(folder, tmp_path, temperature=temperature)
    assert not was_there and len(found.manifest["files"]["ids"]) == 3
    numbers = np.array([7, 0, 1248, 499, 500])
    log_p = by_hand(folder, numbers, temperature)
    given = found.of("", numbers)
    assert given[stored.IDS].shape == given[stored.LOG_P].shape == (5, 16, 3)
    wanted = log_p.topk(3)
    assert (torch.from_numpy(given[stored.IDS]) == wanted.indices).float().mean() > 0.99  # near ties may swap
    # fp16 has 11 binary digits; the model's pass has other shapes, so fp32 differs in the last digits too.
    assert given[stored.LOG_P].astype(np.float32) == pytest.approx(wanted.values.numpy(), rel=2**-11 + 1e-5)
    everything = by_hand(folder, np.arange(1249), temperature).topk(3).values.exp().sum(-1)
    assert found.manifest["mean_tail"] == pytest.approx(1 - everything.mean().item(), abs=1e-4)
    about = found.manifest["teacher"]
    assert about["weights_sha256"] == weights_sha256(folder / "checkpoints" / "step-00000012")
    assert [about[key] for key in ("run_id", "step", "n_params", "n_tokens", "flops")] == [
        *(row["run_id"], 12, row["n_params"], row["n_tokens"], row["flops"])
    ]
    assert found.manifest["pass_flops"] == pytest.approx(row["flops"] / row["n_tokens"] / 3 * 1249 * 16)


def test_a_stopped_pass_goes_on_and_gives_the_same_bytes(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PART_BYTES", 16 * 3 * 4 * 500)
    _, folder = whole()
    wanted, _ = prepared(folder, tmp_path / "whole")
    write, made = stored.Writer.write, []

    def stop_at_second(self, place, *arrays):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(place)
        write(self, place, *arrays)

    monkeypatch.setattr(stored.Writer, "write", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepared(folder, tmp_path / "stopped")
    (place,) = (tmp_path / "stopped").iterdir()
    with pytest.raises(stored.UserError, match="has no whole targets"):
        stored.open_targets(place)
    monkeypatch.setattr(stored.Writer, "write", lambda *given: made.append(given[1]) or write(*given))
    found, was_there = prepared(folder, tmp_path / "stopped")
    assert made == [0, 1, 2] and not was_there and found.manifest == wanted.manifest
    assert found.folder.name == wanted.folder.name
    monkeypatch.setattr(stored.Writer, "write", stop_at_second)
    assert prepared(folder, tmp_path / "stopped")[1]  # nothing is made again


def test_a_packed_grid_is_kept_and_another_grid_is_refused(on, lines, tmp_path):
    folder = on(*lines, "batch.packing=documents", "batch.document_masking=true")
    found, _ = prepared(folder, tmp_path)
    run, numbers = recorded_run(folder), np.array([3, 0])
    wanted = by_hand(folder, numbers).topk(3).values.numpy()
    assert found.of("", numbers)[stored.LOG_P].astype(np.float32) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    data = load_model(run, folder, step=None, device=torch.device("cpu"))[2]
    found.check_grid(stored.grid_of(data, 16, run.batch.cutting))
    for length, cutting, said in [
        (8, run.batch.cutting, "sequence_length is 16 there and 8"),
        (16, Cutting(document_masking=True), "packing is documents there and windows"),
        (16, Cutting(packing="documents"), "document_masking is True there and False"),
    ]:
        with pytest.raises(stored.UserError, match=said):
            found.check_grid(stored.grid_of(data, length, cutting))


def test_what_is_damaged_or_cannot_be_a_teacher_is_one_line(whole, trained, on, lines, tmp_path, capsys):
    _, folder = whole()
    words = ["prepare-targets", str(folder), "--top-k", "2", "--out", str(tmp_path / "t")]
    assert analyze.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert analyze.main(words) == 0 and "was there, fingerprint " + said["fingerprint"] in capsys.readouterr().out
    (place,) = (tmp_path / "t").iterdir()
    file = place / "log_p-00000.bin"
    raw = file.read_bytes()
    for content, message in [(raw[:-2], "the file was cut"), (raw[:-1] + b"\0", "sha256 differs from the manifest")]:
        file.write_bytes(content)
        assert analyze.main(words) == 1 and message in capsys.readouterr().err
    file.unlink()
    assert analyze.main(words) == 1 and "No such file" in capsys.readouterr().err
    file.write_bytes(raw)
    assert sha256_of(file) == said["files"]["log_p"][0]["sha256"]
    manifest = place / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    assert analyze.main(words) == 1 and "differs from the hash in it" in capsys.readouterr().err

    other = on(*lines)
    sources = [
        f"{name}:{{name:markov,n_tokens:{n},n_validation_tokens:2000}}" for name, n in (("a", 9000), ("b", 9999))
    ]
    mixed = on("data=mixture", f"data.sources={{{','.join(sources)}}}")
    _, gone = trained("checkpoint.at_end=false", "checkpoint.every_steps=0")
    _, stopped = trained("seed=5")
    row = json.loads((stopped / "result.json").read_text())
    (stopped / "result.json").write_text(json.dumps(row | {"status": "preempted", "error": "stopped by SIGTERM"}))
    for run_dir, more, status, message in [
        (folder, ["--max-gib", "0.0001"], 2, "and --max-gib allows 0.0001; give --max-gib 0.001 or a smaller --top-k"),
        (folder, ["--top-k", "9999"], 2, "below the vocabulary; got 9999"),
        (folder, ["--top-k", "0"], 2, "--top-k must be greater than zero"),
        (folder, ["--temperature", "0"], 2, "--temperature must be greater than zero"),
        (folder, ["--step", "3"], 1, "holds no step 3; there are"),
        (folder, ["--data", str(corpus_of(other))], 1, "was trained with another tokenizer"),
        (mixed, [], 1, "is a mixture, whose sequences are those of its sources; give one of them by --data"),
        (gone, [], 1, "holds no checkpoint"),
        (stopped, [], 1, "is no finished run: the run was interrupted: stopped by SIGTERM"),
    ]:
        assert analyze.main(["prepare_targets", str(run_dir), "--top-k", "2", *more]) == status, message
        printed = capsys.readouterr().err
        assert message in printed and len(printed.splitlines()) == 1
