"""The laws of the task world, held for every family of the registry."""

import copy
import dataclasses
import itertools
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm import chat
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.__main__ import main
from minglm.tasks.task import TaskError, final_content, problems, split_of
from minglm.tasks.text import (
    ANSWER,
    END,
    LABELS,
    STOPS,
    THINKING,
    answer_text,
    conversation_text,
    document,
    ended,
    in_one_form,
    prompt_text,
    read_answer,
)

# A process of its own judges these answers, so a verdict costs some hundredths of a second.
RUN_IN_SANDBOX = frozenset({*GROUPS["code"], "repository"})
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def drawn(family, a_difficulty, seed=0):
    """Some problems of each difficulty, fewer where judging is slow."""
    each = 1 if family.family in RUN_IN_SANDBOX else a_difficulty
    rng = random.Random(f"{family.family} {seed}")
    return [family.sample(rng, difficulty) for difficulty in family.difficulties for _ in range(each)]


def test_the_registry_names_each_family_once_and_in_one_group():
    assert [name for names in GROUPS.values() for name in names] == list(FAMILIES)
    assert all(FAMILIES[name].family == name for name in FAMILIES)


@every_family
def test_a_family_is_a_frozen_dataclass_that_says_what_it_stands_for(family):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", family.family)
    assert "section" in family.stands_for and family.stands_for.endswith(".")
    assert len(family.difficulties) >= 3
    assert dataclasses.is_dataclass(family) and family.__dataclass_params__.frozen


@every_family
def test_a_problem_is_a_function_of_rng_and_difficulty(family):
    for problem, again in zip(drawn(family, 3), drawn(family, 3), strict=True):
        assert problem == again and problem.key == again.key
        assert problem.messages == again.messages and problem.tools == again.tools
        assert problem.demonstrate(True) == again.demonstrate(True)


@every_family
def test_a_difficulty_that_a_family_lacks_is_refused_by_name(family):
    for wrong in (family.difficulties[0] - 1, family.difficulties[-1] + 1):
        with pytest.raises(TaskError, match=family.family):
            family.sample(random.Random(0), wrong)


@every_family
@pytest.mark.parametrize("thinking", [True, False])
def test_demonstrations_have_full_reward(family, thinking):
    for problem in drawn(family, 12, seed=1):
        assert problem.verify(problem.demonstrate(thinking)) == (1.0, ()), problem


@every_family
def test_thinking_is_in_demonstrations_exactly_where_it_is_asked_for(family):
    for problem in drawn(family, 3):
        assert any(message.get("reasoning_content") for message in problem.demonstrate(True)), problem
        assert not any(message.get("reasoning_content") for message in problem.demonstrate(False)), problem


@every_family
def test_near_misses_are_wrong_and_told_why(family):
    for problem in drawn(family, 8, seed=2):
        response = problem.near_miss(random.Random(3))
        reward, reasons = problem.verify(response)
        assert 0 <= reward < 1 and reasons and all(reasons), (problem, response)


@every_family
def test_guesses_earn_what_chance_says(family):
    """Of rewards from 0 to 1 with mean p, none spread wider than p (1 - p): the bound of Bhatia and Davis."""
    rng = random.Random(4)
    count = 40 if family.family in RUN_IN_SANDBOX else 300
    chosen = [family.sample(rng, rng.choice(family.difficulties)) for _ in range(count)]
    chances = [problem.chance for problem in chosen]
    rewards = [problem.verify(problem.guess(rng)).reward for problem in chosen]
    assert all(0 <= chance <= 1 for chance in chances)
    spread = math.sqrt(sum(chance * (1 - chance) for chance in chances))
    assert abs(sum(rewards) - sum(chances)) <= 4 * spread + 1e-9, (sum(rewards), sum(chances), spread)


def values():
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    keys = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "type"]) | st.text(max_size=5)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
    )


def message_like():
    calls = st.lists(
        st.fixed_dictionaries(
            {}, optional={"type": st.just("function"), "id": values(), "function": values(), "name": values()}
        ),
        max_size=3,
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["assistant", "user", "tool", "system", "ghost"]) | values(),
            "content": st.text() | values(),
            "reasoning_content": values(),
            "tool_calls": calls | values(),
        },
    )


@every_family
@given(response=st.lists(message_like() | values(), max_size=4) | values(), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_no_junk_makes_a_verifier_raise(family, response, seed):
    problem = family.sample(random.Random(seed), family.difficulties[seed % len(family.difficulties)])
    reward, reasons = problem.verify(response)
    assert 0 <= reward <= 1 and (reward == 1 or reasons)


@every_family
@given(data=st.data(), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_no_damage_to_a_right_response_makes_a_verifier_raise(family, data, seed):
    """Damaged somewhere: a key lost, a value replaced, a message lost, doubled or moved."""
    problem = family.sample(random.Random(seed), family.difficulties[seed % len(family.difficulties)])
    response = copy.deepcopy(problem.demonstrate(data.draw(st.booleans())))
    damaged = data.draw(st.integers(0, len(response) - 1))
    match data.draw(st.integers(0, 4)):
        case 0:
            del response[damaged]
        case 1:
            response.insert(damaged, response[damaged])
        case 2:
            response.reverse()
        case _:
            place = response[damaged]
            while True:
                key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
                if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
                    place = place[key]
                    continue
                if data.draw(st.booleans()):
                    place[key] = data.draw(values())
                else:
                    del place[key]
                break
    reward, reasons = problem.verify(response)
    assert 0 <= reward <= 1 and (reward == 1 or reasons)


@every_family
@pytest.mark.parametrize("content", ["x" * 200_000, "(" * 5000, "9" * 100_000, "[" * 20_000, "\ud800", "\x00", "²", "١"])
def test_huge_and_odd_contents_are_judged(family, content):
    problem = family.sample(random.Random(5), family.difficulties[0])
    for response in ([{"role": "assistant", "content": content}], read_answer(f"{ANSWER} {content}"), read_answer(content)):
        reward, reasons = problem.verify(response)
        assert reward < 1 and reasons


@every_family
@pytest.mark.parametrize("thinking", [True, False])
def test_the_world_answers_a_demonstration_as_it_says(family, thinking):
    for problem in drawn(family, 3, seed=6):
        response = problem.demonstrate(thinking)
        episode, replayed = problem.start(), []
        for message in response:
            if message["role"] == "assistant":
                assert not episode.done
                replayed += [message, *episode.step(message)]
        assert replayed == response and episode.done
        with pytest.raises(TaskError):
            episode.step(response[0])


@every_family
def test_problems_and_demonstrations_pass_the_chat_template(family):
    for problem in drawn(family, 2, seed=7):
        prompt = chat.render(problem.messages, problem.tools, add_generation_prompt=True)
        for thinking in (True, False):
            response = problem.demonstrate(thinking)
            whole = chat.render([*problem.messages, *response], problem.tools, keep_reasoning=True)
            assert whole.startswith(prompt)
            if len(response) == 1:
                read = chat.parse(whole.removeprefix(prompt), problem.tools)
                assert problem.verify([read]) == (1.0, ()), (problem, read)


@every_family
@pytest.mark.parametrize("thinking", [True, False])
def test_plain_text_can_be_read_back(family, thinking):
    for problem in drawn(family, 4, seed=8):
        text = answer_text(problem, thinking)
        read = read_answer(text)
        assert read == [in_one_form(message) for message in problem.demonstrate(thinking)]
        assert problem.verify(read) == (1.0, ())
        assert text.endswith(END) and text.index(END) == len(text) - len(END)
        assert text.startswith((THINKING, *LABELS))
        assert document(problem, thinking) == prompt_text(problem) + text


@every_family
def test_the_hardest_problems_are_longer_than_the_easiest(family):
    def mean_length(difficulty):
        rng = random.Random(f"{difficulty}")
        lengths = [len(document(family.sample(rng, difficulty), True)) for _ in range(20)]
        return sum(lengths) / len(lengths)

    assert mean_length(family.difficulties[-1]) > 1.2 * mean_length(family.difficulties[0])


@every_family
def test_no_problem_is_in_both_splits(family):
    train = {problem.key for problem in itertools.islice(problems(family, "train", 0), 60)}
    held_out = {problem.key for problem in itertools.islice(problems(family, "held_out", 0), 30)}
    assert train and held_out and train.isdisjoint(held_out)


def test_an_unknown_split_is_refused():
    with pytest.raises(TaskError, match="test"):
        next(problems(FAMILIES["arithmetic"], "test", 0))


def test_a_split_without_problems_is_refused():
    @dataclasses.dataclass(frozen=True)
    class OneProblem(FAMILIES["arithmetic"]):
        family = "one_problem"

        @classmethod
        def sample(cls, rng, difficulty):
            return cls(0, 1, "+", 1)

    only = split_of(OneProblem.sample(random.Random(0), 1))
    with pytest.raises(TaskError, match="one_problem"):
        next(problems(OneProblem, "held_out" if only == "train" else "train", 0))


@given(messages=values() | st.lists(message_like(), max_size=3))
def test_the_final_content_of_anything_is_text(messages):
    assert isinstance(final_content(messages), str)


# ---- looking at problems


def test_families_are_listed_with_what_they_stand_for(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out and family.stands_for in out for name, family in FAMILIES.items())


@every_family
def test_a_problem_is_shown_with_its_solution_and_a_near_miss(family, capsys):
    hardest = family.difficulties[-1]
    assert main([family.family, str(hardest), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(document(family.sample(random.Random(3), hardest), True))
    assert "Reward of this: 1." in shown and "A near miss:" in shown


def test_what_cannot_be_shown_is_refused_with_what_there_is(capsys):
    assert main(["arithmetics"]) == 2 and "arithmetic," in capsys.readouterr().err
    assert main(["countdown", "99"]) == 2 and "countdown has 1 to 8" in capsys.readouterr().err


# ---- plain text


def texts():
    return st.text(alphabet=st.sampled_from('ab \n:{}"\\\r\x85') | st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
        [f"{label} x" for label in LABELS] + [END, f"a{END}b", f"\n{ANSWER}", " ", "\n"]
    )


def conversations():
    """In the forms of `in_one_form`; each message of the assistant's ends before another one begins."""
    call = st.fixed_dictionaries(
        {"name": st.from_regex(r"[a-z_]{1,8}", fullmatch=True), "arguments": st.dictionaries(texts(), texts())}
    )
    calls = st.lists(call.map(lambda function: {"type": "function", "function": function}), max_size=2)
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant"), "reasoning_content": texts(), "content": texts(), "tool_calls": calls}
    )
    other = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": texts()})
    turn = st.tuples(assistant, st.lists(other, min_size=1, max_size=2)).map(lambda pair: [pair[0], *pair[1]])
    return st.tuples(st.lists(turn, max_size=2), assistant).map(lambda pair: [*itertools.chain(*pair[0]), pair[1]])


@given(conversations())
def test_any_conversation_can_be_written_as_text_and_read_back(messages):
    text = ended(conversation_text(messages))
    assert read_answer(text) == messages
    assert text.index(END) == len(text) - len(END)


@given(st.text() | st.lists(st.sampled_from([*LABELS, *STOPS, "\n", " ", "f {", "}", "\r"])).map("".join))
def test_reading_an_answer_never_raises_and_gives_messages_that_can_be_written(text):
    messages = read_answer(text)
    assert messages and all(message == in_one_form(message) for message in messages)
    assert isinstance(conversation_text(messages), str)


def test_an_answer_ends_where_a_new_question_begins():
    assert [message["content"] for message in read_answer("Answer: 4\nQuestion: What is 1 + 1?\nAnswer: 2")] == ["4"]


def test_text_without_labels_is_the_answer():
    assert read_answer(" 42\n\nQuestion: ...") == [in_one_form({"role": "assistant", "content": "42"})]
