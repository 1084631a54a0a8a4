"""Faults of token files, of the manifest of a corpus, and of a corpus that differs between machines."""

import json
import os

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
