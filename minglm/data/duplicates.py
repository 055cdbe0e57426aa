"""Texts that say the same twice: near duplicates, pages from one template, and training text that held-out text repeats.

- Near duplicates (Broder, 1997): MinHash of five-word shingles finds candidates, their true Jaccard similarity decides.
- Template pages: texts that are alike once the words that only a few texts have are left out. A few of each stay. GLM-4.5 finds
  them by embeddings (SemDedup; paper, section 2.2); the embedded data need no more than this.
- Overlap: no 13 words in a row stand in both splits, the usual check (Brown et al., 2020, appendix C).
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH

from minglm.data.sources import HELD_OUT, Document, split_of

WORD = re.compile(r"\w+")
SHINGLE = 5  # words
OVERLAP = 13  # words
PERMUTATIONS = 64
BAND = 4  # texts that agree in 4 hashes of a band are compared: at a similarity of 0.7, 99% of the pairs are
SIMILAR = 0.7  # Jaccard similarity from which two texts are near duplicates
SAME_TEMPLATE = 0.8  # of skeletons
TEMPLATE_KEPT = 3  # pages of one template that stay
RARE = 0.002  # a word in fewer than this share of the texts is content, not template

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 / golden ratio


# ---- near duplicates


def near_duplicates(texts: Sequence[str], similar: float = SIMILAR) -> list[list[int]]:
    """Groups of texts that are alike, each sorted, the groups by their first; texts that are like no other are in none.

    Two texts are alike if the Jaccard similarity of their sets of five-word shingles is at least `similar`; groups are what
    is connected by that. Texts of fewer than five words count as one shingle.
    """
    sets = [shingles(text) for text in texts]
    return _groups(sets, similar)


def without_near_duplicates(documents: Sequence[Document]) -> list[Document]:
    """One document of each group stays: a held-out one where there is one, so that nothing like it is trained on; else
    the first."""
    dropped: set[int] = set()
    for group in near_duplicates([document.text for document in documents]):
        kept = next((index for index in group if split_of(documents[index]) == HELD_OUT), group[0])
        dropped.update(index for index in group if index != kept)
    return [document for index, document in enumerate(documents) if index not in dropped]


def without_template_pages(documents: Sequence[Document], kept: int = TEMPLATE_KEPT) -> list[Document]:
    """At most `kept` pages of each template stay, the first ones."""
    words = [_words(document.text) for document in documents]
    seen = Counter(word for page in words for word in set(page))
    common = {word for word, count in seen.items() if count >= max(2.0, RARE * len(documents))}
    skeletons = [np.unique(_rolling(_numbers([w if w in common else "_" for w in page]), SHINGLE)) for page in words]
    dropped = {index for group in _groups(skeletons, SAME_TEMPLATE) for index in group[kept:]}
    return [document for index, document in enumerate(documents) if index not in dropped]


def shingles(text: str) -> np.ndarray:
    """Hashes of all five words in a row, uint64, sorted, each once."""
    return np.unique(_rolling(_numbers(_words(text)), SHINGLE))


def _groups(sets: Sequence[np.ndarray], similar: float) -> list[list[int]]:
    """Connected groups of sets with a Jaccard similarity of at least `similar`."""
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // BAND, BAND))
    parent = list(range(len(sets)))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for number, members in enumerate(sets):
        if not len(members):
            continue
        sketch = MinHash(PERMUTATIONS, hashfunc=int)
        sketch.update_batch((members >> np.uint64(32)).tolist())
        for other in sorted(index.query(sketch)):
            if find(other) != find(number) and jaccard(members, sets[other]) >= similar:
                parent[max(find(other), find(number))] = min(find(other), find(number))
        index.insert(number, sketch)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(sets)):
        groups[find(number)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted sets: the share that they have in common of all that is in one of them."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# ---- overlap of train and held-out


def overlap(documents: Sequence[Document]) -> tuple[set[int], set[int]]:
    """The held-out and the training documents, by index, that have 13 words in a row in common with one of the other split."""
    is_held_out = [split_of(document) == HELD_OUT for document in documents]
    grams = [np.unique(_rolling(_numbers(_words(document.text)), OVERLAP, whole=True)) for document in documents]
    wanted = _union(gram for gram, held_out in zip(grams, is_held_out, strict=True) if held_out)
    common = [gram[_in(gram, wanted)] for gram in grams]
    shared = _union(gram for gram, held_out in zip(common, is_held_out, strict=True) if not held_out)
    found: tuple[set[int], set[int]] = (set(), set())
    for index, held_out in enumerate(is_held_out):
        if _in(common[index], shared).any():
            found[not held_out].add(index)
    return found


def shared_with(texts: Sequence[str], others: Iterable[str]) -> set[int]:
    """Which texts, by index, have 13 words in a row in common with one of the others; shorter ones have none."""
    grams = [np.unique(_rolling(_numbers(_words(text)), OVERLAP, whole=True)) for text in texts]
    wanted = _union(grams)
    seen = [np.empty(0, np.uint64)]
    for other in others:
        own = _rolling(_numbers(_words(other)), OVERLAP, whole=True)
        seen.append(own[_in(own, wanted)])
    common = _union(seen)
    return {index for index, own in enumerate(grams) if _in(own, common).any()}


def _union(sets: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *sets]))


def _in(members: np.ndarray, sorted_set: np.ndarray) -> np.ndarray:
    """Which members are in the set."""
    if not len(sorted_set):
        return np.zeros(len(members), bool)
    places = np.minimum(np.searchsorted(sorted_set, members), len(sorted_set) - 1)
    return sorted_set[places] == members


# ---- words as numbers


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _numbers(words: Sequence[str]) -> np.ndarray:
    """A number for each word, uint64: the same in every process."""
    known = {word: (zlib.crc32(word.encode()) << 32) + zlib.adler32(word.encode()) for word in set(words)}
    return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))


def _rolling(numbers: np.ndarray, length: int, whole: bool = False) -> np.ndarray:
    """A hash of each `length` numbers in a row, uint64. Fewer numbers are one, or with `whole` none."""
    if len(numbers) < length:
        if whole or not len(numbers):
            return np.empty(0, np.uint64)
        length = len(numbers)
    windows = len(numbers) - length + 1
    hashes = np.zeros(windows, np.uint64)
    for offset in range(length):
        hashes = (hashes ^ numbers[offset : offset + windows]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes
