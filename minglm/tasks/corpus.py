"""Mid-training text made of problems: questions with worked solutions, several to a document, as minglm.tasks.text writes.

GLM-4.5's mid-training adds synthetic reasoning data and agents' trajectories (paper, section 2.3). Problems of one family
share a document, as in the few-shot form in which a base model is asked; so it also learns to go on as the examples do.

    corpus = TaskCorpus(("reasoning", "agents"), documents=20_000, seed=1, difficulties=3)

Training documents hold problems of the training split, and the documents that are held out those of the other one.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from minglm.data.sources import HELD_OUT_ONE_IN, Corpus, Document
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.general.long_document import NEEDLES, LongDocument
from minglm.tasks.general.recall import recall_text
from minglm.tasks.task import HELD_OUT, TRAIN, Problem, TaskError, problems
from minglm.tasks.text import document

DOMAINS = {"reasoning": "reasoning", "code": "code_tasks", "agents": "agents", "general": "general"}
"""The domain of each group's documents; of some families' own in `DOMAINS_OF_FAMILIES`."""
DOMAINS_OF_FAMILIES = {"long_document": "long_documents"}


class TaskCorpus(Corpus):
    """Documents of problems; document n is a function of the arguments and n."""

    def __init__(
        self,
        names: Sequence[str],
        documents: int,
        seed: int,
        thinking_share: float = 0.5,
        difficulties: Mapping[str, Sequence[int]] | int | None = None,
        problems_per_document: int = 8,
        characters: int = 2_000,
        domain: str | None = None,
    ):
        """
        Args:
            names: of families, or of groups for all their families. Each document is of one, all equally likely.
            documents: how many, of which one in 50 is held out (the first one is).
            seed: of everything.
            thinking_share: the share of documents whose solutions are worked.
            difficulties: of each family by name; one number n for the n easiest of every family; None for all. A family
                that the mapping lacks has all.
            problems_per_document: at most.
            characters: at most, unless one problem alone is longer. Each document has a limit of its own, drawn from a
                third of this to all of it: documents of many lengths pack well.
            domain: of all documents; None: of each, its family's (`domain_of`).

        Raises TaskError for names and difficulties that do not exist, and numbers that make no document.
        """
        families = _families(names)
        if documents < 1 or problems_per_document < 1 or not 0 <= thinking_share <= 1:
            raise TaskError(
                f"documents = {documents}, problems_per_document = {problems_per_document}, thinking_share = "
                f"{thinking_share}: wanted at least 1, at least 1, and a share from 0 to 1"
            )
        chosen = _chosen(families, difficulties)
        options = (seed, thinking_share, problems_per_document, characters, domain)
        identity = {
            "tasks": {name: list(chosen[name]) for name in chosen},
            "documents": documents,
            "options": list(options),
            "program": _program(),
        }
        super().__init__(functools.partial(_read, families, chosen, documents, *options), identity)


def domain_of(family: str) -> str:
    """The domain of documents of a family."""
    group = next(group for group, names in GROUPS.items() if family in names)
    return DOMAINS_OF_FAMILIES.get(family, DOMAINS[group])


def _families(names: Sequence[str]) -> list[type[Problem]]:
    """In the order of the registry, each once."""
    known = (*GROUPS, *FAMILIES)
    for name in names:
        if name not in known:
            raise TaskError(f"no group or family {name!r}; there are the groups {list(GROUPS)} and families {list(FAMILIES)}")
    wanted = {family for name in names for family in GROUPS.get(name, (name,))}
    if not wanted:
        raise TaskError(f"names = {list(names)}: no family in it; the groups are {list(GROUPS)}")
    return [FAMILIES[name] for name in FAMILIES if name in wanted]


def _chosen(
    families: Sequence[type[Problem]], difficulties: Mapping[str, Sequence[int]] | int | None
) -> dict[str, tuple[int, ...]]:
    if isinstance(difficulties, Mapping):
        names = [family.family for family in families]
        if unknown := sorted(set(difficulties) - set(names)):
            raise TaskError(f"difficulties are given for {unknown}, which are not among the families {names}")
        chosen = {family.family: tuple(difficulties.get(family.family, family.difficulties)) for family in families}
    else:
        most = None if difficulties is None else max(0, difficulties)
        chosen = {family.family: tuple(family.difficulties[:most]) for family in families}
    for family in families:
        if not chosen[family.family]:
            raise TaskError(f"no difficulty is chosen for {family.family}, which has {list(family.difficulties)}")
        for difficulty in chosen[family.family]:
            family.check_difficulty(difficulty)
    return chosen


def _read(
    families: Sequence[type[Problem]],
    chosen: Mapping[str, Sequence[int]],
    documents: int,
    seed: int,
    thinking_share: float,
    problems_per_document: int,
    characters: int,
    domain: str | None,
) -> Iterator[Document]:
    for number in range(documents):
        rng = random.Random(f"{seed} {number}")
        family = rng.choice(families)
        split = HELD_OUT if number % HELD_OUT_ONE_IN == 0 else TRAIN
        thinking = rng.random() < thinking_share
        # Were all documents of one length, just over half a row say, best fit could not pack them whole.
        limit = rng.randint(characters // 3, characters)
        text = ""
        drawn = problems(family, split, rng.getrandbits(62), chosen[family.family])
        for problem in itertools.islice(drawn, problems_per_document):
            more = _text(problem, thinking)
            if text and len(text) + len(more) > limit:
                break
            text += more
        name = f"{family.family}/{seed}/{number}"
        yield Document(text, name, f"tasks/{family.family}", domain or domain_of(family.family), split=split)


def _text(problem: Problem, thinking: bool) -> str:
    """A long document is asked for all its passwords in a row: one answer would teach too little for so much text."""
    if isinstance(problem, LongDocument) and problem.kind in NEEDLES:
        return recall_text(problem, thinking)
    return document(problem, thinking)


@functools.cache
def _program() -> str:
    """A hash of the source of all families: another program makes other problems of the same seed."""
    folder = Path(__file__).parent
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]
