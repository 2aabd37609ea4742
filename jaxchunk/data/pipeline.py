"""Windows of the token stream, or packed examples, split, shuffled and batched through Grain."""

import logging
from typing import NamedTuple, SupportsIndex, TypeAlias

import grain
import grain.experimental
import numpy as np
from jaxtyping import Int32, Int64, UInt

from jaxchunk.data.dataset import Dataset
from jaxchunk.data.examples import Examples
from jaxchunk.data.packing import IGNORE_INDEX, PackedEpochs, PackedRows, fit_examples
from jaxchunk.errors import InputError

_logger = logging.getLogger("jaxchunk.data")

Batch: TypeAlias = dict[str, Int32[np.ndarray, "B S"]]
"""`tokens` and `labels`, and `segment_ids` where rows hold packed examples; C-contiguous."""

Window: TypeAlias = dict[str, Int32[np.ndarray, " S"]]

# One thread that stays a few batches ahead: a batch costs about a millisecond, and it shares its cores with
# the training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class TokenWindows:
    """A random-access source of training windows over a stream of tokens.

    Window i is `tokens[i*S : i*S + S + 1]`, given as its first S ids (`tokens`) and its last S (`labels`): each
    window starts with the last label of the one before, so every token but the very first is a label
    exactly once. Up to S - 1 tokens at the end that fill no window are left out.
    """

    def __init__(self, tokens: UInt[np.ndarray, " N"], seq_len: int):
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def __getitem__(self, index: SupportsIndex) -> Window:
        position = index.__index__()
        if not 0 <= position < len(self):
            raise IndexError(f"window {position} of {len(self)}")
        start = position * self.seq_len
        window = np.asarray(self.tokens[start : start + self.seq_len + 1], np.int32)
        return {"tokens": window[:-1], "labels": window[1:]}

    def __repr__(self) -> str:
        return f"TokenWindows({len(self)} of {self.seq_len} tokens)"


Rows: TypeAlias = TokenWindows | PackedRows


class Split(NamedTuple):
    """What is trained on and what is held out; they share no token and no example."""

    train: Rows
    validation: Rows


def split(
    dataset: Dataset, seq_len: int, validation_fraction: float = 0.05, *, held_out: Dataset | None = None
) -> Split:
    """Divides the data: a part is held out for validation, the rest is for training.

    Of a stream of tokens that is the last part. Where the dataset marks the ends of documents, the cut is moved back
    into the held-out part to the next such end (if there is one in its first half), so that no document is in both
    parts. Of examples it is some of them, from everywhere. Examples are packed; how many do not fit is told.

    Args:
      dataset: the tokens.
      seq_len: S, the number of labels in a window or row.
      validation_fraction: of the tokens or examples that is held out; never less than one window or example.
      held_out: data to validate on instead, all of it; then nothing of `dataset` is held out.

    Raises:
      InputError: an argument is out of range, or there is too little for a window or example in each part.
    """
    if seq_len < 1:
        raise InputError(f"the sequence length is {seq_len}: it needs to be at least 1")
    if not 0 < validation_fraction < 1:
        raise InputError(f"the validation fraction is {validation_fraction}: it needs to be between 0 and 1")
    if held_out is not None:
        return Split(_all_rows(dataset, seq_len), _all_rows(held_out, seq_len))
    if dataset.examples is not None:
        return _split_examples(dataset.examples, dataset.description, seq_len, validation_fraction)
    num_tokens, window = len(dataset.tokens), seq_len + 1
    if num_tokens < 2 * window:
        raise InputError(
            f"the data ({dataset.description}) has {num_tokens} tokens, but sequences of {seq_len} need at least "
            f"{2 * window} (a window of {window} to train on and one to validate on): "
            "give more text or a shorter sequence length"
        )
    num_held_out = int(np.clip(round(num_tokens * validation_fraction), window, num_tokens - window))
    cut = num_tokens - num_held_out
    if dataset.separator_id is not None:
        movable = dataset.tokens[cut - 1 : cut + min(num_held_out // 2, num_held_out - window)]
        ends = np.flatnonzero(movable == dataset.separator_id)
        cut += int(ends[0]) if ends.size else 0
    return Split(TokenWindows(dataset.tokens[:cut], seq_len), TokenWindows(dataset.tokens[cut:], seq_len))


def _all_rows(dataset: Dataset, seq_len: int) -> Rows:
    if dataset.examples is not None:
        return _pack(dataset.examples, np.arange(len(dataset.examples)), dataset.description, seq_len)
    if len(dataset.tokens) <= seq_len:
        raise InputError(
            f"the data ({dataset.description}) has {len(dataset.tokens)} tokens, but a sequence of {seq_len} takes "
            f"{seq_len + 1}: give more text or a shorter sequence length"
        )
    return TokenWindows(dataset.tokens, seq_len)


def _split_examples(examples: Examples, description: str, seq_len: int, validation_fraction: float) -> Split:
    count = len(examples)
    if count < 2:
        raise InputError(f"{description}: give at least two, one to train on and one to validate on")
    order = np.random.default_rng(0).permutation(count)  # whatever the run's seed, so that runs can be compared
    num_held_out = int(np.clip(round(count * validation_fraction), 1, count - 1))
    held_out, train = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return Split(
        _pack(examples, train, description, seq_len), _pack(examples, held_out, f"held out of {description}", seq_len)
    )


def _pack(examples: Examples, chosen: np.ndarray, description: str, seq_len: int) -> PackedRows:
    fitting, num_cut, num_left_out = fit_examples(examples, chosen, seq_len)
    if num_cut or num_left_out:
        _logger.warning(
            "%s: of %d examples %d are longer than the %d tokens of a sequence and are cut at its end, %d more are "
            "left out because nothing to be learnt is within them",
            *(description, len(chosen), num_cut, seq_len + 1, num_left_out),
        )
    return PackedRows(examples, seq_len, fitting)


def train_batches(
    windows: Rows, batch_size: int, seed: int, rows: Int64[np.ndarray, " rows"] | None = None
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over shuffled batches, prepared on a background thread.

    Every window or example comes once in each epoch, in an order that depends on the seed and the epoch alone (examples
    are packed anew in each, in that order); a batch may hold the end of one epoch and the start of the next, so there
    may be fewer windows than rows. `get_state()` gives a small JSON-serialisable dict after any batch, and
    `set_state()` on an iterator made with the same arguments continues with exactly the batch that would have come
    next.

    Args:
      windows: the source, at least one window.
      batch_size: B, the number of windows in a batch.
      seed: of the shuffle, any integer from 0.
      rows: which windows of each batch to load, where other processes load the others; None for all of them. The
        order of all of them, and the state, do not depend on it.

    Raises:
      InputError: an argument is out of range.
    """
    _check_batching(windows, batch_size)
    if seed < 0:
        raise InputError(f"the seed is {seed}: it needs to be 0 or larger")
    if isinstance(windows, PackedRows):
        packed = PackedEpochs(windows, seed).batch(batch_size, drop_remainder=True)
        if rows is not None:
            packed = packed.map(lambda batch: {name: values[rows] for name, values in batch.items()})
        buffer_size = _READ_OPTIONS.prefetch_buffer_size
        return iter(grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=buffer_size))
    # Grain shuffles epoch e with seed + e, so that run 1 would repeat run 0 one epoch late. Hash the seed first.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    own = np.arange(batch_size) if rows is None else rows

    def load(chosen: np.ndarray) -> Batch:
        return _stack_and_pad([windows[i] for i in chosen[own]], len(own), windows[0])

    batches = (
        grain.MapDataset.range(len(windows))
        .shuffle(seed=shuffle_seed)
        .repeat()
        # Nothing remains of an endless stream; but without this, batches of one overflow Grain's length.
        .batch(batch_size, drop_remainder=True)
        .map(load)
    )
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


def validation_batches(
    windows: Rows, batch_size: int, max_batches: int | None = None, rows: Int64[np.ndarray, " rows"] | None = None
) -> grain.IterDataset[Batch]:
    """Returns the held-out batches, to be iterated over as often as needed.

    Every window comes once and in order. The last batch is filled up with rows whose labels are all
    `IGNORE_INDEX`, so that all batches have one shape.

    Args:
      windows: the source, at least one window.
      batch_size: B, the number of rows in a batch.
      max_batches: give at most so many batches, of windows spread evenly over all; None for all.
      rows: which of the rows of each batch to load; None for all of them.

    Raises:
      InputError: an argument is out of range.
    """
    _check_batching(windows, batch_size)
    if max_batches is not None and max_batches < 1:
        raise InputError(f"the number of validation batches is {max_batches}: it needs to be at least 1")
    total = len(windows)
    chosen = total if max_batches is None else min(total, max_batches * batch_size)
    own = np.arange(batch_size) if rows is None else rows

    def load(places: np.ndarray) -> Batch:
        mine = [windows[i * total // chosen] for i in places[own[own < len(places)]]]
        return _stack_and_pad(mine, len(own), windows[0])

    batches = grain.MapDataset.range(chosen).batch(batch_size).map(load)
    return batches.to_iter_dataset(_READ_OPTIONS)


def _stack_and_pad(rows: list[Window], batch_size: int, like: Window) -> Batch:
    batch = {}
    for name, first in like.items():
        filler = IGNORE_INDEX if name == "labels" else 0
        batch[name] = np.full((batch_size, *first.shape), filler, np.int32)
        for value, row in zip(batch[name], rows, strict=False):
            value[:] = row[name]
    return batch


def _check_batching(windows: Rows, batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}: it needs to be at least 1")
    if isinstance(windows, TokenWindows) and len(windows) == 0:
        raise InputError(
            f"{len(windows.tokens)} tokens make no window of {windows.seq_len}: it takes {windows.seq_len + 1}"
        )
