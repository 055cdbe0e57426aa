"""The synchronous loop: what a step learns from, exact agreement with the sampler, and runs that go on to the bit."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rl_rollout import CONFIG, TOKENIZER, Echo, collect, policy

from minglm import ops
from minglm.__main__ import main
from minglm.checkpoint import load_model, save_model
from minglm.config import ConfigError, GLMConfig
from minglm.engine.engine import Engine
from minglm.evals.command import find_columns, first_length
from minglm.rl.curriculum import MANY, WINDOW, Curriculum
from minglm.rl.learner import PolicyLearner, Rows
from minglm.rl.loop import rl
from minglm.rl.objective import Objective, named
from minglm.rl.recipe import RLRecipe, Sampling, Tasks, load_rl_recipe
from minglm.rl.rollout import Asked, Limits, Rollouts
from minglm.tasks.task import Verdict
from minglm.train.device import Device, choose_device
from minglm.train.metrics import WALL_CLOCK, read_metrics
from minglm.train.recipe import Hardware, Optimizer

CONTEXT = 160  # enough for the families' problems


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    save_model(policy(), folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def recipe_of(base, **changes) -> RLRecipe:
    values = {
        "tasks": Tasks({"arithmetic": (1, 2), "weekdays": (1,)}),
        "steps": 4,
        "sampling": Sampling(group_size=2, groups=3, tokens=8, rounds=1, context=CONTEXT),
        "tokens_at_once": 2 * CONTEXT,
        "objective": named("reinforce++"),
        "optimizer": Optimizer(learning_rate=1e-2, weight_decay=0.0),
        "evaluate_every": 2,
        "evaluation_problems": 4,
        "checkpoint_every": 2,
        "keep": 0,
        "hardware": Hardware(gear="exact"),
    }
    return RLRecipe(base=base, **{**values, **changes})


def learner_of(base, objective: Objective, tokens_at_once: int = 10**6) -> PolicyLearner:
    recipe = recipe_of(base, objective=objective)
    training = recipe.as_training(GLMConfig.from_pretrained(base))
    return PolicyLearner(objective, training, CONFIG, choose_device(recipe.hardware), base, None, tokens_at_once, 1)


def judged(count: int):
    """Trajectories with rewards of any kind."""
    found = collect([Echo(1 + n % 3, False) for n in range(count)], Limits(tokens=6))
    for number, one in enumerate(found):
        one.verdict = Verdict((number * 7 % 5) / 4)
    return found


def test_without_a_weight_the_mtp_layer_stays_as_it_is_and_the_policy_learns_the_same(base):
    found, start = [], load_model(base).state_dict()
    for weight in (0.0, 0.1):
        recipe = recipe_of(base, mtp_weight=weight, optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.0, clip_norm=0.0))
        training = recipe.as_training(GLMConfig.from_pretrained(base))
        learner = PolicyLearner(recipe.objective, training, CONFIG, choose_device(recipe.hardware), base, None, 10**6, 1)
        learner.policy_step(judged(6), [0, 0, 0, 1, 1, 1])
        found.append(learner.model.state_dict())
    changed = [{name for name in start if not torch.equal(start[name], one[name])} for one in found]
    assert not any(name.startswith("mtp.") for name in changed[0]) and any(name.startswith("mtp.") for name in changed[1])
    assert changed[0] and all(torch.equal(found[0][name], found[1][name]) for name in start if not name.startswith("mtp."))


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo"])
def test_a_pass_before_the_only_update_says_what_the_update_itself_says(base, name, monkeypatch):
    found = []
    for looks_first in (False, True):
        learner = learner_of(base, named(name), 120)
        if looks_first:
            monkeypatch.setattr(learner, "_looks_first", lambda batches: True)
        monkeypatch.setattr(learner, "before", counted(learner.before, calls := []))
        with ops.using("exact"):
            numbers = learner.policy_step(judged(6), [0, 0, 0, 1, 1, 1])
        assert len(calls) == looks_first
        found.append((numbers, learner.model.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


def counted(function, calls: list):
    """The function, and a list that grows by each call."""

    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


@pytest.mark.parametrize("name", ["grpo", "ppo", "reinforce++", "dapo"])
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(base, name):
    objective, trajectories = named(name), judged(6)
    groups = [0, 0, 0, 1, 1, 1]
    found = []
    for tokens in (10**6, 120, 1):
        learner = learner_of(base, objective, tokens)
        numbers = learner.policy_step(trajectories, groups, 0.1)
        found.append((numbers, torch.cat([p.detach().flatten() for p in learner.model.parameters()])))
    for numbers, weights in found[1:]:
        wanted = found[0][0]
        assert set(numbers.record()) == {*numbers._fields[:-1], *numbers.gaps._fields}
        assert [*numbers[:-1], *numbers.gaps[:-1]] == pytest.approx([*wanted[:-1], *wanted.gaps[:-1]], rel=1e-3, abs=1e-5)
        torch.testing.assert_close(weights, found[0][1], rtol=0, atol=2e-3 * 1e-1)


def test_what_was_better_than_its_group_becomes_likelier_and_results_are_not_learnt(base):
    trajectories = judged(4)
    rewards = [1.0, 0.0, 0.0, 1.0]
    for one, reward in zip(trajectories, rewards, strict=True):
        one.verdict = Verdict(reward)
    learner = learner_of(base, named("rloo", fixed_length=8))

    def log_probs():
        with torch.no_grad():
            rows = [Rows.of([one], torch.device("cpu")) for one in trajectories]
            return [learner.log_probs(learner.model, row).sum().item() for row in rows]

    before = log_probs()
    learner.policy_step(trajectories, [0, 0, 1, 1], 0.1)
    for reward, old, new in zip(rewards, before, log_probs(), strict=True):
        assert (new > old) == (reward == 1.0)


@pytest.mark.parametrize("objective", [named("grpo", kl="k3", kl_weight=0.1, entropy_weight=0.01), named("ppo")])
def test_in_bf16_sampler_and_trainer_compute_alike_and_weights_and_gradients_stay_fp32(base, objective):
    """What a GPU does by itself, here on a CPU that is told to."""
    device = Device(torch.device("cpu"), True, "for this test")
    training = recipe_of(base).as_training(CONFIG)
    seen: dict[str, torch.dtype] = {}
    with ops.using("exact"):
        learner = PolicyLearner(objective, training, CONFIG, device, base, None, 10**6, 1)
        asked = [Asked(Echo(2, False), seed) for seed in range(4)]

        def sampled(**changes):
            return Rollouts(Engine(learner.model, TOKENIZER, gear="exact"), TOKENIZER, Limits(tokens=6), **changes).collect(
                asked
            )

        trajectories = sampled(autocast=device.autocast)
        assert trajectories[0].log_probs != sampled()[0].log_probs
        layer = learner.model.model.layers[0].mlp
        layer.register_forward_hook(
            lambda module, inputs, out: seen.update({"trains" if module.training else "reads": out.dtype})
        )
        layer.gate_proj.weight.register_hook(lambda gradient: seen.update(gradient=gradient.dtype))
        for number, one in enumerate(trajectories):
            one.verdict = Verdict(number % 2)
        found = learner.policy_step(trajectories, [0, 0, 1, 1])
        assert found.gaps.largest_gap == 0 and math.isfinite(found.loss) and found.gradient_norm > 0
    assert seen == {"trains": torch.bfloat16, "reads": torch.bfloat16, "gradient": torch.float32}
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}


def test_a_run_writes_what_happened_and_keeps_sampler_and_trainer_equal_to_the_bit(base, tmp_path):
    outcome = rl(recipe_of(base), tmp_path / "run")
    assert outcome.step == 4 and outcome.stopped_by is None
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(record["largest_gap"] == 0 for record in steps)
    assert [record["step"] for record in records if record["kind"] == "held_out"] == [0, 2, 4]
    lines = (tmp_path / "run" / "rollouts" / "step-4.jsonl").read_text().splitlines()
    assert len(lines) == 6 and {"reward", "text", "end"} <= json.loads(lines[0]).keys()
    assert load_model(outcome.checkpoint).config.vocab_size == CONFIG.vocab_size
    # `eval` takes the folder, too: one column, and no documents of its own.
    run = tmp_path / "run"
    assert find_columns([run]) == {"step-4": (outcome.checkpoint, run)} and first_length(run) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(base, tmp_path, name):
    recipe = recipe_of(base, objective=named(name))
    whole = rl(recipe, tmp_path / "whole")
    rl(recipe, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-4")
    again = rl(recipe, tmp_path / "cut")
    states = [load_model(outcome.checkpoint).state_dict() for outcome in (whole, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def numbers(folder):
        clocks = (*WALL_CLOCK, "sampling_seconds", "update_seconds")
        records = read_metrics(folder / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key not in clocks} for record in records]

    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_another_recipe_does_not_go_on_with_this_ones_checkpoints(base, tmp_path):
    rl(recipe_of(base, steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="steps: found 1, wanted 2"):
        rl(recipe_of(base, steps=2), tmp_path / "run")
    with pytest.raises(ConfigError, match="base: missing"):
        rl(recipe_of(None), tmp_path / "other")


def test_without_a_spread_nothing_is_learnt(base, tmp_path):
    """An untrained policy solves nothing: with dynamic sampling all groups are left out, and the weights stay."""
    sampling = Sampling(group_size=2, groups=2, tokens=4, rounds=3, context=CONTEXT)
    outcome = rl(recipe_of(base, steps=1, sampling=sampling, objective=Objective()), tmp_path / "run")
    (step,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert step["rounds"] == 3 and step["groups_without_spread"] == 6 and step["trained_on"] == 0 and step["reward"] == 0
    before, after = load_model(base).state_dict(), load_model(outcome.checkpoint).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_recipes_are_read_back_as_they_were_written(base, tmp_path):
    recipe = recipe_of(base, steps=1)
    rl(recipe, tmp_path / "run")
    assert load_rl_recipe(tmp_path / "run" / "config.toml") == recipe
    assert load_rl_recipe("nano").tasks.levels


# ------------------------------------------------------------------------------------------------------- the curriculum


TASKS = Tasks({"arithmetic": (1, 2, 3)})
EASY, MIDDLE, HARD = (("arithmetic", level) for level in (1, 2, 3))


def test_moderate_problems_come_first_and_solved_hard_ones_when_the_reward_has_levelled_off():
    curriculum = Curriculum(TASKS, 1)
    assert curriculum.chosen() == [EASY, MIDDLE, HARD]  # nothing is known
    for _ in range(30):
        curriculum.learn([EASY, MIDDLE, HARD], [1.0, 0.5, 0.0])
    assert curriculum.stage == 2 and curriculum.chosen() == [MIDDLE]  # never solved: not yet
    curriculum.learn([HARD], [1.0])
    for _ in range(3):
        curriculum.learn([HARD], [0.0])
    assert set(curriculum.chosen()) == {MIDDLE, HARD}
    assert curriculum.record()["arithmetic 3"] == {"attempts": 34, "pass_rate": 1 / 34, "solved": 1, "standing": "hard"}
    for _ in range(MANY):
        curriculum.learn([HARD], [0.0])
    assert curriculum.standing(HARD) == "hopeless" and curriculum.chosen() == [MIDDLE]  # its success was long ago


@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0]), max_size=700))
def test_the_standing_of_a_pool_is_what_its_last_attempts_say(rewards):
    curriculum = Curriculum(TASKS, 1)
    for reward in rewards:
        curriculum.learn([EASY], [reward])
    recent = rewards[-64:]
    rate = sum(recent) / len(recent) if recent else None
    assert curriculum.rate(EASY) == pytest.approx(rate) and curriculum.attempts[EASY] == len(rewards)
    standing = curriculum.standing(EASY)
    if len(rewards) < 8:
        assert standing == "unknown"
    elif rate < 1 / 8:
        assert standing == ("hard" if 1.0 in rewards[-512:] else "hopeless")
    else:
        assert standing == ("moderate" if rate <= 7 / 8 else "mastered")


def test_while_the_reward_rises_the_stage_stays():
    curriculum = Curriculum(TASKS, 1)
    for step in range(3 * WINDOW):
        curriculum.learn([MIDDLE], [step / (3 * WINDOW)])
    assert curriculum.stage == 1


def test_draws_are_a_function_of_seed_step_and_state():
    first, again, other = Curriculum(TASKS, 1), Curriculum(TASKS, 1), Curriculum(TASKS, 2)
    assert first.draw(3, 0, 8) == again.draw(3, 0, 4) + again.draw(3, 4, 4) != other.draw(3, 0, 8)
    assert first.draw(3, 0, 8) != first.draw(4, 0, 8)
    first.learn([EASY] * 5, [1, 0, 1, 0, 1])
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.draw(9, 0, 8) == first.draw(9, 0, 8) and again.state_dict() == first.state_dict()


@pytest.mark.parametrize("curriculum", ["none", "pass_rate", "pathology"])
def test_families_come_as_often_as_their_weights_say(curriculum):
    levels = {"arithmetic": (1, 2), "clock": (1,)}
    drawn = Curriculum(Tasks(levels, curriculum, {"arithmetic": 2}), 1)
    picked = Counter(drawn.pick(1, number)[0] for number in range(3000))
    for pool, share in ((EASY, 2 / 5), (MIDDLE, 2 / 5), (("clock", 1), 1 / 5)):
        assert abs(picked[pool] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    for weights, said in (
        ({"weekdays": 2}, "family_weights = 'weekdays'"),
        ({"clock": 0}, "family_weights.clock = 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Tasks(levels, family_weights=weights)


def test_the_gear_is_as_it_was_after_a_run(base, tmp_path):
    rl(recipe_of(base, steps=1), tmp_path / "run")
    assert ops._gear == "torch"


def test_the_command_trains_goes_on_and_says_what_is_missing(base, tmp_path, capsys):
    short = ["--steps", "1", "--evaluation-problems", "2", "--sampling.groups", "1", "--sampling.tokens", "4"]
    short += ["--sampling.context", "500", "--tokens-at-once", "500"]
    run = tmp_path / "run"
    assert main(["rl", str(base), "--run-folder", str(run), *short, "--hardware.device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "loss = 1/N" in said and "held-out problems: reward from 0.000" in said
    assert (run / "overview.png").is_file() and (run / "rollouts" / "step-1.jsonl").is_file()
    assert main(["rl", "--recipe", str(run / "config.toml")]) == 0  # nothing is left to do
    assert main(["rl"]) == 2
    assert "wanted the model to start from" in capsys.readouterr().err
