"""Where sampler and trainer differ: FP8 weights, routing, and what the corrections rescue of it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rl_loop import CONTEXT, base, recipe_of  # noqa: F401 (a fixture)
from test_rl_rollout import CONFIG, TOKENIZER, Echo, policy

from minglm import ops
from minglm.config import GLMConfig
from minglm.engine.engine import Engine
from minglm.model import GLM
from minglm.rl.algorithms import importance_weights
from minglm.rl.learner import PolicyLearner
from minglm.rl.loop import rl
from minglm.rl.objective import Objective, named
from minglm.rl.quantised import BLOCK, LARGEST, fp8_copy, fp8_state, quantised_names, through_fp8
from minglm.rl.recipe import Sampling, Tasks
from minglm.rl.rollout import Asked, Limits, Rollouts
from minglm.rl.rows import Rows
from minglm.tasks.task import Verdict
from minglm.train.device import choose_device
from minglm.train.metrics import read_metrics

# ----------------------------------------------------------------------------------------------------------------- FP8


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.sampled_from([(), (3,)]))
def test_fp8_is_each_block_rounded_by_its_own_scale(seed, rows, columns, stack):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*stack, rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    found = through_fp8(weight)
    assert found.shape == weight.shape and found.dtype == weight.dtype
    for matrix, ours in zip(weight.view(-1, rows, columns), found.view(-1, rows, columns), strict=True):
        for top in range(0, rows, BLOCK):
            for left in range(0, columns, BLOCK):
                block = matrix[top : top + BLOCK, left : left + BLOCK]
                scale = block.abs().max() / LARGEST
                wanted = (block / scale).to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(ours[top : top + BLOCK, left : left + BLOCK], wanted)
    # Three bits of mantissa; the smallest numbers of a block are rounded to its step.
    bound = weight.abs() / 16 + weight.abs().max() / LARGEST * 2**-10
    assert ((found - weight).abs() <= bound * 1.001).all()
    assert torch.equal(through_fp8(found), found) or torch.allclose(through_fp8(found), found, rtol=1e-6)


def test_fp8_leaves_zeros_and_knows_linear_layers_by_their_kind():
    assert torch.equal(through_fp8(torch.zeros(5, 7)), torch.zeros(5, 7))
    model = policy()
    names, state = quantised_names(model), model.state_dict()
    assert {name.rsplit(".", 1)[-1] for name in names} == {"weight", "gate_up_proj", "down_proj"}
    kept = state.keys() - names
    assert all(word in " ".join(kept) for word in ("embed_tokens", "lm_head", "gate.weight", "e_score_correction_bias", "norm"))
    assert not any("mlp.gate.weight" in name or "lm_head" in name for name in names) and any(
        "eh_proj" in name for name in names
    )
    changed = fp8_state(model)
    assert all(torch.equal(changed[name], state[name]) == (name in kept) for name in state)
    sampler = fp8_copy(model)
    assert all(torch.equal(value, changed[name]) for name, value in sampler.state_dict().items())
    assert sampler.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


# -------------------------------------------------------------------------------------------------------------- routing


def coarse(seed: int = 0) -> GLM:
    """A policy of many experts, and large weights: routing is easily tipped over."""
    torch.manual_seed(seed)
    changes = {"n_routed_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 3}
    model = GLM(GLMConfig.from_dict({**CONFIG.to_dict(), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def sampled(model: GLM, count: int = 6, records: bool = True):
    rollouts = Rollouts(Engine(fp8_copy(model), TOKENIZER, gear="exact"), TOKENIZER, Limits(tokens=10), records)
    found = rollouts.collect([Asked(Echo(1 + n % 3, False), n) for n in range(count)])
    for number, one in enumerate(found):
        one.verdict = Verdict(float(number % 2))
    return found


def test_each_token_that_was_read_has_the_experts_that_the_sampler_gave_it():
    model = coarse()
    for one in sampled(model):
        assert one.experts.shape == (len(one.ids) - 1, 2, 4) and one.experts.dtype == torch.int16
        with ops.using("exact"), torch.no_grad():
            _, wanted = fp8_copy(model).hidden_and_experts(torch.tensor([one.ids[:-1]]))
        assert torch.equal(one.experts.long().transpose(0, 1).sort(-1).values, wanted.sort(-1).values)
    assert all(one.experts is None for one in sampled(model, 2, records=False))


def test_replayed_routing_is_the_samplers_and_gradients_reach_its_gates():
    model = coarse().train()
    rows = Rows.of(sampled(model), torch.device("cpu"))
    with torch.no_grad():
        own = model.hidden_and_experts(rows.input_ids, rows.document_ids)[1]
    assert not torch.equal(own.sort(-1).values, rows.experts.sort(-1).values)
    with model.replaying(rows.experts):
        hidden, used = model.hidden_and_experts(rows.input_ids, rows.document_ids)
        told = rows.experts >= 0
        assert told.any() and torch.equal(used[told], rows.experts[told])
        hidden.square().sum().backward()
    for layer, router in enumerate(model.routers()[:2]):
        chosen = rows.experts[layer][(rows.experts[layer] >= 0).all(-1)].unique()
        assert (router.weight.grad[chosen].abs().sum(-1) > 0).all()
        assert router.replayed is None
    with torch.no_grad():
        assert torch.equal(model.hidden_and_experts(rows.input_ids, rows.document_ids)[1], own)


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.booleans())
def test_replaying_a_models_own_routing_changes_no_bit(seed, checkpointing):
    model = coarse().train()
    model.activation_checkpointing = checkpointing
    ids = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))

    def gradients(experts):
        model.zero_grad()
        with model.replaying(experts):
            hidden, mtp, balance = model.hidden_and_side_losses(ids, ids)
            (hidden.square().mean() + mtp + balance).backward()
        return [p.grad.clone() for p in model.parameters()]

    with torch.no_grad():
        own = model.hidden_and_experts(ids)[1]
    plain = gradients(None)
    assert all(map(torch.equal, plain, gradients(own)))
    assert all(map(torch.equal, plain, gradients(torch.full_like(own, -1))))
    swapped = gradients((own + 1) % 16)
    assert not all(map(torch.equal, plain, swapped))


def learner_of(model: GLM, folder, replay: str, passes: int = 1) -> PolicyLearner:
    model.save_pretrained(folder)
    recipe = recipe_of(folder, objective=named("grpo"))
    training = recipe.as_training(model.config)
    device = choose_device(recipe.hardware)
    return PolicyLearner(recipe.objective, training, model.config, device, folder, None, 10**6, passes, replay)


def test_with_r3_what_is_left_of_the_gap_is_precision(tmp_path):
    model = coarse()
    trajectories, groups = sampled(model, 24), [n // 4 for n in range(24)]
    with ops.using("exact"):
        gaps = {}
        for replay in ("none", "R3"):
            gaps[replay] = learner_of(model, tmp_path / replay, replay).policy_step(trajectories, groups).gaps
    plain, replayed = gaps["none"], gaps["R3"]
    assert plain.rerouted == replayed.rerouted > 0.02
    assert plain.own_routing_gap == plain.mean_gap == replayed.own_routing_gap > 0
    assert 0 < replayed.mean_gap < plain.mean_gap
    assert plain.stale_gap == plain.staleness == 0 and plain.fresh_gap == pytest.approx(plain.mean_gap)


def test_r2_holds_the_routing_while_the_weights_move_and_r3_needs_experts(tmp_path):
    model = coarse()
    trajectories, groups = sampled(model, 4, records=False), [0, 0, 1, 1]
    with pytest.raises(ValueError, match="'R3' found trajectories without experts"):
        learner_of(model, tmp_path / "R3", "R3").policy_step(trajectories, groups)
    learner, seen = learner_of(model, tmp_path / "R2", "R2", passes=3), []
    gate = learner.model.routers()[0]
    gate.register_forward_hook(lambda module, inputs, out: seen.append((module.training, out[0])))
    learner.policy_step(trajectories, groups)
    before = [experts for training, experts in seen if not training]
    during = [experts for training, experts in seen if training]
    assert len(before) == 1 and len(during) == 3 and all(torch.equal(experts, before[0]) for experts in during)


def test_older_tokens_are_told_apart(tmp_path):
    model = coarse()
    trajectories = sampled(model, 4)
    for one in trajectories[:2]:
        one.versions = [version if version < 0 else 0 for version in one.versions]
    for one in trajectories[2:]:
        one.versions = [version if version < 0 else 3 for version in one.versions]
    numbers = learner_of(model, tmp_path, "none").policy_step(trajectories, [0, 0, 1, 1], version=4).gaps
    old, new = (sum(one.length for one in part) for part in (trajectories[:2], trajectories[2:]))
    assert numbers.staleness == pytest.approx((4 * old + new) / (old + new)) and numbers.largest_staleness == 4
    assert numbers.fresh_gap == 0 and numbers.stale_gap == pytest.approx(numbers.mean_gap)


# ------------------------------------------------------------------------------------------- what the corrections rescue


def biases(model: GLM) -> dict[str, float]:
    """How far the expected gradient of an FP8 sampler's single tokens is from that of the policy's own, relative to the latter,
    exact: summed over the vocabulary. Half of the tokens are right."""
    sampler, rng = fp8_copy(model), random.Random(1)
    prompts = torch.tensor([[rng.randrange(5, 300) for _ in range(8)] for _ in range(6)])
    right = torch.tensor([[rng.random() < 0.5 for _ in range(CONFIG.vocab_size)] for _ in prompts]).float()

    def gradient(weighted_by, experts=None) -> torch.Tensor:
        """weighted_by: log pi (prompts, v) -> what each token counts."""
        model.zero_grad()
        with model.replaying(experts):
            log_pi = model.lm_head(model.hidden_and_experts(prompts)[0][:, -1]).log_softmax(-1)
            counts = weighted_by(log_pi.detach())
            advantages = right - (counts * right).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True)
            (counts * advantages * log_pi).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with torch.no_grad():
        hidden, experts = sampler.hidden_and_experts(prompts)
        log_mu = sampler.lm_head(hidden[:, -1]).log_softmax(-1)
    n = log_mu.numel()
    whole = torch.ones(n, dtype=torch.bool), torch.arange(n)

    def corrected(how):
        objective = Objective(importance=how)

        def weights(log_pi):
            found = importance_weights(objective, log_pi.flatten(), log_mu.flatten(), *whole)
            return log_mu.exp() * found.view_as(log_mu)

        return weights

    true = gradient(lambda log_pi: log_pi.exp())
    found = {how: gradient(corrected(how)) for how in ("none", "truncate", "mask_tokens", "mask_sequences")}
    found |= {f"R3, {how}": gradient(corrected(how), experts) for how in ("none", "truncate")}
    return {name: ((one - true).norm() / true.norm()).item() for name, one in found.items()}


def test_what_each_correction_rescues_of_the_bias_of_an_fp8_sampler(capsys):
    found = {name: 0.0 for name in biases(coarse())}
    for seed in range(4):
        for name, value in biases(coarse(seed)).items():
            found[name] += value / 4
    with capsys.disabled():
        print("\nbias of the expected gradient, FP8 sampler: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
    assert found["none"] > 0.01
    for how in ("truncate", "mask_tokens", "mask_sequences"):
        assert found[how] < found["none"] / 2


# -------------------------------------------------------------------------------------------------------- the whole loop


@pytest.mark.parametrize("replay", ["none", "R3"])
def test_a_run_with_an_fp8_sampler_reports_its_gap(base, tmp_path, replay):  # noqa: F811
    sampling = Sampling(group_size=2, groups=2, tokens=6, rounds=1, context=CONTEXT, precision="fp8")
    tasks = Tasks({"arithmetic": (1,)})
    rl(recipe_of(base, tasks=tasks, steps=2, sampling=sampling, routing_replay=replay, evaluation_problems=2), tmp_path / "run")
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert all(0 < record["mean_gap"] < 0.5 and record["staleness"] == 0 for record in steps)
    assert all(record["fresh_gap"] == record["mean_gap"] for record in steps)
