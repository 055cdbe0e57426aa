"""The code families: words, code and meaning agree; hidden tests tell right from wrong; copied numbers do not pass."""

import json
import random
from dataclasses import replace

import pytest

from minglm.tasks.code import FAMILIES, loops, steps
from minglm.tasks.code.answer import read_code
from minglm.tasks.code.finish import FinishFile
from minglm.tasks.code.fix import FixFunction
from minglm.tasks.code.steps import INPUTS, KINDS, Step
from minglm.tasks.code.write import WriteFunction
from minglm.tasks.sandbox import Case, default_sandbox, run_function_tests
from minglm.tasks.text import document

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)


def drawn(family, each, seed=0):
    rng = random.Random(f"{family.family} {seed}")
    return [family.sample(rng, difficulty) for difficulty in family.difficulties for _ in range(each)]


def response(content):
    return [{"role": "assistant", "content": content}]


def values_of(sources: list[str], name: str = "f") -> list[list]:
    """What many functions of one name give for all inputs, in one run: a list for each; None where it raised."""
    harness = """
import json, sys
sources, inputs = json.load(sys.stdin)
found = []
for source in sources:
    space = {}
    exec(source, space)
    found.append([space["NAME"](list(xs)) for xs in inputs])
print(json.dumps(found))
""".replace("NAME", name)
    outcome = default_sandbox().run({"main.py": harness}, "main.py", stdin=json.dumps([sources, INPUTS]))
    assert outcome.passed, outcome
    return json.loads(outcome.stdout)


def test_every_kind_of_step_does_what_its_code_does():
    each = [(Step(kind, number),) for kind in KINDS for number in KINDS[kind].numbers]
    expected = [[steps.apply(one, xs) for xs in INPUTS] for one in each]
    assert values_of([steps.render("f", one) for one in each]) == expected


def test_rows_of_steps_and_their_loops_and_slips_do_what_their_code_does():
    rng = random.Random(1)
    rows = [steps.draw(rng, count, INPUTS) for count in range(1, 6) for _ in range(20)]
    expected = [[steps.apply(row, xs) for xs in INPUTS] for row in rows]
    assert values_of([steps.render("f", row) for row in rows]) == expected

    rows = [loops.draw(rng, count, INPUTS) for count in (2, 3) for _ in range(40)]
    expected = [[steps.apply(row, xs) for xs in INPUTS] for row in rows]
    assert values_of([loops.render("f", row) for row in rows]) == expected

    slipped = [(row, slip) for row in rows for slip in loops.SLIPS]
    expected = [[loops.slipped(row, slip, xs) for xs in INPUTS] for row, slip in slipped]
    assert values_of([loops.render("f", row, slip) for row, slip in slipped]) == expected


def test_every_order_has_words_of_its_own():
    said = [Step(kind, number).says for kind in KINDS for number in KINDS[kind].numbers]
    assert len(set(said)) == len(said)


def test_difficulty_is_the_number_of_steps():
    for family in (WriteFunction, FixFunction):
        for difficulty in family.difficulties:
            assert {len(family.sample(random.Random(seed), difficulty).steps) for seed in range(10)} == {difficulty}


def test_no_mistake_passes_the_hidden_tests_by_meaning():
    for problem in drawn(WriteFunction, 10):
        right = [case.expected for case in problem.cases]
        for wrong in steps.mistakes(problem.steps, INPUTS):
            assert [steps.apply(wrong, xs) for xs in INPUTS] != right


def test_the_code_that_is_shown_has_a_bug_and_the_fix_is_another_code():
    problems = drawn(FixFunction, 30)
    assert {problem.slip for problem in problems} >= set(loops.SLIPS)
    for problem in problems:
        assert problem.buggy != problem.solution and problem.buggy in problem.messages[0]["content"]
        if problem.slip:
            shown = [loops.slipped(problem.steps, problem.slip, xs) for xs in INPUTS]
        else:
            shown = [steps.apply(problem.shown, xs) for xs in INPUTS]
        assert shown != [case.expected for case in problem.cases]


def test_the_shown_code_as_it_is_does_not_pass():
    for problem in drawn(FixFunction, 2, seed=1):
        assert problem.verify(response(problem.buggy)).reward == 0


@every_family
def test_chance_is_nothing_because_no_guess_passes(family):
    assert all(problem.chance == 0 for problem in drawn(family, 20))


@every_family
def test_words_and_names_are_no_part_of_the_content_of_functions(family):
    if family is FinishFile:
        pytest.skip("there the names are the content")
    for problem in drawn(family, 2):
        other = replace(problem, wording=(problem.wording + 1) % 3, name="other")
        assert other.key == problem.key and other.messages != problem.messages


@every_family
def test_fences_and_other_right_ways_pass_and_words_around_do_not(family):
    problem = drawn(family, 1, seed=2)[1]
    code = problem.solution
    for content in (f"```python\n{code}\n```", f"Here it is:\n```\n{code}\n```\nDone.", code + "\n\n", f"# right\n{code}"):
        assert problem.verify(response(content)).reward == 1, content
    for content in (f"Here it is:\n{code}", f"```json\n{code}\n```", code.replace(f"def {problem.name}", "def q"), ""):
        verdict = problem.verify(response(content))
        assert verdict.reward == 0 and verdict.reasons, content


@every_family
def test_answers_that_attack_get_nothing(family):
    problem = drawn(family, 1, seed=3)[0]
    argument = "x" if family is FinishFile else "xs"
    for body in (
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; return sys.modules['__main__'].job['arguments'][0]",
        "import os; return os.listdir('/home')",
        "exec(open('/etc/passwd').read())",
        "return type('A', (int,), {'__eq__': lambda *_: True, '__hash__': None})(0)",
    ):
        verdict = problem.verify(response(f"def {problem.name}({argument}):\n    {body}"))
        assert verdict.reward == 0 and verdict.reasons, body


def test_a_file_is_finished_by_names_and_not_by_the_numbers_seen():
    for problem in drawn(FinishFile, 3):
        copied = f"def {problem.name}(x):\n    return {problem.copied}"
        seen = {f"{module}.py": problem.module(module, later=False) for module in problem.modules}
        cases = [Case((x,), None) for x in (3, 10)]
        told = [run_function_tests(problem.whole(code), problem.name, cases, files=seen) for code in (copied, problem.solution)]
        assert told[0] == told[1], "with the numbers shown both give the same"
        assert problem.verify(response(problem.solution)).reward == 1
        assert problem.verify(response(copied)).reward == 0


def test_a_finished_file_may_import_again():
    problem = FinishFile.sample(random.Random(4), 2)
    assert problem.verify(response(f"{problem.imports}\n\n{problem.solution}")).reward == 1


def test_what_a_request_asks_for_has_one_meaning():
    for problem in drawn(FinishFile, 30):
        names = [one.name for one in problem.definitions]
        purposes = [one.purpose for one in problem.definitions if one.purpose]
        assert len(set(names)) == len(names) and len(set(purposes)) == len(purposes)
        wanted = [problem.definitions[place] for place in problem.calls]
        text = problem.messages[0]["content"]
        assert all(one.full_name in problem.solution and (one.purpose or one.name) in problem.request for one in wanted)
        assert all(one.code() in text and one.number != one.later for one in problem.definitions)
    assert {len({problem.definitions[place].module for place in problem.calls}) for problem in drawn(FinishFile, 5)} == {1, 2}


@every_family
def test_problems_are_short_enough_for_small_contexts(family):
    """Characters, of which small tokenizers take about three a token."""
    most = {difficulty: max(len(document(p, True)) for p in ps) for difficulty, ps in by_difficulty(family).items()}
    assert most[1] < 450 and max(most.values()) < 1400, most


def by_difficulty(family):
    return {
        difficulty: [family.sample(random.Random(seed), difficulty) for seed in range(40)] for difficulty in family.difficulties
    }


def test_code_is_read_from_between_fences():
    assert read_code("def f(): pass") == "def f(): pass"
    assert read_code("a\n```py\nb\n```\nc\n```\nd\n```") == "b"
    assert read_code("```") == "" and read_code("```python\nx") == "x"
