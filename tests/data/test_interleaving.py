"""The source of each row is a function of its number alone: counted in closed form or row by row, it is the same."""

import random
from itertools import pairwise

import numpy as np
import pytest

from scaling_testbed.data.interleaving import Interleaving

MIXTURES = {
    "two": [(0, {"a": 0.7, "b": 0.3})],
    "two of hundred": [(0, {"a": 99, "b": 1})],
    "three": [(0, {"a": 1, "b": 1, "c": 1})],
    "many": [(0, {f"s{i}": 1 / (i + 1) ** 2 for i in range(9)})],
    "changing": [(0, {"a": 0.9, "b": 0.1, "c": 0}), (50, {"a": 0, "b": 3, "c": 1}), (51, {"a": 1, "b": 1, "c": 1})],
    "one": [(0, {"a": 2})],
}


def sources_by_row(mixture, rows, step):
    """The source of each row, asked for in pieces of a step, each of which has its numbers in order."""
    found, numbers = [], {}
    for first in range(0, rows, step):
        here = [None] * step
        for name, (number, at_N) in mixture.parted(first, step).items():
            assert number == numbers.get(name, 0)
            numbers[name] = number + len(at_N)
            for place in at_N.tolist():
                assert here[place] is None
                here[place] = name
        found += here
    return found


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES)
def test_counts_in_closed_form_are_those_of_thousands_of_rows(weights):
    mixture = Interleaving(weights, 8)
    sources = sources_by_row(mixture, 4000, 8)
    counted = dict.fromkeys(mixture.names, 0)
    for row, name in enumerate(sources):
        assert mixture.counts(row) == counted
        counted[name] += 1


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES)
def test_a_part_of_a_batch_has_the_rows_of_the_whole_batch(weights):
    mixture = Interleaving(weights, 8)
    whole = sources_by_row(mixture, 800, 8)
    for row in (0, 5, 398, 400, 407, 408, 799):
        ((name, _),) = mixture.parted(row, 1).items()
        assert name == whole[row]


@pytest.mark.parametrize(("sources", "most"), [(2, 0.5), (3, 1), (4, 2), (12, 2)])
def test_no_count_strays_from_the_weights(sources, most):
    chance = random.Random(sources)
    for _ in range(30):
        weights = {f"s{i}": chance.random() ** chance.choice([1, 5]) + 1e-3 for i in range(sources)}
        mixture, total = Interleaving([(0, weights)], 1), sum(weights.values())
        for rows in (*range(50), *chance.sample(range(10**9), 50)):
            counts = mixture.counts(rows)
            assert sum(counts.values()) == rows
            assert max(abs(counts[name] - rows * weights[name] / total) for name in weights) < most + 1e-6


def test_weights_that_change_hold_from_their_step_on():
    mixture = Interleaving(MIXTURES["changing"], 8)
    per_step = [mixture.counts(8 * step) for step in range(3052)]
    steps = [{name: b[name] - a[name] for name in a} for a, b in pairwise(per_step)]
    assert all(step["c"] == 0 for step in steps[:50]) and steps[50]["a"] == 0 and steps[50]["b"] == 6
    assert np.allclose([per_step[-1][name] - per_step[51][name] for name in "abc"], 8000, atol=1)
