"""What a request may write next: thinking of no less than a token and no more than a budget, and a grammar.

All look at ids alone, never at text: what a user types cannot become `<think>` or `</think>`, so it can neither open nor
close the thinking (sglang#33146). All can be forked, which speculative decoding needs: drafts are constrained, too, and
some of them do not hold.
"""

import copy

from torch import Tensor

from minglm.engine.grammar import Matcher


def opened_by(prompt_ids: list[int], special_ids: dict[str, int]) -> bool:
    """Whether the prompt ends inside the thinking of the turn that the model is to go on with."""
    for id in reversed(prompt_ids):
        if id in (special_ids["<think>"], special_ids["</think>"]):
            return id == special_ids["<think>"]
        if id == special_ids.get("<|assistant|>"):
            break
    return False


class MustThink:
    """A thinking that the prompt has opened is not closed at once. The model that chooses for itself opens one, too, where it
    answers at once, and closes it again: without this, asking it to think would leave it the same choice."""

    def __init__(self, prompt_ids: list[int], special_ids: dict[str, int]):
        self.close_id = special_ids["</think>"]
        self.begins = opened_by(prompt_ids, special_ids)

    def advance(self, id: int) -> None:
        self.begins = False


class ThinkingBudget:
    """After `budget` tokens of thinking in this answer, the next token is `</think>`, and thinking opened again is closed
    at once. Tags are not counted."""

    def __init__(self, budget: int, prompt_ids: list[int], special_ids: dict[str, int]):
        self.left = budget
        self.open_id, self.close_id = special_ids["<think>"], special_ids["</think>"]
        self.is_open = opened_by(prompt_ids, special_ids)

    @property
    def must_close(self) -> bool:
        return self.is_open and self.left <= 0

    def advance(self, id: int) -> None:
        if id in (self.open_id, self.close_id):
            self.is_open = id == self.open_id
        else:
            self.left -= self.is_open


class Constraint:
    """A request's constraints together. Where they disagree, the grammar wins: thinking then ends as soon as it may. A budget
    of nothing wins against having to think."""

    def __init__(self, thinking: ThinkingBudget | None, matcher: Matcher | None, must_think: MustThink | None = None):
        self.thinking, self.matcher, self.must_think = thinking, matcher, must_think

    def fork(self) -> "Constraint":
        """The same place, to try something."""
        matcher = None if self.matcher is None else self.matcher.fork()
        return Constraint(copy.copy(self.thinking), matcher, copy.copy(self.must_think))

    def hide(self, logits: Tensor) -> None:
        """Put -inf where a token may not follow: logits (v,), in place."""
        if self.matcher is not None:
            self.matcher.hide(logits)
        if self.thinking is not None and self.thinking.must_close:
            kept = logits[self.thinking.close_id].clone()
            if kept > float("-inf"):
                logits.fill_(float("-inf"))
                logits[self.thinking.close_id] = kept
        elif self.must_think is not None and self.must_think.begins:
            kept = logits[self.must_think.close_id].clone()
            logits[self.must_think.close_id] = float("-inf")
            if logits.max() == float("-inf"):  # a grammar that allows nothing else
                logits[self.must_think.close_id] = kept

    def advance(self, id: int) -> None:
        """`id` follows."""
        for own in (self.thinking, self.must_think, self.matcher):
            if own is not None:
                own.advance(id)
