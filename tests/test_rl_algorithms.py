"""The exact-gradient oracle: on a policy whose every response can be listed, the expected gradient of each objective, summed
over all responses and groups with their probabilities, is the one that is claimed, with any bias in closed form.

The policy is a table: a row of logits for each prefix, over three tokens of which 0 ends; 15 responses of at most 3 tokens.
Before each response and after its first token stands a token that is not the model's, and whose numbers are all NaN.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minglm.rl import advantages as advantages_module
from minglm.rl import algorithms
from minglm.rl.advantages import advantages, gae
from minglm.rl.algorithms import Tokens, count, policy_loss, value_loss
from minglm.rl.objective import Objective

VOCABULARY = 3
CLOSE = {"rtol": 0, "atol": 1e-11}


class Tree:
    """All prefixes and responses of at most `length` tokens; with `ends`, token 0 is the last one wherever it stands."""

    def __init__(self, length: int, ends: bool = True):
        self.prefixes = [()]
        self.responses = []
        for prefix in self.prefixes:  # grows while it is read
            for token in range(VOCABULARY):
                if (ends and token == 0) or len(prefix) + 1 == length:
                    self.responses.append((*prefix, token))
                else:
                    self.prefixes.append((*prefix, token))
        self.steps = [  # of each response: the entries of the flattened table that it takes
            [self.prefixes.index(response[:t]) * VOCABULARY + response[t] for t in range(len(response))]
            for response in self.responses
        ]
        self.lengths = torch.tensor([len(response) for response in self.responses], dtype=torch.float64)

    def table(self, seed: int, scale: float = 0.7) -> Tensor:
        """Random logits (prefixes, vocabulary)."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(len(self.prefixes), VOCABULARY, dtype=torch.float64, generator=generator)

    def rewards(self, seed: int = 5) -> Tensor:
        return torch.rand(len(self.responses), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def right_or_wrong(self) -> Tensor:
        return (self.rewards() > 0.6).double()

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of whole responses: (responses,)."""
        flat = logits.log_softmax(-1).flatten()
        return torch.stack([flat[steps].sum() for steps in self.steps])

    def mean(self, logits: Tensor, worth: Tensor) -> Tensor:
        """E[worth of the response], through which the gradient flows."""
        return (self.log_probs(logits).exp() * worth).sum()

    def visits(self, logits: Tensor) -> Tensor:
        """How likely each prefix is to be met: (prefixes,), a constant."""
        flat = logits.detach().log_softmax(-1).flatten()
        found = []
        for prefix in self.prefixes:
            steps = [self.prefixes.index(prefix[:t]) * VOCABULARY + prefix[t] for t in range(len(prefix))]
            found.append(flat[steps].sum().exp())
        return torch.stack(found)

    def values(self, logits: Tensor, rewards: Tensor) -> Tensor:
        """What is still to come at each prefix, exactly: (prefixes,), a constant."""
        likely = self.log_probs(logits.detach()).exp()
        found = []
        for prefix in self.prefixes:
            below = torch.tensor([response[: len(prefix)] == prefix for response in self.responses])
            found.append((likely * rewards)[below].sum() / likely[below].sum())
        return torch.stack(found)


TREE, BANDIT, EVEN = Tree(3), Tree(1), Tree(2, ends=False)
NONE = dict(importance="none")
FLAT = dict(aggregation="constant", fixed_length=1, **NONE)  # the mean over sequences of their sums, and nothing more


def gradient(of: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(of, logits)[0]


def at(tree: Tree, seed: int = 1) -> Tensor:
    return tree.table(seed).requires_grad_()


def pack(tree: Tree, responses: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Which entry of the table each token takes (one past the end: none), the mask, and the sequences' ids."""
    nothing = len(tree.prefixes) * VOCABULARY
    rows = [[nothing, steps[0], nothing, *steps[1:]] for steps in (tree.steps[index] for index in responses)]
    entries = torch.tensor([entry for row in rows for entry in row])
    return entries, entries < nothing, torch.tensor([i for i, row in enumerate(rows) for _ in row])


def per_token(table: Tensor, entries: Tensor) -> Tensor:
    return torch.cat([table.flatten(), table.new_tensor([math.nan])])[entries]


def expected_gradient(
    tree: Tree,
    objective: Objective,
    logits: Tensor,
    rewards: Tensor,
    size: int = 1,
    groups: int = 1,
    sampler: Tensor | None = None,  # logits of the policy that the responses are drawn from; its old one, unless
    old: Tensor | None = None,  # the trainer's are others
    reference: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Minus the expected gradient of the loss of a step of some groups of some responses: the direction that is taken."""
    sampler = logits.detach() if sampler is None else sampler
    old = sampler if old is None else old
    likely = tree.log_probs(sampler).exp().tolist()
    entropies = algorithms.entropy(logits)[:, None].expand(-1, VOCABULARY)
    values = None if values is None else values[:, None].expand(-1, VOCABULARY)
    total = torch.zeros((), dtype=torch.float64)
    for step, probability in steps_of(likely, size, groups):
        entries, mask, ids = pack(tree, step)
        numbers = [per_token(table.log_softmax(-1), entries) for table in (logits, old, sampler)]
        tokens = Tokens(mask, ids, *numbers[1:], None if reference is None else per_token(reference.log_softmax(-1), entries))
        found = advantages(
            objective,
            rewards[list(step)],
            torch.arange(groups).repeat_interleave(size),
            tokens,
            None if values is None else per_token(values, entries),
        )
        tokens = replace(tokens, mask=found.mask)
        parts = count(objective, found.mask, ids)
        loss = policy_loss(objective, numbers[0], tokens, found.tokens, parts, per_token(entropies, entries)).total
        total = total + probability * loss
    return -gradient(total, logits)


def steps_of(likely: Sequence[float], size: int, groups: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """All groups of responses, once for all orders of their members, and all steps of these; with probabilities."""
    single = []
    for members in itertools.combinations_with_replacement(range(len(likely)), size):
        orders = math.factorial(size) / math.prod(math.factorial(n) for n in Counter(members).values())
        single.append((members, orders * math.prod(likely[member] for member in members)))
    for step in itertools.product(single, repeat=groups):
        yield sum((members for members, _ in step), ()), math.prod(probability for _, probability in step)


# ----------------------------------------------------------------------------------------------------- without any bias

ANY_LOSS = pytest.mark.parametrize("policy", ["reinforce", "clip", "gspo", "cispo"])


@ANY_LOSS
@pytest.mark.parametrize(("advantage", "size"), [("return", 1), ("leave_one_out", 2)])
def test_unbiased_estimators_have_the_exact_gradient(policy, advantage, size):
    check_unbiased(policy, advantage, size)


def test_leave_one_out_of_three_has_the_exact_gradient():
    check_unbiased(size=3)


def check_unbiased(policy: str = "clip", advantage: str = "leave_one_out", size: int = 2) -> None:
    logits, rewards = at(TREE), TREE.rewards()
    found = expected_gradient(TREE, Objective(advantage=advantage, policy=policy, **FLAT), logits, rewards, size)
    torch.testing.assert_close(found, gradient(TREE.mean(logits, rewards), logits), **CLOSE)


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_is_exact_but_for_the_share_of_the_baseline_that_is_its_own(size):
    check_group_mean(size)


def check_group_mean(size: int = 2) -> None:
    logits, rewards = at(TREE), TREE.rewards()
    exact = gradient(TREE.mean(logits, rewards), logits)
    found = expected_gradient(TREE, Objective(**FLAT), logits, rewards, size)
    torch.testing.assert_close(found, (size - 1) / size * exact, **CLOSE)
    dr_grpo = Objective(**FLAT | {"fixed_length": 3})
    torch.testing.assert_close(expected_gradient(TREE, dr_grpo, logits, rewards, size), (size - 1) / size / 3 * exact, **CLOSE)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_an_exact_critic_gives_the_exact_gradient_for_any_lambda(gae_lambda):
    logits, rewards = at(TREE), TREE.rewards()
    ppo = Objective(advantage="gae", gae_lambda=gae_lambda, **FLAT)
    found = expected_gradient(TREE, ppo, logits, rewards, values=TREE.values(logits, rewards))
    torch.testing.assert_close(found, gradient(TREE.mean(logits, rewards), logits), **CLOSE)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_a_wrong_critic_biases_by_its_errors_to_come(gae_lambda):
    check_wrong_critic(gae_lambda)


def check_wrong_critic(gae_lambda: float = 0.5) -> None:
    logits, rewards = at(TREE), TREE.rewards()
    error = torch.randn(len(TREE.prefixes), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ppo = Objective(advantage="gae", gae_lambda=gae_lambda, **FLAT)
    found = expected_gradient(TREE, ppo, logits, rewards, values=TREE.values(logits, rewards) + error)
    flat, likely = logits.log_softmax(-1).flatten(), TREE.log_probs(logits).exp().detach()
    bias = torch.zeros((), dtype=torch.float64)
    for probability, steps in zip(likely, TREE.steps, strict=True):
        for t, step in enumerate(steps):
            later = [gae_lambda ** (ahead - 1) * error[steps[t + ahead] // VOCABULARY] for ahead in range(1, len(steps) - t)]
            bias = bias + probability * flat[step] * (1 - gae_lambda) * sum(later)
    bias = gradient(bias, logits)
    exact = gradient(TREE.mean(logits, rewards), logits)
    torch.testing.assert_close(found, exact + bias, **CLOSE)
    assert (bias.abs().max() < 1e-12) == (gae_lambda == 1)


def test_the_critic_learns_the_values_that_it_meets():
    """E[grad value loss] at prefix s = P(s is met) (V(s) - V^pi(s)), for targets of lambda = 1 and no clip."""
    logits, rewards = at(TREE), TREE.rewards()
    values = torch.randn(len(TREE.prefixes), dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    objective = Objective(advantage="gae", value_clip=math.inf, **FLAT)
    total = torch.zeros((), dtype=torch.float64)
    for step, probability in steps_of(TREE.log_probs(logits).exp().tolist(), 1, 1):
        entries, mask, ids = pack(TREE, step)
        unused = per_token(logits.detach(), entries)
        said = per_token(values[:, None].expand(-1, VOCABULARY), entries)
        tokens = Tokens(mask, ids, unused, unused)
        targets = advantages(objective, rewards[list(step)], torch.tensor([0]), tokens, said).returns
        assert targets is not None and not targets.requires_grad
        loss = value_loss(objective, said, said.detach(), targets, tokens, count(objective, mask, ids))
        total = total + probability * loss
    wanted = TREE.visits(logits) * (values - TREE.values(logits, rewards)).detach()
    torch.testing.assert_close(gradient(total, values), wanted, **CLOSE)


# ------------------------------------------------------------------------------------------- biased, by how much is known


@pytest.mark.parametrize("size", [2, 3])
def test_the_groups_std_follows_the_arcsine_of_the_success_rate(size):
    check_group_std(size)


def check_group_std(size: int = 2) -> None:
    logits, right = at(TREE), TREE.right_or_wrong()
    rate = TREE.mean(logits, right)
    p = rate.item()
    deviation = sum(
        math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k * (size - k) / size / (size - 1))
        for k in range(size + 1)
    )
    found = expected_gradient(TREE, Objective(normalise="group", **FLAT), logits, right, size)
    wanted = (size - 1) / size * deviation / (p * (1 - p)) * gradient(rate, logits)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_the_groups_std_of_two_knows_only_who_won():
    """A_1 = (r_1 - r_2) / 2 over |r_1 - r_2| / sqrt(2), whatever the rewards."""
    logits, rewards = at(TREE), TREE.rewards()
    found = expected_gradient(TREE, Objective(normalise="group", **FLAT), logits, rewards, 2)
    likely = TREE.log_probs(logits).exp().detach()
    wins = torch.sign(rewards[:, None] - rewards) @ likely
    torch.testing.assert_close(found, gradient(TREE.mean(logits, wins), logits) / math.sqrt(2), **CLOSE)


@pytest.mark.parametrize("size", [2, 3])
def test_reinforce_plus_plus_scales_by_the_whole_batch(size):
    logits, right = at(EVEN), EVEN.right_or_wrong()
    rate, n = EVEN.mean(logits, right), 2
    p = rate.item()
    deviation = sum(
        math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(n * k * (size - k) / size / (n * size - 1))
        for k in range(size + 1)
    )
    objective = Objective(advantage="return", normalise="batch", **FLAT)
    found = expected_gradient(EVEN, objective, logits, right, size=1, groups=size)  # one response to each prompt
    wanted = (n * size - 1) / (n * size) * deviation / (p * (1 - p)) * gradient(rate, logits)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize(("policy", "size"), [("clip", 2), ("clip", 3), ("gspo", 2)])
def test_the_mean_of_sequences_favours_short_right_answers_and_long_wrong_ones(policy, size):
    check_sequence_mean(policy, size)


def check_sequence_mean(policy: str = "clip", size: int = 2) -> None:
    logits, rewards = at(TREE), TREE.rewards()
    objective = Objective(advantage="leave_one_out", policy=policy, aggregation="sequence", **NONE)
    found = expected_gradient(TREE, objective, logits, rewards, size)
    worth = (rewards - TREE.mean(logits, rewards).detach()) / TREE.lengths
    torch.testing.assert_close(found, gradient(TREE.mean(logits, worth), logits), **CLOSE)


def test_the_mean_of_tokens_divides_by_what_was_drawn():
    logits, rewards = at(TREE), TREE.rewards()
    found = expected_gradient(TREE, Objective(**NONE), logits, rewards, 2)
    likely = TREE.log_probs(logits).exp().detach()
    worth = ((rewards[:, None] - rewards) / (TREE.lengths[:, None] + TREE.lengths)) @ likely
    torch.testing.assert_close(found, gradient(TREE.mean(logits, worth), logits), **CLOSE)


def test_leaving_out_groups_without_a_spread_only_lengthens_the_step():
    check_informative()


def check_informative() -> None:
    tree = Tree(2)
    logits, right = at(tree), tree.right_or_wrong()
    rate = tree.mean(logits, right)
    spread = 2 * rate.item() * (1 - rate.item())
    found = expected_gradient(tree, Objective(**FLAT), logits, right, size=2, groups=2)
    wanted = (1 - (1 - spread) ** 2) / spread * gradient(rate, logits) / 2
    torch.testing.assert_close(found, wanted, **CLOSE)


# ---------------------------------------------------------------------------------------------------------- off policy


def pull(tree: Tree, logits: Tensor, sampler: Tensor, worth: Callable[[int, int], float]) -> Tensor:
    """E_sampler[sum_t worth(response, t) grad log pi_t], by the definition."""
    flat, likely = logits.log_softmax(-1).flatten(), tree.log_probs(sampler).exp().tolist()
    terms = [
        likely[index] * worth(index, t) * flat[step] for index, steps in enumerate(tree.steps) for t, step in enumerate(steps)
    ]
    return gradient(torch.stack(terms).sum(), logits)


def ratios(tree: Tree, over: Tensor, under: Tensor) -> list[list[float]]:
    difference = (over.log_softmax(-1) - under.log_softmax(-1)).detach().flatten()
    return [difference[steps].exp().tolist() for steps in tree.steps]


CENTRED = [TREE.rewards() - 0.5, BANDIT.rewards() - 0.5]  # so that there are advantages of both signs


def test_the_clip_leaves_out_what_has_moved_far_enough():
    check_clip()


def check_clip() -> None:
    logits, sampler, objective = at(TREE), TREE.table(2), Objective(advantage="return", **FLAT)
    moved, rewards = ratios(TREE, logits, sampler), CENTRED[0]
    acts = [
        [(r > 0 and rho > 1.28) or (r < 0 and rho < 0.8) for rho in row] for row, r in zip(moved, rewards.tolist(), strict=True)
    ]
    assert {True, False} == {act for row in acts for act in row}
    found = expected_gradient(TREE, objective, logits, rewards, sampler=sampler)
    all_of_it = pull(TREE, logits, sampler, lambda i, t: moved[i][t] * rewards[i].item())
    left_out = pull(TREE, logits, sampler, lambda i, t: acts[i][t] * moved[i][t] * rewards[i].item())
    torch.testing.assert_close(found, all_of_it - left_out, **CLOSE)


@pytest.mark.parametrize("policy", ["clip", "cispo", "gspo"])
def test_for_one_token_the_bias_off_policy_is_the_clips_alone(policy):
    logits, sampler, rewards = at(BANDIT), BANDIT.table(6), CENTRED[1]
    exact = gradient(BANDIT.mean(logits, rewards), logits)
    wide = Objective(advantage="return", policy=policy, clip_low=1.0, clip_high=1e6, **FLAT)
    torch.testing.assert_close(expected_gradient(BANDIT, wide, logits, rewards, sampler=sampler), exact, **CLOSE)
    rho = torch.tensor(ratios(BANDIT, logits, sampler), dtype=torch.float64).flatten()
    held = rho.clamp(0.8, 1.28) if policy == "cispo" else torch.where((rho * rewards > rho.clamp(0.8, 1.28) * rewards), 0, rho)
    found = expected_gradient(BANDIT, replace(wide, clip_low=0.2, clip_high=0.28), logits, rewards, sampler=sampler)
    bias = pull(BANDIT, logits, sampler, lambda i, t: ((held - rho) * rewards)[i].item())
    torch.testing.assert_close(found, exact + bias, **CLOSE)
    assert bias.abs().max() > 0.01


def test_gspo_is_the_gradient_of_the_sequences_own_clipped_ratio():
    logits, sampler, rewards = at(TREE), TREE.table(2), CENTRED[0]
    objective = Objective(advantage="return", policy="gspo", aggregation="sequence", clip_low=0.1, clip_high=0.1, **NONE)
    s = ((TREE.log_probs(logits) - TREE.log_probs(sampler)) / TREE.lengths).exp()
    surrogate = torch.minimum(s * rewards, s.clamp(0.9, 1.1) * rewards)
    wanted = gradient((TREE.log_probs(sampler).exp() * surrogate).sum(), logits)
    torch.testing.assert_close(expected_gradient(TREE, objective, logits, rewards, sampler=sampler), wanted, **CLOSE)


def test_the_importance_correction_of_one_token_is_exact_up_to_its_bound():
    check_truncation()


def check_truncation() -> None:
    logits, sampler, rewards = at(BANDIT), BANDIT.table(6), CENTRED[1]
    exact = gradient(BANDIT.mean(logits, rewards), logits)
    loose = Objective(advantage="return", **FLAT | {"importance": "truncate"}, importance_high=1e6)
    sides = dict(sampler=sampler, old=logits.detach())
    torch.testing.assert_close(expected_gradient(BANDIT, loose, logits, rewards, **sides), exact, **CLOSE)
    v = ratios(BANDIT, logits, sampler)
    bound = 1.1
    found = expected_gradient(BANDIT, replace(loose, importance_high=bound), logits, rewards, **sides)
    bias = pull(BANDIT, logits, sampler, lambda i, t: -max(v[i][t] - bound, 0) * rewards[i].item())
    torch.testing.assert_close(found, exact + bias, **CLOSE)
    assert bias.abs().max() > 0.01


@ANY_LOSS
@pytest.mark.parametrize("importance", ["none", "truncate", "mask_tokens", "mask_sequences"])
def test_the_importance_correction_of_tokens_misses_the_states(policy, importance):
    logits, sampler, rewards = at(TREE), TREE.table(2), CENTRED[0]
    low, high = 0.7, 1.2
    objective = Objective(
        advantage="return", policy=policy, **FLAT | dict(importance=importance), importance_low=low, importance_high=high
    )
    v = ratios(TREE, logits, sampler)

    def weight(i: int, t: int) -> float:
        if importance == "none":
            return 1.0
        if importance == "truncate":
            return min(v[i][t], high)
        judged = v[i][t] if importance == "mask_tokens" else math.prod(v[i]) ** (1 / len(v[i]))
        return v[i][t] if low <= judged <= high else 0.0

    found = expected_gradient(TREE, objective, logits, rewards, sampler=sampler, old=logits.detach())
    exact = gradient(TREE.mean(logits, rewards), logits)
    bias = pull(TREE, logits, sampler, lambda i, t: (weight(i, t) - math.prod(v[i])) * rewards[i].item())
    torch.testing.assert_close(found, exact + bias, **CLOSE)
    assert bias.abs().max() > 0.01


# ------------------------------------------------------------------------------------------- divergences and the entropy

WEIGHT = 0.3


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of the next token at each prefix, from logits: (prefixes,)."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def kl_gradient(place: str, kind: str, sampler: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the penalty adds to the direction, over minus its weight; and the logits and the reference's."""
    logits, reference, nothing = at(TREE), TREE.table(4), torch.zeros(len(TREE.responses), dtype=torch.float64)
    objective = Objective(advantage="return", kl=kind, kl_place=place, kl_weight=WEIGHT, **FLAT)
    found = expected_gradient(TREE, objective, logits, nothing, sampler=sampler, reference=reference)
    return found / -WEIGHT, logits, reference


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_divergence_in_the_reward(kind):
    check_kl_in_reward(kind)


def check_kl_in_reward(kind: str = "k1") -> None:
    found, logits, reference = kl_gradient("reward", kind)
    log_pi, log_reference = TREE.log_probs(logits), TREE.log_probs(reference)
    exact = gradient((log_pi.exp() * (log_pi - log_reference)).sum(), logits)
    visits = TREE.visits(logits)
    if kind == "k1":
        wanted = exact
    elif kind == "k3":
        wanted = exact - gradient((visits * divergence(reference, logits)).sum(), logits)
    else:
        squares = (logits.log_softmax(-1) - reference.log_softmax(-1)).flatten().square() / 2
        sums = torch.stack([squares[steps].sum() for steps in TREE.steps])
        held = gradient((visits * divergence(logits, reference)).sum(), logits)
        wanted = gradient((TREE.log_probs(logits).exp() * sums).sum(), logits) - held
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert kind == "k1" or (found - exact).abs().max() > 0.01


def test_k1_in_the_reward_of_a_group_is_exact_too():
    logits, reference, rewards = at(TREE), TREE.table(4), TREE.rewards()
    objective = Objective(advantage="leave_one_out", kl="k1", kl_place="reward", kl_weight=WEIGHT, **FLAT)
    found = expected_gradient(TREE, objective, logits, rewards, 2, reference=reference)
    log_pi = TREE.log_probs(logits)
    wanted = (log_pi.exp() * (rewards - WEIGHT * (log_pi - TREE.log_probs(reference)))).sum()
    torch.testing.assert_close(found, gradient(wanted, logits), **CLOSE)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_divergence_in_the_loss(kind):
    check_kl_in_loss(kind)


def check_kl_in_loss(kind: str = "k3") -> None:
    found, logits, reference = kl_gradient("loss", kind)
    directions = {"k2": (logits, reference), "k3": (reference, logits)}
    wanted = torch.zeros_like(found)
    if kind in directions:
        wanted = gradient((TREE.visits(logits) * divergence(*directions[kind])).sum(), logits)
        assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_k3_in_the_loss_off_policy_has_the_derived_bias():
    sampler = TREE.table(2)
    found, logits, reference = kl_gradient("loss", "k3", sampler)
    away, moved = ratios(TREE, reference, logits), ratios(TREE, logits, sampler)
    # Corrected for the choice of the token, it is the other direction's gradient in the sampler's states.
    corrected = gradient((TREE.visits(sampler) * divergence(reference, logits)).sum(), logits)
    bias = pull(TREE, logits, sampler, lambda i, t: (1 - moved[i][t]) * (1 - away[i][t]))
    torch.testing.assert_close(found, corrected + bias, **CLOSE)
    assert bias.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_k1_and_k3_have_the_divergences_value(kind):
    logits, reference = TREE.table(1), TREE.table(4)
    estimate = algorithms.kl_estimate(kind, logits.log_softmax(-1), reference.log_softmax(-1))
    found = (logits.softmax(-1) * estimate).sum(-1)
    assert torch.allclose(found, divergence(logits, reference), atol=1e-12, rtol=0) == (kind != "k2")


def test_the_entropy_bonus_is_that_of_the_states_that_are_visited():
    logits, nothing = at(TREE), torch.zeros(len(TREE.responses), dtype=torch.float64)
    objective = Objective(advantage="return", entropy_weight=WEIGHT, **FLAT)
    found = expected_gradient(TREE, objective, logits, nothing)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found, WEIGHT * gradient((TREE.visits(logits) * entropies).sum(), logits), **CLOSE)


# ----------------------------------------------------------------------------------------------- planted faults are found

_plain = {name: getattr(algorithms, name) for name in ("clipped_surrogate", "sum_within", "reinforce", "ratio")}


def _std_with_k(rewards: Tensor, groups: Tensor) -> Tensor:
    return torch.stack([rewards[groups == group].std(correction=0) for group in groups])


def _clip_without_minimum(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    held = ratios.clamp(1 - low, 1 + high)
    return -held * advantages, held != ratios


def _one_bound_for_both(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return _plain["clipped_surrogate"](ratios, advantages, low, low)


def _mean_of_others_over_k(rewards: Tensor, groups: Tensor) -> Tensor:
    return rewards - (_plain["sum_within"](groups, rewards) - rewards) / len(rewards)


def _gae_of_padding(rewards, values, mask, ids, gamma=1.0, gae_lambda=1.0, bootstrap=None):
    """Counts other tokens as steps of value 0."""
    found, returns = gae(rewards, values.nan_to_num(0), torch.ones_like(mask), ids, gamma, gae_lambda, bootstrap)
    return found.masked_fill(~mask, 0), returns


def _lengths_of_everything(ids: Tensor, values: Tensor) -> Tensor:
    """Counts the tokens that are not the model's."""
    return _plain["sum_within"](ids, torch.ones_like(values) if set(values.tolist()) <= {0.0, 1.0} else values)


PLANTED = {
    "std with K": (advantages_module, "group_std", _std_with_k, check_group_std),
    "own reward in the baseline": (advantages_module, "leave_one_out", advantages_module.group_mean, check_unbiased),
    "others over K": (advantages_module, "leave_one_out", _mean_of_others_over_k, check_unbiased),
    "others in GRPO": (advantages_module, "group_mean", lambda r, g: 2 * (r - r.mean()), check_group_mean),
    "groups without a spread stay": (
        advantages_module,
        "informative",
        lambda rewards, groups: torch.ones_like(rewards, dtype=torch.bool),
        check_informative,
    ),
    "tool results are steps": (advantages_module, "gae", _gae_of_padding, check_wrong_critic),
    "reward at the first token": (
        advantages_module,
        "at_last_token",
        lambda rewards, mask, ids: torch.where((ids.cumsum(0) == 0) & (mask.cumsum(0) == 1) & mask, rewards[ids], 0),
        check_wrong_critic,
    ),
    "no minimum in the clip": (algorithms, "clipped_surrogate", _clip_without_minimum, check_clip),
    "one bound for both": (algorithms, "clipped_surrogate", _one_bound_for_both, check_clip),
    "lengths of everything": (algorithms, "sum_within", _lengths_of_everything, check_sequence_mean),
    "no correction": (algorithms, "importance_weights", lambda o, old, s, m, i: torch.ones_like(old), check_truncation),
    "correction upside down": (
        algorithms,
        "importance_weights",
        lambda o, old, sampler, m, i: (sampler - old).exp().clamp(max=o.importance_high).detach(),
        check_truncation,
    ),
    "k3 upside down": (algorithms, "kl_estimate", lambda kind, p, q: (p - q).exp() - 1 - (p - q), check_kl_in_loss),
    "k1 upside down": (advantages_module, "kl_estimate", lambda kind, p, q: q - p, check_kl_in_reward),
    "sign of the loss": (
        algorithms,
        "clipped_surrogate",
        lambda *given: (-_plain["clipped_surrogate"](*given)[0], given[0] > 1),
        check_unbiased,
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, monkeypatch):
    where, name, wrong, check = PLANTED[fault]
    check()
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check()
