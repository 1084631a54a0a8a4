"""Whether files have the bytes that a corpus was prepared from, told without reading a document."""

import json
import os
import shutil

import pytest

from scaling_testbed.data.manifest import OWN_HASH, WITHOUT_HASH
from scaling_testbed.data.preparing import inputs as files_of
from scaling_testbed.data.preparing import preparation
from scaling_testbed.data.preparing.preparation import find_prepared, prepare
from scaling_testbed.data.sources.synthetic import SyntheticSource
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.tokenizers import BpeConfig, BytesConfig, PretrainedConfig
from scaling_testbed.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    """Two files in a folder, prepared: (the source, its prepared folder)."""
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text("".join(f"{name} has a line {i}\n" for i in range(800)))
    source = TextFilesConfig(files=str(tmp_path / "texts"))
    return source, prepare(source, BytesConfig(), data_dir=tmp_path / "data", quiet=True)


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, in order."""
    found, real = [], files_of.sha256_of_input
    monkeypatch.setattr(files_of, "sha256_of_input", lambda path: found.append(path) or real(path))
    return found


def test_files_as_they_were_are_not_read(corpus, tmp_path, hashed):
    source, folder = corpus
    assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    assert hashed == []
    assert json.loads((folder / "manifest.json").read_text())["inputs"]["files"] == 2


def test_a_touched_file_is_hashed_once(corpus, tmp_path, hashed):
    source, folder = corpus
    (tmp_path / "texts" / "a.txt").touch()
    for _ in range(3):
        assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    assert hashed == [str(tmp_path / "texts" / "a.txt")]


def test_a_copy_under_other_names_in_another_folder_is_the_same_data(corpus, tmp_path, monkeypatch):
    source, folder = corpus
    shutil.copytree(tmp_path / "texts", tmp_path / "more" / "texts")
    (tmp_path / "more" / "texts" / "a.txt").rename(tmp_path / "more" / "texts" / "aa.txt")
    monkeypatch.setattr(preparation, "run_tasks", None)
    copied = TextFilesConfig(files=[str(tmp_path / "more" / "texts")])
    assert prepare(copied, BytesConfig(), data_dir=tmp_path / "data", quiet=True) == folder


@pytest.mark.parametrize(
    "change", ["an ending", "a compression", "an order", "a byte", "a line", "a file more", "a file less"]
)
def test_other_bytes_endings_and_orders_are_other_data(corpus, tmp_path, change):
    source, _ = corpus
    a, b = (tmp_path / "texts" / name for name in ("a.txt", "b.txt"))
    if change == "an ending":
        a.rename(a.with_suffix(".jsonl"))
    elif change == "a compression":  # by its name, which decides how it is read
        a.rename(a.with_name("a.txt.gz"))
    elif change == "an order":
        a.rename(tmp_path / "texts" / "c.txt")
    elif change == "a byte":
        a.write_bytes(b"A" + a.read_bytes()[1:])
    elif change == "a line":
        a.write_bytes(a.read_bytes() + b"x\n")
    elif change == "a file more":
        (tmp_path / "texts" / "c.txt").write_text("c\n")
    else:
        b.unlink()
    assert find_prepared(source, BytesConfig(), tmp_path / "data") is None


def test_other_settings_and_tokenizers_are_other_data(corpus, tmp_path):
    source, _ = corpus
    assert find_prepared(source, BpeConfig(vocab_size=300), tmp_path / "data") is None
    (tmp_path / "texts" / "a.txt").touch()
    other = TextFilesConfig(files=source.files, cut_bytes=2048)
    assert find_prepared(other, BytesConfig(), tmp_path / "data") is None


def test_a_tokenizer_file_is_an_input(corpus, tmp_path):
    source, _ = corpus
    made = prepare(source, BpeConfig(vocab_size=300), data_dir=tmp_path / "data", quiet=True)
    file = tmp_path / "tokenizer.json"
    shutil.copy(made / "tokenizer.json", file)
    tokenizer = PretrainedConfig(path=str(file))
    folder = prepare(source, tokenizer, data_dir=tmp_path / "data", quiet=True)
    moved = PretrainedConfig(path=str(shutil.copy(file, tmp_path / "moved.json")))
    assert find_prepared(source, moved, tmp_path / "data") == folder
    file.write_text(file.read_text() + "\n")
    assert find_prepared(source, tokenizer, tmp_path / "data") is None
    manifest = json.loads((folder / "manifest.json").read_text())
    (said,) = files_of.differences(folder, manifest, files_of.inputs_of(source, tokenizer))
    assert said.startswith(f"{file} has ")


def test_an_edit_whose_time_was_set_back_is_noticed_and_told(corpus, tmp_path):
    source, folder = corpus
    file = tmp_path / "texts" / "a.txt"
    stat = file.stat()
    file.write_bytes(b"A" + file.read_bytes()[1:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="a.txt has other bytes now, but the size and time that it had"):
        prepare(source, BytesConfig(), data_dir=tmp_path / "data", quiet=True)
    file.touch()
    assert prepare(source, BytesConfig(), data_dir=tmp_path / "data", quiet=True) != folder


def test_files_that_a_limit_left_out_are_not_hashed(tmp_path, hashed):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "texts" / name).write_text("".join(f"{name} has a line {i}\n" for i in range(2000)))
    source = TextFilesConfig(files=str(tmp_path / "texts"), max_documents=12, validation_fraction=0.2)
    folder = prepare(source, BytesConfig(), data_dir=tmp_path / "data", quiet=True, chunk_bytes=4096)
    assert [path[-5:] for path in hashed] == ["a.txt", "b.txt"]
    assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    (tmp_path / "texts" / "a.txt").touch()
    assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    (tmp_path / "texts" / "c.txt").touch()  # nobody knows its bytes
    assert find_prepared(source, BytesConfig(), tmp_path / "data") is None


def test_a_corpus_of_an_earlier_version_is_found_by_its_name_alone(corpus, tmp_path):
    source, folder = corpus
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["inputs"], manifest[OWN_HASH]
    manifest["schema_version"] = WITHOUT_HASH
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "inputs.json").unlink()
    assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    (tmp_path / "texts" / "a.txt").touch()
    assert find_prepared(source, BytesConfig(), tmp_path / "data") is None


@pytest.mark.parametrize("name", ["inputs.json", ".inputs_seen.json"])
@pytest.mark.parametrize("content", ["", "[1]", '[["a", "b"]]', "{}", '{"x": 1}', "null"])
def test_a_damaged_list_is_no_list(corpus, tmp_path, name, content):
    source, folder = corpus
    (folder / name).write_text(content)
    assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    (tmp_path / "texts" / "a.txt").touch()
    found = find_prepared(source, BytesConfig(), tmp_path / "data")
    assert found == (folder if name.startswith(".") else None)


def test_the_summary_of_a_row_is_that_of_bytes_order_and_endings_alone(corpus, tmp_path):
    """By it a row is compared where its corpus was deleted."""

    def summary(source):
        now = files_of.inputs_of(source, BytesConfig())
        return now.summary(files_of.hashes(now.files))

    source, folder = corpus
    was = json.loads((folder / "manifest.json").read_text())["inputs"]
    shutil.copytree(tmp_path / "texts", tmp_path / "copy")
    copied = TextFilesConfig(files=str(tmp_path / "copy"))
    (tmp_path / "copy" / "a.txt").rename(tmp_path / "copy" / "aa.md")
    assert summary(source) == summary(copied) == was
    (tmp_path / "copy" / "aa.md").rename(tmp_path / "copy" / "aa.jsonl")
    assert summary(copied) != was
    assert summary(TextFilesConfig(files=source.files, cut_bytes=2048)) != was


def test_a_synthetic_source_has_no_inputs():
    assert SyntheticSource().inputs() == {}


def test_a_subclass_that_adds_to_the_identity_is_found_by_its_name_alone(corpus, tmp_path):
    """Another file may decide its tokens, which nobody has listed."""

    class WithLexicon(TextFilesConfig):
        kind = "lexicon"

        def content(self):
            return super().content() | {"lexicon": (tmp_path / "lexicon").read_text()}

    source = WithLexicon(files=corpus[0].files)
    (tmp_path / "lexicon").write_text("one")
    folder = prepare(source, BytesConfig(), data_dir=tmp_path / "data", quiet=True)
    assert find_prepared(source, BytesConfig(), tmp_path / "data") == folder
    (tmp_path / "lexicon").write_text("two")
    assert find_prepared(source, BytesConfig(), tmp_path / "data") is None
