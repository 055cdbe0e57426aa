"""Reasoning: each answer by another way, each line of thought true, each form of answer as stated."""

import ast
import dataclasses
import datetime
import itertools
import operator
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.reasoning import formula as formulas
from minglm.tasks.reasoning.arithmetic import Arithmetic, added, multiplied, subtracted
from minglm.tasks.reasoning.calendar_dates import Dates
from minglm.tasks.reasoning.countdown import Countdown
from minglm.tasks.reasoning.dates import DAYS, Clock, Weekdays
from minglm.tasks.reasoning.equations import LinearEquations
from minglm.tasks.reasoning.exact import Number
from minglm.tasks.reasoning.formula import FormulaError, Operation, read, steps, value, written
from minglm.tasks.reasoning.knights import Knights, solutions
from minglm.tasks.reasoning.modular import ModularArithmetic
from minglm.tasks.reasoning.ordering import Ordering
from minglm.tasks.reasoning.science import FORMULAS, QUANTITIES, Science, solved
from minglm.tasks.reasoning.units import CHAINS, Units
from minglm.tasks.task import reply, split_of

REASONING = [FAMILIES[name] for name in GROUPS["reasoning"]]
every_family = pytest.mark.parametrize("family", REASONING, ids=GROUPS["reasoning"])
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}


def some(family, each=30, difficulties=None):
    rng = random.Random(family.family)
    return [family.sample(rng, difficulty) for difficulty in difficulties or family.difficulties for _ in range(each)]


def calculated(text):
    """A formula's value by Python's own parser."""

    def walk(node):
        if isinstance(node, ast.BinOp):
            return Fraction(OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        if isinstance(node, ast.UnaryOp):
            return -walk(node.operand)
        return Fraction(node.value)

    return walk(ast.parse(text.strip(), mode="eval").body)


# ---- all families


@every_family
def test_answers_are_read_with_blanks_and_a_full_stop_and_nothing_else(family):
    for problem in some(family, each=3):
        right = problem.demonstrate(False)[0]["content"]
        for content in (right, f" {right} ", f"{right}.", f"{right}.\n"):
            assert problem.verify(reply(content)).reward == 1, content
        for content in ("", f"The answer is {right}", f"{right} or so", f"{right}..", f"{right} {right}", f"{right}\n{right}"):
            assert problem.verify(reply(content)).reward == 0, content


@every_family
def test_a_response_is_one_message_without_calls(family):
    for problem in some(family, each=1):
        right = problem.demonstrate(False)
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        for wrong in ([], right * 2, [{**right[0], "role": "user"}], [{**right[0], "tool_calls": [call]}]):
            assert problem.verify(wrong).reward == 0


@every_family
def test_the_wording_changes_the_question_and_not_the_key(family):
    """Nor the split: the same content in other words is in the same one."""
    for problem in some(family, each=2):
        other = dataclasses.replace(problem, wording=(problem.wording + 1) % 2)
        assert other.messages != dataclasses.replace(other, wording=1 - other.wording).messages
        assert other.key == problem.key and split_of(other) == split_of(problem)


@every_family
def test_problems_with_one_key_take_the_same_answers(family):
    by_key = {}
    for problem in some(family, each=150):
        by_key.setdefault(problem.key, []).append(problem)
    for first, *others in by_key.values():
        assert all(first.verify(other.demonstrate(False)).reward == 1 for other in others)


@every_family
def test_the_right_answer_is_among_the_guesses(family):
    for problem in some(family):
        if isinstance(problem, Number):
            assert problem.value in problem.guesses
        elif not isinstance(problem, Countdown):
            assert problem.answer in problem.choices and len(set(problem.choices)) == len(problem.choices)


@every_family
def test_easy_problems_are_short(family):
    """A context of 256 tokens holds one with its solution; three characters to a token."""
    for problem in some(family, difficulties=family.difficulties[:3]):
        (question,), (response,) = problem.messages, problem.demonstrate(True)
        assert len(question["content"] + response["reasoning_content"] + response["content"]) < 256 * 3 / 2


@every_family
def test_every_calculation_in_a_solution_is_true(family):
    """Of `a = b = c`: all sides that are formulas of numbers alone have one value. Units, names and remainders aside."""
    checked = 0
    for problem in some(family):
        thinking = problem.demonstrate(True)[0]["reasoning_content"].replace("\n=", " =")
        for part in re.split(r"[\n,]| -> |: ", thinking):
            part = re.sub(r"^ ?[A-Z][a-z]+ ", "", part)  # the month that is counted
            sides = [side for side in part.split("=") if re.fullmatch(r"[-+*/() 0-9]*[0-9][-+*/() 0-9]*", side)]
            if len(sides) > 1:
                assert len({calculated(side) for side in sides}) == 1, (problem, part)
                checked += 1
    if family not in (Ordering, Knights):
        assert checked > 30


# ---- arithmetic


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_columns_end_with_the_right_number(left, right):
    for lines, result in (
        (added(left, right), left + right),
        (subtracted(left, right), left - right),
        (multiplied(left, right), left * right),
    ):
        assert re.search(r"-?\d+$", lines[-1])[0] == str(result)
        assert len(lines) <= len(str(left)) * len(str(right)) + len(str(left)) + len(str(right)) + 2


def test_the_easiest_sums_have_one_digit_numbers():
    assert all(p.operator == "+" and p.left < 10 and p.right < 10 for p in some(Arithmetic, difficulties=[1]))


# ---- formulas


def formula_trees():
    leaves = st.integers(0, 99)
    return st.recursive(leaves, lambda inner: st.builds(Operation, inner, st.sampled_from("+-*/"), inner), max_leaves=8)


@given(formula_trees())
def test_a_written_formula_has_the_value_that_python_gives_it(tree):
    try:
        expected = value(tree)
    except FormulaError:
        with pytest.raises(ZeroDivisionError):
            calculated(written(tree))
        return
    assert calculated(written(tree)) == expected == value(read(written(tree)))
    assert formulas.numbers(read(written(tree))) == formulas.numbers(tree)
    assert formulas.operators(read(written(tree))) == formulas.operators(tree)


@given(st.text(alphabet="0123456789+-*/() ", max_size=40) | st.text(max_size=300))
def test_reading_a_formula_agrees_with_python_or_raises_its_own_error(text):
    try:
        found = value(read(text))
    except FormulaError:
        return
    spaced = re.sub(r"\b0+(?=\d)", "", text)  # Python refuses leading zeros
    assert found == calculated(spaced)


@pytest.mark.parametrize("text", ["", "1 +", "(1", "1)", "1 2", "2 ** 3", "--1", "1e3", "a", "1 // 2", "(" * 150, "٣", "1\n"])
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(FormulaError):
        read(text)


@given(formula_trees())
def test_each_step_keeps_the_value(tree):
    try:
        lines = steps(tree)
    except FormulaError:
        return
    assert all(calculated(line) == value(tree) for line in lines)
    assert len(lines) == len(formulas.operators(tree))


# ---- countdown


def test_any_right_formula_is_taken():
    problem = Countdown(0, (2, 3, 7), "+-*", 13, "2 * 3 + 7")
    for right in ("2 * 3 + 7", "7 + 3 * 2", "(7+(2*3))", "7 + (3 * 2)."):
        assert problem.verify(reply(right)).reward == 1
    for wrong in ("13", "7 + 6", "2 * 3 + 7 + 0", "2 * 3 + 7 = 13", "7 + 7 - 3 + 2", "2 + 3 + 7"):
        assert problem.verify(reply(wrong)).reward == 0
    only_sums = Countdown(0, (2, 3, 7), "+-", 12, "2 + 3 + 7")
    assert "allowed" in " ".join(only_sums.verify(reply("2 * 3 + 7")).reasons)


def test_the_chance_of_countdown_is_the_share_of_chains_that_hit():
    for problem in some(Countdown, each=5, difficulties=[1, 2, 3, 4, 5, 6]):
        chains = [
            " ".join(itertools.chain(*zip(map(str, problem.numbers), (*between, ""), strict=True)))
            for between in itertools.product(problem.operators, repeat=len(problem.numbers) - 1)
        ]
        assert problem.chance == pytest.approx(sum(problem.verify(reply(chain)).reward for chain in chains) / len(chains))


# ---- equations, remainders


def test_the_answer_of_an_equation_alone_makes_both_sides_equal():
    for problem in some(LinearEquations, each=10):
        text = re.split(r"Solve |If |Find x in ", problem.question)[1]
        text = re.split(r" for x|, what|\.$", text)[0]
        text = re.sub(r"(\d)(?=[xy(])", r"\1 * ", text)

        def holds(x, y, text=text):
            sides = [
                [calculated(s.replace("x", f"({x})").replace("y", f"({y})")) for s in e.split("=")] for e in text.split("and")
            ]
            return all(left == right for left, right in sides)

        ys = range(-9, 10) if "y" in text else (0,)
        assert {x for x in problem.guesses for y in ys if holds(x, y)} == {problem.value}, problem.question


def test_remainders_and_inverses_by_counting():
    for problem in some(ModularArithmetic):
        if problem.kind == "inverse":
            assert [x for x in problem.guesses if problem.left * x % problem.modulus == 1] == [problem.value]
        else:
            of = {"number": problem.left, "sum": problem.left + problem.right, "product": problem.left * problem.right}
            total = of.get(problem.kind, problem.left**problem.right)
            assert (total - problem.value) % problem.modulus == 0 and 0 <= problem.value < problem.modulus


# ---- logic


def test_comparisons_allow_one_order_alone():
    for problem in some(Ordering, each=8, difficulties=range(1, 7)):
        told = re.findall(r"(\w+) is (?:(older|taller|faster)|\w+) than (\w+)\.", problem.question)
        pairs = [(a, b) if more else (b, a) for a, more, b in told]
        orders = [
            order
            for order in itertools.permutations(problem.choices)
            if all(order.index(more) < order.index(less) for more, less in pairs)
        ]
        assert len(orders) == 1 and orders[0][problem.rank] == problem.answer


def test_knights_and_knaves_have_one_solution():
    """Read from the question's text, over all cases."""
    for problem in some(Knights):
        text = problem.question
        said = re.findall(r'(\w+): "(\w+)(?: and (\w+))? (?:is a (\w+)|(are the same|differ))\."', text)
        known = re.search(r"lie\. (\w+) is a (\w+)\.", text)
        people = [speaker for speaker, *_ in said]
        fitting = []
        for case in itertools.product((True, False), repeat=len(people)):
            kind = dict(zip(people, case, strict=True))
            if known and kind[known[1]] != (known[2] == "knight"):
                continue
            if all(
                kind[speaker] == (kind[one] == ((kind[other] == (both != "differ")) if other else a_kind == "knight"))
                for speaker, one, other, a_kind, both in said
            ):
                fitting.append(case)
        assert fitting == [problem.truth] == solutions(problem.statements, problem.truth[0] if problem.known else None)
        assert problem.answer == ("knight" if problem.truth[problem.asked] else "knave")
        assert problem.thinking.endswith("yes")


# ---- dates, units, science


def test_weekdays_are_those_of_the_calendar():
    for problem in some(Weekdays):
        if problem.date:
            last = re.findall(r"(\d+) (\w+) (\d{4})", problem.question)[-1]
            date = datetime.datetime.strptime(" ".join(last), "%d %B %Y")
            assert problem.answer == DAYS[date.weekday()]
            assert DAYS[datetime.date(*problem.date).weekday()] in problem.question
        else:
            monday = datetime.date(2024, 1, 1)
            date = monday + datetime.timedelta(problem.first_day + problem.days)
            assert problem.answer == DAYS[date.weekday()]


def test_dates_are_those_of_the_calendar():
    for problem in some(Dates, each=100):
        count, way, start = re.search(r"(\d+) days? (before|after) (.*)\?", problem.question).groups()
        date = datetime.datetime.strptime(start, "%d %B %Y")
        date += datetime.timedelta(int(count) * (-1 if way == "before" else 1))
        assert problem.answer == f"{date.day} {date:%B}"
        month, end = re.search(r"(\w+) \d+ [+-] \d+ = (\d+)$", problem.thinking).groups()
        assert problem.answer == f"{end} {month}"


def test_times_are_those_of_the_clock():
    for problem in some(Clock):
        end = datetime.datetime(2024, 1, 1) + datetime.timedelta(minutes=problem.begin + problem.minutes)
        assert problem.answer == f"{end:%H:%M}"


def test_units_convert_there_and_back():
    in_smallest = {}
    for chain in CHAINS:
        size = 1
        for name, number in reversed(chain):
            in_smallest[name] = size
            size *= number
    for problem in some(Units):
        total = sum(amount * in_smallest[unit] for amount, unit in problem.amounts)
        assert problem.value * in_smallest[problem.unit] == total
        assert re.findall(r"\d+ (\w+)", problem.question) == [unit for _, unit in problem.amounts]


def test_science_answers_fit_every_formula_used():
    for problem in some(Science):
        known = dict(problem.given)
        assert sorted(map(int, re.findall(r"(?<![a-z])\d+", problem.question))) == sorted(known.values())
        for used, asked in problem.steps:
            assert used in FORMULAS and asked not in known and asked in QUANTITIES
            known[asked] = solved(used, asked, known)
            assert known[used.product] == known[used.one] * known[used.other]
        assert problem.value == known[asked] and problem.question.endswith(f", in {QUANTITIES[asked].unit}?")


def test_quantities_are_told_apart_by_their_words_and_units():
    """So that the question alone says which formulas to use."""
    assert len({quantity.told for quantity in QUANTITIES.values()}) == len(QUANTITIES)
    assert len({quantity.asked for quantity in QUANTITIES.values()}) == len(QUANTITIES)
    assert {quantity for formula in FORMULAS for quantity in formula} == set(QUANTITIES)
    assert len({frozenset(formula) for formula in FORMULAS}) == len(FORMULAS)
