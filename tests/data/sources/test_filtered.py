"""A filtered corpus is its corpus with some documents, and planted junk is in the train split alone."""

import json

import numpy as np
import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.data.documents import documents
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.data.sources.filtered import FilteredConfig, read_kept, write_kept
from scaling_testbed.data.sources.planted import PlantedConfig
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError

LINES = [f"line {n} {'x' * n}" for n in range(12)]


@pytest.fixture
def corpus(tmp_path):
    """The folder of a corpus with a document for each line of a JSON file."""
    for name, lines in (("t", LINES), ("v", ["the text of validation", "and another"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    words = [f"data.files={tmp_path}/t.jsonl", f"data.validation_files={tmp_path}/v.jsonl"]
    (run,) = compose_many([["data=text_files", *words, f"data_dir={tmp_path}/data"]])
    return prepare(run.data, run.tokenizer, data_dir=tmp_path / "data", quiet=True)


def texts(folder, split="train"):
    data = open_prepared(folder)
    return [load_tokenizer(folder).decode(tokens[tokens != 256]) for _, tokens, _ in documents(data, split)]


def filtered(tmp_path, corpus, kept, name="kept"):
    file = tmp_path / f"{name}.json"
    write_kept(file, open_prepared(corpus), kept, {"where": ["x"]})
    source = FilteredConfig(corpus=str(corpus), documents=str(file))
    return prepare(source, None, data_dir=tmp_path / "data", quiet=True), file


def test_documents_end_at_each_eos_whatever_is_read_at_once(corpus, monkeypatch):
    found = [(name, tokens.tolist()) for name, tokens, _ in documents(open_prepared(corpus))]
    assert texts(corpus) == LINES and all(tokens[-1] == 256 for _, tokens in found)
    for at_once in (1, 7, 10**6):
        monkeypatch.setattr("scaling_testbed.data.documents.READ_TOKENS", at_once)
        assert [(name, tokens.tolist()) for name, tokens, _ in documents(open_prepared(corpus))] == found


def test_a_filtered_corpus_has_the_named_documents_and_the_same_validation(tmp_path, corpus):
    folder, _ = filtered(tmp_path, corpus, [1, 4, 11])
    assert texts(folder) == [LINES[place] for place in (1, 4, 11)]
    assert texts(folder, "validation") == texts(corpus, "validation")
    here, there = open_prepared(folder), open_prepared(corpus)
    assert here.fingerprint != there.fingerprint and here.tokenizer_fingerprint == there.tokenizer_fingerprint
    assert here.validation.n_bytes == there.validation.n_bytes and here.manifest["eos_id"] == 256
    assert here.manifest["splits"]["train"]["n_documents"] == 3
    other, _ = filtered(tmp_path, corpus, [1, 4], "fewer")
    assert other != folder and open_prepared(other).fingerprint != here.fingerprint
    moved = tmp_path / "elsewhere.json"
    write_kept(moved, there, [1, 4, 11], {"where": ["y"]})
    again = prepare(FilteredConfig(corpus=f"{corpus.parent}/text*", documents=str(moved)), None,
                    data_dir=tmp_path / "data", quiet=True)  # fmt: skip
    assert again != folder and open_prepared(again).fingerprint == here.fingerprint  # chosen in another way


def test_what_does_not_fit_the_corpus_is_named(tmp_path, corpus):
    with pytest.raises(ConfigError, match="data.documents must be given for data=filtered"):
        FilteredConfig(corpus=str(corpus)).identity()
    with pytest.raises(ConfigError, match="matches .*name one folder"):
        FilteredConfig(corpus=f"{tmp_path}/*.jsonl", documents="x").identity()
    with pytest.raises(UserError, match="names documents that .* does not have: it has 12"):
        filtered(tmp_path, corpus, [3, 12])
    folder, file = filtered(tmp_path, corpus, [3])
    with pytest.raises(UserError, match="names documents of another corpus than"):
        FilteredConfig(corpus=str(folder), documents=str(file)).identity()
    file.write_text(file.read_text().replace("[3]", "[4]").replace("3\n", "4\n"))
    with pytest.raises(UserError, match="differs from the hash in it"):
        read_kept(file)


def test_a_corpus_without_eos_has_no_documents(tmp_path):
    (run,) = compose_many([["data=markov", "data.n_tokens=2000", "data.n_validation_tokens=1000"]])
    folder = prepare(run.data, run.tokenizer, data_dir=tmp_path, quiet=True)
    with pytest.raises(UserError, match="no token ends a document there"):
        next(documents(open_prepared(folder)))


def test_planted_junk_has_its_kinds_and_shares_and_validation_is_clean():
    config = PlantedConfig(name="planted", validation_fraction=0.2)
    rng = np.random.default_rng(0)
    pieces = [bytes(rng.integers(97, 123, 128, dtype=np.uint8)) for _ in range(3000)]
    kinds = [config.kind_of(piece) for piece in pieces]
    junk = [config.planted(piece) for piece in pieces]
    of_train = [kind for piece, kind in zip(pieces, kinds, strict=True) if in_train(piece)]
    for kind in PlantedConfig.kinds:
        assert of_train.count(kind) / len(of_train) == pytest.approx(0.1, abs=0.02)
    for piece, kind, found in zip(pieces, kinds, junk, strict=True):
        assert in_train(found) == in_train(piece) and (kind is None) == (found == piece) and len(found) == 128
        if kind == "shuffled":
            assert sorted(found) == sorted(piece)
        if kind == "repeated":
            assert found == found[:8] * 16 and found[:8] in piece
        if kind == "uniform":
            assert all(32 <= byte <= 126 for byte in found)
    assert junk == [config.planted(piece) for piece in pieces]
    with pytest.raises(ConfigError, match="must not be negative and have a sum of 1 at most"):
        PlantedConfig(shuffled=0.6, uniform=0.5)


def in_train(piece):
    from scaling_testbed.data.sources.source import split_of

    return split_of(piece, 0.2) == "train"
