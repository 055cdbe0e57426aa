"""How documents become rows of one length. GLM-4.5 packs in two ways (paper, section 2.3):

- `Ring`: random truncation, in pre-training. Documents end to end, cut at the sequence length. No waste, and as each
  epoch cuts elsewhere, it doubles as augmentation.
- `Bins`: best fit, in mid-training (Ding et al., 2024). Whole documents, so that reasoning and repositories are not cut;
  what stays free at the end of a row is padding.

Both give for numbers of rows the same three arrays (`Rows`), in an order of their own in each epoch. Row n of an epoch is
a function of (seed, epoch, n) alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from minglm.data.shards import Split

IGNORED = -100  # the label that the loss leaves out
PADDING = -1  # the document id of padding

TRUNCATE, BEST_FIT = "truncate", "best_fit"
PACKINGS = (TRUNCATE, BEST_FIT)

MOST_WASTE = 0.015  # share of positions that best fit leaves empty rather than cut a document
WINDOW = 2**17  # documents that are packed together: more would save no room, but take longer


class Rows(NamedTuple):
    """What `minglm.data.stream.Batch` says of its tensors, as arrays (rows, sequence): int64, int64, int32."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray


def draws(seed: int, epoch: int) -> np.random.Philox:
    # Philox is keyed by exactly these two numbers, and NumPy promises that its raw draws never change
    # (`Generator.permutation` may, and with it the data of a run that is resumed).
    return np.random.Philox(key=seed + (epoch << 64))


# ---- random truncation


class Ring:
    """Documents laid end to end as a ring of N tokens, cut into ceil(N / sequence_length) sequences.

    (seed, epoch) decides the order of the documents, where the first cut is, and the order in which the sequences are
    dealt: neighbours on the ring are often parts of one long document. So every token is an input once an epoch, except
    that the last sequence ends with fewer than sequence_length tokens that the first begins with.
    """

    def __init__(self, split: Split, documents: np.ndarray, sequence_length: int, seed: int):
        self.num_tokens = int(split.lengths[documents].sum())
        self.rows_per_epoch = -(-self.num_tokens // sequence_length)
        self._split, self._documents, self._sequence_length, self._seed = split, documents, sequence_length, seed
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # two, for batches across the border of epochs

    @property
    def waste(self) -> float:
        """Share of positions that are padding."""
        return 0.0

    def rows(self, epoch: int, numbers: np.ndarray) -> Rows:
        """Rows `numbers` (int64 (rows,), each below `rows_per_epoch`) of this epoch."""
        line, start, order = self._epoch(epoch)
        places = start + order[numbers, None] * self._sequence_length + np.arange(self._sequence_length + 1)
        return rows_of(*line.read(places % line.ends[-1]))

    def _draw_epoch(self, epoch: int) -> tuple["Line", int, np.ndarray]:
        """The documents in their order, where on the line the first cut is, and which cut is dealt when."""
        draw = draws(self._seed, epoch).random_raw
        line = Line(self._split, self._documents[np.argsort(draw(len(self._documents)), kind="stable")])
        return line, draw() % self.num_tokens, np.argsort(draw(self.rows_per_epoch), kind="stable")


class Line:
    """Documents laid end to end."""

    def __init__(self, split: Split, documents: np.ndarray):
        lengths = split.lengths[documents]
        self.split = split
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.shifts = split.offsets[documents] - self.starts  # from a place on the line to the position in the shards

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens at `places`, int64, and whether each is the first of its document; both of the shape of `places`."""
        document = np.searchsorted(self.ends, places, side="right")
        return self.split.tokens_at(places + self.shifts[document]), places == self.starts[document]


def rows_of(tokens: np.ndarray, is_first: np.ndarray) -> Rows:
    """Rows from (rows, sequence + 1) tokens and whether each is the first of its document."""
    document_ids = np.cumsum(is_first[:, :-1], axis=1, dtype=np.int32)
    return Rows(
        input_ids=np.ascontiguousarray(tokens[:, :-1]),
        labels=np.where(is_first[:, 1:], IGNORED, tokens[:, 1:]),
        document_ids=document_ids - is_first[:, :1],  # counted from 0, even where a row begins one
    )


# ---- best fit


class Bins:
    """Whole documents in rows, each put where it leaves the least room (best fit decreasing).

    A document longer than a row is cut into pieces of a row's length; what is left at its end is packed like a document.
    Where whole documents would leave more than `MOST_WASTE` empty, as those do that are all just over half a row long, the
    emptiest rows are given up, and theirs are cut to fill the others, no more of them than that takes.
    Every token is an input exactly once an epoch. Documents do not see their neighbours, so it does not matter which ones
    share a row: they are packed once, and each epoch deals the same rows in another order.
    """

    def __init__(self, split: Split, documents: np.ndarray, sequence_length: int, seed: int, padding_id: int):
        self.num_tokens = int(split.lengths[documents].sum())
        self._split, self._sequence_length, self._seed, self._padding_id = split, sequence_length, seed, padding_id
        self._documents = documents
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def rows_per_epoch(self) -> int:
        return len(self._packed.first_piece) - 1

    @property
    def waste(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.num_tokens / (self.rows_per_epoch * self._sequence_length)

    def rows(self, epoch: int, numbers: np.ndarray) -> Rows:
        """Rows `numbers` (int64 (rows,), each below `rows_per_epoch`) of this epoch."""
        packed, size = self._packed, self._sequence_length
        chosen = self._order(epoch)[numbers]
        counts = packed.first_piece[chosen + 1] - packed.first_piece[chosen]  # pieces of each row
        pieces = _ranges(packed.first_piece[chosen], counts)
        row, number_in_row = np.repeat(np.arange(len(chosen)), counts), _ranges(np.zeros_like(counts), counts)
        lengths = packed.lengths[pieces]
        starts = np.cumsum(lengths) - lengths  # of the pieces, were the rows laid end to end without padding
        column = starts - starts[np.cumsum(counts) - counts][row]

        where = np.repeat(row * size + column, lengths) + _ranges(np.zeros_like(lengths), lengths)
        positions = _ranges(packed.starts[pieces], lengths)
        ends = np.repeat(packed.ends[pieces], lengths)  # where the whole document ends
        tokens, following = self._split.tokens_at(positions), self._split.tokens_at(np.minimum(positions + 1, ends - 1))
        rows = Rows(
            np.full((len(chosen), size), self._padding_id),
            np.full((len(chosen), size), IGNORED),
            np.full((len(chosen), size), PADDING, np.int32),
        )
        rows.input_ids.reshape(-1)[where] = tokens
        rows.labels.reshape(-1)[where] = np.where(positions + 1 < ends, following, IGNORED)
        rows.document_ids.reshape(-1)[where] = np.repeat(number_in_row, lengths)
        return rows

    @cached_property
    def _packed(self) -> "_Pieces":
        documents = self._documents[np.argsort(draws(self._seed, 0).random_raw(len(self._documents)), kind="stable")]
        starts, lengths, ends = _cut(self._split, documents, self._sequence_length)
        windows, num_rows = [], 0
        for first in range(0, len(starts), WINDOW):
            window = slice(first, first + WINDOW)
            items, offsets, parts, rows = pack(lengths[window], self._sequence_length)
            windows.append((starts[window][items] + offsets, parts, ends[window][items], num_rows + rows))
            num_rows += int(rows.max()) + 1
        starts, lengths, ends, rows = map(np.concatenate, zip(*windows, strict=True))
        by_row = np.argsort(rows, kind="stable")
        first_piece = np.searchsorted(rows[by_row], np.arange(num_rows + 1))
        return _Pieces(starts[by_row], lengths[by_row], ends[by_row], first_piece)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.argsort(draws(self._seed, epoch).random_raw(self.rows_per_epoch), kind="stable")


@dataclass(frozen=True)
class _Pieces:
    """Parts of documents sorted by the row that holds them; int64, positions in the split."""

    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray  # of the document
    first_piece: np.ndarray  # (rows + 1,): row r holds the pieces first_piece[r] to first_piece[r + 1]


def _cut(split: Split, documents: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and end of document of the pieces of at most `size` tokens, document after document."""
    offsets, lengths = split.offsets[documents], split.lengths[documents]
    pieces = -(-lengths // size)
    ends = np.repeat(offsets + lengths, pieces)
    starts = np.repeat(offsets, pieces) + size * _ranges(np.zeros_like(pieces), pieces)
    return starts, np.minimum(ends - starts, size), ends


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., `count` numbers from each start, one range after the other; int64."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


class Parts(NamedTuple):
    """Items, or parts of them, in rows; int64, all of one length."""

    items: np.ndarray
    offsets: np.ndarray  # where in its item the part begins
    lengths: np.ndarray
    rows: np.ndarray


def pack(lengths: np.ndarray, size: int) -> Parts:
    """Items of 1 to `size` tokens in rows of `size`: whole by best fit, but with no more waste than `MOST_WASTE` or one row.

    lengths: int64 (items,).
    """
    rows, total = best_fit(lengths, size), int(lengths.sum())
    num_rows = int(rows.max()) + 1
    kept = max(-(-total // size), int(total / ((1 - MOST_WASTE) * size)))
    if num_rows <= kept:
        return Parts(np.arange(len(lengths)), np.zeros_like(lengths), lengths, rows)
    used = np.bincount(rows, lengths).astype(np.int64)
    emptiest = np.argsort(used, kind="stable")
    given_up, others = np.split(emptiest, [num_rows - kept])
    new_number = np.full(num_rows, -1)
    new_number[others] = np.arange(kept)  # by the room that they have, the most first: the largest parts go there
    whole, loose = np.flatnonzero(new_number[rows] >= 0), np.flatnonzero(new_number[rows] < 0)

    # The loose items and the rooms, each laid end to end: an item is cut where a room ends.
    item_ends, room_ends = np.cumsum(lengths[loose]), np.cumsum(size - used[others])
    cuts = np.unique(np.concatenate([[0], item_ends, room_ends[room_ends < item_ends[-1]]]))
    begins = cuts[:-1]
    which = np.searchsorted(item_ends, begins, side="right")
    return Parts(
        np.concatenate([whole, loose[which]]),
        np.concatenate([np.zeros_like(whole), begins - (item_ends - lengths[loose])[which]]),
        np.concatenate([lengths[whole], np.diff(cuts)]),
        np.concatenate([new_number[rows[whole]], np.searchsorted(room_ends, begins, side="right")]),
    )


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row of each item, int64 (items,): from the longest down, each goes where it leaves the least room.

    lengths: int64 (items,), each from 1 to `size`. Time: items times size / 64, in words of a big integer.
    """
    rows = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the room that they have left
    some = 0  # bit r is set where with_room[r] has rows
    num_rows = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                some &= ~(1 << room)
        else:
            room, row, num_rows = size, num_rows, num_rows + 1
        rows[item] = row
        if room > length:
            with_room[room - length].append(row)
            some |= 1 << (room - length)
    return rows


# ---- held-out text


def line_in_rows(line: Line, shape: tuple[int, int], num_tokens: int, padding_id: int) -> Iterator[Rows]:
    """The first `num_tokens` of a line in batches of `shape` (rows, sequence); what is left over at the end is padding."""
    num_rows, size = shape
    batch_places = np.arange(num_rows)[:, None] * size + np.arange(size + 1)  # (rows, sequence + 1)
    for first in range(0, num_tokens, num_rows * size):
        places = first + batch_places
        rows = rows_of(*line.read(places % line.ends[-1]))
        padding = places[:, :-1] >= num_tokens
        rows.input_ids[padding], rows.labels[padding], rows.document_ids[padding] = padding_id, IGNORED, PADDING
        yield rows
