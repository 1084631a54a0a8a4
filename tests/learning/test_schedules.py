"""Schedules are pure functions of the step, with the shapes their names promise."""

import math

import pytest

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.schedules import SCHEDULES, CosineConfig, WarmupStableDecayConfig

PEAK, STEPS = 1e-2, 1000


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step(name):
    schedule = SCHEDULES[name](warmup=100)
    assert schedule.lr(0, STEPS, PEAK) == pytest.approx(PEAK / 100)
    assert schedule.lr(49, STEPS, PEAK) == pytest.approx(PEAK / 2)
    assert schedule.lr(99, STEPS, PEAK) == pytest.approx(PEAK)
    assert max(schedule.lr(step, STEPS, PEAK) for step in range(STEPS)) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_as_a_fraction_equals_the_same_number_of_steps(name):
    fraction, steps = SCHEDULES[name](warmup=0.05), SCHEDULES[name](warmup=50)
    assert [fraction.lr(i, STEPS, PEAK) for i in range(STEPS)] == [steps.lr(i, STEPS, PEAK) for i in range(STEPS)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_in_tokens_equals_the_same_number_of_steps_whatever_the_other_key_says(name):
    tokens, steps = SCHEDULES[name](warmup=0.5, warmup_tokens=12_900), SCHEDULES[name](warmup=50)
    assert [tokens.lr(i, STEPS, PEAK, 256) for i in range(STEPS)] == [steps.lr(i, STEPS, PEAK) for i in range(STEPS)]
    assert SCHEDULES[name](warmup_tokens=10).warmup_steps(STEPS, 256) == 1
    with pytest.raises(ValueError, match="warmup_tokens needs the tokens of a step"):
        tokens.lr(0, STEPS, PEAK)
    with pytest.raises(ConfigError, match="warmup_tokens"):
        SCHEDULES[name](warmup_tokens=-1)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_last_update_uses_the_absolute_floor_whatever_the_peak(name):
    for peak in (3e-4, 1e-2, 3e-1):
        assert SCHEDULES[name](min_lr=1e-5).lr(STEPS - 1, STEPS, peak) == pytest.approx(1e-5)


def test_a_floor_above_the_peak_never_raises_the_rate():
    rates = [CosineConfig(min_lr=1e-2).lr(step, STEPS, 1e-4) for step in range(STEPS)]
    assert max(rates) <= 1e-4


def test_cosine_is_half_way_between_peak_and_floor_in_the_middle():
    schedule = CosineConfig(warmup=200, min_lr=1e-3)
    assert schedule.lr(599, STEPS, PEAK) == pytest.approx((PEAK + 1e-3) / 2)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_stays_at_the_peak_and_decays_over_the_last_fraction(shape, middle):
    schedule = WarmupStableDecayConfig(warmup=100, decay_fraction=0.2, decay_shape=shape, min_lr=0.0)
    assert all(schedule.lr(step, STEPS, PEAK) == PEAK for step in range(99, 800))
    assert schedule.lr(899, STEPS, PEAK) == pytest.approx(PEAK * middle)


def test_inverse_sqrt_halves_when_the_steps_quadruple():
    schedule = SCHEDULES["inverse_sqrt"](warmup=100, min_lr=0.0)
    assert schedule.lr(399, STEPS, PEAK) == pytest.approx(PEAK / 2)


def test_a_schedule_longer_than_the_run_is_the_same_at_every_step_of_the_short_run():
    long, short = CosineConfig(warmup=50), CosineConfig(warmup=50, steps=STEPS)
    assert [short.lr(step, 100, PEAK) for step in range(100)] == [long.lr(step, STEPS, PEAK) for step in range(100)]


def test_impossible_warmups_are_refused():
    for warmup in (-1, 1.5):
        with pytest.raises(ConfigError, match="warmup"):
            CosineConfig(warmup=warmup)
