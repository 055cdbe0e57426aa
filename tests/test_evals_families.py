"""Task families and needles: solved by a model that has learnt them by heart, at chance for a fresh one."""

import math
import re

import numpy as np
import pytest
from memorised import fresh, learn, tokenizer_of

from minglm.chat import render_tokens
from minglm.engine.engine import Engine
from minglm.evals.attempts import Attempt, BaseForm, ChatForm, EngineWriter, attempt
from minglm.evals.families import by_group, exam, graded, judged, raised, rewards, shots_of
from minglm.evals.measure import EvaluationError, scored, summed
from minglm.evals.needle import DEPTHS, needle_grid, plot_grids, shortest_length
from minglm.evals.scoring import Scored, Scorer
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.agents import repository
from minglm.tasks.code import answer
from minglm.tasks.general.passages import LONGEST_FILLER
from minglm.tasks.sandbox import SandboxError
from minglm.tasks.task import HELD_OUT, TRAIN, split_of
from minglm.tasks.text import answer_text, document, prompt_text

ASKED = {name: exam(FAMILIES[name], count, levels=1) for name, count in {"arithmetic": 3, "shop_counter": 2}.items()}
PROBLEMS = [problem for asked in ASKED.values() for problem in asked]
TOKENIZER = tokenizer_of(tuple(document(problem, thinking) for problem in PROBLEMS for thinking in (False, True)), 700)


@pytest.fixture(scope="module")
def solver():
    """Knows the answers to PROBLEMS, in plain text without examples, with and without thinking."""
    texts, given = [], []
    for problem in PROBLEMS:
        for thinking in (False, True):
            before = BaseForm(TOKENIZER, (), thinking).text(problem, (), 0)
            given.append(len(TOKENIZER.encode(before)))
            texts.append(TOKENIZER.encode(prompt_text(problem) + answer_text(problem, thinking)))
            assert texts[-1][: given[-1]] == TOKENIZER.encode(before)
    return learn(fresh(TOKENIZER, positions=1024), texts, given)


def tries(model, form, problems):
    writer = EngineWriter(Engine(model, TOKENIZER), form)
    return attempt(writer, [Attempt(problem) for problem in problems], about="test", progress=False)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", ASKED)
def test_problems_learnt_by_heart_are_solved_turn_by_turn(solver, family, thinking):
    found = tries(solver, BaseForm(TOKENIZER, (), thinking), ASKED[family])
    assert [one.verdict.reward for one in found] == [1.0] * len(ASKED[family]), [one.verdict for one in found]
    measure = judged(family, "reward", found)
    assert measure.estimate.value == 1.0 and measure.left_out == 0
    assert measure.chance == pytest.approx(np.mean([problem.chance for problem in ASKED[family]]))
    if thinking and family == "arithmetic":
        assert all(one.response[0]["reasoning_content"] for one in found)
    if family == "shop_counter":
        assert any(message["role"] == "tool" for one in found for message in one.response)


def test_a_fresh_model_solves_nothing():
    for thinking in (False, True):
        found = tries(fresh(TOKENIZER, positions=1024), BaseForm(TOKENIZER, (), thinking), PROBLEMS)
        assert [one.verdict.reward for one in found] == [0.0] * len(PROBLEMS)
        assert not any(one.too_long for one in found) and all(one.response for one in found)


def test_what_does_not_fit_is_left_out_and_counted():
    model = fresh(TOKENIZER, positions=60)
    found = tries(model, BaseForm(TOKENIZER, (), False), PROBLEMS)
    assert [one.too_long for one in found] == [False] * 3 + [True] * 2
    measure = judged("both", "reward", found)
    assert (measure.estimate.count, measure.left_out) == (3, 2)
    nothing = judged("shop_counter", "reward", found[3:])
    assert (nothing.estimate.value, nothing.estimate.count, nothing.left_out) == (0.0, 2, 2)


@pytest.mark.parametrize("thinking", [False, True])
def test_conversations_learnt_by_heart_are_solved_in_the_chat_form(thinking):
    asked = ASKED["arithmetic"]
    rendered = [
        render_tokens(TOKENIZER, [*p.messages, *p.demonstrate(thinking)], None, thinking, end_of_turn=True) for p in asked
    ]
    form = ChatForm(TOKENIZER, thinking)
    model = learn(fresh(TOKENIZER), [one.ids for one in rendered], [len(form.prompt(p, (), 0)) for p in asked])
    found = tries(model, form, asked)
    assert [one.verdict.reward for one in found] == [1.0] * len(asked), [one.response for one in found]
    assert all(bool(one.response[0]["reasoning_content"]) == thinking for one in found)


def test_shots_are_dropped_as_the_room_shrinks():
    form = BaseForm(TOKENIZER, shots_of(FAMILIES["arithmetic"]), False)
    problem = ASKED["arithmetic"][0]
    sizes = [len(TOKENIZER.encode(form.text(problem, (), shots))) for shots in range(3)]
    assert sizes == sorted(sizes) and len(form.shots) == 2
    for shots, size in enumerate(sizes):
        assert len(form.prompt(problem, (), size)) == size
        if shots:
            assert len(form.prompt(problem, (), size - 1)) == sizes[shots - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exam_is_of_different_held_out_problems_and_its_shots_are_of_the_training_split(family):
    asked = exam(FAMILIES[family], 6)
    assert 1 <= len(asked) <= 6
    assert len({problem.key for problem in asked}) == len(asked)
    assert all(split_of(problem) == HELD_OUT for problem in asked)
    assert all(split_of(problem) == TRAIN for problem in shots_of(FAMILIES[family]))
    assert [p.key for p in exam(FAMILIES[family], 6)] == [p.key for p in asked]


def test_rewards_of_every_family_and_mode_come_with_their_chance():
    names = ["arithmetic", "knights", "function_calling"]
    engine = Engine(fresh(TOKENIZER, positions=1024), TOKENIZER)
    for suite, modes in (("base", ("2 shots, at once", "2 shots, thinking")), ("chat", ("chat, at once", "chat, thinking"))):
        found = list(rewards(engine, suite, 4, families=names))
        assert [(m.name, m.quantity) for m in found] == [(name, f"reward, {mode}") for name in names for mode in modes]
        assert all(0 < m.chance < 1 and 0 <= m.estimate.low <= m.estimate.high <= 1 for m in found)


@pytest.fixture
def no_sandbox(monkeypatch):
    def refuse(*arguments, **options):
        raise SandboxError("no level can be had")

    monkeypatch.setattr("minglm.tasks.sandbox.functions.default_sandbox", refuse)
    answer._first_failure.cache_clear()  # what was judged before needs no sandbox
    repository.run_checks.cache_clear()


def test_families_that_no_sandbox_judges_are_left_out_and_named(no_sandbox, capsys):
    model = fresh(TOKENIZER, positions=1024)
    names = ["arithmetic", *GROUPS["code"], "repository"]
    found = list(rewards(Engine(model, TOKENIZER), "base", 2, families=names))
    assert {measure.name for measure in found} == {"arithmetic"}
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == names[1:]
    assert all("sandbox" in line and line.endswith("no level can be had") for line in told)


def test_likelihoods_need_a_sandbox_only_where_near_misses_are_tried_in_it(no_sandbox, capsys):
    scorer = Scorer(fresh(TOKENIZER, positions=1024), TOKENIZER)
    found = list(graded(scorer, 2, families=["fix_function", "repository"]))
    assert {measure.name for measure in found} == {"fix_function"}
    assert capsys.readouterr().out.startswith("repository: left out of the table")


def test_a_group_is_all_problems_of_its_families_together():
    of = [
        scored("families", "arithmetic", "reward", [1.0, 0.0, 0.0], 0.1),
        scored("families", "countdown", "reward", [1.0], 0.5, left_out=2),
        summed("families", "arithmetic", "nats", [4.0, 2.0], [2.0, 1.0]),
        summed("families", "countdown", "nats", [9.0], [1.0]),
        scored("families", "safety", "reward", [1.0], 0.5),
    ]
    reward, nats = by_group(of)  # `safety` is alone in its group
    assert (reward.name, reward.quantity, reward.left_out) == ("all reasoning", "reward", 2)
    assert (reward.estimate.value, reward.estimate.count, reward.chance) == (0.5, 4, pytest.approx(0.2))
    assert (nats.estimate.value, nats.estimate.count, nats.lower_is_better) == (pytest.approx(15 / 4), 3, True)


# ---- by likelihood


class Recorder(Scorer):
    """Keeps what it was asked."""

    def score(self, passages, about=""):
        self.asked = list(passages)
        return super().score(passages, about)


def test_right_answers_known_by_heart_are_likely_and_chosen_and_a_fresh_model_is_at_chance():
    names = ["arithmetic", "modular_arithmetic"]
    recorder = Recorder(fresh(TOKENIZER), TOKENIZER)
    texts, given = [], []
    for name in names:
        list(graded(recorder, 4, families=[name]))
        for passage in recorder.asked[::2]:  # the problem's own question, with its right answer first
            texts.append([*passage.prompt, *passage.continuations[0]])
            given.append(len(passage.prompt))
    found = list(graded(Scorer(learn(fresh(TOKENIZER), texts, given), TOKENIZER), 4, families=names))
    for nats, chosen in (found[:2], found[2:]):
        assert nats.estimate.value < 0.1 and chosen.estimate.value == 1.0
    scores, chances, count = [], [], 0
    for seed in range(6):
        for measure in graded(Scorer(fresh(TOKENIZER, seed), TOKENIZER), 24, families=names, seed=seed):
            if measure.lower_is_better:
                assert abs(measure.estimate.value - math.log(TOKENIZER.vocab_size)) < 1
            else:
                scores.append(measure.estimate.value)
                chances.append(measure.chance)
                count += measure.estimate.count
    assert abs(np.mean(scores) - np.mean(chances)) < 4 * math.sqrt(0.25 / count)


def test_answers_of_several_turns_are_scored_but_not_chosen():
    found = list(graded(Scorer(fresh(TOKENIZER, positions=2048), TOKENIZER), 2, families=["shop_counter", "safety"]))
    assert [(m.name, m.lower_is_better) for m in found] == [("shop_counter", True), ("safety", True), ("safety", False)]


def test_the_answer_that_its_own_question_raises_most_is_chosen():
    def of(*nats, tokens=(1, 1, 1)):
        return [Scored(np.full(n, one), np.full(n, False)) for one, n in zip(nats, tokens, strict=False)]

    assert raised(of(1.0, 0.5), of(3.0, 0.5)) == 1.0  # by likelihood alone the second would be chosen
    assert raised(of(3.0, 0.5), of(1.0, 0.5)) == 0.0
    assert raised(of(1.0, 2.0), of(2.0, 3.0)) == 1.0 and raised(of(2.0, 1.0), of(3.0, 2.0)) == 0.0  # nothing is raised
    assert raised(of(0.0, 12.0), of(5.0, 30.0)) == 1.0  # a sure answer, however much likelier a wrong one has become
    assert raised(of(6.0, 6.0, tokens=(9, 2)), of(6.0, 6.0, tokens=(9, 2))) == 0.5


# ---- needles


def test_needles_known_by_heart_are_found_and_a_fresh_model_is_at_chance(tmp_path):
    tokenizer = tokenizer_of(tuple(document(problem, False) for problem in exam(FAMILIES["long_document"], 20)), 700)
    recorder = Recorder(fresh(tokenizer), tokenizer)
    lengths, depths = (96, 128), (0.0, 0.5, 1.0)
    needle_grid(recorder, lengths, 1, depths)
    for passage, length in zip(recorder.asked, np.repeat(lengths, 3), strict=True):
        assert 0.75 * length < passage.longest <= length  # a sentence of filler is a sixth of it
        assert len({tuple(ids) for ids in passage.continuations}) == 4
    model = learn(
        fresh(tokenizer),
        [[*p.prompt, *p.continuations[0]] for p in recorder.asked],
        [len(passage.prompt) for passage in recorder.asked],
    )
    known = needle_grid(Scorer(model, tokenizer), lengths, 1, depths)
    assert known.chosen.shape == known.exact.shape == (2, 3, 1)
    assert known.chosen.all() and known.exact.all()
    assert [(m.name, m.estimate.value) for m in known.measures()][::2] == [("96 tokens", 1.0), ("128 tokens", 1.0)]
    grids = [needle_grid(Scorer(fresh(tokenizer, seed), tokenizer), lengths, 4, DEPTHS, seed) for seed in range(6)]
    assert abs(np.mean([grid.chosen for grid in grids]) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (6 * 40))
    assert not any(grid.exact.any() for grid in grids)
    plot_grids({"known": known.details(), "fresh": grids[0].details()}, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_needle_stands_at_its_depth():
    recorder = Recorder(fresh(TOKENIZER), TOKENIZER)
    needle_grid(recorder, (400,), 5, (0.0, 0.5, 1.0))
    for number, passage in enumerate(recorder.asked):
        document, _ = TOKENIZER.decode(passage.prompt).rsplit("\n Give", 1)
        answer = TOKENIZER.decode(passage.continuations[0]).strip()
        before, behind = (re.sub(r"Password: \w+ \w+\.", "", part) for part in document.split(f"Password: {answer}."))
        filler = len(before) + len(behind)
        assert len(before) / filler == pytest.approx((0.0, 0.5, 1.0)[number // 5], abs=(LONGEST_FILLER + 20) / filler)


def test_lengths_without_room_for_a_question_are_refused():
    scorer = Scorer(fresh(TOKENIZER), TOKENIZER)
    needle_grid(scorer, (shortest_length(scorer),), 1)
    with pytest.raises(EvaluationError, match="a question alone takes"):
        needle_grid(scorer, (30, 128), 1)
