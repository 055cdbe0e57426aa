"""Translation between two generated languages, in both directions, with idioms."""

import random
from dataclasses import dataclass, replace
from typing import Self

from minglm.tasks.general.answer import bare, hear, shown
from minglm.tasks.general.languages import (
    ADJECTIVES,
    FORMS,
    IDIOMS,
    JOINERS,
    LANGUAGES,
    NOUNS,
    PREDICATES,
    Clause,
    LanguageName,
    Meaning,
    Phrase,
    clause_parts,
    say_meaning,
    say_phrase,
)
from minglm.tasks.task import Message, Problem, Verdict, reply

ASKS = ("Translate from {source} to {target}: {text}", "Say in {target} what this {source} means: {text}")


@dataclass(frozen=True)
class Frame:
    """What is drawn of a meaning, at one difficulty.

    Attributes:
        clauses: how many; 0: a noun with an adjective, no clause.
        adjectives, plurals, pasts, negatives: whether they may come.
        idioms: for each clause, whether its predicate is an idiom.
    """

    clauses: int
    adjectives: bool = False
    plurals: bool = False
    pasts: bool = False
    negatives: bool = False
    idioms: tuple[bool, ...] = ()

    def draw(self, rng: random.Random) -> Meaning:
        """One of `size` meanings, each as likely as any other."""
        if not self.clauses:
            return Meaning(phrase=self._phrase(rng, rng.choice(NOUNS), rng.choice(ADJECTIVES)))
        clauses = tuple(self._clause(rng, idiom) for idiom in self.idioms)
        return Meaning(clauses=clauses, joiner=rng.choice(JOINERS) if self.clauses > 1 else "")

    def _clause(self, rng: random.Random, idiom: bool) -> Clause:
        subject = self._phrase(rng, rng.choice(NOUNS), self._adjective(rng))
        tense = {"past": self.pasts and rng.random() < 0.5, "negative": self.negatives and rng.random() < 0.5}
        if idiom:
            return Clause(subject, idiom=rng.choice(list(IDIOMS)), **tense)
        verb, noun = rng.choice(PREDICATES)
        return Clause(subject, verb, self._phrase(rng, noun, self._adjective(rng)), **tense)

    def _adjective(self, rng: random.Random) -> str:
        return rng.choice(ADJECTIVES) if self.adjectives else ""

    def _phrase(self, rng: random.Random, noun: str, adjective: str) -> Phrase:
        return Phrase(noun, self.plurals and rng.random() < 0.5, adjective)

    @property
    def size(self) -> int:
        """How many meanings there are."""
        described = (len(ADJECTIVES) if self.adjectives else 1) * (2 if self.plurals else 1)
        if not self.clauses:
            return len(NOUNS) * described
        count = len(JOINERS) if self.clauses > 1 else 1
        for idiom in self.idioms:
            predicates = len(IDIOMS) if idiom else len(PREDICATES) * described
            count *= len(NOUNS) * described * predicates * (2 if self.pasts else 1) * (2 if self.negatives else 1)
        return count


FRAMES = {
    1: Frame(0, adjectives=True, plurals=True),
    2: Frame(1),
    3: Frame(1, plurals=True, pasts=True),
    4: Frame(1, adjectives=True, plurals=True, pasts=True, negatives=True),
    5: Frame(2, plurals=True, pasts=True, negatives=True),
    6: Frame(2, adjectives=True, plurals=True, pasts=True, negatives=True),
}
FIRST_WITH_IDIOMS = 3


@dataclass(frozen=True)
class Translation(Problem):
    """A phrase or sentence to be said in the other language. Difficulty is how much of grammar comes (FRAMES): a described
    noun; a clause; with number, tense and idioms; with adjectives and negation; two clauses.

    Fields:
        meaning: what is said.
        frame: what it was drawn from.
        source: the language of the text given; the answer is in the other one.
        ask: number of the wording, of ASKS.
    """

    meaning: Meaning
    frame: Frame
    source: LanguageName
    ask: int

    family = "translation"
    stands_for = "Translation with idioms, judged by people in section 4; here there is one right sentence."
    difficulties = range(1, 7)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        frame = FRAMES[difficulty]
        idioms = tuple(difficulty >= FIRST_WITH_IDIOMS and rng.random() < 0.5 for _ in range(frame.clauses))
        frame = replace(frame, idioms=idioms)
        meaning = frame.draw(rng)
        # The meaning settles which way it is asked: else its way back could be in the other split.
        settled = random.Random(say_meaning(meaning, LANGUAGES[0]))
        return cls(meaning, frame, settled.choice(LANGUAGES), settled.randrange(len(ASKS)))

    @property
    def target(self) -> LanguageName:
        return LANGUAGES[1 - LANGUAGES.index(self.source)]

    @property
    def answer(self) -> str:
        return say_meaning(self.meaning, self.target)

    @property
    def messages(self) -> list[Message]:
        text = say_meaning(self.meaning, self.source)
        ask = ASKS[self.ask].format(source=self.source, target=self.target, text=text)
        return [{"role": "user", "content": ask}]

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.answer, "\n".join(self._steps()) if thinking else None)

    def _steps(self) -> list[str]:
        """Each part: its words, what it means, its words in the other language."""
        phrase = self.meaning.phrase
        if phrase:
            return [f"{say_phrase(phrase, self.source)} = {phrase.gloss()} = {self.answer}"]
        steps = []
        for number, clause in enumerate(self.meaning.clauses):
            if number:
                joiner = self.meaning.joiner
                steps.append(f"{FORMS[self.source][joiner]} = {joiner} = {FORMS[self.target][joiner]}")
            targets = clause_parts(clause, self.target)
            for role, part in clause_parts(clause, self.source).items():
                steps.append(f"{role}: {part.words} = {part.gloss} = {targets[role].words}")
        return steps

    def verify(self, response) -> Verdict:
        content, fault = hear(response)
        if fault:
            return Verdict(0.0, (fault,))
        if bare(content) == self.answer:
            return Verdict(1.0)
        if any(bare(content) == said for said in self.literal()):
            return Verdict(0.0, (f"an idiom was translated word by word: found {shown(content)}; wanted {self.answer}",))
        return Verdict(0.0, (f"found {shown(content)}; wanted {self.answer}",))

    def literal(self) -> list[str]:
        """The wrong sentences that come of translating idioms word by word; none without idioms."""
        clauses = tuple(self._word_by_word(clause) for clause in self.meaning.clauses)
        return [say_meaning(replace(self.meaning, clauses=clauses), self.target)] if any(self.frame.idioms) else []

    def _word_by_word(self, clause: Clause) -> Clause:
        if not clause.idiom:
            return clause
        verb, noun = IDIOMS[clause.idiom][self.source]
        return replace(clause, idiom="", verb=verb, object=Phrase(noun))

    def near_miss(self, rng: random.Random) -> list[Message]:
        """An idiom word by word, or the sentence of a meaning that differs in one thing."""
        literal = self.literal()
        if literal and rng.random() < 0.25:
            return reply(literal[0])
        while True:
            other = _with_one_thing_of(self.meaning, self.frame.draw(rng), rng)
            if other != self.meaning:
                return reply(say_meaning(other, self.target))

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(say_meaning(self.frame.draw(rng), self.target))

    @property
    def chance(self) -> float:
        return 1 / self.frame.size


def _with_one_thing_of(meaning: Meaning, other: Meaning, rng: random.Random) -> Meaning:
    """The first meaning, but for one thing that it has from the other one, of the same frame."""
    if meaning.phrase:
        return replace(meaning, phrase=_exchanged(meaning.phrase, other.phrase, rng))
    place = rng.randrange(len(meaning.clauses))
    clause, source = meaning.clauses[place], other.clauses[place]
    if rng.random() < 0.5:
        clause = replace(clause, subject=_exchanged(clause.subject, source.subject, rng))
    elif clause.idiom:
        clause = replace(clause, idiom=source.idiom)
    elif rng.random() < 0.5:
        clause = replace(clause, past=source.past, negative=source.negative)
    else:
        clause = replace(clause, verb=source.verb, object=source.object)  # one predicate, or it might be an idiom's words
    return replace(meaning, clauses=(*meaning.clauses[:place], clause, *meaning.clauses[place + 1 :]))


def _exchanged(phrase: Phrase, other: Phrase, rng: random.Random) -> Phrase:
    field = rng.choice(("noun", "many", "adjective"))
    return replace(phrase, **{field: getattr(other, field)})
