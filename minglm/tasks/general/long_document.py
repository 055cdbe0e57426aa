"""Questions on long documents: one fact, several facts, or something of all facts."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.general.answer import bare, hear, shown
from minglm.tasks.general.passages import TOWNS, passage
from minglm.tasks.task import Message, Problem, TaskError, Verdict, reply

CODES = range(1000, 10_000)
BELLS = range(1, 10)
MOST_FACTS = 9  # of one document that is asked of as a whole
MOST_CANDIDATES = 10

# Difficulty -> characters, kinds of question, facts that are not asked for at most.
DIALS = {
    1: (120, ("needle",), 0),
    2: (300, ("needle",), 1),
    3: (600, ("needle", "needles"), 3),
    4: (1_200, ("needle", "needles", "count", "largest"), 5),
    5: (2_400, ("needle", "needles", "count", "largest", "sum"), 8),
    6: (4_800, ("needle", "needles", "count", "largest", "sum"), 12),
    7: (9_600, ("needle", "needles", "count", "largest", "sum"), 16),
    8: (19_200, ("needle", "needles", "count", "largest", "sum"), 24),
}


@dataclass(frozen=True)
class LongDocument(Problem):
    """A document of filler with facts on towns, and a question. Difficulty is the number of characters (DIALS).

    Fields:
        document: the text; with the question about as long as was wanted.
        kind: "needle" (the code of one town), "needles" (of several, in the order asked), "count" (how many codes there
            are), "largest" (whose code it is), "sum" (of the bells of all towers).
        asked: the towns that are asked about; none where the question is on all.
        facts: town and number, in the order of the document.
    """

    document: str
    kind: str
    asked: tuple[str, ...]
    facts: tuple[tuple[str, int], ...]

    family = "long_document"
    stands_for = "Long documents in mid-training (section 2.3) and in fine-tuning (3.1); needle-in-a-haystack and RULER."
    difficulties = range(1, 9)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        characters, kinds, most_others = DIALS[difficulty]
        kind = rng.choice(kinds)
        if kind in ("needle", "needles"):
            asked = 1 if kind == "needle" else rng.randint(2, min(2 * difficulty - 4, MOST_FACTS))
            return cls._with_needles(rng, characters, rng.random(), asked, rng.randint(0, most_others))
        count = rng.randint(2, min(2 * difficulty - 5, MOST_FACTS))
        numbers = [rng.choice(BELLS) for _ in range(count)] if kind == "sum" else rng.sample(CODES, count)
        facts = list(zip(rng.sample(TOWNS, count), numbers, strict=True))
        return cls._of(rng, characters, kind, (), facts, sorted(rng.random() for _ in facts))

    @classmethod
    def _with_needles(cls, rng: random.Random, characters: int, depth: float, asked: int, others: int) -> Self:
        towns = rng.sample(TOWNS, asked + others)
        facts = list(zip(towns, rng.sample(CODES, len(towns)), strict=True))
        depths = [depth] + [rng.random() for _ in towns[1:]]
        names = tuple(rng.sample(towns[:asked], asked))
        return cls._of(rng, characters, "needle" if asked == 1 else "needles", names, facts, depths)

    @classmethod
    def _of(cls, rng, characters, kind, asked, facts, depths) -> Self:
        told = [(_sentence(kind, town, number), depth) for (town, number), depth in zip(facts, depths, strict=True)]
        document = passage(rng, characters - len(_question(kind, asked)) - 1, told)
        ordered = sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0])
        return cls(document, kind, asked, tuple(fact for _, fact in ordered))

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": f"{self.document}\n{self.question}"}]

    @property
    def question(self) -> str:
        """What is asked after the document."""
        return _question(self.kind, self.asked)

    @property
    def answer(self) -> str:
        """The one right content."""
        numbers = dict(self.facts)
        match self.kind:
            case "count":
                return str(len(self.facts))
            case "largest":
                return max(self.facts, key=lambda fact: fact[1])[0]
            case "sum":
                return str(sum(numbers.values()))
        return ", ".join(str(numbers[town]) for town in self.asked)

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.answer, "\n".join(self._steps()) if thinking else None)

    def _steps(self) -> list[str]:
        numbers = dict(self.facts)
        if self.asked:
            return [_sentence(self.kind, town, numbers[town]) for town in self.asked]
        steps = []
        so_far, best = 0, ("", 0)
        for place, (town, number) in enumerate(self.facts, start=1):
            if self.kind == "count":
                steps.append(f"{place}: {town}.")
            elif self.kind == "largest":
                best = max(best, (town, number), key=lambda fact: fact[1])
                steps.append(f"{town} {number}. Largest: {best[0]} {best[1]}.")
            else:
                steps.append(f"{town} {number}. {so_far} + {number} = {so_far + number}.")
                so_far += number
        return steps

    def verify(self, response) -> Verdict:
        content, fault = hear(response)
        if fault:
            return Verdict(0.0, (fault,))
        found = [part.strip() for part in bare(content).split(",")]
        if found == self.answer.split(", "):
            return Verdict(1.0)
        return Verdict(0.0, (f"found {shown(content)}; wanted {self.answer}",))

    def near_miss(self, rng: random.Random) -> list[Message]:
        return reply(self.candidates(rng, 2)[1])

    def candidates(self, rng: random.Random, count: int) -> list[str]:
        """The right answer, then count - 1 different wrong ones of its form: for choosing by likelihood. First come those
        that the document holds for another question, then such as differ from the right one in a digit or two.

        Raises:
            TaskError: more than MOST_CANDIDATES.
        """
        if not 1 <= count <= MOST_CANDIDATES:
            raise TaskError(f"count = {count}: wanted 1 to {MOST_CANDIDATES} candidates")
        found = [self.answer]
        others = {
            "needle": [str(number) for town, number in self.facts if town not in self.asked],
            "largest": [town for town, _ in self.facts],
        }.get(self.kind, [])
        while len(found) < count:
            wrong = others.pop() if others else self._wrong(rng)
            if wrong not in found:
                found.append(wrong)
        return found

    def _wrong(self, rng: random.Random) -> str:
        if self.kind == "largest":
            return rng.choice(TOWNS)
        if self.kind in ("count", "sum"):
            return str(max(int(self.answer) + rng.randint(-9, 9), 1))
        codes = self.answer.split(", ")
        place = rng.randrange(len(codes))
        digits = list(codes[place])
        for _ in range(rng.choice((1, 2))):
            digits[rng.randrange(1, len(digits))] = str(rng.randrange(10))
        return ", ".join([*codes[:place], "".join(digits), *codes[place + 1 :]])

    def guess(self, rng: random.Random) -> list[Message]:
        if self.kind == "largest":
            return reply(rng.choice(TOWNS))
        if self.kind == "count":
            return reply(str(rng.randint(1, MOST_FACTS)))
        if self.kind == "sum":
            return reply(str(rng.randint(1, 9 * MOST_FACTS)))
        return reply(", ".join(str(rng.choice(CODES)) for _ in self.asked))

    @property
    def chance(self) -> float:
        match self.kind:
            case "count":
                return 1 / MOST_FACTS
            case "largest":
                return 1 / len(TOWNS)
            case "sum":
                return 1 / (9 * MOST_FACTS)
        return len(CODES) ** -len(self.asked)


def needle_document(rng: random.Random, characters: int, depth: float, needles: int = 1, others: int = 0) -> LongDocument:
    """A question on needles in a document of a wanted length: for the needle grid, and for long documents to train on.

    Args:
        characters: of the message, question included: it has at most so many, and less by at most one sentence of filler.
        depth: where the (first) needle stands: the share of the filler before it, 0 to 1. The other ones stand anywhere.
        needles: how many towns' codes are asked for.
        others: how many towns' codes stand there, too, and are not asked for.

    Raises:
        TaskError: a depth outside 0 to 1; too few characters; less than one needle, or more towns than there are.
    """
    if needles < 1 or others < 0 or needles + others > len(TOWNS):
        raise TaskError(
            f"needles = {needles}, others = {others}: wanted at least one needle, and at most {len(TOWNS)} facts in all"
        )
    return LongDocument._with_needles(rng, characters, depth, needles, others)


def _sentence(kind: str, town: str, number: int) -> str:
    if kind == "sum":
        return f"The tower of {town} has {number} bells."
    return f"The code of {town} is {number}."


def _question(kind: str, asked: tuple[str, ...]) -> str:
    match kind:
        case "needle":
            return f"What is the code of {asked[0]}?"
        case "needles":
            return f"What are the codes of {', '.join(asked[:-1])} and {asked[-1]}? Answer in this order, with commas."
        case "count":
            return "How many towns have a code?"
        case "largest":
            return "Which town has the largest code?"
    return "How many bells have all towers together?"
