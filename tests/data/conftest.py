import json

import pytest

from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.tokenizers import BytesConfig


def many_documents(n):
    return [f"Document {i}: " + "naïve café 日本 🙂 " * (i % 7) + f"line {i}\n" * (i % 11 + 1) for i in range(n)]


@pytest.fixture
def documents():
    """Makes n different documents, many of them with characters of more than one byte."""
    return many_documents


@pytest.fixture
def jsonl(tmp_path):
    """Writes documents as JSON lines into a file of the temporary folder; returns its path."""

    def write(name, texts, field="text"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
        return str(path)

    return write


@pytest.fixture
def prepared(tmp_path):
    """Prepares a source (or files) in the temporary folder and opens it."""

    def make(source, tokenizer=None, data_dir="data", **options):
        if not hasattr(source, "identity"):
            source = TextFilesConfig(files=source, validation_fraction=0.2)
        folder = prepare(source, tokenizer or BytesConfig(), data_dir=tmp_path / data_dir, quiet=True, **options)
        return open_prepared(folder)

    return make
