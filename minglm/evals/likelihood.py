"""What a base model knows, by the likelihood that it gives to held-out documents, and to right answers among wrong ones."""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from minglm.data.shards import Dataset
from minglm.data.sources import HELD_OUT
from minglm.evals.measure import EvaluationError, Measure, scored, summed
from minglm.evals.scoring import Passage, Scored, Scorer, split_at_choice

PIECES_A_DOCUMENT = 4  # of one document: many documents say more than much of one
CHOICES = 4
CONTINUED = 16  # tokens of each continuation to choose from
_LAST_WORD = re.compile(r"(.*\S)(\s+[^\W\d_]{3,})\W", re.DOTALL)


def held_out_documents(dataset: Dataset, domain: str, seed: int = 0) -> Iterator[np.ndarray]:
    """The held-out documents of a domain, as ids without the final <|endoftext|>, in an order that only the seed decides.

    Raises EvaluationError for a domain that the dataset does not have.
    """
    if domain not in dataset.domains:
        raise EvaluationError(f"{dataset.folder}: no domain {domain!r}; wanted one of {', '.join(dataset.domains)}")
    split = dataset.splits[HELD_OUT]
    (numbers,) = np.nonzero(split.domains == dataset.domains.index(domain))
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(numbers)), kind="stable")
    for number in numbers[order]:
        yield split.document(int(number))[:-1]


def bits_per_byte(scorer: Scorer, dataset: Dataset, domain: str, window: int, max_tokens: int, seed: int = 0) -> Measure | None:
    """Bits per byte of UTF-8 text on held-out documents; the interval is over documents. None if they hold no text.

    Each document is read in windows, of which the later ones do not see the earlier, as in training; a long document gives
    its first windows only. Special tokens are neither counted nor scored.
    """
    lengths = scorer.tokenizer.token_byte_lengths()
    pieces: list[tuple[int, np.ndarray]] = []
    tokens = 0
    for number, document in enumerate(held_out_documents(dataset, domain, seed)):
        own = [document[i : i + window] for i in range(0, min(len(document), PIECES_A_DOCUMENT * window), window)]
        pieces += [(number, piece) for piece in own if len(piece) > 1]
        tokens += sum(map(len, own))
        if tokens >= max_tokens:
            break
    scores = scorer.score([Passage(piece.tolist(), with_prompt=True) for _, piece in pieces], f"bits: {domain}")
    nats, num_bytes = {}, {}
    for (number, piece), one in zip(pieces, scores, strict=True):
        text = lengths[piece[1:]]
        nats[number] = nats.get(number, 0.0) + float(one.prompt.nats[text > 0].sum())
        num_bytes[number] = num_bytes.get(number, 0) + int(text.sum())
    counted = [number for number in nats if num_bytes[number]]
    if not counted:
        return None
    bits, sizes = [nats[n] / math.log(2) for n in counted], [num_bytes[n] for n in counted]
    return summed("bits", domain, f"bits per byte, windows of {window}", bits, sizes)


def choose(scores: Sequence[Scored]) -> float:
    """1 if the first answer is the likeliest, by nats per token; a tie with others counts as a share.

    A sum would favour short answers. Per token, a model that knows nothing, to which all tokens are equally likely, finds
    all answers equal, and so is at chance however long they are.
    """
    values = np.array([one.total / len(one.nats) for one in scores])
    best = np.isclose(values, values.min(), rtol=1e-6, atol=0)
    return float(best[0] / best.sum())


def multiple_choice(scorer: Scorer, questions: Sequence[Passage], about: str = "choose") -> list[float]:
    """Score of each question, whose first continuation is the right answer."""
    return [choose(one.continuations) for one in scorer.score(questions, about)]


def continuations(scorer: Scorer, dataset: Dataset, domain: str, window: int, limit: int, seed: int = 0) -> Measure | None:
    """Which of four continuations is the true one; the others are from other held-out documents of the domain.

    A document is read up to a cut that is drawn, `window` tokens at most. None with fewer documents than answers.
    """
    rng = np.random.default_rng([seed, 1])
    lengths = scorer.tokenizer.token_byte_lengths()
    cuts = []  # (before, after) of each document
    for document in held_out_documents(dataset, domain, seed):
        if len(document) >= 3 * CONTINUED:
            cut = int(rng.integers(2 * CONTINUED, len(document) - CONTINUED + 1))
            before, after = document[max(0, cut + CONTINUED - window) : cut], document[cut : cut + CONTINUED]
            if lengths[after].all() and len(before):  # text only
                cuts.append((before.tolist(), after.tolist()))
        if len(cuts) == limit:
            break
    if len(cuts) < CHOICES:
        return None
    questions = []
    for number, (before, after) in enumerate(cuts):
        others = rng.choice([n for n in range(len(cuts)) if n != number], CHOICES - 1, replace=False)
        questions.append(Passage(before, (after, *(cuts[other][1] for other in others))))
    scores = multiple_choice(scorer, questions, f"continuations: {domain}")
    return scored("completion", domain, f"true continuation of {CHOICES}", scores, 1 / CHOICES)


def next_words(scorer: Scorer, dataset: Dataset, domain: str, window: int, limit: int, seed: int = 0) -> Measure | None:
    """How often greedy decoding writes the next word, letter for letter, behind up to `window` tokens of a document."""
    lengths = scorer.tokenizer.token_byte_lengths()
    passages = []
    for document in held_out_documents(dataset, domain, seed):
        text = scorer.tokenizer.decode(document[: window - 16])
        found = _LAST_WORD.match(text)
        if found and len(found[1]) >= 40 and "�" not in text and lengths[document[:window]].all():
            passages.append(split_at_choice(scorer.tokenizer, found[1], [found[2]]))
        if len(passages) == limit:
            break
    if not passages:
        return None
    found = scorer.score(passages, f"next words: {domain}")
    return scored("completion", domain, "next word exact", [float(one.continuations[0].exact) for one in found])
