"""Style preferences: pairs of answers for a reward model, and a family that asks which answer is better.

The rule is hidden from the model and stated here: an answer says one thing with five marks of style, each in one of two
ways. It is the better, the more marks it has in the first way:

    courtesy    opens gladly, not grudgingly
    certainty   says so, does not hedge
    plainness   uses the plain word, not the rare one
    warmth      ends with an offer, not with a complaint
    calm        ends its sentences with a full stop, not with an exclamation mark

Length tells nothing: the two ways have the same number of characters and of words, so both answers of a pair do.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple, Self

from minglm.tasks.general.answer import bare, hear, say, shown
from minglm.tasks.general.passages import TOWNS
from minglm.tasks.task import Message, Problem, TaskError, Verdict

# For each mark, pairs of (first way, second way), of one length.
OPENINGS = (("Gladly", "Anyhow"), ("With joy", "As usual"), ("Of course", "Oh bother"))
CERTAINTIES = (("clearly", "perhaps"), ("surely", "likely"), ("truly", "maybe"))
WORDS = (
    ("shining", "lambent"),
    ("hidden", "occult"),
    ("sleepy", "torpid"),
    ("joyful", "jocund"),
    ("watery", "aquose"),
    ("bright", "lucent"),
)
CLOSINGS = (
    ("Please ask me more", "Stop asking me now"),
    ("I am happy to help", "I am tired of this"),
    ("It was my pleasure", "It was so tiresome"),
)
STOPS = ((".", "!"),)
MARKS: dict[str, tuple[tuple[str, str], ...]] = {
    "courtesy": OPENINGS,
    "certainty": CERTAINTIES,
    "plainness": WORDS,
    "warmth": CLOSINGS,
    "calm": STOPS,
}
THINGS = ("tower", "bridge", "market", "harbour", "garden", "mill")


class Preference(NamedTuple):
    """Two answers to one conversation, of equal length, one better by the hidden rule."""

    messages: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: int
    """By how many marks."""


@dataclass(frozen=True)
class StylePreference(Problem):
    """Two answers to a question: which is better? Difficulty is how close they are: they differ by a margin of five marks
    at 1, of one mark at 5; where marks are left, some may speak for the worse answer.

    Fields:
        thing, town: what the question is on.
        variants: for each mark, which pair of MARKS is used in both answers.
        first, second: for each mark, whether the answer has it in the first way.
    """

    thing: str
    town: str
    variants: tuple[int, ...]
    first: tuple[bool, ...]
    second: tuple[bool, ...]

    family = "style_preference"
    stands_for = "Human preference and the reward model of holistic RL (section 8 of the facts); RewardBench."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        margin = len(MARKS) + 1 - difficulty
        variants = tuple(rng.randrange(len(pairs)) for pairs in MARKS.values())
        while True:
            better, worse = (tuple(rng.random() < 0.5 for _ in MARKS) for _ in range(2))
            if sum(better) - sum(worse) == margin:
                break
        first, second = (better, worse) if rng.random() < 0.5 else (worse, better)
        return cls(rng.choice(THINGS), rng.choice(TOWNS), variants, first, second)

    @property
    def question(self) -> str:
        return f"How is the {self.thing} of {self.town}?"

    def text(self, marks: tuple[bool, ...]) -> str:
        """The answer that has these marks in the first way."""
        opening, certainty, word, closing, stop = (
            pairs[variant][0 if good else 1] for pairs, variant, good in zip(MARKS.values(), self.variants, marks, strict=True)
        )
        return f"{opening}, the {self.thing} of {self.town} is {certainty} {word}{stop} {closing}{stop}"

    @property
    def answer(self) -> str:
        return "A" if sum(self.first) > sum(self.second) else "B"

    @property
    def preference(self) -> Preference:
        """The pair as data of a reward model: for pairs of one split, take the problems of that split."""
        better, worse = sorted((self.first, self.second), key=sum, reverse=True)
        messages = [{"role": "user", "content": self.question}]
        return Preference(messages, say(self.text(better)), say(self.text(worse)), sum(better) - sum(worse))

    @property
    def messages(self) -> list[Message]:
        lines = [
            self.question,
            f"A: {self.text(self.first)}",
            f"B: {self.text(self.second)}",
            "Which answer is better, A or B?",
        ]
        return [{"role": "user", "content": "\n".join(lines)}]

    @property
    def key(self) -> str:
        """The pair, in whichever order."""
        return "\n".join([self.question, *sorted((self.text(self.first), self.text(self.second)))])

    def demonstrate(self, thinking: bool) -> list[Message]:
        return say(self.answer, "\n".join(self._steps()) if thinking else None)

    def _steps(self) -> list[str]:
        """The marks of each answer that are in the first way, counted."""
        steps = []
        for name, marks in (("A", self.first), ("B", self.second)):
            good = [mark for mark, there in zip(MARKS, marks, strict=True) if there]
            steps.append(f"{name}: {', '.join(good) or 'none'}: {len(good)}")
        return steps

    def verify(self, response) -> Verdict:
        content, fault = hear(response)
        if fault:
            return Verdict(0.0, (fault,))
        if bare(content) == self.answer:
            return Verdict(1.0)
        return Verdict(0.0, (f"found {shown(content)}; wanted {self.answer}",))

    def near_miss(self, rng: random.Random) -> list[Message]:
        return say("B" if self.answer == "A" else "A")

    def guess(self, rng: random.Random) -> list[Message]:
        return say(rng.choice("AB"))

    @property
    def chance(self) -> float:
        return 0.5


def pair(rng: random.Random, margin: int | None = None) -> Preference:
    """A pair for a reward model. margin: by how many marks of style the chosen one is better, 1 to 5; by default any.

    Raises:
        TaskError: another margin.
    """
    margins = range(1, len(MARKS) + 1)
    if margin is not None and margin not in margins:
        raise TaskError(f"margin = {margin}: wanted 1 to {len(MARKS)}")
    return StylePreference.sample(rng, len(MARKS) + 1 - (margin or rng.choice(margins))).preference


def style_score(text: str) -> float:
    """The hidden rule on any text, -1 to 1: the mean over the marks, of which one in the first way counts 1, in the second
    -1, in both or neither 0. What a trained reward model is measured against."""
    total = 0
    for pairs in MARKS.values():
        firsts, seconds = (any(words[way] in text for words in pairs) for way in (0, 1))
        total += firsts - seconds
    return total / len(MARKS)
