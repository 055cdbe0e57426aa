"""What a request may write next: a budget for thinking, and a grammar.

Both look at ids alone, never at text: what a user types cannot become `<think>` or `</think>`, so it can neither open nor
close the thinking (sglang#33146). Both can be rolled back, which speculative decoding needs: drafts are constrained, too,
and some of them are then taken back.
"""

from typing import NamedTuple

from torch import Tensor

from minglm.engine.grammar import Matcher


class _Thinking(NamedTuple):
    is_open: bool
    used: int  # tokens of thinking so far, tags left out


class ThinkingBudget:
    """After `budget` tokens of thinking in this answer, the next token is `</think>`, and thinking opened again is closed
    at once."""

    def __init__(self, budget: int, prompt_ids: list[int], special_ids: dict[str, int]):
        self.budget = budget
        self.open_id, self.close_id = special_ids["<think>"], special_ids["</think>"]
        self._states = [_Thinking(self._opened_by(prompt_ids, special_ids.get("<|assistant|>")), 0)]

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
        state = self._states[-1]
        return state.is_open and state.used >= self.budget

    def advance(self, id: int) -> None:
        is_open, used = self._states[-1]
        if id == self.open_id:
            state = _Thinking(True, used)
        elif id == self.close_id:
            state = _Thinking(False, used)
        else:
            state = _Thinking(is_open, used + is_open)
        self._states.append(state)

    def rollback(self, count: int) -> None:
        if count:
            del self._states[-count:]


class Constraint:
    """A request's budget and grammar together. Where they disagree, the grammar wins: thinking then ends as soon as it may."""

    def __init__(self, thinking: ThinkingBudget | None, matcher: Matcher | None):
        self.thinking, self.matcher = thinking, matcher

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

    def rollback(self, count: int) -> None:
        """Take the last `count` ids back."""
        if self.thinking is not None:
            self.thinking.rollback(count)
        if self.matcher is not None:
            self.matcher.rollback(count)
