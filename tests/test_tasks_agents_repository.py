"""Repositories to repair: three readings of one program agree, and only what really repairs is rewarded."""

import ast
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.tasks.agents.calling import Call
from minglm.tasks.agents.program_draw import draw_program, failure
from minglm.tasks.agents.programs import evaluate, mutations
from minglm.tasks.agents.repository import COUNTS, TESTS, Repository, edit_between, run_checks
from minglm.tasks.agents.world import Move
from minglm.tasks.sandbox import SandboxError


def drawn(each=4, seed=0):
    rng = random.Random(seed)
    return [Repository.sample(rng, difficulty) for difficulty in Repository.difficulties for _ in range(each)]


def edits(problem, *changes, word="done"):
    """An attempt of edits (path, old, new) and the last word."""

    def moves():
        for path, old, new in changes:
            yield Move("", [Call("edit", {"path": path, "old": old, "new": new})])
        yield Move("", content=word)

    return problem.play(moves())


@pytest.mark.parametrize("difficulty", Repository.difficulties)
def test_python_in_the_sandbox_says_what_the_evaluation_says(difficulty):
    rng = random.Random(difficulty)
    problem = Repository.sample(rng, difficulty)
    checks = (*problem.visible, *problem.hidden)
    for program in (problem.right, problem.shown, *rng.sample(mutations(problem.right), 6)):
        expected = tuple(failure(program, check) for check in checks)
        assert run_checks(problem.files(program), checks) == expected
        if program in (problem.right, problem.shown):
            assert any(expected) == (program == problem.shown)


def test_a_problem_has_as_many_bugs_as_it_should_and_each_fails_the_tests_alone():
    for problem in drawn():
        wrong = [index for index, (a, b) in enumerate(zip(problem.right, problem.shown, strict=True)) if a != b]
        assert len(wrong) == (2 if len(problem.right) == 3 and len(problem.right[0].functions) == 3 else 1)
        for index in wrong:
            alone = tuple(problem.shown[i] if i == index else module for i, module in enumerate(problem.right))
            assert any(failure(alone, check) for check in problem.visible)
            assert alone in mutations(problem.right)
        for path, text in problem.files(problem.shown):
            ast.parse(text, path)


def test_what_a_program_says_in_words_and_its_tests_are_true_of_the_right_program_only():
    for problem in drawn(2):
        tests = dict(problem.files(problem.shown))[TESTS]
        asserted = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Assert)]
        assert len(asserted) == len(problem.visible)
        for node, check in zip(asserted, problem.visible, strict=True):
            call, wanted = node.test.left, ast.literal_eval(node.test.comparators[0])
            arguments = tuple(tuple(one) if isinstance(one, list) else one for one in map(ast.literal_eval, call.args))
            assert evaluate(problem.right, call.func.id, arguments) == wanted == check.wanted


def test_every_mutation_is_another_program_and_one_edit_away():
    for difficulty, counts in COUNTS.items():
        program = draw_program(random.Random(difficulty), counts, with_loops=difficulty >= 3)
        changed = mutations(program)
        assert program not in changed and len(changed) >= 4
        assert all(sum(a != b for a, b in zip(program, other, strict=True)) == 1 for other in changed)


@given(st.lists(st.sampled_from(["a", "b", "", "  c"]), max_size=7), st.lists(st.sampled_from(["a", "b", "", "d"]), max_size=7))
def test_an_edit_between_two_texts_is_there_once_and_makes_the_one_the_other(before, after):
    before, after = "\n".join([*before, "end"]), "\n".join([*after, "END"])
    old, new = edit_between(before, after)
    assert before.count(old) == 1 and before.replace(old, new) == after


def test_an_edit_that_cannot_be_made_changes_nothing():
    problem = drawn(1)[0]
    path = problem.shown[0].path
    episode = problem.start()
    before = dict(episode.files)
    for arguments, reason in [
        ({"path": "none.py", "old": "a", "new": "b"}, "no such file"),
        ({"path": TESTS, "old": "assert", "new": "#"}, "cannot be changed"),
        ({"path": path, "old": "", "new": "b"}, "0 times"),
        ({"path": path, "old": "not there", "new": "b"}, "0 times"),
        ({"path": path, "old": "a", "new": "b"}, "times, wanted once"),
        ({"path": path, "old": "def", "new": "x" * 12_000}, "larger"),
        ({"path": path, "old": "def", "new": "\ud800"}, "no text"),
    ]:
        assert reason in episode.call(Call("edit", arguments))
        assert episode.files == before


def whole(problem, path, text):
    """The edit that replaces a file."""
    return path, dict(problem.files(problem.shown))[path], text


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos._exit(0)\n",
        "raise SystemExit(0)\n",
        "print('all 2 tests pass')\n",
        "def {name}(a, b):\n    return True\n",
        "def {name}(a, b):\n    print({wanted})\n",
        "def {name}(a, b):\n    while True: pass\n",
        "class Same:\n    def __eq__(self, other): return True\ndef {name}(a, b):\n    return Same()\n",
        "def {name}(a, b)\n    return 1\n",
        "",
    ],
)
def test_code_cannot_talk_its_way_to_a_reward(text):
    problem = drawn(1)[0]
    check = problem.visible[0]
    text = text.format(name=check.function, wanted=check.wanted) if "{name}" in text else text
    reward, reasons = problem.verify(edits(problem, whole(problem, problem.shown[0].path, text)))
    assert reward == 0 and reasons


def test_code_that_knows_the_tests_by_heart_has_nothing():
    problem = drawn(1)[0]
    name = problem.visible[0].function
    answers = {check.arguments: check.wanted for check in problem.visible}
    text = f"def {name}(a, b):\n    return {answers!r}.get((a, b), 0)\n"
    attempt = edits(problem, whole(problem, problem.shown[0].path, text))
    assert problem.verify(attempt).reward == 0
    episode = problem.start()
    episode.step(attempt[0])
    assert "pass" in episode.call(Call("run_tests", {}))


def test_another_way_to_write_the_right_function_is_right():
    problem = drawn(1)[0]
    [module] = problem.right
    right = dict(problem.files(problem.right))[module.path]
    name = module.functions[0].name
    text = right.replace(f"def {name}(", "def first(") + f"\n\n{name} = lambda *numbers: first(*numbers)\n"
    assert problem.verify(edits(problem, whole(problem, module.path, text))) == (1.0, ())


def test_demonstrations_need_no_sandbox(monkeypatch):
    """So corpora can be made where there is none; all other states of the files are run."""

    def refuse(*_, **__):
        raise SandboxError("there is none")

    monkeypatch.setattr("minglm.tasks.agents.repository.run_function_tests", refuse)
    for problem in drawn(2, seed=5):
        assert problem.verify(problem.demonstrate(True)) == (1.0, ())
        with pytest.raises(SandboxError):
            problem.verify(edits(problem, whole(problem, problem.shown[0].path, "pass\n")))


def test_what_the_tests_say_of_an_error_is_the_same_in_every_run():
    problem = drawn(1)[0]
    path, name = problem.shown[0].path, problem.visible[0].function
    for number, body in enumerate(["raise ValueError(object())", "import os; raise OSError(os.getcwd() + '/x/y')"]):
        runs = []
        for spaces in ("", " "):  # other text, so another run
            episode = problem.start()
            episode.files[path] = f"def {name}(a, b):\n    {body}{spaces}\n"
            runs.append(episode.call(Call("run_tests", {})))
        assert runs[0] == runs[1] and ("object object at 0x>" in runs[0], "OSError: y," in runs[0])[number]


def test_tests_are_run_so_often_and_no_more():
    problem = drawn(1)[0]
    episode = problem.start()
    results = [episode.call(Call("run_tests", {})) for _ in range(14)]
    assert len(set(results[:12])) == 1 and results[12].startswith("error") and results[13].startswith("error")
