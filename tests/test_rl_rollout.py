"""Rollouts: what the policy sampled is what is kept, and the world speaks by the template."""

import dataclasses
import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm import ops
from minglm.chat import MODES, render_tokens
from minglm.config import GLMConfig
from minglm.engine.engine import Engine
from minglm.model import GLM
from minglm.rl.learner import Rows
from minglm.rl.recipe import Sampling
from minglm.rl.rollout import Asked, Limits, Rollouts, Trajectory
from minglm.tasks import FAMILIES
from minglm.tasks.sandbox import SandboxError
from minglm.tasks.task import Episode, Problem, Verdict, reply
from minglm.tokenizer import train_tokenizer

TEXT = ["the sum of 3 and 4 is 7\n", "call weather with the town of Paris\n", "0123456789 + - * / = ( ) [ ] { } < > think"] * 4
TOKENIZER = train_tokenizer(TEXT, 400)
CONFIG = GLMConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    max_position_embeddings=1024,
)


def policy(seed: int = 0) -> GLM:
    torch.manual_seed(seed)
    return GLM(CONFIG).eval()


@dataclass(frozen=True)
class Echo(Problem):
    """A world that answers each turn, whatever it is, until it has had enough; the reward is the number of turns, at most 1."""

    turns: int
    by_tool: bool
    family = "echo"
    stands_for = "nothing"
    difficulties = range(1, 2)

    @classmethod
    def sample(cls, rng, difficulty):
        return cls(rng.randint(1, 3), False)

    @property
    def messages(self):
        return [{"role": "user", "content": "say 3"}]

    def demonstrate(self, thinking):
        return reply("3")

    def verify(self, response):
        return Verdict(min(1.0, len(response) / 4))

    def near_miss(self, rng):
        return reply("4")

    def guess(self, rng):
        return reply("5")

    chance = 0.0

    def start(self):
        return EchoEpisode(self.turns)


class EchoEpisode(Episode):
    def __init__(self, turns):
        self.left = turns

    def step(self, message):
        self.left -= 1
        self.done = self.left == 0
        return [] if self.done else [{"role": "user", "content": f"the sum of {self.left}"}]


def collect(problems, limits, gear="torch", seed=0, model=None) -> list[Trajectory]:
    engine = Engine(model or policy(), TOKENIZER, gear=gear)
    asked = [Asked(problem, seed + number) for number, problem in enumerate(problems)]
    found = Rollouts(engine, TOKENIZER, limits).collect(asked)
    engine.check_invariants()
    return found


LAW = settings(deadline=None, derandomize=True, max_examples=15)


@LAW
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 2**32), st.sampled_from([True, False]))
def test_a_trajectory_is_the_rendered_conversation_with_the_policys_own_ids_in_place(turns, seed, thinking):
    limits = Limits(tokens=6, turns=9, thinking=thinking)
    for one in collect([Echo(n, False) for n in turns], limits, seed=seed):
        assert len(one.ids) == len(one.sampled) == len(one.log_probs) == len(one.versions)
        prompt = render_tokens(TOKENIZER, one.problem.messages, None, thinking, add_generation_prompt=True).ids
        assert one.ids[: len(prompt)] == prompt and not any(one.sampled[: len(prompt)])
        assert one.end in ("done", "length", "malformed")
        # Between two stretches of sampled ids stands what the world said, without the mark that the policy has written.
        if one.turns > 1:
            said = [message["content"] for message in one.response if message["role"] == "user"]
            text = TOKENIZER.decode([id for id, own in zip(one.ids, one.sampled, strict=True) if not own])
            assert all(content in text for content in said)
        assert all((version == 0) == own for version, own in zip(one.versions, one.sampled, strict=True))
        assert one.verdict.reward == (min(1.0, len(one.response) / 4) if one.end == "done" else 0)


def test_the_same_seed_gives_the_same_trajectories_and_another_does_not():
    problems = [Echo(2, False)] * 4
    limits = Limits(tokens=8)
    first, again, other = (collect(problems, limits, seed=seed) for seed in (0, 0, 50))
    assert [one.ids for one in first] == [one.ids for one in again] != [one.ids for one in other]
    assert len({tuple(one.ids) for one in first}) > 1  # each attempt has a seed of its own


def test_in_the_exact_gear_the_trainer_finds_the_samplers_log_probabilities_to_the_bit():
    model = policy(1)
    limits = Limits(tokens=12)
    problems = [Echo(random.Random(n).randint(1, 3), False) for n in range(7)]
    trajectories = collect(problems, limits, "exact", model=model)
    rows = Rows.of(trajectories, torch.device("cpu"))
    with ops.using("exact"), torch.no_grad():
        hidden = model.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids)[0]
        found = ops.token_log_probs(hidden[rows.sampled], model.lm_head.weight, rows.labels[rows.sampled])
    assert rows.sampled.sum() == sum(one.length for one in trajectories) > 20
    assert torch.equal(found, rows.log_probs[rows.sampled])


def test_a_turn_that_is_cut_off_has_no_reward_and_keeps_its_tokens():
    (one,) = collect([Echo(1, False)], Limits(tokens=1))
    if one.end == "length":
        assert one.verdict == Verdict(0.0, ("cut off",)) and one.length == 1
    else:
        assert one.ids[-1] in TOKENIZER.end_of_turn_ids


@pytest.mark.parametrize("error", [OSError, SandboxError])
def test_a_broken_environment_is_no_reward_of_zero(error):
    class Broken(EchoEpisode):
        def step(self, message):
            raise error("no sandbox")

    @dataclass(frozen=True)
    class Breaks(Echo):
        def start(self):
            return Broken(1)

    found = [one for seed in range(20) for one in collect([Breaks(1, False)], Limits(tokens=40), seed=seed)]
    failed = [one for one in found if one.end == "failed"]
    assert failed and all(one.verdict is None for one in failed)


@pytest.mark.parametrize("values", [{"tokens": 0}, {"turns": 0}, {"temperature": 0.0}])
def test_limits_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} = 0"):
        Limits(**values)


def test_a_malformed_call_ends_the_episode_of_a_problem_with_tools():
    family = FAMILIES["function_calling"]
    problem = family.sample(random.Random(0), 1)
    seen = set()
    for seed in range(30):
        (one,) = collect([problem], Limits(tokens=24), seed=seed)
        seen.add(one.end)
        if one.end == "malformed":
            assert one.verdict == Verdict(0.0, ("a malformed call",))
    assert seen <= {"done", "length", "malformed", "turns"}


def test_rows_put_each_label_behind_what_it_was_chosen_after():
    one = Trajectory(Echo(1, False), [5, 6, 7, 8], [False, False, True, True], [0, 0, -1.0, -2.0], [-1, -1, 0, 0])
    short = dataclasses.replace(one, ids=[5, 6], sampled=[False, True], log_probs=[0, -3.0], versions=[-1, 0])
    rows = Rows.of([one, short], torch.device("cpu"))
    assert rows.input_ids.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert rows.labels.tolist() == [[6, 7, 8], [6, -100, -100]]
    assert rows.sampled.tolist() == [[False, True, True], [True, False, False]]
    assert rows.log_probs.tolist() == [[0, -1, -2], [-3, 0, 0]]
    assert rows.document_ids.tolist() == [[0, 0, 0], [0, -1, -1]]


def test_a_thinking_that_the_prompt_opens_is_not_the_policys_and_is_read_as_its_own():
    limits = Limits(tokens=6, turns=9, opens_thinking=True)
    mark, close = TOKENIZER.special_ids["<think>"], TOKENIZER.special_ids["</think>"]
    for one in collect([Echo(2, False)] * 40, limits):
        marks = [place for place, id in enumerate(one.ids) if id == mark and not one.sampled[place]]
        opened = [place for place in marks if place - 1 not in marks]  # behind it comes the first token, perhaps the mark again
        assert len(opened) - one.turns in (0, one.end != "done")  # the last one was cut off, or could not be read
        for place in opened:  # what comes first is drawn among fewer tokens: it is the policy's, but nothing to learn from
            assert one.ids[place + 1] != close and not one.sampled[place + 1] and one.log_probs[place + 1] == 0
            assert one.versions[place] == -1 and one.versions[place + 1] == 0
            assert place + 2 == len(one.ids) or one.sampled[place + 2] or one.ids[place + 1] == mark
        served = render_tokens(TOKENIZER, one.problem.messages, add_generation_prompt=True).ids
        served += TOKENIZER.encode("\n<think>", allow_special=True)  # as it always was
        assert one.ids[: opened[0] + 1] == served
        first = TOKENIZER.special_ids["<|assistant|>"]
        assert first in one.ids
    with pytest.raises(ValueError, match="opens_thinking"):
        Limits(opens_thinking=True, thinking=False)


def test_what_decides_whether_to_think_may_be_left_out():
    """The same tokens; only what follows a `<think>` is not learnt from."""
    mark, seen = TOKENIZER.special_ids["<think>"], 0
    limits = Limits(tokens=30, turns=9, thinking=None)
    asked = [Echo(2, False)] * 60
    for plain, one in zip(collect(asked, limits), collect(asked, replace(limits, learns_to_decide=False)), strict=True):
        assert plain.ids == one.ids and plain.response == one.response
        decides = [place for place in range(1, len(one.ids)) if one.ids[place - 1] == mark and plain.sampled[place]]
        assert [n for n, (a, b) in enumerate(zip(plain.sampled, one.sampled, strict=True)) if a != b] == decides
        assert all(one.log_probs[place] == 0 for place in decides)
        assert one.versions == plain.versions and one.length == plain.length == sum(plain.sampled)
        seen += len(decides)
    assert seen > 0


@LAW
@given(st.lists(st.sampled_from(list(MODES)), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 2**32))
def test_modes_are_dealt_out_in_turn_and_every_turn_is_asked_for_in_its_problems_own(modes, first, seed):
    sampling = Sampling(thinking=tuple(modes), opens_thinking="thinking" in modes, tokens=6)
    shared = Limits.of(sampling)
    numbers = range(first, first + 5)
    asked = [Asked(Echo(3, False), seed + n, shared.in_mode_of(sampling, n)) for n in numbers]
    together = Rollouts(Engine(policy(), TOKENIZER, gear="exact"), TOKENIZER, shared).collect(asked)
    for number, one in zip(numbers, together, strict=True):
        mode = modes[number % len(modes)]
        limits = replace(shared, thinking=MODES[mode], opens_thinking=mode == "thinking")
        [alone] = collect([Echo(3, False)], limits, gear="exact", seed=seed + number)
        assert (one.ids, one.sampled, one.log_probs, one.response) == (
            alone.ids,
            alone.sampled,
            alone.log_probs,
            alone.response,
        )
