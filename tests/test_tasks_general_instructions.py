"""Constraints that a program checks: each by hand-written texts, and all compositions that are drawn."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.tasks.general import InstructionFollowing
from minglm.tasks.general.constraints import Constraint
from minglm.tasks.general.draft import WORDS, Draft, Unfit, words_of
from minglm.tasks.general.forms import KINDS
from minglm.tasks.task import reply

seeds = st.integers(0, 2**32)

# Kind, number, words; texts that keep it; texts that do not.
TEXTS = [
    ("avoid_letter", 0, "e", ["sun and moon"], ["sea", "SEA"]),
    ("words_begin", 0, "s", ["sun Sea", "7 stars"], ["sun moon"]),
    ("short_words", 3, "", ["sun sea"], ["sun moon"]),
    ("long_words", 4, "", ["moon star"], ["moon sea"]),
    ("words_exactly", 3, "", ["a b c", "- a\n- b, 7 c!"], ["a b", "a b c d"]),
    ("words_at_least", 2, "", ["a b", "a b c"], ["a", "a 7"]),
    ("words_at_most", 2, "", ["a", "a b"], ["a b c"]),
    ("characters_at_most", 10, "", ["sun moon!!"], ["sun moon!!!"]),
    ("avoid_word", 0, "sun", ["moon sunny"], ["moon sun", "Sun."]),
    ("include_word", 0, "sun", ["the Sun!"], ["sunny"]),
    ("include_two", 0, "sun moon", ["moon, sun"], ["moon moon", "sun"]),
    ("word_times", 2, "sun", ["sun moon Sun"], ["sun moon", "sun sun sun"]),
    ("one_of", 0, "sun moon", ["moon moon", "a sun"], ["sun moon", "sea"]),
    ("include_number", 42, "", ["a 42 b", "a 42."], ["a 142", "a 4 2", "a"]),
    ("no_digits", 0, "", ["four"], ["4", "a1"]),
    ("placeholders", 2, "", ["[name] a [name]"], ["[name]", "[name] [name] [name]", "name name"]),
    ("first_word", 0, "sun", ["Sun moon", "- sun"], ["moon sun", "7"]),
    ("second_word", 0, "sun", ["moon sun sea"], ["sun", "sun moon"]),
    ("third_word", 0, "sun", ["a b sun"], ["a sun", "sun b c"]),
    ("last_word", 0, "sun", ["moon sun!"], ["sun moon", "7"]),
    ("same_ends", 0, "", ["sun moon Sun."], ["sun", "sun moon"]),
    ("alphabetical", 0, "", ["apple Moon sun"], ["sun moon"]),
    ("growing", 0, "", ["sea sun moon"], ["moon sun"]),
    ("no_repeat", 0, "", ["sun moon"], ["sun moon Sun"]),
    ("sentences", 2, "", ["Sun is. Moon is."], ["Sun is.", "Sun. Moon. Sea.", "Sun. Moon. sea", "Sun..", "Sun. ."]),
    ("lines", 2, "", ["sun\nmoon"], ["sun", "sun\n\nmoon", "sun\n7"]),
    ("bullets", 2, "", ["- sun\n- moon sea"], ["- sun", "sun\n- moon", "- sun\n- "]),
    ("numbered", 2, "", ["1. sun\n2. moon"], ["1. sun\n3. moon", "1. sun", "1. sun\n2. moon\n3. sea", "1 sun\n2 moon"]),
    ("stars", 2, "", ["sun\n***\nmoon\nsea"], ["sun moon", "sun *** moon", "sun\n***\nmoon\n***\nsea", "sun\n***\n***"]),
    (
        "json",
        0,
        "",
        ['{"text": "sun"}'],
        ["sun", '{"text": 3}', '{"text": ""}', '{"a": "b"}', '["text"]', "[" * 100_000, "9" * 9_999],
    ),
    ("commas", 0, "", ["sun, moon, sea"], ["sun", "sun moon", "sun, moon sea"]),
    ("no_commas", 0, "", ["sun moon"], ["sun, moon"]),
    ("lowercase", 0, "", ["sun 7!"], ["Sun"]),
    ("capitals", 0, "", ["SUN 7!"], ["SUn"]),
    ("title_case", 0, "", ["Sun Moon"], ["Sun moon", "SUN"]),
    ("quotes", 0, "", ['"sun moon"'], ["sun", '"sun" "moon"', '"', '""']),
    ("title", 0, "", ["<<sun>>\nmoon"], ["<<sun>>", "sun\nmoon", "<<>>\nmoon", "<<sun>> moon"]),
    ("postscript", 0, "", ["sun\nP.S. moon"], ["sun", "P.S. moon", "sun P.S. moon", "sun\nP.S. "]),
    ("exclamation", 0, "", ["sun!"], ["sun", "!", "sun! moon"]),
    ("question", 0, "", ["sun?"], ["sun.", "?"]),
    ("farewell", 0, "", ["sun\nThat is all."], ["That is all.", "sun That is all.", "sun\nThat is all"]),
]


def kept(kind: str, number: int, words: str, text: str) -> bool:
    return KINDS[kind].kept(Constraint(kind, number, tuple(words.split())), text)


@pytest.mark.parametrize("kind, number, words, right, wrong", TEXTS, ids=[row[0] for row in TEXTS])
def test_a_constraint_holds_of_what_keeps_it_and_of_nothing_else(kind, number, words, right, wrong):
    assert all(kept(kind, number, words, text) for text in right)
    assert [text[:40] for text in wrong if kept(kind, number, words, text)] == []


def test_there_are_at_least_25_kinds_each_with_hand_written_texts_and_drawn():
    assert len(KINDS) >= 25
    assert {row[0] for row in TEXTS} == set(KINDS)
    for difficulty in InstructionFollowing.difficulties:
        rng = random.Random(difficulty)
        drawn = Counter(kind.kind for _ in range(1_500) for kind in InstructionFollowing.sample(rng, difficulty).constraints)
        assert set(drawn) == set(KINDS)


@given(seeds, st.sampled_from(InstructionFollowing.difficulties))
@settings(max_examples=300)
def test_every_composition_can_be_satisfied_and_its_near_misses_break_it(seed, difficulty):
    rng = random.Random(seed)
    problem = InstructionFollowing.sample(rng, difficulty)
    assert len(problem.constraints) == difficulty
    assert len({KINDS[constraint.kind].slot for constraint in problem.constraints}) == difficulty
    for thinking in (False, True):
        assert problem.verify(problem.demonstrate(thinking)) == (1.0, ())
    for _ in range(5):
        reward, reasons = problem.verify(problem.near_miss(rng))
        assert reward == 0 and 1 <= len(reasons) <= difficulty


@pytest.mark.parametrize("kind", KINDS)
def test_a_near_miss_of_each_kind_alone_breaks_it(kind):
    rng = random.Random(kind)
    made = 0
    while made < 30:
        draft = Draft()
        try:
            constraint = KINDS[kind].draw(rng, draft)
            text = draft.write(rng)
        except Unfit:
            continue
        if KINDS[kind].kept(constraint, text):
            made += 1
            problem = InstructionFollowing("Write.", (constraint,), text)
            assert problem.verify(problem.near_miss(rng)).reward == 0


def test_the_instruction_names_what_the_constraint_holds():
    rng = random.Random(8)
    for _ in range(200):
        problem = InstructionFollowing.sample(rng, 4)
        told = problem.messages[0]["content"]
        for constraint in problem.constraints:
            assert all(word in told for word in constraint.words)
            if constraint.number and constraint.kind != "placeholders":
                assert str(constraint.number) in told


def test_an_empty_answer_earns_nothing_though_it_breaks_no_ban():
    problem = InstructionFollowing("Write.", (Constraint("no_digits"),), "sun")
    for empty in ("", " \n ", None):
        assert problem.verify([{"role": "assistant", "content": empty}]).reward == 0


def test_all_constraints_must_be_kept_and_the_reasons_say_which_are_not():
    constraints = (Constraint("words_exactly", 2), Constraint("no_digits"), Constraint("capitals"), Constraint("question"))
    problem = InstructionFollowing("Write.", constraints, "SUN MOON?")
    assert problem.verify(reply("SEA SUN?")) == (1.0, ())
    reward, reasons = problem.verify(reply("sun moon sea?"))
    assert reward == 0
    assert len(reasons) == 2 and "exactly 2 words" in reasons[0] and "capital letters" in reasons[1]
    assert problem.verify(reply("SUN MOON")).reward == 0  # three of four


def test_letters_over_and_over_are_no_words_though_they_keep_the_form():
    problem = InstructionFollowing("Write.", (Constraint("words_exactly", 2),), "sun moon")
    assert problem.verify(reply("see a")).reward == 1
    for text in ("xxx xxxx", "XXX sun", "sun aaa"):
        reward, reasons = problem.verify(reply(text))
        assert reward == 0 and "one letter over and over" in reasons[0]


def test_a_near_miss_of_a_single_word_is_always_another_word():
    problem = InstructionFollowing("Write.", (Constraint("include_word", words=("corn",)),), "corn")
    for seed in range(500):
        assert problem.verify(problem.near_miss(random.Random(seed))).reward == 0


def test_the_lexicon_has_plain_words_once_each():
    assert len(WORDS) == len(set(WORDS)) and all(words_of(word) == [word] for word in WORDS)
