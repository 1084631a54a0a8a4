"""Weights that follow from losses: by hand, at their bounds, and refused where they cannot be."""

import math

import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_id
from scaling_testbed.data.online import OnlineRule
from scaling_testbed.errors import ConfigError

FIRST = {"a": 4.0, "b": 2.0}
ROUNDS = [{"a": 9.0, "b": 9.0}, {"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 1.5}]
TWO = "data.sources={a:{name:markov},b:{name:noise}}"
TEXT = "data.sources={a:{name:sympy},b:{name:noise}}"


def softmax(*logits):
    parts = [math.exp(logit) for logit in logits]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({"score": "raw", "window": 2}, (5.0, 2.5)),
        ({"score": "raw", "window": 9}, (14.0, 11.5)),
        ({"score": "raw", "window": 1}, (2.0, 1.5)),
        ({"score": "excess", "window": 2}, (5.0 - 2 * 1.5, 2.5 - 2 * 0.25)),
        ({"score": "ratio_to_initial", "window": 2}, (5.0 / 4, 2.5 / 2)),
    ],
)
def test_weights_are_a_softmax_of_the_summed_scores_above_a_floor(options, scores):
    rule = OnlineRule(every_steps=1, eta=0.3, floor=0.1, **options)
    found = rule.weights(FIRST, ROUNDS, {"a": 1.5, "b": 0.25})
    expected = [0.1 + 0.8 * part for part in softmax(*(0.3 * score for score in scores))]
    assert [found["a"], found["b"]] == pytest.approx(expected, abs=1e-6)
    assert all(weight == round(weight, 6) for weight in found.values())


def test_a_matrix_weights_a_source_by_the_losses_on_others():
    rule = OnlineRule(every_steps=1, eta=0.3, floor=0.0, window=1, score="raw", matrix={"a": {"a": 1, "b": 2}})
    found = rule.weights(FIRST, ROUNDS, {})
    assert [found["a"], found["b"]] == pytest.approx(softmax(0.3 * (2.0 + 2 * 1.5), 0.0), abs=1e-6)


def test_large_scores_give_the_largest_share_and_a_loss_that_is_not_finite_none():
    rule = OnlineRule(every_steps=1, eta=1e6, floor=0.05, score="raw")
    assert rule.weights(FIRST, ROUNDS, {}) == {"a": 0.95, "b": 0.05}
    assert rule.largest_share(2) == 0.95 and rule.largest_share(4) == pytest.approx(0.85)
    assert rule.weights(FIRST, [{"a": math.nan, "b": 1.0}], {}) is None
    assert rule.weights(FIRST, [{"a": 1.0, "b": math.inf}], {}) is None


def test_the_weights_change_at_multiples():
    assert [OnlineRule(every_steps=10).next_change(step) for step in (0, 9, 10, 95)] == [10, 10, 20, 100]


def composed(*words):
    (run,) = compose_many([["data=mixture", *words]])
    return run


def test_the_rule_is_part_of_the_run_and_not_of_the_data():
    plain, online = composed(TWO), composed(TWO, "data.online.every_steps=9")
    assert run_id(plain) != run_id(online) != run_id(composed(TWO, "data.online={every_steps:9,eta:2}"))
    assert plain.data.identity() == online.data.identity() and plain.data.online_rule is None
    assert online.data.online_rule == OnlineRule(every_steps=9)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([TWO, "data.online={eta:1}"], "data.online needs every_steps"),
        ([TWO, "data.online={every_step:1}"], "data.online has no key every_step; it has every_steps, eta"),
        ([TWO, "data.online={every_steps:0}"], "data.online.every_steps must be a whole number from 1 up, got 0"),
        ([TWO, "data.online={every_steps:9,window:1.5}"], "data.online.window must be a whole number"),
        ([TWO, "data.online={every_steps:9,eta:-1}"], "data.online.eta must be a number that is at least 0, got -1"),
        ([TWO, "data.online={every_steps:9,eta:x}"], "data.online.eta must be a number"),
        (
            [TWO, "data.online={every_steps:9,floor:.5}"],
            "data.online.floor must be a number that is at least 0 and below",
        ),
        (
            [TWO, "data.online={every_steps:9,score:loss}"],
            "data.online.score must be one of raw, excess, ratio_to_initial",
        ),
        ([TWO, "data.online={every_steps:9,over:{c:1}}"], "data.online.over.c is no source; data.sources has a, b"),
        ([TWO, "data.online={every_steps:9,over:{a:[1]}}"], "data.online.over.a must be entropy, a loss in nats"),
        ([TWO, "data.online={every_steps:9,score:raw,over:{a:1}}"], "data.online.over is for data.online.score=excess"),
        (
            [TEXT, "data.online={every_steps:9}"],
            "data.online.score=excess needs data.online.over.a, because the entropy",
        ),
        ([TEXT, "data.online={every_steps:9,over:{a:entropy}}"], "type data.online.over.a=RUN"),
        ([TWO, "data.online={every_steps:9,matrix:{c:{a:1}}}"], "data.online.matrix.c is no source"),
        ([TWO, "data.online={every_steps:9,matrix:{a:{c:1}}}"], "data.online.matrix.a.c is no source"),
        ([TWO, "data.online={every_steps:9,matrix:{a:{b:x}}}"], "data.online.matrix.a.b must be a number"),
        ([TWO, "data.online={every_steps:9,matrix:{a:3}}"], "data.online.matrix must be {SOURCE: {SOURCE: NUMBER}}"),
        (["data.sources={a:{name:noise}}", "data.online={every_steps:9}"], "data.online needs two sources or more"),
        (
            [TWO, "data.online={every_steps:9}", "data.weight_changes=[{step:9,weights:{a:1,b:2}}]"],
            "data.weight_changes cannot be with data.online",
        ),
        ([TWO, "data.online={every_steps:9}", "data.weights={a:1,b:0}"], "data.weights.b=0 cannot be with data.online"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_name(words, says):
    with pytest.raises(ConfigError) as refused:
        composed(*words)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_loss_in_place_of_the_entropy_may_be_typed():
    assert composed(TEXT, "data.online={every_steps:9,over:{a:1.25}}").data.online_rule.over == {"a": 1.25}
