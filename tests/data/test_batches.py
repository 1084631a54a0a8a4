import numpy as np
import pytest

from scaling_testbed.data.batches import TrainingBatches, ValidationBatches, permute
from scaling_testbed.data.shards import TokenStream
from scaling_testbed.errors import ConfigError, UserError


def stream_of(n, shards=1):
    return TokenStream("train split of folder", np.array_split(np.arange(n, dtype=np.uint32), shards))


def tokens_of(batches):
    return [batch.tokens_BS for batch in batches]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 1000, 4096, 65537])
def test_a_permutation_is_a_bijection_for_every_size(n):
    image = permute(np.arange(n), n, seed=3, epoch=1)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_a_permutation_moves_every_window_to_every_place_equally_often():
    """Chi-square over 4,000 keys: where window 0 of 20 lands is uniform, and so is where its neighbour lands."""
    for position in (0, 1):
        places = [int(permute(np.array([position]), 20, seed, 0)[0]) for seed in range(4000)]
        counts = np.bincount(places, minlength=20)
        assert ((counts - 200) ** 2 / 200).sum() < 43.8  # the 0.1 % point of chi-square with 19 degrees of freedom


def test_two_windows_land_on_every_pair_of_places_equally_often():
    """Chi-square over 6,000 keys and the 30 ordered pairs of 6 places: the order is more than a shift."""
    images = np.array([permute(np.array([0, 1]), 6, seed, 0) for seed in range(6000)])
    counts = np.bincount(images[:, 0] * 6 + images[:, 1], minlength=36)
    assert (counts[::7] == 0).all()
    assert ((counts[counts > 0] - 200) ** 2 / 200).sum() < 58.3  # the 0.1 % point with 29 degrees of freedom
    assert (counts > 0).sum() == 30


def test_a_permutation_of_a_trillion_sequences_is_computed_for_a_few_of_them():
    image = permute(np.arange(1000), 10**12 + 7, seed=0, epoch=0)
    assert len(set(image.tolist())) == 1000 and image.min() >= 0 and image.max() < 10**12 + 7
    assert np.abs(np.corrcoef(np.arange(1000), image)[0, 1]) < 0.15


@pytest.mark.parametrize("shards", [1, 5])
def test_every_window_is_seen_exactly_once_in_every_epoch(shards):
    batches = TrainingBatches(stream_of(1003, shards), sequence_length=10, sequences=20, seed=1)
    assert batches.n_sequences == 100
    for epoch in range(3):
        rows = np.concatenate([batches.batch(step).tokens_BS for step in range(5 * epoch, 5 * epoch + 5)])
        assert np.array_equal(np.sort(rows[:, 0]), np.arange(0, 1000, 10))
        assert np.array_equal(rows, rows[:, :1] + np.arange(11))


def test_a_batch_may_straddle_two_epochs_without_losing_or_repeating_a_window():
    batches = TrainingBatches(stream_of(71), sequence_length=10, sequences=3, seed=1)
    starts = np.concatenate([batches.batch(step).tokens_BS[:, 0] for step in range(7)])
    assert batches.n_sequences == 7
    for epoch in range(3):
        assert sorted(starts[7 * epoch : 7 * epoch + 7]) == list(range(0, 70, 10))


def test_epochs_and_seeds_give_different_orders_and_the_same_step_the_same_batch():
    batches = TrainingBatches(stream_of(10001), sequence_length=10, sequences=1000, seed=1)
    other = TrainingBatches(stream_of(10001), sequence_length=10, sequences=1000, seed=2)
    assert not np.array_equal(batches.batch(0).tokens_BS, batches.batch(1).tokens_BS)
    assert not np.array_equal(batches.batch(0).tokens_BS, other.batch(0).tokens_BS)
    assert np.array_equal(batches.batch(7).tokens_BS, batches.batch(7).tokens_BS)
    assert batches.batch(0).tokens_BS.dtype == np.int64 and batches.batch(0).tokens_BS.flags.c_contiguous


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_slices_of_all_ranks_together_are_the_global_batch(world_size):
    batches = TrainingBatches(stream_of(301, 3), sequence_length=10, sequences=12, seed=1)
    for step in (0, 2, 31):
        slices = [batches.batch(step, rank, world_size).tokens_BS for rank in range(world_size)]
        assert np.array_equal(np.concatenate(slices), batches.batch(step).tokens_BS)


def test_a_batch_that_ranks_cannot_share_equally_is_refused():
    batches = TrainingBatches(stream_of(301), sequence_length=10, sequences=12, seed=1)
    with pytest.raises(ConfigError, match="12 sequences cannot be shared equally by 5 ranks"):
        batches.batch(0, 0, 5)


def test_epochs_count_how_often_the_windows_were_seen():
    batches = TrainingBatches(stream_of(1001), sequence_length=10, sequences=20, seed=1)
    assert batches.epochs(5) == 1.0 and batches.epochs(12) == 2.4


def test_a_corpus_too_small_for_one_batch_is_refused_by_name():
    TrainingBatches(stream_of(201), sequence_length=10, sequences=20, seed=1)
    with pytest.raises(UserError, match="train split of folder: 200 tokens give 19 sequences of 10.*batch of 20"):
        TrainingBatches(stream_of(200), sequence_length=10, sequences=20, seed=1)
    with pytest.raises(UserError, match="train split of folder: 10 tokens are too few for one validation batch"):
        ValidationBatches(stream_of(10), sequence_length=10, max_tokens=None, rows=4)


@pytest.mark.parametrize("max_tokens, windows", [(None, 30), (100, 10), (109, 10), (1, 1), (10**9, 30)])
def test_validation_is_the_same_windows_every_time_spread_evenly(max_tokens, windows):
    batches = ValidationBatches(stream_of(305, 2), sequence_length=10, max_tokens=max_tokens, rows=4)
    first, second = tokens_of(batches), tokens_of(batches)
    assert len(first) == len(batches) == -(-windows // 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    rows = np.concatenate(first)
    assert np.array_equal(rows, (np.arange(windows) * 30 // windows)[:, None] * 10 + np.arange(11))
    assert batches.n_tokens == windows * 10


def test_reading_across_shards_gives_the_same_tokens_as_one_shard():
    whole, parts = stream_of(100), stream_of(100, 7)
    for start, length in [(0, 100), (0, 0), (14, 1), (14, 40), (99, 1), (100, 0)]:
        assert np.array_equal(whole.read(start, length), parts.read(start, length))
    with pytest.raises(IndexError):
        parts.read(99, 2)
    with pytest.raises(IndexError):
        parts.read(-1, 2)


def test_evaluation_sequences_are_spread_over_the_whole_stream():
    """A mixture lies in the order of its parts; scoring only its first windows would score only its first part."""
    tokens = np.repeat(np.arange(4, dtype=np.uint16), 1000)
    batches = ValidationBatches(TokenStream("mixture", [tokens]), sequence_length=10, max_tokens=200, rows=8)
    first, second = np.concatenate(tokens_of(batches)), np.concatenate(tokens_of(batches))
    assert np.array_equal(first, second) and first.shape == (20, 11)
    assert min(np.bincount(first[:, 0], minlength=4)) >= 4


def mixed(weights=((0, {"a": 0.7, "b": 0.3}),), **changes):
    """Batches of 10 rows of 10 tokens from 50 windows of a and 20 windows of b, whose tokens start at 1,000."""
    b = TokenStream("b", [np.arange(1000, 1201, dtype=np.uint32)])
    settings = {"sequence_length": 10, "sequences": 10, "seed": 1, "weights": weights} | changes
    return TrainingBatches({"a": stream_of(501), "b": b}, **settings)


def starts_of(batches, steps):
    rows = np.concatenate([batches.batch(step).tokens_BS[:, 0] for step in steps])
    return rows[rows < 1000], rows[rows >= 1000]


def test_each_source_of_a_mixture_walks_its_own_sequences_once_per_epoch():
    a, b = starts_of(mixed(), range(100))
    assert (len(a), len(b)) == (700, 300)
    for rows, windows, first in ((a, 50, 0), (b, 20, 1000)):
        for epoch in range(len(rows) // windows):
            there = np.sort(rows[epoch * windows :][:windows])
            assert np.array_equal(there, first + 10 * np.arange(windows))
    alone = TrainingBatches(stream_of(501), sequence_length=10, sequences=10, seed=1)
    assert np.array_equal(a, starts_of(alone, range(70))[0])


def test_a_batch_of_a_mixture_is_a_function_of_its_step_and_is_shared_by_ranks():
    batches, again = mixed(), mixed()
    for step in (97, 3, 41):
        whole = batches.batch(step).tokens_BS
        assert np.array_equal(again.batch(step).tokens_BS, whole)
        for size in (2, 5):
            assert np.array_equal(
                np.concatenate([again.batch(step, rank, size).tokens_BS for rank in range(size)]), whole
            )
    assert not np.array_equal(mixed(seed=2).batch(3).tokens_BS, batches.batch(3).tokens_BS)


def test_a_mixture_of_one_source_is_that_source():
    settings = {"sequence_length": 10, "sequences": 20, "seed": 1, "skipped": [3, 5]}
    alone = TrainingBatches(stream_of(1001), **settings)
    for weights in ([(0, {"a": 2.5})], [(0, {"a": 0.1, "b": 0})]):
        streams = {name: stream_of(1001) for name in weights[0][1]}
        mixture = TrainingBatches(streams, **settings, weights=weights)
        for step in range(9):
            assert np.array_equal(mixture.batch(step).tokens_BS, alone.batch(step).tokens_BS)


def test_the_rows_of_each_source_are_counted_without_those_of_steps_left_out():
    changing = [(0, {"a": 0.7, "b": 0.3}), (6, {"a": 0, "b": 1}), (20, {"a": 1, "b": 0})]
    for skipped in ((), (0, 2), (3, 8), (3, 8, 21, 22)):
        batches = mixed(changing, skipped=skipped)
        for first, last in ((0, 0), (0, 1), (0, 30), (4, 25), (7, 7)):
            a, b = starts_of(batches, range(first, last)) if last > first else ((), ())
            assert batches.rows_by_source(first, last) == {"a": len(a), "b": len(b)}
            assert batches.epochs_by_source(first, last) == {"a": len(a) / 50, "b": len(b) / 20}


def test_a_source_with_too_few_windows_for_its_share_of_a_batch_is_named():
    mixed([(0, {"a": 1, "b": 2})], sequences=30)
    with pytest.raises(UserError, match="^b: 201 tokens give 20 sequences of 10, too few for .* batch of 21"):
        mixed([(0, {"a": 0.3, "b": 0.7})], sequences=30)
    with pytest.raises(UserError, match="too few for one training batch of 21"):
        mixed([(0, {"a": 1, "b": 0}), (1000, {"a": 0.3, "b": 0.7})], sequences=30)
