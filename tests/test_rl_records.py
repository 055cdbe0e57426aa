"""What a step writes down: pass@k, and attempts with and without a verdict."""

import json

import pytest
from test_rl_rollout import TOKENIZER, Echo

from minglm.rl.environment import Failure
from minglm.rl.practice import Practice
from minglm.rl.records import forget_rollouts, passes, record_of, rollout_files, write_rollouts
from minglm.rl.rollout import Trajectory
from minglm.tasks.task import Verdict


def attempt(reward: float | None, ids: tuple[int, ...] = (5, 6, 7)) -> Trajectory:
    verdict = None if reward is None else Verdict(reward, ("why",))
    failure = Failure("time-out", "no answer within 1 s") if reward is None else None
    n = len(ids)
    end = "failed" if reward is None else "done"
    versions = [-1, *[0] * (n - 1)]
    return Trajectory(Echo(1, False), list(ids), [i > 0 for i in range(n)], [0.0] * n, versions, [], verdict, end, failure)


def test_pass_at_k_is_the_mean_over_problems_and_partial_rewards_solve_nothing():
    groups = [[attempt(reward) for reward in rewards] for rewards in ([1.0, 0.0, 0.9, 0.0], [0.5] * 4)]
    assert passes(groups) == pytest.approx({"1": 1 / 8, "2": 1 / 4, "4": 1 / 2})
    assert passes([]) == {}


def test_failed_attempts_are_counted_by_kind_and_have_no_share_in_any_mean(tmp_path):
    well = [attempt(1.0), attempt(0.5)]
    practice = Practice([well], well, [attempt(None)] * 3, [well], [(("echo", 1), 7)] * 2, 1, 0)
    record = record_of(practice)
    assert record["reward"] == 0.75 and record["attempts"] == 2 and record["length"] == 2
    assert record["failed"] == 3 and record["failures"] == {"time-out": 3} and record["pass_at"] == {"1": 0.5, "2": 1.0}
    write_rollouts([*practice.judged, *practice.failed], TOKENIZER, tmp_path / "rollouts", 7)
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-7.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [1.0, 0.5, None, None, None]
    assert lines[0]["reasons"] == ["why"] and lines[2]["reasons"] == ["time-out: no answer within 1 s"]


@pytest.mark.parametrize("separator", ["\n", "\r", "\v", "\x1c", "\x85", "\u2028"])
def test_an_attempt_is_one_line_whatever_it_writes(tmp_path, separator):
    written = f"a{separator}b"
    write_rollouts([attempt(1.0, tuple(TOKENIZER.encode(written)))], TOKENIZER, tmp_path / "rollouts", 1)
    (line,) = (tmp_path / "rollouts" / "step-1.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == written


def test_steps_that_are_undone_leave_no_attempts_and_a_kill_no_half_file(tmp_path, monkeypatch):
    for step in (2, 9, 10, 11):
        write_rollouts([attempt(1.0)], TOKENIZER, tmp_path, step)
    forget_rollouts(tmp_path, 9)
    assert [*rollout_files(tmp_path)] == [2, 9]
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)  # killed when all is written, and the file has no name yet
    with pytest.raises(ZeroDivisionError):
        write_rollouts([attempt(1.0)], TOKENIZER, tmp_path, 10)
    assert [*rollout_files(tmp_path)] == [2, 9]
