"""Can the judges be trusted? Of every question the right answer must score 1, an empty one and the copied question 0."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from minglm.evals.benchmarks.question import Question, Unscorable
from minglm.tasks.sandbox import SandboxError
from minglm.tasks.task import Message, reply


class Check(NamedTuple):
    """One answer to one question. reward: None where it cannot be judged here, for `reason`."""

    question: Question
    answer: str
    reward: float | None
    wanted: float
    reason: str = ""

    @property
    def fails(self) -> bool:
        return self.reward is not None and self.reward != self.wanted


def answers_to(question: Question) -> Iterator[tuple[str, Sequence[Message], float]]:
    """Name, response and wanted reward."""
    if question.gold:
        yield "gold", question.gold, 1.0
    if question.thought:
        yield "gold with thinking", question.thought, 1.0
    yield "nothing", [], 0.0
    yield "empty", reply(" \n"), 0.0
    yield "copied question", reply(question.text), 0.0
    yield "copied last message", reply(str(question.messages[-1].get("content"))), 0.0


def self_test(questions: Iterable[Question]) -> Iterator[Check]:
    for question in questions:
        for name, response, wanted in answers_to(question):
            try:
                verdict = question.verify(response)
            except (Unscorable, SandboxError) as error:
                yield Check(question, name, None, wanted, str(error))
            else:
                yield Check(question, name, verdict.reward, wanted, "; ".join(verdict.reasons))


def summary(checks: Sequence[Check]) -> list[str]:
    """A line for each suite, and one for each check that fails."""
    lines = []
    for suite in dict.fromkeys(check.question.suite for check in checks):
        own = [check for check in checks if check.question.suite == suite]
        gold = [check for check in own if check.answer.startswith("gold")]
        right = sum(check.reward == 1 for check in gold)
        zeros = [check for check in own if not check.answer.startswith("gold") and check.reward is not None]
        unjudged = len({check.question.id for check in own if check.reward is None})
        questions = len({check.question.id for check in own})
        lines.append(
            f"{suite:24}{questions:5} questions   gold {right}/{len(gold)}   "
            f"empty and copied 0: {sum(check.reward == 0 for check in zeros)}/{len(zeros)}"
            + (f"   {unjudged} cannot be judged here" if unjudged else "")
        )
    for check in checks:
        if check.fails:
            place = check.question.place or f"{check.question.suite} {check.question.id}"
            lines.append(f"FAILS  {place}: {check.answer} scores {check.reward}; wanted {check.wanted}; {check.reason[:200]}")
    for reason in dict.fromkeys(check.reason for check in checks if check.reward is None):
        lines.append(f"not judged  {reason}")
    return lines
