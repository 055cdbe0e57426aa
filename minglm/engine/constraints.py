"""What a request may write next: a budget for thinking, and a grammar.

Both look at ids alone, never at text: what a user types cannot become `<think>` or `</think>`, so it can neither open nor
close the thinking (sglang#33146). Both can be forked, which speculative decoding needs: drafts are constrained, too, and
some of them do not hold.
"""

import copy

from torch import Tensor

from minglm.engine.grammar import Matcher


class ThinkingBudget:
    """After `budget` tokens of thinking in this answer, the next token is `</think>`, and thinking opened again is closed
    at once. Tags are not counted."""

    def __init__(self, budget: int, prompt_ids: list[int], special_ids: dict[str, int]):
        self.left = budget
        self.open_id, self.close_id = special_ids["<think>"], special_ids["</think>"]
        self.is_open = self._opened_by(prompt_ids, special_ids.get("<|assistant|>"))

    def _opened_by(self, prompt_ids: list[int], assistant_id: int | None) -> bool:
        """Whether the prompt ends inside the thinking of the turn that the model is to go on with."""
        for id in reversed(prompt_ids):
            if id in (self.open_id, self.close_id):
                return id == self.open_id
            if id == assistant_id:
                break
        return False

    @property
    def must_close(self) -> bool:
        return self.is_open and self.left <= 0

    def advance(self, id: int) -> None:
        if id in (self.open_id, self.close_id):
            self.is_open = id == self.open_id
        else:
            self.left -= self.is_open


class Constraint:
    """A request's budget and grammar together. Where they disagree, the grammar wins: thinking then ends as soon as it may."""

    def __init__(self, thinking: ThinkingBudget | None, matcher: Matcher | None):
        self.thinking, self.matcher = thinking, matcher

    def fork(self) -> "Constraint":
        """The same place, to try something."""
        return Constraint(copy.copy(self.thinking), None if self.matcher is None else self.matcher.fork())

    def hide(self, logits: Tensor) -> None:
        """Put -inf where a token may not follow: logits (v,), in place."""
        if self.matcher is not None:
            self.matcher.hide(logits)
        if self.thinking is not None and self.thinking.must_close:
            kept = logits[self.thinking.close_id].clone()
            if kept > float("-inf"):
                logits.fill_(float("-inf"))
                logits[self.thinking.close_id] = kept

    def advance(self, id: int) -> None:
        """`id` follows."""
        if self.thinking is not None:
            self.thinking.advance(id)
        if self.matcher is not None:
            self.matcher.advance(id)
