"""From what every installation holds to the documents of a recipe's stages, cleaned and in named domains.

    corpus = stage_corpus({"prose": 6_000_000, "code": 6_000_000, "repositories": 2_000_000}, fim_rate=0.5)

| ingredient     | domains                            | made from                                                            |
| -------------- | ---------------------------------- | -------------------------------------------------------------------- |
| "prose"        | prose_best, prose_good, prose_fair | manual, descriptions, docstrings, by quality, the worst dropped      |
| "code"         | code                               | source files; a share of them as pieces to fill in the middle        |
| "repositories" | repositories                       | files with those that they import, most with a commit (a diff)       |

Near duplicates and all but a few pages of one template are dropped. Every document says its split, and no training
document has 13 words in a row in common with a held-out one. Held-out code is never cut for filling in, so that losses on
it are those of reading from left to right.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from minglm.data.duplicates import overlap, without_near_duplicates, without_template_pages
from minglm.data.fim import fill_in_the_middle
from minglm.data.quality import BUCKETS, labelled_passages, learn, sort_by_quality
from minglm.data.repositories import DOMAIN as REPOSITORIES
from minglm.data.repositories import repository_documents
from minglm.data.sources import (
    HELD_OUT,
    TRAIN,
    Corpus,
    DataError,
    Document,
    embedded_documents,
    split_of,
    without_garbage_collector,
)

INGREDIENTS: dict[str, tuple[str, ...]] = {"prose": BUCKETS, "code": ("code",), "repositories": (REPOSITORIES,)}
"""The domains of each ingredient."""

SOURCES = {
    "prose": (
        "python_topics",
        "package_descriptions",
        "docstrings/standard_library",
        "docstrings/numpy",
        "docstrings/networkx",
        "docstrings/matplotlib",
    ),
    "code": ("code/standard_library", "code/numpy"),
    "repositories": ("code/sympy",),  # beside those of "code": few packages use so many names of their own files
}
LONGEST_FILE = 30_000  # characters, of those that are read for repositories alone: few documents have room for more
# One module in 50 is held out, and few of them import from each other. These packages are held out whole, so that there are
# repositories among the held-out documents.
HELD_OUT_REPOSITORIES = frozenset({"asyncio", "concurrent", "email", "xml"})
HELD_OUT_SHARE = 0.1  # of an ingredient's limit: so much held-out text there may be beside the training text

VERSION = 2  # raise it when the same packages give other documents


def stage_corpus(
    ingredients: Mapping[str, int],
    fim_rate: float = 0.5,
    fim_characters: int = 1200,
    repository_characters: int = 3000,
    seed: int = 0,
    progress: bool = True,
) -> Corpus:
    """The cleaned documents of the named ingredients.

    Args:
        ingredients: the most characters of training text of each, 0 for all that there is.
        fim_rate: share of the training code files that are cut into pieces to fill in.
        fim_characters: the longest of these pieces: what a sequence holds, about 2.5 characters a token.
        repository_characters: the longest repository document, about.
        progress: say what was kept, dropped and put into which domain, when the documents are read.

    Raises DataError for an unknown ingredient, a negative limit, an unfit rate or length.
    """
    for name, limit in ingredients.items():
        if name not in INGREDIENTS:
            raise DataError(f"no ingredient {name!r}; wanted some of {', '.join(INGREDIENTS)}")
        if limit < 0:
            raise DataError(f"the ingredient {name!r} is limited to {limit} characters; wanted 0 (all) or more")
    list(fill_in_the_middle([], fim_rate, fim_characters))  # says what is wrong with them before anything is read
    needed = [source for kind in _kinds(ingredients) for source in SOURCES[kind]]
    options = (fim_rate, fim_characters, repository_characters, seed)

    def read() -> Iterator[Document]:
        with without_garbage_collector():  # of files, whose syntax trees stay in memory
            documents = _documents(ingredients, *options, progress)
        if progress:
            print("\n".join(describe(documents)))
        return iter(documents)

    identity = {
        "ingredients": dict(sorted(ingredients.items())),
        "sources": embedded_documents(*needed).identity,
        "options": list(options),
        "version": VERSION,
    }
    return Corpus(read, identity)


def describe(documents: Iterable[Document]) -> list[str]:
    """A line on each domain: its documents and characters in each split."""
    sizes: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for document in documents:
        sizes[document.domain, split_of(document)] += len(document.text)
        numbers[document.domain, split_of(document)] += 1
    return [
        f"  {domain}: {numbers[domain, TRAIN]:,} documents of {sizes[domain, TRAIN]:,} characters in all, "
        f"{numbers[domain, HELD_OUT]:,} of {sizes[domain, HELD_OUT]:,} held out"
        for domain in dict.fromkeys(domain for domain, _ in sizes)
    ]


def _kinds(ingredients: Iterable[str]) -> list[str]:
    """What must be read for them."""
    wanted = {*ingredients, "code"} if "repositories" in ingredients else set(ingredients)
    return [kind for kind in SOURCES if kind in wanted]


def _documents(
    ingredients: Mapping[str, int], fim_rate: float, fim_characters: int, repository_characters: int, seed: int, progress: bool
) -> list[Document]:
    raw = {kind: [_with_split(d) for d in embedded_documents(*SOURCES[kind])] for kind in _kinds(ingredients)}
    if "prose" in raw:
        judge = learn(*labelled_passages((document for document in raw["prose"] if document.split == TRAIN), seed))
        raw["prose"] = without_template_pages(_limited(raw["prose"], ingredients["prose"]))
    if "repositories" in raw:
        raw["repositories"] = [document for document in raw["repositories"] if len(document.text) <= LONGEST_FILE]
    clean = _clean([document for documents in raw.values() for document in documents], progress)
    made: list[Document] = []
    if "prose" in raw:
        prose = [document for document in clean if document.domain == "prose"]
        made += sort_by_quality(prose, judge)
    files = [document for document in clean if document.domain == "code"]
    if "code" in ingredients:
        code = _limited([file for file in files if file.source in SOURCES["code"]], ingredients["code"])
        made += fill_in_the_middle((d for d in code if d.split == TRAIN), fim_rate, fim_characters, seed)
        made += (d for d in code if d.split == HELD_OUT)
    if "repositories" in ingredients:
        made += _limited(list(repository_documents(files, repository_characters, seed)), ingredients["repositories"])
    return _without_overlap(made)  # once more: excerpts put lines together that were apart


def _with_split(document: Document) -> Document:
    held_out = document.group in HELD_OUT_REPOSITORIES
    return replace(document, split=HELD_OUT if held_out else split_of(document))


def _limited(documents: Sequence[Document], limit: int) -> list[Document]:
    """Training documents up to `limit` characters, and held-out ones up to a tenth of it, chosen by content; in their order."""
    if not limit:
        return list(documents)
    room = {TRAIN: limit, HELD_OUT: int(limit * HELD_OUT_SHARE)}
    chosen = set()
    for index in sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].text.encode()).digest()):
        document = documents[index]
        if len(document.text) <= room[document.split]:
            room[document.split] -= len(document.text)
            chosen.add(index)
    return [document for index, document in enumerate(documents) if index in chosen]


def _clean(documents: list[Document], progress: bool) -> list[Document]:
    unique = without_near_duplicates(documents)
    clean = _without_overlap(unique)
    if progress:
        print(
            f"data: {len(documents):,} documents read; dropped {len(documents) - len(unique):,} near duplicates and "
            f"{len(unique) - len(clean):,} that share 13 words in a row with held-out text"
        )
    return clean


def _without_overlap(documents: list[Document]) -> list[Document]:
    _, dropped = overlap(documents)
    return [document for index, document in enumerate(documents) if index not in dropped]
