import json
import logging
import os
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from scaling_testbed.data import hub
from scaling_testbed.data.sources.huggingface import HuggingFaceConfig
from scaling_testbed.data.sources.reading import Tally
from scaling_testbed.data.tokenizers import PretrainedConfig
from scaling_testbed.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No hub, and a cache of its own."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path, documents):
    """Three files of 20 documents each, as parquet or as JSON lines with fields that differ between the files."""

    def make(kind, **fields):
        for part in range(3):
            texts = documents(60)[20 * part : 20 * part + 20]
            path = tmp_path / f"part{part}.{kind}"
            if kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(20)}), path)
            else:
                rows = [{"text": text, "meta": {f"key{part}": part if part else "zero"}} for text in texts]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return HuggingFaceConfig(path=kind, data_files=str(tmp_path / f"part*.{kind}"), **fields)

    return make


def read(source, chunk_bytes=1 << 20):
    return [text.decode() for unit in source.units(chunk_bytes) for text in source.documents(unit, Tally())]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_local_files_are_read_through_datasets_with_the_hub_offline(kind, streaming, source, documents):
    dataset = source(kind, streaming=streaming)
    assert read(dataset) == read(dataset, chunk_bytes=500) == documents(60)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_prepared_and_a_limit_stops_it_at_a_document(streaming, source, prepared):
    whole = prepared(source("parquet", streaming=streaming, validation_fraction=0.2), data_dir="whole")
    some = prepared(source("parquet", streaming=streaming, validation_fraction=0.2, max_documents=45), chunk_bytes=500)
    counts = [some.manifest["splits"][split]["n_documents"] for split in ("train", "validation")]
    assert sum(counts) == 45
    for split in ("train", "validation"):
        part, full = getattr(some, split), getattr(whole, split)
        assert (part.read(0, part.n_tokens) == full.read(0, part.n_tokens)).all()


def test_a_split_of_its_own_is_the_validation_split(tmp_path, prepared, documents):
    (tmp_path / "set").mkdir()
    for split, texts in (("train", documents(30)), ("validation", documents(50)[30:])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "set" / f"{split}-0.parquet")
    data = prepared(HuggingFaceConfig(path=str(tmp_path / "set"), validation_split="validation", max_documents=25))
    assert data.manifest["splits"]["train"]["n_documents"] == 25
    assert data.manifest["splits"]["validation"]["n_documents"] == 20
    assert data.train.n_bytes == sum(len(text.encode()) for text in documents(25))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_cannot_read_is_named_in_a_line(streaming, source, tmp_path):
    with pytest.raises(UserError, match=r"no field 'body' \(fields: text, n\)"):
        read(source("parquet", text_field="body", streaming=streaming))
    with pytest.raises(UserError, match="dataset json .*: split train, .*row .*: no field 'body'"):
        read(source("json", text_field="body", streaming=streaming))
    with pytest.raises(UserError, match="dataset parquet .* cannot be read: .*nosuch"):
        read(source("parquet", split="nosuch", streaming=streaming))
    with pytest.raises(UserError, match="dataset nobody/nothing cannot be read: ") as error:
        read(HuggingFaceConfig(path="nobody/nothing", streaming=streaming))
    assert len(str(error.value).splitlines()) == 2
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="dataset parquet .*bad.parquet.* cannot be read"):
        read(HuggingFaceConfig(path="parquet", data_files=str(tmp_path / "bad.parquet"), streaming=streaming))


@pytest.mark.parametrize("streaming, where", [(False, "row 47"), (True, "shard 2 row 7")])
def test_a_bad_row_is_named_with_its_number(streaming, where, source, tmp_path):
    dataset = source("json", streaming=streaming)
    path = tmp_path / "part2.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:7], "not json\n", *lines[8:]]))
    with pytest.raises(UserError, match=f"split train, {where}: not a JSON line"):
        read(dataset, chunk_bytes=1000)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_dataset_are_read_as_those_of_files(streaming, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "naïve"}]
    rows = [{"a": {"b": f"text {i}\u2028 more"}, "messages": chat, "ids": [1, 2, i]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.json").write_text("\ufeff" + "\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    for kind in ("parquet", "json"):
        at = {"path": kind, "data_files": str(tmp_path / f"a.{kind}"), "streaming": streaming}
        assert read(HuggingFaceConfig(**at, text_field="a.b")) == [row["a"]["b"] for row in rows]
        assert read(HuggingFaceConfig(**at, text_field="messages")) == ["user: Hi\n\nassistant: naïve"] * 5
        ids = HuggingFaceConfig(**at, ids_field="ids", vocab_size=9)
        found = [text for unit in ids.units(1 << 20) for text in ids.documents(unit, Tally())]
        assert [list(np.frombuffer(text, "<i8")) for text in found] == [row["ids"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_a_dataset_are_left_out_if_asked(streaming, source, tmp_path, documents):
    dataset = source("json", streaming=streaming, on_bad="skip")
    path = tmp_path / "part2.json"
    path.write_text(path.read_text() + 'not json\n{"body": 1}\n')
    tally = Tally()
    assert [text.decode() for unit in dataset.units(1000) for text in dataset.documents(unit, tally)] == documents(60)
    assert tally.rows == 62 and {reason: e["count"] for reason, e in tally.bad_rows.items()} == {
        "not JSON": 1,
        "no such field": 1,
    }


def test_a_place_that_names_nothing_is_refused():
    for fields in ({"path": ""}, {"path": "x", "split": " "}, {"path": "json", "data_files": ""}):
        with pytest.raises(ConfigError, match="must not be blank|must name files"):
            HuggingFaceConfig(**fields)
    with pytest.raises(ConfigError, match="data.data_files must name the files, because data.path=text is a format"):
        HuggingFaceConfig(path="text").identity()  # `datasets` would take the files of the current folder
    with pytest.raises(ConfigError, match="validation_split must not be the split that is trained on"):
        HuggingFaceConfig(path="x", validation_split="train")


def test_a_file_that_changed_is_seen_by_the_same_process(source, tmp_path, documents):
    dataset = source("parquet")
    assert read(dataset) == documents(60)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["new", "newer"], "n": range(2)}), tmp_path / "part2.parquet")
    assert read(dataset) == [*documents(40), "new", "newer"]


@pytest.mark.fault("A1", "A file that was edited is read again, although its size and time are as before.")
def test_an_edit_whose_time_was_set_back_is_not_taken_from_the_cache(source, tmp_path, documents, record_property):
    dataset, file = source("json"), tmp_path / "part0.json"
    assert read(dataset) == documents(60)
    stat = file.stat()
    file.write_text(file.read_text().replace("Document", "Dokument"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert read(dataset)[0] == documents(1)[0].replace("Document", "Dokument") != documents(1)[0]
    record_property("seen", "the new text")


def test_a_path_must_be_given_and_a_changed_file_is_another_identity(source, tmp_path):
    with pytest.raises(ConfigError, match="^data.path must be given"):
        HuggingFaceConfig().identity()
    before = source("json").identity()
    with open(tmp_path / "part0.json", "a") as file:
        file.write('{"text": "more"}\n')
    assert HuggingFaceConfig(path="json", data_files=str(tmp_path / "part*.json")).identity() != before


@pytest.mark.parametrize("asked", ["dataset", "tokenizer"])
def test_a_hub_that_does_not_answer_is_said_in_one_line(asked, source, monkeypatch, capfd):
    """What asks puts the filter in its place; requests to a closed port stand in for the Hub."""
    import datasets  # noqa: F401
    from huggingface_hub.utils import _http

    def refused(*_, **__):
        _http.http_backoff("HEAD", "http://127.0.0.1:9/resolve/main/README.md", max_retries=2)

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "RETRIES", hub.Retries())
    monkeypatch.setattr("tokenizers.Tokenizer", SimpleNamespace(from_pretrained=refused))
    for handler in logging.getLogger("huggingface_hub").handlers:
        monkeypatch.setattr(handler, "stream", sys.stderr)
    for name in hub.LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    if asked == "dataset":
        list(source("json").units(1000))
        with pytest.raises(Exception, match="Connection refused"):
            refused()
    else:
        with pytest.raises(UserError, match="Connection refused"):
            PretrainedConfig(path="nobody/nothing")._download()
    logging.getLogger("huggingface_hub.utils._http").warning("something else")
    said = [line for line in capfd.readouterr().err.splitlines() if "Generating" not in line]
    reason = "[Errno 111] Connection refused"
    assert said == [f"the Hugging Face Hub does not answer ({reason}); trying again", "something else"]
