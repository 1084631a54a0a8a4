"""Which updates are left out."""

import json
import random
import statistics

import pytest

from scaling_testbed.learning.interventions.base import Context
from scaling_testbed.learning.interventions.spikes import SpikeFilter


def filled(sigmas=3.0, window=8, pairs=None):
    spikes = SpikeFilter(sigmas, window)
    for pair in pairs or [(2.0 + 0.1 * (-1) ** n, 1.0 + 0.2 * (-1) ** n) for n in range(window)]:
        spikes.allows(*pair)
        spikes.after_update(True)
    return spikes


def step(spikes, *pair):
    """Whether the filter lets a step be made, which then is or is not."""
    allowed = spikes.allows(*pair)
    spikes.after_update(allowed)
    return allowed


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_or_a_gradient_norm_above_the_threshold_is_a_spike_and_one_below_is_none(which):
    spikes = filled()
    past = list(zip(*spikes.made, strict=True))[which]
    threshold = statistics.fmean(past) + 3.0 * statistics.stdev(past)
    pair = [2.0, 1.0]
    for value, expected in ((threshold * 1.001, True), (threshold * 0.999, False), (-100.0, False)):
        pair[which] = value
        assert spikes.is_spike(*pair) == expected


def test_nothing_is_skipped_before_half_a_window_of_updates():
    pairs = [(2.0, 1.0), (2.1, 1.1), (1.9, 0.9), (2.0, 1.0)]
    assert not filled(pairs=pairs[:3]).is_spike(1e6, 1e6)
    assert filled(pairs=pairs).is_spike(1e6, 1e6)


def test_the_window_holds_the_last_updates_that_were_made_and_no_skipped_one():
    spikes = filled(window=4, pairs=[(100.0, 100.0)] * 4 + [(2.0, 1.0), (2.1, 1.1), (1.9, 0.9), (2.0, 1.0)])
    assert spikes.is_spike(10.0, 1.0)  # the hundreds are gone
    assert not any(step(spikes, 10.0, 1.0) for _ in range(9))
    assert spikes.is_spike(10.0, 1.0) and spikes.row() == {"skipped_steps": 9} and len(spikes.made) == 4


def test_an_update_that_something_else_left_out_is_neither_in_the_window_nor_counted():
    spikes = filled()
    before = spikes.state()
    assert spikes.allows(2.0, 1.0)
    spikes.after_update(False)
    assert spikes.state() == before


def test_a_spike_on_any_process_is_one_on_all():
    spikes = filled()
    context = dict.fromkeys(("model", "optimizer", "sum"))
    spikes.attach(Context(**context, largest=lambda values: [max(value, True) for value in values]))
    assert not step(spikes, 2.0, 1.0) and spikes.skipped == 1


def test_its_state_goes_on_with_the_same_decisions_through_json():
    drawn = random.Random(0)
    whole, decisions = SpikeFilter(1.0, 16), [[], []]
    for at in range(60):
        pair = drawn.gauss(2, 0.3), drawn.gauss(1, 0.3)
        if at == 30:
            resumed = SpikeFilter(1.0, 16)
            resumed.restore(json.loads(json.dumps(whole.state())))
        for number, spikes in enumerate([whole] if at < 30 else [whole, resumed]):
            skipped = not step(spikes, *pair)
            decisions[number] += [skipped] if at >= 30 else []
    assert decisions[0] == decisions[1] and 0 < sum(decisions[0]) < 30
    assert whole.state() == resumed.state()
