"""Search: from page to page of an encyclopedia, each of which names the next thing to look for.

Forwards, "the river of the birthplace of the founder of Kanotex", which from the second difficulty on stands on no page
alone; at the highest also backwards, as BrowseComp asks, from what is true of somebody to the name: "who was born in the
seat of Kanotex and works for Midotex". Measure of difficulty: pages to read (hops), and the size of the encyclopedia.
"""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.agents.calling import Call, Tool, tool
from minglm.tasks.agents.search_world import RELATIONS, Encyclopedia, draw_encyclopedia
from minglm.tasks.agents.world import AgentProblem, Move, Moves, World, word
from minglm.tasks.task import Message

TOOLS = [
    tool("search", "Find pages by words", {"query": "string"}),
    tool("open", "Read a page", {"page": "integer"}),
]
PEOPLE = {1: 6, 2: 6, 3: 7, 4: 8, 5: 9, 6: 10}  # in the encyclopedia, by difficulty
HOPS = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 5}
BACKWARDS_FROM = 4  # difficulty


@dataclass(frozen=True)
class Search(AgentProblem):
    """start_name: what the question names. chain: relations from there on, each of what the one before led to.
    employer: empty, or else a person is sought, who was born where the chain ends and works for this firm."""

    encyclopedia: Encyclopedia
    start_name: str
    chain: tuple[str, ...]
    employer: str = ""

    family = "search"
    stands_for = "Web-search agentic RL of section 3.3 on multi-hop questions over linked pages, and BrowseComp of section 4."
    difficulties = range(1, 7)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        is_backwards = difficulty >= BACKWARDS_FROM and rng.random() < 0.5
        hops = HOPS[difficulty] - (2 if is_backwards else 0)
        while True:  # until a draw fits: no thing twice on the way, one person only
            encyclopedia = draw_encyclopedia(rng, PEOPLE[difficulty])
            start_name, chain = draw_chain(rng, encyclopedia, hops)
            things = walk(encyclopedia, start_name, chain)
            if not chain or len(set(things)) < len(things):
                continue
            if not is_backwards:
                return cls(encyclopedia, start_name, chain)
            for person in encyclopedia.of_kind("person"):
                employer = encyclopedia.look_up(person, "employer")
                if person not in things and encyclopedia.people(things[-1], employer) == (person,):
                    return cls(encyclopedia, start_name, chain, employer)

    @property
    def things(self) -> list[str]:
        return walk(self.encyclopedia, self.start_name, self.chain)

    @property
    def answer(self) -> str:
        end = self.things[-1]
        return self.encyclopedia.people(end, self.employer)[0] if self.employer else end

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.encyclopedia.of_kind("person" if self.employer else RELATIONS[self.chain[-1]].object)

    @property
    def messages(self) -> list[Message]:
        phrase = self.start_name
        for relation in self.chain:
            phrase = RELATIONS[relation].phrase.format(phrase)
        if self.employer:
            question = f"Who was born in {phrase} and works for {self.employer}?"
        else:
            question = f"{'Who' if RELATIONS[self.chain[-1]].object == 'person' else 'What'} is {phrase}?"
        return [{"role": "user", "content": f"{question} Answer with the name only."}]

    @property
    def tools(self) -> list[Tool]:
        return TOOLS

    def start(self) -> "Reading":
        return Reading(self)

    def solve(self) -> Moves:
        known = ""
        for thing, relation, found in zip(self.things, self.chain, self.things[1:], strict=False):
            wanted = RELATIONS[relation].phrase.format(thing)
            [hits] = yield Move(f"{known}Find {wanted}.", [Call("search", {"query": thing})])
            number = _page_of(hits, thing)
            yield Move(f"{thing} is page {number}.", [Call("open", {"page": number})])
            known = f"{wanted[0].upper()}{wanted[1:]} is {found}. "
        if self.employer:
            town = self.things[-1]
            [hits] = yield Move(
                f"{known}Find who was born in {town} and works for {self.employer}.",
                [Call("search", {"query": f"born in {town} works for {self.employer}"})],
            )
            number = int(hits.split()[0])
            yield Move("Check the first page.", [Call("open", {"page": number})])
            known = f"{self.answer} was born in {town} and works for {self.employer}. "
        yield Move(known.rstrip(), content=self.answer)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """The right pages, and then another name of the right kind, or one from the way."""
        others = {*self.candidates, *self.things[1:]} - {self.answer}
        response = self.demonstrate(thinking=False)
        return [*response[:-1], {"role": "assistant", "content": rng.choice(sorted(others))}]

    def guess(self, rng: random.Random) -> list[Message]:
        """A name of the right kind, unread."""
        return [{"role": "assistant", "content": rng.choice(self.candidates)}]

    @property
    def chance(self) -> float:
        return 1 / len(self.candidates)


class Reading(World):
    """The encyclopedia, until the assistant answers."""

    def __init__(self, problem: Search):
        super().__init__(problem.tools, turn_limit=8 + 4 * len(problem.chain))
        self.encyclopedia = problem.encyclopedia
        self.answer = problem.answer

    def call(self, call: Call) -> str:
        if call.name == "search":
            return self.encyclopedia.search(call.arguments["query"])
        return self.encyclopedia.page(call.arguments["page"])

    def hear(self, content: str) -> str | None:
        if word(content) != self.answer:
            self.end(f"answered {content[:40]!r}; wanted {self.answer!r}")
        return None


def walk(encyclopedia: Encyclopedia, start_name: str, chain: tuple[str, ...]) -> list[str]:
    """The start, and what each relation of the chain leads to."""
    things = [start_name]
    for relation in chain:
        things.append(encyclopedia.look_up(things[-1], relation))
    return things


def draw_chain(rng: random.Random, encyclopedia: Encyclopedia, hops: int) -> tuple[str, tuple[str, ...]]:
    """A start, and so many relations that follow one another; none if the walk ends before."""
    kind = rng.choice(("person", "firm", "book", "town", "river"))
    start_name = rng.choice(encyclopedia.of_kind(kind))
    chain: list[str] = []
    while len(chain) < hops:
        relations = [name for name, relation in RELATIONS.items() if relation.subject == kind]
        if not relations:
            return start_name, ()
        chain.append(rng.choice(relations))
        kind = RELATIONS[chain[-1]].object
    return start_name, tuple(chain)


def _page_of(hits: str, title: str) -> int:
    """The number of the page with a title, in an answer of the search."""
    for hit in hits.split("; "):
        number, _, name = hit.partition(" ")
        if name == title:
            return int(number)
    raise AssertionError(f"{title} is not among {hits}: the search must find a page by its title")
