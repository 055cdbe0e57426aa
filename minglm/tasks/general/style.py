"""Style preferences: pairs of answers for a reward model, a family that asks which answer is better, and one that asks for an
answer, whose content a rule can judge and whose style only a reward model does.

The rule is hidden from the model and stated here: both answers say the same, with some marks of style, each in one of two
ways. The answer is the better that has more of its marks in the first way:

    courtesy    opens gladly, not grudgingly
    certainty   says so, does not hedge (once for each thing said)
    plainness   uses the plain word, not the rare one (once for each thing said)
    warmth      ends with an offer, not with a complaint
    calm        ends its sentences with a full stop, not with an exclamation mark

Length tells nothing: the two ways have the same number of characters and of words, so both answers of a pair do.
"""

import math
import random
import re
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from minglm.tasks.general.answer import bare, hear, shown
from minglm.tasks.general.passages import TOWNS
from minglm.tasks.task import Message, Problem, TaskError, Verdict, reply

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

# Difficulty -> things that are spoken of, margin.
DIALS = {1: (1, 5), 2: (1, 4), 3: (2, 3), 4: (2, 2), 5: (3, 1)}


class Preference(NamedTuple):
    """Two answers to one conversation, of equal length, one better by the hidden rule."""

    messages: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: int
    """By how many marks."""


@dataclass(frozen=True)
class StylePreference(Problem):
    """Two answers to a question: which is better? Difficulty is how close they are, a margin of five marks to one, and how
    much they say, of one thing to three. But at 1, some marks may speak for the worse answer.

    Fields:
        things, town: what the question is on.
        variants: for each mark, which pair of MARKS is used in both answers.
        first, second: for each mark, whether the answer has it in the first way.
    """

    things: tuple[str, ...]
    town: str
    variants: tuple[int, ...]
    first: tuple[bool, ...]
    second: tuple[bool, ...]

    family = "style_preference"
    stands_for = "Human preference and the reward model of holistic RL (section 3.4); RewardBench."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        count, margin = DIALS[difficulty]
        marks = marks_of(count)
        better, worse = _ways(rng, len(marks), margin)
        variants = tuple(rng.randrange(len(MARKS[mark])) for mark in marks)
        problem = cls(tuple(rng.sample(THINGS, count)), rng.choice(TOWNS), variants, better, worse)
        # The pair settles which one stands first: else the same pair turned round could be in the other split.
        if random.Random(problem.messages[0]["content"]).random() < 0.5:
            return replace(problem, first=worse, second=better)
        return problem

    @property
    def question(self) -> str:
        return _question(self.things, self.town)

    def text(self, ways: tuple[bool, ...]) -> str:
        """The answer that has these marks in the first way."""
        return _text(self.things, self.variants, ways)

    @property
    def answer(self) -> str:
        return "A" if sum(self.first) > sum(self.second) else "B"

    @property
    def preference(self) -> Preference:
        """The pair as data of a reward model: for pairs of one split, take the problems of that split."""
        better, worse = sorted((self.first, self.second), key=sum, reverse=True)
        messages = [{"role": "user", "content": self.question}]
        return Preference(messages, reply(self.text(better)), reply(self.text(worse)), sum(better) - sum(worse))

    @property
    def messages(self) -> list[Message]:
        lines = [
            self.question,
            f"A: {self.text(self.first)}",
            f"B: {self.text(self.second)}",
            "Which answer is better, A or B?",
        ]
        return [{"role": "user", "content": "\n".join(lines)}]

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.answer, "\n".join(self._steps()) if thinking else None)

    def _steps(self) -> list[str]:
        """The marks of each answer that are in the first way, counted."""
        steps = []
        for name, ways in (("A", self.first), ("B", self.second)):
            good = [mark for mark, there in zip(marks_of(len(self.things)), ways, strict=True) if there]
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
        return reply("B" if self.answer == "A" else "A")

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(rng.choice("AB"))

    @property
    def chance(self) -> float:
        return 0.5


@dataclass(frozen=True)
class StyleAnswer(Problem):
    """A question to be answered in the form of the pairs' answers. The verifier knows what is asked about and the form, and any
    style is right to it: good style is a reward model's to say, as in holistic RL. Difficulty is the number of things.

    Fields:
        things, town: what is asked about.
        variants, ways: the style of the demonstration, drawn without regard to the hidden rule.
    """

    things: tuple[str, ...]
    town: str
    variants: tuple[int, ...]
    ways: tuple[bool, ...]

    family = "style_answer"
    stands_for = "Open questions of holistic RL (section 3.4), judged by rules and a reward model together."
    difficulties = range(1, 4)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        return cls(tuple(rng.sample(THINGS, difficulty)), rng.choice(TOWNS), *_style(rng, difficulty))

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": _question(self.things, self.town)}]

    def demonstrate(self, thinking: bool) -> list[Message]:
        text = _text(self.things, self.variants, self.ways)
        return reply(text, f"Asked about: {', '.join(self.things)}." if thinking else None)

    def verify(self, response) -> Verdict:
        content, fault = hear(response)
        if fault:
            return Verdict(0.0, (fault,))
        if not FORM.fullmatch(content):
            return Verdict(0.0, ("not in the form of an answer: opening, what is said of each thing, closing",))
        told = tuple(SAID.findall(content))
        if told != self.things:
            return Verdict(0.0, (f"speaks of {', '.join(told)}; wanted {', '.join(self.things)}",))
        return Verdict(1.0)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """In the best style, about another thing."""
        place = rng.randrange(len(self.things))
        other = rng.choice([thing for thing in THINGS if thing not in self.things])
        things = (*self.things[:place], other, *self.things[place + 1 :])
        return reply(_text(things, self.variants, (True,) * len(self.ways)))

    def guess(self, rng: random.Random) -> list[Message]:
        count = len(self.things)
        return reply(_text(tuple(rng.sample(THINGS, count)), *_style(rng, count)))

    @property
    def chance(self) -> float:
        return 1 / math.perm(len(THINGS), len(self.things))


def _question(things: tuple[str, ...], town: str) -> str:
    *others, last = [f"the {thing}" for thing in things]
    return f"How {'are' if others else 'is'} {', '.join(others)}{' and ' if others else ''}{last} of {town}?"


def _text(things: tuple[str, ...], variants: tuple[int, ...], ways: tuple[bool, ...]) -> str:
    """The answer about these things, each mark in this variant and way."""
    opening, *said, closing, stop = (
        MARKS[mark][variant][0 if good else 1]
        for mark, variant, good in zip(marks_of(len(things)), variants, ways, strict=True)
    )
    told = [f"the {thing} is {certainty} {word}" for thing, certainty, word in zip(things, said[::2], said[1::2], strict=True)]
    return f"{opening}, {', '.join(told)}{stop} {closing}{stop}"


def _any_of(mark: str) -> str:
    return f"(?:{'|'.join(re.escape(words) for pair in MARKS[mark] for words in pair)})"


SAID = re.compile(rf"the (\w+) is {_any_of('certainty')} {_any_of('plainness')}")
FORM = re.compile(rf"{_any_of('courtesy')}(?:, {SAID.pattern})+(?P<stop>{_any_of('calm')}) {_any_of('warmth')}(?P=stop)")


def _style(rng: random.Random, things: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Variants and ways of an answer's marks."""
    marks = marks_of(things)
    return tuple(rng.randrange(len(MARKS[mark])) for mark in marks), tuple(rng.random() < 0.5 for _ in marks)


def _ways(rng: random.Random, marks: int, margin: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For a better answer and a worse one, which marks are in the first way: every two with this margin equally likely."""
    goods = range(marks - margin + 1)  # of the worse one
    [good] = rng.choices(goods, [math.comb(marks, good) * math.comb(marks, good + margin) for good in goods])
    better, worse = (set(rng.sample(range(marks), count)) for count in (good + margin, good))
    return tuple(mark in better for mark in range(marks)), tuple(mark in worse for mark in range(marks))


def marks_of(things: int) -> list[str]:
    """The marks of an answer on so many things, in the order of its text."""
    return ["courtesy", *["certainty", "plainness"] * things, "warmth", "calm"]


def pair(rng: random.Random, margin: int | None = None) -> Preference:
    """A pair for a reward model. margin: by how many marks of style the chosen one is better, 1 to 5; by default any.

    Raises:
        TaskError: another margin.
    """
    by_margin = {found: difficulty for difficulty, (_, found) in DIALS.items()}
    if margin is not None and margin not in by_margin:
        raise TaskError(f"margin = {margin}: wanted {min(by_margin)} to {max(by_margin)}")
    return StylePreference.sample(rng, by_margin[margin or rng.choice(list(by_margin))]).preference


def style_score(text: str) -> float:
    """The hidden rule on any text: the share of its marks in the first way less that in the second way, -1 to 1; 0 for a
    text without marks. What a trained reward model is measured against."""
    counts = [0, 0]
    for mark, pairs in MARKS.items():
        for way in (0, 1):
            found = sum(text.count(words[way]) for words in pairs)
            counts[way] += min(found, 1) if mark == "calm" else found  # of a whole text, not of each sentence
    return (counts[0] - counts[1]) / max(sum(counts), 1)
