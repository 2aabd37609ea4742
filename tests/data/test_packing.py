"""Rows of whole examples: nothing is lost, nothing is doubled, and the order follows from the seed."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchunk.data import IGNORE_INDEX, Dataset, split, train_batches, validation_batches
from jaxchunk.data.examples import Examples
from jaxchunk.data.packing import best_fit
from jaxchunk.errors import InputError

SEQ_LEN = 12


def examples_of(lengths, prompt=2):
    """Example i has the tokens 100 i, 100 i + 1, ...; all but its first `prompt` are learnt."""
    tokens = [100 * i + np.arange(length) for i, length in enumerate(lengths)]
    learnt = [np.arange(length) >= prompt for length in lengths]
    starts = np.cumsum([0, *lengths])
    examples = Examples(np.concatenate(tokens).astype(np.uint32), np.concatenate(learnt), starts)
    return Dataset(examples.tokens, 100 * len(lengths), "examples", "", examples=examples)


@pytest.fixture
def dataset():
    return examples_of(np.random.default_rng(0).integers(3, SEQ_LEN + 2, 50))


def pairs(batch):
    """(token, label) of everything that is learnt."""
    learnt = batch["labels"] != IGNORE_INDEX
    return list(zip(batch["tokens"][learnt].tolist(), batch["labels"][learnt].tolist(), strict=True))


def all_pairs(dataset, only=None):
    examples = dataset.examples
    return sorted(
        (int(examples.tokens[i - 1]), int(examples.tokens[i]))
        for example in (range(len(examples)) if only is None else only)
        for i in range(examples.starts[example], examples.starts[example + 1])
        if examples.learnt[i]
    )


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_item_is_in_one_row_that_holds_it(lengths):
    rows = best_fit(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < total <= 20 for total in sums)
    assert sum(total <= 10 for total in sums) <= 1  # two of these would have shared a row


def test_rows_hold_whole_examples_and_nothing_across(dataset):
    rows = split(dataset, SEQ_LEN, held_out=dataset).train
    for row in rows:
        assert set(row) == {"tokens", "labels", "segment_ids"}
        tokens, labels, segments = row.values()
        assert segments[0] == 1 and np.all(np.diff(segments[segments > 0]) >= 0)
        assert np.all(labels[segments == 0] == IGNORE_INDEX) and np.all(tokens[segments == 0] == 0)
        for segment in range(1, segments.max() + 1):
            own = tokens[segments == segment]
            assert own[0] % 100 == 0 and np.all(np.diff(own) == 1)
            learnt = labels[segments == segment][1:]  # the prompt has two tokens
            assert np.array_equal(learnt, own[1:] + 1)
    assert sorted(pair for row in rows for pair in pairs(row)) == all_pairs(dataset)
    assert rows.efficiency == np.mean([row["segment_ids"] > 0 for row in rows])
    assert rows.efficiency > 0.8


def test_an_epoch_has_every_example_once_and_the_seed_settles_the_order(dataset):
    rows = split(dataset, SEQ_LEN, held_out=dataset).train

    def epoch(seed, number=0):
        batches = train_batches(rows, 1, seed)
        found = []
        for _ in range(number + 1):
            found = []
            while len(found) < len(all_pairs(dataset)):
                found += pairs(next(batches))
        return found

    first, second = epoch(0), epoch(0, 1)
    assert sorted(first) == sorted(second) == all_pairs(dataset)
    assert first == epoch(0)
    assert first != second and first != epoch(1)


@pytest.mark.parametrize("done", [0, 3, 21])  # the last is in another epoch
def test_the_place_in_the_data_can_be_taken_up(dataset, done):
    rows = split(dataset, SEQ_LEN, held_out=dataset).train
    whole = train_batches(rows, 4, 7)
    for _ in range(done):
        next(whole)
    resumed = train_batches(rows, 4, 7)
    resumed.set_state(whole.get_state())
    for _ in range(12):
        expected, found = next(whole), next(resumed)
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(values, found[name])


def test_the_held_out_part(dataset):
    parts = split(dataset, SEQ_LEN, 0.2)
    assert (parts.train.num_examples, parts.validation.num_examples) == (40, 10)
    train, held_out = (sorted(pair for row in part for pair in pairs(row)) for part in parts)
    assert sorted(train + held_out) == all_pairs(dataset)
    batches = list(validation_batches(parts.validation, 4))
    assert sorted(pair for batch in batches for pair in pairs(batch)) == held_out
    assert batches[-1]["segment_ids"].shape == (4, SEQ_LEN) and not batches[-1]["segment_ids"][-1].any()
    other = split(dataset, SEQ_LEN, held_out=examples_of([5, 5]))
    assert (other.train.num_examples, other.validation.num_examples) == (50, 2)


def test_what_is_too_long_is_cut_or_left_out_and_counted(caplog):
    dataset = examples_of([5, SEQ_LEN + 1, SEQ_LEN + 9, 4])
    with caplog.at_level(logging.WARNING, "jaxchunk.data"):
        rows = split(dataset, SEQ_LEN, held_out=dataset).train
    assert "of 4 examples 1 are longer than the 13 tokens of a sequence and are cut at its end, 0 more" in caplog.text
    expected = [pair for pair in all_pairs(dataset) if not 200 + SEQ_LEN < pair[1] < 300]
    assert sorted(pair for row in rows for pair in pairs(row)) == expected
    caplog.clear()
    dataset = examples_of([20, 30, 25], prompt=SEQ_LEN + 1)
    dataset.examples.learnt[3] = True
    with caplog.at_level(logging.WARNING, "jaxchunk.data"):
        assert split(dataset, SEQ_LEN, held_out=dataset).train.num_examples == 1
    assert "1 are longer" in caplog.text and "2 more are left out" in caplog.text
    dataset.examples.learnt[3] = False
    with pytest.raises(InputError, match="no example has anything to learn within its first 13 tokens"):
        split(dataset, SEQ_LEN, held_out=dataset)


def test_one_example_cannot_be_split():
    with pytest.raises(InputError, match="one to train on and one to validate on"):
        split(examples_of([5]), SEQ_LEN)
