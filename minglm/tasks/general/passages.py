"""Long documents: plain filler sentences, and facts at stated depths among them.

The filler holds neither digits nor names of towns nor WORDS, so only the facts answer a question. Facts are very regular
(`Password: Tavira window.`), so that a small model can find one by copying. The filler is of few sentences in any
order: what a model cannot foretell in it would drown the little that there is to learn.
"""

import random
from collections.abc import Iterator, Sequence

from minglm.tasks.task import TaskError

TOWNS = (
    "Almera Belmor Calvino Dorvan Elsino Farlow Gorane Halvik Istrel Jovano Kestra Lomari Merrin Norvel Orsino Pelago "
    "Quarin Rastov Selmar Tavira Ulmera Vardon Westal Xandor Yarrow Zelina Ambria Bastin Cordal Delvo Estora Fenwick "
    "Galdor Hestia Imbros Jarmin Kolvar Lastra Mondal Nestor"
).split()

# Passwords: words that are common in prose and programs, so that a small vocabulary has each as one token. They are few: to
# copy any of them, a model learns one by one, and a small one learns to retrieve only after that.
WORDS = (
    "string day number file command time text output object array node line option book path graph week class result key "
    "module method song part"
).split()

ADJECTIVES = "old young quiet grey green tired little brave slow kind".split()
NOUNS = "fox sailor baker river horse farmer cloud bird smith child".split()
VERBS = "walks sings waits sleeps works turns rests dreams".split()
PLACES = (
    "near the mill,by the lake,under the bridge,in the garden,on the hill,behind the barn,at the market,along the road"
).split(",")


def _sentences(count: int) -> tuple[str, ...]:
    rng = random.Random("sentences of filler")
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(PLACES)}."] = None
    return tuple(found)


FILLER = _sentences(64)
LONGEST_FILLER = max(map(len, FILLER)) + 1  # with the blank before it


def filler(rng: random.Random) -> Iterator[str]:
    """Endless sentences of FILLER."""
    while True:
        yield rng.choice(FILLER)


def passage(rng: random.Random, characters: int, facts: Sequence[tuple[str, float]]) -> str:
    """Filler on one line with facts in it.

    Args:
        characters: how many to fill; the passage has at most so many, and less by LONGEST_FILLER at most.
        facts: each a sentence and its depth, the share of the other text that stands before it: 0 for the beginning, 1
            for the end. Met to within half a sentence of filler. Equal depths keep their order.

    Raises:
        TaskError: a depth outside 0 to 1; fewer characters than the facts have.
    """
    for _, depth in facts:
        if not 0 <= depth <= 1:
            raise TaskError(f"depth = {depth}: wanted 0 (the beginning of the document) to 1 (its end)")
    room = characters - sum(len(fact) + 1 for fact, _ in facts) + 1
    if room < 0:
        raise TaskError(
            f"{characters} characters are left for the document, whose facts alone have {characters - room}: "
            "wanted more characters or fewer facts"
        )
    sentences: list[str] = []
    ends = [0]  # of the filler after so many sentences
    for sentence in filler(rng):
        if ends[-1] + len(sentence) + 1 > room:
            break
        sentences.append(sentence)
        ends.append(ends[-1] + len(sentence) + 1)
    placed: list[list[str]] = [[] for _ in ends]
    for fact, depth in sorted(facts, key=lambda fact: fact[1]):
        nearest = min(range(len(ends)), key=lambda index: abs(ends[index] - depth * ends[-1]))
        placed[nearest].append(fact)
    parts = [part for before, sentence in zip(placed, [*sentences, ""], strict=True) for part in (*before, sentence) if part]
    return " ".join(parts)
