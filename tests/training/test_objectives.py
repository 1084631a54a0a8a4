"""The seam of objectives in a run: what a step minimises, what it is given beside the tokens, and what is recorded."""

import dataclasses

import numpy as np
import pytest
import torch

from scaling_testbed.config.compose import compose
from scaling_testbed.config.compute import training_flops
from scaling_testbed.data.batches import ONLY, TrainingBatches
from scaling_testbed.data.cutting import Cutting
from scaling_testbed.data.shards import TokenStream
from scaling_testbed.learning.objectives import Built, CrossEntropyObjective, Weighted
from tests.training.conftest import TINY, metrics
from tests.training.test_run import assert_same_weights

REFERENCE = "loss.impl=reference"


class Numbered:
    """Each sequence has the number of its source and its own number beside it."""

    def of(self, source, numbers):
        return {"number": numbers, "source": np.full(len(numbers), hash_of(source), dtype=np.int32)}


def hash_of(source):
    return sum(source.encode())


def objective(monkeypatch, terms, beside=None):
    """Let plain cross-entropy be another objective in this test."""
    monkeypatch.setattr(CrossEntropyObjective, "is_cross_entropy", False)
    built = lambda self, surroundings: Built(terms=terms, beside=beside, row={"mark": 7})  # noqa: E731
    monkeypatch.setattr(CrossEntropyObjective, "build", built)


def test_weights_of_one_are_the_cross_entropy_bit_for_bit_and_the_objective_is_recorded(trained, monkeypatch):
    row, plain = trained(REFERENCE)
    assert not any("train_objective" in line for line in metrics(plain))
    objective(monkeypatch, lambda given: given.cross_entropy(torch.ones_like(given.targets_BT, dtype=torch.float32)))
    weighted, folder = trained(REFERENCE, runs="weighted")
    assert_same_weights(plain, folder)
    assert weighted["val_loss"] == row["val_loss"] and weighted["mark"] == 7 and weighted["ce_scaled"] > 0
    lines = [line for line in metrics(folder) if "train_loss" in line]
    assert len(lines) == 12 and all(line["train_objective"] == pytest.approx(line["train_loss"]) for line in lines)


def test_a_weight_changes_what_is_minimised_and_not_the_cross_entropy_beside_it(trained, monkeypatch):
    _, plain = trained(REFERENCE)
    halves = lambda given: given.cross_entropy(torch.full_like(given.targets_BT, 0.5, dtype=torch.float32))  # noqa: E731
    objective(monkeypatch, halves)
    _, folder = trained(REFERENCE, "optimizer.clip_norm=null", runs="halves")
    first, of_plain = (next(line for line in metrics(where) if line["step"] == 1) for where in (folder, plain))
    assert first["train_loss"] == of_plain["train_loss"]
    assert first["train_objective"] == pytest.approx(first["train_loss"] / 2)
    assert first["grad_norm"] < 0.6 * of_plain["grad_norm"]


@pytest.mark.parametrize("more", [("batch.micro_batch_sequences=2",), ("parallelism=ddp",), ("parallelism=fsdp",)])
def test_arrays_beside_the_tokens_stay_beside_their_sequences(trained, monkeypatch, more):
    seen = []

    def terms(given):
        seen.append((given.tokens_BS.clone(), given.beside["number"].clone()))
        return given.cross_entropy()

    objective(monkeypatch, terms, Numbered())
    trained(*more)
    tokens = {}
    for tokens_BS, number_B in seen:
        assert tokens_BS.shape[0] == (2 if "micro" in more[0] else 8)
        for row, number in zip(tokens_BS, number_B.tolist(), strict=True):
            assert torch.equal(tokens.setdefault(number, row), row)
    assert len(tokens) == 8 * 12
    some = sorted(tokens)
    neighbours = [(a, b) for a, b in zip(some, some[1:], strict=False) if b == a + 1]
    assert neighbours and all(tokens[a][-1] == tokens[b][0] for a, b in neighbours)  # windows share a token


def test_in_a_mixture_each_row_has_what_its_own_source_has_beside_it():
    streams = {
        name: TokenStream(name, [np.arange(first, first + 1000, dtype=np.int64)])
        for name, first in {"a": 0, "b": 5000, "c": 9000}.items()
    }
    batches = TrainingBatches(
        streams,
        sequence_length=10,
        sequences=7,
        seed=3,
        weights=[(0, {"a": 0.5, "b": 0.3, "c": 0.2})],
        cutting=Cutting(),
    )
    batches.lay_beside(Numbered())
    first = {"a": 0, "b": 5000, "c": 9000}
    for step in range(20):
        batch = batches.batch(step)
        name = {hash_of(name): name for name in first}
        starts = [
            first[name[s]] + 10 * n for s, n in zip(*(batch.beside[k] for k in ("source", "number")), strict=True)
        ]
        assert batch.tokens_BS[:, 0].tolist() == starts
        parts = [batches.batch(step, rank, 7) for rank in range(7)]
        assert [int(part.beside["number"][0]) for part in parts] == batch.beside["number"].tolist()
        halves = batch.map(torch.from_numpy).split(4)
        assert torch.cat([half.beside["number"] for half in halves]).tolist() == batch.beside["number"].tolist()
    alone = TrainingBatches(streams["a"], sequence_length=10, sequences=7, seed=3)
    alone.lay_beside(Numbered())
    assert alone.batch(0).beside["source"].tolist() == [hash_of(ONLY)] * 7


def test_the_flops_of_an_objective_count(monkeypatch):
    run = compose(TINY)
    model = run.model.resolved(16)
    plain = training_flops(run, model, 12, 12)
    monkeypatch.setattr(CrossEntropyObjective, "flops_per_token", lambda self, model, length: 1000)
    assert training_flops(run, model, 12, 12) == plain + 12 * 8 * 16 * 1000


def test_weighted_objectives_pay_one_more_pass_through_the_head():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice(Weighted):
        def weights(self, ce_BT, valid_BT):
            return torch.full_like(ce_BT, 2.0)

    model = compose(TINY).model.resolved(16)
    assert Twice().flops_per_token(model, 16) == 2 * 16 * model.d_model
    assert Twice().value(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)) == 12
