"""Corpora of problems: the same again for the same arguments, splits apart by content, a domain for each group."""

import collections
import re

import numpy as np
import pytest

from minglm.data.packing import best_fit
from minglm.data.sources import split_documents
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.corpus import TaskCorpus, domain_of
from minglm.tasks.task import TaskError
from minglm.tasks.text import END, THINKING


def small(**options):
    return TaskCorpus(**{"names": ("reasoning",), "documents": 120, "seed": 1, "difficulties": 2, **options})


def test_the_same_arguments_give_the_same_documents_and_others_give_others():
    assert list(small()) == list(small()) and small().identity == small().identity
    for other in (
        small(seed=2),
        small(thinking_share=0.0),
        small(difficulties=3),
        small(names=("agents",)),
        small(documents=119),
    ):
        assert other.identity != small().identity
        assert list(other) != list(small())


def test_a_longer_corpus_begins_with_the_shorter_one():
    assert list(small(documents=40)) == list(small(documents=80))[: len(list(small(documents=40)))]


def test_no_question_of_a_held_out_document_is_in_a_training_document():
    questions = collections.defaultdict(set)
    for split, document in split_documents(small(documents=1_500, difficulties=1)):
        questions[split] |= set(re.findall(r"^Question: (.*)$", document.text, re.MULTILINE))
    assert len(questions["held_out"]) > 40 and len(questions["train"]) > 500
    assert questions["train"].isdisjoint(questions["held_out"])


def test_one_document_in_fifty_is_held_out_and_the_first_one_is():
    splits = [document.split for document in small(problems_per_document=20, thinking_share=0.5)]
    assert splits[0] == "held_out" and 2 <= splits.count("held_out") <= 3


@pytest.mark.parametrize("group", GROUPS)
def test_documents_have_the_domain_of_their_group(group):
    documents = list(TaskCorpus((group,), documents=40, seed=3, difficulties=1))
    names = {document.source.removeprefix("tasks/") for document in documents}
    assert names <= set(GROUPS[group]) and len(names) > 1
    assert all(document.domain == domain_of(document.source.removeprefix("tasks/")) for document in documents)


def test_long_documents_are_a_domain_of_their_own():
    domains = {name: domain_of(name) for name in FAMILIES}
    assert {domains[name] for name in GROUPS["reasoning"]} == {"reasoning"}
    assert domains["long_document"] == "long_documents"


def test_a_document_holds_problems_of_one_family_up_to_both_limits():
    for document in small(problems_per_document=5, characters=400):
        assert document.text.count(END) <= 5 and document.text.endswith(END)
        assert len(document.text) <= 400 or document.text.count(END) == 1


@pytest.mark.parametrize("group", ["agents", "code", "general"])
def test_documents_are_of_many_lengths_so_that_whole_ones_fill_rows(group):
    """Rows of half as many characters again as the longest document: two long ones would not fit."""
    names = [name for name in GROUPS[group] if name != "long_document"]
    lengths = np.array([len(one.text) for one in TaskCorpus(names, 300, seed=1, difficulties=2, characters=2_000)])
    rows = best_fit(lengths, 3_000)
    assert lengths.sum() > 0.95 * 3_000 * (rows.max() + 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_documents_that_think_is_as_told(share):
    thinking = [THINKING in document.text for document in small(documents=500, thinking_share=share)]
    assert abs(sum(thinking) / len(thinking) - share) < 0.08


def test_difficulties_may_be_given_by_family():
    names = ("arithmetic", "ordering")
    corpus = TaskCorpus(names, documents=60, seed=1, difficulties={"arithmetic": [1]})
    sums = [document.text for document in corpus if document.source == "tasks/arithmetic"]
    assert sums and all(re.search(r"\b\d \+ \d\b", text) and not re.search(r"Question: .*\d\d", text) for text in sums)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"names": ("arithmetics",)}, "arithmetics"),
        ({"names": ()}, "no family"),
        ({"documents": 0}, "documents = 0"),
        ({"thinking_share": 1.5}, "1.5"),
        ({"problems_per_document": 0}, "problems_per_document = 0"),
        ({"difficulties": {"ordering": [99]}}, "99"),
        ({"difficulties": {"ordering": []}}, "ordering"),
        ({"difficulties": {"shop_counter": [1]}}, "shop_counter"),
        ({"difficulties": 0}, "no difficulty"),
    ],
)
def test_what_makes_no_corpus_is_refused_at_once(options, found):
    with pytest.raises(TaskError, match=re.escape(found)):
        small(**options)
