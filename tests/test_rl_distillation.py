"""On-policy distillation: its gradient on a policy whose every response can be listed, its step, and its run."""

import shutil
from dataclasses import replace

import pytest
import torch
from test_rl_algorithms import TREE, at, gradient
from test_rl_loop import CONTEXT, base, recipe_of  # noqa: F401 (a fixture)
from test_rl_rollout import CONFIG, TOKENIZER, Echo, collect, policy

from minglm.checkpoint import load_model, save_model
from minglm.config import ConfigError, GLMConfig
from minglm.model import GLM
from minglm.rl.distillation import DistillationLearner, load_teachers, reverse_kl
from minglm.rl.loop import rl
from minglm.rl.objective import Objective
from minglm.rl.recipe import Sampling, Tasks, load_rl_recipe
from minglm.rl.rehearsal import rehearse
from minglm.rl.rollout import Limits
from minglm.tasks.task import Verdict
from minglm.train.device import choose_device
from minglm.train.metrics import read_metrics

CLOSE = {"rtol": 0, "atol": 1e-12}


def prefixes_of(response) -> list[int]:
    return [TREE.prefixes.index(response[:t]) for t in range(len(response))]


def test_the_gradient_is_that_of_the_divergence_in_the_states_that_the_policy_visits():
    """Expected over all responses: sum_s P(s) grad KL_s, the states held. Policy gradients with the advantage of the sampled
    token, -(log pi - log pi_teacher), have the same expectation, and the sum over the vocabulary has less noise."""
    logits, teacher = at(TREE), TREE.table(seed=9)
    likely = TREE.log_probs(logits).exp().detach()[:, None, None]
    whole, sampled = [], []  # of each response, (responses, prefixes, vocabulary)
    for response, steps in zip(TREE.responses, TREE.steps, strict=True):
        states = prefixes_of(response)
        whole.append(gradient(reverse_kl(logits[states], teacher[states]).sum(), logits))
        log_probs, wanted = (table.log_softmax(-1).flatten()[steps] for table in (logits, teacher))
        advantages = -(log_probs - wanted).detach()
        sampled.append(gradient(-(advantages * log_probs).sum(), logits))
    whole, sampled = torch.stack(whole), torch.stack(sampled)
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = gradient((TREE.visits(logits) * divergence).sum(), logits)
    torch.testing.assert_close((likely * whole).sum(0), expected, **CLOSE)
    torch.testing.assert_close((likely * sampled).sum(0), expected, **CLOSE)
    noise = [(likely * (each - expected).square()).sum().item() for each in (whole, sampled)]
    assert noise[0] < noise[1]


def test_following_the_gradient_leads_to_the_teacher():
    logits, teacher = at(TREE), TREE.table(seed=9)
    for _ in range(400):
        log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
        loss = (TREE.visits(logits) * reverse_kl(logits, teacher)).sum()
        logits = (logits - gradient(loss, logits)).detach().requires_grad_()
    torch.testing.assert_close(log_p.exp(), log_q.exp(), rtol=0, atol=2e-2)
    assert reverse_kl(teacher, teacher).tolist() == [0.0] * len(TREE.prefixes)


def learner_of(base, teachers, tokens_at_once=10**6) -> DistillationLearner:  # noqa: F811
    recipe = recipe_of(base)
    training = recipe.as_training(GLMConfig.from_pretrained(base))
    device = choose_device(recipe.hardware)
    return DistillationLearner(Objective(), training, CONFIG, device, base, None, tokens_at_once, 1, "none", teachers=teachers)


class Other(Echo):
    family = "other"


def attempts(count: int):
    """Of two families by turns."""
    problems = [(Echo, Other)[n % 2](1 + n % 3, False) for n in range(count)]
    found = collect(problems, Limits(tokens=6))
    for one in found:
        one.verdict = Verdict(0.0)  # which nothing is learnt from
    return found


def test_a_step_is_the_same_however_it_is_cut_and_each_family_has_its_teacher(base):  # noqa: F811
    teachers = {"echo": policy(3), "other": policy(4)}
    trajectories, groups = attempts(6), [0, 0, 1, 1, 2, 2]
    found = []
    for tokens in (10**6, 120, 1):
        learner = learner_of(base, teachers, tokens)
        chosen = list(learner.micro_batches(trajectories))
        assert sorted(i for batch in chosen for i in batch) == list(range(6))
        assert all(len({trajectories[i].problem.family for i in batch}) == 1 for batch in chosen)
        numbers = learner.policy_step(trajectories, groups, 0.1)
        found.append((numbers.loss, torch.cat([p.detach().flatten() for p in learner.model.parameters()])))
    wanted = 0.0
    student, count = load_model(base).eval(), 0
    with torch.no_grad():
        for one in trajectories:
            places = torch.tensor(one.sampled[1:]).nonzero().flatten()
            ids = torch.tensor([one.ids[:-1]])
            logits = [m(ids).logits[0, places].float() for m in (student, teachers[one.problem.family])]
            wanted, count = wanted + reverse_kl(*logits).sum().item(), count + len(places)
    for loss, weights in found:
        assert loss == pytest.approx(wanted / count, rel=1e-4)
        torch.testing.assert_close(weights, found[0][1], rtol=0, atol=2e-4)


def test_a_rehearsal_asks_the_teacher_for_all_that_a_step_asks_it(base):  # noqa: F811
    teacher, seen = policy(3), []
    learner = learner_of(base, {"echo": teacher})
    teacher.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(tuple(logits.shape)))
    before = [p.detach().clone() for p in learner.model.parameters()]
    rehearse(learner, 21, 2)
    assert seen == [(2 * 20, CONFIG.vocab_size)]
    assert all(torch.equal(old, new) for old, new in zip(before, learner.model.parameters(), strict=True))


def test_a_student_comes_near_its_teacher(base):  # noqa: F811
    learner = learner_of(base, dict.fromkeys(("echo", "other"), policy(3)))
    trajectories = attempts(6)
    losses = [learner.policy_step(trajectories, [0] * 6).loss for _ in range(12)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.fixture
def taught(base, tmp_path):  # noqa: F811
    """A recipe of distillation from another model."""
    save_model(policy(3), tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    sampling = Sampling(group_size=2, groups=2, tokens=6, rounds=1, context=CONTEXT)
    return recipe_of(
        base, tasks=Tasks({"arithmetic": (1,)}, "none"), sampling=sampling, teachers={"arithmetic": tmp_path / "teacher"}
    )


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_and_keeps_to_its_budget(taught, tmp_path):
    whole = rl(replace(taught, steps=4), tmp_path / "whole")
    steps = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "step"]
    assert all(step["trained_on"] == 4 and step["teacher_tokens"] == step["trained_tokens"] > 0 for step in steps)
    costs = [step["generated_tokens"] + 4 * step["trained_tokens"] for step in steps]
    assert [step["compute"] for step in steps] == [sum(costs[: n + 1]) for n in range(4)]
    rl(replace(taught, steps=4), tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-4")
    again = rl(replace(taught, steps=4), tmp_path / "cut")
    states = [load_model(outcome.checkpoint).state_dict() for outcome in (whole, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    budget = replace(taught, steps=100, compute_budget=steps[1]["compute"] + 1)
    outcome = rl(budget, tmp_path / "budget")
    assert outcome.step == 3 and rl(budget, tmp_path / "budget").step == 3  # it is finished
    assert load_rl_recipe(tmp_path / "budget" / "config.toml").teachers == taught.teachers


def test_teachers_that_do_not_fit_are_refused(taught, tmp_path):
    with pytest.raises(ConfigError, match=r"teachers = .* wanted one for each family of tasks.levels: arithmetic, clock"):
        replace(taught, tasks=Tasks({"arithmetic": (1,), "clock": (1,)}))
    with pytest.raises(ConfigError, match="sampling.rounds"):
        replace(taught, sampling=replace(taught.sampling, rounds=2))
    GLM(replace(CONFIG, vocab_size=64)).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="teachers.clock: .* has 64 ids"):
        load_teachers({"clock": tmp_path / "small"}, CONFIG, torch.device("cpu"))
