"""A generated encyclopedia: people, towns, rivers, lakes, firms and books, linked by facts; and its search engine."""

import functools
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

SHOWN = 4  # pages in an answer of the search
SYLLABLES = ("ba", "do", "ka", "lu", "mi", "no", "pe", "ri", "sa", "te", "vo", "zu")
ENDINGS = {"person": "n", "town": "burg", "river": "ra", "lake": "lo", "firm": "tex", "book": "via"}


class Relation(NamedTuple):
    """A fact is `subject` fits `sentence` with `object`. phrase: what the object is called. subject, object: their kinds."""

    subject: str
    object: str
    sentence: str
    phrase: str


RELATIONS = {
    "author": Relation("book", "person", "{} was written by {}.", "the author of {}"),
    "founder": Relation("firm", "person", "{} was founded by {}.", "the founder of {}"),
    "seat": Relation("firm", "town", "{} has its seat in {}.", "the seat of {}"),
    "employer": Relation("person", "firm", "{} works for {}.", "the employer of {}"),
    "birthplace": Relation("person", "town", "{} was born in {}.", "the birthplace of {}"),
    "river": Relation("town", "river", "{} lies on the river {}.", "the river of {}"),
    "lake": Relation("river", "lake", "{} flows into the lake {}.", "the lake of {}"),
}


@dataclass(frozen=True)
class Encyclopedia:
    """names: by kind. facts: relation, subject, object; of each subject one of a relation. order: of the pages, by name."""

    names: tuple[tuple[str, tuple[str, ...]], ...]
    facts: tuple[tuple[str, str, str], ...]
    order: tuple[str, ...]

    def of_kind(self, kind: str) -> tuple[str, ...]:
        return dict(self.names)[kind]

    def look_up(self, subject: str, relation: str) -> str:
        return next(found for name, one, found in self.facts if (name, one) == (relation, subject))

    def people(self, birthplace: str, employer: str) -> tuple[str, ...]:
        """Who was born there and works for them."""
        born = {subject for name, subject, found in self.facts if (name, found) == ("birthplace", birthplace)}
        return tuple(one for name, one, found in self.facts if (name, found) == ("employer", employer) and one in born)

    @functools.cached_property
    def pages(self) -> tuple[str, ...]:
        """The text of each page: all facts whose subject has the page."""
        sentences: dict[str, list[str]] = {title: [] for title in self.order}
        for name, subject, found in self.facts:
            sentences[subject].append(RELATIONS[name].sentence.format(subject, found))
        return tuple(" ".join(sentences[title]) or f"{title} is a lake." for title in self.order)

    @functools.cached_property
    def words(self) -> tuple[frozenset[str], ...]:
        return tuple(map(_words, self.pages))

    def page(self, number: int) -> str:
        """The text of a page, counted from 1."""
        if not 1 <= number <= len(self.order):
            return f"error: there are pages 1 to {len(self.order)}"
        return self.pages[number - 1]

    def search(self, query: str) -> str:
        """The pages with most of the query's words, those in the title before others: "number title" each."""
        words = _words(query)
        scores = []
        for number, (title, on_page) in enumerate(zip(self.order, self.words, strict=True), start=1):
            if found := words & on_page:
                scores.append((-len(found) - (title.lower() in words), number, title))
        return "; ".join(f"{number} {title}" for _, number, title in sorted(scores)[:SHOWN]) or "nothing found"


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def draw_encyclopedia(rng: random.Random, people: int) -> Encyclopedia:
    """With so many people, and one fewer of each other kind, so that some share a town or a firm."""
    counts = {kind: people if kind == "person" else people - 1 for kind in ENDINGS}
    taken: set[str] = set()
    names = {kind: _draw_names(rng, count, ENDINGS[kind], taken) for kind, count in counts.items()}
    facts = []
    for name, relation in RELATIONS.items():
        for subject in names[relation.subject]:
            facts.append((name, subject, rng.choice(names[relation.object])))
    order = [name for group in names.values() for name in group]
    rng.shuffle(order)
    return Encyclopedia(tuple(names.items()), tuple(facts), tuple(order))


def _draw_names(rng: random.Random, count: int, ending: str, taken: set[str]) -> tuple[str, ...]:
    names: list[str] = []
    while len(names) < count:
        name = ("".join(rng.choice(SYLLABLES) for _ in range(2)) + ending).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)
