"""The blocks of the paged cache: which are free, who uses which, and which hold a prefix that others can share.

A block holds the keys and values of `block_size` consecutive tokens. A full block is known by a digest of all tokens up
to its end, so a new prompt that begins with the same tokens takes the block instead of computing it (prefix cache). Full
blocks never change, so sharing needs no copies. A block that nobody uses stays known until it is handed out again, the
longest unused first.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence


def digest(parent: bytes, ids: Sequence[int]) -> bytes:
    """SHA-256 of a block's tokens behind those of its parent's digest (b"" for the first block): equal prefixes only."""
    return hashlib.sha256(parent + array("q", ids).tobytes()).digest()


class BlockManager:
    """`num_blocks` blocks, numbered from 0. It knows nothing of sequences, only how many use a block."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.users = [0] * num_blocks
        self.free = dict.fromkeys(range(num_blocks))  # in the order in which they are handed out
        self.block_of_prefix: dict[bytes, int] = {}
        self.prefix_of_block: dict[int, bytes] = {}

    def allocate(self) -> int:
        """A block for new tokens; what it held is forgotten. Only when `free` is not empty."""
        block = next(iter(self.free))
        del self.free[block]
        self.users[block] = 1
        known = self.prefix_of_block.pop(block, None)
        if known is not None:
            del self.block_of_prefix[known]
        return block

    def share(self, block: int) -> None:
        """One user more for a block that holds a known prefix."""
        self.users[block] += 1
        self.free.pop(block, None)

    def release(self, blocks: Iterable[int]) -> None:
        """One user less for each block of a sequence, given in its order. Its end is handed out again before its start,
        which more prompts can share."""
        for block in reversed(list(blocks)):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free[block] = None

    def find(self, ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The known blocks that `ids` begin with, and their digests. One token at least is left to compute: its logits are
        wanted."""
        blocks, digests = [], []
        for end in range(self.block_size, len(ids), self.block_size):
            key = digest(digests[-1] if digests else b"", ids[end - self.block_size : end])
            if key not in self.block_of_prefix:
                break
            blocks.append(self.block_of_prefix[key])
            digests.append(key)
        return blocks, digests

    def remember(self, block: int, key: bytes) -> None:
        """`block` is full and holds the prefix `key` from now on, unless another block does."""
        if key not in self.block_of_prefix:
            self.block_of_prefix[key] = block
            self.prefix_of_block[block] = key

    def forget_prefixes(self) -> None:
        """After a change of weights: what the blocks hold is of no use to new prompts."""
        self.block_of_prefix.clear()
        self.prefix_of_block.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless `tables`, the blocks of all sequences, account for every use of every block."""
        users = [0] * len(self.users)
        for table in tables:
            assert len(set(table)) == len(table), f"a sequence uses a block twice: {table}"
            for block in table:
                users[block] += 1
        assert users == self.users, f"users of the blocks are {self.users}, but the sequences' tables say {users}"
        unused = {block for block, count in enumerate(users) if count == 0}
        assert unused == set(self.free), f"blocks {sorted(unused ^ set(self.free))} are leaked, or free and in use"
        assert {key: block for block, key in self.prefix_of_block.items()} == self.block_of_prefix
