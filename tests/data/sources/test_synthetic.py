import itertools
import math

import numpy as np
import pytest

from scaling_testbed.data.manifest import window_entropy_nats
from scaling_testbed.data.sources import SOURCES
from scaling_testbed.data.sources.copy import CopyConfig
from scaling_testbed.data.sources.markov import MarkovConfig
from scaling_testbed.data.sources.noise import NoiseConfig
from scaling_testbed.errors import ConfigError


def markov_entropy_by_linear_algebra(source):
    """Independent of the code under test: the full transition matrix between contexts and its eigenvector."""
    table, size, order = source.table(), source.vocab_size, source.order
    contexts = list(itertools.product(range(size), repeat=order))
    matrix = np.zeros((len(contexts), len(contexts)))
    for i, context in enumerate(contexts):
        for symbol in range(size):
            matrix[i, contexts.index((*context[1:], symbol))] += table[i, symbol]
    system = np.vstack([matrix.T - np.eye(len(contexts)), np.ones(len(contexts))])
    share = np.linalg.lstsq(system, np.append(np.zeros(len(contexts)), 1.0), rcond=None)[0]
    return sum(share[i] * -sum(p * math.log(p) for p in table[i]) for i in range(len(contexts)))


@pytest.mark.parametrize("order, vocab_size", [(1, 2), (1, 20), (2, 6), (3, 4)])
def test_markov_entropy_is_that_of_the_transition_matrix(order, vocab_size):
    source = MarkovConfig(order=order, vocab_size=vocab_size, seed=5)
    assert source.entropy_rate_nats() == pytest.approx(markov_entropy_by_linear_algebra(source), abs=1e-10)


@pytest.mark.parametrize("order, vocab_size", [(1, 20), (2, 6), (3, 4)])
def test_a_markov_stream_has_the_entropies_by_context_that_it_claims(order, vocab_size):
    source = MarkovConfig(order=order, vocab_size=vocab_size, n_tokens=400_000, concentration=0.5)
    tokens, claimed = source.tokens("train"), source.entropies_by_context_nats()
    assert len(claimed) == order + 1 and claimed[-1] == source.entropy_rate_nats()
    for known, entropy in enumerate(claimed):
        window = sum(tokens[i : len(tokens) - known + i] * vocab_size ** (known - i) for i in range(known + 1))
        counts = np.bincount(window, minlength=vocab_size ** (known + 1)).reshape(-1, vocab_size)
        share = counts / counts.sum(axis=1, keepdims=True).clip(1)
        assert -(counts * np.log(share.clip(1e-12))).sum() / counts.sum() == pytest.approx(entropy, abs=0.006)


def test_the_entropy_of_a_window_counts_the_tokens_that_each_target_knows():
    manifest = {"entropies_by_context_nats": [3.0, 2.0, 1.0]}
    assert window_entropy_nats(manifest, 1) == 2.0
    assert window_entropy_nats(manifest, 4) == pytest.approx((2 + 1 + 1 + 1) / 4)
    assert window_entropy_nats({"entropies_by_context_nats": [1.5]}, 8) == pytest.approx(1.5)
    assert window_entropy_nats({}, 8) is None


@pytest.mark.parametrize("order, vocab_size", [(1, 20), (2, 6), (3, 4)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_markov_stream_has_the_entropy_it_claims(order, vocab_size, split):
    source = MarkovConfig(
        order=order, vocab_size=vocab_size, n_tokens=400_000, n_validation_tokens=400_000, concentration=0.5
    )
    tokens = source.tokens(split)
    window = sum(tokens[i : len(tokens) - order + i] * vocab_size ** (order - i) for i in range(order + 1))
    counts = np.bincount(window, minlength=vocab_size ** (order + 1)).reshape(-1, vocab_size)
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    empirical = -(counts * np.log(share.clip(1e-12))).sum() / counts.sum()
    assert empirical == pytest.approx(source.entropy_rate_nats(), abs=0.006)
    scored = -np.log(source.table()[np.divmod(window, vocab_size)]).mean()
    assert scored == pytest.approx(source.entropy_rate_nats(), abs=0.006)


def test_train_and_validation_are_different_draws_of_one_source_and_seeds_change_the_source():
    source = MarkovConfig(n_tokens=1000, n_validation_tokens=1000)
    assert not np.array_equal(source.tokens("train"), source.tokens("validation"))
    assert np.array_equal(source.tokens("train"), source.tokens("train"))
    other = MarkovConfig(n_tokens=1000, n_validation_tokens=1000, seed=1)
    assert other.entropy_rate_nats() != source.entropy_rate_nats()


@pytest.mark.parametrize(
    "source, expected",
    [
        (NoiseConfig(vocab_size=50), math.log(50)),
        (NoiseConfig(vocab_size=3, distribution="zipf"), -sum(p * math.log(p) for p in (6 / 11, 3 / 11, 2 / 11))),
        (NoiseConfig(vocab_size=4, distribution="explicit", probabilities=[2.0, 1.0, 1.0, 0.0]), 1.5 * math.log(2)),
    ],
)
def test_noise_has_the_entropy_of_its_distribution(source, expected):
    assert source.entropy_rate_nats() == pytest.approx(expected, abs=1e-12)
    share = np.bincount(source.tokens("train"), minlength=source.vocab_size) / source.n_tokens
    assert share == pytest.approx(source.symbol_probabilities(), abs=2e-3)


def test_copy_repeats_each_random_string_and_only_its_first_half_is_uncertain():
    source = CopyConfig(vocab_size=8, length=5, n_tokens=100_003, n_validation_tokens=1000)
    documents = source.tokens("train").reshape(-1, 10)
    assert documents.size == 100_000 and source.n_documents(documents.size) == 10_000
    assert np.array_equal(documents[:, :5], documents[:, 5:])
    share = np.bincount(documents[:, :5].ravel(), minlength=8) / 50_000
    assert share == pytest.approx(np.full(8, 1 / 8), abs=0.01)
    assert source.entropy_rate_nats() == pytest.approx(0.5 * math.log(8))


@pytest.mark.parametrize("kind", ["markov", "noise", "copy"])
def test_the_manifest_holds_the_exact_entropy_and_ignores_the_tokenizer(kind, prepared, tmp_path):
    from scaling_testbed.data.preparing.preparation import folder_name
    from scaling_testbed.data.tokenizers import BpeConfig

    source = SOURCES[kind](n_tokens=20_000, n_validation_tokens=5_000)
    data = prepared(source)
    assert data.manifest["entropy_rate_nats"] == source.entropy_rate_nats()
    assert data.manifest["eos_id"] is None and data.tokenizer_fingerprint is None and data.train.n_bytes is None
    assert data.vocab_size == source.vocab_size
    for split in ("train", "validation"):
        stream = getattr(data, split)
        assert np.array_equal(stream.read(0, stream.n_tokens), source.tokens(split))
    assert folder_name(source, BpeConfig()) == folder_name(source, None) == data.folder.name


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: MarkovConfig(order=0), "order"),
        (lambda: MarkovConfig(order=5, vocab_size=64), "order"),
        (lambda: MarkovConfig(concentration=0.0), "concentration"),
        (lambda: NoiseConfig(distribution="normal"), "distribution"),
        (lambda: NoiseConfig(distribution="explicit"), "probabilities"),
        (lambda: NoiseConfig(vocab_size=2, distribution="explicit", probabilities=[1.0, -1.0]), "probabilities"),
        (lambda: NoiseConfig(vocab_size=2, distribution="explicit", probabilities=[1.0, math.inf]), "probabilities"),
        (lambda: NoiseConfig(vocab_size=2, distribution="explicit", probabilities=[1e308, 1e308]), "probabilities"),
        (lambda: NoiseConfig(distribution="zipf", exponent=math.nan), "exponent"),
        (lambda: NoiseConfig(distribution="zipf", exponent=-math.inf), "exponent"),
        (lambda: NoiseConfig(distribution="zipf", exponent=-1000.0), "exponent"),
        (lambda: NoiseConfig(vocab_size=1 << 25), "vocab_size"),
        (lambda: MarkovConfig(n_tokens=10**15), "n_tokens"),
        (lambda: CopyConfig(n_validation_tokens=10**15), "n_validation_tokens"),
        (lambda: CopyConfig(length=1_000_000), "length"),
        (lambda: CopyConfig(vocab_size=1), "vocab_size"),
        (lambda: CopyConfig(n_tokens=0), "n_tokens"),
    ],
)
def test_a_value_that_makes_no_source_is_refused_by_its_field(make, field):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        make()
