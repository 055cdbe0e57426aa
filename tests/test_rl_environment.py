"""Environments that break, hang or judge by no number: the attempt has failed, for a reason that is kept; it is no 0."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass

import pytest
from test_rl_loop import base, recipe_of  # noqa: F401 (a fixture)
from test_rl_rollout import TOKENIZER, Echo, EchoEpisode, collect, policy

from minglm.engine.engine import Engine
from minglm.rl.curriculum import Curriculum
from minglm.rl.environment import AT_A_TIME, Answer, Environment, Environments, Failure, HangingEnvironments
from minglm.rl.loop import rl
from minglm.rl.practice import RLError, practise
from minglm.rl.recipe import Sampling, Tasks
from minglm.rl.rollout import Limits, Rollouts
from minglm.tasks import FAMILIES
from minglm.tasks.task import TaskError, Verdict
from minglm.train.metrics import read_metrics

AWAKE = threading.Event()  # lets those that hang end


@dataclass(frozen=True)
class Odd(Echo):
    """Does what `kind` says where it is judged."""

    kind: str = ""

    def start(self):
        if self.kind == "dead":
            raise ConnectionError("no sandbox")
        return EchoEpisode(1)

    def verify(self, response):
        if self.kind == "hangs":
            AWAKE.wait()
        if self.kind == "unparseable":
            raise TaskError("the gold answer is no number")
        return Verdict({"nan": float("nan"), "infinite": float("inf")}.get(self.kind, 1.0))


KINDS = {"hangs": "time-out", "unparseable": "TaskError", "nan": "reward", "infinite": "reward", "dead": "ConnectionError"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_wrong_is_a_failed_attempt_and_no_reward(kind):
    problems = [Odd(1, False, odd) for odd in (kind, "well", kind, "well")]
    found = [one for seed in range(4) for one in collect(problems, Limits(tokens=40, seconds=0.2), seed=seed)]
    AWAKE.set()
    AWAKE.clear()
    spoke = [one for one in found if one.end != "length"]
    failed = [one for one in spoke if one.end == "failed"]
    assert failed and len(failed) < len(spoke)
    for one in spoke:
        assert (one.verdict is None) == (one.problem.kind == kind) == (one.failure is not None)
    assert {one.failure.kind for one in failed} == {KINDS[kind]}


def test_what_an_environment_says_too_late_is_not_heard():
    environments, woke, stays = Environments(0.1), threading.Event(), threading.Event()

    def late():
        woke.wait()
        return Answer([{"role": "user", "content": "too late"}], True, Verdict(1.0))

    (answer,) = environments.ask([late])
    assert answer == Failure("time-out", "no answer within 0.1 s") and len(environments.hanging) == 1
    woke.set()
    environments.hanging[0].result()
    assert environments.ask([lambda: Answer([], True, Verdict(0.5))])[0].verdict.reward == 0.5
    assert environments.ask([lambda: stays.wait()])[0].kind == "time-out" and len(environments.hanging) == 1
    stays.set()


def test_answers_come_in_order_however_many_there_are():
    def question(number):
        return lambda: Answer([], True, Verdict(time.sleep((number * 7 % 5) / 1000) or number))

    answers = Environments(10).ask([question(number) for number in range(2 * AT_A_TIME + 3)])
    assert [answer.verdict.reward for answer in answers] == list(range(2 * AT_A_TIME + 3))


def test_where_all_environments_hang_the_run_says_so():
    environments, woke = Environments(0.01), threading.Event()
    with pytest.raises(HangingEnvironments, match="have not answered within 0.01 s each and still run"):
        environments.ask([lambda: woke.wait() and None] * (2 * AT_A_TIME))
    woke.set()


def test_a_reward_that_is_no_number_is_named():
    found = Environment(Odd(1, False, "nan")).answer([{"role": "assistant", "content": ""}], False)
    assert found == Failure("reward", "nan of echo is not finite")


def test_a_problem_without_room_for_an_answer_has_failed():
    (one,) = collect([Echo(1, False)], Limits(context=3))
    assert one.failure.kind == "context" and "leave no room for an answer in 3" in str(one.failure) and one.length == 0


@dataclass(frozen=True)
class Flaky(FAMILIES["arithmetic"]):
    """Half of the problems have a verifier that raises."""

    family = "flaky"

    def verify(self, response):
        if len(self.key) % 2:
            raise TaskError("the gold answer is no number")
        return super().verify(response)


def test_failures_are_counted_in_the_metrics_and_written_down_without_a_reward(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(FAMILIES, "flaky", Flaky)
    sampling = Sampling(group_size=2, groups=8, tokens=24, rounds=1, context=160, thinking="non-thinking")
    recipe = recipe_of(base, tasks=Tasks({"flaky": (1,)}), steps=3, sampling=sampling, evaluation_problems=24)
    rl(recipe, tmp_path / "run")
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    counted = Counter()
    for record in steps:
        counted.update(record["failures"])
        assert record["failed"] == sum(record["failures"].values()) and record["attempts"] + record["failed"] == 16
    lines = [json.loads(line) for path in (tmp_path / "run" / "rollouts").iterdir() for line in path.read_text().splitlines()]
    failed = [line for line in lines if line["end"] == "failed"]
    assert len(lines) == 48 and all((line["reward"] is None) == (line["end"] == "failed") for line in lines)
    assert set(counted) == {"TaskError"} and counted["TaskError"] == len(failed) > 0
    assert failed[0]["reasons"] == ["TaskError: the gold answer is no number"]


def test_where_all_attempts_fail_the_run_ends_and_says_why(base, tmp_path):  # noqa: F811
    sampling = Sampling(group_size=2, groups=2, tokens=4, context=2)
    recipe = recipe_of(base, sampling=sampling)
    with pytest.raises(RLError, match="held-out problems have failed, one of them by context: the problem's .* leave no room"):
        rl(recipe, tmp_path / "run")
    rollouts = Rollouts(Engine(policy(), TOKENIZER), TOKENIZER, Limits(context=2))
    with pytest.raises(RLError, match="step 5: all 12 attempts have failed, .* Most often: context: the problem's"):
        practise(rollouts, Curriculum(recipe.tasks, 1), sampling, 1, 5)
