"""What the experts' answers are learnt from: every planted fault is taken by its own filter, and nothing is lost uncounted."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rl_rollout import TOKENIZER

from minglm.posttrain.experts.exam import calls_of, unread_turn
from minglm.posttrain.experts.filters import FILTERS, SAMPLED, Answer, choose, pass_rates, repeats
from minglm.posttrain.experts.harvest import counts_table
from minglm.posttrain.experts.policy import Placed
from minglm.posttrain.experts.recipe import Harvest
from minglm.posttrain.lint import Sample, lint
from minglm.rl.environment import Failure
from minglm.rl.rollout import Trajectory
from minglm.tasks.task import Problem, Verdict, reply

ROW = 2000
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


@dataclass(frozen=True)
class Ask(Problem):
    number: int
    family = "ask"
    stands_for = "nothing"
    difficulties = range(1, 2)

    @classmethod
    def sample(cls, rng, difficulty):
        return cls(rng.randrange(1000))

    @property
    def messages(self):
        return [{"role": "user", "content": f"what is {self.number}"}]

    @property
    def tools(self):
        return [TOOL]

    def demonstrate(self, thinking):
        return reply("7")

    def verify(self, response):
        return Verdict(1.0)

    def near_miss(self, rng):
        return reply("8")

    def guess(self, rng):
        return reply("9")

    chance = 0.0


def call(arguments, result="3"):
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    return [asked, {"role": "tool", "content": result}]


def test_what_has_a_veto_in_practice_has_one_here():
    answers = [answer(number, "thinking") for number in range(4)]
    for one, pathology, liked in zip(answers, (1.0, 0.0, 1.0, 0.4), (0.8, 0.8, 0.6, 0.8), strict=True):
        one.attempt.parts |= {"pathology": pathology, "model": liked}
    taught = {
        names: [one.number for one in choose(answers, OPEN, TOKENIZER, ROW, dict.fromkeys(names, 0.7)).answers["thinking"]]
        for names in ((), ("pathology",), ("pathology", "model"))
    }
    assert taught == {(): [0, 1, 2, 3], ("pathology",): [0, 2], ("pathology", "model"): [0]}


def answer(number, mode, fault=None, text=None, length=10) -> Answer:
    """A right answer of `length` different tokens, with a fault planted."""
    thinks = "because" if mode == "thinking" else None
    response = reply(text or f"it is {number}", thinks)
    if fault == "repetition":
        ids = [5, 6, 7, 8] * 5
    else:
        ids = list(range(5, 5 + (200 if fault == "length" else length)))
    if fault == "mode":
        response = reply(text or "it is", None if thinks else "because")
    if fault == "protocol":
        response = [*call({"a": "three"}), *response]
    if fault == "call":
        response = [*call({"a": 3}, "error: no such number"), *response]
    problem = Ask(number)
    sampled, versions = [False, False, *[True] * len(ids)], [-1, -1, *[0] * len(ids)]
    one = Trajectory(problem, [1, 2, *ids], sampled, [], versions, response, Verdict(1.0))
    one.parts = {"verifier": 1.0, "model": 0.2 if fault == "score" else 0.8}
    if fault == "wrong":
        one.verdict, one.parts = Verdict(0.5), {"verifier": 0.5}
    if fault == "truncated":
        one.verdict, one.parts, one.end = Verdict(0.0), {}, "length"
    if fault == "failed":
        one.verdict, one.parts, one.end, one.failure = None, {}, "failed", Failure("time-out", "")
    return Answer(number, Placed("ask", 1, problem), mode, one)


OPEN = Harvest(problems=1, kept=9, easy_share=0.0, balance=99.0)  # nothing is dropped but for a fault of its own
PLANTED = ("failed", "truncated", "protocol", "wrong", "mode", "call", "repetition", "length", "score")


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(SAMPLED), st.sampled_from([None, None, *PLANTED])), max_size=24))
def test_every_planted_fault_is_taken_by_its_own_filter_and_every_sound_answer_is_kept(plan):
    # Eleven sound answers to other problems, so that the median of each mode is theirs.
    sound = [answer(number, mode) for number in range(100, 111) for mode in SAMPLED]
    planted = [answer(n, mode, fault, text=f"answer {place}") for place, (n, mode, fault) in enumerate(plan)]
    kept = choose([*sound, *planted], OPEN, TOKENIZER, ROW)
    assert kept.took == Counter({name: 0 for name in ("surplus", "easy", "balance")}) + Counter(
        fault for _, _, fault in plan if fault
    )
    left = Counter(mode for _, mode, fault in plan if fault is None)
    assert kept.counts()["thinking"] == 11 + left["thinking"] and kept.counts()["non-thinking"] == 11 + left["non-thinking"]
    for line in kept.lines():  # `sft` takes every one
        lint(Sample(line["messages"], "", line["tools"], line["thinking"], line["opens_thinking"]), TOKENIZER, ROW)


@st.composite
def attempts(draw):
    """Problems with some right and some wrong answers in both modes, some of them the same."""
    found = []
    for number in range(draw(st.integers(1, 8))):
        for mode in SAMPLED:
            for _ in range(3):
                fault = draw(st.sampled_from([None, "wrong", "truncated", "failed"]))
                found.append(answer(number, mode, fault, text=draw(st.sampled_from("abc")), length=draw(st.integers(8, 12))))
    return found


@given(
    attempts(),
    st.builds(
        Harvest,
        problems=st.just(1),
        kept=st.integers(1, 3),
        easy_share=st.floats(0, 1),
        easy_kept=st.floats(0, 1),
        balance=st.floats(1, 3),
        at_once=st.floats(0.1, 1),
    ),
)
def test_what_is_kept_obeys_the_recipe_and_every_answer_is_counted_once(answers, recipe):
    kept = choose(answers, recipe, TOKENIZER, ROW)
    assert sum(kept.took.values()) + sum(map(len, kept.answers.values())) == len(answers)
    assert set(kept.took) <= set(FILTERS)
    sizes = sorted(map(len, kept.answers.values()))
    assert sizes[0] == 0 or sizes[1] <= recipe.balance * sizes[0]
    for mode in SAMPLED:
        by_problem: dict[int, list] = {}
        for one in kept.answers[mode]:
            by_problem.setdefault(one.number, []).append(one.attempt.response)
        assert all(len(own) <= recipe.kept for own in by_problem.values())
        assert all(own.count(response) == 1 for own in by_problem.values() for response in own)
    # Nothing easier stays where something harder was dropped as easy.
    rates = pass_rates(answers)
    if kept.took["easy"] and not kept.took["balance"]:
        stays = {one.number for own in kept.answers.values() for one in own}
        usable = {one.number for one in kept.automatic} | stays
        dropped = usable - stays
        assert max((rates[n] for n in stays), default=0) <= min((rates[n] for n in dropped), default=1)
    at_once, thinking = (pass_rates(one for one in answers if one.mode == mode) for mode in ("non-thinking", "thinking"))
    assert len({one.number for one in kept.automatic}) == len(kept.automatic)
    for one in kept.automatic:
        likely, helps = (
            at_once.get(one.number, 0.0) >= recipe.at_once,
            thinking.get(one.number, 0.0) > at_once.get(one.number, 0.0),
        )
        assert (one.mode == "thinking") == (not likely and helps)


def test_the_automatic_mode_thinks_where_the_answer_at_once_is_likely_wrong_and_thinking_helps():
    easy = [answer(1, "non-thinking", text=t) for t in "abc"] + [answer(1, "thinking")]
    hard = [
        answer(2, "non-thinking", text="a"),
        *(answer(2, "non-thinking", "wrong", text=t) for t in "bc"),
        answer(2, "thinking"),
    ]
    hopeless = [answer(3, "non-thinking", "wrong"), answer(3, "thinking", "wrong")]
    as_likely = [
        answer(4, mode, fault, text=t) for mode in SAMPLED for fault, t in ((None, "a"), ("wrong", "b"), ("wrong", "c"))
    ]
    kept = choose([*easy, *hard, *hopeless, *as_likely], OPEN, TOKENIZER, ROW)
    assert [(one.number, one.mode) for one in kept.automatic] == [(1, "non-thinking"), (2, "thinking"), (4, "non-thinking")]
    assert kept.undecided == 1
    lines = [line for line in kept.lines() if line["thinking"] is None]
    assert ["reasoning_content" in line["messages"][-1] for line in lines] == [False, True, False]


@pytest.mark.parametrize(("right", "luck"), [(32, 32), (40, 40), (41, 0), (64, 0)])
def test_right_answers_teach_nothing_where_no_more_are_right_than_by_guessing(right, luck):
    @dataclass(frozen=True)
    class Coin(Ask):
        chance = 0.5

    answers = [
        answer(number, mode, None if mode == "thinking" or number < right else "wrong", text=f"{number}")
        for mode in SAMPLED
        for number in range(64)
    ]
    answers = [one._replace(placed=Placed("coin", 1, Coin(one.number))) for one in answers]
    kept = choose(answers, OPEN, TOKENIZER, ROW)
    assert kept.took["luck"] == luck and len(kept.answers["non-thinking"]) == right - luck
    assert len(kept.answers["thinking"]) == 64  # another mode is judged by itself


def test_hard_problems_keep_several_answers_and_the_easiest_none():
    answers = []
    for number, wrong in enumerate([0, 1, 2, 3]):  # of four answers at once
        answers += [answer(number, "non-thinking", "wrong" if n < wrong else None, text=str(n)) for n in range(4)]
        answers += [answer(number, "thinking", text=str(n)) for n in range(4)]
    recipe = Harvest(problems=1, kept=3, easy_share=0.5, easy_kept=0.5, balance=9.0)
    kept = choose(answers, recipe, TOKENIZER, ROW)
    assert [one.number for one in kept.answers["thinking"]] == [3, 3, 3, 2, 2, 2, 1]
    assert kept.took["easy"] == 8


def naive_repeats(ids, times, tokens):
    for period in range(1, len(ids) + 1):
        for start in range(len(ids)):
            count = 1
            while ids[start + count * period : start + (count + 1) * period] == ids[start : start + period]:
                count += 1
            if count >= times and count * period >= tokens and start + period <= len(ids):
                return True
    return False


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(2, 4), st.integers(1, 12))
def test_repetition_is_what_a_naive_search_finds(ids, times, tokens):
    assert repeats(ids, times, tokens) == naive_repeats(ids, times, tokens)


def test_a_loop_is_found_wherever_it_stands_and_a_number_with_zeros_is_none():
    assert repeats([1, 2, 3, *[4, 5, 6, 7] * 4, 9], 4, 16)
    assert not repeats([1, 0, 0, 0, 0, 2, *range(3, 30)], 4, 16)


def test_the_table_has_a_column_for_each_domain():
    counts = {"attempts": 8, "took": dict.fromkeys(FILTERS, 1), "kept": {"thinking": 1, "non-thinking": 2, "automatic": 3}}
    counts["automatic"] = {"at once": 1, "thinks": 2, "undecided": 0}
    text = counts_table({"reasoning": counts, "agent": counts})
    assert text.splitlines()[0] == "| | reasoning | agent |" and "| kept: automatic | 3 | 3 |" in text


@pytest.mark.parametrize(("key", "value"), [("problems", 0), ("repeats", 1), ("balance", 0.5), ("at_once", 1.5)])
def test_recipes_that_make_no_sense_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        Harvest(**{"problems": 1, key: value})


def written(*turns: str, read=()) -> Trajectory:
    """An attempt of which the policy has written these turns, with something of the world's after each; read: the messages."""
    ids, versions = [1], [-1]
    for turn in turns:
        own = TOKENIZER.encode(turn, allow_special=True)
        ids += [*own, 1]
        versions += [*[0] * len(own), -1]
    # What follows a `<think>` is not learnt from, and yet written.
    think = TOKENIZER.special_ids["<think>"]
    sampled = [version >= 0 and before != think for version, before in zip(versions, [1, *ids], strict=False)]
    return Trajectory(Ask(1), ids, sampled, [0.0] * len(ids), versions, list(read), Verdict(0.0))


def test_a_turn_that_was_not_read_is_found_and_the_calls_begun_in_it_count():
    good = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    torn, thinks = "<tool_call>add\n<arg_key>a", "<think>shall I <tool_call></think>\n"
    read = call({"a": 1})
    whole = written(good, read=read)
    assert unread_turn(whole, TOKENIZER) == "" and calls_of(whole, "automatic", TOKENIZER) == (1, 1)
    later = written(good, torn, read=read)
    assert unread_turn(later, TOKENIZER) == torn and calls_of(later, "automatic", TOKENIZER) == (2, 1)
    assert calls_of(written(thinks + torn + torn), "automatic", TOKENIZER) == (2, 0)
    thought = written(thinks + good, read=read)
    assert unread_turn(thought, TOKENIZER) == "" and calls_of(thought, "automatic", TOKENIZER) == (1, 1)
    assert thought.length == len(thought.ids) - 2 > sum(thought.sampled)
    assert calls_of(written("<think>shall I <tool_call> or"), "automatic", TOKENIZER) == (0, 0)
    # Where the prompt has opened a thinking, what comes before its end is no call either.
    assert calls_of(written("shall I <tool_call> or"), "thinking", TOKENIZER) == (0, 0)
    assert calls_of(written("shall I </think>" + torn), "thinking", TOKENIZER) == (1, 0)
