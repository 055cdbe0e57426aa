"""Published benchmarks on hand-written records: read as published, right answers pass, wrong ones do not, bad records are
refused with their place."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import AIME, AREA, ASKED, BFCL, GPQA, HUMANEVAL, IFEVAL, MMLU_PRO, RIGHT_CALL, SWE, TERMINAL, write_published
from pyarrow import parquet

from minglm.evals.benchmarks.answers import chosen_letter, exact_answer
from minglm.evals.benchmarks.calls import bfcl, call_message, same
from minglm.evals.benchmarks.graded import encrypted, keystream
from minglm.evals.benchmarks.instructions import KINDS
from minglm.evals.benchmarks.mathematics import boxed, equal, integer
from minglm.evals.benchmarks.programs import code_of, live_code_bench, same_output
from minglm.evals.benchmarks.question import Question, Unscorable, asked
from minglm.evals.benchmarks.records import Record, RecordError, records
from minglm.evals.benchmarks.registry import BENCHMARKS, load
from minglm.evals.benchmarks.shells import command_message
from minglm.evals.endpoint import Endpoint, Written
from minglm.evals.measure import EvaluationError
from minglm.evals.self_test import self_test
from minglm.tasks.task import Verdict, reply


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


def questions(published: Path, name: str, grader=None) -> dict[str, Question]:
    path = next(path for path in published.iterdir() if path.stem == name)
    return {question.id: question for question in load(name, path, grader)}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_scores_one_and_empty_and_copied_answers_score_nothing(published, name):
    checks = list(self_test(questions(published, name).values()))
    assert not [check for check in checks if check.fails]
    assert sum(check.answer == "gold" and check.reward == 1 for check in checks) >= 1
    assert sum(check.answer != "gold" and check.reward == 0 for check in checks) >= 4


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "ifeval"])  # whose constraints a quotation may keep
def test_a_quoted_question_is_no_answer(published, name):
    for question in questions(published, name).values():
        if "irrelevance" in question.id:  # where right is whatever calls nothing
            continue
        try:
            assert question.judge(reply(f"You ask me this: {question.text}")).reward == 0, question.id
        except Unscorable:
            assert BENCHMARKS[name].needs


def test_the_self_test_finds_judges_that_are_wrong():
    def judged(verdict: Verdict) -> Question:
        return Question("mine", "1", asked("What?"), lambda response: verdict, reply("That."))

    assert [check.answer for check in self_test([judged(Verdict(0.0))]) if check.fails] == ["gold"]
    assert not [check for check in self_test([judged(Verdict(1.0))]) if check.fails]


WRONG = {
    "aime": ("60", ["25", "\\boxed{26}", "\\boxed{25.5}", "\\boxed{25} but \\boxed{7}"], ["so \\boxed{7}, no: \\boxed{ 25 }."]),
    "math_500": ("test/prealgebra/1.json", ["\\boxed{\\frac{4}{3}}", "3/4"], ["\\boxed{0.75}", "\\boxed{\\dfrac{6}{8}}"]),
    "mmlu_pro": ("70", ["Answer: D", "c", "The answer is C, no: the answer is A", "\\boxed{C} is near.\nAnswer: A"],
                 ["(C)", "**Answer: C**", "answer is (C).", "Answer: C. My answer: I am sure."]),
    "humaneval": ("HumanEval/0", ["def total(v): return 0", "```python\nimport sys\nsys.exit(0)\n```", "exit()", "return 3"],
                  ["```python\ndef total(values):\n    return sum(values)\n```", "    return sum(values)\n"]),
    "live_code_bench": ("1_A", ["print(3)", "```python\nprint(int(input()) + 1)\n```"],
                        ["```python\nimport sys\nprint(sum(int(x) for x in sys.stdin.read().split()))\n```"]),
    "ifeval": ("1000", ["Red, a colour."], ["Blue."]),
    "hle": ("h1", ["Exact Answer: A", "B", "Exact Answer: (A)"], ["It is so.\nExact Answer: B"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_other_answers_are_judged_as_people_would(published, name):
    id, wrong, right = WRONG[name]
    question = questions(published, name)[id]
    assert [question.verify(reply(one)).reward for one in wrong] == [0.0] * len(wrong)
    assert [question.verify(reply(one)).reward for one in right] == [1.0] * len(right)


# ---- formats


def test_all_formats_give_the_same_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in MMLU_PRO * 2))
    (tmp_path / "a.json").write_text(json.dumps(MMLU_PRO * 2))
    parquet.write_table(pyarrow.Table.from_pylist(MMLU_PRO * 2), tmp_path / "a.parquet")
    found = {suffix: list(records(tmp_path / f"a.{suffix}")) for suffix in ("jsonl", "json", "parquet")}
    for own in found.values():
        assert [record.values for record in own] == MMLU_PRO * 2
    assert [record.place for record in found["jsonl"]] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]
    assert [record.place for record in found["parquet"]] == [f"{tmp_path}/a.parquet[{n}]" for n in (0, 1)]


def test_choices_are_shuffled_by_the_question_alone(published):
    one = questions(published, "gpqa")
    assert [q.text for q in one.values()] == [q.text for q in questions(published, "gpqa").values()]
    assert {q.gold[0]["content"] for q in one.values()} <= {f"Answer: {letter}" for letter in "ABCD"}
    assert all(row["Correct Answer"] in one[row["Record ID"]].text for row in GPQA)


BAD = [
    ("aime", {**AIME[0], "answer": "1000"}, r":1: answer is '1000'; wanted a whole number from 0 to 999"),
    ("aime", {"answer": 3}, r":1: problem or Problem or question is missing; wanted a text"),
    ("aime", {**AIME[0], "problem": " "}, r"problem is ' '; wanted a text that is not empty"),
    ("mmlu_pro", {**MMLU_PRO[0], "answer": "D"}, r"answer is 'D'; wanted the letter of answer_index 2"),
    ("mmlu_pro", {**MMLU_PRO[0], "options": ["a", 3]}, r"options is \['a', 3\]; wanted a list of at least 2 texts"),
    ("humaneval", {**HUMANEVAL[0], "entry_point": "other"}, "entry_point is 'other'; wanted the name of a function that"),
    ("ifeval", {**IFEVAL[0], "kwargs": []}, r"kwargs is \[\]; wanted arguments for each of the 1"),
    ("ifeval", {**IFEVAL[0], "instruction_id_list": ["x:y"]}, "instruction_id_list is 'x:y'; wanted one of keywords:existence"),
    ("ifeval", {**IFEVAL[1], "kwargs": [{"num_words": 3, "relation": "more"}, {}]}, "relation is 'more'; wanted one of"),
    ("bfcl", {**BFCL["BFCL_v3_simple.json"][0], "ground_truth": [{"other": {}}]}, "wanted one of .'geometry.area'. with lists"),
    ("bfcl", BFCL["BFCL_v3_simple.json"][0], "ground_truth is None|ground_truth is missing"),
    ("swe_bench", {**SWE, "FAIL_TO_PASS": "[]", "PASS_TO_PASS": "[]"}, "FAIL_TO_PASS is '..'; wanted names of tests"),
    ("swe_bench", {**SWE, "FAIL_TO_PASS": "[x"}, "FAIL_TO_PASS is '.x'; wanted a list, or the JSON of one"),
    ("hle", {"id": "1", "question": "q", "answer": "a", "answer_type": "essay"}, "answer_type is 'essay'; wanted exactMatch"),
    ("browsecomp", {"problem": "???", "answer": "AA==", "canary": "c"}, "problem is '...'; wanted base64 of a text encrypted"),
    ("live_code_bench", {"public_test_cases": "gASVJA=="}, "public_test_cases is .*wanted JSON, or base64 of zlib"),
    ("live_code_bench", {"public_test_cases": json.dumps([{"input": "1, x", "output": "2", "testtype": "functional"}]),
                         "metadata": {"func_name": "f"}}, "a functional test is .*wanted input with a JSON value a line"),
    ("scicode", {"sub_steps": []}, r"sub_steps is \[\]; wanted a list of objects"),
    ("safety_bench", {"id": 1, "category": "c", "question": "q", "options": ["a", "b"]}, "answer is missing; wanted a whole"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "complaint"), BAD)
def test_a_malformed_record_is_refused_with_place_key_and_value(tmp_path, name, record, complaint):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(RecordError, match=complaint) as raised:
        load(name, path)
    assert str(raised.value).startswith(f"{path}:1:")


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: found .1.; wanted an object"),
        ("a.jsonl", "{\n", "a.jsonl:1: found '{', which is no JSON"),
        ("a.json", "no", "which is no JSON"),
        ("a.csv", "a,b\n1,2\n1\n", "a.csv:3: found another number of cells than the header's 2"),
        ("a.parquet", "no", "this is no parquet file"),
        ("a.jsonl", "{}\n\udcff", "a.jsonl: found bytes that are no UTF-8"),
        ("a.csv", "a,b\n\udcff,1\n", "a.csv: found bytes that are no UTF-8"),
        ("a.txt", "no", "found no file to read; wanted one of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, file, text, complaint):
    (tmp_path / file).write_text(text, errors="surrogateescape")
    with pytest.raises(RecordError, match=complaint):
        list(records(tmp_path / file))


def test_a_record_of_a_table_has_the_line_that_it_begins_in(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,"two\nlines"\n3,4\n')
    assert [record.place for record in records(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4"]


def test_a_question_without_an_id_has_one_of_its_own_wherever_the_file_lies(tmp_path):
    rows = [{"problem": "What is $5^2$?", "answer": "25"}, {"problem": "What is $6^2$?", "answer": "36"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "elsewhere.json").write_text(json.dumps(rows[::-1]))
    one, other = ([question.id for question in load("aime", tmp_path / name)] for name in ("a.jsonl", "elsewhere.json"))
    assert len({*one}) == 2 and one == other[::-1]


def test_answers_of_a_safety_test_are_objects(tmp_path):
    (tmp_path / "test_en.json").write_text(json.dumps([{"id": 0, "category": "c", "question": "q", "options": ["a", "b"]}]))
    (tmp_path / "test_answers_en.json").write_text('{"0": 1}')
    with pytest.raises(RecordError, match="test_answers_en.json: 0 is 1; wanted an object"):
        load("safety_bench", tmp_path)


def test_a_folder_may_hold_a_safety_test_in_several_languages(tmp_path):
    rows = [{"id": 2, "category": "c", "question": "q", "options": ["a", "b"]}]
    for language, right in (("en", 1), ("zh", 0), ("zh_subset", 0)):
        (tmp_path / f"test_{language}.json").write_text(json.dumps(rows))
        (tmp_path / f"test_answers_{language}.json").write_text(json.dumps({"2": {"category": "c", "answer": right}}))
    (tmp_path / "dev_zh.json").write_text(json.dumps({"c": [{"question": "q", "options": ["a", "b"], "answer": 0}]}))
    found = {question.id: question for question in load("safety_bench", tmp_path)}
    assert list(found) == ["dev_zh 0", "test_en 2", "test_zh 2", "test_zh_subset 2"]
    assert found["test_zh 2"].verify(reply("Answer：A")).reward == 1 and found["test_en 2"].verify(reply("[A]")).reward == 0


def test_ids_are_unique_names_known_and_files_there(tmp_path):
    (tmp_path / "a.jsonl").write_text(2 * (json.dumps(AIME[0]) + "\n"))
    with pytest.raises(RecordError, match=r"a.jsonl:2: id '60' is also that of .*a.jsonl:1"):
        load("aime", tmp_path / "a.jsonl")
    with pytest.raises(EvaluationError, match="benchmark = 'amie': wanted families, or one of aime"):
        load("amie", tmp_path)
    with pytest.raises(RecordError, match="nowhere does not exist; wanted AIME's problem, answer"):
        load("aime", tmp_path / "nowhere")


# ---- mathematics


SAME = [
    (r"\frac{3}{56}", "3/56"), (r"\dfrac34", "0.75"), ("x = 5", "5"), ("2(x+1)", "2x+2"), ("1,000", "1000"), ("1, 2", "2,1"),
    (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"), (r"10\text{ cm}^2", "10"), (r"\sqrt{12}", r"2\sqrt3"),
    (r"\$18.90", "18.9"), (r"90^\circ", "90"), (r"1\frac12", "3/2"), (r"(-\infty, 0)\cup(0,1)", r"(-\infty,0) \cup (0, 1)"),
    (r"x \in [-2,7]", "[-2,7]"), (r"\{1,2\}", r"\{2,1\}"), (r"10\%", "10"), ("x^2 + 4x + 4", "(x+2)^2"), ("6-5i", "-5i+6"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\text{Evelyn}", "evelyn"), ("5!", "120"),
    (r"\begin{pmatrix} -1/3 & 2 \\ 0.5 & 1 \end{pmatrix}", r"\begin{bmatrix}-\frac{1}{3}&2\\\frac12&1\\ \end{bmatrix}"),
    (r"3 \pm 2 \sqrt{2}", r"3 + 2\sqrt{2}, 3 - 2\sqrt{2}"), (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
    ("1,-2", r"1 \text{ and } -2"), ("1,-2", r"x=1 \text{ or } x=-2"), ("5", r"5\text{ ft/s}"), ("58,500", "58{,}500"),
    (r"12\pi", r"12 \pi \text{ square inches}"), (r"\cot x", r"\frac{1}{\tan(x)}"), (r"2\pi\,r", r"2r\pi"), ("AB=5", "5"),
    (r"2\frac{x}{3}", r"\frac{2x}{3}"), (r"3\frac{\pi}{4}", r"\frac{3\pi}{4}"), (r"x^2\frac{1}{3}", r"\frac{x^2}{3}"),
    (r"-11\frac12", "-11.5"), (r"\sin 2x", r"\sin(2x)"), (r"\sin^2 x", r"1-\cos^2 x"), (r"\sin x\cos x", r"\frac{\sin 2x}{2}"),
    ("|x|", r"\sqrt{x^2}"), (r"|x|\cdot|y|", "|xy|"), (r"\sqrt{x}\sqrt{4x}", "2x"), ("|3-5|", "2"),
    ("$x = 5$", "5"), (r"\log_2 8", "3"), ("x \\leq 3", "x\\le3"), (r"\sqrt[3]{8}", "2"), ("2^{10}", "1024"),
]  # fmt: skip
DIFFERENT = [
    ("(1,2)", "(2,1)"), ("[1,2)", "[1,2]"), (r"-\infty", r"\infty"), ("p - q", "q - p"), ("5", "x"), ("even", "odd"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), (r"\begin{pmatrix}1&2\end{pmatrix}", "(1,2)"),
    (r"1\pm\sqrt2", r"1+\sqrt2"), ("-2,1", "(-2,1)"), (r"\text{ odd}", r"\text{ even}"), (r"x\text{odd}", r"x\text{even}"),
    (r"2\frac{x}{3}", r"2+\frac{x}{3}"), (r"x^2\frac13", r"x^2+\frac13"), ("10^{-10}", "10^{-11}"), (r"\sin 2x", r"x\sin 2"),
    ("a", "A"), ("|x|", "x"), ("|x-y|", "x-y"), ("|xy|", "xy"), ("|x+y|", "|x|+|y|"),
    (r"\frac{1}{0}", "1"), ("9^{9^{9^9}}", "3"), ("(" * 300, "3"), ("", ""), ("1,2,2", "1,1,2"), ("x<3", "x>3"), ("12", "1,2"),
]  # fmt: skip


@pytest.mark.parametrize("pair", SAME)
def test_answers_that_say_the_same_are_equal(pair):
    assert equal(*pair) and equal(*reversed(pair))


@pytest.mark.parametrize("pair", DIFFERENT)
def test_answers_that_differ_are_not(pair):
    assert not equal(*pair) and not equal(*reversed(pair))


@given(st.text(alphabet="0123456789abx+-*/^(){}[]\\,. =<|!frac", max_size=40), st.text(max_size=20))
def test_nothing_that_a_model_writes_breaks_the_comparison(a, b):
    assert equal(a, b) == equal(b, a)
    integer(a), boxed(a)


@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50))
def test_fractions_are_equal_exactly_where_their_values_are(a, b):
    text = f"-\\frac{{{-a.numerator}}}{{{a.denominator}}}"
    assert equal(text, f"{b.numerator}/{b.denominator}") == (a == b)


@given(st.lists(st.sampled_from(["\\boxed{", "\\fbox {", "{", "}", "1", "x"])).map("".join))
def test_a_box_ends_with_the_brace_that_is_its_own(text):
    wanted = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if not depth:
                wanted = text[match.end() : end]
                break
    assert boxed(text) == wanted


@pytest.mark.parametrize(
    "judged",
    [
        lambda: boxed("\\boxed{" * 20_000),
        lambda: exact_answer("\n" * 200_000),
        lambda: exact_answer("Exact Answer:" + "\n" * 200_000),
        lambda: chosen_letter("\n" * 200_000),
        lambda: chosen_letter("Answer:" + "* " * 100_000),
        lambda: equal(r"\binom{900000000}{450000000}", "3"),
        *(
            lambda text=text, kind=kind: KINDS[kind].holds(text * 100_000, {"num_bullets": 1, "num_placeholders": 1})
            for text in "\n[<"
            for kind in (
                "detectable_format:number_bullet_lists",
                "detectable_content:number_placeholders",
                "detectable_format:title",
            )
        ),
    ],
)
def test_no_answer_keeps_a_judge_busy(judged):
    start = time.process_time()
    assert not judged()
    assert time.process_time() - start < 2


def test_letters_are_those_of_the_choices():
    assert chosen_letter("Answer: I cannot say, but the answer is B", "ABCD") == "B"
    assert chosen_letter("Answer: I", "ABCD") is None and chosen_letter("Answer: I") == "I"
    forms = (
        r"\boxed{\text{C}}",
        r"Answer: $\boxed{\mathrm{C}}$",
        r"Answer: \textbf{C}",
        "Answer: `C`",
        r"Answer: \(C\)",
        "answer: c",
    )
    others = ("**Answer:** C", "Answer:\nC", "C.", "(C)", "The answer is C because it is.", "Answer C")
    assert {chosen_letter(form) for form in (*forms, *others)} == {"C"}
    assert chosen_letter("Answer: C\n\nThat is the answer I would give.") == "C"
    words = ("Answer: I'm not sure", "Answer: A lot of them", "the answer I would give", "The answer is a guess")
    assert {chosen_letter(form) for form in words} == {None}
    assert chosen_letter("So it is.\nAnswer: [B]", "ABCD") == "B" == chosen_letter("答\nAnswer：B", "ABCD")


def test_an_exact_answer_may_stand_on_the_line_below():
    assert exact_answer("### Exact Answer:\n\nParis\n") == exact_answer("Exact Answer:\nParis") == "Paris"


@pytest.mark.parametrize(("text", "found"), [("[]", 0), ('[{"0": {"answer": 1}}, {}]', 2)])
def test_answers_in_a_file_of_their_own_are_one_object(tmp_path, text, found):
    (tmp_path / "test_en.json").write_text('[{"id": 0, "question": "What?", "options": ["a", "b"]}]')
    (tmp_path / "test_answers_en.json").write_text(text)
    with pytest.raises(RecordError, match=f"test_answers_en.json: found {found} records; wanted one object"):
        load("safety_bench", tmp_path)
    (tmp_path / "tasks.py").write_text("")
    with pytest.raises(RecordError, match="tasks.py: found no folder; wanted tau_bench/envs"):
        load("tau_bench", tmp_path / "tasks.py")


# ---- programs and shells


def test_a_program_stands_in_the_last_block_whatever_blocks_of_other_languages_are_there():
    assert code_of("```text\n1 2\n```\nSo:\n```python\nprint(1)\n```") == "print(1)\n"
    assert code_of("```Python\nprint(1)\n```") == "print(1)\n" == code_of("```\nprint(1)\n```")
    assert code_of("```python\ndef f(): pass\n```\nRun:\n```bash\npython x.py\n```", "def f") == "def f(): pass\n"


def test_outputs_are_compared_line_by_line_and_numbers_as_decimals():
    for found, wanted in (("1 2 \n3\n", "1 2\n3"), ("1.0 2", "1 2.00"), ("1e2", "100"), ("a\u2028b", "a\u2028b")):
        assert same_output(found, wanted)
    for found, wanted in (
        ("1\n2", "1 2"), ("1.1", "1.2"), ("2", "3"), ("0.3333333333", "0.33333333"), ("a  b", "a b"), ("a 1", "a 1.0"),
        ("a\u2028b", "a\nb"), ("nan", "1"), ("9007199254740993", "9007199254740992"),
    ):  # fmt: skip
        assert not same_output(found, wanted)


def test_a_method_may_give_any_value_that_python_calls_equal():
    tests = json.dumps([{"input": str(n), "output": f"{n}.0", "testtype": "functional"} for n in (1, 2)])
    record = {"public_test_cases": tests, "metadata": '{"func_name": "same"}', "question_content": "q", "question_id": "1"}
    question = live_code_bench(Record("here", record))
    answer = "class Solution:\n    def same(self, x: int) -> int:\n        return {}"
    assert question.verify(reply(answer.format("x"))).reward == 1 and question.verify(reply(answer.format("1"))).reward == 0


@pytest.mark.parametrize(
    "answer",
    [
        "class Solution:\n    def same(self, x):\n        return pow(x, 1, 7)",  # the built-in, not that of math
        "class Solution:\n    def same(self, x):\n        return [0, 1, 2][bisect.bisect_left([0, 1, 2], x)]",
        "class Solution:\n    def same(self, x, n=20_000):\n        return self.same(x, n - 1) if n else deepcopy(x)",
        "class Solution:\n    def same(self, x):\n        return json.loads(StringIO(str(x)).read()) + int(mean([0]))",
        "def same(x):\n    return x",
    ],
)
def test_answers_find_what_the_published_harness_has_imported(answer):
    tests = json.dumps([{"input": str(n), "output": str(n), "testtype": "functional"} for n in (1, 2)])
    record = {"public_test_cases": tests, "metadata": '{"func_name": "same"}', "question_content": "q", "question_id": "1"}
    shown = f"```python\n{answer}\n```\nSo:\n```\n>>> same(1)\n1\n```"
    verdict = live_code_bench(Record("here", record)).verify(reply(shown))
    assert verdict.reward == 1, verdict.reasons


@pytest.mark.parametrize("kind", ["stdin", "functional"])
def test_a_right_output_may_be_long(kind):
    numbers = list(range(100_000))
    output = json.dumps(numbers) if kind == "functional" else "\n".join(map(str, numbers))
    tests = json.dumps([{"input": "100000", "output": output, "testtype": kind}])
    record = {"public_test_cases": tests, "metadata": '{"func_name": "up"}', "question_content": "q", "question_id": "1"}
    program = "def up(n):\n    return list(range(n))\n" + ("print(*up(int(input())), sep='\\n')\n" if kind == "stdin" else "")
    verdict = live_code_bench(Record("here", record)).verify(reply(f"```python\n{program}```"))
    assert verdict.reward == 1, verdict.reasons


def test_private_tests_are_no_way_in(tmp_path):
    import base64
    import pickle
    import zlib

    class Evil:
        def __reduce__(self):
            return (print, ("loaded",))

    value = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    (tmp_path / "a.jsonl").write_text(json.dumps({"public_test_cases": "[]", "private_test_cases": value}))
    with pytest.raises(RecordError, match=r"wanted a plain text, found builtins.print"):
        load("live_code_bench", tmp_path / "a.jsonl")


def test_real_scicode_says_what_it_needs(published):
    question = questions(published, "scicode")["10"]
    with pytest.raises(Unscorable, match="need numpy, scipy, the right values of test_data.h5"):
        question.verify(reply("```python\ndef alpha(v): return 1\n```"))


def test_half_of_scicodes_steps_are_half_the_reward(published):
    question = questions(published, "scicode")["1"]
    first, step, _ = question.gold
    assert question.verify([first, step, *reply("```python\ndef norm(v):\n    return 0\n```")]).reward == 0.5
    assert question.verify([first]).reward == 0.5
    episode = question.start()
    assert "norm of a vector" in episode.step(first)[0]["content"] and episode.step(first) == [] and episode.done


@pytest.mark.parametrize("name", ["swe_bench", "terminal_bench"])
def test_a_shell_keeps_files_between_commands_and_ends_with_the_last_word(published, name):
    question = next(iter(questions(published, name).values()))
    episode = question.start()
    episode.step(command_message("echo kept > note"))
    assert episode.step(command_message("cat note; false"))[0]["content"] == "kept\n\n[exit 1]"
    assert episode.step(reply("Done.")[0]) == [] and episode.done


def test_a_patch_that_breaks_what_passed_is_wrong(published):
    question = questions(published, "swe_bench")["toy__adder-1"]
    breaks = command_message("echo 'def add(a, b): return 5' > adder.py")
    assert "fails test_zero" in question.verify([breaks]).reasons[0]
    assert question.verify([command_message("rm -r tests; true")]).reward == 0


def test_an_answer_may_write_to_the_files_of_the_test_patch(published, tmp_path):
    answer = [command_message("sed -i 's/a - b/a + b/' adder.py; echo '# mine' | tee tests/test_new.py >> tests/test_adder.py")]
    assert questions(published, "swe_bench")["toy__adder-1"].verify(answer).reward == 1
    new = "diff --git a/tests/test_new.py b/tests/test_new.py\nnew file mode 100644\n--- /dev/null\n+++ b/tests/test_new.py\n"
    record = {**SWE, "test_patch": SWE["test_patch"] + new + "@@ -0,0 +1,2 @@\n+def test_nothing():\n+    pass\n"}
    shutil.copytree(published / "swe_bench", tmp_path / "swe_bench")
    (tmp_path / "swe_bench" / "instances.jsonl").write_text(json.dumps(record))
    assert questions(tmp_path, "swe_bench")["toy__adder-1"].verify(answer).reward == 1


def test_what_needs_an_image_says_which(published, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(SWE))  # without a checkout beside it
    (question,) = load("swe_bench", tmp_path / "a.jsonl")
    with pytest.raises(Unscorable, match="image swebench/sweb.eval.x86_64.toy_1776_adder-1"):
        question.verify(question.gold)
    assert TERMINAL["docker/task.yaml"]
    with pytest.raises(Unscorable, match="docker with the task's Dockerfile"):
        questions(published, "terminal_bench")["docker"].verify(reply("Done."))


def test_terminal_bench_wants_the_files_of_a_task(tmp_path):
    (tmp_path / "task.yaml").write_text("instruction: [1]\n")
    with pytest.raises(RecordError, match=r"task.yaml: instruction is missing; wanted a text"):
        load("terminal_bench", tmp_path)
    (tmp_path / "task.yaml").write_text("instruction: Do.\n")
    with pytest.raises(RecordError, match="found no solution.sh"):
        load("terminal_bench", tmp_path)


@pytest.mark.parametrize("other", ["solution.yaml", "tests/run.sh"])
def test_a_task_of_keys_or_of_other_tests_than_pytests_is_read_but_not_judged(tmp_path, other):
    texts = {"task.yaml": "instruction: Do.\n", "solution.sh": "touch done\n", "tests/test_it.py": "def test_it():\n    pass\n"}
    del texts["solution.sh" if other == "solution.yaml" else "tests/test_it.py"]
    for path, text in {**texts, other: "- command: vim\n"}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (question,) = load("terminal_bench", tmp_path)
    with pytest.raises(Unscorable, match="docker with the task's Dockerfile"):
        question.verify(reply("Done."))


# ---- calls


def test_calls_are_right_in_any_order_with_any_of_the_values(published):
    found = questions(published, "bfcl")
    question, area = found["parallel_0"], "geometry_area"

    def called(*arguments):
        calls = [call_message(area, own)["tool_calls"][0] for own in arguments]
        return question.verify([{"role": "assistant", "content": "", "tool_calls": calls}]).reward

    one = {"base": 10.0, "height": 5, "unit": "UNITS", "tags": ["A-b"]}
    other = {"base": 1.5, "height": 2, "unit": "square  meters"}
    assert called(other, one) == 1 and called({"base": 10, "height": 5}, other) == 1
    assert called(one) == 0 and called(one, one) == 0 and called(one, other, one) == 0
    assert called(one, {"base": 1.5, "height": 2}) == 0  # unit may not be left out here
    assert called(one, {**other, "height": 2.0}) == 0  # no whole number
    assert called(one, {**other, "depth": 1}) == 0
    text = {"function": {"name": area, "arguments": json.dumps(one)}}
    simple = found["simple_0"]
    assert simple.verify([{"role": "assistant", "tool_calls": [text]}]).reward == 1
    assert simple.verify([{"role": "assistant", "tool_calls": [{"function": {"name": area, "arguments": "{"}}]}]).reward == 0
    assert simple.tools[0]["function"]["parameters"]["properties"]["base"]["type"] == "number"


def test_values_have_the_types_of_the_published_checker():
    kinds = {"sizes": {"type": "array", "items": {"type": "float"}}, "tags": {"type": "array", "items": {"type": "string"}},
             "until": {"type": "string"}, "limit": {"type": "integer"}}  # fmt: skip
    function = {"name": "f", "parameters": {"type": "dict", "properties": kinds, "required": ["sizes", "limit"]}}
    truth = [{"f": {"sizes": [[1.0, 2.5]], "tags": ["", ["a"]], "until": ["", None], "limit": ["", 5]}}]
    question = bfcl(Record("here", {"id": "simple_0", "question": ASKED, "function": [function], "ground_truth": truth}))
    right = {"sizes": [1.0, 2.5], "limit": 5}  # which the schema requires
    assert question.gold == [call_message("f", right)]
    for own, reward in (
        ({}, 1), ({"tags": ["A"]}, 1), ({"tags": []}, 1), ({"until": None}, 1), ({"until": ""}, 1),
        ({"sizes": [1, 2.5]}, 0), ({"tags": ["b"]}, 0), ({"until": " "}, 0), ({"limit": 5.0}, 0),
    ):  # fmt: skip
        assert question.verify([call_message("f", {**right, **own})]).reward == reward, own


def test_irrelevance_is_not_to_call(published):
    question = questions(published, "bfcl")["live_irrelevance_0-0-0"]
    assert question.verify(reply("I cannot.")).reward == 1
    assert question.verify([call_message("geometry_area", {"base": 1, "height": 2})]).reward == 0


def test_several_turns_need_the_benchmarks_programs(published):
    with pytest.raises(Unscorable, match="category multi_turn_base one needs the simulated programs of bfcl_eval"):
        questions(published, "bfcl")["multi_turn_base_0"].verify(reply("x"))


def test_a_turn_that_only_brings_a_function_is_empty():
    question = bfcl(Record("here", {"id": "multi_turn_miss_func_0", "question": [*ASKED, [], *ASKED]}))
    with pytest.raises(Unscorable, match="category multi_turn_miss_func"):
        question.verify(reply("x"))
    with pytest.raises(RecordError, match="wanted a list of turns"):
        bfcl(Record("here", {"id": "multi_turn_miss_func_0", "question": [[], *ASKED]}))


def test_values_of_objects_may_stand_without_a_list():
    place = {"name": "f", "parameters": {"type": "dict", "properties": {"at": {"type": "dict"}}, "required": ["at"]}}
    truth = [{"f": {"at": [{"city": "Paris", "days": [2, 3], "note": [""]}]}}]
    question = bfcl(Record("here", {"id": "simple_0", "question": ASKED, "function": [place], "ground_truth": truth}))
    assert question.gold == [call_message("f", {"at": {"city": "Paris", "days": 2}})]
    assert question.verify(question.gold).reward == 1


def test_a_call_is_no_copy_of_an_empty_message():
    question = bfcl(Record("here", {**BFCL["BFCL_v3_simple.json"][0], "ground_truth": [RIGHT_CALL]}))
    question = replace(question, messages=[{"role": "system", "content": ""}, *question.messages])
    assert question.verify(question.gold).reward == 1


def test_what_a_category_needs_is_said_of_that_category():
    for id in ("javascript_0", "simple_javascript_0"):
        question = bfcl(Record("here", {"id": id, "question": ASKED, "function": [AREA]}))
        with pytest.raises(Unscorable, match="values in the syntax of JavaScript"):
            question.verify(reply("x"))


def test_where_nothing_can_be_called_nothing_is():
    question = bfcl(Record("here", {"id": "live_irrelevance_1-0-0", "question": ASKED, "function": []}))
    assert question.tools == [] and question.verify(question.gold).reward == 1
    with pytest.raises(RecordError, match="function is ..; wanted descriptions of functions"):
        bfcl(Record("here", {"id": "simple_0", "question": ASKED, "function": []}))


def test_objects_have_a_list_of_values_for_each_key():
    option = {"city": ["Paris", "paris, FR"], "days": [3, ""]}
    assert same({"city": "PARIS"}, option) and same({"city": "Paris FR", "days": 3}, option)
    assert not same({"days": 3}, option) and not same({"city": "Paris", "x": 1}, option) and not same({"city": 3}, option)
    assert same([{"city": "paris"}], [option]) and not same([], [option]) and not same(True, 1)


# ---- instructions


KEPT = {
    "keywords:existence": ({"keywords": ["sun", "moon"]}, "The Sun and the moon.", "The sun."),
    "keywords:frequency": ({"keyword": "sun", "frequency": 2, "relation": "at least"}, "sun, Sun", "sun"),
    "keywords:forbidden_words": ({"forbidden_words": ["sun"]}, "A Sunday.", "The sun."),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "Zoo", "zigzag"),
    "language:response_language": ({"language": "de"}, "Das ist ein ganz gewöhnlicher deutscher Satz.",
                                   "This is quite an ordinary English sentence."),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, "One. Two!", "One, 2.5 and two."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n***\nb\n***\nc"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "two words", "three words here"),
    "length_constraints:nth_paragraph_first_word": ({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
                                                    'a\n\n"so, b', "so\n\na"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b]", "[a] and b"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "x\nP.P.S. y", "x\nP.S. y"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "*\n- b", "* a\n**b**"),
    "detectable_format:constrained_response": ({}, "So: My answer is maybe.", "maybe"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and ** **"),
    "detectable_format:multiple_sections": ({"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1 a SECTION 2 b",
                                            "SECTION 1 a"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<joy>>\nx", "<< >>"),
    "combination:two_responses": ({}, "a\n******\nb", "a\n******\na"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
    "startend:end_checker": ({"end_phrase": "That is all."}, 'x "that is all."', "That is all. x"),
    "startend:quotation": ({}, '"all\nof it"', '"all" of it'),
    "change_case:capital_word_frequency": ({"capital_frequency": 2, "capital_relation": "at least"}, "WELL-DONE ALL", "A"),
    "change_case:english_capital": ({}, "THIS IS ALL OF THE ANSWER", "THIS is all of the answer"),
    "change_case:english_lowercase": ({}, "this is all of the answer", "This is all of the answer"),
    "punctuation:no_comma": ({}, "none here", "one, here"),
}  # fmt: skip


@given(st.text("[]<> \na*-", max_size=30))
def test_linear_checks_are_those_of_the_published_patterns(text):
    count = len(re.findall(r"\[.*?\]", text))
    held = {n: KINDS["detectable_content:number_placeholders"].holds(text, {"num_placeholders": n}) for n in (count, count + 1)}
    assert held == {count: True, count + 1: False}
    titles = re.findall(r"<<[^\n]+>>", text)
    wanted = any(title.lstrip("<").rstrip(">").strip() for title in titles)
    assert KINDS["detectable_format:title"].holds(text, {}) == wanted
    bullets = sum(len(re.findall(line, text, re.MULTILINE)) for line in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    assert KINDS["detectable_format:number_bullet_lists"].holds(text, {"num_bullets": bullets})


@pytest.mark.parametrize(
    ("kind", "text", "count"),  # as nltk's tokenizers count them
    [
        ("change_case:capital_word_frequency", "I CAN'T GO: IT'S THE U.S. ARMY", 9),
        ("change_case:capital_word_frequency", "I CANNOT READ AND/OR B-52 (**C**) x 1,000", 7),
        ("length_constraints:number_sentences", "Dr. Lee came. J. K. Rowling left! (Really?) **So.** Yes", 5),
    ],
)
def test_words_and_sentences_are_counted_as_published(kind, text, count):
    limit, relation = [key for key in KINDS[kind].keys]
    held = [KINDS[kind].holds(text, {limit: number, relation: "at least"}) for number in (count, count + 1)]
    assert held == [True, False]


def test_only_one_kind_of_quote_is_taken_off_the_first_word_after_the_other():
    first = KINDS["length_constraints:nth_paragraph_first_word"].holds
    arguments = {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "so"}
    assert first("'\"so b", arguments) and not first("\"'so b", arguments)


def test_every_kind_of_instruction_has_an_example():
    assert KEPT.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KEPT)
def test_an_instruction_is_kept_by_one_text_and_broken_by_the_other(kind):
    arguments, kept, broken = KEPT[kind]
    record = {"key": 1, "prompt": "Do it.", "instruction_id_list": [kind], "kwargs": [arguments], "response": kept}
    from minglm.evals.benchmarks.instructions import ifeval

    question = ifeval(Record("here", record))
    assert question.verify(question.gold).reward == 1
    assert question.verify(reply(broken)).reward == 0
    assert kind in question.verify(reply(broken)).reasons[0]


# ---- what a model judges, and the customer that it plays


class Scripted(Endpoint):
    """An endpoint whose answers are written here; the wire has tests of its own."""

    def __init__(self, *answers: str):
        self.answers, self.heard = list(answers), []

    def ask(self, messages, *arguments, **options):
        self.heard.append(list(messages))
        return Written({"role": "assistant", "content": self.answers.pop(0)}, 1, False)


def test_a_model_judges_what_is_not_the_same_to_the_letter(published):
    with pytest.raises(Unscorable, match="--grader-url and --grader-name"):
        questions(published, "hle")["h2"].verify(reply("Exact Answer: Nile"))
    grader = Scripted("It is that river.\nSame: yes", "Same: no", "Same: yes\nSame: no")
    question = questions(published, "hle", grader)["h2"]
    assert question.verify(reply("Exact Answer: the nile.")).reward == 1 and not grader.heard
    assert question.verify(reply("Exact Answer: Nile")).reward == 1
    assert question.verify(reply("Exact Answer: Congo")).reward == 0
    assert "The Nile" in grader.heard[0][1]["content"] and "Congo" in grader.heard[1][1]["content"]
    with pytest.raises(Unscorable, match="the grader said no single yes or no"):
        question.verify(reply("Exact Answer: Same: yes"))
    choice = questions(published, "hle", Scripted("Same: yes"))["h1"]
    assert choice.verify(reply("Exact Answer: B. y")).reward == 1  # no bare letter: for the model to judge


def test_pictures_are_left_out(published):
    assert questions(published, "hle").keys() == {"h1", "h2"}


@given(st.text(min_size=1), st.text(min_size=1))
def test_encryption_is_undone_by_its_canary(text, canary):
    from minglm.evals.benchmarks.graded import decrypted

    assert decrypted(Record("here", {"problem": encrypted(text, canary)}), "problem", canary) == text or not text.strip()
    assert keystream(canary, 70)[:32] == keystream(canary, 70)[32:64]


def test_a_customer_is_served(published):
    customer = Scripted("Cancel order #1. What was it?", "###STOP###")
    question = questions(published, "tau_bench", customer)["retail-0"]
    episode, said = question.start(), reply("Hello, who are you?")[0]
    assert episode.step(said) == [{"role": "user", "content": "Cancel order #1. What was it?"}]
    call = question.gold[0]
    assert episode.step(call) == [{"role": "tool", "content": "cancelled"}]
    last = reply("It was 1,234 dollars.")[0]
    assert episode.step(last) == [] and episode.done
    assert "You are Ann" in customer.heard[0][0]["content"]
    assert question.verify([said, call, last]).reward == 1
    assert question.verify([said, call]).reasons == ("did not say 1234",)
    beside_a_call = [{**call, "content": "It was 1234."}, reply("It was 12")[0], reply("34 dollars.")[0]]
    assert question.verify(beside_a_call).reasons == ("did not say 1234",)  # the customer heard it in no one message
    other = {"function": {"name": "cancel", "arguments": {"order_id": "#2"}}}
    wrong = question.verify([{"role": "assistant", "tool_calls": [call["tool_calls"][0], other]}, last])
    assert wrong.reasons == ("left the data in another state",)
    assert question.verify([said, call, last, {"role": "user", "content": "And #2?"}]).reasons == ("was not over",)
    handed = [last, call_message("transfer_to_human_agents", {}), {"role": "tool", "content": "Transfer successful"}]
    assert question.verify([call, *handed]).reward == 1
    unknown = {"function": {"name": "refund", "arguments": {}}}
    assert question.start().step({"tool_calls": [unknown]})[0]["content"] == "Unknown action refund"
    with pytest.raises(Unscorable, match="played by a model"):
        questions(published, "tau_bench")["retail-0"].start().step(said)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("retail/tasks_test.py", "TASKS = [Task(instruction=make(), actions=[])]", r"tasks_test.py:1: .*; wanted instruction"),
        ("retail/tasks_test.py", "TASKS = (", "this is no Python"),
        ("retail/tasks_test.py", "TASKS = []", r"found no Task\(...\)"),
        ("retail/tools/cancel.py", "import no_such_package", "the tools do not run in the sandbox"),
    ],
)
def test_a_shop_that_is_not_as_published_is_refused(tmp_path, path, text, complaint):
    folder = write_published(tmp_path) / "tau_bench"
    (folder / path).write_text(text)
    with pytest.raises(EvaluationError, match=complaint):
        load("tau_bench", folder)


def test_titles_and_needs_are_said():
    assert len(BENCHMARKS) == 15 and all(one.title and one.data and one.judged for one in BENCHMARKS.values())


def test_a_record_ends_at_its_newline_alone(tmp_path):
    written = {"question": "a\u2028b\x85c"}
    (tmp_path / "some.jsonl").write_text(json.dumps(written, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [one.values for one in records(tmp_path / "some.jsonl")] == [written]
