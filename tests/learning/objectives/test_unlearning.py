"""The objectives of unlearning against autograd of the papers' formulas, document by document, in fp64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.config.compose import compose
from scaling_testbed.data.cutting import Batch
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.objectives import Given, Stream, Surroundings
from scaling_testbed.learning.objectives.ascent import Ascent
from scaling_testbed.learning.objectives.flat_tv import FlatTV
from scaling_testbed.learning.objectives.npo import NPO
from scaling_testbed.learning.objectives.unlearning import documents_of

T, D, V = 6, 5, 7
LOSS = CrossEntropyConfig(z_loss=0.0, impl="reference")
# The begins of the documents of each position, and whether it has a target, of the sequences of two sources.
BEGINS = {"bad": [[0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 0, 5], [0] * 6], "good": [[0, 0, 2, 2, 2, 2], [0] * 6]}
VALID = {
    "bad": [[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
    "good": [[1, 1, 0, 1, 1, 1], [0] + [1] * 5],
}
TARGETS = {name: sum(map(sum, rows)) / len(rows) for name, rows in VALID.items()} | {"text": 6.0}
DOCUMENTS = {"bad": 4 / 3, "good": 3 / 2}  # with a target, in a sequence: padding has none
ROWS = {"bad": 3.0, "good": 2.0, "text": 2.0}  # of a batch


class Sequences:
    """The sequences of a source, as a Cut gives them."""

    def __init__(self, name):
        self.name, self.number, self.length = name, len(BEGINS[name]), T

    def batch(self, numbers):
        begins_BT = np.array(BEGINS[self.name], dtype=np.int32)[numbers]
        targets_BT = np.where(np.array(VALID[self.name], dtype=bool)[numbers], 1, -100)
        return Batch(
            tokens_BS=np.ones((len(numbers), T + 1), dtype=np.int64), targets_BT=targets_BT, begins_BT=begins_BT
        )


def surroundings(tmp_path, reference_NT=None, rows=ROWS):
    streams = {
        name: Stream(
            rows=rows[name], targets=TARGETS[name], data_fingerprint="f", documents=lambda name=name: Sequences(name)
        )
        for name in ROWS
    }
    kept = [] if reference_NT is None else [reference_NT.numpy()]
    return Surroundings(
        folder=tmp_path,
        device=torch.device("cpu"),
        precision="fp32",
        on_main=lambda action: action(),
        load_model=lambda path, step: None,
        open_targets=lambda path: None,
        streams=streams,
        start={"run_id": "0" * 12, "step": 3},
        losses_at_start=lambda: lambda batch: kept.pop(),
    )


@pytest.fixture
def batch():
    """Seven rows of three sources, mixed: (names, numbers, tensors of a Given without its beside)."""
    torch.manual_seed(0)
    names, numbers = ["bad", "text", "good", "bad", "good", "text", "bad"], [2, 0, 1, 0, 0, 1, 1]
    valid = [VALID[name][n] if name != "text" else [1] * T for name, n in zip(names, numbers, strict=True)]
    targets_BT = torch.randint(V, (7, T)).where(torch.tensor(valid, dtype=torch.bool), -100)
    hidden_BTD = torch.randn(7, T, D, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    return names, numbers, targets_BT, hidden_BTD, weight_VD


def terms_of(objective, around, batch, parts=((0, 7),)):
    """The sums over the rows of a batch, in these parts, and the gradients."""
    names, numbers, targets_BT, hidden_BTD, weight_VD = batch
    built = objective.build(around)
    rows = [built.beside.of(name, np.array([n])) for name, n in zip(names, numbers, strict=True)]
    beside = {key: torch.from_numpy(np.concatenate([row[key] for row in rows])) for key in rows[0]}
    found = []
    for a, b in parts:
        given = Given(
            tokens_BS=torch.zeros(b - a, T + 1, dtype=torch.int64), targets_BT=targets_BT[a:b], begins_BT=None,
            hidden_BTD=hidden_BTD[a:b], weight_VD=weight_VD, softcap=2.0, loss=LOSS,
            beside={name: array[a:b] for name, array in beside.items()},
        )  # fmt: skip
        found.append(built.terms(given))
    loss = sum(one.loss for one in found)
    return loss, sum(one.objective for one in found), found, torch.autograd.grad(loss, (hidden_BTD, weight_VD))


def losses_by_hand(batch):
    _, _, targets_BT, hidden_BTD, weight_VD = batch
    logits = 2.0 * torch.tanh(hidden_BTD @ weight_VD.T / 2.0)
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape)


def documents_by_hand(batch, wanted):
    """(row, number of its sequence, positions of the targets) of each document of a source."""
    for row, (name, n) in enumerate(zip(batch[0], batch[1], strict=True)):
        if name == wanted:
            for begin in sorted(set(BEGINS[name][n])):
                places = [t for t in range(T) if BEGINS[name][n][t] == begin and VALID[name][n][t]]
                if places:
                    yield row, n, places


def npo_by_hand(ce_BT, batch, reference_NT, beta):
    found = []
    for row, n, places in documents_by_hand(batch, "bad"):
        log_ratio = -(ce_BT[row, places].sum() - reference_NT[n, places].sum())  # log of p / p at the start
        found.append(-2 / beta * torch.log(torch.sigmoid(-beta * log_ratio)))
    return sum(found) / len(found)


def flat_by_hand(ce_BT, batch):
    means = []
    for name in ("bad", "good"):
        p = [torch.exp(-ce_BT[row, places]).mean() for row, _, places in documents_by_hand(batch, name)]
        means.append(sum(torch.tanh(one) / 2 for one in p) / len(p))
    return means[0] - means[1]


def ascent_by_hand(ce_BT, batch):
    places = [(row, t) for row, _, places in documents_by_hand(batch, "bad") for t in places]
    return -sum(ce_BT[row, t] for row, t in places) / len(places)


def retained_by_hand(ce_BT, batch, unnamed):
    rows = [row for row, name in enumerate(batch[0]) if name in unnamed]
    valid_BT = batch[2][rows] != -100
    return ce_BT[rows].sum() / valid_BT.sum()


REFERENCE = torch.rand(3, T, generator=torch.Generator().manual_seed(1)) * torch.tensor(VALID["bad"])
CASES = {
    "ascent": (Ascent(forget="bad", retain_weight=0.7), lambda ce, batch: ascent_by_hand(ce, batch), ("good", "text")),
    "npo": (NPO(forget="bad", beta=0.3, retain_weight=0.7),
            lambda ce, batch: npo_by_hand(ce, batch, REFERENCE, 0.3), ("good", "text")),
    "flat_tv": (FlatTV(forget="bad", template="good", retain_weight=0.7), flat_by_hand, ("text",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_paper_and_the_mean_cross_entropy_beside(name, batch, tmp_path):
    objective, by_hand, retained = CASES[name]
    loss, value, (terms,), gradients = terms_of(objective, surroundings(tmp_path, REFERENCE), batch)
    ce_BT = losses_by_hand(batch)
    expected = by_hand(ce_BT, batch) + 0.7 * retained_by_hand(ce_BT, batch, retained)
    n_targets = int((batch[2] != -100).sum())  # by which a step divides
    assert value.item() / n_targets == pytest.approx(expected.item(), rel=1e-7)  # references are stored in fp32
    for mine, exact in zip(gradients, torch.autograd.grad(expected, batch[3:]), strict=True):
        torch.testing.assert_close(mine / n_targets, exact, rtol=1e-6, atol=1e-10)
    assert terms.ce.item() == pytest.approx(ce_BT.sum().item()) and terms.n_tokens == n_targets


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parts", [((0, 3), (3, 7)), tuple((n, n + 1) for n in range(7))])
def test_micro_batches_and_processes_add_up_to_the_same_sum(name, parts, batch, tmp_path):
    whole = terms_of(CASES[name][0], surroundings(tmp_path, REFERENCE), batch)
    split = terms_of(CASES[name][0], surroundings(tmp_path), batch, parts)  # the file is there already
    assert split[1].item() == pytest.approx(whole[1].item(), rel=1e-12)
    for mine, exact in zip(split[3], whole[3], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


def test_at_the_start_npo_is_that_of_a_model_that_did_not_move_and_near_beta_zero_its_gradient_is_ascent(
    tmp_path, batch
):
    ce_BT = losses_by_hand(batch).detach()
    rows = {n: row for row, (name, n) in enumerate(zip(batch[0], batch[1], strict=True)) if name == "bad"}
    same = torch.stack([ce_BT[rows[n]] for n in range(3)])
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    n_targets = int((batch[2] != -100).sum())
    _, value, _, _ = terms_of(NPO(forget="bad", retain_weight=0), surroundings(tmp_path / "a", same), batch)
    assert value.item() / n_targets == pytest.approx(2 / 0.1 * math.log(2), rel=1e-6)
    tiny = NPO(forget="bad", beta=1e-9, retain_weight=0)
    *_, gradients = terms_of(tiny, surroundings(tmp_path / "b", REFERENCE), batch)
    nll = -sum(losses_by_hand(batch)[row, places].sum() for row, _, places in documents_by_hand(batch, "bad")) / 4
    for mine, exact in zip(gradients, torch.autograd.grad(nll, batch[3:]), strict=True):
        torch.testing.assert_close(mine / n_targets, exact, rtol=1e-6, atol=1e-10)


def test_the_documents_of_a_source_are_known_by_their_begins_and_padding_is_none():
    for name, number in DOCUMENTS.items():
        begins_NT, found = documents_of(
            Stream(rows=1, targets=1, data_fingerprint="", documents=lambda name=name: Sequences(name))
        )
        assert begins_NT.tolist() == BEGINS[name] and found == pytest.approx(number)


def test_a_retain_weight_of_zero_trains_on_no_retained_token(batch, tmp_path):
    *_, (hidden, _) = terms_of(Ascent(forget="bad", retain_weight=0), surroundings(tmp_path), batch)
    silent = [name != "bad" for name in batch[0]]
    assert not hidden[silent].any() and hidden[[not one for one in silent]].any()


@pytest.mark.parametrize(
    ("rows", "objective", "said"),
    [
        ({"bad": 0}, Ascent(forget="bad"), "objective.forget=bad has no rows; give data.weights.bad a number above 0"),
        ({"good": 0}, FlatTV(forget="bad", template="good"), "objective.template=good has no rows"),
    ],
)
def test_roles_without_rows_are_refused(rows, objective, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        objective.build(surroundings(tmp_path, rows=ROWS | rows))


MIXTURE = ["data=mixture", "data.sources={a: {name: markov}, b: {name: noise}}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=ascent"], "objective.forget=forget must be a source of data=mixture; the data are no mixture"),
        ([*MIXTURE, "objective=ascent"], "objective.forget=forget must be a source of data=mixture; data.sources has"),
        ([*MIXTURE, "objective=flat_tv", "objective.forget=a", "objective.template=a"],
         "objective.forget and objective.template must be different sources"),
        ([*MIXTURE, "objective=npo", "objective.forget=a"], "type start.run=FOLDER, the folder of a finished run"),
        ([*MIXTURE, "objective=ascent", "objective.forget=a", "objective.retain_weight=-1"], "retain_weight must"),
        ([*MIXTURE, "objective=npo", "objective.forget=a", "objective.beta=0"], "beta must"),
        ([*MIXTURE, "objective=ascent", "objective.forget=a",
          "data.weight_changes=[{step: 3, weights: {a: 1, b: 2}}]"], "leave out data.weight_changes and data.online"),
        ([*MIXTURE, "objective=npo", "objective.forget=a", "start.run=runs/x/0123456789ab", "start.step=3",
          "start.take=[weights]", "+start.grow.width=fpi"], "objective=npo cannot be with start.grow"),
    ],
)  # fmt: skip
def test_what_cannot_be_forgotten_is_refused_before_any_data(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(words)


def test_the_pass_through_the_head_for_the_losses_counts():
    model = compose(["model=nano_s", "data=markov"]).model.resolved(32)
    assert Ascent().flops_per_token(model, 16) == 2 * 32 * model.d_model
    assert dataclasses.replace(NPO(), beta=0.5).flops_per_token(model, 16) == 2 * 32 * model.d_model
