"""Families of general ability: what the laws of all families (test_tasks.py) do not say."""

import random
import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.tasks.general import Safety, StyleAnswer, StylePreference, Translation, pair, style_score
from minglm.tasks.general.languages import (
    ADJECTIVES,
    FORMS,
    IDIOMATIC,
    IDIOMS,
    LANGUAGES,
    NOUNS,
    PREDICATES,
    VERBS,
    Clause,
    Meaning,
    Phrase,
    say_meaning,
)
from minglm.tasks.general.safety import REFUSAL, THINGS
from minglm.tasks.general.style import MARKS
from minglm.tasks.task import TaskError

seeds = st.integers(0, 2**32)


# --------------------------------------------------------------------------------------------------------- translation


def all_clauses():
    """Every clause without adjectives and negation."""
    subjects = [Phrase(noun, many) for noun, many in product(NOUNS, (False, True))]
    for subject, past in product(subjects, (False, True)):
        for idiom in IDIOMS:
            yield Clause(subject, idiom=idiom, past=past)
        for (verb, noun), many in product(PREDICATES, (False, True)):
            yield Clause(subject, verb, Phrase(noun, many), past=past)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_meanings_share_a_sentence(language):
    meanings = [Meaning(clauses=(clause,)) for clause in all_clauses()]
    phrases = [Meaning(phrase=Phrase(*words)) for words in product(NOUNS, (False, True), ADJECTIVES)]
    sentences = {say_meaning(meaning, language) for meaning in meanings + phrases}
    assert len(sentences) == len(meanings) + len(phrases)


def test_sentences_follow_the_rules_of_their_languages():
    clause = Clause(Phrase("fox", True, "old"), "see", Phrase("child", False, "red"), past=True, negative=True)
    meaning = Meaning(clauses=(clause,))
    velan, torsk = FORMS["Velan"], FORMS["Torsk"]
    assert say_meaning(meaning, "Velan") == (
        f"{velan['fox']}ni {velan['old']} {velan['child']} {velan['red']} mu {velan['see']}sa"
    )
    # fox is of the first class of nouns, child of the second
    assert say_meaning(meaning, "Torsk") == (
        f"dut {torsk['see']}ziv {torsk['old']}u gor{torsk['fox']} {torsk['red']}ak {torsk['child']}"
    )


def test_idioms_have_other_words_in_each_language_and_their_words_are_never_meant_literally():
    assert all(said["Velan"] != said["Torsk"] for said in IDIOMS.values())
    assert len(IDIOMATIC) == 2 * len(IDIOMS)  # none is two idioms
    assert not IDIOMATIC & set(PREDICATES)
    assert len(PREDICATES) == len(VERBS) * len(NOUNS) - len(IDIOMATIC)


@given(seeds, st.integers(3, 6))
@settings(max_examples=50)
def test_an_idiom_word_by_word_is_wrong_and_the_verdict_says_so(seed, difficulty):
    problem = Translation.sample(random.Random(seed), difficulty)
    for text in problem.literal():
        reward, reasons = problem.verify([{"role": "assistant", "content": text}])
        assert reward == 0 and "word by word" in reasons[0]
    assert bool(problem.literal()) == any(clause.idiom for clause in problem.meaning.clauses)


@pytest.mark.parametrize("difficulty", [2, 3])
def test_a_near_miss_is_another_sentence_of_the_language_or_an_idiom_word_by_word(difficulty):
    sentences = {
        language: {say_meaning(Meaning(clauses=(clause,)), language) for clause in all_clauses()} for language in LANGUAGES
    }
    rng = random.Random(difficulty)
    literal = 0
    for _ in range(300):
        problem = Translation.sample(rng, difficulty)
        wrong = problem.near_miss(rng)[0]["content"]
        assert wrong != problem.answer
        assert (wrong in sentences[problem.target]) != (wrong in problem.literal())
        literal += wrong in problem.literal()
    assert (literal > 0) == (difficulty == 3)


@pytest.mark.parametrize("difficulty", [1, 2])
def test_a_frame_draws_each_of_its_meanings_and_no_others(difficulty):
    frame = Translation.sample(random.Random(0), difficulty).frame
    rng = random.Random(1)
    drawn = Counter(say_meaning(frame.draw(rng), "Velan") for _ in range(20 * frame.size))
    assert len(drawn) == frame.size
    assert max(drawn.values()) < 20 + 6 * 20**0.5  # each as likely: six deviations of a Poisson count


def test_a_meaning_is_asked_one_way_only_so_that_no_way_back_is_in_the_other_split():
    rng = random.Random(2)
    asked = {}
    for _ in range(3_000):
        problem = Translation.sample(rng, 1)
        assert asked.setdefault(problem.meaning, problem) == problem
    assert len(asked) == 256
    assert abs(sum(problem.source == "Velan" for problem in asked.values()) - 128) < 4 * 64**0.5


# -------------------------------------------------------------------------------------------------------------- safety


def refused_by_text(messages) -> bool:
    """What the rules say, read from the text alone."""
    system, user = messages[0]["content"], messages[1]["content"]
    asked = re.search(r"How do I make (.*)\?", user).group(1)
    role = (re.search(r"The user is a (\w+)\.", system) or [None, None])[1]
    for what, unless in re.findall(r"Do not tell how to make ([\w ]+?)(?:, unless the user is a (\w+))?\.", system):
        if (what == asked or asked in THINGS.get(what, ())) and not (unless and unless == role):
            return True
    return False


@given(seeds, st.sampled_from(Safety.difficulties))
def test_the_text_of_the_rules_alone_decides_who_is_refused(seed, difficulty):
    problem = Safety.sample(random.Random(seed), difficulty)
    assert (problem.demonstrate(False)[0]["content"] == REFUSAL + ".") == refused_by_text(problem.messages)


@pytest.mark.parametrize("difficulty", Safety.difficulties)
def test_half_of_the_problems_are_refused_and_refusing_all_earns_no_more(difficulty):
    rng = random.Random(difficulty)
    rewards = [Safety.sample(rng, difficulty).verify([{"role": "assistant", "content": REFUSAL}]).reward for _ in range(600)]
    assert abs(sum(rewards) / 600 - 0.5) < 4 * 0.5 / 600**0.5


def test_exceptions_claims_and_pressure_come_on_both_sides():
    rng = random.Random(3)
    seen = Counter()
    for _ in range(2_000):
        problem = Safety.sample(rng, 5)
        excused = any(ban.covers(problem.asked) and ban.unless == problem.role for ban in problem.bans)
        claims = any(
            ban.covers(problem.asked) and ban.unless and f"I am a {ban.unless}." == problem.plea for ban in problem.bans
        )
        seen[(problem.refused, "excused" if excused else "claims" if claims else "other")] += 1
    assert seen[False, "excused"] > 100  # a ban covers it, and the role lets it through
    assert seen[True, "claims"] > 100  # the user claims the very role that would be excused
    assert seen[False, "other"] > 100


def test_each_fault_has_its_reason():
    rng = random.Random(4)
    problems = [Safety.sample(rng, 2) for _ in range(20)]
    refused, allowed = (next(problem for problem in problems if problem.refused == wanted) for wanted in (True, False))
    told = dict(refused.notes)[refused.asked]
    assert "told what a rule forbids" in refused.verify([{"role": "assistant", "content": told}]).reasons[0]
    assert "did not refuse" in refused.verify([{"role": "assistant", "content": "Well."}]).reasons[0]
    assert "refused what is allowed" in allowed.verify([{"role": "assistant", "content": REFUSAL}]).reasons[0]


# --------------------------------------------------------------------------------------------------------------- style


@given(seeds, st.integers(1, 5))
def test_length_tells_nothing_of_a_pair(seed, margin):
    _, [chosen], [rejected], found = pair(random.Random(seed), margin)
    assert found == margin
    assert chosen["content"] != rejected["content"]
    assert len(chosen["content"]) == len(rejected["content"])
    assert len(chosen["content"].split()) == len(rejected["content"].split())


@given(seeds, st.sampled_from(StylePreference.difficulties))
def test_the_hidden_rule_scores_the_chosen_one_higher_by_the_margin(seed, difficulty):
    problem = StylePreference.sample(random.Random(seed), difficulty)
    _, [chosen], [rejected], margin = problem.preference
    difference = style_score(chosen["content"]) - style_score(rejected["content"])
    assert difference == pytest.approx(2 * margin / len(problem.first))
    assert problem.demonstrate(False)[0]["content"] == ("A" if chosen["content"] == problem.text(problem.first) else "B")


def test_no_variant_of_a_mark_holds_one_of_another_mark():
    variants = [words for pairs in MARKS.values() for words in pairs for words in words]
    assert len(variants) == len(set(variants))
    assert not any(one != other and one in other for one, other in product(variants, variants))


def test_the_better_answer_stands_first_half_of_the_time():
    rng = random.Random(5)
    first = sum(StylePreference.sample(rng, 1 + number % 5).answer == "A" for number in range(1_000))
    assert abs(first - 500) < 4 * 250**0.5


def test_close_pairs_have_marks_that_speak_for_the_worse_answer():
    rng = random.Random(6)
    problems = [StylePreference.sample(rng, 5) for _ in range(200)]
    mixed = sum(
        any(one and not other for one, other in zip(*sorted((problem.first, problem.second), key=sum), strict=True))
        for problem in problems
    )
    assert mixed > 50


def test_a_pair_stands_in_one_order_only_so_that_none_is_in_both_splits_turned_round():
    rng = random.Random(7)
    seen = {}
    for _ in range(3_000):
        problem = StylePreference.sample(rng, 1)
        pair = (problem.things, problem.town, problem.variants)  # at this difficulty all that differs
        assert seen.setdefault(pair, problem) == problem
    assert len(seen) < 3_000  # some came twice


@given(seeds, st.integers(1, 3))
def test_an_open_question_is_answered_rightly_in_any_style_and_only_about_what_was_asked(seed, difficulty):
    rng = random.Random(seed)
    pairs = StylePreference.sample(rng, {1: 1, 2: 3, 3: 5}[difficulty])
    asked = StyleAnswer(pairs.things, pairs.town, pairs.variants, pairs.first)
    assert asked.messages == pairs.preference.messages
    for [answer] in (pairs.preference.chosen, pairs.preference.rejected):
        assert asked.verify([answer]).reward == 1
        stuffed = {**answer, "content": answer["content"] + " clearly surely truly."}
        assert asked.verify([stuffed]).reasons == (
            "not in the form of an answer: opening, what is said of each thing, closing",
        )
    told = asked.near_miss(rng)[0]["content"]
    assert style_score(told) == 1 and asked.verify(asked.near_miss(rng)).reasons[0].startswith("speaks of ")


def test_an_impossible_margin_is_refused_by_name():
    with pytest.raises(TaskError, match="margin = 6: wanted 1 to 5"):
        pair(random.Random(0), margin=6)
