"""The documents of a recipe: its ingredients, each of which fills some domains that the stages mix.

| ingredient | domains | what |
| --- | --- | --- |
| prose | prose_best, prose_good, prose_fair | embedded prose in buckets of quality, the worst and near-duplicates left out |
| code | code | embedded source files, some of them with their middle asked for (FIM) |
| repositories | repositories | files of one package behind those that they import, and changes as diffs |
| reasoning, code_tasks, agents, general, long_documents | the same | problems of the task world, with solutions |
"""

import itertools

from minglm.config import ConfigError
from minglm.data.pipeline import INGREDIENTS, stage_corpus
from minglm.data.sources import Corpus, default_documents, documents_from_path, embedded_documents
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.corpus import DOMAINS, DOMAINS_OF_FAMILIES, TaskCorpus
from minglm.train.recipe import Data


def families_of(ingredient: str) -> tuple[str, ...]:
    """The families whose problems fill the domain of this name; none for an ingredient of text."""
    groups = [group for group, domain in DOMAINS.items() if domain == ingredient]
    own = tuple(family for family, domain in DOMAINS_OF_FAMILIES.items() if domain == ingredient)
    return own + tuple(family for group in groups for family in GROUPS[group] if family not in DOMAINS_OF_FAMILIES)


def text_of(data: Data) -> Corpus:
    """The recipe's own text, or the sources that it names, or the default ones: domains prose and code."""
    if data.path:
        return documents_from_path(data.path)
    return embedded_documents(*data.sources) if data.sources else default_documents()


def corpus_of(data: Data) -> Corpus:
    """All documents of the ingredients, and of path or sources, where they are named.

    Raises `ConfigError` for a name that is none.
    """
    problems = (*DOMAINS.values(), *DOMAINS_OF_FAMILIES.values())
    for name in data.ingredients:
        if name not in (*INGREDIENTS, *problems):
            raise ConfigError(f"data.ingredients: {name!r} is none; wanted some of {', '.join((*INGREDIENTS, *problems))}")
    corpora = [text_of(data)] if data.path or data.sources else []
    text = {name: data.characters for name in data.ingredients if name in INGREDIENTS}
    if text:
        corpora.append(stage_corpus(text, data.fim_rate, data.fim_characters, data.repository_characters))
    corpora += [_problems(name, data) for name in data.ingredients if name in problems]
    identity = {"ingredients": [corpus.identity for corpus in corpora]}
    return Corpus(lambda: itertools.chain.from_iterable(corpora), identity)


def _problems(ingredient: str, data: Data) -> Corpus:
    families = families_of(ingredient)
    if ingredient in DOMAINS_OF_FAMILIES.values():
        levels = {name: [d for d in data.long_levels if d in FAMILIES[name].difficulties] for name in families}
    else:
        levels = {name: FAMILIES[name].difficulties[: data.levels or None] for name in families}
    # A seed of the data, not of the run: runs of several seeds share one folder.
    return TaskCorpus(families, data.documents, seed=0, thinking_share=data.thinking_share, difficulties=levels)
