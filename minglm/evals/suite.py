"""The suites: which parts of the evaluation are asked of a model, and all of them in one call.

    results = evaluate(model, tokenizer, dataset, suite="base")
    print(table({"this model": results}))

Problems and documents depend on `seed` and `limit` alone, so that two models are asked the same. The RoPE base and the
positions are those of the model's own config.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tqdm import tqdm

from minglm.data.shards import Dataset
from minglm.engine.engine import Engine
from minglm.evals import families, likelihood
from minglm.evals.fim import infilling
from minglm.evals.measure import EvaluationError, Measure, Results
from minglm.evals.names import names_of_other_files
from minglm.evals.needle import needle_grid, shortest_length
from minglm.evals.scoring import Scorer
from minglm.model import GLM
from minglm.tasks import FAMILIES
from minglm.tokenizer import Tokenizer

CODE, REPOSITORIES = "code", "repositories"  # domains
LIMIT = 16
SHORTEST_WINDOW = 32  # tokens
WINDOW = 512  # tokens of a held-out document that are read at once
LONGEST_VIEW = 2048  # tokens, half of them of other files where names are asked for
LONG_DOMAINS = (REPOSITORIES, "long_documents")
SHORTEST_NEEDLE, LONGEST_NEEDLE = 128, 4096  # tokens; each length is twice the one before
BITS_TOKENS = 512  # of each domain, times the limit


@dataclass
class Subject:
    """What is judged, and how much is asked of it. details: filled by the parts."""

    model: GLM
    tokenizer: Tokenizer
    dataset: Dataset | None
    limit: int
    seed: int
    window: int
    levels: int
    families: Sequence[str]
    needle_lengths: Sequence[int]
    progress: bool
    details: dict[str, Any]

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.model, self.tokenizer, progress=self.progress)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)

    @property
    def domains(self) -> list[str]:
        return [] if self.dataset is None else self.dataset.held_out_domains

    @property
    def views(self) -> list[int]:
        """The tokens that are read at once, and the most that may be."""
        return list(dict.fromkeys((self.window, min(self.model.config.max_position_embeddings, LONGEST_VIEW))))


def _bits(subject: Subject) -> Iterator[Measure | None]:
    """With the short view; documents that are made of many pieces with the longest, too."""
    tokens = BITS_TOKENS * subject.limit
    for domain in subject.domains:
        for view in subject.views if domain in LONG_DOMAINS else (subject.window,):
            yield likelihood.bits_per_byte(subject.scorer, subject.dataset, domain, view, tokens, subject.seed)


def _completion(subject: Subject) -> Iterator[Measure | None]:
    for domain in subject.domains:
        arguments = (subject.scorer, subject.dataset, domain, subject.window, 2 * subject.limit, subject.seed)
        yield likelihood.continuations(*arguments)
        yield likelihood.next_words(*arguments)


def _fim(subject: Subject) -> Iterator[Measure]:
    if CODE in subject.domains:
        yield from infilling(subject.scorer, subject.dataset, CODE, subject.window, 2 * subject.limit, subject.seed)


def _names(subject: Subject) -> Iterator[Measure]:
    """With a short view, that every stage has learnt, and with the longest."""
    for view in subject.views if REPOSITORIES in subject.domains else ():
        yield from names_of_other_files(subject.scorer, subject.dataset, REPOSITORIES, view, 2 * subject.limit, subject.seed)


def _needle(subject: Subject) -> Iterator[Measure]:
    shortest = shortest_length(subject.scorer)
    lengths = [length for length in subject.needle_lengths if length >= shortest]
    if not lengths:  # a vocabulary of bytes and few positions
        return
    grid = needle_grid(subject.scorer, lengths, max(1, subject.limit // 2), seed=subject.seed)
    subject.details["needle"] = grid.details()
    yield from grid.measures()


def _likelihood(subject: Subject) -> Iterator[Measure]:
    found = list(families.graded(subject.scorer, 2 * subject.limit, subject.seed, subject.levels, subject.families))
    yield from found
    yield from families.by_group(found)


def _rewards(suite: str) -> Callable[[Subject], Iterator[Measure]]:
    def rewards(subject: Subject) -> Iterator[Measure]:
        arguments = (subject.engine, suite, subject.limit, subject.seed, subject.levels, subject.families, subject.progress)
        found = list(families.rewards(*arguments))
        yield from found
        yield from families.by_group(found)

    return rewards


PARTS: dict[str, Callable[[Subject], Iterator[Measure | None]]] = {
    "bits": _bits,
    "completion": _completion,
    "fim": _fim,
    "names": _names,
    "needle": _needle,
    "likelihood": _likelihood,
    "families": _rewards("base"),
    "chat": _rewards("chat"),
}
SUITES = {"base": tuple(part for part in PARTS if part != "chat"), "chat": ("chat",), "all": tuple(PARTS)}


def parts_of(suite: str) -> tuple[str, ...]:
    """The parts of a suite, or of several parts joined by commas. Raises EvaluationError for another name."""
    parts = SUITES.get(suite) or tuple(suite.split(","))
    for part in parts:
        if part not in PARTS:
            raise EvaluationError(f"suite = {suite!r}: wanted {', '.join(SUITES)}, or some of {', '.join(PARTS)} with commas")
    return parts


def needle_lengths_of(positions: int) -> tuple[int, ...]:
    """128, 256, ... tokens, to twice the model's positions or as far as we have patience."""
    lengths = [SHORTEST_NEEDLE]
    while lengths[-1] * 2 <= min(2 * positions, LONGEST_NEEDLE):
        lengths.append(lengths[-1] * 2)
    return tuple(lengths)


def evaluate(
    model: GLM,
    tokenizer: Tokenizer,
    dataset: Dataset | None,
    suite: str = "base",
    limit: int = LIMIT,
    seed: int = 0,
    *,
    label: str = "model",
    window: int | None = None,
    levels: int = families.LEVELS,
    families_asked: Sequence[str] | None = None,
    needle_lengths: Sequence[int] | None = None,
    progress: bool = False,
) -> Results:
    """Judge a model.

    Args:
        dataset: whose held-out documents are read; None leaves out what needs them.
        suite: "base", "chat", "all", or parts such as "bits,needle".
        limit: problems of each family and mode; other parts ask in proportion.
        seed: which problems and documents.
        label: what the results call the model.
        window: tokens of a document read at once, at most the model's positions (by default WINDOW).
        levels: of each family's difficulties, from the easiest on.
        families_asked: names from `minglm.tasks.FAMILIES`; by default all.
        needle_lengths: of the needle grid, in tokens; may be beyond the model's positions.

    Raises EvaluationError for an argument out of its range.
    """
    positions = model.config.max_position_embeddings
    names = list(FAMILIES) if families_asked is None else list(families_asked)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise EvaluationError(f"families {unknown}: wanted some of {', '.join(FAMILIES)}")
    if limit < 1 or levels < 1 or (window is not None and not SHORTEST_WINDOW <= window <= positions):
        raise EvaluationError(
            f"limit = {limit}, levels = {levels}, window = {window}: wanted 1 or more each, a window of "
            f"{SHORTEST_WINDOW} to {positions} tokens, the model's positions"
        )
    parts = parts_of(suite)
    if dataset is not None and dataset.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise EvaluationError(f"{dataset.folder} holds tokens of another tokenizer than the model's; prepare the text again")
    results = Results(label, suite, limit, seed)
    subject = Subject(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        limit=limit,
        seed=seed,
        window=window or min(WINDOW, positions),
        levels=levels,
        families=names,
        needle_lengths=needle_lengths or needle_lengths_of(positions),
        progress=progress,
        details=results.details,
    )
    with tqdm(parts, desc=label, unit="part", disable=not progress) as bar:
        for part in bar:
            bar.set_postfix_str(part)
            results.measures += [measure for measure in PARTS[part](subject) if measure is not None]
    return results
