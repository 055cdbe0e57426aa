"""The documents of a recipe: its ingredients, each of which fills some domains that the stages mix.

| ingredient | domains | what |
| --- | --- | --- |
| prose | prose_best, prose_good, prose_fair | embedded prose in buckets of quality, the worst and near-duplicates left out |
| code | code | embedded source files, some of them with their middle asked for (FIM) |
| repositories | repositories | files of one package behind those that they import, and changes as diffs |
| reasoning, code_tasks, agents, general, long_documents | the same | problems of the task world, with solutions |
| short_documents | the same | the problems of long_documents, at difficulties as easy as the others' |
"""

import re

from minglm.config import ConfigError
from minglm.data.hugging_face import hugging_face_corpus
from minglm.data.pipeline import INGREDIENTS, stage_corpus
from minglm.data.sources import Corpus, default_documents, documents_from_path, embedded_documents
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.corpus import DOMAINS, DOMAINS_OF_FAMILIES, TaskCorpus
from minglm.train.recipe import Data

LONG_DOCUMENTS, SHORT_DOCUMENTS = DOMAINS_OF_FAMILIES["long_document"], "short_documents"
PROBLEMS = 32  # of a document at most
PROBLEM_CHARACTERS = 2_000  # of a document of several problems: some 600 tokens of a small vocabulary


def families_of(ingredient: str) -> tuple[str, ...]:
    """The families whose problems fill the domain of this name; none for an ingredient of text."""
    if ingredient == SHORT_DOCUMENTS:
        ingredient = LONG_DOCUMENTS
    groups = [group for group, domain in DOMAINS.items() if domain == ingredient]
    own = tuple(family for family, domain in DOMAINS_OF_FAMILIES.items() if domain == ingredient)
    return own + tuple(family for group in groups for family in GROUPS[group] if family not in DOMAINS_OF_FAMILIES)


def corpus_of(data: Data) -> Corpus:
    """All documents that the recipe asks for: of path or sources, ingredients, datasets; the default sources if of none.

    What is embedded or made is kept once it has been read: tokenizer and shards share one reading, and a run that goes on
    needs none. Own text and datasets, which may be large, are streamed. Joined with others, they are split as they would
    be alone: of a few files the last tenth of each is held out. Raises `ConfigError` for a name that is none.
    """
    problems = (*DOMAINS.values(), *DOMAINS_OF_FAMILIES.values(), SHORT_DOCUMENTS)
    for name in data.ingredients:
        if name not in (*INGREDIENTS, *problems):
            raise ConfigError(f"data.ingredients: {name!r} is none; wanted some of {', '.join((*INGREDIENTS, *problems))}")
    for family in data.families:
        if family not in FAMILIES:
            raise ConfigError(f"data.families: {family!r} is none; wanted some of {', '.join(FAMILIES)}")
    kept: list[Corpus] = []
    text = {name: data.characters for name in data.ingredients if name in INGREDIENTS}
    if text:
        kept.append(stage_corpus(text, data.fim_rate, data.fim_characters, data.repository_characters))
    kept += [_problems(name, data) for name in data.ingredients if name in problems]
    if data.sources and not data.path:
        kept.append(embedded_documents(*data.sources))
    streamed = [_dataset(domain, where) for domain, where in data.datasets.items()]
    if data.path:
        streamed.append(documents_from_path(data.path))
    if not kept and not streamed:
        kept.append(default_documents())
    if len(kept) + len(streamed) > 1:
        streamed = [corpus.with_splits() for corpus in streamed]
    corpora = [*(corpus.in_memory() for corpus in kept), *streamed]
    return corpora[0] if len(corpora) == 1 else Corpus.joined(corpora)


def _dataset(domain: str, where: str) -> Corpus:
    """As in "owner/name:configuration@revision#column"."""
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([^@#]+))?(?:@([^#]+))?(?:#(.+))?", where)
    if not found:
        raise ConfigError(
            f"data.datasets.{domain} = {where!r}: wanted the name of a dataset, such as "
            "'HuggingFaceFW/fineweb-edu:sample-10BT'; fill it in, or leave the domain out of datasets and mixtures"
        )
    path, name, revision, column = found.groups()
    return hugging_face_corpus(path, name, column=column or "text", domain=domain, revision=revision)


def _problems(ingredient: str, data: Data) -> Corpus:
    families = tuple(name for name in families_of(ingredient) if not data.families or name in data.families)
    if not families:
        raise ConfigError(
            f"data.families: none of ingredient {ingredient!r}; wanted some of {', '.join(families_of(ingredient))}"
        )
    levels = {name: FAMILIES[name].difficulties[: data.levels or None] for name in families}
    if ingredient == LONG_DOCUMENTS:
        levels = {name: [d for d in data.long_levels if d in FAMILIES[name].difficulties] for name in families}
    # The next document would name the same towns with other passwords: what to recall would not be clear.
    most = 1 if ingredient in (LONG_DOCUMENTS, SHORT_DOCUMENTS) else PROBLEMS
    # A seed of the data, not of the run: runs of several seeds share one folder.
    return TaskCorpus(families, data.documents, 0, data.thinking_share, levels, most, PROBLEM_CHARACTERS, ingredient)
