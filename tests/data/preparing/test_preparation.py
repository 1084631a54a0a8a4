import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from scaling_testbed.data import shard_writer, shards
from scaling_testbed.data.preparing import tasks
from scaling_testbed.data.preparing.preparation import folder_name, prepare
from scaling_testbed.data.sources.python_stdlib import PythonStdlibConfig
from scaling_testbed.data.sources.source import split_draw, split_of
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.summary import describe, left_out_line, remarks
from scaling_testbed.data.tokenizers import BpeConfig, BytesConfig, PretrainedConfig
from scaling_testbed.errors import ConfigError, UserError

CHILD = """
import os, signal, sys
from pathlib import Path
from scaling_testbed.data import shard_writer, shards
from scaling_testbed.data.preparing import preparation, tasks
from scaling_testbed.data.sources import source as source_module
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.tokenizers import BytesConfig

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at_call(module, name, number, original):
    calls = []
    def patched(*args, **kwargs):
        calls.append(1)
        return kill() if len(calls) == number else original(*args, **kwargs)
    setattr(module, name, patched)

if __name__ == "__main__":
    files, data_dir, workers, point = sys.argv[1:]
    if point == "in a shard":
        kill_at_call(shard_writer.ShardWriter, "_finish", 6, shard_writer.ShardWriter._finish)
    elif point == "before a record":
        kill_at_call(tasks, "_write_record", 3, tasks._write_record)
    elif point == "before the manifest":
        source_module.Source.manifest = kill
    elif point == "before the rename":
        os.rename = kill
    elif point == "in the work of others":
        tasks.as_completed = lambda futures, original=tasks.as_completed: (kill() for _ in original(futures))
    source = TextFilesConfig(files=files, validation_fraction=0.2)
    folder = preparation.prepare(
        source, BytesConfig(), data_dir=Path(data_dir), workers=int(workers), quiet=True, chunk_bytes=4096
    )
    print(folder)
"""


def content(folder):
    """Every file of a prepared folder but the memory of checks."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".verified.json"}


@pytest.fixture
def child(tmp_path, python):
    """Starts a preparation in a process of its own, to be killed at a point."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def start(files, data_dir, workers=1, point="never"):
        command = [python, str(script), files, str(tmp_path / data_dir), str(workers), point]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)

    return start


@pytest.fixture
def corpus(jsonl, documents):
    return jsonl("corpus.jsonl", documents(400))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(workers, prepared, corpus):
    one = prepared(corpus, chunk_bytes=4096, workers=1, data_dir="one")
    many = prepared(corpus, chunk_bytes=4096, workers=workers, data_dir="many")
    assert len(content(one.folder)) > 10
    assert content(one.folder) == content(many.folder)


def test_a_process_is_started_for_each_usable_core_and_mebibyte_of_text(prepared, corpus, monkeypatch):
    started = []
    monkeypatch.setattr(tasks, "usable_cores", lambda: 4)
    monkeypatch.setattr(tasks, "_run_in_pool", lambda *given: started.append(given[-2]) or iter(()))
    prepared(corpus, chunk_bytes=4096)
    assert started == [] and os.path.getsize(corpus) < tasks.BYTES_A_WORKER == 2**20
    for bytes_a_worker in (os.path.getsize(corpus) // 3, 1024):
        monkeypatch.setattr(tasks, "BYTES_A_WORKER", bytes_a_worker)
        with pytest.raises(KeyError):  # the processes that stand in have done nothing
            prepared(corpus, chunk_bytes=4096, data_dir=f"by {bytes_a_worker}")
    assert started == [3, 4]


@pytest.mark.parametrize(
    "point, workers",
    [
        ("in a shard", 1),
        ("before a record", 1),
        ("before the manifest", 1),
        ("before the rename", 1),
        ("in the work of others", 2),
    ],
)
def test_a_preparation_killed_anywhere_goes_on_and_ends_with_the_same_bytes(
    point, workers, child, prepared, corpus, tmp_path
):
    killed = child(corpus, "data", workers, point)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (work,) = (tmp_path / "data").glob(".*.partial")
    assert not list((tmp_path / "data").glob("[!.]*/manifest.json"))
    time.sleep(1.0 if workers > 1 else 0)  # workers notice within half a second that nobody waits for them
    finished = [path for path in work.glob("tasks/*.json") if path.stem.isdigit()]
    shard_files = {path.name: path.stat().st_ino for path in work.glob("train-0000[01].bin")}
    assert finished or point in ("before the rename", "in the work of others")
    resumed = prepared(corpus, chunk_bytes=4096, workers=1)
    fresh = prepared(corpus, chunk_bytes=4096, workers=1, data_dir="fresh")
    assert content(resumed.folder) == content(fresh.folder)
    if workers == 1:
        kept = {name: (resumed.folder / name).stat().st_ino for name in shard_files}
        assert kept == shard_files, "finished chunks are kept, not made again"
    assert not list((tmp_path / "data").glob(".*.partial"))


def test_a_second_process_waits_and_finds_the_data_ready(child, corpus, tmp_path):
    first = child(corpus, "data")
    folder = Path(first.communicate(timeout=60)[0].strip())
    assert first.returncode == 0 and folder.parent == tmp_path / "data"  # and no other folder is removed below
    shutil.rmtree(folder)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = child(corpus, "data")
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=3)
        assert not folder.exists()
    assert second.communicate(timeout=60)[0].strip() == str(folder) and second.returncode == 0
    shards.open_prepared(folder)


def test_a_second_call_is_instant_and_touches_nothing(prepared, corpus, monkeypatch):
    first = prepared(corpus)
    monkeypatch.setattr(tasks, "run_task", None)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    start = time.perf_counter()
    second = prepared(corpus)
    assert time.perf_counter() - start < 0.1
    assert second.folder == first.folder and before == {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}


def documents_of(stream):
    tokens = stream.read(0, stream.n_tokens)
    return [
        bytes(piece[:-1].astype(np.uint8)).decode()
        for piece in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
    ]


def test_a_document_never_changes_its_split(prepared, jsonl, documents):
    """Whatever other documents come, go or change place."""
    all_of_them = documents(300)
    whole = prepared(jsonl("a.jsonl", all_of_them))
    side = {text: "validation" for text in documents_of(whole.validation)}
    side |= {text: "train" for text in documents_of(whole.train)}
    assert 30 < list(side.values()).count("validation") < 90 and len(side) == 300
    for name, texts in (("b.jsonl", all_of_them[::3]), ("c.jsonl", all_of_them[::-1] + ["new"] * 5)):
        part = prepared(jsonl(name, texts))
        assert all(side.get(text, "train") == "train" for text in documents_of(part.train))
        assert all(side.get(text, "validation") == "validation" for text in documents_of(part.validation))


def test_the_validation_fraction_is_met_and_a_larger_one_only_adds():
    texts = [f"{i}".encode() for i in range(20_000)]
    small = {text for text in texts if split_of(text, 0.05) == "validation"}
    large = {text for text in texts if split_of(text, 0.2) == "validation"}
    assert len(small) / 20_000 == pytest.approx(0.05, abs=0.006) and small < large
    assert split_of(b"x", 0.0) == "train"


def test_validation_files_are_the_validation_split(prepared, jsonl, documents):
    train, validation = jsonl("train.jsonl", documents(30)), jsonl("validation.jsonl", documents(45)[30:])
    data = prepared(TextFilesConfig(files=train, validation_files=validation))
    assert documents_of(data.train) == documents(30) and documents_of(data.validation) == documents(45)[30:]


@pytest.mark.parametrize("chunk_bytes", [2048, 1 << 20])
def test_limits_stop_after_the_document_that_reaches_them(chunk_bytes, prepared, corpus, documents):
    def source(**limits):
        return TextFilesConfig(files=corpus, validation_fraction=0.2, **limits)

    counted = prepared(source(max_documents=123), chunk_bytes=chunk_bytes).manifest["splits"]
    assert counted["train"]["n_documents"] + counted["validation"]["n_documents"] == 123
    lengths = np.cumsum([len(text.encode()) + 1 for text in documents(400)])
    measured = prepared(source(max_tokens=5000), chunk_bytes=chunk_bytes).manifest["splits"]
    assert measured["train"]["n_tokens"] + measured["validation"]["n_tokens"] == lengths[np.searchsorted(lengths, 5000)]


def test_bpe_is_trained_on_training_documents_only_and_lies_beside_the_shards(prepared, jsonl, documents):
    texts = documents(200)
    held_out = [text for text in texts if split_of(text.encode(), 0.2) == "validation"]
    marked = [
        text + " zyzzyva" * 50 if split_of((text + " zyzzyva" * 50).encode(), 0.2) == "validation" else text
        for text in texts
    ]
    assert held_out and marked != texts
    data = prepared(jsonl("a.jsonl", marked), BpeConfig(vocab_size=500))
    vocabulary = json.loads((data.folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert data.vocab_size == 500 and data.manifest["tokenizer"]["kind"] == "bpe"
    assert not any("zyz" in piece for piece in vocabulary)


@pytest.mark.parametrize("workers", [1, 2])
def test_bpe_tokens_do_not_depend_on_the_workers(workers, prepared, corpus):
    one = prepared(corpus, BpeConfig(vocab_size=400), chunk_bytes=8192, workers=1, data_dir="one")
    many = prepared(corpus, BpeConfig(vocab_size=400), chunk_bytes=8192, workers=workers, data_dir="many")
    assert content(one.folder) == content(many.folder)


def test_an_empty_corpus_or_split_is_refused_by_name(prepared, jsonl, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for files in (str(tmp_path / "empty.txt"), jsonl("blank.jsonl", ["", ""])):
        with pytest.raises(UserError, match=f"text_files: empty corpus, .*{Path(files).name}"):
            prepared(files)
    with pytest.raises(UserError, match="no document in validation .*one.jsonl.*data.validation_files"):
        prepared(TextFilesConfig(files=jsonl("one.jsonl", ["a single document"]), validation_fraction=0.0))
    assert not list((tmp_path / "data").glob("[!.]*/manifest.json"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_a_preparation_with_its_place(workers, prepared, corpus, tmp_path):
    with open(corpus, "a") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match="corpus.jsonl:401: not a JSON line"):
        prepared(corpus, chunk_bytes=4096, workers=workers)
    assert not list((tmp_path / "data").glob("[!.]*/manifest.json"))


def test_a_full_disk_leaves_no_half_folder_and_the_next_try_goes_on(prepared, corpus, tmp_path, monkeypatch):
    write, calls = shard_writer.ShardWriter.write, []

    def full(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *args)

    monkeypatch.setattr(shard_writer.ShardWriter, "write", full)
    with pytest.raises(UserError, match="No space left on device") as error:
        prepared(corpus, chunk_bytes=4096, workers=1)
    assert len(str(error.value).splitlines()) == 2 and str(tmp_path) in str(error.value)
    assert not list((tmp_path / "data").glob("[!.]*/manifest.json"))
    monkeypatch.undo()
    resumed = prepared(corpus, chunk_bytes=4096, workers=1)
    assert content(resumed.folder) == content(prepared(corpus, chunk_bytes=4096, data_dir="fresh").folder)


def test_a_changed_file_is_another_folder_and_a_change_under_way_is_refused(prepared, corpus, tmp_path, monkeypatch):
    before = prepared(corpus).folder
    with open(corpus, "a") as file:
        file.write('{"text": "one more"}\n')
    assert prepared(corpus).folder != before
    run_task = tasks.run_task

    def change(*args):
        os.utime(corpus)
        return run_task(*args)

    monkeypatch.setattr(tasks, "run_task", change)
    with pytest.raises(UserError, match="changed while it was being prepared"):
        prepared(corpus, data_dir="other")


def test_names_cannot_lead_out_of_the_data_folder(corpus):
    source = TextFilesConfig(files=corpus, name="../../x y$(z)")
    assert folder_name(source, BytesConfig(name="")).startswith("x_y_z-unnamed-")


def test_a_folder_without_a_manifest_is_not_overwritten(corpus, tmp_path, prepared):
    source = TextFilesConfig(files=corpus, validation_fraction=0.2)
    folder = tmp_path / "data" / folder_name(source, BytesConfig())
    folder.mkdir(parents=True)
    (folder / "mine").write_text("keep")
    with pytest.raises(UserError, match="has no manifest.json; delete it"):
        prepared(source)
    assert (folder / "mine").read_text() == "keep"


def test_the_built_in_corpus_is_ready_in_seconds_and_says_what_it_skipped(tmp_path, capsys):
    start = time.perf_counter()
    data = shards.open_prepared(prepare(PythonStdlibConfig(), BytesConfig(), data_dir=tmp_path))
    assert time.perf_counter() - start < 20
    assert data.train.n_tokens > 5_000_000 and data.validation.n_tokens > 100_000
    assert 2.5 < data.manifest["unigram_entropy_nats"] < 4.0
    lines = capsys.readouterr().err.splitlines()
    skipped = data.manifest["reading"]["files"].get("not UTF-8", {"count": 0})["count"]
    assert [f" {skipped} not UTF-8 (" in line for line in lines] == [True] * bool(skipped)


@pytest.mark.parametrize("kilobytes", [6, 10, 20, 50, 100])
def test_a_single_small_file_has_both_splits(prepared, tmp_path, kilobytes):
    for attempt in range(5):  # other bytes, other hashes
        path = tmp_path / f"small-{attempt}.txt"
        path.write_text("".join(f"line {attempt} {number} of a small file\n" for number in range(kilobytes * 36)))
        data = prepared(str(path))
        assert min(data.validation.n_tokens, data.train.n_tokens) > 500


def test_a_file_of_one_document_is_refused_with_what_to_do(prepared, tmp_path):
    (tmp_path / "tiny.txt").write_text("too little\n" * 20)
    with pytest.raises(UserError, match=r"too small to split.*data\.validation_files"):
        prepared(str(tmp_path / "tiny.txt"))


def test_files_that_are_not_utf8_are_named_when_nothing_else_is_there(prepared, tmp_path):
    (tmp_path / "latin.txt").write_bytes("né\n".encode("latin-1") * 2000)
    with pytest.raises(UserError, match="left out: 1 not UTF-8 .*latin.txt"):
        prepared(str(tmp_path / "latin.txt"))


def test_a_null_text_is_no_document(prepared, tmp_path, documents):
    rows = [{"text": text} for text in documents(100)]
    for name, content in (("plain", rows), ("nulls", [*rows[:50], {"text": None}, *rows[50:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    plain, nulls = (prepared(str(tmp_path / f"{name}.jsonl")) for name in ("plain", "nulls"))
    assert nulls.fingerprint == plain.fingerprint


def test_a_data_dir_that_is_a_file_is_one_line(jsonl, documents, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        prepare(TextFilesConfig(files=jsonl("a.jsonl", documents(9))), BytesConfig(), data_dir=tmp_path / "taken")


# ------------------------------------------------------------------------------------- splits and copies


def rejected(texts):
    """Texts that no hash puts into a validation split of a fraction this small."""
    assert not any(split_of(text.encode(), 1e-6) == "validation" for text in texts)
    return texts


@pytest.mark.parametrize("copies", [(1, 9), (9, 1), (5, 5, 1), (2, 3), (3, 2), (4, 1, 1)])
def test_one_document_moves_to_validation_and_no_copy_is_on_both_sides(copies, prepared, jsonl):
    nearest_first = sorted("abc"[: len(copies)], key=lambda name: split_draw(name.encode()))
    texts = rejected([name for name, n in zip(nearest_first, copies, strict=True) for _ in range(n)])
    data = prepared(TextFilesConfig(files=jsonl("a.jsonl", texts), validation_fraction=1e-6))
    moved, stay = documents_of(data.validation), documents_of(data.train)
    assert set(moved) == {nearest_first[copies.index(min(copies))]} and not set(moved) & set(stay)
    assert len(moved) == min(copies) and sorted(moved + stay) == sorted(texts)
    distinct = {"train": len(set(stay)), "validation": 1}
    assert (data.manifest["documents"]["distinct"], data.manifest["documents"]["validation_in_train"]) == (distinct, 0)
    assert data.manifest["source"]["fields"]["validation_fraction"] == 1e-6


def test_a_corpus_of_one_repeated_text_is_refused(prepared, jsonl):
    source = TextFilesConfig(files=jsonl("a.jsonl", rejected(["same"] * 9)), validation_fraction=1e-6)
    with pytest.raises(UserError, match="all 9 documents are the same text.*data.validation_files"):
        prepared(source)


def test_validation_documents_that_are_training_documents_are_counted_or_refused(prepared, jsonl, documents):
    texts = documents(60)
    train = jsonl("train.jsonl", texts)
    for name, found, shared, workers in (
        ("part", texts[50:] + ["new", "newer"], 10, 1),
        ("part by two processes", [*texts[50:], "new", "newer."], 10, 2),
        ("none", ["new"], 0, 1),
        ("twice", ["x", "x"], 0, 1),
    ):
        data = prepared(
            TextFilesConfig(files=train, validation_files=jsonl(f"{name}.jsonl", found)),
            chunk_bytes=2048,
            workers=workers,
        )
        counts = data.manifest["documents"]
        assert counts["distinct"] == {"train": len(set(texts)), "validation": len(set(found))}
        assert counts["validation_in_train"] == shared
        assert any(f"{shared} of 12 validation documents (83.3%)" in line for line in remarks(data.manifest)) == bool(
            shared
        )
    for name, found in (("same", texts), ("order", texts[::-1]), ("some", texts[:3]), ("again", [texts[0]] * 5)):
        with pytest.raises(UserError, match="every validation document is a training document too"):
            prepared(TextFilesConfig(files=train, validation_files=jsonl(f"{name}.jsonl", found)), workers=1)


def test_training_text_that_is_cut_in_other_places_is_noticed_by_its_lines(prepared, tmp_path):
    lines = [f"{i} is a line of the book, and {i * i} is its square\n" for i in range(6000)]
    new = [f"{i} is a line of another book, and {i * i} is its square\n" for i in range(2000)]
    (tmp_path / "all.txt").write_text("".join(lines))
    for name, found, share in (
        ("tail", lines[-2001:], 1.0),
        ("some", new[:700] + lines[:1300], 0.65),
        ("new", new, 0.0),
    ):
        (tmp_path / f"{name}.txt").write_text("".join(found))
        source = TextFilesConfig(files=str(tmp_path / "all.txt"), validation_files=str(tmp_path / f"{name}.txt"))
        manifest = prepared(source).manifest
        n_lines, n_shared = (manifest["documents"][f"sampled_validation_lines{which}"] for which in ("", "_in_train"))
        assert n_lines == pytest.approx(len(found) / 8, rel=0.3) and n_shared / n_lines == pytest.approx(share, abs=0.1)
        said = [line for line in remarks(manifest) if "of the validation lines are training lines too" in line]
        assert len(said) == (share > 0.5)


def test_a_validation_file_that_is_a_training_file_is_refused_whatever_its_name(jsonl, documents, tmp_path):
    train = jsonl("train.jsonl", documents(9))
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path)
    for path in (train, tmp_path / "link.jsonl", tmp_path / "folder/train.jsonl"):
        with pytest.raises(ConfigError, match="data.validation_files must not be in data.files too"):
            TextFilesConfig(files=train, validation_files=str(path)).identity()


def test_rows_without_text_and_a_small_validation_split_are_said(prepared, jsonl, documents):
    some = prepared(jsonl("some.jsonl", [*documents(300), None])).manifest
    many = prepared(jsonl("many.jsonl", [*documents(300), *[None] * 9])).manifest
    assert left_out_line(some) is None and "9 of 309 rows have no text" in left_out_line(many)
    small = prepared(jsonl("small.jsonl", [f"{i} words" for i in range(40)])).manifest
    n_tokens = small["splits"]["validation"]["n_tokens"]
    assert remarks(some) == []
    assert remarks(small) == [f"warning: the validation split has {n_tokens} tokens, and a loss on so few is uncertain"]


def test_copies_inside_a_split_are_said_if_there_are_many(prepared, jsonl, documents):
    few = prepared(jsonl("few.jsonl", [*documents(100), documents(1)[0]])).manifest
    many = prepared(jsonl("many.jsonl", documents(100) * 2)).manifest
    assert remarks(few) == [] and len(remarks(many)) == 2 and "are copies of others there" in remarks(many)[0]


# ------------------------------------------------------------------------------------- rows and ids


def with_bad_rows(path, documents, n_bad):
    lines = [json.dumps({"text": text}) for text in documents]
    lines[5:5] = ["not json"] * n_bad
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("workers", [1, 3])
def test_more_bad_rows_than_allowed_stop_a_preparation(workers, prepared, tmp_path, documents):
    path = with_bad_rows(tmp_path / "a.jsonl", documents(98), 2)
    source = TextFilesConfig(files=path, on_bad="skip", max_bad=0.02, validation_fraction=0.2)
    reading = prepared(source, workers=workers, chunk_bytes=1024).manifest["reading"]
    assert (reading["rows"], reading["bad_rows"]["not JSON"]["count"]) == (100, 2)
    assert f"{path}:6: not a JSON line" in reading["bad_rows"]["not JSON"]["first"][0]
    for max_bad in (0.001, 0.019):
        with pytest.raises(UserError, match=r"2 of 100 rows are bad \(2 %\), more than data.max_bad=0.0") as error:
            prepared(replace(source, max_bad=max_bad), workers=workers)
        assert f"{path}:6" in str(error.value) and "raise data.max_bad" in str(error.value)


def test_keys_that_were_added_later_change_no_folder_unless_set(jsonl, documents):
    source = TextFilesConfig(files=jsonl("a.jsonl", documents(9)))
    assert not {"ids_field", "vocab_size", "on_bad", "max_bad"} & source.identity().keys()
    names = {
        folder_name(one, BytesConfig()) for one in (source, replace(source, on_bad="skip"), replace(source, max_bad=0))
    }
    assert len(names) == 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_token_ids_are_taken_as_they_are(kind, prepared, tmp_path):
    rows = [[i % 7, i, 499, 3] for i in range(300)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), path)
    source = TextFilesConfig(files=str(path), ids_field="input_ids", vocab_size=500, validation_fraction=0.2)
    data = prepared(source)
    found = np.concatenate([stream.read(0, stream.n_tokens).reshape(-1, 4) for stream in (data.train, data.validation)])
    assert sorted(found.tolist()) == sorted(rows) and data.vocab_size == 500
    manifest = data.manifest
    assert manifest["tokenizer"] is manifest["eos_id"] is manifest["text_check"] is data.validation.n_bytes is None
    assert data.folder.name.startswith("text_files-") and "bytes" not in data.folder.name
    with pytest.raises(UserError, match="a.*: token id 499 is outside the vocabulary of 400"):
        prepared(replace(source, vocab_size=400))


def test_token_ids_of_a_tokenizer_end_with_its_eos_once(prepared, jsonl, documents, tmp_path):
    trained = prepared(jsonl("text.jsonl", documents(40)), BpeConfig(vocab_size=400))
    rows = [[i % 300 + 1, i % 7 + 1, *([0] * (i % 2))] for i in range(300)]  # some end with its EOS, 0, already
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    tokenizer = PretrainedConfig(path=str(trained.folder / "tokenizer.json"), vocab_size=400)
    source = TextFilesConfig(files=str(tmp_path / "a.jsonl"), ids_field="ids", validation_fraction=0.2)
    data = prepared(source, tokenizer)
    found = np.concatenate([stream.read(0, stream.n_tokens).reshape(-1, 3) for stream in (data.train, data.validation)])
    assert (found[:, 2] == 0).all() and sorted(map(tuple, found[:, :2])) == sorted(tuple(row[:2]) for row in rows)
    assert data.vocab_size == 400 and data.tokenizer_fingerprint == trained.tokenizer_fingerprint
    for other in (BytesConfig(), BpeConfig()):
        with pytest.raises(ConfigError, match="data.ids_field needs data.vocab_size, or the tokenizer that wrote"):
            prepared(source, other)
    with pytest.raises(ConfigError, match="^vocab_size needs ids_field"):
        TextFilesConfig(files="a", vocab_size=3)


@pytest.mark.parametrize(
    "value", [[1.5], ["a"], [True, False], [-1], [[1]], 3, "text", [10**30], [1 << 31], [None], {"a": 1}]
)
def test_what_is_no_list_of_token_ids_is_named(value, prepared, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"ids": value}) + "\n")
    with pytest.raises(UserError, match="a.jsonl:1: field 'ids' holds .*(no list of whole numbers|no token id)"):
        prepared(TextFilesConfig(files=str(tmp_path / "a.jsonl"), ids_field="ids", vocab_size=9))


# ------------------------------------------------------------------------------------- summary


def test_a_summary_says_what_was_found_taken_and_left_out(tmp_path, documents, jsonl, prepared):
    (tmp_path / "texts").mkdir()
    clean_file = jsonl("texts/a.jsonl", documents(50))
    (tmp_path / "texts/b.pdf").write_text("x")
    (tmp_path / "texts/c.txt").write_bytes(b"\xff")
    data = prepared(str(tmp_path / "texts"))
    (line,) = [line for line in describe(data).splitlines() if line.startswith("files ")]
    left = f"left out 1 with ending .pdf ({tmp_path}/texts/b.pdf), 1 not UTF-8 ({tmp_path}/texts/c.txt)"
    assert line == f"files            3 found, 1 taken; {left}" and left_out_line(data.manifest) in line
    clean = prepared(clean_file)
    assert left_out_line(clean.manifest) is None and remarks(clean.manifest) == []


def test_files_behind_a_limit_are_said(prepared, jsonl, documents, tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(4):
        jsonl(f"many/{i}.jsonl", documents(30 * i + 30)[30 * i :])
    limited = TextFilesConfig(files=str(tmp_path / "many"), max_documents=50, validation_fraction=0.2)
    lines = describe(prepared(limited, chunk_bytes=512)).splitlines()
    assert "files            4 found, 2 taken; 2 not reached, because the source is limited" in lines


def test_a_corpus_of_an_earlier_version_can_be_described(prepared, corpus):
    data = prepared(corpus)
    old = {key: value for key, value in data.manifest.items() if key not in ("reading", "documents", "text_check")}
    lines = describe(replace(data, manifest=old)).splitlines()
    assert (
        not any(line.startswith(("files", "warning")) for line in lines)
        and replace(data, manifest=old).text_lost is None
    )
