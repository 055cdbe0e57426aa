"""The paged cache: keys and values in blocks, and one step's view of it, which is what the model attends through.

The tokens of all sequences of a step lie side by side in one row, (1, n): the model's products see one batch of tokens and
no padding. Only attention must know whose they are. It works on groups: sequences with equally many new tokens and about
equally many old ones form a rectangle.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minglm import ops
from minglm.config import GLMConfig
from minglm.model import Rotary


class PagedCache:
    """keys and values: (layers, blocks * block_size, kv_heads, d). `table` (rows, blocks of a sequence) int64 says which
    blocks a running sequence has; a token at position p of row r has slot table[r, p // block_size] * block_size + p %
    block_size in every layer.

    `hidden` (slots, h), only `with_mtp`: the trunk's states, from which the MTP layer goes on. That layer is one more of
    the layers here: its entry for the state at p and the token at p + 1 has the slot of p + 1, so that an entry depends on
    no token beyond its own and prefixes can be shared. Position 0 therefore has none.
    """

    def __init__(
        self,
        config: GLMConfig,
        layers: int,
        num_blocks: int,
        block_size: int,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        with_mtp: bool = False,
    ):
        shape = (layers, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.hidden = torch.zeros(shape[1], config.hidden_size, device=device, dtype=dtype) if with_mtp else None
        self.inverse_frequencies = Rotary.inverse_frequencies(config, device)
        self.block_size = block_size
        self.table = np.zeros((rows, num_blocks), dtype=np.int64)

    @staticmethod
    def bytes_of_block(config: GLMConfig, layers: int, block_size: int, dtype: torch.dtype, with_mtp: bool) -> int:
        """Memory of one block in all layers."""
        values = 2 * layers * config.num_key_value_heads * config.head_dim + with_mtp * config.hidden_size
        return values * block_size * dtype.itemsize

    def view(self, rows: list[int], starts: list[int], counts: list[int], first_key: int = 0) -> "CacheView":
        """For a pass over counts[i] tokens from position starts[i] on of the sequence in row rows[i]."""
        return CacheView(self, np.array(rows), np.array(starts), np.array(counts), first_key)

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The slot of each (row, position), (n,) int64."""
        return self.table[rows, positions // self.block_size] * self.block_size + positions % self.block_size


class Group(NamedTuple):
    """`size` sequences of `width` new tokens each, at `tokens` of the step's row."""

    tokens: slice
    size: int
    width: int
    blocks: Tensor | None  # (size * blocks of a sequence,) int64; None: nothing lies before the new tokens
    visible: Tensor | None  # (size, 1, width, keys) bool


class CacheView:
    """One step's `minglm.model.Cache`: sequence i has `counts[i]` new tokens from position `starts[i]` on, and table row
    `rows[i]`; all (sequences,) int64.

    `first_key`: earlier positions hold nothing (1 for the MTP layer). `order` lists the sequences as they lie in the step's
    row; `token_rows`, `positions` and `token_slots` (`slots`, as a tensor) are of its tokens, `ends` (sequences,) the index of
    each one's last token, in `order`.
    """

    def __init__(self, cache: PagedCache, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, first_key: int = 0):
        self.cache = cache
        self.first_key = first_key
        self.order = np.lexsort((starts, counts)) if len(rows) > 1 else np.zeros(1, dtype=np.int64)
        rows, starts, counts = rows[self.order], starts[self.order], counts[self.order]
        self.ends = counts.cumsum() - 1
        if len(rows) == counts.sum():  # decoding: one token each
            self.token_rows, self.positions = rows, starts
        else:
            self.token_rows = rows.repeat(counts)
            self.positions = starts.repeat(counts) + np.arange(counts.sum()) - (self.ends + 1 - counts).repeat(counts)
        self.device = cache.keys.device
        self.token_slots = cache.slots(self.token_rows, self.positions)
        self._sequences = rows, starts, counts

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @functools.cached_property
    def slots(self) -> Tensor:
        return self._tensor(self.token_slots)

    @functools.cached_property
    def groups(self) -> list[Group]:
        return list(self._grouped())

    def _grouped(self) -> Iterator[Group]:
        """Neighbours of equal count share a group, as long as padding to the longest costs less than a group of its own."""
        rows, starts, counts = self._sequences
        size = self.cache.block_size
        lengths = (starts + counts + size - 1) // size  # blocks
        first, token = 0, 0
        while first < len(rows):
            last = first + 1
            while last < len(rows) and counts[last] == counts[first] and self._worth(lengths[first : last + 1]):
                last += 1
            width, members = int(counts[first]), slice(first, last)
            tokens = slice(token, token + width * (last - first))
            if starts[last - 1] <= self.first_key and width > 1 and starts[first] == starts[last - 1]:
                yield Group(tokens, last - first, width, None, None)
            else:
                blocks = self.cache.table[rows[members], : lengths[last - 1]]
                keys = np.arange(blocks.shape[1] * size)
                visible = keys <= self.positions[tokens].reshape(last - first, 1, width, 1)
                if self.first_key:
                    visible &= keys >= self.first_key
                yield Group(tokens, last - first, width, self._tensor(blocks.reshape(-1)), self._tensor(visible))
            first, token = last, tokens.stop

    @staticmethod
    def _worth(lengths: np.ndarray) -> bool:
        """Whether the sequence of the last length (they ascend) should join those before it."""
        return lengths[0] * 2 >= lengths[-1] or (lengths[-1] - lengths[:-1]).sum() <= 64

    def begin(self, t: int) -> Rotary:
        return Rotary.turned(self._tensor(self.positions), self.cache.inverse_frequencies)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(0, self.slots, k[0].to(keys.dtype))
        values.index_copy_(0, self.slots, v[0].to(keys.dtype))
        outs = [self._attend_group(group, q, k, v, keys, values) for group in self.groups]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _attend_group(self, group: Group, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = q[:, group.tokens].view(group.size, group.width, *q.shape[2:])
        if group.blocks is None:
            k, v = (x[:, group.tokens].reshape(group.size, group.width, *x.shape[2:]).to(keys.dtype) for x in (k, v))
        else:
            shape = (group.size, -1, *k.shape[2:])
            k, v = (
                x.view(-1, self.cache.block_size * k.shape[2] * k.shape[3]).index_select(0, group.blocks).view(shape)
                for x in (keys, values)
            )
        return ops.attention(q, k.to(q.dtype), v.to(q.dtype), group.visible).reshape(1, -1, *q.shape[2:])

    def end(self, t: int) -> None:
        pass
