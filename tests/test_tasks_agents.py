"""Agents' worlds: how calls are read, how an attempt ends, and the families function_calling and chained_calls."""

import copy
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.tasks.agents import FAMILIES
from minglm.tasks.agents.calling import Call, CallCount, MalformedCall, call_message, count_calls, read_calls, tool
from minglm.tasks.agents.catalogue import CATALOGUE
from minglm.tasks.agents.chained_calls import ACTIONS, READERS, VALUES, ChainedCalls
from minglm.tasks.agents.function_calling import FunctionCalling
from minglm.tasks.agents.world import Move
from minglm.tasks.task import TaskError

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
PLAIN = [
    tool("f", "", {"text": "string", "count": "integer", "share": "number", "is_new": "boolean"}, optional=["share", "is_new"])
]


def drawn(family, each=10, seed=0):
    rng = random.Random(f"{family.family} {seed}")
    return [family.sample(rng, difficulty) for difficulty in family.difficulties for _ in range(each)]


def says(content):
    return {"role": "assistant", "content": content}


def calls_f(arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


# ---- calls


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "not JSON"),
        ('{"text": "a", "count": NaN}', "not JSON"),
        ('{"text": "a", "text": "b", "count": 1}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "wanted a JSON object"),
        (None, "wanted a JSON object"),
        ({"text": "a"}, "count is missing"),
        ({"text": "a", "count": 1, "more": 1}, "no argument 'more'"),
        ({"text": "a", "count": "1"}, "wanted integer"),
        ({"text": "a", "count": True}, "wanted integer"),
        ({"text": "a", "count": 1.5}, "wanted integer"),
        ({"text": 1, "count": 1}, "wanted string"),
        ({"text": "a", "count": 1, "is_new": 0}, "wanted boolean"),
        ({"text": "a", "count": 1, "share": float("inf")}, "too large"),
        ({"text": "a", "count": 1, "share": float("nan")}, "too large"),
        ({"text": "a", "count": 10**5000}, "too large"),
        ({"text": "a" * 30_000, "count": 1}, "at most"),
    ],
)
def test_arguments_that_the_schema_does_not_allow_are_refused_with_the_reason(arguments, reason):
    with pytest.raises(MalformedCall, match=reason):
        read_calls(calls_f(arguments), PLAIN)


def test_an_integer_may_be_written_as_json_writes_numbers():
    [call] = read_calls(calls_f('{"text": "a", "count": 2.0, "share": 1}'), PLAIN)
    assert call == Call("f", {"text": "a", "count": 2, "share": 1}) and type(call.arguments["count"]) is int


@given(
    st.fixed_dictionaries(
        {"text": st.text(), "count": st.integers(-(10**15), 10**15)},
        optional={"share": st.floats(-1e15, 1e15), "is_new": st.booleans()},
    )
)
def test_what_the_schema_allows_is_read_as_it_is_from_mapping_or_json(arguments):
    assert read_calls(calls_f(arguments), PLAIN) == read_calls(calls_f(json.dumps(arguments)), PLAIN) == [Call("f", arguments)]


@every_family
@pytest.mark.parametrize(
    "calls",
    [
        [{"function": {"name": "no_such_tool", "arguments": {}}}],
        [{"function": {"name": None, "arguments": {}}}],
        [{"name": "run"}],
        ["run"],
        "run",
        [{"function": {"name": "no_such_tool", "arguments": {}}}] * 17,
    ],
)
def test_a_malformed_call_ends_the_attempt_with_nothing_and_the_reason(family, calls):
    problem = drawn(family, 1)[0]
    bad = {"role": "assistant", "content": "", "tool_calls": calls}
    episode = problem.start()
    assert episode.step(bad) == [] and episode.done
    reward, reasons = problem.verify([bad])
    assert reward == 0 and reasons[0].startswith("malformed call: ")
    # Nor does a right answer after it help.
    assert problem.verify([bad, *problem.demonstrate(False)]).reward == 0


@every_family
def test_a_call_whose_arguments_are_no_json_ends_the_attempt_wherever_it_comes(family):
    for problem in drawn(family, 4):
        response = copy.deepcopy(problem.demonstrate(False))
        with_calls = [index for index, message in enumerate(response) if message.get("tool_calls")]
        if with_calls:
            response[with_calls[-1]]["tool_calls"][0]["function"]["arguments"] = '{"path": '
            reward, reasons = problem.verify(response)
            assert reward == 0 and any("not JSON" in reason for reason in reasons)


@every_family
def test_arguments_may_be_the_json_of_a_mapping(family):
    for problem in drawn(family, 3):
        response = copy.deepcopy(problem.demonstrate(True))
        for message in response:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        assert problem.verify(response) == (1.0, ())


# ---- counting them


@every_family
def test_every_call_of_a_right_attempt_counts_and_succeeds(family):
    for problem in drawn(family, 4):
        response = problem.demonstrate(True)
        made = sum(len(message.get("tool_calls", ())) for message in response)
        assert count_calls(response, problem.tools) == (made, made)
        assert count_calls(response, problem.tools, unread=2) == (made + 2, made)


def test_calls_that_do_not_fit_are_not_done_or_come_back_as_errors_have_not_succeeded():
    fits, other = calls_f({"text": "a", "count": 1}), calls_f({"text": "a"})
    both = {"role": "assistant", "tool_calls": fits["tool_calls"] + other["tool_calls"]}
    result, error = ({"role": "tool", "content": content} for content in ("error in line 3", "error: no such thing"))
    assert count_calls([fits], PLAIN) == CallCount(1, 1)  # the attempt has ended with it
    assert count_calls([fits, result, fits, error, says("done")], PLAIN) == CallCount(2, 1)
    assert count_calls([other], PLAIN) == CallCount(1, 0)
    assert count_calls([both], PLAIN) == CallCount(2, 0)  # the world does all calls of a message, or none
    assert count_calls([fits, {"role": "user", "content": "error: no"}], PLAIN) == CallCount(1, 1)
    assert count_calls([says("error: no")], PLAIN) == CallCount(0, 0)


# ---- attempts


@every_family
def test_results_that_the_world_did_not_give_are_refused(family):
    for problem in drawn(family, 4):
        right = problem.demonstrate(False)
        for index, message in enumerate(right):
            if message["role"] != "assistant":
                forged = [*right[:index], {**message, "content": message["content"] + " "}, *right[index + 1 :]]
                assert problem.verify(forged).reward == 0
                assert problem.verify([*right[:index], *right[index + 1 :]]).reward == 0


@every_family
def test_an_attempt_that_stops_early_or_goes_on_after_its_end_has_nothing(family):
    for problem in drawn(family, 4):
        right = problem.demonstrate(False)
        for index in range(len(right)):
            assert problem.verify(right[:index]).reward == 0
        assert problem.verify([*right, says("done")]).reward == 0


@every_family
def test_an_attempt_without_end_is_ended(family):
    problem = drawn(family, 1)[-1]
    names = [one["function"]["name"] for one in problem.tools]
    looks = {
        "get_order": {"order": "A0"},
        "find_home": {"person": "Anna"},
        "run": {"command": "ls"},
        "search": {"query": "a"},
        "read_file": {"path": "tests.py"},
    }
    name = next((name for name in names if name in looks), None)
    episode, count = problem.start(), 0
    while not episode.done:
        episode.step(call_message([Call(name, looks[name])]) if name else says("name?"))
        count += 1
        assert count < 100
    assert episode.verdict().reward == 0
    with pytest.raises(TaskError):
        episode.step(says("done"))


@every_family
def test_an_attempt_leaves_no_trace_in_the_problem(family):
    for problem in drawn(family, 3):
        first = problem.demonstrate(True)
        problem.verify(problem.near_miss(random.Random(0)))
        assert problem.demonstrate(True) == first


# ---- function_calling


def test_functions_may_be_called_in_any_order():
    for problem in drawn(FunctionCalling, 40):
        [*asked, last] = problem.demonstrate(False)
        calls = last.get("tool_calls", [])
        for order in itertools.permutations(calls):
            assert problem.verify([*asked, {**last, "tool_calls": list(order)}]).reward == 1 or not calls


def test_a_default_may_be_left_out_or_given():
    seen = 0
    for problem in drawn(FunctionCalling, 60):
        response = copy.deepcopy(problem.demonstrate(False))
        for call in response[-1].get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            for argument in CATALOGUE[call["function"]["name"]].arguments:
                if argument.default is not None and argument.name not in arguments:
                    arguments[argument.name] = argument.default
                    seen += 1
        assert problem.verify(response) == (1.0, ())
    assert seen > 10


def test_every_value_of_every_call_counts():
    for problem in drawn(FunctionCalling, 20):
        right = problem.demonstrate(False)
        for number, call in enumerate(problem.wanted):
            for name, value in call.arguments.items():
                response = copy.deepcopy(right)
                values = next(one.values for one in CATALOGUE[call.name].arguments if one.name == name)
                other = next(one for one in values if one != value)
                response[-1]["tool_calls"][number]["function"]["arguments"][name] = other
                assert problem.verify(response).reward == 0
            fewer = [one for index, one in enumerate(right[-1]["tool_calls"]) if index != number]
            assert problem.verify([*right[:-1], {**right[-1], "tool_calls": fewer}]).reward == 0
            more = [*right[-1]["tool_calls"], right[-1]["tool_calls"][number]]
            assert problem.verify([*right[:-1], {**right[-1], "tool_calls": more}]).reward == 0


def test_what_is_not_given_has_to_be_asked_for_and_what_is_given_not():
    seen = set()
    for problem in drawn(FunctionCalling, 40):
        if problem.missing:
            seen.add("ask")
            assert problem.verify([call_message(problem.wanted)]).reward == 0  # the value is a guess, if a lucky one
            value = dict(problem.wanted[0].arguments)[problem.missing]
            assert str(value) not in problem.question.split(".")[0].split()
        elif problem.calls:
            seen.add("call")
            name = next(iter(problem.wanted[0].arguments))
            assert problem.verify([says(f"{name}?")]).reward == 0
        else:
            seen.add("none")
            assert problem.verify([says("None of them.")]).reward == 0
    assert seen == {"ask", "call", "none"}


# ---- chained_calls


def test_a_chain_acts_once_with_what_the_functions_return_one_after_another():
    for problem in drawn(ChainedCalls, 20):
        response = problem.demonstrate(False)
        results = [message["content"] for message in response if message["role"] == "tool"]
        assert problem.values == [problem.start_value, *results] and len(results) == len(problem.chain)
        called = [message["tool_calls"][0]["function"] for message in response if message["role"] == "assistant"]
        for call, value, name in zip(called, problem.values, (*problem.chain, problem.action), strict=True):
            assert call["name"] == name and list(call["arguments"].values()) == [value]


def test_reading_more_than_needed_costs_nothing_and_acting_more_costs_all():
    for problem in drawn(ChainedCalls, 20):
        readers = [name for name in problem.functions if name in READERS]
        more = [Call(name, {READERS[name].takes: VALUES[READERS[name].takes][0]}) for name in readers]
        others = [name for name in problem.functions if name in ACTIONS and name != problem.action]

        def moves(*last, more=more):
            yield Move("", more)
            yield Move("", last)

        assert problem.verify(problem.play(moves(problem.wanted))) == (1.0, ())
        for name in others:
            extra = Call(name, {ACTIONS[name].argument: VALUES[ACTIONS[name].takes][0]})
            assert problem.verify(problem.play(moves(extra, problem.wanted))).reward == 0
            assert problem.verify(problem.play(moves(problem.wanted, extra))).reward == 0
