"""A finished row is served, and a stopped run goes on, only while all that decides its numbers is the same."""

import json
import os
import re
import shutil
import warnings

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.preparing.inputs import inputs_of
from scaling_testbed.data.preparing.preparation import folder_name, prepare
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.data.sources.markov import MarkovConfig
from scaling_testbed.errors import UserError
from scaling_testbed.runs import identity
from scaling_testbed.runs.identity import AtHand, Found
from scaling_testbed.training import run as trainer
from scaling_testbed.training.run import train

SMALL = ["model=bigram", "batch.sequences=2", "batch.sequence_length=16", "budget.steps=2", "evaluation.tokens=64"]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Returns a function from words to the row of a finished run. After the first call nothing is trained."""
    places = [f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}", "compute.threads=1"]

    def call(*words):
        (run,) = compose_many([[*SMALL, *places, *words]])
        row = train(run, quiet=True)
        monkeypatch.setattr(trainer, "build_parts", None)
        return row

    return call


@pytest.fixture
def texts(tmp_path):
    """Returns a function that writes a text file into the temporary folder and returns its path."""

    def write(name, word="word"):
        (tmp_path / name).write_text("".join(f"{word} number {i} of a text\n" for i in range(600)))
        return str(tmp_path / name)

    return write


def of_tokens(folder, n=4000, seed=0):
    folder.mkdir(exist_ok=True)
    for part, name in enumerate(("train", "validation")):
        np.random.default_rng([seed, part]).integers(0, 99, n).astype("<u2").tofile(folder / f"{name}.bin")
    return ["data=token_files", f"data.train={folder}/train.bin", f"data.validation={folder}/validation.bin"]


def test_a_validation_file_is_compared_too(served, texts):
    words = ["data=text_files", f"data.files={texts('a.txt')}", f"data.validation_files={texts('b.txt', 'other')}"]
    row = served(*words)
    assert served(*words) == row
    path = texts("b.txt", "another")
    with pytest.raises(UserError, match=f"was trained on other data: {path} has"):
        served(*words)


def test_a_tokenizers_file_is_compared_too(served, texts, tmp_path):
    data = ["data=text_files", f"data.files={texts('a.txt')}"]
    (bpe,) = compose_many([[*data, "tokenizer=bpe", "tokenizer.vocab_size=300"]])
    made = prepare(bpe.data, bpe.tokenizer, data_dir=tmp_path / "other", quiet=True)
    file = shutil.copy(made / "tokenizer.json", tmp_path / "tokenizer.json")
    words = [*data, "tokenizer=pretrained", f"tokenizer.path={file}"]
    row = served(*words)
    shutil.copy(made / "tokenizer.json", file)  # the same bytes at another time
    assert served(*words) == row
    content = json.loads((made / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    with open(file, "w") as opened:
        json.dump(content, opened)
    with pytest.raises(UserError, match=f"was trained on other data: {file} has"):
        served(*words)


def test_an_evaluation_set_is_compared_too(served, tmp_path):
    (own,) = compose_many([[*of_tokens(tmp_path / "own"), "data.vocab_size=99"]])
    (other,) = compose_many([[*of_tokens(tmp_path / "other", seed=1), "data.vocab_size=99"]])
    folders = [prepare(run.data, run.tokenizer, data_dir=tmp_path / "sets", quiet=True) for run in (own, other)]
    place = tmp_path / "set"
    shutil.copytree(folders[0], place)
    words = [*of_tokens(tmp_path / "own"), "data.vocab_size=99", f"+evaluation.sets.extra={place}"]
    row = served(*words)
    assert row["evaluation_data"] == {"extra": open_prepared(place).fingerprint}
    shutil.rmtree(place)
    with pytest.warns(UserWarning, match="was not compared with its data: evaluation.sets.extra=.* does not exist"):
        assert served(*words) == row
    shutil.copytree(folders[1], place)
    now = open_prepared(place).fingerprint
    with pytest.raises(UserError, match=f"evaluated on other data: evaluation.sets.extra={place} .* {now}"):
        served(*words)


def test_another_standard_library_is_other_data(served, tmp_path, monkeypatch):
    """As after an update of Python, or on another machine."""
    for version in ("3.11", "3.12"):
        (tmp_path / version).mkdir()
        for number in range(60):
            (tmp_path / version / f"m{number}.py").write_text(f"VALUE = {number}\n" * 40)
    (tmp_path / "3.12" / "m7.py").write_text("VALUE = 7.0\n" * 40)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "3.11"))
    row = served("data=python_stdlib")
    assert served("data=python_stdlib") == row
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "3.12"))
    with pytest.raises(UserError, match=r"other data: .*3\.12/m7.py has 480 bytes, and .*3\.11/m7.py had 400"):
        served("data=python_stdlib")


def test_token_files_in_another_folder_are_the_same_data(served, tmp_path):
    words = [*of_tokens(tmp_path / "own"), "data.vocab_size=99"]
    row = served(*words)
    (tmp_path / "own").rename(tmp_path / "away")
    of_tokens(tmp_path / "own")  # the same bytes at another time
    assert served(*words) == row
    of_tokens(tmp_path / "own", seed=1)
    with pytest.raises(UserError, match="train.bin has other bytes now"):
        served(*words)


def test_a_synthetic_corpus_that_is_gone_is_no_other_data_unless_its_source_is_another_now(
    served, tmp_path, monkeypatch
):
    words = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000"]
    row = served(*words)
    shutil.rmtree(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(*words) == row
    real = MarkovConfig.identity
    monkeypatch.setattr(MarkovConfig, "identity", lambda self: {**real(self), "version": 2})
    with pytest.raises(UserError, match=r"markov\S* was prepared as markov\S+ and is markov\S+ now"):
        served(*words)


def test_a_prepared_folder_with_the_tokens_of_another_corpus_is_other_data(served, tmp_path):
    words = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000"]
    served(*words)
    (folder,) = (tmp_path / "data").glob("markov*")
    (other,) = compose_many([[*words, "data.n_tokens=30000"]])
    theirs = prepare(other.data, other.tokenizer, data_dir=tmp_path / "other", quiet=True)
    shutil.rmtree(folder)
    shutil.copytree(theirs, folder)
    with pytest.raises(UserError, match="its data_fingerprint was [0-9a-f]+ and is [0-9a-f]+ now"):
        served(*words)


def test_hub_data_that_are_not_prepared_here_are_not_compared(served, texts, tmp_path, monkeypatch):
    words = ["data=text_files", f"data.files={texts('a.txt')}"]
    row = served(*words)
    monkeypatch.setattr("scaling_testbed.data.sources.text_files.TextFilesConfig.inputs", lambda _: None)
    assert served(*words) == row
    shutil.rmtree(tmp_path / "data")
    with pytest.warns(UserWarning, match="its data are not prepared in"):
        assert served(*words) == row


def rewritten(tmp_path, change):
    (path,) = tmp_path.glob("runs/*/*/result.json")
    row = json.loads(path.read_text())
    change(row)
    path.write_text(json.dumps(row))
    return row


def of_last_version(row):
    for key in ("data_folder", "data_inputs", "evaluation_data"):
        del row[key]


def test_a_row_of_the_last_version_is_compared_by_its_fingerprints(served, texts, tmp_path):
    words = ["data=text_files", f"data.files={texts('a.txt')}"]
    served(*words)
    row = rewritten(tmp_path, of_last_version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(*words) == row
    path = texts("a.txt", "other")
    with pytest.raises(UserError, match=f"{path} has"):
        served(*words)
    shutil.rmtree(tmp_path / "data")
    with pytest.warns(UserWarning, match="recorded no sizes of files"):
        assert served(*words) == row


def test_a_changed_file_is_noticed_after_its_corpus_is_deleted(served, texts, tmp_path, monkeypatch):
    words = ["data=text_files", f"data.files={texts('a.txt')}"]
    row = served(*words)
    shutil.rmtree(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr("scaling_testbed.data.preparing.inputs.hashes", None)
        patch.setattr(identity, "MOST_HASHED", 0)  # of more bytes, size and time tell
        assert served(*words) == row
    path = texts("a.txt")  # the same bytes at another time
    assert served(*words) == row
    stat, before = (tmp_path / "a.txt").stat(), (tmp_path / "a.txt").read_text()
    (tmp_path / "a.txt").write_text(before.replace("0", "1"))
    changed = f"files .*{path}.*: 1 files of .* bytes in all have other bytes now"
    with pytest.raises(UserError, match=changed):
        served(*words)
    (tmp_path / "a.txt").write_text(before)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run = compose_many([words])[0]
    folder = folder_name(run.data, run.tokenizer)  # of these sizes and times, as the row of a run has it
    then = {key: row[key] for key in ("data_fingerprint", "data_inputs")} | {"data_folder": folder}
    assert AtHand().compare(then, run) == Found()
    (tmp_path / "a.txt").write_text(before.replace("0", "1"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert re.search(changed, AtHand().compare(then, run).changed)
    few = compose_many([[*words, "data.max_documents=3"]])[0]
    inputs = then["data_inputs"] | {"settings": inputs_of(few.data, few.tokenizer).settings}
    found = AtHand().compare(then | {"data_inputs": inputs}, few)  # other times, and a limit
    assert found.changed is None and "a limit left out files" in found.unknown


def test_the_api_serves_no_row_of_other_data(texts, tmp_path):
    words = [*SMALL, "data=text_files", f"data.files={texts('a.txt')}", "compute.threads=1"]
    words += [f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}"]
    row = st.train(words)
    assert st.train(words) == row
    texts("a.txt", "another")
    with pytest.raises(UserError, match="was trained on other data"):
        st.train(words)


def test_an_evaluation_set_that_changed_stops_a_run_that_goes_on(tmp_path, texts):
    """The checkpoint tells it; no row is there."""
    (own,) = compose_many([[*of_tokens(tmp_path / "own"), "data.vocab_size=99"]])
    place = tmp_path / "set"
    shutil.copytree(prepare(own.data, own.tokenizer, data_dir=tmp_path / "sets", quiet=True), place)
    words = [*SMALL, *of_tokens(tmp_path / "own"), "data.vocab_size=99", f"+evaluation.sets.extra={place}"]
    run = compose([*words, f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}", "compute.threads=1"])
    train(run, quiet=True)
    (run_folder_path(run) / "result.json").unlink()
    (other,) = compose_many([[*of_tokens(tmp_path / "other", seed=1), "data.vocab_size=99"]])
    shutil.rmtree(place)
    shutil.copytree(prepare(other.data, other.tokenizer, data_dir=tmp_path / "sets", quiet=True), place)
    with pytest.raises(UserError, match="was evaluated on other data: evaluation.sets.extra"):
        train(run, quiet=True)
