"""Who runs in the next step, and with how many tokens: continuous batching with chunked prefill and preemption.

A step has a budget of tokens. Sequences that decode come first, so that a long prompt never makes them wait; prompts get
the rest, in pieces if need be. When no block is free for a token, the youngest sequence gives all of its blocks back and
waits to be computed again: the oldest one always gets on.
"""

from collections import deque
from typing import NamedTuple

from minglm.engine.blocks import BlockManager, digest
from minglm.engine.sequence import Sequence


class Scheduled(NamedTuple):
    """`sequence` is to compute `count` tokens from position `start` on in this step; the last `drafts` are still to be
    drafted."""

    sequence: Sequence
    count: int
    drafts: int = 0
    start: int = 0

    @property
    def samples(self) -> bool:
        """Whether this step brings the sequence to its end, where the next token is drawn."""
        return self.start + self.count - self.drafts == len(self.sequence.ids)


class Scheduler:
    """Owns the queue of waiting sequences, the running ones in the order of their arrival, and the blocks."""

    def __init__(self, blocks: BlockManager, max_batch_tokens: int, max_running: int, draft_tokens: int):
        self.blocks = blocks
        self.max_batch_tokens, self.max_running, self.draft_tokens = max_batch_tokens, max_running, draft_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_rows = list(range(max_running))[::-1]
        self.preemptions = self.prefix_hits = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.blocks.block_size)

    def schedule(self) -> list[Scheduled]:
        """The next step's work; empty only when nothing waits or runs."""
        budget, chosen, preemptions = self.max_batch_tokens, [], self.preemptions
        for sequence in [s for s in self.running if s.pending == 1]:
            if budget and sequence.row >= 0:  # not preempted meanwhile
                drafts = self._drafts(sequence, budget)
                if self._reserve(sequence, len(sequence.ids) + drafts):
                    chosen.append(Scheduled(sequence, 1 + drafts, drafts, sequence.computed))
                    budget -= 1 + drafts
        for sequence in [s for s in self.running if s.pending > 1]:
            count = min(sequence.pending, budget)
            if count:
                chosen.append(Scheduled(sequence, count, start=sequence.computed))
                budget -= count
        while (
            budget
            and self.waiting
            and len(self.running) < self.max_running
            and self.preemptions == preemptions  # who just had to give way would come back and have to again
            and self._admit(self.waiting[0])
        ):
            sequence = self.waiting.popleft()
            count = min(sequence.pending, budget)
            chosen.append(Scheduled(sequence, count, start=sequence.computed))
            budget -= count
        return chosen

    def _drafts(self, sequence: Sequence, budget: int) -> int:
        """How many tokens are worth drafting: the last token of an answer is never fed, so none beyond it."""
        if not self.draft_tokens or len(sequence.ids) < 2:
            return 0
        drafts = min(self.draft_tokens, sequence.params.max_tokens - sequence.generated - 1, budget - 1)
        missing = self.blocks_for(len(sequence.ids) + drafts) - len(sequence.blocks)
        return max(0, drafts if missing <= len(self.blocks.free) else 0)

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for `tokens` tokens of a running sequence; younger ones give way, at last it does itself."""
        while len(sequence.blocks) < self.blocks_for(tokens):
            if self.blocks.free:
                sequence.blocks.append(self.blocks.allocate())
                continue
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if there are blocks for all of its tokens: those of a known prefix, and free ones."""
        shared, digests = [], []
        if not sequence.params.return_experts:  # the cache does not know which experts its tokens went to
            shared, digests = self.blocks.find(sequence.ids)
        needed = self.blocks_for(len(sequence.ids)) - len(shared)
        if needed > len(self.blocks.free) - sum(block in self.blocks.free for block in shared):
            return False
        for block in shared:
            self.blocks.share(block)
        sequence.blocks = shared + [self.blocks.allocate() for _ in range(needed)]
        sequence.digests = digests
        sequence.computed = len(shared) * self.blocks.block_size
        sequence.drafted = max(1, sequence.computed)
        sequence.row = self.free_rows.pop()
        self.prefix_hits += sequence.computed
        self.running.append(sequence)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue without blocks."""
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def remember(self, sequence: Sequence, complete: int) -> None:
        """The first `complete` tokens are in all caches: their full blocks can serve others from now on."""
        size = self.blocks.block_size
        while (end := (len(sequence.digests) + 1) * size) <= complete:
            key = digest(sequence.digests[-1] if sequence.digests else b"", sequence.ids[end - size : end])
            self.blocks.remember(sequence.blocks[end // size - 1], key)
            sequence.digests.append(key)

    def remove(self, sequence: Sequence) -> None:
        """It is finished or cancelled."""
        if sequence.row >= 0:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        self.free_rows.append(sequence.row)
        sequence.restart()

    def check(self) -> None:
        """Raises AssertionError where blocks, rows or sequences are lost or used twice."""
        self.blocks.check(sequence.blocks for sequence in self.running)
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self.free_rows) == list(range(self.max_running)), f"rows {rows}, free {self.free_rows}"
        assert all(not s.blocks and s.row < 0 for s in self.waiting), "a waiting sequence holds blocks"
        for s in self.running:
            assert s.computed < len(s.ids) <= len(s.blocks) * self.blocks.block_size + 1, f"request {s.request_id}"
