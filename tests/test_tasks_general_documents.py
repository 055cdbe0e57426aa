"""Long documents: lengths, depths, and answers that the text alone gives."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.tasks.general import LongDocument, needle_document, recall, recall_text
from minglm.tasks.general.long_document import DIALS, MOST_CANDIDATES
from minglm.tasks.general.passages import FILLER, LONGEST_FILLER, TOWNS, WORDS, passage
from minglm.tasks.task import TaskError
from minglm.tasks.text import prompt_text, read_answer

seeds = st.integers(0, 2**32)
FACT = r"Password: (\w+) (\w+)\."


def answer_by_text(text: str) -> str:
    """What the text alone says."""
    document, question = text.rsplit("\n", 1)
    codes = {town: int(code) for town, code in re.findall(r"The code of (\w+) is (\d{4})\.", document)}
    passwords = dict(re.findall(FACT, document))
    bells = [int(number) for number in re.findall(r"The tower of \w+ has (\d) bells\.", document)]
    if "largest" in question:
        return max(codes, key=codes.get)
    if "How many towns" in question:
        return str(len(codes))
    if "bells" in question:
        return str(sum(bells))
    return ", ".join(f"{word} {passwords[word]}" for word in re.findall(r"\w+", question) if word in passwords)


@given(seeds, st.sampled_from(range(1, 7)))
def test_the_text_alone_gives_the_answer(seed, difficulty):
    problem = LongDocument.sample(random.Random(seed), difficulty)
    assert problem.answer == answer_by_text(problem.messages[0]["content"])


@given(seeds, st.integers(150, 20_000), st.floats(0, 1), st.integers(1, 3), st.integers(0, 1))
@settings(max_examples=60)
def test_a_document_has_the_wanted_length_and_the_needle_its_depth(seed, characters, depth, needles, others):
    characters += 100 * needles
    problem = needle_document(random.Random(seed), characters, depth, needles, others)
    content = problem.messages[0]["content"]
    assert characters - LONGEST_FILLER - 1 <= len(content) <= characters
    facts = re.findall(FACT, problem.document)
    assert len(facts) == needles + others and problem.answer == answer_by_text(content)
    # Of the filler, about the share `depth` stands before some asked needle.
    fillers = [len(part) for part in re.split(r" ?Password: \w+ \w+\. ?", problem.document)]
    before = [sum(fillers[: index + 1]) for index in range(len(facts))]
    asked = [place for place, (town, _) in zip(before, facts, strict=True) if town in problem.asked]
    assert min(abs(place - depth * sum(fillers)) for place in asked) <= LONGEST_FILLER


@given(seeds)
def test_filler_holds_neither_digits_nor_towns_nor_passwords(seed):
    text = passage(random.Random(seed), 2_000, [])
    assert not re.search(r"\d|\n", text) and not set(re.findall(r"\w+", text)) & {*TOWNS, *WORDS}


def test_towns_and_passwords_stand_nowhere_else():
    """Else a document could say two things of a town, or a question give a password away."""
    assert len({*TOWNS, *WORDS}) == len(TOWNS) + len(WORDS) and len(WORDS) >= 20
    problem = needle_document(random.Random(0), 1_000, 0.5, needles=3, others=2)
    around = " ".join((*FILLER, problem.question, re.sub(FACT, "Password: .", problem.document)))
    assert not set(re.findall(r"\w+", around)) & ({*TOWNS, *WORDS} - set(problem.asked))


@pytest.mark.parametrize("depth", [0, 1])
def test_depth_0_is_the_beginning_and_depth_1_the_end(depth):
    document = needle_document(random.Random(0), 500, depth).document
    assert document.startswith("Password: ") if depth == 0 else document.split(". ")[-1].startswith("Password: ")


def test_a_harder_document_is_longer_and_stays_within_its_dial():
    rng = random.Random(1)
    for difficulty, (characters, kinds, _) in DIALS.items():
        seen = set()
        for _ in range(60):
            problem = LongDocument.sample(rng, difficulty)
            seen.add(problem.kind)
            assert characters - LONGEST_FILLER <= len(problem.messages[0]["content"]) <= characters
        assert seen == set(kinds)


@given(seeds, st.sampled_from(range(1, 7)))
def test_candidates_are_the_answer_and_different_wrong_ones(seed, difficulty):
    rng = random.Random(seed)
    problem = LongDocument.sample(rng, difficulty)
    found = problem.candidates(rng, MOST_CANDIDATES)
    assert len(set(found)) == MOST_CANDIDATES
    rewards = [problem.verify([{"role": "assistant", "content": candidate}]).reward for candidate in found]
    assert rewards == [1.0] + [0.0] * (MOST_CANDIDATES - 1)


def test_the_password_at_another_town_is_the_first_wrong_candidate():
    problem = needle_document(random.Random(2), 600, 0.5, others=1)
    [asked] = problem.asked
    [other] = [word for town, word in problem.facts if town != asked]
    assert problem.candidates(random.Random(3), 2) == [problem.answer, f"{asked} {other}"]
    assert problem.answer != f"{asked} {other}" and problem.answer.startswith(f"{asked} ")


@pytest.mark.parametrize("content", ["Tavira red, Orsino lamp", "Tavira  red ,Orsino lamp", "Tavira red, Orsino lamp."])
def test_needles_are_answered_with_each_town_and_its_password_in_the_order_asked(content):
    problem = LongDocument("", "needles", ("Tavira", "Orsino"), (("Orsino", "lamp"), ("Kestra", "boat"), ("Tavira", "red")))
    assert problem.verify([{"role": "assistant", "content": content}]) == (1.0, ())
    for wrong in ("red, lamp", "Orsino lamp, Tavira red", "Tavira lamp, Orsino red", "Tavira red", "Tavira red, Kestra lamp"):
        assert problem.verify([{"role": "assistant", "content": wrong}]).reward == 0


def test_which_password_is_at_a_town_has_no_rule():
    """All pairs are equally likely: each of the 960 pairs of 40 towns and 24 words comes about four times in 4,000 problems."""
    rng = random.Random(7)
    pairs = [problem.facts[0] for problem in (needle_document(rng, 200, 0.5) for _ in range(4_000))]
    counts = Counter(pairs)
    assert max(counts.values()) <= 16 and len(counts) > 0.95 * len(TOWNS) * len(WORDS)


def test_all_needles_of_a_document_are_asked_for_in_a_row():
    problem = needle_document(random.Random(4), 800, 0.3, needles=2, others=3)
    questions = recall(problem)
    assert questions[0] == problem and [len(question.asked) for question in questions] == [2, 3]
    assert {pair for question in questions for pair in question.answer.split(", ")} == {" ".join(f) for f in problem.facts}
    assert {question.document for question in questions} == {problem.document}
    for thinking in (False, True):
        text = recall_text(problem, thinking)
        assert text.startswith(prompt_text(questions[0])) and text.count(problem.document) == 1
        *asked, rest = text.split("\n\n")
        assert rest == "" and len(asked) == len(questions)
        for question, block in zip(questions, asked, strict=True):
            answer = block[block.index("\n", block.index("Give the town")) + 1 :]
            assert question.verify(read_answer(answer)) == (1.0, ())
    with pytest.raises(TaskError, match="sum"):
        recall(LongDocument("", "sum", (), (("Tavira", 3),)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1_000, 1.5), "depth = 1.5: wanted 0"),
        ((1_000, -0.1), "depth = -0.1"),
        ((40, 0.5), "facts alone have"),
        ((1_000, 0.5, 0), "needles = 0"),
        ((9_000, 0.5, 2, len(WORDS)), "at most 24 facts"),
    ],
)
def test_documents_that_cannot_be_are_refused_with_the_reason(arguments, message):
    with pytest.raises(TaskError, match=message):
        needle_document(random.Random(0), *arguments)
