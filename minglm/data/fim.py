"""Fill in the middle: code cut in three, its middle moved to the end (Bavarian et al., 2022; GLM-4.5 applies it to code).

    <|code_prefix|>prefix<|code_suffix|>suffix<|code_middle|>middle

in GLM's marks and in the order prefix, suffix, middle. A document is first divided into pieces that a model's context
holds, or a cut would find its prefix in one sequence and its middle in another. All cuts are between characters, so that
a model can go on within a word; half of the middles begin and end with a line. They follow from the document's content
and the seed alone.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from minglm.data.sources import DataError, Document

PREFIX, SUFFIX, MIDDLE = "<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"
SHORTEST = 60  # characters: in shorter pieces there is little to fill in
SHARE_OF_LINES = 0.5  # of middles that are whole lines


def fill_in_the_middle(documents: Iterable[Document], rate: float, characters: int = 1200, seed: int = 0) -> Iterator[Document]:
    """Turn the share `rate` of the documents into pieces to fill in, each a document of its own, and leave the others.

    characters: the longest piece; each document is divided at a length of its own, from a quarter of it.

    Raises DataError for a rate that is none, too few characters, a document with marks.
    """
    if not 0 <= rate <= 1 or characters < SHORTEST:
        raise DataError(f"rate {rate}, characters {characters}: wanted a rate from 0 to 1 and at least {SHORTEST} characters")
    for document in documents:
        if document.marks:
            raise DataError(f"{document.source}, {document.name}: has marks already; wanted text as it was written")
        rng = random.Random(hashlib.sha256(f"{seed} {document.text}".encode()).digest())
        if rng.random() >= rate:
            yield document
            continue
        longest = rng.randint(max(SHORTEST, characters // 4), characters)
        for number, piece in enumerate(pieces(document.text, longest), 1):
            named = replace(document, text=piece, name=f"{document.name}#{number}")
            yield _cut(named, rng) if len(piece) >= SHORTEST else named


def pieces(text: str, characters: int) -> Iterator[str]:
    """The text in pieces of at most `characters`, cut where a line begins, or, in longer lines, anywhere; best before a
    line without indentation."""
    start = 0
    while len(text) - start > characters:
        best = end = 0
        line = text.find("\n", start) + 1
        while 0 < line <= start + characters:
            end = line
            if not text[line].isspace() and line - start > characters // 2:
                best = line
            line = text.find("\n", line) + 1
        cut = best or end or start + characters
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _cut(document: Document, rng: random.Random) -> Document:
    """Prefix, suffix, middle with their marks. None of them is empty, but for the suffix of some whole lines at the end."""
    text = document.text
    start, end = _lines(text, rng) if rng.random() < SHARE_OF_LINES else sorted(rng.sample(range(1, len(text)), 2))
    prefix, middle, suffix = text[:start], text[start:end], text[end:]
    marks = ((0, PREFIX), (start, SUFFIX), (start + len(suffix), MIDDLE))
    return replace(document, text=prefix + suffix + middle, marks=marks)


def _lines(text: str, rng: random.Random) -> tuple[int, int]:
    """Where one to four whole lines start and end; the rest of a line, where there is but one."""
    begins = [0]
    while 0 < (line := text.find("\n", begins[-1]) + 1) < len(text):
        begins.append(line)
    if len(begins) == 1:
        return rng.randrange(1, len(text)), len(text)
    first = rng.randrange(1, len(begins))
    last = min(first + rng.randint(1, 4), len(begins))
    return begins[first], begins[last] if last < len(begins) else len(text)
