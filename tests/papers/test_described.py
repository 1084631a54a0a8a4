"""The line that tells how a judge judges."""

import functools
import re
from dataclasses import dataclass, replace

import pytest

from scaling_testbed.analysis.curves.instability import Quantity
from scaling_testbed.papers import combinators as by
from scaling_testbed.papers import law_claims, lines, predictions
from scaling_testbed.papers import measures as of
from scaling_testbed.papers.described import described
from scaling_testbed.papers.effects import AT_MOST, EQUALITY, Question
from scaling_testbed.papers.paper import PAPERS, paper_named, records_of

EXPERIMENTS = {
    f"{paper.name}/{one.name}": one for paper in map(paper_named, PAPERS) for one in paper.experiments if one.claims
}
KEY = "model.qk_norm"
QUESTION = Question("the gain", "loss", lambda evidence: None, margin=0.1, limit=0.2)
LAW = law_claims.LawQuestion("the error", lambda evidence: [], margin=0.1, limit=0.2)
HARMED = by.HarmedPastThreshold(Quantity())
ERROR = predictions.error_at(predictions.LARGEST_SIZE)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_claim_is_told_in_one_line_that_no_other_claim_of_its_experiment_has(name):
    said = [one["judged"] for one in records_of(EXPERIMENTS[name])]
    assert len(set(said)) == len(said)
    for claim, line in zip(EXPERIMENTS[name].claims, said, strict=True):
        assert claim.estimand in line and not re.search(r"0x[0-9a-f]|[<>\n]", line)


def test_the_line_has_the_estimand_the_runs_the_kind_and_the_margin():
    def told(*more, **options):
        return described(by.compare(of.LOSS, KEY, "layernorm", "none", *more, **options))

    estimand = "loss with qk-norm none less with layernorm, mean over sizes and rates"
    assert told() == f"{estimand}; by model.qk_norm; difference; the declared margin of loss"
    assert told({"scan": "width"}, margin=0.25, contrary=True) == (
        f"{estimand}; by model.qk_norm, where scan=width; at most; margin 0.25 nats"
    )
    assert told(margin=0.0) == f"{estimand}; by model.qk_norm; difference; without a margin"
    assert described(lines.along(of.S, "N", lines.STEADY, factor=2)).endswith("; equality; margin 0.6931471806 nats")
    line = described(by.compare(of.measured_as(Quantity()), KEY, 0, 1, factor=9))
    assert line.endswith("; difference (of logarithms); margin a factor of 9")
    assert described(law_claims.within(ERROR, 0.0075, 100)) == (
        "number, which must be at most 0.0075; error_at(which=the largest size, column=loss, data=null, "
        "calibrated=true); an error counts from 100 times the compute on; difference; without a margin; at most 0.0075"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((QUESTION, replace(QUESTION, **{key: value})) for key, value in {
            "estimand": "the loss", "scope": "of few", "kind": EQUALITY, "margin": 0.1000001, "ratio": True,
            "limit": 0.2000001, "side": -1,
        }.items()),
        *((LAW, replace(LAW, **{key: value})) for key, value in {
            "estimand": "the loss", "scope": "of few", "kind": AT_MOST, "margin": 0.1000001, "ratio": True,
            "limit": 0.2000001, "side": -1,
        }.items()),
        (replace(QUESTION, margin=None), replace(QUESTION, margin=None, measure="S")),
        (replace(QUESTION, margin=None), replace(QUESTION, margin=0.0)),
        (HARMED, replace(HARMED, share=0.904)),
        (HARMED, replace(HARMED, where={KEY: "none"})),
        (HARMED, replace(HARMED, quantity=Quantity(above=False))),
        (by.compare(of.S, "a.b", 0, 1), by.compare(of.S, "c.b", 0, 1)),
        (by.compare(of.S, KEY, 0, (1, 2)), by.compare(of.S, KEY, 0, by.Each((1, 2)))),
        (by.compare(of.S, KEY, 0, 1), by.compare(of.S, KEY, 0, 1, {"scan": "width"})),
        (by.positive(of.S), by.positive(of.S, below=True)),
        (by.positive(of.S), by.positive(of.S, {"scan": "width"})),
        (by.opposite_at_ends(of.S, "a.b", 0, 1), by.opposite_at_ends(of.S, "c.b", 0, 1)),
        (by.coincide_below_best("a.b", 0, 1), by.coincide_below_best("c.b", 0, 1)),
        (by.loss_beside("a.b", {}, 0, 9, above=1), by.loss_beside("a.b", {}, 1, 9, above=1)),
        (by.loss_beside("a.b", {"c": 0}, 0), by.loss_beside("a.b", {"c": 1}, 0)),
        (by.largest_foretold(Quantity()), by.largest_foretold(Quantity(field="diagnostics_last_mean"))),
        (by.smaller_below_eps("a", "b"), by.smaller_below_eps("a", "c")),
        (lines.along(of.S, "N", lines.RISES), lines.along(of.S, "N", lines.RISES, {"scan": "width"})),
        (lines.differ(of.S, lines.TREND, "a.b", 0, 1), lines.differ(of.S, lines.TREND, "c.b", 0, 1)),
        (law_claims.within(ERROR, 0.1), law_claims.within(predictions.ETA, 0.1)),
        (law_claims.within(ERROR, 0.1), law_claims.within(predictions.error_at(predictions.LARGEST_SIZE, "a"), 0.1)),
        (law_claims.within(ERROR, 0.1), law_claims.within(ERROR, 0.1, reach=2)),
        (law_claims.near(ERROR, 0.1), law_claims.near(predictions.ETA, 0.1)),
        (law_claims.same_over(ERROR), law_claims.same_over(predictions.ETA)),
        (law_claims.less(ERROR, predictions.ETA), law_claims.less(ERROR, predictions.EXPONENT_SPREAD)),
    ],
)  # fmt: skip
def test_judges_that_judge_otherwise_are_told_otherwise(one, other):
    assert described(one) != described(other)


def own(evidence):
    return None


def limited(limit):
    def judge(evidence):
        return limit, judge

    return judge


@dataclass(frozen=True)
class Limited:
    limit: float
    judge: object = own

    def __call__(self, evidence):
        return None


class Stranger:
    def __init__(self, limit):
        self.limit, self.me = limit, self

    def __call__(self, evidence):
        return None


class Speaks(Stranger):
    described = "in its\nown words"


@pytest.mark.parametrize(
    ("judge", "line"),
    [
        (own, "own"),
        (limited(0.5), "limited.judge(limit=0.5)"),
        (lambda evidence: None, "a function without a name"),
        (functools.partial(own, 3, limit=0.5), "own(0=3, limit=0.5)"),
        (Limited(0.5), "Limited(limit=0.5, judge=own)"),
        (Stranger((1, 2)), "Stranger(limit=1/2)"),
        (Stranger(1).__call__, "Stranger.__call__"),
        (Speaks(1), "in its own words"),
    ],
)
def test_a_judge_of_a_stranger_is_told_by_its_name_and_plain_values(judge, line):
    assert described(judge) == line
