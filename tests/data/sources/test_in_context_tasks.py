"""Sequences ask and tell random tables; the tables, the groups of answers and the lowest loss are those of a loop."""

import math

import numpy as np
import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.data.cutting import NO_TARGET, Cutting
from scaling_testbed.data.sources.in_context_tasks import GROUPS, UNSEEN, InContextTasksConfig
from scaling_testbed.data.tokenizers import BytesConfig
from scaling_testbed.errors import ConfigError


def source_of(**keys):
    given = {"n_tasks": 3, "n_symbols": 5, "n_labels": 4, "pairs": 6, "n_sequences": 40, "n_validation_sequences": 20}
    return InContextTasksConfig(**given | keys)


def read(source, split):
    """x and y [N, P] of each sequence, as its tokens say them."""
    tokens = source.tokens(split).reshape(-1, 2 * source.pairs)
    x, answers = tokens[:, ::2], tokens[:, 1::2] - source.n_symbols
    assert np.array_equal(answers // source.n_labels, x)  # the answer tells its symbol
    return x, answers % source.n_labels


def fits(table, x, y):
    return (table[x] == y).all()


def test_sequences_are_of_train_tasks_and_in_the_second_half_of_validation_of_new_ones():
    source = source_of()
    tables = [source.table(task) for task in range(3)]
    x, y = read(source, "train")
    assert all(any(fits(table, *pair) for table in tables) for pair in zip(x, y, strict=True)) and len(x) == 41
    x, y = read(source, "validation")
    for number in range(20):
        known = any(fits(table, x[number], y[number]) for table in tables)
        assert known if number < 10 else fits(source.table(UNSEEN + number - 10), x[number], y[number])
    assert len({tuple(source.table(UNSEEN + n)) for n in range(10)} | {tuple(table) for table in tables}) == 13


def test_other_numbers_of_tasks_and_sequences_leave_the_symbols_and_the_unseen_tasks():
    few, many = source_of(n_tasks=2), source_of(n_tasks=500)
    assert np.array_equal(read(few, "validation")[0], read(many, "validation")[0])
    assert np.array_equal(read(few, "validation")[1][10:20], read(many, "validation")[1][10:20])
    longer = source_of(n_sequences=90)
    assert np.array_equal(longer.tokens("train")[: 40 * 12], source_of().tokens("train")[: 40 * 12])
    assert not np.array_equal(source_of(seed=1).tokens("train"), source_of().tokens("train"))


def test_each_window_is_a_sequence_and_its_answers_are_its_targets(prepared):
    source = source_of()
    data = prepared(source, BytesConfig())
    cut = Cutting().of(data.train, 12)
    assert cut.number == 40 and cut.each_targets == 6
    batch = cut.batch(np.arange(40))
    tokens = source.tokens("train").reshape(-1, 12)
    assert np.array_equal(batch.tokens_BS[:, :-1], tokens[:40])
    assert (
        np.array_equal(batch.targets_BT[:, ::2], tokens[:40, 1::2]) and (batch.targets_BT[:, 1::2] == NO_TARGET).all()
    )
    assert data.manifest["eos_id"] is None and data.vocab_size == 25


def test_groups_are_those_of_a_loop_over_answers():
    source = source_of()
    tokens = source.tokens("validation").reshape(-1, 12)
    numbers = np.array([0, 3, 9, 10, 19])
    windows = np.concatenate([tokens[numbers], tokens[numbers + 1, :1]], axis=1)
    found = source.groups(numbers, windows)
    assert tuple(found) == GROUPS == source.group_names
    for row, number in enumerate(numbers):
        before = set()
        for place in range(6):
            x = int(windows[row, 2 * place])
            kind = "train_task" if number < 10 else "unseen_task"
            group = f"{kind}_{'seen' if x in before else 'new'}" if place >= 3 else None
            assert [name for name in GROUPS if found[name][row, 2 * place]] == ([group] if group else [])
            assert not any(found[name][row, 2 * place + 1] for name in GROUPS)
            before.add(x)


def test_a_new_task_with_a_table_of_the_train_split_is_no_unseen_one():
    numbers = np.arange(10, 20)
    for n_tasks, some in ((3, True), (100, False)):  # there are 8 tables, and 100 tasks have all
        source = source_of(n_tasks=n_tasks, n_symbols=3, n_labels=2)
        windows = source.tokens("validation").reshape(-1, 12)[numbers]
        windows = np.concatenate([windows, windows[:, :1]], axis=1)
        known = {tuple(source.table(task)) for task in range(n_tasks)}
        is_new = [tuple(source.table(UNSEEN + number)) not in known for number in range(10)]
        found = source.groups(numbers, windows)
        in_unseen = (found["unseen_task_seen"] | found["unseen_task_new"]).any(1)
        assert in_unseen.tolist() == is_new and any(is_new) == some and not all(is_new)
        late = sum(found[name].sum(1) for name in GROUPS)
        assert (late == 3).all()


@pytest.mark.parametrize("n_tasks", [1, 2, 30])
def test_the_lowest_loss_is_that_of_a_model_that_weighs_all_tables(n_tasks):
    """Means over random tables: the posterior over the tables of the train split, and a uniform label for a new symbol
    of an unseen task."""
    told, new = [], []
    for seed in range(60):
        source = source_of(n_tasks=n_tasks, n_labels=2, n_symbols=3, seed=seed, n_validation_sequences=40)
        tables = np.stack([source.table(task) for task in range(n_tasks)])
        for number, (x, y) in enumerate(zip(*read(source, "validation"), strict=True)):
            if number < 20:
                left = np.ones(n_tasks, dtype=bool)
                for place in range(6):
                    agree = left & (tables[:, x[place]] == y[place])
                    told.append(-math.log(agree.sum() / left.sum()))
                    left = agree
            elif number < 40:
                new += [math.log(2) * (x[place] not in x[:place]) for place in range(6)]
    mean = (np.mean(told) + np.mean(new)) / 2
    assert source.entropy_rate_nats() == pytest.approx(mean, abs=0.012)  # 7,200 answers of each kind
    assert source.entropies_by_context_nats() == [source.entropy_rate_nats()]


def test_many_tasks_have_the_closed_form_of_unseen_ones_and_one_task_tells_nothing():
    new = math.log(4) * np.mean(0.8 ** np.arange(6))
    assert source_of(n_tasks=1).entropy_rate_nats() == pytest.approx(new / 2)
    assert source_of(n_tasks=1 << 18).entropy_rate_nats() == pytest.approx(new, rel=2e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.sequence_length=50"], "batch.sequence_length=50 must be 48, which is a sequence of data=in_context"),
        (["data.pairs=1", "batch.sequence_length=2"], "pairs must be at least 2"),
        (["data.n_tasks=0"], "n_tasks must be between 1 and"),
        (["data.n_symbols=1000000", "data.n_labels=1000"], r"n_symbols \* \(1 \+ n_labels\) must be at most"),
        (["batch.sequence_length=48", "batch.packing=documents"], "data=in_context_tasks has no EOS token"),
    ],
)
def test_what_does_not_fit_is_refused_when_a_run_is_composed(words, said):
    with pytest.raises(ConfigError, match=said):
        compose_many([["data=in_context_tasks", *words]])


def test_a_mixture_asks_its_parts_for_their_length():
    sources = "data.sources={a:{name:in_context_tasks,pairs:8},b:{name:noise,vocab_size:144}}"
    with pytest.raises(ConfigError, match="batch.sequence_length=48 must be 16"):
        compose_many([["data=mixture", sources, "batch.sequence_length=48"]])
    assert compose_many([["data=mixture", sources, "batch.sequence_length=16"]])
