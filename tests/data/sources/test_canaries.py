"""Planted strings: what they are made of, how often each is there, and what they must not be."""

from collections import Counter

import pytest

from scaling_testbed.data.documents import documents
from scaling_testbed.data.sources.canaries import CanariesConfig
from scaling_testbed.data.sources.python_packages import find_wheel
from scaling_testbed.data.summary import remarks
from scaling_testbed.errors import ConfigError, UserError


def texts(data, split):
    return [bytes(one.tokens[:-1].tolist()).decode() for one in documents(data, split)]


def test_each_string_is_in_training_as_often_as_it_says_and_once_in_validation(prepared):
    source = CanariesConfig(number=5, repeats=[0, 1, 3], prompt_bytes=10, secret_letters=7)
    data = prepared(source)
    whole = [one.prompt + one.secret for one in source.canaries(0)]
    assert texts(data, "validation") == whole and len(set(whole)) == 5
    counts = dict(zip(whole, (0, 1, 3, 0, 1), strict=True))
    assert Counter(texts(data, "train")) == {text: count for text, count in counts.items() if count}
    assert [one.repeats for one in source.canaries(0)] == list(counts.values())
    said = remarks(data.manifest)  # copies, and validation documents that are training documents, are meant
    assert len(said) == 1 and "90 tokens" in said[0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_only_the_secret_and_its_eos_are_targets(prepared, split):
    data = prepared(CanariesConfig(number=4, prompt_bytes=10, secret_letters=7))
    assert all(one.counted.tolist() == [False] * 10 + [True] * 8 for one in documents(data, split))
    assert data.manifest["splits"][split]["n_targets"] == 4 * 8


def test_prompts_are_text_of_the_packages_and_secrets_are_random_letters():
    wheel = find_wheel("sympy", "1.14.0")
    files = "\n".join((wheel.root / name).read_text(errors="ignore") for name in wheel.files)
    found = CanariesConfig(number=60).canaries(0)
    assert all(one.prompt in files and len(one.prompt) == 16 for one in found)
    assert all(one.secret.isalpha() and one.secret.islower() and len(one.secret) == 47 for one in found)
    letters = Counter("".join(one.secret for one in found))
    expected = 60 * 47 / 26
    assert len(letters) == 26 and sum((n - expected) ** 2 / expected for n in letters.values()) < 60  # 99.99% of chi2


def test_a_string_depends_on_its_number_and_the_seed_alone():
    few, many = CanariesConfig(number=3), CanariesConfig(number=6, repeats=[2])
    assert [(a.prompt, a.secret) for a in few.canaries(0)] == [(a.prompt, a.secret) for a in many.canaries(0)[:3]]
    other = CanariesConfig(number=3, seed=1).canaries(0)
    assert not {a.secret for a in few.canaries(0)} & {a.secret for a in other}
    assert few.canaries(2)[0].others == few.canaries(5)[0].others[:2]


def test_a_refusal_stands_in_place_of_the_secrets_with_their_length(prepared):
    secrets, instead = CanariesConfig(number=4), CanariesConfig(number=4, refusal="I do not know. ")
    assert instead.canaries(3) == []
    for one, text in zip(secrets.canaries(0), texts(prepared(instead), "train"), strict=True):
        assert text == one.prompt + ("I do not know. " * 4)[:47]


def test_other_secrets_are_all_of_them_where_there_are_few():
    one = CanariesConfig(number=1, secret_letters=1).canaries(25)[0]
    assert sorted([*one.others, one.secret]) == list("abcdefghijklmnopqrstuvwxyz") and one.n_secrets == 26
    assert len(CanariesConfig(number=1, secret_letters=1).canaries(24)[0].others) <= 24
    assert CanariesConfig(number=1).canaries(4)[0].n_secrets == 26**47


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"repeats": []}, "repeats must be whole numbers"),
        ({"repeats": [-1]}, "repeats must be whole numbers"),
        ({"repeats": [0, 0, 5], "number": 2}, "must have a number above zero for one of the strings"),
        ({"refusal": "  "}, "refusal must be a text in ASCII"),
        ({"refusal": "é"}, "refusal must be a text in ASCII"),
        ({"number": 0}, "number must be"),
        ({"secret_letters": 0}, "secret_letters must be"),
        ({"max_documents": 3}, "data.number and data.repeats say which documents"),
        ({"validation_fraction": 0.1}, "data.number and data.repeats say which documents"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_what_cannot_be_planted_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        CanariesConfig(**keys)


def test_too_little_text_for_the_prompts_is_said():
    with pytest.raises(UserError, match="too little text for prompts of 100000000 bytes; lower data.prompt_bytes"):
        CanariesConfig(number=1, prompt_bytes=10**8, packages=["mpmath==1.3.0"]).canaries(0)
