"""Questions on long documents: one fact, several facts, or something of all facts."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.general.answer import bare, hear, shown
from minglm.tasks.general.passages import TOWNS, WORDS, passage
from minglm.tasks.task import Message, Problem, TaskError, Verdict, reply

CODES = range(1000, 10_000)
BELLS = range(1, 10)
MOST_FACTS = 9  # of one document that is asked of as a whole
MOST_CANDIDATES = 10

NEEDLES = ("needle", "needles")  # the kinds whose documents state passwords
# A count, a largest number and a sum need all facts, so that they hardly teach to find one.
ALL_KINDS = (*NEEDLES, *NEEDLES, "count", "largest", "sum")

# Difficulty -> characters, kinds of question (by how often they stand here), facts that are not asked for at most.
DIALS = {
    1: (120, ("needle",), 1),
    2: (300, NEEDLES, 4),
    3: (600, NEEDLES, 7),
    4: (1_200, (*NEEDLES, *NEEDLES, "count", "largest"), 10),
    5: (2_400, ALL_KINDS, 14),
    6: (4_800, ALL_KINDS, 14),
    7: (9_600, ALL_KINDS, 14),
    8: (19_200, ALL_KINDS, 14),
}


@dataclass(frozen=True)
class LongDocument(Problem):
    """A document of filler with facts on towns, and a question. Difficulty is the number of characters (DIALS).

    Fields:
        document: the text; with the question about as long as was wanted.
        kind: "needle" (the password at one town), "needles" (at several, in the order asked), "count" (how many codes
            there are), "largest" (whose code it is), "sum" (of the bells of all towers).
        asked: the towns that are asked about; none where the question is on all.
        facts: town and number, or town and password (one of WORDS), in the order of the document.

    A needle's answer repeats its town, and the password stands right behind the town in document and answer. So the
    plainest way to retrieve, to go on as the text went on behind the same word, is enough once it reaches far, and it is
    needed: all towns and words are equally likely, and the document has other towns with other passwords.
    """

    document: str
    kind: str
    asked: tuple[str, ...]
    facts: tuple[tuple[str, int | str], ...]

    family = "long_document"
    stands_for = "Long documents in mid-training (section 2.3) and in fine-tuning (3.1); needle-in-a-haystack and RULER."
    difficulties = range(1, 9)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        characters, kinds, most_others = DIALS[difficulty]
        kind = rng.choice(kinds)
        if kind in NEEDLES:
            asked = 1 if kind == "needle" else rng.randint(2, min(2 * difficulty, MOST_FACTS))
            return cls._with_needles(rng, characters, rng.random(), asked, rng.randint(0, most_others))
        count = rng.randint(2, min(2 * difficulty - 5, MOST_FACTS))
        numbers = [rng.choice(BELLS) for _ in range(count)] if kind == "sum" else rng.sample(CODES, count)
        facts = list(zip(rng.sample(TOWNS, count), numbers, strict=True))
        return cls._of(rng, characters, kind, (), facts, sorted(rng.random() for _ in facts))

    @classmethod
    def _with_needles(cls, rng: random.Random, characters: int, depth: float, asked: int, others: int) -> Self:
        towns = rng.sample(TOWNS, asked + others)
        facts = list(zip(towns, rng.sample(WORDS, len(towns)), strict=True))
        depths = [depth] + [rng.random() for _ in towns[1:]]
        names = tuple(rng.sample(towns[:asked], asked))
        return cls._of(rng, characters, "needle" if asked == 1 else "needles", names, facts, depths)

    @classmethod
    def _of(cls, rng, characters, kind, asked, facts, depths) -> Self:
        told = [(_sentence(kind, town, value), depth) for (town, value), depth in zip(facts, depths, strict=True)]
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
        values = dict(self.facts)
        match self.kind:
            case "count":
                return str(len(self.facts))
            case "largest":
                return max(self.facts, key=lambda fact: fact[1])[0]
            case "sum":
                return str(sum(values.values()))
        return ", ".join(f"{town} {values[town]}" for town in self.asked)

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.answer, "\n".join(self._steps()) if thinking else None)

    def _steps(self) -> list[str]:
        if self.asked:
            values = dict(self.facts)
            return [_sentence(self.kind, town, values[town]) for town in self.asked]
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
        found = [" ".join(part.split()) for part in bare(content).split(",")]
        if found == self.answer.split(", "):
            return Verdict(1.0)
        return Verdict(0.0, (f"found {shown(content)}; wanted {self.answer}",))

    def near_miss(self, rng: random.Random) -> list[Message]:
        return reply(self.candidates(rng, 2)[1])

    def candidates(self, rng: random.Random, count: int) -> list[str]:
        """The right answer, then count - 1 different wrong ones of its form: for choosing by likelihood. First come those
        that the document holds for another question, then any of its form; of several passwords one is wrong.

        Raises:
            TaskError: more than MOST_CANDIDATES.
        """
        if not 1 <= count <= MOST_CANDIDATES:
            raise TaskError(f"count = {count}: wanted 1 to {MOST_CANDIDATES} candidates")
        found = [self.answer]
        others: list[str] = []
        if self.kind == "needle":
            others = [f"{self.asked[0]} {word}" for town, word in self.facts if town not in self.asked]
        elif self.kind == "largest":
            others = [town for town, _ in self.facts]
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
        parts = self.answer.split(", ")
        place = rng.randrange(len(parts))
        parts[place] = f"{self.asked[place]} {rng.choice(WORDS)}"
        return ", ".join(parts)

    def guess(self, rng: random.Random) -> list[Message]:
        if self.kind == "largest":
            return reply(rng.choice(TOWNS))
        if self.kind == "count":
            return reply(str(rng.randint(1, MOST_FACTS)))
        if self.kind == "sum":
            return reply(str(rng.randint(1, 9 * MOST_FACTS)))
        return reply(", ".join(f"{town} {rng.choice(WORDS)}" for town in self.asked))

    @property
    def chance(self) -> float:
        match self.kind:
            case "count":
                return 1 / MOST_FACTS
            case "largest":
                return 1 / len(TOWNS)
            case "sum":
                return 1 / (9 * MOST_FACTS)
        return len(WORDS) ** -len(self.asked)


def needle_document(rng: random.Random, characters: int, depth: float, needles: int = 1, others: int = 0) -> LongDocument:
    """A question on needles in a document of a wanted length: for the needle grid, and for long documents to train on.

    Args:
        characters: of the message, question included: it has at most so many, and less by at most one sentence of filler.
        depth: where the (first) needle stands: the share of the filler before it, 0 to 1. The other ones stand anywhere.
        needles: how many towns' passwords are asked for.
        others: how many towns' passwords stand there, too, and are not asked for.

    Raises:
        TaskError: a depth outside 0 to 1; too few characters; less than one needle, or more facts than there are passwords.
    """
    if needles < 1 or others < 0 or needles + others > len(WORDS):
        raise TaskError(
            f"needles = {needles}, others = {others}: wanted at least one needle, and at most {len(WORDS)} facts in all"
        )
    return LongDocument._with_needles(rng, characters, depth, needles, others)


def _sentence(kind: str, town: str, value: int | str) -> str:
    if kind in NEEDLES:
        return f"Password: {town} {value}."
    if kind == "sum":
        return f"The tower of {town} has {value} bells."
    return f"The code of {town} is {value}."


def _question(kind: str, asked: tuple[str, ...]) -> str:
    match kind:
        case "needle":
            return f"Give the town with its password: {asked[0]}."
        case "needles":
            return f"Give the towns with their passwords: {', '.join(asked)}."
        case "count":
            return "How many towns have a code?"
        case "largest":
            return "Which town has the largest code?"
    return "How many bells have all towers together?"
