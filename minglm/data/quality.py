"""Prose sorted into buckets of quality, so that a mixture can read the best more often and the worst not at all.

GLM-4.5 does so with web pages: the best bucket is read over 3.2 times, the worst dropped (paper, section 2.2). The judge is
a logistic regression on hashed character n-grams, learned from labelled examples that every installation holds:

- good: the manual of Python, and docstrings of the standard library: explanations that people wrote and revised;
- bad: licences, changelogs, tables of numbers, lists of names.

It judges form, not truth: what it calls best reads like an explanation. The bucket is the document's domain: "prose_best",
"prose_good", "prose_fair".
"""

import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minglm.data.fim import pieces
from minglm.data.sources import DataError, Document, source_files

BEST, GOOD, FAIR = BUCKETS = ("prose_best", "prose_good", "prose_fair")
SHARES = (0.25, 0.35, 0.32)  # of the prose's characters that go to each bucket; the rest, 8%, is dropped

GOOD_SOURCES = ("python_topics", "docstrings/standard_library")

FEATURES = 2**12
LONGEST_NGRAM = 4  # characters (bytes of UTF-8)
PASSAGE = 800  # characters of a labelled example
PASSAGES = 1000  # of each label, at most
STEPS, RATE, DECAY = 300, 4.0, 1e-4  # of gradient descent

_CHANGELOG = re.compile(r"^(?:#+ *)?(?:change ?log|changes|history|release notes|release history|what's new)\b.*$", re.I | re.M)
_LICENCE = re.compile(r"licen[cs]e|copying|notice", re.I)


@dataclass(frozen=True)
class Judge:
    """Scores text: above 0 it is more like the good examples, below 0 more like the bad ones (log odds)."""

    weights: np.ndarray  # float32 (FEATURES,)
    bias: float

    def score(self, text: str) -> float:
        return float(features(text) @ self.weights) + self.bias


def features(text: str) -> np.ndarray:
    """Square roots of the shares of hashed n-grams of 1 to 4 bytes, float32 (FEATURES,), of length 1.

    Case is kept; digits are all 0, so that a table is one whatever its numbers are.
    """
    data = np.frombuffer(re.sub(r"\d", "0", text).encode(), np.uint8).astype(np.uint32)
    counts = np.zeros(FEATURES, np.float32)
    hashes = np.zeros(len(data), np.uint32)
    for length in range(min(LONGEST_NGRAM, len(data))):
        hashes = (hashes[: len(data) - length] * np.uint32(0x01000193)) ^ data[length:]  # FNV-1a
        mixed = (hashes * np.uint32(0x9E3779B1)) >> np.uint32(20)
        counts += np.bincount(mixed, minlength=FEATURES).astype(np.float32)
    return np.sqrt(counts / max(counts.sum(), 1))


def learn(good: Sequence[str], bad: Sequence[str]) -> Judge:
    """A judge from texts of both labels, by gradient descent on the logistic loss; both labels weigh the same.

    Raises DataError where one of them has no example.
    """
    if not good or not bad:
        raise DataError(f"{len(good)} good and {len(bad)} bad examples; wanted some of each")
    x = np.stack([features(text) for text in (*good, *bad)])
    y = np.repeat([1, -1], [len(good), len(bad)]).astype(np.float32)
    balance = np.repeat([0.5 / len(good), 0.5 / len(bad)], [len(good), len(bad)]).astype(np.float32)
    weights, bias = np.zeros(FEATURES, np.float32), 0.0
    for _ in range(STEPS):
        slope = -y * balance / (1 + np.exp(y * (x @ weights + bias)))
        weights -= RATE * 10 * (slope @ x + DECAY * weights)
        bias -= RATE * float(slope.sum())
    return Judge(weights, bias)


def sort_by_quality(documents: Sequence[Document], judge: Judge, shares: Sequence[float] = SHARES) -> list[Document]:
    """The documents, each with its bucket as its domain, in their order; without the worst.

    The buckets' borders are scores: those that give each its share of the characters, the best first.
    """
    scores = np.array([judge.score(document.text) for document in documents])
    sizes = np.array([len(document.text) for document in documents])
    order = np.argsort(-scores, kind="stable")
    before = (np.cumsum(sizes[order]) - sizes[order]) / max(sizes.sum(), 1)  # share of the characters that are better
    bucket = np.empty(len(documents), np.int64)
    bucket[order] = np.searchsorted(np.cumsum(shares), before, side="right")
    return [
        replace(document, domain=BUCKETS[place])
        for document, place in zip(documents, bucket.tolist(), strict=True)
        if place < len(BUCKETS)
    ]


# ---- labelled examples


def labelled_passages(prose: Iterable[Document], seed: int = 0) -> tuple[list[str], list[str]]:
    """Good passages, those of `prose` from the sources of good text, and bad ones; of about 800 characters, at most 1,000
    each, drawn by the seed."""
    draw = np.random.Generator(np.random.PCG64(seed))
    found = []
    for texts in ((document.text for document in prose if document.source in GOOD_SOURCES), _bad()):
        passages = [piece for text in texts for piece in pieces(text, PASSAGE) if len(piece) >= PASSAGE // 4]
        chosen = np.sort(draw.permutation(len(passages))[:PASSAGES])
        found.append([passages[index] for index in chosen])
    return found[0], found[1]


def _bad() -> Iterator[str]:
    for distribution in sorted(importlib.metadata.distributions(), key=lambda one: one.metadata["Name"] or ""):
        yield from _licences(distribution)
        description = distribution.metadata.get_payload() or distribution.metadata.get("Description") or ""
        for heading in _CHANGELOG.finditer(description):
            yield description[heading.start() : heading.start() + 4 * PASSAGE]
    yield from _tables()


def _licences(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    for file in distribution.files or ():
        if _LICENCE.search(file.name) and file.suffix in ("", ".txt", ".md", ".rst") and ".dist-info" in str(file):
            try:
                yield Path(str(distribution.locate_file(file))).read_text(encoding="utf-8")[: 5 * PASSAGE]
            except (OSError, UnicodeDecodeError):  # listed, but not installed or of another encoding: one example fewer
                continue


def _tables() -> Iterator[str]:
    """Rows of numbers, and lists of names: the public names of each module of the standard library."""
    rows = np.random.Generator(np.random.PCG64(0))
    for number in range(120):
        columns = 2 + number % 6
        lines = (
            " ".join(f"{value:{6 + number % 5}.{number % 4}f}" for value in row) for row in rows.normal(0, 50, (30, columns))
        )
        yield "\n".join(lines)
    for _, text in source_files():
        names = re.findall(r"^(?:def|class) (\w+)", text, re.M)
        if len(names) > 20:
            yield "\n".join(f"- {name}" for name in names) if len(names) % 2 else ", ".join(names)
