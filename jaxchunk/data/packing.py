"""Examples packed into rows: several share a row, and none sees another."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int32, Integer, UInt32

from jaxchunk.data.examples import Examples
from jaxchunk.errors import InputError

IGNORE_INDEX = -100
"""The label of a position that no loss should count."""

Row = dict[str, Int32[np.ndarray, " S"]]


def best_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Packs items into rows, each where it leaves the least room, in the order in which they come (arXiv:2404.10830).

    Args:
      lengths: of the items, each from 1 to `capacity`.
      capacity: of a row.

    Returns:
      The numbers of the items in each row. About a microsecond an item.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    rooms = 0  # bit r is set where a row has room for exactly r more
    for item, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


class PackedRows:
    """A random-access source of rows with whole examples in them.

    An example of n tokens takes n - 1 positions: its first n - 1 tokens, each with the next one as its label, or
    `IGNORE_INDEX` where that is not to be learnt. So no label is the first token of another example. `segment_ids`
    count the examples of a row from 1; the rest of a row has 0, token 0, and nothing to learn. Longer examples are cut.
    """

    def __init__(self, examples: Examples, seq_len: int, chosen: Sequence[int] | np.ndarray):
        """Packs examples in the order of `chosen`.

        Args:
          examples: all of them.
          seq_len: S, positions in a row.
          chosen: the numbers of those to pack, each with something to learn in its first S + 1 tokens.
        """
        self.examples = examples
        self.seq_len = seq_len
        self._chosen = np.asarray(chosen)
        lengths = np.minimum(np.diff(examples.starts)[self._chosen] - 1, seq_len)
        self._rows = best_fit(lengths.tolist(), seq_len)
        self.num_positions = int(lengths.sum())

    @property
    def num_examples(self) -> int:
        """Examples that are packed."""
        return len(self._chosen)

    @property
    def efficiency(self) -> float:
        """Share of all positions that hold a token of an example."""
        return self.num_positions / max(1, len(self) * self.seq_len)

    def prompts(self, count: int) -> list[UInt32[np.ndarray, " P"]]:
        """What comes before the answer in the first `count` examples."""
        return [self.examples.prompt(int(example)) for example in self._chosen[:count]]

    def reordered(self, seed: int) -> "PackedRows":
        """The same examples packed anew, in an order that follows from the seed."""
        order = np.random.default_rng(seed).permutation(len(self._chosen))
        packed = PackedRows(self.examples, self.seq_len, self._chosen[order])
        # Rows that are opened late hold what was left over: they must not all be at the end of an epoch.
        np.random.default_rng([seed, 1]).shuffle(packed._rows)
        return packed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        row = self._rows[index.__index__()]
        tokens, segment_ids = np.zeros((2, self.seq_len), np.int32)
        labels = np.full(self.seq_len, IGNORE_INDEX, np.int32)
        position = 0
        for segment, example in enumerate(self._chosen[row], 1):
            start, end = self.examples.starts[example : example + 2]
            end = min(end, start + self.seq_len + 1)
            own = self.examples.tokens[start:end].astype(np.int32)
            place = slice(position, position := position + len(own) - 1)
            tokens[place] = own[:-1]
            labels[place] = np.where(self.examples.learnt[start + 1 : end], own[1:], IGNORE_INDEX)
            segment_ids[place] = segment
        return {"tokens": tokens, "labels": labels, "segment_ids": segment_ids}

    def __repr__(self) -> str:
        return f"PackedRows({self.num_examples} examples in {len(self)} rows of {self.seq_len} positions)"


def fit_examples(examples: Examples, chosen: Integer[np.ndarray, " E"], seq_len: int) -> tuple[np.ndarray, int, int]:
    """Sorts out what sequences of `seq_len` have room for.

    Returns:
      The numbers of the examples that can be learnt from; how many of these are cut at the end; how many are left
      out, because they are cut before anything that is to be learnt.

    Raises:
      InputError: none is left.
    """
    starts = examples.starts[chosen]
    lengths = np.diff(examples.starts)[chosen]
    learnt_before = np.concatenate([[0], np.cumsum(examples.learnt)])
    usable = learnt_before[starts + np.minimum(lengths, seq_len + 1)] > learnt_before[starts]
    if not usable.any():
        raise InputError(
            f"no example has anything to learn within its first {seq_len + 1} tokens: prompts are as long as that; "
            "give a longer sequence length"
        )
    return chosen[usable], int((lengths[usable] > seq_len + 1).sum()), int((~usable).sum())


class PackedEpochs(grain.IterDataset):
    """Endless rows: in every epoch each example once, in rows that are packed anew in an order of its own."""

    def __init__(self, rows: PackedRows, seed: int):
        super().__init__()
        self._rows = rows
        self._seed = seed

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self._rows, self._seed)


class _PackedIterator(grain.DatasetIterator):
    """Its state is the epoch and the row in it; the packing of an epoch follows from the seed."""

    def __init__(self, rows: PackedRows, seed: int):
        super().__init__()
        self._epoch, self._row = 0, 0
        self._packed = functools.lru_cache(maxsize=1)(
            lambda epoch: rows.reordered(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        )

    def __next__(self) -> Row:
        rows = self._packed(self._epoch)
        if self._row == len(rows):
            self._epoch, self._row = self._epoch + 1, 0
            rows = self._packed(self._epoch)
        self._row += 1
        return rows[self._row - 1]

    def get_state(self) -> dict[str, Any]:
        """Epoch and row."""
        return {"epoch": self._epoch, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was asked."""
        self._epoch, self._row = state["epoch"], state["row"]
