"""Whether a tokenizer keeps the text, on tokenizers of many makers."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scaling_testbed.data.preparing.text_check import lost_bytes, percent
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.summary import remarks
from scaling_testbed.data.tokenizers import BpeConfig, BytesConfig, PretrainedConfig
from scaling_testbed.errors import UserError

ENGLISH = [f"The quick Brown fox number {i}.\nIt  jumps over\tthe dog {i % 7}.\n" for i in range(150)]
JAPANESE = [text + "日本語" for text in ENGLISH]
ACCENTS = [text + "e\u0301" * (i == 5) for i, text in enumerate(ENGLISH)]  # one letter that NFC changes


def byte_level(normalizer=None, blank=False, decoder=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if decoder:
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["[EOS]"], initial_alphabet=alphabet, show_progress=False
    )


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["[EOS]", "<unk>"]
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )


def words(unknown="[UNK]"):
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[EOS]", unknown] if unknown else ["[EOS]"]
    return tokenizer, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)


def characters():
    return Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=200, special_tokens=["[EOS]"], show_progress=False)


@pytest.fixture
def pretrained(tmp_path):
    """Trains a tokenizer on ENGLISH; returns its configuration."""

    def make(tokenizer, trainer):
        tokenizer.train_from_iterator(ENGLISH, trainer)
        tokenizer.save(str(tmp_path / "theirs.json"))
        return PretrainedConfig(path=str(tmp_path / "theirs.json"), eos_token="[EOS]")

    return make


@pytest.mark.parametrize(
    "make, texts, lost",
    [
        (byte_level, JAPANESE, None),
        (lambda: byte_level(blank=True), ENGLISH, None),
        (lambda: byte_level(normalizers.NFC()), ACCENTS, None),  # one line of 300 is less than 1 %
        (lambda: byte_level(normalizers.Lowercase()), ENGLISH, "does not come back"),
        (lambda: byte_level(normalizers.NFKC()), [text + "①" for text in ENGLISH], "does not come back"),
        (lambda: byte_level(decoder=False), ENGLISH, "does not come back"),
        (unigram, ENGLISH, None),
        (unigram, JAPANESE, r"% of the train and .* % of the validation tokens are unknown text \(<unk>\), "),
        (words, ENGLISH, "does not come back"),
        (words, JAPANESE, r"% of the train and .* % of the validation tokens are unknown text \(\[UNK\]\), "),
        (characters, JAPANESE, "does not come back"),  # it drops what it does not know, without an unknown token
    ],
)
def test_text_that_a_tokenizer_loses_is_noticed(make, texts, lost, pretrained, prepared, jsonl):
    data = prepared(jsonl("a.jsonl", texts), pretrained(*make()))
    check = data.manifest["text_check"]["splits"]["train"]
    assert check["sampled_documents"] >= 8 and check["sampled_bytes"] > 0
    if lost is None:
        assert data.text_lost is None and check["lost_share"] <= 0.01 and check["unknown_share"] <= 0.01
        assert remarks(data.manifest) == []
    else:
        assert check["lost_share"] > 0.01
        with pytest.raises(AssertionError, match=lost):
            raise AssertionError(data.text_lost)
        assert remarks(data.manifest)[-1].endswith(data.text_lost)


@pytest.mark.parametrize("tokenizer", [BytesConfig(), BpeConfig(vocab_size=300)])
def test_bytes_and_bpe_lose_nothing(tokenizer, prepared, jsonl):
    texts = [*JAPANESE, "\x00\x7f\ufeff\u2028 \r\n\r", "<|endoftext|>", " ", "\n"]
    checks = prepared(jsonl("a.jsonl", texts), tokenizer).manifest["text_check"]
    for check in checks["splits"].values():
        assert (check["changed_documents"], check["lost_share"], check["unknown_share"]) == (0, 0.0, 0.0)
    assert checks["lost"] is checks["unknown_token"] is None


def test_unknown_tokens_are_counted_in_all_documents(pretrained, prepared, jsonl):
    texts = [*ENGLISH, *["本 " * 40] * 9]
    source = TextFilesConfig(files=jsonl("a.jsonl", texts), validation_files=jsonl("b.jsonl", JAPANESE[:99]))
    data = prepared(source, pretrained(*words()))
    n_words = sum(len(text.replace(".", " . ").split()) for text in texts)
    assert data.manifest["text_check"]["splits"]["train"]["unknown_share"] == pytest.approx(9 * 40 / n_words)


def test_a_validation_split_that_the_tokenizer_does_not_know_is_noticed(pretrained, prepared, jsonl):
    """However large the train split is, which it knows."""
    source = TextFilesConfig(files=jsonl("a.jsonl", ENGLISH * 40), validation_files=jsonl("b.jsonl", JAPANESE[:3]))
    data = prepared(source, pretrained(*unigram()))
    assert data.manifest["text_check"]["splits"]["train"]["lost_share"] == 0
    assert "of the validation tokens are unknown text (<unk>)" in data.text_lost and "train" not in data.text_lost


@pytest.mark.parametrize("workers", [1, 2])
def test_a_check_does_not_depend_on_the_workers(workers, pretrained, prepared, jsonl):
    tokenizer, path = pretrained(*unigram()), jsonl("a.jsonl", JAPANESE)
    checks = [
        prepared(path, tokenizer, workers=n, chunk_bytes=4096, data_dir=f"d{n}").manifest["text_check"]
        for n in (1, workers)
    ]
    assert checks[0] == checks[1] and 8 < checks[0]["splits"]["train"]["sampled_documents"] < len(JAPANESE)


def test_a_tokenizer_that_cannot_encode_a_text_is_named(pretrained, prepared, jsonl):
    with pytest.raises(
        UserError, match=r"tokenizer.json: the tokenizer cannot encode this text \(.*UNK.*tokenizer=bpe"
    ):
        prepared(jsonl("a.jsonl", JAPANESE), pretrained(*words(unknown=None)))


@pytest.mark.parametrize(
    "text, back, lost",
    [
        ("abc", "abc", 0),
        ("abc", " abc", 0),
        (" abc", "abc", 0),
        ("abc\n", "abc", 1),
        ("one\ntwo\nthree", "one\nTwo\nthree", 4),
        ("one\ntwo", "one two", 7),
        ("日本", "", 6),
        ("日本", "??", 6),
    ],
)
def test_lost_text_is_counted_in_bytes_of_lines(text, back, lost):
    assert lost_bytes(text, back) == lost


def test_a_share_is_printed_with_two_digits():
    assert [percent(share) for share in (1.0, 0.9972, 0.021, 0.00003)] == ["100 %", "100 %", "2.1 %", "0.003 %"]


def test_the_unknown_token_is_found_in_every_kind_of_model(pretrained, prepared, jsonl):
    data = prepared(jsonl("a.jsonl", ENGLISH), pretrained(*unigram()))
    model = json.loads((data.folder / "tokenizer.json").read_text())["model"]
    assert model.get("unk_token") is None and data.manifest["text_check"]["unknown_token"] == "<unk>"
