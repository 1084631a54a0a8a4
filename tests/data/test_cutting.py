"""Streams are cut so that each token is a target once in an epoch, whatever is known of documents."""

import numpy as np
import pytest

from scaling_testbed.data import cutting as module
from scaling_testbed.data.batches import TrainingBatches, ValidationBatches
from scaling_testbed.data.cutting import NO_TARGET, Cutting, best_fit, document_ends, of_all
from scaling_testbed.data.shards import TokenStream
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.learning.loss import IGNORE

EOS = 0
PACKED = Cutting(packing="documents", document_masking=True)


def documents_of(sizes, seed=0):
    """Documents with an EOS token at the end. Their tokens rise through all documents, so that each is there once."""
    tokens = np.arange(1, sum(sizes) + 1)
    ends = np.cumsum(sizes)
    tokens[ends - 1] = EOS
    return np.split(tokens, ends[:-1])


def stream_of(documents, shards=1, label="train split of folder"):
    return TokenStream(label, np.array_split(np.concatenate(documents), shards), eos_id=EOS)


SIZES = [3, 1, 12, 7, 2, 2, 25, 10, 4, 9, 1, 6, 20]
DOCUMENTS = documents_of(SIZES)


def pieces_of(batch):
    """(inputs, targets) of each document of a packed batch with begins, without padding."""
    tokens_BS, targets_BT, begins_BT = batch.tensors
    found = []
    for row in range(len(tokens_BS)):
        for begin in np.unique(begins_BT[row]):
            here = begins_BT[row] == begin
            if (targets_BT[row][here] != NO_TARGET).any():
                assert (targets_BT[row][here] != NO_TARGET).all()
                found.append((tokens_BS[row, :-1][here].tolist(), targets_BT[row][here].tolist()))
    return found


@pytest.mark.parametrize("shards", [1, 4])
def test_a_packed_epoch_has_each_document_whole_and_long_ones_in_pieces(shards):
    """The first input is the EOS token before, or in a later piece the token before."""
    cut = PACKED.of(stream_of(DOCUMENTS, shards), 10)
    whole = np.concatenate(DOCUMENTS)
    expected, place = [], 0
    for size in SIZES:
        for begin in range(0, size, 10):
            at = np.arange(place + begin, place + min(size, begin + 10))
            inputs = [EOS if t == 0 else int(whole[t - 1]) for t in at]
            expected.append((inputs, whole[at].tolist()))
        place += size
    found = pieces_of(cut.batch(np.arange(cut.number)))
    assert sorted(found) == sorted(expected)
    assert sum(SIZES) == of_all(cut.each_targets, cut.number) == of_all(cut.each_tokens, cut.number)
    assert (cut.n_documents, cut.n_split) == (len(SIZES), 3)
    assert (
        cut.remark()
        == "train split of folder: 13 documents, 3 of them split, in 11 sequences, of which 7.27% is padding"
    )


def test_padding_is_a_document_of_its_own_without_targets():
    batch = PACKED.of(stream_of(documents_of([4, 9])), 10).batch(np.arange(2))
    assert batch.targets_BT[0].tolist() == [1, 2, 3, EOS] + [NO_TARGET] * 6
    assert batch.tokens_BS[0].tolist() == [EOS, 1, 2, 3] + [EOS] * 7
    assert batch.begins_BT[0].tolist() == [0] * 4 + [4] * 6
    assert batch.targets_BT[1, 9] == NO_TARGET and batch.begins_BT[1].tolist() == [0] * 9 + [9]
    assert NO_TARGET == IGNORE  # the loss leaves them out
    unmasked = Cutting(packing="documents").of(stream_of(documents_of([4, 9])), 10).batch(np.arange(2))
    assert unmasked.begins_BT is None and np.array_equal(unmasked.targets_BT, batch.targets_BT)


def naive_best_fit(sizes, room):
    """Each size into the fullest bin in which it fits, one by one."""
    bins, chosen = [], []
    for size in sizes:
        fitting = [number for number, left in enumerate(bins) if left >= size]
        if fitting:
            best = min(fitting, key=lambda number: bins[number])
        else:
            best = len(bins)
            bins.append(room)
        bins[best] -= size
        chosen.append(best)
    return sorted(bins), chosen


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_fills_bins_as_one_size_after_the_other_does(seed):
    draw = np.random.default_rng(seed)
    room = int(draw.integers(1, 60))
    sizes = np.sort(draw.integers(1, room + 1, size=int(draw.integers(1, 400))))[::-1]
    chosen = best_fit(sizes, room)
    filled = np.bincount(chosen, weights=sizes).astype(int)
    assert filled.max() <= room and filled.min() > 0
    assert sorted(room - filled) == naive_best_fit(sizes.tolist(), room)[0]


def test_best_fit_of_a_million_sizes_is_fast_and_wastes_little():
    draw = np.random.default_rng(0)
    sizes = np.sort(np.minimum(draw.lognormal(5, 1.2, size=10**6).astype(int) + 1, 1024))[::-1]
    chosen = best_fit(sizes, 1024)
    filled = np.bincount(chosen, weights=sizes)
    assert filled.max() <= 1024 and filled.mean() > 0.99 * 1024


def test_ends_are_found_in_a_stream_that_is_read_in_parts(monkeypatch):
    stream = stream_of(DOCUMENTS, 3)
    monkeypatch.setattr(module, "READ_TOKENS", 7)
    assert document_ends(stream).tolist() == np.cumsum(SIZES).tolist()
    unfinished = TokenStream("s", [np.array([5, EOS, 6, 7])], eos_id=EOS)
    assert document_ends(unfinished).tolist() == [2, 4]


def test_windows_say_where_a_document_begins_with_its_eos_token():
    batch = Cutting(document_masking=True).of(stream_of(DOCUMENTS), 10).batch(np.array([0, 1]))
    assert batch.tokens_BS[0].tolist() == [1, 2, EOS, EOS, 5, 6, 7, 8, 9, 10, 11]
    assert batch.begins_BT[0].tolist() == [0, 0, 2, 3, 3, 3, 3, 3, 3, 3]
    assert batch.tokens_BS[1, :7].tolist() == [11, 12, 13, 14, 15, EOS, 17]  # begins in the middle of a document
    assert batch.begins_BT[1, :7].tolist() == [0, 0, 0, 0, 0, 5, 5]
    assert batch.targets_BT is None and batch.begins_BT.dtype == np.int32


def packed(**changes):
    draw = np.random.default_rng(1)
    stream = stream_of(documents_of(draw.integers(1, 30, size=400).tolist()), 3)
    return TrainingBatches(stream, **{"sequence_length": 16, "sequences": 12, "seed": 1, "cutting": PACKED} | changes)


def all_equal(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_slices_of_all_ranks_are_the_global_packed_batch_and_depend_on_the_step_alone(world_size):
    batches, again = packed(), packed()
    for step in (0, 3, 200):
        whole = again.batch(step)
        slices = [batches.batch(step, rank, world_size) for rank in range(world_size)]
        for name in ("tokens_BS", "targets_BT", "begins_BT"):
            assert np.array_equal(np.concatenate([getattr(one, name) for one in slices]), getattr(whole, name))
    assert not all_equal(packed(seed=2).batch(3), whole) and all_equal(again.batch(3), batches.batch(3))


@pytest.mark.parametrize("block", [4096, 7])
def test_targets_are_counted_without_padding(monkeypatch, block):
    monkeypatch.setattr("scaling_testbed.data.batches.BLOCK", block)
    monkeypatch.setattr("scaling_testbed.data.batches._block", lambda *a: _block_of(block, *a))
    batches = packed(skipped=[3, 5])
    counted = [int((batches.batch(step).targets_BT != NO_TARGET).sum()) for step in range(100)]
    assert [batches.targets(step) for step in range(100)] == counted
    assert min(counted) < 12 * 16  # some positions are padding
    for first, last in ((0, 1), (0, 3), (2, 4), (0, 100), (40, 77)):
        assert (
            batches.tokens_by_source(first, last)
            == {"": batches.n_targets(first, last)}
            == {"": sum(counted[first:last])}
        )
    assert batches.rows_by_source(2, 10) == {"": 8 * 12}


def _block_of(size, n, seed, epoch, number):
    from scaling_testbed.data.batches import permute

    return permute(np.arange(number * size, min((number + 1) * size, n)), n, seed, epoch)


def test_a_mixture_of_packed_sources_has_the_sequences_of_each_in_its_rows():
    a = stream_of(documents_of([5, 9, 3, 14, 8, 8] * 20), label="a")
    b = TokenStream("b", [np.where(x := np.concatenate(documents_of([30, 2, 11] * 20)), x + 5000, EOS)], eos_id=EOS)
    options = {"sequence_length": 16, "sequences": 8, "seed": 1, "cutting": PACKED}
    mixture = TrainingBatches({"a": a, "b": b}, weights=[(0, {"a": 0.5, "b": 0.5})], **options)
    alone = TrainingBatches(b, **options)
    rows = [mixture.batch(step) for step in range(4)]
    of_b = np.concatenate([one.targets_BT[(one.targets_BT > 5000).any(1)] for one in rows])
    assert np.array_equal(of_b, np.concatenate([alone.batch(step).targets_BT for step in range(2)]))
    counts = {"a": 0, "b": 0}
    for one in rows:
        is_b = (one.targets_BT > 5000).any(1)
        counts["b"] += int((one.targets_BT[is_b] != NO_TARGET).sum())
        counts["a"] += int((one.targets_BT[~is_b] != NO_TARGET).sum())
    assert mixture.tokens_by_source(0, 4) == counts
    for step in range(4):
        slices = [mixture.batch(step, rank, 4) for rank in range(4)]
        assert np.array_equal(np.concatenate([one.begins_BT for one in slices]), rows[step].begins_BT)


def test_validation_takes_packed_sequences_spread_evenly_and_counts_their_targets():
    stream = stream_of(documents_of([5, 9, 3, 14, 8, 8] * 20))
    batches = ValidationBatches(stream, sequence_length=16, max_tokens=160, rows=4, cutting=PACKED)
    targets_BT = np.concatenate([one.targets_BT for one in batches])
    assert len(targets_BT) == batches.n_sequences == 10
    assert batches.n_tokens == (targets_BT != NO_TARGET).sum() < 160
    whole = ValidationBatches(stream, sequence_length=16, max_tokens=None, rows=7, cutting=PACKED)
    assert whole.n_tokens == stream.n_tokens == sum(int((one.targets_BT != NO_TARGET).sum()) for one in whole)


@pytest.mark.parametrize("cutting", [Cutting(document_masking=True), Cutting(packing="documents")], ids=str)
def test_a_stream_without_eos_is_refused_by_name(cutting):
    bare = TokenStream("train split of noise", [np.arange(100)])
    with pytest.raises(ConfigError, match=f"{cutting} needs the ends of documents, and train split of noise has"):
        cutting.of(bare, 10)
    never = TokenStream("train split of x", [np.arange(1, 100)], eos_id=EOS)
    with pytest.raises(UserError, match="train split of x: none of its 99 tokens is the EOS token 0"):
        Cutting(packing="documents").of(never, 10)
