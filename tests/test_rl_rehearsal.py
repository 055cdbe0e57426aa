"""The rehearsal of the largest micro-batch: it changes nothing, it covers all that can come, and it says what to lower."""

import multiprocessing
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_run import equal
from test_rl_loop import base, learner_of  # noqa: F401 (a fixture)
from test_rl_rollout import Echo

from minglm.model import GLM
from minglm.rl.learner import PolicyLearner
from minglm.rl.objective import named
from minglm.rl.rehearsal import OutOfMemory, largest_shapes, rehearse
from minglm.rl.rollout import Trajectory
from minglm.tasks.task import Verdict


def everything(learner) -> dict:
    models = [learner.model] if learner.critic is None else [learner.model, learner.critic]
    optimizers = [learner.optimizer] if learner.critic is None else [learner.optimizer, learner.critic_optimizer]
    return {
        "models": [{name: value.clone() for name, value in model.state_dict().items()} for model in models],
        "loads": learner.model.expert_load.clone(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "gradients": [p.grad for model in models for p in model.parameters()],
        "random": torch.get_rng_state(),
        "training": learner.model.training,
    }


def some(count: int, length: int) -> list[Trajectory]:
    ids = [5 + n % 90 for n in range(length)]
    sampled, zeros, versions = [n > 3 for n in range(length)], [0.0] * length, [0 if n > 3 else -1 for n in range(length)]
    return [Trajectory(Echo(1, False), ids, sampled, zeros, versions, [], Verdict(n % 2)) for n in range(count)]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_rehearsal_changes_no_bit(base, name, trained):  # noqa: F811
    learner = learner_of(base, named(name), 100)
    if trained:
        learner.policy_step(some(4, 20), [0, 0, 1, 1])
    before = everything(learner)
    found = rehearse(learner, 30, 8)
    assert equal(before, everything(learner))
    assert found.shapes == [(3, 29), (4, 24)] and "3 x 29 tokens, 4 x 24 tokens, forward and backward in" in str(found)


@given(st.integers(2, 40), st.integers(1, 200), st.lists(st.integers(2, 40), min_size=1, max_size=12))
def test_no_micro_batch_is_larger_than_what_was_rehearsed(longest, tokens_at_once, lengths):
    """Neither in tokens, by which most memory grows, nor in pairs of tokens, by which attention's does."""
    learner = PolicyLearner.__new__(PolicyLearner)  # only its rule for micro-batches is asked
    learner.tokens_at_once = tokens_at_once
    trajectories = [trajectory for length in lengths for trajectory in some(1, min(length, longest))]
    shapes = largest_shapes(longest, tokens_at_once, len(trajectories))
    for indices in learner.micro_batches(trajectories):
        b, t = len(indices), max(len(trajectories[i].ids) for i in indices) - 1
        assert b * t <= max(rows * tokens for rows, tokens in shapes)
        assert b * t * t <= max(rows * tokens * tokens for rows, tokens in shapes)


def _starve(folder, ended) -> None:
    torch.set_num_threads(1)
    learner = learner_of(folder, named("grpo"), 1)
    rehearse(learner, 40, 1)  # what libraries take once
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
    try:
        rehearse(learner, 12_000, 1)
    except OutOfMemory as error:
        ended.send(str(error))
    ended.send("it fitted")


def test_out_of_memory_names_the_keys_to_lower(base):  # noqa: F811
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_starve, args=(base, theirs))
    process.start()
    assert ours.poll(120)
    said = ours.recv()
    process.join()
    assert said.startswith("out of memory with 1 x 11,999 tokens")
    assert all(key in said for key in ("sampling.context", "tokens_at_once", "activation_checkpointing"))


def test_other_errors_are_not_taken_for_a_lack_of_memory(base, monkeypatch):  # noqa: F811
    learner = learner_of(base, named("grpo"), 100)
    monkeypatch.setattr(GLM, "count_targets", lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        rehearse(learner, 10, 1)
