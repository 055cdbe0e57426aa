"""Pathologies: each planted one is found and named, no family's worked solution has any, and problems that provoke them come
again by how often they do."""

import json
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_rl_rollout import Echo, collect

from minglm.config import ConfigError
from minglm.rl.curriculum import Curriculum
from minglm.rl.pathology import CHARACTERS, TIMES, UNIT, pathologies
from minglm.rl.practice import Practice
from minglm.rl.recipe import Rewards, RLRecipe, Tasks, load_rl_recipe
from minglm.rl.rewards import Case, Combined, PathologyRules, Verifier, combined
from minglm.rl.rollout import Limits
from minglm.tasks import FAMILIES
from minglm.tasks.task import TRAIN, Verdict, problems, reply

ASKED = [{"role": "user", "content": "Which is first?"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
TURN = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "nothing"}]

PLANTED = {
    "a loop": (reply("so it is. " * 9), "repetition: 'so it is. ' 9 times in a row"),
    "a loop amid the reasoning": (reply("A", "First, " + "wait, " * 8 + "yes."), "repetition: "),
    "a loop of one character": (reply("!" * 40), "repetition: '!' 40 times in a row"),
    "a loop beside a longer rule": (reply("-" * 80 + "!" * 40), "repetition: '!' 40 times in a row"),
    "a loop of lines": (reply("the sun\nthe moon\n" * 5), "repetition: "),
    "a loop of calls": (TURN * 4 + reply("A"), "repetition: the same calls in 4 turns in a row"),
    "a thinking opened again": (reply("A", "Hm. <think>"), "mark out of place: <think>"),
    "a thinking opened late": (reply("A <think>because</think>"), "mark out of place: </think>"),
    "a thinking closed twice": (reply("A</think>", "because"), "mark out of place: </think>"),
    "a call inside the thinking": (reply("A", "<tool_call>look"), "mark out of place: <tool_call>"),
    "a call that was only closed": (reply("look</tool_call>"), "mark out of place: </tool_call>"),
    "a speaker's mark": (reply("A <|user|> B"), "mark out of place: <|user|>"),
    "an open block of code": (reply("```python\nprint(1)\n"), "mark out of place: a block of code that is never closed"),
    "Chinese amid English": (reply("The first is 月 today."), "mixed scripts: East Asian words among Latin ones"),
    "Russian amid English": (reply("A", "The first is, конечно, A."), "mixed scripts: Cyrillic words among Latin ones"),
    "nothing": (reply(""), "empty: a turn with neither answer nor call"),
    "thinking alone": (reply("", "because"), "empty: a turn with neither answer nor call"),
    "an empty turn on the way": (reply("") + TURN + reply("A"), "empty: "),
}

CLEAN = {
    "an answer": reply("A", "Because it is."),
    "three times the same": reply("the sun, the moon. " * 3),
    "a short loop": reply("ha " * 8),
    "indentation and rules": reply("-" * 80 + "\n" + " " * 60 + "x\n" + "| --- " * 20),
    "symbols": reply("Δx = 5 µm, α > β, 𝐱𝐲, naïve"),
    "one other script alone": reply("月亮在哪里"),
    "Japanese, which mixes its own": reply("私はカタカナを書く"),
    "a block of code": reply("```python\nprint(1)\n```"),
    "a separator that ends no line": reply("a\u2028``` b\x0c``` c\x85```"),
    "calls that differ": [
        message
        for number in range(6)
        for message in (
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": str(number)}]},
            {"role": "tool", "content": "月 ha " + "ha " * 60},
        )
    ]
    + reply("The tool said 月."),
    "no response": [],
    "no messages": [3, None, {"role": "assistant", "content": 7}, {"content": ["x"]}],
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_pathology_is_found_and_named(name):
    response, wanted = PLANTED[name]
    found = pathologies(ASKED, response)
    assert any(reason.startswith(wanted) for reason in found), found


@pytest.mark.parametrize("name", CLEAN)
def test_what_only_looks_like_one_is_none(name):
    assert pathologies(ASKED, CLEAN[name]) == ()


def test_what_the_policy_was_given_it_may_use():
    asked = [{"role": "user", "content": "What do <think> and 月 mean?"}]
    assert pathologies(asked, reply("<think> opens a thinking, and 月 is the moon.")) == ()
    russian = [{"role": "user", "content": "Что это?"}]
    assert pathologies(russian, reply("Это ordering, конечно.")) == ()
    assert len(pathologies(ASKED, reply("<think> opens a thinking, and 月 is the moon."))) == 2


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_worked_solution_of_any_family_has_one(family):
    for difficulty in family.difficulties:
        for _, problem in zip(range(2), problems(family, TRAIN, 3, [difficulty]), strict=False):
            for thinking in (True, False):
                assert pathologies(problem.messages, problem.demonstrate(thinking)) == ()


def is_a_loop(text: str) -> bool:
    """By the definition, of any stretch."""
    return any(
        text[start + period : start + length] == text[start : start + length - period]
        for period in range(1, min(UNIT, len(text) // TIMES) + 1)
        for length in [max(TIMES * period, CHARACTERS)]
        for start in range(len(text) - length + 1)
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab", max_size=4), st.text("ab", min_size=1, max_size=12), st.integers(1, 20), st.text("ab", max_size=4))
@example("", "a" * 8, TIMES, "")
@example("", "abaabbab", TIMES - 1, "abaabba")  # one character short of a round
def test_a_loop_is_what_the_definition_says(before, unit, times, after):
    text = before + unit * times + after
    assert bool(pathologies(ASKED, reply(text)) if text else ()) == is_a_loop(text)


def test_a_long_answer_is_looked_through_in_no_time():
    text = "".join(random.Random(1).choices("abcdefgh ", k=30_000))
    began = time.process_time()
    assert pathologies(ASKED, reply(text)) == ()
    assert time.process_time() - began < 5


# -------------------------------------------------------------------------------------------------------- as a reward


def test_a_pathological_answer_earns_nothing_and_a_clean_one_is_worth_more_than_none():
    rewards = load_rl_recipe("pathology").rewards
    judge = combined(rewards, device=None)
    problem = next(problems(FAMILIES["clock"], TRAIN, 1))
    right = problem.demonstrate(True)
    looping = [{**right[0], "reasoning_content": right[0]["reasoning_content"] + " So." * 20}]
    wrong = problem.near_miss(random.Random(1))
    assert isinstance(judge, Combined) and list(judge.sources) == ["verifier", "pathology"]
    found = judge.judge([Case(problem, one) for one in (right, wrong, looping)])
    assert [one.reward for one in found] == [1.0, 0.5, 0.0]
    assert found[2].reasons[0] == "vetoed by the pathology" and found[2].reasons[1].startswith("repetition: ' So.'")


def test_attempts_are_pathological_by_the_rules_or_because_they_were_cut_off():
    trajectories = collect([Echo(1, False) for _ in range(4)], Limits(tokens=6))
    ends = (("done", "a"), ("done", "a" * 40), ("length", "a"), ("malformed", "a"))
    for one, (end, text) in zip(trajectories, ends, strict=True):
        one.end, one.verdict, one.response = end, Verdict(0.0), reply(text)
    Combined({"verifier": Verifier(), "pathology": PathologyRules()}, Rewards(pathology=1.0)).apply(trajectories)
    assert [one.pathological for one in trajectories] == [False, True, True, True]
    assert [one.parts.get("pathology") for one in trajectories] == [1.0, 0.0, None, None]


# ------------------------------------------------------------------------------------------- the problems that provoke

POOL = ("clock", 1)
OFTEN, SELDOM = (POOL, 11), (POOL, 12)


def curriculum() -> Curriculum:
    return Curriculum(Tasks({"clock": (1, 2)}, "pathology"), 1)


def shares(of: Curriculum) -> dict:
    picked = [of.pick(1, number) for number in range(4000)]
    return {one: picked.count(one) / len(picked) for one in (OFTEN, SELDOM)}


def test_problems_come_again_by_how_often_attempts_at_them_were_pathological():
    own = curriculum()
    own.learn_pathologies(OFTEN, [True, True, True, False])
    own.learn_pathologies(SELDOM, [True, False, False, False])
    own.learn_pathologies((POOL, 13), [False] * 4)
    found = shares(own)
    assert found[OFTEN] == pytest.approx(3 / 8, abs=0.03) and found[SELDOM] == pytest.approx(1 / 8, abs=0.03)
    assert len(own.provoking) == 2
    own.learn_pathologies(OFTEN, [False] * 64)  # cured
    assert list(own.provoking) == [SELDOM] and shares(own)[SELDOM] == pytest.approx(1 / 2, abs=0.03)


def test_what_is_known_of_provoking_problems_is_bounded_and_survives_a_resumption():
    own, again = curriculum(), curriculum()
    for seed in range(600):
        own.learn_pathologies((POOL, seed), [True])
    assert len(own.provoking) == 512 and (POOL, 0) not in own.provoking
    again.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert again.draw(3, 0, 8) == own.draw(3, 0, 8) and again.state_dict() == own.state_dict()


def test_a_step_tells_the_curriculum_which_problems_provoke():
    own, practice = curriculum(), Practice()
    first, second = collect([Echo(1, False)] * 2, Limits(tokens=6)), collect([Echo(1, False)] * 2, Limits(tokens=6))
    for one, end in zip([*first, *second], ("length", "done", "done", "done"), strict=True):
        one.end, one.verdict = end, Verdict(0.0)
    practice.add(first, OFTEN, False)
    practice.add(second, SELDOM, False)
    practice.tell(own, 1)
    assert own.provoking == {OFTEN: [True, False]} and own.attempts[POOL] == 4


def test_what_is_not_measured_cannot_choose():
    with pytest.raises(ConfigError, match=r"^tasks.curriculum = 'pathology'.*rewards.pathology above 0"):
        RLRecipe(Tasks({"clock": (1,)}, "pathology"), steps=1)
    RLRecipe(Tasks({"clock": (1,)}, "pathology"), steps=1, rewards=Rewards(vetoes=("pathology",)))
