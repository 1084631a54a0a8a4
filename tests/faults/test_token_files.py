"""Faults of token files, of the manifest of a corpus, and of a corpus that differs between machines."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from scaling_testbed.data.manifest import read_manifest
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.data.sources.markov import MarkovConfig
from scaling_testbed.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    """A small prepared corpus, which a test may damage."""
    source = MarkovConfig(n_tokens=20_000, n_validation_tokens=2_000, vocab_size=16)
    return prepare(source, None, data_dir=tmp_path / "data", quiet=True)


@pytest.mark.fault("A13", "A manifest of a corpus is read as it was written, or refused in one line.")
def test_no_flipped_bit_and_no_cut_of_a_manifest_is_read_as_other_content(corpus, record_property):
    path, right = corpus / "manifest.json", read_manifest(corpus)
    raw = path.read_bytes()
    refused = []

    def look(damage):
        try:
            assert read_manifest(corpus) == right, damage
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused.append(damage)

    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(raw)):
            os.pwrite(file.fileno(), bytes([raw[bit // 8] ^ 1 << bit % 8]), bit // 8)
            look(bit)
            os.pwrite(file.fileno(), raw[bit // 8 : bit // 8 + 1], bit // 8)
        for length in range(len(raw) - 1, -1, -1):
            file.truncate(length)
            look(length)
    assert len(refused) > 0.99 * 9 * len(raw)
    record_property("seen", f"{len(refused):,} of {9 * len(raw):,} refused, none read with other content")


@pytest.mark.fault("A13", "A manifest of a corpus is read as it was written, or refused in one line.")
def test_a_manifest_that_was_edited_is_refused(corpus, record_property):
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["offset"] = 0
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match="manifest.json differs from the hash in it.*delete .* and prepare again"
    ) as error:
        open_prepared(corpus)
    record_property("seen", f"refused: {error.value}".replace(f"{corpus.parent}/", ""))


@pytest.fixture
def type_(typed):
    """Types a command in the temporary folder. Returns its exit status and what it said."""

    def run(*words):
        status, out, err = typed(*words)
        return status, (out + err).strip()

    return run


def write_ids(folder, dtype, below, **sizes):
    random = np.random.default_rng(0)
    for name, size in sizes.items():
        random.integers(0, below, size).astype(dtype).tofile(folder / f"{name}.bin")
    return [f"data.{name}={folder / name}.bin" for name in sizes]


ONE_TYPE = (
    "The type of token ids is known from a header, or said, or the only one that fits the vocabulary, or refused."
)


@pytest.mark.fault("A3", ONE_TYPE)
def test_ids_of_uint32_without_a_header_are_not_read_as_uint16(type_, tmp_path, record_property):
    words = ["data=token_files", *write_ids(tmp_path, "<u4", 100_000, train=4000, validation=2000)]
    words.append("data.vocab_size=100000")
    status, said = type_("prepare", *words)
    assert status == 1 and "\n" not in said
    assert "train.bin: it has no header" in said and "8,000 ids of uint16 or 4,000 ids of uint32" in said
    record_property("seen", "refused: " + said.partition("train.bin: ")[2])
    status, said = type_("prepare", *words, "data.dtype=uint32")
    assert status == 0 and "4,000 tokens" in said and "2,000 tokens" in said


@pytest.mark.fault("A3", ONE_TYPE)
@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u2", ">i8"])
def test_arrays_of_numpy_are_read_as_their_header_says(dtype, type_, tmp_path, record_property):
    ids = {"train": np.arange(4000) * 12, "validation": np.arange(1000) * 13}
    for name, values in ids.items():
        np.save(tmp_path / f"{name}.npy", values.astype(dtype))
    words = [f"data.{name}={tmp_path / name}.npy" for name in ids]
    status, said = type_("prepare", "data=token_files", *words, "data.vocab_size=50257")
    assert status == 0, said
    (folder,) = (tmp_path / "data").glob("token_files-*")
    data = open_prepared(folder)
    assert np.array_equal(data.train.gather(np.array([0]), 4000)[0], ids["train"])
    record_property("seen", f"{dtype}: the ids that were written")


TINY = ["model=nano_s", "budget.steps=2", "batch.sequences=2", "batch.sequence_length=64", "evaluation.tokens=256"]
MARKOV = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=2000", "data.vocab_size=16"]


def patch(content, start=0):
    def damage(path):
        raw = bytearray(path.read_bytes())
        raw[start : start + len(content)] = content
        path.write_bytes(raw)

    return damage


def flip(path):
    patch([path.read_bytes()[3000] ^ 1], 3000)(path)


DAMAGES = {
    "flipped bit": (flip, "sha256 differs"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 2), "bytes in the manifest|bytes, but"),
    "wrong magic": (patch(b"\0\0\0\0"), "wrong magic"),
    "wrong type": (patch(np.array([20240801, 7], "<i4").tobytes()), "header says"),
    "id outside the vocabulary": (patch(b"\xff\xff", 1024), "sha256 differs"),
}


@pytest.mark.fault("19", "A damaged token shard is named before the first step.")
def test_a_damaged_shard_is_named_before_the_first_step(type_, tmp_path, record_property):
    assert type_("prepare", *MARKOV)[0] == 0
    (folder,) = (tmp_path / "data").glob("markov-*")
    whole = shutil.copytree(folder, tmp_path / "whole")
    for name, (damage, reason) in DAMAGES.items():
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        damage(folder / "train-00000.bin")
        status, said = type_("train", *TINY, *MARKOV)
        assert status == 1 and re.search(f"train-00000.bin: .*{reason}", said), (name, said)
        assert "Traceback" not in said and "step " not in said
    record_property("seen", "train-00000.bin named after: " + ", ".join(DAMAGES))


@pytest.mark.fault("19", "A damaged token shard is named before the first step.")
def test_an_id_outside_the_vocabulary_of_a_users_own_file_is_named(type_, tmp_path, record_property):
    words = ["data=token_files", *write_ids(tmp_path, "<u2", 50_000, train=4000, validation=2000)]
    for more, reason in (
        (
            ["data.vocab_size=20000", "data.dtype=uint16"],
            r"token id \d+ is outside data.vocab_size=20000, read as uint16",
        ),
        (["data.vocab_size=20000"], r"token id \d+ is outside data.vocab_size=20000, .* no other type fits"),
        (["data.vocab_size=50000", "data.format=llmc"], "wrong magic"),
    ):
        status, said = type_("train", *TINY, *words, *more)
        assert status == 1 and re.search(rf"train.bin: {reason}", said) and "step " not in said, said
    record_property("seen", "train.bin named, with the id and data.vocab_size")


@pytest.mark.fault(
    "20", "Other files in the folder of a corpus, and their order, change no batch; a stray shard is said."
)
def test_a_stray_shard_is_said_and_not_read(type_, tmp_path, record_property):
    assert type_("train", *TINY, *MARKOV)[0] == 0
    (folder,) = (tmp_path / "data").glob("markov-*")
    shutil.copy(folder / "validation-00000.bin", folder / "train-00001.bin")
    (folder / "a.bin").write_bytes(b"mine")
    names = sorted(path.name for path in folder.iterdir())
    for name in reversed(names):  # another order of the folder's entries
        (folder / name).rename(folder / f"{name}.moved")
        (folder / f"{name}.moved").rename(folder / name)
    status, said = type_("train", *TINY, *MARKOV, "name=again")
    assert status == 0 and "also holds a.bin, train-00001.bin: not in its manifest, not read" in said
    first, again = (
        [json.loads(line) for line in next((tmp_path / "runs" / name).glob("*/metrics.jsonl")).read_text().splitlines()]
        for name in ("default", "again")
    )
    losses = [[row.get(key) for key in ("loss", "val_loss", "grad_norm")] for row in first]
    assert losses == [[row.get(key) for key in ("loss", "val_loss", "grad_norm")] for row in again]
    record_property("seen", "the same losses; said: a.bin, train-00001.bin not in its manifest, not read")
