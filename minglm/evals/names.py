"""Names from other files: how well a model writes an identifier that another file of the same repository defines.

Within one file, such a name can only be guessed at its first use; a model that reads the repository can copy it. This is
what repository-level training is for.
"""

import builtins
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minglm.data.shards import Dataset
from minglm.evals.likelihood import held_out_documents
from minglm.evals.measure import Measure, summed
from minglm.evals.scoring import Passage, Scorer

FILE = re.compile(r"^# file: .*\n", re.MULTILINE)
SECTION = re.compile(r"^(?:# file: |# commit: |diff --git )", re.MULTILINE)  # where a file ends
DEFINITION = re.compile(r"^(?:(?:async +)?def|class) +(\w+)|^([A-Za-z_]\w*) *(?::[^=\n]*)?=(?!=)", re.MULTILINE)
NAME = re.compile(r"\b[A-Za-z_]\w*\b")
SHORTEST_NAME = 4  # characters: shorter ones are guessed as easily
KNOWN = frozenset(dir(builtins)) | frozenset(keyword.kwlist)
FILES_A_DOCUMENT = 4


@dataclass(frozen=True)
class Use:
    """The first use of a name in a file: characters start to end of the document; `defined`: where another file defines it."""

    start: int
    end: int
    defined: int


@dataclass(frozen=True)
class File:
    """A file behind others of its document: the character where it begins, and the names of theirs that it uses."""

    start: int
    uses: tuple[Use, ...]


def cross_file_uses(text: str) -> list[File]:
    """Every file that uses a name which a file before it defines at its top level, and which it does not define itself.

    Of several definitions the last one counts. Names that Python has anyway, and short ones, are left out.
    """
    defined: dict[str, int] = {}
    found = []
    for header in FILE.finditer(text):
        following = SECTION.search(text, header.end())
        end = following.start() if following else len(text)
        own = {match[1] or match[2]: match.start() for match in DEFINITION.finditer(text, header.end(), end)}
        uses: dict[str, Use] = {}
        for match in NAME.finditer(text, header.end(), end):
            if match[0] in defined and match[0] not in own:
                uses.setdefault(match[0], Use(match.start(), match.end(), defined[match[0]]))
        if uses:
            found.append(File(header.start(), tuple(uses.values())))
        defined |= {name: at for name, at in own.items() if len(name) >= SHORTEST_NAME and name not in KNOWN}
    return found


def names_of_other_files(
    scorer: Scorer, dataset: Dataset, domain: str, window: int, limit: int, seed: int = 0
) -> Iterator[Measure]:
    """Nats for each such name at its first use: behind the other files, in the file alone, and what they save.

    The window holds half its tokens of the text before the file, half of the file; names count that are defined and used in
    it. limit: files. Yields nothing without files that use others' names.
    """
    questions: list[_Question] = []
    for document in held_out_documents(dataset, domain, seed):
        ends = _character_ends(scorer, document)
        files = cross_file_uses(scorer.tokenizer.decode(document))
        asked = (_question(document, ends, file, window // 2) for file in files)
        questions += [question for question in asked if question is not None][:FILES_A_DOCUMENT]
        if len(questions) >= limit:
            break
    questions = questions[:limit]
    if not questions:
        return
    passages = [Passage(ids, with_prompt=True) for one in questions for ids in (one.others + one.file, one.file)]
    scores = scorer.score(passages, f"names: {domain}")
    behind, alone = [], []  # scores begin with a text's second token
    for one, both, file in zip(questions, scores[::2], scores[1::2], strict=True):
        behind.append(float(both.prompt.nats[one.tokens + len(one.others) - 1].sum()))
        alone.append(float(file.prompt.nats[one.tokens - 1].sum()))
    names = [one.names for one in questions]
    view = f"{window // 2} tokens of other files"
    yield summed("names", domain, f"nats per name, {view}", behind, names)
    yield summed("names", domain, f"nats per name, the file alone in {window // 2}", alone, names)
    saved = [a - b for a, b in zip(alone, behind, strict=True)]
    yield summed("names", domain, f"nats per name saved by {view}", saved, names, chance=0.0, lower_is_better=False)


@dataclass(frozen=True)
class _Question:
    """The end of what stands before a file, the beginning of the file (ids), and which of its tokens belong to names."""

    others: list[int]
    file: list[int]
    tokens: np.ndarray
    names: int


def _question(document: np.ndarray, ends: np.ndarray, file: File, half: int) -> _Question | None:
    first = int(np.searchsorted(ends, file.start, side="right"))  # the file's first token
    begin, end = max(0, first - half), min(len(document), first + half)
    in_view = int(ends[begin - 1]) if begin else 0  # characters from here on
    tokens, names = set(), 0
    for use in file.uses:
        low = int(np.searchsorted(ends, use.start, side="right"))
        high = int(np.searchsorted(ends, use.end - 1, side="right"))
        if use.defined >= in_view and first < low and high < end:
            tokens.update(range(low - first, high - first + 1))
            names += 1
    if not names or begin == first:
        return None
    return _Question(document[begin:first].tolist(), document[first:end].tolist(), np.array(sorted(tokens)), names)


def _character_ends(scorer: Scorer, document: np.ndarray) -> np.ndarray:
    """How many characters of the text the tokens up to each one hold."""
    pieces = [scorer.tokenizer.decode_bytes([int(id)]) for id in document]
    # A byte that continues a character (10xxxxxx) adds none.
    return np.cumsum([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces])
