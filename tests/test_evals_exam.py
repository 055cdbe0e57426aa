"""Exams: asked of models of ours and of a real server, kept line by line, resumed to the bit, compared problem by problem."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from by_heart import CALL, THOUGHT, WEATHER, learnt, serving
from hypothesis import given
from hypothesis import strategies as st
from published import write_published

from minglm.__main__ import main
from minglm.data.duplicates import OVERLAP, shared_with
from minglm.engine.engine import Engine
from minglm.engine.sequence import Completion
from minglm.evals.attempts import ChatForm, EndpointWriter, EngineWriter, as_request
from minglm.evals.benchmarks.question import Question, Unscorable, asked
from minglm.evals.compare import compare, smallest_detectable, table_of
from minglm.evals.endpoint import Endpoint, EndpointError, Written
from minglm.evals.exam import drawn, key_of, measures_of, overview, read_rows, sit, unjudged
from minglm.evals.interval import mean
from minglm.evals.measure import EvaluationError, Results, scored, summed
from minglm.evals.passes import ks_of, pass_all, pass_at
from minglm.tasks.task import Verdict, reply

# ---- pass@k and pass^k


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n), st.integers(0, n))))
def test_pass_at_k_and_pass_all_k_are_those_of_all_draws(drawn):
    k, n, c = drawn
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert math.isclose(pass_at(k, n, c), sum(map(any, draws)) / len(draws))
    assert math.isclose(pass_all(k, n, c), sum(map(all, draws)) / len(draws))


@given(st.integers(1, 6), st.floats(0, 1))
def test_pass_at_k_is_unbiased(k, p):
    n = 8
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert math.isclose(sum(w * pass_at(k, n, c) for c, w in enumerate(weights)), 1 - (1 - p) ** k, abs_tol=1e-9)
    assert math.isclose(sum(w * pass_all(k, n, c) for c, w in enumerate(weights)), p**k, abs_tol=1e-9)


def test_ks_and_their_limits():
    assert [ks_of(n) for n in (1, 2, 3, 8, 10)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]
    for k, n, c in ((0, 1, 0), (2, 1, 0), (1, 1, 2)):
        with pytest.raises(EvaluationError, match=f"k = {k}, n = {n}, c = {c}: wanted"):
            pass_at(k, n, c)


# ---- asking


class Oracle:
    """Writes what a function of problem and seed says: a model whose answers are known. broken: after so many turns it dies."""

    thinking = None

    def __init__(self, says, broken: float = math.inf):
        self.says, self.left, self.asked = says, broken, 0

    def write(self, attempts):
        found = []
        for one in attempts:
            if self.left <= 0:
                raise EndpointError("gone")
            self.left, self.asked = self.left - 1, self.asked + 1
            found.append(Written(reply(self.says(one))[0], 3, False))
        return found


def judge(response) -> Verdict:
    content = response[-1]["content"]
    if content == "?":
        raise Unscorable("needs a judge")
    return Verdict(float(content.startswith("right")))


QUESTIONS = [Question("mine", str(number), asked(f"Question {number}?"), judge, chance=0.25) for number in range(150)]
OPTIONS = {"model": "oracle", "seed": 0}


def says(one) -> str:
    return f"right {one.seed}" if one.seed % 3 and int(one.problem.id) % 2 else f"wrong {one.seed}"


def take(file: Path, oracle: Oracle, questions=QUESTIONS, samples=2, modes=("thinking", "automatic"), options=OPTIONS):
    return sit(questions, {mode: lambda: oracle for mode in modes}, samples, 0, file, options)


def test_an_exam_that_was_stopped_goes_on_to_the_same_answers(tmp_path):
    whole = take(tmp_path / "whole.jsonl", Oracle(says))
    assert len(whole) == 600 and len({row["response"][0]["content"] for row in whole}) == 600  # every draw is its own
    file = tmp_path / "stopped.jsonl"
    for patience in (0, 64 + 10, 64 + 64 + 1):
        with pytest.raises(EndpointError):
            take(file, Oracle(says, patience))
    with file.open("ab") as lines:
        lines.write('{"suite": "mine", "id": "é'.encode()[:-1])  # cut off by a power failure, within a character
    oracle = Oracle(says)
    assert take(file, oracle) == whole
    assert oracle.asked == 600 - 64 - 128
    assert sorted(file.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_only_what_is_new_is_asked(tmp_path):
    file = tmp_path / "a.jsonl"
    take(file, Oracle(says), QUESTIONS[:10], samples=1)
    for questions, samples, modes, new in (
        (QUESTIONS[:10], 1, ("thinking", "automatic"), 0),
        (QUESTIONS[:12], 1, ("thinking",), 2),
        (QUESTIONS[:10], 3, ("automatic",), 20),
        ([Question("mine", "0", asked("Other?"), judge)], 1, ("thinking",), 1),
    ):
        oracle = Oracle(says)
        assert len(take(file, oracle, questions, samples, modes)) == len(questions) * samples * len(modes)
        assert oracle.asked == new
    with pytest.raises(EvaluationError, match="was written with seed = 0, now 1; wanted another --out, or --again"):
        take(file, Oracle(says), options={**OPTIONS, "seed": 1})
    for torn in ("", '{"opt'):  # killed before the first line was there
        (tmp_path / "c.jsonl").write_text(torn)
        assert len(take(tmp_path / "c.jsonl", Oracle(says), QUESTIONS[:1])) == 4
    (tmp_path / "b.jsonl").write_text("[]\n")
    with pytest.raises(EvaluationError, match="these are no answers of an exam"):
        take(tmp_path / "b.jsonl", Oracle(says))


def test_an_answer_may_hold_what_has_no_utf_8_form(tmp_path):
    (row,) = take(tmp_path / "a.jsonl", Oracle(lambda one: "right \ud800 \u2028"), QUESTIONS[:1], 1, ("thinking",))
    assert [*read_rows(tmp_path / "a.jsonl").values()] == [row]  # an endpoint's JSON may hold half a surrogate pair


def test_questions_drawn_are_among_those_of_a_larger_limit():
    few, more = drawn(QUESTIONS, 10, 3), drawn(QUESTIONS, 40, 3)
    assert len(few) == 10 and {q.id for q in few} < {q.id for q in more}
    assert drawn(QUESTIONS, None, 0) == drawn(QUESTIONS, 999, 0) == QUESTIONS
    assert key_of(few[0], "thinking", 0) != key_of(few[1], "thinking", 0)


def test_measures_are_of_problems_and_say_what_was_left_out(tmp_path):
    def answers(one):
        return {0: "right", 1: "wrong", 2: "?"}[int(one.problem.id) % 3]

    rows = take(tmp_path / "a.jsonl", Oracle(answers), QUESTIONS[:30], samples=4, modes=("automatic",))
    found = {m.quantity: m for m in measures_of(rows, {"mine": 0.25}, {"mine": {"0", "1", "3"}})}
    average = found["mean of 4, automatic"]
    assert (average.estimate.value, average.estimate.count, average.left_out, average.chance) == (0.5, 20, 10, 0.25)
    assert found["pass@4, automatic"].estimate.value == found["pass^2, automatic"].estimate.value == 0.5
    assert found["mean of 4 without overlap, automatic"].estimate.value == 8 / 17
    assert found["tokens an answer, automatic"].estimate.value == 3
    assert unjudged(rows) == {"needs a judge": 40}
    others = take(tmp_path / "b.jsonl", Oracle(lambda one: "?right"[int(one.problem.id) % 3 == 1 :][:5]), QUESTIONS[:30])
    units = [m.units for m in measures_of(others, {}, {}) if m.quantity.startswith(("mean", "tokens"))]
    assert {len(own) for own in units} == {30}  # a problem keeps its place, whichever were left out


def test_an_overview_has_tokens_where_it_has_a_mean():
    of = [summed("exam", "all reasoning", "tokens an answer, thinking", [3.0], [1.0])]  # means of 4 and of 3 have none together
    assert "tokens" not in overview({"mine": of})
    of.insert(0, scored("exam", "all reasoning", "mean, thinking", [1.0]))
    assert "3 tokens |" in overview({"mine": of})


# ---- comparing


def test_two_exams_are_compared_problem_by_problem(tmp_path):
    take(tmp_path / "a" / "m.answers.jsonl", Oracle(lambda one: "right" if int(one.problem.id) % 2 else "wrong"), samples=1)
    better = Oracle(lambda one: "right" if int(one.problem.id) % 2 or int(one.problem.id) < 20 else "wrong")
    take(tmp_path / "b" / "m.answers.jsonl", better, QUESTIONS[:100], samples=1, modes=("thinking",))
    (one,) = compare(tmp_path / "a", tmp_path / "b")
    assert (one.suite, one.mode, one.before, one.after, one.change.count) == ("mine", "thinking", 0.5, 0.6, 100)
    wanted = mean([1.0] * 10 + [0.0] * 90)
    assert one.change.low == pytest.approx(wanted.low) and one.change.high == pytest.approx(wanted.high)
    assert "| 100 | 0.500 | 0.600 | **+0.100 [" in table_of([one])
    with pytest.raises(EvaluationError, match="have no suite, mode and question in common"):
        take(tmp_path / "c" / "m.answers.jsonl", Oracle(says), [Question("mine", "0", asked("Other?"), judge)])
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(EvaluationError, match="found none; wanted a folder with one"):
        compare(tmp_path / "a", tmp_path)


def test_a_question_whose_text_was_changed_is_another_one(tmp_path):
    old, new = (Question("mine", "0", asked(text), judge) for text in ("Old?", "New?"))
    for folder, question, said in (("a", old, "wrong"), ("a", new, "right"), ("b", new, "right")):
        take(tmp_path / folder / "m.answers.jsonl", Oracle(lambda _, said=said: said), [question])
    (one, *_) = compare(tmp_path / "a", tmp_path / "b")
    assert (one.before, one.after, one.change.count) == (1.0, 1.0, 1)


def test_an_answer_that_was_not_judged_takes_no_other_one_with_it(tmp_path):
    """Each question counts with all its answers; of those with fewer than k there is no pass@k."""
    sights = Counter()

    def says(one):
        sights[one.problem.id] += 1
        return "?" if one.problem.id == "0" and sights["0"] > 1 else "right" if sights[one.problem.id] == 4 else "wrong"

    rows = take(tmp_path / "a.jsonl", Oracle(says), QUESTIONS[:3], samples=4, modes=("automatic",))
    found = {m.quantity: m for m in measures_of(rows, {}, {})}
    assert found["mean of 4, automatic"].estimate.value == pytest.approx((0 + 1 / 4 + 1 / 4) / 3)
    assert (found["pass@4, automatic"].estimate.value, found["pass@4, automatic"].left_out) == (1.0, 1)
    assert found["pass@2, automatic"].estimate.value == 0.5


@pytest.mark.parametrize("thinking", [True, None])
def test_a_call_that_cannot_be_read_is_a_call_and_thoughts_are_no_answer(thinking):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}
    thought = ("" if thinking else "<think>") + "so \\boxed{7}</think>\n"
    call = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>abc</arg_value>\n</tool_call>"
    for tools, text, names in (([tool], call, ["f"]), ([tool], call + "<tool_call>", ["f"]), ([], "<tool_call>", [])):
        problem = Question("mine", "0", asked("?"), judge, tools=tools)
        message = ChatForm(None, thinking).read(problem, (), Completion([], [], thought + text, None, None, None, "stop"))
        assert message["reasoning_content"] == "so \\boxed{7}" and not message["content"]
        assert [one["function"]["name"] for one in message["tool_calls"]] == names


def test_the_smallest_detectable_difference_is_found_in_eight_of_ten_comparisons():
    rng = np.random.default_rng(0)
    noise = rng.choice([-1.0, 0.0, 1.0], p=[0.15, 0.7, 0.15], size=(600, 120))
    effect = smallest_detectable([-1.0] * 18 + [0.0] * 84 + [1.0] * 18)  # of the same variance
    found = [mean(row + effect).low > 0 for row in noise]
    assert 0.74 < np.mean(found) < 0.86
    assert smallest_detectable([0.0] * 100) == pytest.approx(0.0282, abs=1e-3)
    assert smallest_detectable([1.0]) is None


def test_what_was_not_asked_counts_in_no_comparison_and_few_problems_are_no_proof(tmp_path):
    rows = take(tmp_path / "a.jsonl", Oracle(lambda one: "wrong"), QUESTIONS[:5], 1, ("thinking",))
    take(tmp_path / "b.jsonl", Oracle(lambda one: "right"), QUESTIONS[:5], 1, ("thinking",))
    (one,) = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert one.change.excludes(0.0) and "**" not in table_of([one])  # five problems that all rise have no spread
    lines = [json.dumps({"options": OPTIONS}), *(json.dumps({**row, "too_long": row["id"] == "0"}) for row in rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")[0].change.count == 4


# ---- contamination


@given(st.lists(st.text("ab ", min_size=20, max_size=60), max_size=4), st.lists(st.text("ab ", max_size=80), max_size=4))
def test_texts_overlap_where_thirteen_words_in_a_row_do(texts, others):
    def grams(text):
        words = text.split()
        return {tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}

    seen = set().union(*map(grams, others)) if others else set()
    assert shared_with(texts, others) == {index for index, text in enumerate(texts) if grams(text) & seen}


# ---- models of ours and a real server


@pytest.fixture(scope="module")
def served():
    model, tokenizer = learnt()
    with serving(Engine(model, tokenizer), tokenizer) as served:
        yield served


@pytest.mark.parametrize("thinking", [True, False, None])
def test_an_endpoint_answers_as_the_model_behind_it(served, thinking, tmp_path):
    model, tokenizer = learnt()
    asked_of = [Question("mine", one, asked(one), lambda response: Verdict(0.0)) for one in ("hello", "2+2?")]
    if thinking is None:
        asked_of.append(Question("mine", "rain?", asked("rain?"), lambda response: Verdict(1.0), tools=[WEATHER]))
    here = EngineWriter(Engine(model, tokenizer), ChatForm(tokenizer, thinking), 0.0, tokens=64)
    there = EndpointWriter(Endpoint(f"{served.url}/v1", "parrot"), thinking, 0.0, tokens=64)
    rows = [
        sit(asked_of, {"it": lambda writer=writer: writer}, 1, 0, tmp_path / name, {})
        for name, writer in (("here", here), ("there", there))
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["response"] == theirs["response"] and mine["reward"] == theirs["reward"]
        assert mine["cut"] == theirs["cut"] and mine["tokens"] > 0
    assert rows[0][1]["response"][0]["reasoning_content"] == ("" if thinking is False else THOUGHT)
    assert [row["thought"] for row in rows[0]][1] == (thinking is not False)
    if thinking is None:
        assert rows[1][2]["response"][0]["tool_calls"] == [CALL]


def test_a_question_that_an_endpoint_refuses_stops_no_exam_and_refusals_alone_do(served, tmp_path):
    writer = EndpointWriter(Endpoint(f"{served.url}/v1", "parrot"), False, 0.0, tokens=8)
    asked_of = [Question("mine", one[:9], asked(one), lambda response: Verdict(1.0)) for one in ("hello", "hello " * 4000)]
    rows = sit(asked_of, {"it": lambda: writer}, 1, 0, tmp_path / "a", {})
    assert [row["reward"] for row in rows] == [1.0, None]
    assert "BadRequestError" in rows[1]["reasons"][0] and not rows[1]["too_long"]
    with pytest.raises(EndpointError, match="all 16 requests were refused, one of them so: .*BadRequestError"):
        sit(asked_of[1:], {"it": lambda: writer}, 16, 0, tmp_path / "b", {})


def test_calls_go_to_an_endpoint_with_identities():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    messages = [*asked("Go."), {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call, call]}]
    messages += [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    _, turn, first, second = as_request(messages)
    ids = [one["id"] for one in turn["tool_calls"]]
    assert len(set(ids)) == 2 and [first["tool_call_id"], second["tool_call_id"]] == ids
    assert turn["tool_calls"][0]["function"]["arguments"] == '{"x": "é"}' and "reasoning_content" not in turn


def test_an_endpoint_that_is_not_there_is_named():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "nobody")
    endpoint._client = endpoint._client.with_options(max_retries=0)
    with pytest.raises(EndpointError, match="http://127.0.0.1:9/v1, model nobody: APIConnectionError"):
        endpoint.ask(asked("?"))


# ---- the command


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = learnt()
    model.save_pretrained("mine")
    tokenizer.save_pretrained("mine")
    write_published(tmp_path / "published")
    return tmp_path


EXAM = ["--benchmark", "families", "gpqa", "aime", "terminal_bench", "--data", "published", "--families", "arithmetic"]
SMALL = ["--limit", "2", "--tokens", "12", "--levels", "1", "--modes", "automatic", "non-thinking"]


def test_an_exam_of_a_folder_is_written_read_again_and_compared(folder, capsys):
    rows = Path("published/gpqa.csv").read_text()
    long = "Which of these has the least mass, if each is at rest and far from all other things?"
    Path("published/gpqa.csv").write_text(rows.replace("Which of these has the least mass?", f'"{long}"'))
    (folder / "text.txt").write_text(f"We read: {long}")
    command = ["eval", "mine", *EXAM, *SMALL, "--training-data", "text.txt"]
    assert main([*command, "--out", "out", "--samples", "2"]) == 0
    told = capsys.readouterr().out
    assert "gpqa: 1 of 2 questions have 13 words in a row in common" in told
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {"mine.answers.jsonl", "mine.json", "table.md", "exam.png"}
    results = Results.load(out / "mine.json")
    assert results.details["overlap"]["gpqa"] == ["rec1"]
    assert {m.name for m in results.measures} >= {"arithmetic", "gpqa", "aime"}
    assert results.find("exam", "arithmetic", "pass^2").chance is None
    table = (out / "table.md").read_text()
    assert "MATH's smallest steps" in table and "- AIME: exact whole number" in table
    assert len(read_rows(out / "mine.answers.jsonl")) == 4 * 2 * 2 * 2
    before = (out / "mine.answers.jsonl").read_bytes()
    assert main([*command, "--out", "out", "--samples", "2"]) == 0
    assert (out / "mine.answers.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main(["eval", "--compare", "out", "out"]) == 0
    assert "| arithmetic | automatic | 2 |" in capsys.readouterr().out


def test_an_exam_of_an_endpoint_needs_no_folder(folder, served):
    command = ["eval", "--endpoint", f"{served.url}/v1", "--model", "parrot", "--families", "arithmetic", *SMALL]
    assert main(command) == 0
    assert len(read_rows(Path("runs/eval-families-parrot/parrot.answers.jsonl"))) == 4
    table = Path("runs/eval-families-parrot/table.md").read_text()
    assert "parrot" in table and "pass@" not in table  # of one sample there is nothing to draw from


def test_the_self_test_of_families_and_published_records(folder, capsys):
    command = ["eval", "--self-test", "--data", "published", "--families", "arithmetic", "countdown", "--limit", "4"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "arithmetic" in told and "gold 8/8" in told and "browsecomp" in told and "FAILS" not in told
    rows = [json.loads(line) for line in Path("published/ifeval.jsonl").read_text().splitlines()]
    rows[0]["response"] = "Red, a colour."
    Path("published/ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "--self-test", "--data", "published", "--benchmark", "ifeval"]) == 1
    assert "FAILS  published/ifeval.jsonl:1: gold scores 0.0; wanted 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mine", "--benchmark", "amie", "--data", "published"], "benchmark = 'amie': wanted families, or one of aime"),
        (["mine", "--benchmark", "aime"], "--benchmark aime without --data; wanted the path of its problem, answer"),
        (["--endpoint", "http://x/v1"], "wanted --endpoint with --model NAME"),
        (["mine", "--benchmark", "families", "--families", "arithmetik"], "wanted some of arithmetic"),
        (["mine", *EXAM, "--samples", "0"], "samples = 0, .* wanted 1 or more"),
        (["mine", *EXAM, "--grader-url", "http://x/v1"], "wanted --grader-url and --grader-name, or neither"),
        (["--benchmark", "families", "--families", "arithmetic"], "wanted a run folder or a folder of a model"),
        (["--compare", "mine", "mine"], "found none; wanted a folder with one"),
    ],
)
def test_what_cannot_be_examined_is_refused_in_a_sentence(folder, arguments, complaint, capsys):
    import re

    assert main(["eval", *arguments]) == 2
    assert re.search(complaint, " ".join(capsys.readouterr().err.split()))
