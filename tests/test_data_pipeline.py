"""Cleaning: planted duplicates and overlaps are found, honest text is left; what the pipeline gives is free of both."""

import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.data import pipeline
from minglm.data.duplicates import SHINGLE, SIMILAR, near_duplicates, overlap, without_near_duplicates, without_template_pages
from minglm.data.packing import BEST_FIT
from minglm.data.pipeline import INGREDIENTS, stage_corpus
from minglm.data.quality import BUCKETS, labelled_passages, learn, sort_by_quality
from minglm.data.shards import prepare
from minglm.data.sources import DataError, Document, embedded_documents
from minglm.data.stream import MixtureStream
from minglm.tokenizer import train_tokenizer

WORDS = [f"{a}{b}" for a in ("ba", "ko", "ri", "tu", "sel", "mon") for b in ("da", "fe", "lin", "po", "zur", "ka", "t")]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def documents(texts: list[str], split: str | None = "train") -> list[Document]:
    return [Document(text, str(number), "s", "prose", split=split) for number, text in enumerate(texts)]


def word_runs(text: str, length: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


# ---- duplicates


def planted(texts: list[str], rng: random.Random, number: int, changed: float) -> list[tuple[int, str]]:
    """Copies of `number` texts with this share of their words changed, each with its original's index."""
    copies = []
    for index in rng.sample(range(len(texts)), number):
        words = texts[index].split(" ")
        for place in rng.sample(range(len(words)), max(1, round(changed * len(words)))):
            words[place] = rng.choice(WORDS)
        copies.append((index, " ".join(words)))
    return copies


def test_planted_near_duplicates_are_found_among_embedded_text_and_nothing_else_is(capsys):
    texts = [document.text for document in embedded_documents("python_topics")]
    texts = [one for one in texts if len(one.split(" ")) > 100]
    copies = [copy for seed in range(3) for copy in planted(texts, random.Random(seed), 60, changed=0.02)]
    every = [*texts, *(copy for _, copy in copies)]
    runs = [word_runs(one, SHINGLE) for one in every]
    pairs = {(a, b) for b in range(len(every)) for a in range(b) if similarity(runs[a], runs[b]) >= SIMILAR}
    wanted = {(original, len(texts) + number) for number, (original, _) in enumerate(copies)}
    found = {(a, b) for group in near_duplicates(every) for a in group for b in group if a < b}
    recall, all_planted = len(wanted & pairs & found) / len(wanted & pairs), len(wanted & found) / len(wanted)
    precision = len(found & connected(pairs)) / len(found)
    with capsys.disabled():
        print(
            f"\n  near duplicates: {len(copies)} with 2% of the words changed, {len(wanted & pairs)} similar by {SIMILAR}; "
            f"recall {recall:.3f} of these, {all_planted:.3f} of all, precision {precision:.3f}"
        )
    assert recall >= 0.97 and all_planted >= 0.9 and precision == 1


def similarity(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def connected(pairs: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """All pairs of what is connected by pairs."""
    group = {index: {index} for pair in pairs for index in pair}
    for a, b in pairs:
        if group[a] is not group[b]:
            group[a] |= group[b]
            for index in group[b]:
                group[index] = group[a]
    return {(a, b) for members in group.values() for a in members for b in members if a < b}


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_one_of_each_group_stays_the_held_out_one_where_there_is_one(seed):
    rng = random.Random(seed)
    texts = [text(rng, 120) for _ in range(8)]
    copies = planted(texts, rng, 3, changed=0.01)
    held_out = [Document(copy, f"copy {i}", "s", "prose", split="held_out") for i, (_, copy) in enumerate(copies)]
    kept = without_near_duplicates([*documents(texts), *held_out])
    originals = {str(index) for index, _ in copies}
    assert {d.name for d in kept} == {str(i) for i in range(8)} - originals | {d.name for d in held_out}


def test_a_few_pages_of_a_template_stay():
    rng = random.Random(0)
    page = "Returns the {0} of an array element by element. See also the {1} function, and for {0} of rows the {2} one."
    pages = [page.format(*(f"{rng.randrange(10**6)}x" for _ in range(3))) for _ in range(20)]
    others = [text(rng, 30) for _ in range(20)]
    kept = without_template_pages(documents([*pages, *others]))
    assert [d.text for d in kept] == pages[:3] + others


@given(st.integers(0, 10**6), st.integers(10, 16))
@settings(max_examples=20)
def test_overlap_is_13_words_in_a_row_and_no_fewer(seed, shared):
    rng = random.Random(seed)
    one, other, third = ([f"{who}{rng.randrange(10**9)}" for _ in range(40)] for who in "abc")
    other[5 : 5 + shared] = one[20 : 20 + shared]
    corpus = [
        *documents([" ".join(one), " ".join(third)]),
        *documents([" ".join(other).upper(), "too short"], "held_out"),
    ]
    assert overlap(corpus) == (({2}, {0}) if shared >= 13 else (set(), set()))


# ---- quality


def test_the_judge_tells_good_from_bad_passages_that_it_has_not_seen(capsys):
    good, bad = labelled_passages(embedded_documents("python_topics"))
    judge = learn(good[::2], bad[::2])
    right = [np.mean([judge.score(x) > 0 for x in good[1::2]]), np.mean([judge.score(x) < 0 for x in bad[1::2]])]
    with capsys.disabled():
        print(f"\n  quality: told are {right[0]:.3f} of {len(good) // 2} good passages, {right[1]:.3f} of {len(bad) // 2} bad")
    assert min(right) > 0.9


def test_buckets_get_their_shares_best_first_and_the_worst_is_dropped():
    rng = random.Random(0)
    good, bad = [text(rng, 30) for _ in range(40)], [" ".join(str(rng.random()) for _ in range(12)) for _ in range(40)]
    judge = learn(good, bad)
    mixed = documents([one for pair in zip(good, bad, strict=True) for one in pair])
    sorted_ = sort_by_quality(mixed, judge, shares=(0.2, 0.3, 0.3))
    total = sum(len(d.text) for d in mixed)
    sizes = [sum(len(d.text) for d in sorted_ if d.domain == bucket) / total for bucket in BUCKETS]
    assert sizes == pytest.approx([0.2, 0.3, 0.3], abs=0.02)
    scores = {bucket: [judge.score(d.text) for d in sorted_ if d.domain == bucket] for bucket in BUCKETS}
    assert all(min(scores[a]) >= max(scores[b]) for a, b in pairwise(BUCKETS))
    kept = {d.name for d in sorted_}
    assert max(judge.score(d.text) for d in mixed if d.name not in kept) <= min(scores[BUCKETS[-1]])
    with pytest.raises(DataError, match="0 good and 1 bad"):
        learn([], ["x"])


# ---- the pipeline


@pytest.fixture(scope="module")
def corpus():
    """Everything, from fewer sources than by default."""
    with pytest.MonkeyPatch.context() as patch:
        sources = {"prose": ("python_topics", "docstrings/numpy"), "code": ("code/standard_library",)}
        patch.setattr(pipeline, "SOURCES", sources)
        made = stage_corpus({"prose": 1_500_000, "code": 1_500_000, "repositories": 0}, progress=False)
        yield made.in_memory()


def test_no_13_words_in_a_row_are_in_both_splits(corpus):
    runs = {"train": set(), "held_out": set()}
    for document in corpus:
        runs[document.split] |= word_runs(document.text)
    assert len(runs["held_out"]) > 10_000 and not runs["train"] & runs["held_out"]


def test_every_ingredient_has_both_splits_within_its_limit(corpus):
    domains = {domain for domains in INGREDIENTS.values() for domain in domains}
    size = {(split, domain): 0 for split in ("train", "held_out") for domain in domains}
    for document in corpus:
        size[document.split, document.domain] += len(document.text)
    assert all(size.values())
    assert 1_300_000 <= size["train", "code"] <= 1_500_000 and size["held_out", "code"] <= 150_000
    assert sum(size["train", bucket] for bucket in BUCKETS) <= 1_500_000


def test_a_share_of_training_code_is_to_fill_in_and_no_held_out_text_is(corpus):
    code = [d for d in corpus if d.domain == "code"]
    marked = sum(len(d.text) for d in code if d.marks)
    assert 0.3 < marked / sum(len(d.text) for d in code if d.split == "train") < 0.7
    assert not any(d.marks for d in corpus if d.split == "held_out")


def test_best_fit_wastes_under_2_percent_of_the_embedded_data(corpus, tmp_path, capsys):
    tokenizer = train_tokenizer((d.text for d in list(corpus)[::5]), 2000, show_progress=False)
    dataset = prepare(corpus, tokenizer, tmp_path / "data", progress=False)
    for size in (1024, 2048):
        waste = {}
        for domain in dataset.domains:
            stream = MixtureStream(dataset, "train", size, 0, {domain: 1}, BEST_FIT)
            rows = stream.batch(0, stream.sequences_per_epoch)
            waste[domain] = (rows.document_ids < 0).float().mean().item()
            assert stream.waste == pytest.approx(waste[domain], abs=1e-6)
        with capsys.disabled():
            print(f"\n  best fit at {size:,}: " + ", ".join(f"{name} {share:.2%} waste" for name, share in waste.items()))
        assert max(waste.values()) < 0.02


def test_the_corpus_is_the_same_again_and_its_identity_says_what_made_it():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SOURCES", {"code": ("code/networkx",)})
        options = {"code": 200_000}
        assert list(stage_corpus(options, progress=False)) == list(stage_corpus(options, progress=False))
        identities = [stage_corpus(options, fim_rate=rate, progress=False).identity for rate in (0.5, 0.5, 0.0)]
        assert identities[0] == identities[1] != identities[2]
        assert not any(d.marks for d in stage_corpus(options, fim_rate=0, progress=False))


@pytest.mark.parametrize(
    "arguments, found",
    [
        (({"poems": 1},), "no ingredient 'poems'; wanted some of prose, code, repositories"),
        (({"code": -1},), "'code' is limited to -1 characters"),
        (({"code": 0}, 1.5), "rate 1.5, .* wanted a rate from 0 to 1"),
        (({"code": 0}, 0.5, 10), "characters 10: wanted .* at least 60"),
    ],
)
def test_unfit_ingredients_are_refused_before_anything_is_read(arguments, found):
    with pytest.raises(DataError, match=found):
        stage_corpus(*arguments)
