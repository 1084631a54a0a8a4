"""Problems are right, or wrong in the share that was asked for; no problem is in both splits."""

import numpy as np
import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.data.cutting import NO_TARGET, Cutting
from scaling_testbed.data.sources.arithmetic import ArithmeticConfig
from scaling_testbed.data.tokenizers import BytesConfig
from scaling_testbed.errors import ConfigError


def texts(source, split, sign="+"):
    """Each problem as text, with the one that ends the last window."""
    characters = np.array([*"0123456789", sign, "="])
    return ["".join(characters[row]) for row in source.tokens(split).reshape(-1, source.problem_tokens)]


@pytest.mark.parametrize(("operation", "sign"), [("add", "+"), ("multiply", "*")])
@pytest.mark.parametrize("digits", [1, 2])
def test_problems_are_different_and_have_right_answers(operation, sign, digits):
    source = ArithmeticConfig(operation=operation, digits=digits, n_problems=60, n_validation_problems=40)
    found = [texts(source, split, sign) for split in ("train", "validation")]
    problems = [one.split("=")[0] for split in found for one in split[:-1]]
    assert len(set(problems)) == 100 and [one[-1] for one in found] == [one[0] for one in found]
    for one in (one for split in found for one in split):
        left, answer = one.split("=")
        a, b = map(int, left.split(sign))
        assert (a + b if operation == "add" else a * b) == int(answer)
        assert len(left) == 2 * digits + 1 and len(answer) == source.answer_digits


def test_noise_makes_a_share_of_the_training_answers_wrong_and_no_other():
    clean, noisy = (ArithmeticConfig(answer_noise=share) for share in (0.0, 0.2))
    (a, b, right), (c, d, answers) = clean.problems("train"), noisy.problems("train")
    assert np.array_equal(a, c) and np.array_equal(b, d) and (right != answers).sum() == 300
    assert answers.min() >= 0 and answers.max() <= 198 and len(set(answers[right != answers])) > 120
    assert np.array_equal(clean.tokens("validation"), noisy.tokens("validation"))


def test_each_window_is_a_problem_and_its_answer_is_its_targets(prepared):
    source = ArithmeticConfig(n_problems=30, n_validation_problems=20, answer_noise=0.1)
    data = prepared(source, BytesConfig())
    cut = Cutting().of(data.train, 9)
    batch = cut.batch(np.arange(cut.number))
    assert cut.number == 30 and cut.each_targets == 3 and data.vocab_size == 12
    for row, text in enumerate(texts(source, "train")[:30]):
        there = batch.targets_BT[row] != NO_TARGET
        assert np.flatnonzero(there).tolist() == [5, 6, 7]
        assert "".join(map(str, batch.targets_BT[row][there])) == text[-3:]
    assert Cutting().of(data.train, 27).number == 10 and data.manifest["entropy_rate_nats"] == 0.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.sequence_length=16"], "batch.sequence_length=16 must be 9 or a multiple of it"),
        (["data.digits=1", "batch.sequence_length=6"], "at most 100 together with digits=1, got 3,500"),
        (["data.operation=divide"], "operation must be one of add, multiply"),
        (["data.answer_noise=1.5"], "answer_noise must be between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_when_a_run_is_composed(words, said):
    with pytest.raises(ConfigError, match=said):
        compose_many([["data=arithmetic", *words]])
