import json
import os
import re
import shutil

import numpy as np
import pytest

from scaling_testbed.data import shard_writer, shards
from scaling_testbed.data.manifest import write_manifest
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shard_writer import ShardWriter
from scaling_testbed.data.shards import changed_shard, open_prepared, parse_header
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.summary import describe
from scaling_testbed.data.tokenizers import BytesConfig
from scaling_testbed.errors import UserError
from tests.data.conftest import many_documents


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    texts = (json.dumps({"id": i, "text": text}) for i, text in enumerate(many_documents(200)))
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in texts))
    source = TextFilesConfig(files=str(folder / "a.jsonl"), validation_fraction=0.2)
    return prepare(source, BytesConfig(), data_dir=folder / "data", quiet=True, chunk_bytes=4096)


@pytest.fixture
def data(prepared_once, tmp_path):
    """A copy that a test may damage, of a folder that was prepared and opened."""
    return open_prepared(shutil.copytree(prepared_once, tmp_path / "data" / prepared_once.name))


def shard(data, number=1):
    return data.folder / data.manifest["splits"]["train"]["shards"][number]["file"]


def test_a_folder_that_cannot_be_written_is_hashed_each_time_instead(data, monkeypatch):
    def refuse(path, _value):
        raise UserError(f"cannot write {path}")

    monkeypatch.setattr(shards, "write_json", refuse)
    assert open_prepared(data.folder).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "vocab_size, dtype, magic, version",
    [
        (257, "<u2", 20240520, 1),
        (65536, "<u2", 20240520, 1),
        (65537, "<u4", 20240801, 7),
    ],
)
def test_a_shard_is_an_llmc_file_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype, magic, version):
    tokens = np.array([0, vocab_size - 1, 5])
    writer = ShardWriter(tmp_path, "train", vocab_size)
    writer.write(tokens[:2], "here")
    writer.write(tokens[2:], "here")
    (entry,) = writer.close()
    raw = (tmp_path / "train.bin").read_bytes()
    assert list(np.frombuffer(raw, "<i4", 4)) == [magic, version, 3, 0]
    assert np.array_equal(np.frombuffer(raw, dtype, offset=1024), tokens)
    assert entry["size"] == len(raw) and entry["n_tokens"] == 3


@pytest.mark.fault("19", "A damaged, cut or foreign shard is named before it is read.")
def test_a_token_outside_the_vocabulary_is_refused_with_its_origin(tmp_path):
    writer = ShardWriter(tmp_path, "train", 257)
    for bad in (257, -1):
        with pytest.raises(UserError, match=f"book.txt: token id {bad} is outside the vocabulary of 257"):
            writer.write(np.array([1, bad]), "book.txt")


def test_a_long_stream_goes_on_in_further_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "MAX_SHARD_TOKENS", 10)
    writer = ShardWriter(tmp_path, "train", 257)
    writer.write(np.arange(7), "")
    writer.write(np.arange(7, 30), "")
    entries = writer.close()
    assert [entry["file"] for entry in entries] == ["train.bin", "train.1.bin", "train.2.bin"]
    parts = [np.fromfile(tmp_path / entry["file"], "<u2", offset=1024) for entry in entries]
    assert np.array_equal(np.concatenate(parts), np.arange(30))
    assert not list(tmp_path.glob("*.tmp"))


def test_an_opened_folder_knows_its_tokens_bytes_and_entropy(data, documents):
    texts = [text.encode() for text in documents(200)]
    for stream, split in ((data.train, "train"), (data.validation, "validation")):
        record = data.manifest["splits"][split]
        tokens = stream.read(0, stream.n_tokens)
        assert stream.n_tokens == record["n_tokens"] == stream.n_bytes + record["n_documents"]
        assert (tokens == data.manifest["eos_id"]).sum() == record["n_documents"]
        assert bytes(tokens[tokens < 256].astype(np.uint8)) == b"".join(
            text for text in texts if text in bytes(tokens[tokens < 256].astype(np.uint8))
        )
    assert data.train.n_bytes + data.validation.n_bytes == sum(map(len, texts))
    tokens = data.train.read(0, data.train.n_tokens).tolist()
    share = np.array([tokens.count(symbol) for symbol in set(tokens)]) / len(tokens)
    assert data.manifest["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-12)
    assert data.manifest["schema_version"] == 2 and data.manifest["entropy_rate_nats"] is None


def test_eos_follows_every_document_and_nothing_else(data, documents):
    for stream in (data.train, data.validation):
        tokens = stream.read(0, stream.n_tokens)
        assert tokens[-1] == 256
        pieces = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
        texts = [bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces]
        assert set(texts) <= set(documents(200))
        assert texts == sorted(texts, key=documents(200).index), "documents keep their order"


def test_a_fingerprint_follows_the_tokens_and_not_the_place(data, tmp_path, prepared, jsonl, documents):
    shutil.copytree(data.folder, tmp_path / "copy")
    assert open_prepared(tmp_path / "copy").fingerprint == data.fingerprint
    other = prepared(jsonl("b.jsonl", documents(201)), chunk_bytes=4096)
    assert other.fingerprint != data.fingerprint and other.tokenizer_fingerprint == data.tokenizer_fingerprint


def damage_flip(path):
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)


def damage_flip_and_set_the_time_back(path):
    stat = path.stat()
    damage_flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage_swap(path):
    """Another valid shard of the very same size under the same path."""
    raw = bytearray(path.read_bytes())
    raw[1024:] = bytes(reversed(raw[1024:]))
    path.with_name("new").write_bytes(raw)
    os.replace(path.with_name("new"), path)


def damage_magic(path):
    path.write_bytes(b"\0\0\0\0" + path.read_bytes()[4:])


def damage_dtype(path):
    raw = path.read_bytes()
    path.write_bytes(np.array([20240801, 7], "<i4").tobytes() + raw[8:])


@pytest.mark.fault("19", "A damaged, cut or foreign shard is named before it is read.")
@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_flip, "sha256 differs"),
        (damage_flip_and_set_the_time_back, "sha256 differs"),
        (damage_swap, "sha256 differs"),
        (damage_magic, "wrong magic 0 version 1"),
        (damage_dtype, "header says .*uint32"),
        (lambda path: os.truncate(path, path.stat().st_size - 2), r"\d+ bytes, but .* in the manifest"),
        (lambda path: path.write_bytes(b""), "0 bytes, but .* in the manifest"),
        (lambda path: path.unlink(), "No such file or directory, but the manifest names it"),
    ],
)
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_damaged_shard_is_named_before_anything_is_read(damage, message, opened_before, data):
    if not opened_before:
        (data.folder / ".verified.json").unlink()
    damage(shard(data))
    said = changed_shard(data.folder, data.manifest)  # a look that reads no shard that was never checked, or is gone
    unread = message.startswith("No such") or message.startswith("sha256") and not opened_before
    assert (said is None) == unread and (unread or re.search(message, said))
    with pytest.raises(UserError, match=f"{shard(data).name}: {message}") as error:
        open_prepared(data.folder)
    assert "\n" not in str(error.value)


def test_an_unchanged_folder_is_hashed_once_only(data, monkeypatch):
    hashed = []
    monkeypatch.setattr(shards, "sha256_of_input", lambda path: hashed.append(path) or "wrong")
    open_prepared(data.folder)
    assert hashed == []
    assert changed_shard(data.folder, data.manifest) is None and hashed == []
    os.utime(shard(data))
    with pytest.raises(UserError, match="sha256 differs"):
        open_prepared(data.folder)
    assert hashed == [shard(data)]


@pytest.mark.fault("20", "The order in the folder changes nothing, and stray files are ignored.")
def test_stray_files_and_the_order_in_the_folder_change_nothing(data):
    before = data.train.read(0, data.train.n_tokens).copy()
    shutil.copy(shard(data), data.folder / "train-99999.bin")
    (data.folder / "notes.txt").write_text("mine")
    again = open_prepared(data.folder)
    assert np.array_equal(again.train.read(0, again.train.n_tokens), before)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "manifest.json does not exist"),
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ('{"schema_version": 99}', "manifest.json has schema version 99, not 2; update this program, or delete"),
        ('{"schema_version": true}', "manifest.json has no schema_version"),
        ('{"schema_version": 2}', "manifest.json differs from the hash in it"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(data, text, message):
    path = data.folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        open_prepared(data.folder)


def rewrite(data, change, version=1):
    """Write the manifest again after `change`, as the version before the hash did, or with a right hash (2)."""
    manifest = json.loads((data.folder / "manifest.json").read_text())
    for key in ("manifest_sha256", "schema_version"):
        manifest.pop(key, None)
    change(manifest)
    if version == 1:
        (data.folder / "manifest.json").write_text(json.dumps({"schema_version": 1, **manifest}))
    else:
        write_manifest(data.folder, manifest)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("file", ["../../secret.bin", "a/b.bin"])
def test_a_manifest_cannot_lead_out_of_its_folder(data, file, version):
    rewrite(data, lambda manifest: manifest["splits"]["train"]["shards"][0].update(file=file), version)
    with pytest.raises(UserError, match="lies outside the folder"):
        open_prepared(data.folder)


def test_a_manifest_without_its_own_hash_is_still_read(data):
    rewrite(data, lambda manifest: None)
    again = open_prepared(data.folder)
    assert again.fingerprint == data.fingerprint and again.train.n_tokens == data.train.n_tokens


def shard_of(manifest):
    return manifest["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.pop("vocab_size"), "vocab_size is missing"),
        (lambda m: m.update(vocab_size=256), "eos_id lies outside the vocabulary of 256"),
        (lambda m: m.update(vocab_size=300), "vocab_size is not the tokenizer's vocab_size"),
        (lambda m: m.update(vocab_size=True), "vocab_size has a wrong type"),
        (lambda m: m.update(vocab_size=10**400), "vocab_size lies outside 1 to"),
        (lambda m: m.update(vocab_size=70_000), "dtype 'uint16' is not that of a vocabulary of 70000"),
        (lambda m: m.update(eos_id=255), "eos_id is not the tokenizer's eos_id"),
        (lambda m: m.update(eos_id=-1), "eos_id lies outside"),
        (lambda m: m.update(tokenizer_fingerprint=None), "one of tokenizer and tokenizer_fingerprint is null"),
        (lambda m: m.update(tokenizer_fingerprint="9b78"), "tokenizer_fingerprint is not 16 hex digits"),
        (lambda m: m.update(unigram_entropy_nats=9.0), "unigram_entropy_nats lies outside 0 to ln 257"),
        (lambda m: m.update(unigram_entropy_nats=float("nan")), "unigram_entropy_nats lies outside 0 to ln 257"),
        (lambda m: m.update(splits=[]), "splits has a wrong type"),
        (lambda m: m["splits"].pop("validation"), "splits.validation is missing"),
        (lambda m: m["splits"]["train"].update(shards=[]), "splits.train.n_tokens is not the sum over its shards"),
        (lambda m: m["splits"]["train"].update(n_tokens=7), "splits.train.n_tokens is not the sum over its shards"),
        (lambda m: m["splits"]["train"].update(n_bytes="7"), "splits.train.n_bytes has a wrong type"),
        (lambda m: m["splits"]["train"].update(n_bytes=-7), "splits.train.n_bytes is negative"),
        (lambda m: m["splits"]["train"].update(n_documents=10**9), "splits.train has more documents than tokens"),
        (lambda m: m["splits"]["train"].update(shards=[7]), r"splits.train.shards\[0\] is no object"),
        (lambda m: shard_of(m).update(offset=0), "size is not that of n_tokens tokens after the offset"),
        (lambda m: shard_of(m).update(dtype="float32"), "dtype is no type of token ids"),
        (lambda m: shard_of(m).update(sha256="x"), "sha256 is not 64 hex digits"),
        (lambda m: shard_of(m).update(file="a\0.bin"), "file is no name of a file"),
        (lambda m: shard_of(m).update(file="\ud800.bin"), "file is no name of a file"),
        (lambda m: shard_of(m).update(n_tokens=0, size=1024), "has no tokens, or a negative offset"),
    ],
)
def test_a_manifest_of_wrong_shape_is_refused_with_the_key(data, change, message):
    rewrite(data, change)
    with pytest.raises(UserError, match=message) as error:
        open_prepared(data.folder)
    assert "\n" not in str(error.value) and str(data.folder / "manifest.json") in str(error.value)
    with pytest.raises(UserError, match=message):  # nor is it written
        rewrite(data, lambda manifest: None, version=2)


def test_an_offset_that_fits_the_size_but_not_the_header_is_refused(data):
    rewrite(data, lambda m: shard_of(m).update(offset=1024 + 2 * shard_of(m)["n_tokens"] - 2000, n_tokens=1000))
    with pytest.raises(UserError, match="n_tokens is not the sum|header says"):
        open_prepared(data.folder)


def test_a_shard_that_is_named_twice_is_refused(data):
    def twice(manifest):
        record = manifest["splits"]["train"]
        record["shards"] = [record["shards"][0]] * 2
        record["n_tokens"] = 2 * record["shards"][0]["n_tokens"]

    rewrite(data, twice)
    with pytest.raises(UserError, match="manifest.json names a shard twice"):
        open_prepared(data.folder)


def test_a_damaged_memory_of_checks_is_made_again(data):
    for damage in ("[]", "{", '{"a": 1}'):
        (data.folder / ".verified.json").write_text(damage)
        open_prepared(data.folder)
        assert len(json.loads((data.folder / ".verified.json").read_text())) > 2


def test_a_description_has_the_fingerprint_and_names_what_is_not_read(data):
    shutil.copy(shard(data), data.folder / "train-99999.bin")
    lines = describe(data).splitlines()
    assert f"fingerprint      {data.fingerprint}" in lines
    assert "not read         train-99999.bin: not in the manifest" in lines


def test_headers_of_our_shards_can_be_read_alone(data):
    assert parse_header(shard(data)) == ("uint16", data.manifest["splits"]["train"]["shards"][1]["n_tokens"])
