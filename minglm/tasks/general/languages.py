"""Two generated languages, Velan and Torsk, that say the same meanings by different rules.

|            | Velan                        | Torsk                                              |
| ---------- | ---------------------------- | -------------------------------------------------- |
| order      | subject, object, verb        | verb, subject, object                              |
| adjective  | after the noun               | before it, ending in -u or -ak by the noun's class |
| plural     | -ni                          | gor-                                               |
| past       | -sa on the verb              | the word `dut` first                               |
| negation   | the word `mu` before a verb  | -ziv on the verb                                   |

Idioms: some predicates are a verb and an object in both languages, but not the same ones; word by word they come out
wrong. The literal meanings of those words together are never said.
"""

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

LanguageName = Literal["Velan", "Torsk"]
LANGUAGES: tuple[LanguageName, LanguageName] = ("Velan", "Torsk")

NOUNS = "fox child king sailor bear smith stone water bread house boat hat lamp tree knife song".split()
VERBS = "see eat carry find love break sell hide make fear".split()
ADJECTIVES = "big old red small good cold young dark".split()
JOINERS = ("and", "but", "because")

# What is meant -> the verb and the object that say it, in Velan and in Torsk.
IDIOMS: dict[str, dict[LanguageName, tuple[str, str]]] = {
    "gives up": {"Velan": ("eat", "stone"), "Torsk": ("sell", "boat")},
    "is lucky": {"Velan": ("find", "hat"), "Torsk": ("carry", "lamp")},
    "tells lies": {"Velan": ("make", "water"), "Torsk": ("hide", "song")},
    "is angry": {"Velan": ("break", "bread"), "Torsk": ("eat", "knife")},
    "is in a hurry": {"Velan": ("carry", "tree"), "Torsk": ("fear", "water")},
    "is at home": {"Velan": ("see", "lamp"), "Torsk": ("love", "stone")},
}
IDIOMATIC = frozenset(pair for said in IDIOMS.values() for pair in said.values())
PREDICATES = tuple((verb, noun) for verb in VERBS for noun in NOUNS if (verb, noun) not in IDIOMATIC)


def _forms(language: str, sounds: tuple[str, str, str], longer: bool) -> dict[str, str]:
    """A word for each meaning: two syllables, in the second language closed by a consonant."""
    rng = random.Random(f"words of {language}")
    onsets, vowels, codas = sounds
    meanings = [*NOUNS, *VERBS, *ADJECTIVES, *JOINERS]
    found: dict[str, str] = {}
    while len(found) < len(meanings):
        if longer:
            form = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) + rng.choice(vowels) + rng.choice(codas)
        else:
            form = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) + rng.choice(vowels)
        if all(form[:3] != other[:3] for other in found.values()):  # easy to tell apart
            found[meanings[len(found)]] = form
    return found


FORMS: dict[LanguageName, dict[str, str]] = {
    "Velan": _forms("Velan", ("lmnrtvkp", "aeio", "lmrtvk"), longer=False),
    "Torsk": _forms("Torsk", ("bdfhjw", "aeo", "bdfksr"), longer=True),
}


@dataclass(frozen=True)
class Phrase:
    """A noun, one or many, perhaps with an adjective."""

    noun: str
    many: bool = False
    adjective: str = ""

    def gloss(self) -> str:
        return " ".join(part for part in (self.adjective, self.noun, "(many)" if self.many else "") if part)


@dataclass(frozen=True)
class Clause:
    """Who does what; with an idiom, `verb` and `object` are empty."""

    subject: Phrase
    verb: str = ""
    object: Phrase | None = None
    idiom: str = ""
    past: bool = False
    negative: bool = False

    def gloss(self) -> str:
        marks = [mark for mark, there in (("past", self.past), ("not", self.negative)) if there]
        return " ".join([self.idiom or self.verb, *(f"({mark})" for mark in marks)])


@dataclass(frozen=True)
class Meaning:
    """A phrase alone, a clause, or two clauses with a joiner."""

    phrase: Phrase | None = None
    clauses: tuple[Clause, ...] = ()
    joiner: str = ""


class Part(NamedTuple):
    """A part of a sentence: what it means, and its words in one language."""

    gloss: str
    words: str


def say_phrase(phrase: Phrase, language: LanguageName) -> str:
    forms = FORMS[language]
    noun, adjective = forms[phrase.noun], forms.get(phrase.adjective, "")
    if language == "Velan":
        return " ".join(part for part in (noun + ("ni" if phrase.many else ""), adjective) if part)
    ending = "u" if NOUNS.index(phrase.noun) % 2 == 0 else "ak"
    return " ".join(part for part in (adjective and adjective + ending, ("gor" if phrase.many else "") + noun) if part)


def clause_parts(clause: Clause, language: LanguageName) -> dict[str, Part]:
    """The parts by role: subject, verb and object, or subject and idiom."""
    subject, verb, thing = _said(clause, language)
    parts = {"subject": Part(clause.subject.gloss(), subject)}
    if clause.idiom:
        return parts | {"idiom": Part(clause.gloss(), _ordered(("", verb, thing), language))}
    return parts | {"verb": Part(clause.gloss(), verb), "object": Part(clause.object.gloss(), thing)}


def _said(clause: Clause, language: LanguageName) -> tuple[str, str, str]:
    """Subject, verb and object; an idiom's own in this language."""
    verb, thing = clause.verb, clause.object
    if clause.idiom:
        verb, noun = IDIOMS[clause.idiom][language]
        thing = Phrase(noun)
    form = FORMS[language][verb]
    if language == "Velan":
        form = ("mu " if clause.negative else "") + form + ("sa" if clause.past else "")
    else:
        form = ("dut " if clause.past else "") + form + ("ziv" if clause.negative else "")
    return say_phrase(clause.subject, language), form, say_phrase(thing, language)


def _ordered(said: tuple[str, str, str], language: LanguageName) -> str:
    subject, verb, thing = said
    return " ".join(part for part in ((subject, thing, verb) if language == "Velan" else (verb, subject, thing)) if part)


def say_meaning(meaning: Meaning, language: LanguageName) -> str:
    """The sentence: each meaning has one in each language, and no two meanings share one."""
    if meaning.phrase:
        return say_phrase(meaning.phrase, language)
    clauses = [_ordered(_said(clause, language), language) for clause in meaning.clauses]
    return f" {FORMS[language][meaning.joiner]} ".join(clauses) if meaning.joiner else clauses[0]
