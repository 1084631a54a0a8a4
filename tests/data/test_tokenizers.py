import json
import subprocess
import sys

import numpy as np
import pytest

from scaling_testbed.data.tokenizers import (
    BpeConfig,
    BytesConfig,
    PretrainedConfig,
    load_tokenizer,
    tokenizer_fingerprint,
)
from scaling_testbed.errors import ConfigError, UserError

HARD_TEXTS = [
    "plain",
    "naïve 日本 🙂\r\n\ttabs  and   spaces ",
    "<|endoftext|> </s>",
    "\x00\x7f\ufeff\u2028",
    "x" * 5000,
]


@pytest.fixture
def tokenizer_json(tmp_path):
    """A small byte-level BPE with its EOS in the middle of the vocabulary, as a tokenizer.json of some other maker."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog did not"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("[PAD]", special=True)])
    path = tmp_path / "theirs" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path, tokenizer


@pytest.mark.parametrize("kind", ["bytes", "bpe", "pretrained"])
def test_every_text_comes_back_from_its_tokens(kind, tmp_path, tokenizer_json):
    path, _ = tokenizer_json
    config = {"bytes": BytesConfig(), "bpe": BpeConfig(vocab_size=300), "pretrained": PretrainedConfig(path=str(path))}[
        kind
    ]
    tokenizer = load_tokenizer(tmp_path, config.prepare([b"the cat sat on the mat"] * 9, tmp_path))
    encoded = tokenizer.encode_batch([text.encode() for text in HARD_TEXTS])
    for text, ids in zip(HARD_TEXTS, encoded, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids, "an EOS written out in a text must not become a real one"
        assert ids.max() < tokenizer.vocab_size


def test_bpe_is_the_same_from_the_same_texts_in_another_process(tmp_path):
    code = """
import sys, pathlib
from scaling_testbed.data.tokenizers import BpeConfig
texts = [f"word{i % 97} other{i % 31} tie{i % 5}".encode() for i in range(4000)]
print(BpeConfig(vocab_size=500).prepare(texts, pathlib.Path(sys.argv[1]))["sha256"])
"""
    runs = [subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1 and len(runs[0].stdout) == 65, runs[0].stderr


def test_bpe_shortens_text_and_keeps_its_vocabulary_size_also_on_a_tiny_corpus(tmp_path):
    description = BpeConfig(vocab_size=4096).prepare([b"the cat sat on the mat. " * 50], tmp_path)
    tokenizer = load_tokenizer(tmp_path, description)
    assert description["vocab_size"] == tokenizer.vocab_size == 4096
    assert len(tokenizer.encode_batch([b"the cat sat on the mat. " * 10])[0]) < 100


def test_a_pretrained_vocabulary_can_be_padded_to_a_size_or_a_multiple(tmp_path, tokenizer_json):
    path, _ = tokenizer_json

    def size(**fields):
        return PretrainedConfig(path=str(path.parent), **fields).prepare([], tmp_path)["vocab_size"]

    n_ids = size()
    assert n_ids == len(json.loads(path.read_text())["model"]["vocab"]) + 2
    assert size(vocab_multiple=128) % 128 == 0 and 0 <= size(vocab_multiple=128) - n_ids < 128
    assert size(vocab_size=50_432) == 50_432
    with pytest.raises(ConfigError, match=f"tokenizer.vocab_size must be at least {n_ids}"):
        size(vocab_size=n_ids - 1)


def test_the_end_of_text_token_is_found_or_named(tmp_path, tokenizer_json):
    path, theirs = tokenizer_json
    assert PretrainedConfig(path=str(path)).prepare([], tmp_path)["eos_id"] == theirs.token_to_id("</s>")
    named = PretrainedConfig(path=str(path), eos_token="[PAD]").prepare([], tmp_path)
    assert named["eos_id"] == theirs.token_to_id("[PAD]")
    with pytest.raises(ConfigError, match="tokenizer.eos_token must name a token"):
        PretrainedConfig(path=str(path), eos_token="<stop>").prepare([], tmp_path)


@pytest.mark.parametrize("entry", ["not special", "none"])
def test_no_text_yields_the_end_of_text_token_whatever_its_file_says(tmp_path, tokenizer_json, entry):
    path, _ = tokenizer_json
    content = json.loads(path.read_text())
    (eos,) = (one for one in content["added_tokens"] if one["content"] == "</s>")
    eos["special"] = False
    if entry == "none":
        content["added_tokens"].remove(eos)
        content["model"]["vocab"]["</s>"] = eos["id"]
    path.write_text(json.dumps(content))
    description = PretrainedConfig(path=str(path)).prepare([], tmp_path)
    ids = load_tokenizer(tmp_path, description).encode_batch([b"</s> the end"])[0]
    assert description["eos_id"] == eos["id"] and eos["id"] not in ids and len(ids) > 3
    kept = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [one["special"] for one in kept if one["id"] == eos["id"]] == [True]


def test_a_fingerprint_follows_the_tokenizer_and_not_its_name(tmp_path, tokenizer_json):
    path, _ = tokenizer_json
    one = PretrainedConfig(path=str(path)).prepare([], tmp_path)
    renamed = PretrainedConfig(path=str(path), name="other").prepare([], tmp_path)
    padded = PretrainedConfig(path=str(path), vocab_multiple=128).prepare([], tmp_path)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(renamed) != tokenizer_fingerprint(padded)
    trained = one | {"kind": "bpe", "name": "bpe"}  # the same file, where it was trained
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(trained)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(trained | {"sha256": "another"})


def test_a_tokenizer_that_is_not_there_or_not_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="tokenizer.path must be given"):
        PretrainedConfig().identity()
    with pytest.raises(ConfigError, match="^path must not be blank"):
        PretrainedConfig(path="")
    with pytest.raises(UserError, match="nowhere/tokenizer.json does not exist"):
        PretrainedConfig(path=str(tmp_path / "nowhere/tokenizer.json")).identity()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json: not a tokenizer.json"):
        PretrainedConfig(path=str(tmp_path / "bad.json")).prepare([], tmp_path)
    BpeConfig(vocab_size=300).prepare([b"a text"], tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "bad.json").write_text(json.dumps(content))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UserError, match="bad.json: cannot be read .Permission denied"):
        PretrainedConfig(path=str(tmp_path / "bad.json")).identity()
    monkeypatch.undo()
    with pytest.raises(UserError, match="bad.json: its BPE has a dropout of 0.5, so a text has other tokens each time"):
        PretrainedConfig(path=str(tmp_path / "bad.json")).prepare([], tmp_path)
    with pytest.raises(ConfigError, match="^vocab_size must be at least 257"):
        BpeConfig(vocab_size=256)


def test_a_tokenizer_changed_after_preparation_is_noticed(tmp_path):
    description = BpeConfig(vocab_size=300).prepare([b"some text"], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: missing or changed"):
        load_tokenizer(tmp_path, description)


def test_prepared_data_brings_its_tokenizer(prepared, jsonl, documents):
    data = prepared(jsonl("a.jsonl", documents(40)), BpeConfig(vocab_size=400))
    tokenizer = load_tokenizer(data.folder)
    tokens = data.train.read(0, data.train.n_tokens)
    first = tokens[: int(np.argmax(tokens == tokenizer.eos_id))]
    assert tokenizer.decode(first) in documents(40)
