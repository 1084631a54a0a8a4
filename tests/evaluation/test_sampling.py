"""Texts from a checkpoint are what a plain loop over the logits writes."""

import math

import numpy as np
import pytest
import torch

from scaling_testbed import sample as door
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation import sampling
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.sampling import Sampling, sample
from scaling_testbed.training.run import train

WORDS = "the cat sat on the mat and a dog ran to the red hat"
EOS = 256  # of bytes


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory):
    """(RunConfig, run folder) of a model of 32 bytes, trained on a rhyme, with checkpoints of two steps."""
    place = tmp_path_factory.mktemp("rhyme")
    for name in "ab":
        (place / f"{name}.txt").write_text(f"{name} {WORDS}\n" * 60)
    files = [f"data.files=['{place}/a.txt']", f"data.validation_files=['{place}/b.txt']"]
    small = ["model=nano_s", "batch.sequences=8", "batch.sequence_length=32", "budget.steps=40", "optimizer.lr=1e-2"]
    places = [f"data_dir={place / 'data'}", f"runs_dir={place / 'runs'}", "checkpoint.keep_steps=[10]"]
    (run,) = compose_many([["data=text_files", *files, *places, *small, "tokenizer=bytes"]])
    train(run, quiet=True)
    return run, run_folder_path(run)


def texts(rhyme, prompt="the cat", step=None, **how):
    return sample(*rhyme, prompt, Sampling(**{"tokens": 20, **how}), step=step)[1]


def test_greedy_text_is_that_of_a_plain_loop_over_a_window_of_training(rhyme):
    run, folder = rhyme
    _, model, _ = load_model(run, folder, step=None, device=torch.device("cpu"))
    tokens = list(b"the cat")
    for _ in range(40):  # longer than 32
        logits_V = model.logits(torch.tensor([tokens[-32:]]))[0, -1]
        tokens.append(int(logits_V.argmax()))
    assert EOS not in tokens
    assert texts(rhyme, tokens=40, temperature=0) == [bytes(tokens).decode("utf-8", "replace")]
    (other,) = texts(rhyme, tokens=40, temperature=0, step=10)
    assert other != bytes(tokens).decode("utf-8", "replace") and other.startswith("the cat")


def test_the_likeliest_token_alone_is_the_greedy_text(rhyme):
    assert texts(rhyme, top_k=1, count=2) == texts(rhyme, temperature=0) * 2


def test_a_seed_gives_the_same_texts_and_more_texts_leave_the_earlier_ones(rhyme):
    three = texts(rhyme, seed=4, count=3)
    assert len(set(three)) == 3 and texts(rhyme, seed=4) == three[:1]
    assert texts(rhyme, seed=5) != three[:1]


@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (3, 0.5)])
def test_tokens_are_drawn_by_the_softmax_of_the_likeliest(top_k, temperature):
    logits_V, how = np.array([0.0, 2.0, -1.0, 2.0, 1.0]), Sampling(top_k=top_k, temperature=temperature)
    weights = [math.exp(x / temperature) for x in logits_V]
    kept = range(5) if top_k is None else (1, 3, 4)
    rng = np.random.default_rng(0)
    drawn = [sampling._next(logits_V, how, rng) for _ in range(4000)]
    for token in range(5):
        share = weights[token] / sum(weights[one] for one in kept) if token in kept else 0
        assert drawn.count(token) / 4000 == pytest.approx(share, abs=0.03)


def planned_logits(monkeypatch, likeliest):
    """The likeliest tokens of the model become those of a list, in turn. Returns the list of what it then reads."""
    seen, coming = [], iter(likeliest)

    def logits(model, tokens, device):
        seen.append(tokens)
        return np.eye(model.config.known_vocab_size)[next(coming)]

    monkeypatch.setattr(sampling, "next_logits", logits)
    return seen


def test_a_text_ends_with_its_document_and_an_empty_prompt_begins_one(rhyme, monkeypatch):
    seen = planned_logits(monkeypatch, [104, 105, EOS, 104])
    assert texts(rhyme, prompt="", temperature=0) == ["hi"]
    assert seen == [[EOS], [EOS, 104], [EOS, 104, 105]]


def test_the_command_prints_the_texts_and_no_control_characters(rhyme, monkeypatch, capsys):
    planned_logits(monkeypatch, [27, 9, EOS, 65, EOS])
    words = [str(rhyme[1]), "--prompt", "ä", "--count", "2", "--tokens", "5", "--top-k", "1", "--step", "10"]
    assert door.main(words) == 0
    said = capsys.readouterr().out
    assert said == f"step 10 of {rhyme[1]}, in fp32\n\ntext 1 of 2:\nä\ufffd\t\n\ntext 2 of 2:\näA\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens must be a whole number above zero; got 0"),
        (["--top-k", "0"], "--top-k must be a whole number above zero; got 0"),
        (["--count", "-1"], "--count must be a whole number above zero; got -1"),
        (["--temperature", "-1"], "--temperature must be finite and not negative; got -1.0"),
        (["--temperature", "nan"], "--temperature must be finite"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--temperature", "0", "--count", "2"], "all texts are the same at --temperature 0"),
        (["--prompt", "\udcff"], "--prompt '\\udcff' has a character that UTF-8 cannot write"),
        (["--step", "7"], "holds no step 7; there are 10, 40"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(rhyme, capsys, options, message):
    assert door.main([str(rhyme[1]), *options]) != 0
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_data_of_token_ids_and_logits_that_are_not_finite_are_refused(trained, rhyme, monkeypatch, capsys):
    _, folder = trained("budget.steps=1", "checkpoint.at_end=true")
    assert door.main([str(folder), "--prompt", "a"]) == 1
    said = capsys.readouterr().err
    assert "this data was given as token ids; there is no tokenizer" in said and said.count("\n") == 1
    monkeypatch.setattr(sampling, "next_logits", lambda model, tokens, device: np.full(257, np.nan))
    with pytest.raises(UserError, match="gives logits that are not finite: has the run diverged"):
        texts(rhyme)
    with pytest.raises(ConfigError):
        Sampling(seed=2**32)
