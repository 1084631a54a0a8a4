"""Comparisons find planted differences, and none where there is none, as often as they say."""

import numpy as np
import pytest

from scaling_testbed.evaluation.statistics import holm, paired_difference


def losses(rng, n_seeds, n_documents, shift=0.0, seeds=0.0, noise=0.1, hard=None):
    """Documents differ much, seeds by `seeds`, and what is left by `noise`."""
    hard = rng.normal(3, 1, n_documents) if hard is None else hard
    return hard + shift + rng.normal(0, seeds, (n_seeds, 1)) + rng.normal(0, noise, (n_seeds, n_documents)), hard


def test_pairing_sees_what_documents_hide():
    """Documents spread by 1 nat: unpaired, 0.05 on 300 of them would be lost in an error of 0.08."""
    rng = np.random.default_rng(0)
    a, hard = losses(rng, 1, 300, shift=0.05)
    b, _ = losses(rng, 1, 300, hard=hard)
    found = paired_difference(a, b, resamples=2000)
    assert found.low > 0 and found.p_value < 0.01 and found.mean == pytest.approx(0.05, abs=0.03)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    other = paired_difference(b, a, resamples=2000)
    assert other.mean == -found.mean and other.high < 0


@pytest.mark.parametrize("seeds", [0.0, 0.1])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    """Of 100 comparisons of equal models, with seeds that differ and with such that do not."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        a, hard = losses(rng, 8, 100, seeds=seeds)
        b, _ = losses(rng, 8, 100, seeds=seeds, hard=hard)
        found = paired_difference(a, b, resamples=300)
        inside += found.low <= 0 <= found.high
    assert 85 <= inside <= 100


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(2)
    a, hard = losses(rng, 5, 2000, seeds=0.2)
    b, _ = losses(rng, 5, 2000, seeds=0.2, hard=hard)
    by_seed, alone = paired_difference(a, b, resamples=500), paired_difference(a[:1], b[:1], resamples=500)
    assert by_seed.high - by_seed.low > 3 * (alone.high - alone.low)


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="the same ones"):
        paired_difference(np.zeros((2, 5)), np.zeros((2, 6)))


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.02]) == [0.02]
