"""Temperature and length of attempts: what is sampled hot is trained hot, to the bit; a temperature is raised when it costs
little; output grows in stages of equal shares."""

import math
from dataclasses import replace

import pytest
import torch
from test_rl_loop import CONTEXT, base, learner_of, recipe_of  # noqa: F401 (a fixture)
from test_rl_rollout import TOKENIZER, Echo, collect, policy

from minglm import ops
from minglm.config import ConfigError
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.rl.curriculum import WINDOW
from minglm.rl.held_out import set_aside
from minglm.rl.loop import rl
from minglm.rl.objective import named
from minglm.rl.recipe import Sampling, Tasks
from minglm.rl.rollout import Limits
from minglm.rl.rows import Rows
from minglm.rl.temperature import Temperature
from minglm.train.metrics import read_metrics


def test_log_probabilities_are_those_of_the_distribution_that_was_drawn_from():
    model = policy(3)
    engine = Engine(model, TOKENIZER)
    plainly = SamplingParams(1.7, seed=1, max_tokens=5, logprobs=0, ignore_stop=True)
    hot, plain = engine.generate([[5, 6, 7]] * 2, [replace(plainly, at_temperature=True), plainly])
    assert hot.ids == plain.ids
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, *hot.ids]])).logits[0, 2:-1]
    for found, divisor in ((hot, 1.7), (plain, 1.0)):
        wanted = (logits / divisor).log_softmax(-1)[torch.arange(5), found.ids]
        torch.testing.assert_close(torch.tensor(found.logprobs), wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at_temperature with temperature = 0: wanted above 0"):
        SamplingParams(0, at_temperature=True)


def test_sampler_and_trainer_agree_to_the_bit_at_any_temperature():
    model = policy(1)
    limits = [Limits(12, temperature=value) for value in (0.7, 1.0, 1.9)]
    found = [one for each in limits for one in collect([Echo(2, False)] * 3, each, "exact", model=model)]
    rows = Rows.of(found, torch.device("cpu"))
    assert rows.temperatures[:, 0].unique().tolist() == pytest.approx([0.7, 1.0, 1.9])
    with ops.using("exact"), torch.no_grad():
        hidden = model.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids)[0]
        own = rows.sampled
        ours = ops.token_log_probs(hidden[own], model.lm_head.weight, rows.labels[own], rows.temperatures[own])
    assert torch.equal(ours, rows.log_probs[own])


def test_at_a_temperature_the_entropy_is_that_of_the_hot_policy(base):  # noqa: F811
    cold = collect([Echo(2, False)] * 2, Limits(6, temperature=1.0))
    learner = learner_of(base, named("grpo"))
    entropies = []
    for temperature in (1.0, 50.0):
        for one in cold:
            one.temperature = temperature
        rows = Rows.of(cold, torch.device("cpu"))
        with torch.no_grad():
            hidden = learner.model.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids)[0]
            entropies.append(learner._entropies(hidden, rows)[rows.sampled.flatten()].mean().item())
    assert entropies[0] < entropies[1] == pytest.approx(math.log(TOKENIZER.vocab_size), abs=0.05)


def test_the_temperature_rises_when_the_reward_has_levelled_off_and_as_far_as_one_percent_allows():
    temperature = Temperature(Sampling(temperatures=(1.3, 1.0, 1.1, 1.2)))
    assert not any(temperature.learn(step / 10) for step in range(2 * WINDOW))  # it rises: nothing to do
    due = [temperature.learn(2.0) for _ in range(2 * WINDOW)]
    assert due[-1] and not due[0]
    temperature.choose({1.0: 0.700, 1.1: 0.705, 1.2: 0.699, 1.3: 0.690})
    assert temperature.value == 1.2  # 1% of 0.705 is 0.007
    again = Temperature(Sampling(temperatures=(1.0, 1.1)))
    again.load_state_dict(temperature.state_dict())
    assert again.value == 1.2 and not again.learn(2.0)  # a new phase begins
    assert not any(Temperature(Sampling()).learn(0.5) for _ in range(5 * WINDOW))  # off by default


def test_what_judges_does_not_choose(base):  # noqa: F811
    tasks, sampling = Tasks({"arithmetic": (1, 2), "ordering": (2,)}), Sampling(temperatures=(1.0, 1.2))
    judging, choosing = set_aside(recipe_of(base, tasks=tasks, sampling=sampling, evaluation_problems=8))
    assert len(judging) == len(choosing) == 16 and not {p.key for p in judging} & {p.key for p in choosing}
    assert set_aside(recipe_of(base))[1] == []
    with pytest.raises(ConfigError, match="weekdays has no held-out problems to choose by beside the 8"):
        set_aside(recipe_of(base, sampling=sampling, evaluation_problems=8))


def test_no_problem_judges_twice(base):  # noqa: F811
    judging, _ = set_aside(recipe_of(base, tasks=Tasks({"clock": (1, 2)}), evaluation_problems=64))
    assert len({problem.key for problem in judging}) == len(judging) == 64  # of 64 draws there are 44


def test_a_run_chooses_logs_and_goes_on_with_its_temperature(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("minglm.rl.temperature.WINDOW", 1)
    monkeypatch.setattr("minglm.rl.curriculum.WINDOW", 1)
    sampling = Sampling(group_size=2, groups=2, tokens=(2, 4), rounds=1, context=CONTEXT, temperatures=(1.0, 1.5))
    recipe = recipe_of(base, tasks=Tasks({"arithmetic": (1, 2)}), sampling=sampling, steps=4)
    rl(recipe, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    chosen = [record for record in records if record["kind"] == "temperature"]
    assert [record["tokens"] for record in steps] == [2, 2, 4, 4]
    assert [record["temperature"] for record in steps] == [1.0, 1.0, 1.5, 1.5]  # an untrained policy loses nothing by it
    assert [record["step"] for record in chosen] == [2, 4] and chosen[0]["chosen"] == 1.5
    assert [value for value, *_ in chosen[0]["rewards"]] == [1.0, 1.5]
    assert all(record["largest_gap"] == 0 for record in steps)
    judged = [record for record in records if record["kind"] == "held_out"]
    assert all(record["length"] <= 4 for record in judged) and judged[0]["length"] > 2  # at full length from the start


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 60])
def test_stages_of_length_have_equal_shares_of_the_steps(steps):
    sampling = Sampling(tokens=(32, 64, 128))
    lengths = [sampling.tokens_at(step, steps) for step in range(1, steps + 1)]
    assert lengths == sorted(lengths)
    shares = [lengths.count(tokens) for tokens in sampling.stages]
    assert max(shares) - min(shares) <= 1
    assert {Sampling(tokens=9).tokens_at(step, steps) for step in range(1, steps + 1)} == {9}


@pytest.mark.parametrize("values", [{"tokens": ()}, {"tokens": (4, 0)}, {"temperatures": (1.0, 0.0)}])
def test_stages_and_temperatures_that_cannot_be_are_refused(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))} = "):
        Sampling(**values)
