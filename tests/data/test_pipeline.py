import json
import threading

import numpy as np
import pytest

from jaxchunk.data import (
    IGNORE_INDEX,
    Dataset,
    TokenWindows,
    split,
    synthetic_dataset,
    train_batches,
    validation_batches,
)
from jaxchunk.errors import InputError


def counting(num_tokens, separator_id=None):
    """Tokens that are their own positions: a window then says where it is from."""
    tokens = np.arange(num_tokens, dtype=np.uint32)
    return Dataset(tokens, num_tokens, "counting", "", separator_id=separator_id)


def windows_of(num_windows, seq_len=4):
    return TokenWindows(counting(num_windows * seq_len + 1).tokens, seq_len)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def window_ids(batches, seq_len=4):
    return np.concatenate([batch["tokens"][:, 0] for batch in batches]) // seq_len


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["labels"], b["labels"])


def test_windows_are_shifted_by_one_and_cover_every_label_once():
    windows = TokenWindows(counting(23).tokens, 4)
    assert len(windows) == 5
    assert len(list(windows)) == 5
    for i, window in enumerate(windows):
        assert window["tokens"].dtype == window["labels"].dtype == np.int32
        assert window["tokens"].tolist() == list(range(4 * i, 4 * i + 4))
        assert window["labels"].tolist() == list(range(4 * i + 1, 4 * i + 5))
    for index in (-1, 5):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_number_of_windows(num_tokens, expected):
    assert len(TokenWindows(np.zeros(num_tokens, np.uint16), 4)) == expected


def test_split_is_disjoint_complete_and_last():
    train, validation = split(counting(1000), 4, 0.1)
    assert np.concatenate([train.tokens, validation.tokens]).tolist() == list(range(1000))
    assert len(validation.tokens) == 100
    trained_on = {int(t) for w in train for t in [*w["tokens"], *w["labels"]]}
    validated_on = {int(t) for w in validation for t in [*w["tokens"], *w["labels"]]}
    assert not trained_on & validated_on
    assert validated_on == set(range(900, 997))  # 24 windows and their first token; 3 tokens fill no window.


def test_held_out_part_does_not_depend_on_the_sequence_length():
    assert split(counting(1000), 4).validation.tokens[0] == split(counting(1000), 9).validation.tokens[0] == 950


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_both_parts_always_have_a_window(fraction):
    train, validation = split(counting(10), 4, fraction)
    assert (len(train), len(validation)) == (1, 1)


@pytest.mark.parametrize(
    ("separator", "first_held_out"),
    [(899, 900), (900, 901), (930, 931), (949, 950), (950, 900), (898, 900)],
)
def test_cut_moves_to_the_end_of_a_document(separator, first_held_out):
    train, validation = split(counting(1000, separator), 4, 0.1)
    assert validation.tokens[0] == first_held_out
    assert len(train.tokens) + len(validation.tokens) == 1000


def test_moving_the_cut_leaves_a_validation_window():
    for separator in range(100):
        for seq_len in (1, 9, 13, 19):
            assert len(split(counting(100, separator), seq_len, 0.2).validation) >= 1


def test_too_few_tokens():
    split(counting(258), 128)
    with pytest.raises(InputError, match=r"\(counting\) has 257 tokens, but sequences of 128 need at least 258"):
        split(counting(257), 128)


@pytest.mark.parametrize(
    ("seq_len", "fraction", "message"),
    [
        (0, 0.1, "sequence length is 0"),
        (4, 0.0, "fraction is 0.0"),
        (4, 1.0, "fraction is 1.0"),
        (4, float("nan"), "fraction is nan"),
    ],
)
def test_bad_split(seq_len, fraction, message):
    with pytest.raises(InputError, match=message):
        split(counting(1000), seq_len, fraction)


def test_batches_have_static_shape_and_dtype():
    for batch in take(train_batches(windows_of(10), 3, seed=0), 8):
        for values in batch.values():
            assert (values.shape, values.dtype, values.flags.c_contiguous) == ((3, 4), np.int32, True)
        np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)


@pytest.mark.parametrize(("num_windows", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 4), (1, 1), (7, 1)])
def test_every_window_once_an_epoch(num_windows, batch_size):
    num_epochs = 4 * batch_size
    batches = take(train_batches(windows_of(num_windows), batch_size, seed=1), 4 * num_windows)
    epochs = window_ids(batches).reshape(num_epochs, num_windows)
    assert (np.sort(epochs, axis=1) == np.arange(num_windows)).all()


def test_each_epoch_has_another_order():
    epochs = window_ids(take(train_batches(windows_of(100), 10, seed=1), 100)).reshape(10, 100)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10
    assert (np.sort(epochs[0]) != epochs[0]).any()


def test_same_seed_same_batches_other_seed_others():
    windows = windows_of(50)
    first = take(train_batches(windows, 4, seed=7), 30)
    assert_same(first, take(train_batches(windows, 4, seed=7), 30))
    other = take(train_batches(windows, 4, seed=8), 30)
    assert (window_ids(first) != window_ids(other)).any()


def test_neighbouring_seeds_share_no_epoch():
    def epochs(seed):
        order = window_ids(take(train_batches(windows_of(40), 8, seed), 25)).reshape(5, 40)
        return {tuple(epoch) for epoch in order.tolist()}

    assert not epochs(0) & epochs(1)


def test_order_does_not_depend_on_the_batch_size():
    windows = windows_of(24)
    small = window_ids(take(train_batches(windows, 2, seed=3), 36))
    large = window_ids(take(train_batches(windows, 6, seed=3), 12))
    np.testing.assert_array_equal(small, large)


# 11 windows in batches of 4: batch 2 crosses into the second epoch, batch 11 starts the fifth.
@pytest.mark.parametrize("num_before", [0, 1, 2, 3, 5, 11])
def test_exact_resume(num_before):
    windows = windows_of(11)
    uninterrupted = train_batches(windows, 4, seed=5)
    take(uninterrupted, num_before)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = take(uninterrupted, 9)
    fresh = train_batches(windows, 4, seed=5)
    fresh.set_state(state)
    assert_same(take(fresh, 9), expected)
    used = train_batches(windows, 4, seed=5)
    take(used, 6)  # Its prefetched batches must not come out after the jump.
    used.set_state(state)
    assert_same(take(used, 9), expected)


def test_batches_are_prepared_off_the_main_thread():
    class Recording(TokenWindows):
        def __getitem__(self, index):
            threads.add(threading.current_thread())
            return super().__getitem__(index)

    threads = set()
    windows = Recording(counting(41).tokens, 4)
    take(train_batches(windows, 2, seed=0), 5)
    list(validation_batches(windows, 2))
    assert threads
    assert threading.main_thread() not in threads


def test_validation_every_window_once_and_in_order_with_a_padded_last_batch():
    batches = list(validation_batches(windows_of(10), 4))
    assert [batch["tokens"].shape for batch in batches] == [(4, 4)] * 3
    assert all(values.dtype == np.int32 for batch in batches for values in batch.values())
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels[:10].ravel().tolist() == list(range(1, 41))
    assert (labels[10:] == IGNORE_INDEX).all()
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert tokens[:10].ravel().tolist() == list(range(40))
    assert (tokens[10:] == 0).all()


def test_validation_can_be_run_again():
    batches = validation_batches(windows_of(10), 4)
    assert_same(list(batches), list(batches))


def test_validation_without_padding_and_with_more_rows_than_windows():
    (only,) = validation_batches(windows_of(4), 4)
    assert (only["labels"] != IGNORE_INDEX).all()
    (only,) = validation_batches(windows_of(3), 8)
    assert ((only["labels"] != IGNORE_INDEX).sum(axis=1) == [4, 4, 4, 0, 0, 0, 0, 0]).all()


def test_limited_validation_is_spread_evenly():
    batches = list(validation_batches(windows_of(100), 5, max_batches=2))
    assert window_ids(batches).tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert window_ids(list(validation_batches(windows_of(11), 5, max_batches=2))).tolist() == [0, *range(1, 10)]
    limit_beyond_all = list(validation_batches(windows_of(10), 4, max_batches=3))
    assert_same(limit_beyond_all, list(validation_batches(windows_of(10), 4)))


@pytest.mark.parametrize("make", [lambda w, b: train_batches(w, b, 0), validation_batches])
def test_bad_batching(make):
    with pytest.raises(InputError, match="batch size is 0"):
        make(windows_of(10), 0)
    with pytest.raises(InputError, match="4 tokens make no window of 4: it takes 5"):
        make(TokenWindows(np.zeros(4, np.uint16), 4), 2)


def test_bad_seed_and_limit():
    with pytest.raises(InputError, match="seed is -1"):
        train_batches(windows_of(10), 2, -1)
    with pytest.raises(InputError, match="number of validation batches is 0"):
        validation_batches(windows_of(10), 2, 0)


def test_any_size_of_seed():
    assert len({window_ids(take(train_batches(windows_of(50), 5, s), 2)).tobytes() for s in (0, 2**32, 2**70)}) == 3


def test_synthetic_data_goes_through_the_same_pipeline():
    train, validation = split(synthetic_dataset(1000, seed=0, num_tokens=5000), 16)
    batch = next(train_batches(train, 4, seed=0))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert len(validation) == 15
