"""What holds for every objective: it is what its formula says, however tokens are masked, packed, or cut into micro-batches.

The gradients' expectations are in test_rl_algorithms.py.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minglm.rl import advantages as advantages_module
from minglm.rl import algorithms
from minglm.rl.advantages import advantages, at_last_token, gae, group_mean, informative, leave_one_out
from minglm.rl.algorithms import Tokens, count, policy_loss, value_loss
from minglm.rl.objective import NAMED, SPREAD, Objective, ObjectiveError, formula, named

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


# ------------------------------------------------------------------------------------------------- steps and objectives


@dataclass(frozen=True)
class Step:
    """All that a step knows of its tokens (n,) and sequences (s,)."""

    log_probs: Tensor
    old: Tensor
    sampler: Tensor
    reference: Tensor
    entropies: Tensor
    values: Tensor
    mask: Tensor
    ids: Tensor
    rewards: Tensor
    groups: Tensor
    bootstrap: Tensor

    def tokens(self) -> Tokens:
        return Tokens(self.mask, self.ids, self.old, self.sampler, self.reference)

    def with_tokens(self, change: Callable[[Tensor], Tensor]) -> "Step":
        return replace(self, **{name: change(getattr(self, name)) for name in TOKEN_FIELDS})


NUMBERS = ("log_probs", "old", "sampler", "reference", "entropies", "values")
TOKEN_FIELDS = (*NUMBERS, "mask", "ids")


def make_step(seed: int, sizes: Sequence[int], longest: int = 5) -> Step:
    """Random numbers for groups of these sizes. Rewards are few, so that some groups have no spread; some sequences hold no
    token that counts."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    ids = torch.arange(count).repeat_interleave(torch.randint(1, longest + 1, (count,), generator=generator))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old = -draw(len(ids)).abs()
    near = [old + 0.4 * draw(len(ids)) for _ in range(3)]
    log_probs, sampler, reference = near
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Step(
        log_probs,
        old,
        sampler,
        reference,
        draw(len(ids)).abs(),
        draw(len(ids)),
        torch.rand(len(ids), generator=generator) < 0.7,
        ids,
        torch.randint(0, 3, (count,), generator=generator).double() / 2,
        groups[torch.randperm(count, generator=generator)],
        draw(count),
    )


steps = st.builds(make_step, st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=4))


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    chosen = {field.name: draw(st.sampled_from(get_args(field.type))) for field in CHOICES}
    if chosen["advantage"] not in ("group_mean", "leave_one_out") and chosen["normalise"] == "group":
        chosen["normalise"] = "none"
    return Objective(
        **chosen,
        kl_weight=0.3 if chosen["kl"] != "none" else 0.0,
        fixed_length=7 if chosen["aggregation"] == "constant" else 0,
        entropy_weight=draw(st.sampled_from([0.0, 0.2])),
        gamma=draw(st.sampled_from([1.0, 0.9])),
        gae_lambda=draw(st.sampled_from([1.0, 0.8])),
        value_clip=draw(st.sampled_from([0.2, math.inf])),
        importance_low=0.8,
        importance_high=1.3,
    )


CHOICES = [field for field in dataclasses.fields(Objective) if get_args(field.type)]


@dataclass(frozen=True)
class Outcome:
    """What a step does: losses with their parts, and the gradient of each token's numbers, (2 or 1, n)."""

    losses: Tensor
    gradients: Tensor
    mask: Tensor


def outcome(objective: Objective, step: Step, pieces: Sequence[Sequence[int]] | None = None) -> Outcome:
    """Of the whole step, or of its sequences taken in these micro-batches."""
    found = advantages(objective, step.rewards, step.groups, step.tokens(), step.values, step.bootstrap)
    returns = found.returns if found.returns is not None else step.values + 0.3
    leaves = [x.clone().requires_grad_() for x in (step.log_probs, step.entropies, step.values)]
    batches = []
    for piece in pieces if pieces is not None else [range(len(step.rewards))]:
        places = torch.cat([(step.ids == sequence).nonzero().flatten() for sequence in piece] or [torch.empty(0).long()])
        ids = torch.cat([torch.full((int((step.ids == sequence).sum()),), i) for i, sequence in enumerate(piece)])
        batches.append((places, replace(step.with_tokens(lambda x: x[places]), ids=ids, mask=found.mask[places])))  # noqa: B023
    total = torch.stack([count(objective, batch.mask, batch.ids) for _, batch in batches]).sum()
    losses = torch.zeros(7, dtype=torch.float64)
    for places, batch in batches:
        log_probs, entropies, values = (leaf[places] for leaf in leaves)
        loss = policy_loss(objective, log_probs, batch.tokens(), found.tokens[places], total, entropies)
        critic = value_loss(objective, values, step.values[places] + 0.1, returns[places], batch.tokens(), total)
        (loss.total + critic).backward()
        losses = losses + torch.stack([*loss, critic]).detach()
    return Outcome(
        losses,
        torch.stack([leaf.grad.clone() if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]),
        found.mask,
    )


def assert_same(first: Outcome, second: Outcome, places: Tensor | slice = slice(None), **close: float) -> None:
    """The second one's tokens lie at `places` of the first."""
    torch.testing.assert_close(first.losses, second.losses, **(close or CLOSE))
    torch.testing.assert_close(first.gradients[:, places], second.gradients, **(close or CLOSE))


# --------------------------------------------------------------------------------------------------- the formula, naively


def naive_advantages(o: Objective, step: Step) -> tuple[list[float], list[float], list[bool]]:
    """Advantages, returns and mask of all tokens, one after the other."""
    n, s = len(step.ids), len(step.rewards)
    own = [[t for t in range(n) if step.ids[t] == i and step.mask[t]] for i in range(s)]
    penalty = [0.0] * n
    if o.kl != "none" and o.kl_place == "reward":
        penalty = [o.kl_weight * naive_kl(o.kl, (step.old[t] - step.reference[t]).item()) for t in range(n)]
    found, returns, mask = [0.0] * n, [0.0] * n, step.mask.tolist()
    if o.advantage in ("group_mean", "leave_one_out"):
        rewards = [step.rewards[i].item() - sum(penalty[t] for t in own[i]) for i in range(s)]
        for i in range(s):
            group = [rewards[j] for j in range(s) if step.groups[j] == step.groups[i]]
            others = [rewards[j] for j in range(s) if step.groups[j] == step.groups[i] and j != i]
            spread = max(group) - min(group) > SPREAD
            for t in own[i]:
                mask[t] = spread
                if spread:
                    found[t] = rewards[i] - statistics.fmean(group if o.advantage == "group_mean" else others)
                    found[t] /= statistics.stdev(group) if o.normalise == "group" else 1
    else:
        critic = o.advantage == "gae"
        discount = o.gamma * (o.gae_lambda if critic else 1)
        for i in range(s):
            values = [step.values[t].item() if critic else 0.0 for t in own[i]] + [step.bootstrap[i].item() if critic else 0.0]
            gains = [-penalty[t] + (step.rewards[i].item() if t == own[i][-1] else 0) for t in own[i]]
            errors = [gain + o.gamma * values[k + 1] - values[k] for k, gain in enumerate(gains)]
            for k, t in enumerate(own[i]):
                found[t] = sum(discount ** (u - k) * errors[u] for u in range(k, len(errors)))
                returns[t] = found[t] + values[k]
    if o.normalise == "batch":
        kept = [found[t] for t in range(n) if mask[t]]
        flat = not kept or max(kept) - min(kept) <= SPREAD
        for t in range(n):
            found[t] = 0.0 if flat or not mask[t] else (found[t] - statistics.fmean(kept)) / statistics.stdev(kept)
    return found, returns, mask


def naive_kl(kind: str, x: float) -> float:
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[kind]


def naive_loss(o: Objective, step: Step) -> tuple[float, float, float]:
    """`formula`, read aloud; and the shares of tokens that are clipped and dropped."""
    advantage, _, mask = naive_advantages(o, step)
    own = [[t for t in range(len(mask)) if step.ids[t] == i and mask[t]] for i in range(len(step.rewards))]
    pi, old, sampler = (x.tolist() for x in (step.log_probs, step.old, step.sampler))
    sums, low, high = [0.0, 0.0, 0.0], 1 - o.clip_low, 1 + o.clip_high
    for tokens in filter(None, own):
        for t in tokens:
            rho = math.exp(pi[t] - old[t])
            if o.policy == "gspo":
                rho = math.exp(statistics.fmean(pi[u] - old[u] for u in tokens))
            held = min(max(rho, low), high)
            loss = -min(rho * advantage[t], held * advantage[t])
            if o.policy in ("reinforce", "cispo"):
                loss = -advantage[t] * pi[t] * (held if o.policy == "cispo" else 1)
            clipped = {"reinforce": False, "cispo": held != rho}.get(o.policy, held * advantage[t] < rho * advantage[t])
            v = math.exp(old[t] - sampler[t])
            judged = v if o.importance != "mask_sequences" else math.exp(statistics.fmean(old[u] - sampler[u] for u in tokens))
            dropped = o.importance.startswith("mask") and not o.importance_low <= judged <= o.importance_high
            if o.importance == "truncate":
                loss *= min(v, o.importance_high)
            elif o.importance != "none":
                loss *= 0 if dropped else v
            if o.kl != "none" and o.kl_place == "loss":
                loss += o.kl_weight * naive_kl(o.kl, pi[t] - step.reference[t].item())
            loss -= o.entropy_weight * step.entropies[t].item()
            for k, term in enumerate((loss, clipped, dropped)):
                sums[k] += term / (len(tokens) if o.aggregation == "sequence" else 1)
    sequences = sum(1 for tokens in own if tokens)
    n = {"token": sum(mask), "sequence": sequences, "constant": sequences * o.fixed_length}[o.aggregation]
    return tuple(total / max(n, 1) for total in sums)


@given(objectives(), steps)
def test_advantages_and_losses_are_those_of_a_naive_loop(objective, step):
    found = advantages(objective, step.rewards, step.groups, step.tokens(), step.values, step.bootstrap)
    wanted, returns, mask = naive_advantages(objective, step)
    assert found.mask.tolist() == mask
    torch.testing.assert_close(found.tokens, torch.tensor(wanted, dtype=torch.float64), **CLOSE)
    if objective.advantage == "gae":
        torch.testing.assert_close(found.returns, torch.tensor(returns, dtype=torch.float64), **CLOSE)
    loss, *_, clipped, dropped, _ = outcome(objective, step).losses.tolist()
    assert (loss, clipped, dropped) == pytest.approx(naive_loss(objective, step), rel=1e-10, abs=1e-12)


@settings(max_examples=300)  # about one pair in eight has the same formula
@given(objectives(), st.sampled_from([field.name for field in dataclasses.fields(Objective)]), steps, st.data())
def test_what_the_formula_does_not_name_has_no_effect(objective, key, step, data):
    field = next(field for field in dataclasses.fields(Objective) if field.name == key)
    others = get_args(field.type) or (0.1, 0.55, 0.95, 1.1)
    try:
        other = replace(objective, **{key: data.draw(st.sampled_from(others))})
    except ObjectiveError:
        assume(False)
    if formula(objective) == formula(other):
        first, second = outcome(objective, step), outcome(other, step)
        torch.testing.assert_close(first.losses[:-1], second.losses[:-1], rtol=0, atol=0)
        torch.testing.assert_close(first.gradients[:2], second.gradients[:2], rtol=0, atol=0)
        if objective.advantage == "gae":
            assert_same(first, second, rtol=0, atol=0)


def test_the_formula_of_the_default_is_the_reports_with_its_corrections():
    assert formula(Objective()).splitlines() == [
        "loss = 1/N sum_i sum_t [ -w_it min(rho_it A_it, clip(rho_it, 0.8, 1.28) A_it) ]",
        "A_it = (R_i - mean(R over its group))",
        "R_i = reward of i",
        "rho_it = pi_it / pi_old_it",
        "w_it = const(min(v_it, 2)) with v_it = pi_old_it / pi_sampler_it",
        "N = tokens of the whole step; only tokens of the model's own count",
        "log-ratios are held within -20 and 20 before exp",
        "groups whose rewards differ by 1e-06 at most are left out, of N, too",
    ]


# ------------------------------------------------------------------------------------------------------------------ laws


def check_masked_tokens(objective: Objective, step: Step) -> None:
    """Neither their numbers nor their presence matter."""
    whole = outcome(objective, step)
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e300, 0.0], dtype=torch.float64).repeat(len(step.ids))[: len(step.ids)]
    spoilt = replace(step, **{name: torch.where(step.mask, getattr(step, name), junk) for name in NUMBERS})
    assert_same(whole, outcome(objective, spoilt), rtol=0, atol=0)
    assert not whole.gradients[:, ~whole.mask].any()
    others = torch.cat([torch.ones(1, dtype=torch.bool), step.ids[1:] != step.ids[:-1]])  # each sequence keeps a token
    places = (step.mask | others).nonzero().flatten()
    assert_same(whole, outcome(objective, step.with_tokens(lambda x: x[places])), places)


@given(objectives(), steps)
def test_masked_tokens_have_no_effect(objective, step):
    check_masked_tokens(objective, step)


def check_micro_batches(objective: Objective, step: Step, pieces: Sequence[Sequence[int]]) -> None:
    assert_same(outcome(objective, step), outcome(objective, step, pieces))


@given(objectives(), steps, st.data())
def test_micro_batches_and_packing_order_change_neither_loss_nor_gradient(objective, step, data):
    order = data.draw(st.permutations(range(len(step.rewards))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(order)))) | {0, len(order)})
    check_micro_batches(objective, step, [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)])


@given(objectives(), steps, st.data())
def test_the_order_of_sequences_does_not_matter_to_advantages(objective, step, data):
    order = torch.tensor(data.draw(st.permutations(range(len(step.rewards)))))
    new_id = order.argsort()
    places = new_id[step.ids].argsort(stable=True)
    moved = replace(step.with_tokens(lambda x: x[places]), ids=new_id[step.ids][places])
    moved = replace(moved, **{name: getattr(step, name)[order] for name in ("rewards", "groups", "bootstrap")})
    assert_same(outcome(objective, step), outcome(objective, moved), places)


def check_idle_groups(objective: Objective, step: Step, size: int = 2, reward: float = 0.3) -> None:
    """A group of equal rewards changes nothing of the others and has no gradient."""
    extra = make_step(1, [size])
    joined = {name: torch.cat([getattr(step, name), getattr(extra, name)]) for name in (*NUMBERS, "mask", "bootstrap")}
    joined["ids"] = torch.cat([step.ids, extra.ids + len(step.rewards)])
    joined["groups"] = torch.cat([step.groups, extra.groups + int(step.groups.max()) + 1])
    joined["rewards"] = torch.cat([step.rewards, torch.full((size,), reward, dtype=torch.float64)])
    found = outcome(objective, Step(**joined))
    assert not found.gradients[:, len(step.ids) :].any()
    assert_same(found, outcome(objective, step), slice(len(step.ids)))


@given(objectives(), steps, st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_groups_without_a_spread_contribute_nothing_and_change_nothing(objective, step, size, reward):
    assume(objective.relative and (objective.kl == "none" or objective.kl_place == "loss"))
    check_idle_groups(objective, step, size, reward)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 1.0]), min_size=1, max_size=6))
@example([0.1] * 6)
def test_rounding_is_no_spread(rewards):
    found = informative(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.long))
    assert found.tolist() == [max(rewards) - min(rewards) > 0.05] * len(rewards)


@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(-5, 5))
def test_a_reward_for_everybody_changes_no_relative_advantage(seed, size, shift):
    rewards = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    groups = torch.zeros(size, dtype=torch.long)
    for rule in (group_mean, leave_one_out):
        torch.testing.assert_close(rule(rewards + shift, groups), rule(rewards, groups), rtol=0, atol=1e-12)
        assert abs(rule(rewards, groups).sum()) < 1e-12


@given(steps, st.floats(0, 1))
def test_lambda_one_is_return_minus_value(step, gamma):
    rewards = at_last_token(step.rewards, step.mask, step.ids)
    found, returns = gae(rewards, step.values, step.mask, step.ids, gamma, 1.0, step.bootstrap)
    for i in range(len(step.rewards)):
        own = ((step.ids == i) & step.mask).nonzero().flatten().tolist()
        for k, t in enumerate(own):
            ahead = len(own) - k
            wanted = gamma ** (ahead - 1) * step.rewards[i].item() + gamma**ahead * step.bootstrap[i].item()
            assert returns[t].item() == pytest.approx(wanted, abs=1e-12)
            assert found[t].item() == pytest.approx(wanted - step.values[t].item(), abs=1e-12)


@given(st.integers(0, 10**6), steps)
def test_the_critics_loss_is_the_naive_one(seed, step):
    objective = named("ppo")
    old = step.values + 0.5 * torch.randn(len(step.ids), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    targets = step.entropies
    found = value_loss(objective, step.values, old, targets, step.tokens(), count(objective, step.mask, step.ids))
    wanted = 0.0
    for v, before, target, counts in zip(*(x.tolist() for x in (step.values, old, targets, step.mask)), strict=True):
        held = min(max(v, before - 0.2), before + 0.2)
        wanted += counts * max((v - target) ** 2, (held - target) ** 2) / 2
    assert found.item() == pytest.approx(wanted / max(int(step.mask.sum()), 1), rel=1e-10)


def test_a_step_in_which_nothing_counts_has_no_loss():
    step = replace(make_step(0, [3]), rewards=torch.ones(3, dtype=torch.float64))
    for aggregation in ("token", "sequence"):
        found = outcome(Objective(aggregation=aggregation), step)
        assert not found.losses[:6].any() and not found.gradients[:2].any()


@given(objectives())
def test_losses_never_wait_for_the_numbers(objective):
    """Tensors without data would raise where the host reads one, which on a GPU it would have to wait for."""
    step = make_step(0, [3, 2]).with_tokens(lambda x: x.to("meta"))
    total = count(objective, step.mask, step.ids)
    policy_loss(objective, step.log_probs.requires_grad_(), step.tokens(), step.values, total, step.entropies).total.backward()
    value_loss(objective, step.values, step.values, step.values, step.tokens(), total)


def test_very_unlikely_tokens_give_finite_gradients():
    step = make_step(0, [4])
    for policy in ("clip", "gspo", "cispo"):
        far = replace(step.with_tokens(lambda x: x.float() if x.is_floating_point() else x), old=step.old.float() - 500)
        found = outcome(Objective(policy=policy, kl="k3", kl_weight=0.1), far)
        assert found.losses.isfinite().all() and found.gradients.isfinite().all()


# ----------------------------------------------------------------------------------------------- planted faults are found

_aggregate, _count, _sum_within, _policy_loss = algorithms.aggregate, count, algorithms.sum_within, policy_loss


def _divide_by_the_micro_batch(objective, losses, mask, ids, total):
    return _aggregate(objective, losses, mask, ids, _count(objective, mask, ids))


def _forget_the_mask(objective, losses, mask, ids, total):
    return _aggregate(objective, losses, torch.ones_like(mask), ids, total)


def _mean_over_batch(advantages: Tensor, mask: Tensor) -> Tensor:
    """The statistics of all tokens, whether they count or not."""
    return ((advantages - advantages.mean()) / advantages.std()).masked_fill(~mask, 0)


STEP, PIECES = make_step(3, [3, 3, 2]), [[5, 1], [0], [7, 6, 2], [3, 4]]
ENTROPY = Objective(entropy_weight=0.2)
PLANTED = {
    "divide by the micro-batch": (
        algorithms,
        "aggregate",
        _divide_by_the_micro_batch,
        lambda: check_micro_batches(ENTROPY, STEP, PIECES),
    ),
    "forget the mask": (algorithms, "aggregate", _forget_the_mask, lambda: check_masked_tokens(ENTROPY, STEP)),
    "normalise by what does not count": (
        advantages_module,
        "batch_normalised",
        _mean_over_batch,
        lambda: check_idle_groups(Objective(normalise="batch"), STEP),
    ),
    "groups without a spread count": (
        advantages_module,
        "informative",
        lambda rewards, groups: torch.ones_like(rewards, dtype=torch.bool),
        lambda: check_idle_groups(ENTROPY, STEP),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, monkeypatch):
    where, name, wrong, check = PLANTED[fault]
    check()
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check()


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", NAMED)
def test_every_named_objective_exists_and_has_a_formula_of_its_own(name):
    def build(which: str) -> Objective:
        return named(which, **{"fixed_length": 9} if NAMED[which].get("aggregation") == "constant" else {})

    assert [other for other in NAMED if formula(build(other)) == formula(build(name))] == [name]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"advantage": "grpo"}, "advantage is 'grpo'; wanted one of group_mean, leave_one_out, return, gae"),
        ({"clip_low": 0.0}, "clip_low is 0.0; wanted above 0, 1 at most"),
        ({"clip_high": math.nan}, "clip_high is nan"),
        ({"gamma": 1.1}, "gamma is 1.1; wanted 0 to 1"),
        ({"kl_weight": 0.1}, "kl_weight is 0.1; wanted above 0 with a kl, else 0"),
        ({"kl": "k3"}, "kl_weight is 0.0; wanted above 0 with a kl"),
        ({"aggregation": "constant"}, "fixed_length is 0; wanted above 0 with aggregation 'constant'"),
        ({"fixed_length": 5}, "fixed_length is 5; wanted"),
        ({"advantage": "gae", "normalise": "group"}, "normalise is 'group'; wanted 'group' only with"),
        ({"importance_low": 1.5}, "importance_low is 1.5"),
        ({"importance_high": 0.5}, "importance_high is 0.5"),
        ({"entropy_weight": -1.0}, "entropy_weight is -1.0"),
        ({"value_clip": 0.0}, "value_clip is 0.0"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ObjectiveError, match=message):
        Objective(**values)


def test_unknown_names_are_refused():
    with pytest.raises(ObjectiveError, match="objective 'ppo2' does not exist; wanted one of grpo,"):
        named("ppo2")


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        (Objective(), {"rewards": torch.tensor([0.0, math.nan])}, r"rewards of sequences \[1\] are not finite"),
        (Objective(), {"rewards": torch.tensor([0, 1])}, "rewards are torch.int64"),
        (Objective(), {"rewards": torch.tensor([0.0])}, "wanted floating ones, one each"),
        (Objective(), {"mask": torch.ones(3)}, "mask is torch.float32"),
        (Objective(), {"old": torch.ones(1)}, r"old_log_probs is of shape \(1,\); wanted"),
        (Objective(), {"log_probs": torch.ones(1)}, r"log_probs is of shape \(1,\); wanted"),
        (Objective(), {"old": torch.ones(7, requires_grad=True)}, "old_log_probs has a gradient; wanted a constant: detach it"),
        (named("ppo"), {"values": None}, "found no values"),
        (named("ppo"), {"values": torch.ones(1)}, r"values is of shape \(1,\)"),
        (named("ppo"), {"bootstrap": torch.ones(5)}, r"bootstrap is of shape \(5,\); wanted \(2,\)"),
        (Objective(kl="k1", kl_place="reward", kl_weight=1.0), {"reference": None}, "found no reference_log_probs"),
        (Objective(kl="k3", kl_weight=1.0), {"reference": None}, "found no reference_log_probs"),
        (ENTROPY, {"entropies": None}, "there are no entropies"),
    ],
)
def test_batches_that_lack_something_are_refused(objective, change, message):
    step = replace(make_step(2, [2]), **change)
    with pytest.raises(ObjectiveError, match=message):
        tokens = step.tokens()
        found = advantages(objective, step.rewards, step.groups, tokens, step.values, step.bootstrap)
        total = count(objective, found.mask, step.ids)
        policy_loss(objective, step.log_probs, tokens, found.tokens, total, step.entropies)
