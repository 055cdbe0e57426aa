"""Held-out text: bits per byte, continuations, words, gaps and names; known by heart 1.0, unknown at chance."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from memorised import fresh, learn, memorised, tokenizer_of

from minglm.data.shards import Dataset, prepare
from minglm.data.sources import HELD_OUT, Corpus, Document
from minglm.evals.fim import MARKS, gaps, infilling
from minglm.evals.likelihood import bits_per_byte, choose, continuations, held_out_documents, multiple_choice, next_words
from minglm.evals.measure import EvaluationError
from minglm.evals.names import cross_file_uses, names_of_other_files
from minglm.evals.scoring import Passage, Scorer

NOUNS = "fox river sailor garden market window letter kettle basket copper meadow lantern".split()
VERBS = "carries follows watches remembers paints gathers".split()


def story(number: int) -> str:
    """The number at its beginning tells each story from the others."""
    draw = random.Random(number)
    sentences = [f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for _ in range(9)]
    return f"{number} " + " ".join(sentences)


STORIES = tuple(story(seed) for seed in range(8))


def dataset_of(folder: Path, tokenizer, **domains: tuple[str, ...]) -> Dataset:
    documents = [
        Document(text, f"{domain}{number}", "test", domain, split=HELD_OUT)
        for domain, texts in domains.items()
        for number, text in enumerate(texts)
    ]
    return prepare(Corpus.from_documents(documents), tokenizer, folder, progress=False)


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Dataset:
    return dataset_of(tmp_path_factory.mktemp("stories") / "data", tokenizer_of(STORIES), prose=STORIES)


def test_bits_per_byte_are_the_models_own_on_every_window(stories):
    tokenizer = tokenizer_of(STORIES)
    model = fresh(tokenizer)
    found = bits_per_byte(Scorer(model, tokenizer), stories, "prose", window=20, max_tokens=10**6)
    nats = num_bytes = 0
    for text in STORIES:
        ids = tokenizer.encode(text)[:80]  # the first four windows
        for start in range(0, len(ids), 20):
            window = torch.tensor([ids[start : start + 20]])
            with torch.no_grad():
                log_probability = model(window).logits.log_softmax(-1)[0, :-1]
            nats -= log_probability[torch.arange(window.shape[1] - 1), window[0, 1:]].sum().item()
            num_bytes += len(tokenizer.decode_bytes(window[0, 1:].tolist()))
    assert found.estimate.value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found.estimate.count == len(STORIES)
    assert found.estimate.low < found.estimate.value < found.estimate.high


def test_a_model_that_knows_the_text_needs_few_bits_and_a_fresh_one_all(stories):
    model, tokenizer = memorised(STORIES)
    known = bits_per_byte(Scorer(model, tokenizer), stories, "prose", window=512, max_tokens=10**6)
    unknown = bits_per_byte(Scorer(fresh(tokenizer), tokenizer), stories, "prose", window=512, max_tokens=10**6)
    assert known.estimate.high < 0.1 < 1 < unknown.estimate.low


def test_max_tokens_takes_the_first_documents_of_one_order(stories):
    tokenizer = tokenizer_of(STORIES)
    found = bits_per_byte(Scorer(fresh(tokenizer), tokenizer), stories, "prose", window=512, max_tokens=100)
    assert 1 <= found.estimate.count < len(STORIES)
    orders = [[tokenizer.decode(ids) for ids in held_out_documents(stories, "prose", seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(STORIES)
    with pytest.raises(EvaluationError, match="no domain 'code'; wanted one of prose"):
        list(held_out_documents(stories, "code"))


def test_continuations_and_words_known_by_heart_are_right_and_unknown_ones_at_chance(stories):
    model, tokenizer = memorised(STORIES)
    # The beginnings in sight, for documents by heart are known from their beginnings.
    known = continuations(Scorer(model, tokenizer), stories, "prose", window=512, limit=8)
    assert known.estimate.value == 1.0 and known.chance == 0.25
    words = next_words(Scorer(model, tokenizer), stories, "prose", window=512, limit=8)
    assert words.estimate.value == 1.0
    scores = []
    for seed in range(12):
        scorer = Scorer(fresh(tokenizer, seed), tokenizer)
        scores.append(continuations(scorer, stories, "prose", window=64, limit=8, seed=seed).estimate.value)
        assert next_words(scorer, stories, "prose", window=64, limit=8).estimate.value < 0.3
    assert abs(np.mean(scores) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (12 * 8))


def test_too_few_documents_have_no_continuations(tmp_path):
    tokenizer = tokenizer_of(STORIES)
    dataset = dataset_of(tmp_path / "data", tokenizer, prose=STORIES[:3])
    assert continuations(Scorer(fresh(tokenizer), tokenizer), dataset, "prose", 64, 8) is None


def test_a_model_that_knows_nothing_is_exactly_at_chance_however_long_the_answers():
    """A sum of nats, or nats per byte, would always choose the shortest answer or that of the longest tokens."""
    tokenizer = tokenizer_of(STORIES)
    model = fresh(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are equally likely
    answers = [" fox", " fox and the river", " lantern.", " x"]
    for first in range(4):
        ordered = answers[first:] + answers[:first]
        passage = Passage(tokenizer.encode("The"), tuple(tokenizer.encode(answer) for answer in ordered))
        assert len({len(ids) for ids in passage.continuations}) > 1
        assert multiple_choice(Scorer(model, tokenizer), [passage]) == [0.25]
    totals = [one.total for one in Scorer(model, tokenizer).score([passage])[0].continuations]
    assert totals.count(min(totals)) < 4  # by sums it would not be


def test_the_likeliest_answer_is_chosen_by_nats_per_token():
    model, tokenizer = memorised(STORIES)
    ids = tokenizer.encode(STORIES[0])
    right, short = ids[20:], tokenizer.encode(STORIES[1])[:1]
    scores = Scorer(model, tokenizer).score([Passage(ids[:20], (right, short)), Passage(ids[:20], (short, right))])
    assert [choose(one.continuations) for one in scores] == [1.0, 0.0]


# ---- infilling

CODE = tuple(
    "\n".join(
        f"def {draw.choice(VERBS)}_{draw.choice(NOUNS)}({draw.choice(NOUNS)}):\n"
        f"    {draw.choice(NOUNS)} = {draw.choice(NOUNS)} + {draw.randint(10, 99)}\n"
        f"    return {draw.choice(NOUNS)} * {draw.choice(VERBS)}\n"
        for _ in range(3)
    )
    for draw in map(random.Random, range(5))
)


def test_a_gap_and_its_surroundings_are_the_document():
    for gap, text in zip(gaps(iter(CODE), 5), CODE, strict=True):
        assert gap.before + gap.middle + gap.after == text
        assert len(gap.middle) >= 5 and "\n" not in gap.middle and gap.after[:1] in ("\n", "")
        assert len(gap.others) == 3 and gap.middle not in gap.others
        assert all(other in text for other in gap.others)
    assert gaps(iter(CODE), 5, seed=1) != gaps(iter(CODE), 5)


def test_where_texts_are_few_each_has_several_gaps():
    few, many = gaps(iter(CODE), 3), gaps(iter(CODE), 100)
    assert few == many[:3] and len(many) == 4 * len(CODE)
    for number, text in enumerate(CODE):
        own = many[number :: len(CODE)]
        assert {gap.before + gap.middle + gap.after for gap in own} == {text} and len({gap.middle for gap in own}) == 4


def test_gaps_learnt_by_heart_are_filled_and_a_fresh_model_fills_none(tmp_path):
    tokenizer = tokenizer_of(CODE)
    dataset = dataset_of(tmp_path / "data", tokenizer, code=CODE)
    prefix, suffix, middle = (tokenizer.special_ids[mark] for mark in MARKS)
    texts = (tokenizer.decode(ids) for ids in held_out_documents(dataset, "code"))
    documents = [
        [
            *[prefix, *tokenizer.encode(gap.before), suffix, *tokenizer.encode(gap.after)],
            *[middle, *tokenizer.encode(gap.middle), tokenizer.end_of_document_id],
        ]
        for gap in gaps(texts, 5)
    ]
    model = learn(fresh(tokenizer), documents, [document.index(middle) + 1 for document in documents])
    known = {m.quantity: m.estimate.value for m in infilling(Scorer(model, tokenizer), dataset, "code", 512, 5)}
    assert known["middle exact"] == known["middle chosen of 4"] == 1.0
    assert known["bits per byte of the middle, infilling"] < 0.1 < known["bits per byte of the middle, left to right"]
    unknown = {m.quantity: m.estimate.value for m in infilling(Scorer(fresh(tokenizer), tokenizer), dataset, "code", 512, 5)}
    assert unknown["middle exact"] == 0 and unknown["bits per byte of the middle, infilling"] > 1


@pytest.mark.parametrize("window", [40, 64, 512])
def test_both_sides_of_a_gap_fit_the_window(tmp_path, window):
    from minglm.evals.fim import _infill

    tokenizer = tokenizer_of(CODE)
    scorer = Scorer(fresh(tokenizer), tokenizer)
    for gap in gaps(iter(CODE), 5):
        passage = _infill(scorer, gap, window)
        assert passage.longest <= window
        before, _, after = tokenizer.decode(passage.prompt).partition("<|code_suffix|>")
        assert gap.before.endswith(before.removeprefix("<|code_prefix|>"))
        assert gap.after.startswith(after.removesuffix("<|code_middle|>"))


# ---- names of other files

REPOSITORY = (
    "# file: shop/stock.py\n"
    "LARGEST_ORDER = 40\n\n\n"
    "class Warehouse:\n"
    "    pass\n\n\n"
    "def add(a, b):\n"
    "    inner = a + b\n"
    "    return inner\n"
    "# file: shop/counter.py\n"
    "from shop.stock import Warehouse, add\n\n\n"
    "def print_bill(rows):\n"
    "    return Warehouse(rows, LARGEST_ORDER, add, inner)\n"
    "# file: shop/again.py\n"
    "Warehouse = None\n"
    "print_bill(Warehouse)\n"
)


def test_names_are_first_uses_of_what_another_file_defines():
    files = cross_file_uses(REPOSITORY)
    found = [[REPOSITORY[use.start : use.end] for use in file.uses] for file in files]
    assert found == [["Warehouse", "LARGEST_ORDER"], ["print_bill"]]  # `add` is short, `inner` no name of the file's
    assert [REPOSITORY[file.start :].split("\n")[0] for file in files] == ["# file: shop/counter.py", "# file: shop/again.py"]
    first = files[0].uses[0]
    assert first.start == REPOSITORY.index("Warehouse, add") and first.defined == REPOSITORY.index("class Warehouse")


def test_the_file_that_defines_a_name_saves_nats_to_a_model_that_knows_the_repository(tmp_path):
    tokenizer = tokenizer_of((REPOSITORY, *CODE))
    dataset = dataset_of(tmp_path / "data", tokenizer, repositories=(REPOSITORY,))
    model = learn(fresh(tokenizer), [tokenizer.encode(REPOSITORY)])
    behind, alone, saved = names_of_other_files(Scorer(model, tokenizer), dataset, "repositories", 512, 4)
    assert behind.estimate.value < 0.5 < alone.estimate.value
    assert saved.estimate.value == pytest.approx(alone.estimate.value - behind.estimate.value)
    assert behind.estimate.count == 2  # files


def test_nats_of_names_are_those_of_the_tokens_that_spell_them(tmp_path):
    tokenizer = tokenizer_of((REPOSITORY, *CODE))
    dataset = dataset_of(tmp_path / "data", tokenizer, repositories=(REPOSITORY,))
    model = fresh(tokenizer)
    behind, *_ = names_of_other_files(Scorer(model, tokenizer), dataset, "repositories", 512, 4)
    ids = tokenizer.encode(REPOSITORY)
    with torch.no_grad():
        log_probability = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    nats = 0.0
    for file in cross_file_uses(REPOSITORY):
        for use in file.uses:
            at = 0
            for number, id in enumerate(ids):
                size = len(tokenizer.decode_bytes([id]))
                if at < use.end and at + size > use.start:
                    nats -= log_probability[number - 1, id].item()
                at += size
    assert behind.estimate.value == pytest.approx(nats / 3, rel=1e-4)


def test_names_defined_out_of_view_are_left_out(tmp_path):
    tokenizer = tokenizer_of((REPOSITORY, *CODE))
    long = REPOSITORY.replace("def add", "# filler\n" * 60 + "def add")
    dataset = dataset_of(tmp_path / "data", tokenizer, repositories=(long,))
    scorer = Scorer(fresh(tokenizer), tokenizer)
    near = list(names_of_other_files(scorer, dataset, "repositories", 128, 4))
    assert near[0].estimate.count == 1  # print_bill alone
    assert list(names_of_other_files(scorer, dataset, "repositories", 2048, 4))[0].estimate.count == 2
