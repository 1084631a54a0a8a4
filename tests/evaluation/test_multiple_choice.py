"""Tasks are read whole or refused by file and line, and a choice's tokens are where they are said to be."""

import json

import numpy as np
import pytest

from scaling_testbed.data.tokenizers import BpeConfig, ByteTokenizer, load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.multiple_choice import ChoiceTask, Document, continuations, read_tasks, remarks

GOOD = {"context": "a", "choices": ["b", "c"], "gold": 1}


def test_what_is_written_is_read(tmp_path):
    lines = [
        json.dumps(GOOD | {"id": 7}),
        "",
        json.dumps({"context": "", "choices": ["x\u2028", " ä", "z"], "gold": 0}),
    ]
    (tmp_path / "some_task.v1.jsonl").write_text("\r\n".join(lines) + "\n")
    (task,) = read_tasks([tmp_path / "some_task.v1.jsonl"])
    assert task.name == "some_task.v1"
    assert task.documents == (Document(1, "a", ("b", "c"), 1), Document(3, "", ("x\u2028", " ä", "z"), 0))
    assert task.documents[1].n_bytes == [4, 2, 1] and remarks([task]) == []
    (tmp_path / "odd.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 3 + json.dumps(GOOD | {"choices": ["b", "b"]}))
    assert remarks(read_tasks([tmp_path / "odd.jsonl"])) == [
        "2 of 4 documents of odd repeat another one: the se is too small",
        "1 of 4 documents of odd have equal choices: the first one is taken",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "t.jsonl:2: not JSON"),
        ("[" * 100_000, "t.jsonl:2: not JSON"),
        ("3", "t.jsonl:2: must be an object like"),
        (json.dumps(GOOD)[:-1] + ', "gold": 1}', "t.jsonl:2: not JSON .'gold' is there twice"),
        (json.dumps({"context": "a", "choices": ["b", "c"]}), "t.jsonl:2: has no 'gold'"),
        (json.dumps(GOOD | {"context": None}), "t.jsonl:2: context must be a text, got null"),
        (json.dumps(GOOD | {"choices": "bc"}), "t.jsonl:2: choices must be a list of two texts or more"),
        (json.dumps(GOOD | {"choices": ["b"], "gold": 0}), "t.jsonl:2: choices must be a list of two texts or more"),
        (json.dumps(GOOD | {"choices": ["b", 3]}), "t.jsonl:2: choices must be a list of two texts or more"),
        (json.dumps(GOOD | {"choices": ["b", " \n"]}), r"t.jsonl:2: choices\[1\] is blank"),
        (json.dumps(GOOD | {"gold": 2}), "t.jsonl:2: gold must be a whole number from 0 to 1, got 2"),
        (json.dumps(GOOD | {"gold": -1}), "t.jsonl:2: gold must be"),
        (json.dumps(GOOD | {"gold": True}), "t.jsonl:2: gold must be a whole number from 0 to 1, got true"),
        (json.dumps(GOOD | {"gold": 1.0}), "t.jsonl:2: gold must be"),
        (json.dumps(GOOD | {"context": "\ud800"}), "t.jsonl:2: has a text with half a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    (tmp_path / "t.jsonl").write_text(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(UserError, match=said) as refused:
        read_tasks([tmp_path / "t.jsonl"])
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 300 + len(str(tmp_path))


def test_a_wrong_file_is_named(tmp_path):
    for content, said in [(b"", "holds no document"), (b"\n \n", "holds no document"), (b"{\xff", "not UTF-8: byte 1")]:
        (tmp_path / "t.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=f"t.jsonl.* {said}"):
            read_tasks([tmp_path / "t.jsonl"])
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read_tasks([path])
    (tmp_path / "a").mkdir()
    for name in ("t.jsonl", "a/t.jsonl"):
        (tmp_path / name).write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError, match="are both named t"):
        read_tasks([tmp_path / "t.jsonl", tmp_path / "a" / "t.jsonl"])


@pytest.fixture
def bpe(tmp_path):
    """A small vocabulary with the words of a rhyme in it."""
    words = b"the cat sat on the mat unhappy happy cat " * 50
    return load_tokenizer(tmp_path, BpeConfig(vocab_size=320).prepare([words], tmp_path))


def one(tokenizer, context, *choices, max_length=100):
    """The continuations of a single document."""
    task = ChoiceTask("t", (Document(1, context, choices, 0),), "")
    return continuations(task, tokenizer, max_length=max_length)[0]


def parts(tokenizer, continuation) -> tuple[str, str]:
    at = len(continuation.ids) - continuation.n_scored
    return tokenizer.decode(continuation.ids[:at]), tokenizer.decode(continuation.ids[at:])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_where_the_white_space_is_written_does_not_matter(bpe, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    behind = one(tokenizer, "the cat sat", " on", " happy")
    before = one(tokenizer, "the cat sat ", "on", "happy")
    for a, b in zip(behind, before, strict=True):
        assert np.array_equal(a.ids, b.ids) and a.n_scored == b.n_scored and not (a.apart or b.apart)
    assert parts(tokenizer, before[1]) == ("the cat sat", " happy")
    assert Document(1, "a", (" on", " happy"), 0).n_bytes == Document(1, "a ", ("on", "happy"), 0).n_bytes == [2, 5]
    (whole,) = tokenizer.encode_batch([b"the cat sat happy"])  # the very tokens that training has seen
    assert behind[1].ids.tolist() == whole.tolist()


def test_a_token_over_the_boundary_is_cut_there(bpe):
    whole, alone = bpe.encode_batch([b"the unhappy", b"happy"])
    assert bpe.decode(whole[-1:]) == " unhappy"  # the case is there
    apart, together = one(bpe, "the un", "happy", " cat")[0], one(bpe, "the un", " cat", "happy")[0]
    assert parts(bpe, apart) == ("the un", "happy") and apart.n_scored == len(alone)
    assert not together.apart and parts(bpe, together) == ("the un", " cat")


def test_an_empty_context_is_the_end_of_a_document(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        for context, choice in (("", " cat"), (" ", "cat")):
            (found, _) = one(tokenizer, context, choice, "x")
            assert found.ids[0] == tokenizer.eos_id and found.n_scored == len(found.ids) - 1
            assert parts(tokenizer, found)[1] == " cat"


def test_a_long_context_loses_its_beginning_and_a_long_choice_is_refused():
    tokenizer = ByteTokenizer()
    long, short = one(tokenizer, "0123456789", "ab", "c", max_length=6)
    # The model reads 6 tokens, the last of which predicts the choice's last.
    assert parts(tokenizer, long) == ("56789", "ab") and long.truncated
    assert parts(tokenizer, short) == ("456789", "c")
    (whole, _) = one(tokenizer, "0123", "abc", "c", max_length=6)
    assert parts(tokenizer, whole) == ("0123", "abc") and not whole.truncated
    assert parts(tokenizer, one(tokenizer, "0123", "abcdef", "c", max_length=6)[0]) == ("3", "abcdef")
    with pytest.raises(UserError, match=r"^t:1: choices\[1\] has 7 tokens; .* at most 6 can be scored"):
        one(tokenizer, "0123", "c", "abcdefg", max_length=6)
