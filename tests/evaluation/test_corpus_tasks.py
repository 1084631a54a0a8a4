"""Tasks made of a corpus: each question has one right answer, and the same seed gives the same files."""

import json
from collections import Counter
from pathlib import Path

import pytest

from scaling_testbed import analyze
from scaling_testbed.config.sections import EvaluationConfig
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.tokenizers import BpeConfig, BytesConfig
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.corpus_tasks import (
    BRACKETS,
    CONTEXT,
    IDENTIFIER,
    make_tasks,
    read_named,
    validation_texts,
    with_made,
)
from scaling_testbed.evaluation.multiple_choice import read_tasks, remarks


def code(name):
    """Lines of code whose names belong to one document."""
    words = [f"{name}_{word}" for word in ("value", "index", "total", "other", "result", "second")]
    lines = [
        f"    {words[i % 6]} = f({words[(i + 1) % 6]}[{i}], {{{words[(i + 2) % 6]}: {words[(i * 5) % 6]}}})"
        for i in range(60)
    ]
    return f"def {name}():\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def corpus(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (place / f"{number}.py").write_text(code(f"unit{number}"))
    source = TextFilesConfig(files=[f"{place}/*.py"], validation_fraction=0.3)
    tokenizer = BytesConfig() if request.param == "bytes" else BpeConfig(vocab_size=300)
    return prepare(source, tokenizer, data_dir=place / "data", quiet=True)


def read(paths):
    return {kind: [json.loads(line) for line in path.read_text().splitlines()] for kind, path in paths.items()}


def test_each_question_is_answered_by_the_validation_text_and_by_no_other_choice(corpus, tmp_path):
    made = read(make_tasks(corpus, tmp_path, 30))
    texts = validation_texts(corpus)
    for kind, questions in made.items():
        assert len(questions) == 30 == len({question["context"] for question in questions})
        for question in questions:
            assert len(question["context"]) == CONTEXT and len(set(question["choices"])) == len(question["choices"])
            whole = question["context"] + question["choices"][question["gold"]]
            assert any(whole in text for text in texts), (kind, question)
    for question in made["identifier"]:
        right = question["choices"][question["gold"]]
        known = IDENTIFIER.findall(question["context"])
        assert [name for name in question["choices"] if name in known] == [right]
    golds = Counter(question["choices"][question["gold"]] for question in made["bracket"])
    assert golds == dict.fromkeys(BRACKETS, 10)
    places = Counter(question["gold"] for questions in made.values() for question in questions)
    assert max(places.values()) < 55  # the right answer has no place of its own


def test_the_same_corpus_and_seed_give_the_same_files_and_score_reads_them(corpus, tmp_path):
    one, two, other = (make_tasks(corpus, tmp_path / name, 20, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [path.read_bytes() for path in one.values()] == [path.read_bytes() for path in two.values()]
    assert all(one[kind].read_bytes() != other[kind].read_bytes() for kind in one)
    found = read_tasks(list(one.values()))
    assert [task.name for task in found] == ["continuation", "identifier", "bracket"] and remarks(found) == []


def test_a_task_is_named_once_whether_it_is_a_file_or_is_made(tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in ("bracket", "mine")]
    for path in files:
        path.write_text(json.dumps({"context": "a", "choices": ["b", "c"], "gold": 0}) + "\n")
    (mine,) = read_tasks(files[1:])
    assert read_named([Path("identifier"), files[1], Path("bracket")]) == ["identifier", mine, "bracket"]
    for names in ([Path("bracket"), files[0]], [Path("bracket"), Path("bracket")]):
        with pytest.raises(ConfigError, match="two tasks are named bracket; leave one out"):
            read_named(names)
    config = EvaluationConfig(task_questions=9)
    with pytest.raises(UserError, match="this data was given as token ids|no such|holds no|manifest"):
        with_made(["bracket"], tmp_path, config, option="x")
    assert with_made([mine], tmp_path, config, option="x") == [mine]


def test_a_task_that_there_is_not_is_told_with_those_that_are():
    with pytest.raises(ConfigError, match="no task continuatoin; give a .jsonl file, or continuation, identi"):
        read_named([Path("bracket"), Path("continuatoin")])


def test_a_corpus_with_too_little_text_is_refused_with_what_there_is(corpus, tmp_path, capsys):
    with pytest.raises(UserError, match="questions of kind .*; ask for fewer with --questions"):
        make_tasks(corpus, tmp_path, 100_000)
    assert analyze.main(["tasks", str(corpus), str(tmp_path), "--questions", "0"]) == 2
    assert "--questions must be greater than zero; got 0" in capsys.readouterr().err
    assert analyze.main(["tasks", str(tmp_path / "none"), str(tmp_path)]) == 1
    assert analyze.main(["tasks", str(corpus), str(tmp_path / "out"), "--questions", "12"]) == 0
    assert "12 questions of each kind, seed 0, from the validation split of" in capsys.readouterr().out
