"""The claims about E are judged by fits whose true E is planted."""

from types import SimpleNamespace

import pytest

from scaling_testbed.errors import UserError
from scaling_testbed.papers import entropies
from scaling_testbed.papers.over_training import PAPER

TRUE = {(1, 16): 1.7, (3, 8): 1.25}


def evidence(true=TRUE, misfit=0.0, **changed):
    """Runs whose loss follows a law with E = true. misfit: what is added to the loss of the smallest size."""
    rows = [
        {
            **{"status": "finished", "data.order": order, "data.vocab_size": symbols},
            **{"n_params": n, "n_tokens": n * m, "flops": 6 * n * n * m, "unigram_entropy_nats": 2.7},
            "entropy_window_nats": true[order, symbols],
            "val_loss": true[order, symbols] + 30 / n**0.5 + 30 / (n * m) ** 0.5 + misfit * (n == 7e3),
            **changed,
        }
        for order, symbols in true
        for n in (7e3, 1.3e4, 2.6e4, 5.7e4, 1e5)
        for m in (80, 160, 320)
    ]
    return SimpleNamespace(study=SimpleNamespace(rows=rows))


@pytest.mark.parametrize("law", ["chinchilla", "over_training"])
def test_a_planted_e_is_found(law):
    first, second = entropies.off(law)(evidence())
    assert first.number < 1e-4 and second.number < 1e-4
    assert first.words.startswith("order 1, 16 symbols: E 1.7000") and "true 1.2500" in second.words


def test_a_wrong_truth_is_seen_and_no_interval_holds_it():
    there = evidence()
    for row in there.study.rows:
        row["entropy_window_nats"] *= 1.3  # above the losses
    assert entropies.off("chinchilla")(there)[0].number == pytest.approx(1 - 1 / 1.3, abs=1e-3)
    (share,) = entropies.missed()(there)
    (none,) = entropies.missed()(evidence())
    assert share.number == 1 and none.number == 0 and none.words.startswith("6 of 6 intervals hold E")
    assert share.words.count("true 2.2100") == share.words.count("true 1.6250") == 3


def test_runs_that_have_not_learned_are_left_out_and_all_runs_are_not():
    there = evidence(misfit=0.8)
    (source, _) = entropies.sources(there.study.rows)
    assert (
        len(source.rows) == 15
        and len(source.learned) == 12
        and {row["n_params"] for row in source.learned} == {1.3e4, 2.6e4, 5.7e4, 1e5}
    )
    assert [len(rows) for rows in source.parts().values()] == [12, 9, 8]
    learned, every = (entropies.off("over_training", learned=one)(there)[0].number for one in (True, False))
    assert learned < 1e-3 < 0.01 < every


def test_rows_without_their_entropy_are_refused():
    with pytest.raises(UserError, match="do not have one entropy_window_nats"):
        entropies.off("chinchilla")(evidence(entropy_window_nats=None))


def test_the_claims_are_those_of_the_sweep():
    (one,) = [experiment for experiment in PAPER.experiments if experiment.name == "known_entropy"]
    assert len(one.claims) == 4
