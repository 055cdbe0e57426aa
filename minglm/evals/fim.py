"""Infilling: the rest of a line of held-out code, given what stands before and behind it.

In GLM's form, prefix, suffix, middle: `<|code_prefix|>` text `<|code_suffix|>` text `<|code_middle|>`, and the model writes
what is missing and ends the document.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minglm.data.shards import Dataset
from minglm.evals.likelihood import CHOICES, choose, held_out_documents
from minglm.evals.measure import Measure, scored, summed
from minglm.evals.scoring import Passage, Scorer
from minglm.tokenizer import Tokenizer

MARKS = ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>")
LONGEST_LINE = 80  # characters
FEWEST_CHARACTERS = 5  # of a gap, and of the line before it
TRIES = 50  # lines of a document


@dataclass(frozen=True)
class Gap:
    """A line's rest, `middle`, between `before` and `after`; `others`: rests of other lines of the same document."""

    before: str
    middle: str
    after: str
    others: tuple[str, ...]


def gaps(texts: Iterator[str], limit: int, seed: int = 0) -> list[Gap]:
    """A gap in each text that has enough different lines for it, up to `limit`; further ones in the same texts where these do
    not suffice."""
    rng = np.random.default_rng([seed, 2])
    found: list[list[Gap]] = []  # of each text; each gap is a wrong answer to the others
    for text in texts:
        if len(found) == limit:
            break
        rests: dict[str, tuple[int, int]] = {}  # each different rest with its place
        starts = np.cumsum([0] + [len(line) + 1 for line in text.split("\n")])
        lines = text.split("\n")
        for number in rng.integers(len(lines), size=TRIES):
            line = lines[number]
            first = len(line) - len(line.lstrip()) + FEWEST_CHARACTERS
            if len(line) <= LONGEST_LINE and line == line.rstrip() and first <= len(line) - FEWEST_CHARACTERS:
                cut = int(rng.integers(first, len(line) - FEWEST_CHARACTERS + 1))
                rests.setdefault(line[cut:], (int(starts[number]) + cut, int(starts[number]) + len(line)))
            if len(rests) == CHOICES:
                break
        if len(rests) == CHOICES:
            own = rests.items()
            found.append([Gap(text[:a], one, text[b:], tuple(rest for rest in rests if rest != one)) for one, (a, b) in own])
    return [of_text[number] for number in range(CHOICES) for of_text in found][:limit]


def as_written(tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """The text of a document, with its middle put back if it has GLM's marks; None if it has other special tokens."""
    at = [number for number, id in enumerate(ids) if id in tokenizer.special_ids.values()]
    if not at:
        return tokenizer.decode(ids)
    if [ids[number] for number in at] != [tokenizer.special_ids[mark] for mark in MARKS] or at[0] != 0:
        return None
    prefix, suffix, middle = (tokenizer.decode_bytes(ids[a + 1 : b]) for a, b in pairwise([*at, len(ids)]))
    return (prefix + middle + suffix).decode(errors="replace")


def infilling(scorer: Scorer, dataset: Dataset, domain: str, window: int, limit: int, seed: int = 0) -> Iterator[Measure]:
    """How a domain's gaps are filled, in `window` tokens: exactly, by choice among rests of other lines, in bits per byte; and
    the same bits from left to right, without the text behind the gap. Nothing if the tokenizer lacks the marks."""
    tokenizer = scorer.tokenizer
    if any(mark not in tokenizer.special_ids for mark in MARKS):
        return
    texts = (as_written(tokenizer, document.tolist()) for document in held_out_documents(dataset, domain, seed))
    asked = gaps((text for text in texts if text is not None), limit, seed)
    if not asked:
        return
    infill = scorer.score([_infill(scorer, gap, window) for gap in asked], f"infilling: {domain}")
    forward = scorer.score([_forward(scorer, gap, window) for gap in asked], f"left to right: {domain}")
    yield scored("fim", domain, "middle exact", [float(one.continuations[0].exact) for one in infill])
    yield scored("fim", domain, f"middle chosen of {CHOICES}", [choose(one.continuations) for one in infill], 1 / CHOICES)
    sizes = [len(gap.middle.encode()) for gap in asked]
    for name, scores in (("infilling", infill), ("left to right", forward)):
        bits = [float(one.continuations[0].nats[:-1].sum()) / math.log(2) for one in scores]  # without the end
        yield summed("fim", domain, f"bits per byte of the middle, {name}", bits, sizes)


def _infill(scorer: Scorer, gap: Gap, window: int) -> Passage:
    tokenizer = scorer.tokenizer
    prefix, suffix, middle = (tokenizer.special_ids[mark] for mark in MARKS)
    answers = _answers(scorer, gap)
    room = max(2, window - len(MARKS) - max(map(len, answers)))
    before, after = tokenizer.encode(gap.before), tokenizer.encode(gap.after)
    # What one side does not need the other may have.
    left = min(len(before), max(room // 2, room - len(after)))
    return Passage([prefix, *before[len(before) - left :], suffix, *after[: room - left], middle], answers)


def _forward(scorer: Scorer, gap: Gap, window: int) -> Passage:
    (answer, *_) = _answers(scorer, gap)
    before = scorer.tokenizer.encode(gap.before)
    return Passage(before[-max(1, window - len(answer)) :], (answer,))


def _answers(scorer: Scorer, gap: Gap) -> tuple[list[int], ...]:
    """Each rest with the end that says that no more is missing."""
    end = scorer.tokenizer.end_of_document_id
    return tuple([*scorer.tokenizer.encode(rest), end] for rest in (gap.middle, *gap.others))
