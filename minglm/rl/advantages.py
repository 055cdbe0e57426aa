"""How much better a response was than could be expected: advantages, from rewards of sequences or of tokens.

Packed form: sequences lie side by side in flat tensors of n tokens; `sequence_ids` (n,) int64 says whose each token is, with
ids from 0 to s - 1 in any order, a sequence's own tokens in theirs; `mask` (n,) bool says which tokens the model itself wrote.
Others, of prompts and tool results, are no steps: whatever stands there has no effect. `groups` (s,) int64 says which prompt
a sequence answers, ids from 0 to s - 1.

An advantage is a constant for the gradient. All of them are computed once for a whole step, before it is cut into
micro-batches: normalisers are the step's. What is said of expected gradients below is for on-policy samples,
L = -1/s sum_i A_i log pi(y_i) and J = E[r]; tests/test_rl_algorithms.py holds it exactly, by summing over all trajectories.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minglm.rl.algorithms import Tokens, check_shape, kl_estimate, sum_within
from minglm.rl.objective import SPREAD, Objective, ObjectiveError


class Advantages(NamedTuple):
    """What `advantages` gives: how much each token is worth, and which tokens count."""

    tokens: Tensor  # (n,), 0 where the mask is not set
    mask: Tensor  # (n,) bool: the batch's, without groups that say nothing
    informative: Tensor  # (s,) bool: whether a sequence's group has a spread of rewards
    returns: Tensor | None  # (n,): what the critic should have said; only with "gae"


@torch.no_grad()
def advantages(
    objective: Objective,
    rewards: Tensor,
    groups: Tensor,
    tokens: Tokens,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Advantages:
    """The advantages that `objective` asks for, of all tokens of a step.

    rewards (s,) floating, groups (s,); values (n,) and bootstrap (s,) as `gae` takes them. Where the KL is in the reward,
    R = reward - weight * estimate(pi_old against pi_reference): of the sequence's sum for advantages relative to a group, of
    each token for the others. Groups are judged by R, and those without a spread leave the mask, so that they do not
    dilute a mean; "return" and "gae" judge by more than the group and keep them.

    Raises `ObjectiveError` for rewards that are not finite, for shapes that do not fit, and for values or reference
    log-probabilities that are missing.
    """
    mask, ids = tokens.mask, tokens.sequence_ids
    if rewards.ndim != 1 or rewards.shape != groups.shape or not rewards.is_floating_point():
        raise ObjectiveError(
            f"rewards are {rewards.dtype} of shape {tuple(rewards.shape)}, groups of {tuple(groups.shape)}: "
            "wanted floating ones, one each for every sequence"
        )
    if not rewards.isfinite().all():
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        raise ObjectiveError(f"rewards of sequences {bad} are not finite: leave these sequences out, or give them a number")
    penalty = rewards.new_zeros(len(ids))
    if objective.kl != "none" and objective.kl_place == "reward":
        reference = tokens.reference()
        penalty = objective.kl_weight * kl_estimate(objective.kl, tokens.old_log_probs, reference).masked_fill(~mask, 0)

    returns = None
    if objective.relative:
        rewards = rewards - torch.zeros_like(rewards).index_add(0, ids, penalty.to(rewards.dtype))
        found = (group_mean if objective.advantage == "group_mean" else leave_one_out)(rewards, groups)
        if objective.normalise == "group":
            found = torch.where(informative(rewards, groups), found / group_std(rewards, groups), 0)
        mask = mask & informative(rewards, groups)[ids]
        found = found[ids].masked_fill(~mask, 0)
    else:
        token_rewards = at_last_token(rewards, mask, ids) - penalty
        if objective.advantage == "gae":
            if values is None:
                raise ObjectiveError("advantage 'gae' found no values: wanted the critic's, one for each token")
            check_shape("values", values, mask)
            if bootstrap is not None and bootstrap.shape != rewards.shape:
                raise ObjectiveError(
                    f"bootstrap is of shape {tuple(bootstrap.shape)}; wanted {tuple(rewards.shape)}, as rewards"
                )
            found, returns = gae(token_rewards, values, mask, ids, objective.gamma, objective.gae_lambda, bootstrap)
        else:
            found, _ = gae(token_rewards, torch.zeros_like(token_rewards), mask, ids, objective.gamma)
    if objective.normalise == "batch":
        found = batch_normalised(found, mask)
    return Advantages(found, mask, informative(rewards, groups), returns)


def informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether a sequence's group has a spread: rewards that differ by more than `SPREAD`. (s,), (s,) -> (s,) bool.

    Where all rewards are equal every centred advantage is 0, or rounding noise, which a standard deviation would blow up.
    Leaving such groups out of the mean multiplies the expected gradient of a step of M groups by (1 - (1 - q)^M) / q, where q
    is the probability of a spread: the same direction, as if hard and easy prompts had not been asked.
    """
    lowest, highest = (
        torch.zeros_like(rewards).scatter_reduce(0, groups, rewards, reduce, include_self=False) for reduce in ("amin", "amax")
    )
    return (highest - lowest > SPREAD)[groups]


def group_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """GRPO without its standard deviation (GLM-4.5 report, 3.2; Dr. GRPO): A_i = r_i - mean_j r_j. (s,), (s,) -> (s,).

    The baseline holds r_i itself: E[-grad L] = (K - 1) / K grad J for groups of K, since r_i - mean = (K - 1) / K (r_i - mean
    of the others) and the others are independent of y_i.
    """
    size = sum_within(groups, torch.ones_like(rewards))
    return torch.where(informative(rewards, groups), rewards - sum_within(groups, rewards) / size, 0)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, 2402.14740): A_i = r_i - mean_(j != i) r_j. (s,), (s,) -> (s,). Unbiased."""
    size = sum_within(groups, torch.ones_like(rewards))
    return torch.where(informative(rewards, groups), group_mean(rewards, groups) * size / (size - 1), 0)


def group_std(rewards: Tensor, groups: Tensor) -> Tensor:
    """The standard deviation of a group's rewards with K - 1, for each of its sequences; NaN for one alone. (s,), (s,) -> (s,).

    GRPO divides by it (DeepSeekMath, 2402.03300), which is biased: for rewards of 0 and 1 and a success rate p, k successes
    of K give s_k^2 = k (K - k) / (K (K - 1)), and

        E[-grad L] = (K - 1) / K * E_k[s_k] / (p (1 - p)) * grad p,   k binomial(K, p),

    since E[grad log pi | success] = grad p / p, and given failure -grad p / (1 - p). For large K that is the gradient of
    2 arcsin(sqrt(p)): very easy and very hard prompts weigh more than in J.
    """
    size = sum_within(groups, torch.ones_like(rewards))
    return (sum_within(groups, group_mean(rewards, groups).square()) / (size - 1)).sqrt()


def batch_normalised(advantages: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE++ (2501.03262): (A - mean) / std over the step's tokens that count, std with their number - 1. (n,) -> (n,).

    Biased like `group_std`, with the whole batch as the group: for K sequences of n tokens each, the formula there holds with
    s_k^2 = n k (K - k) / (K (nK - 1)) and the factor (nK - 1) / (nK). 0 for tokens that are all equal.
    """
    kept = advantages[mask]
    if not len(kept) or kept.max() - kept.min() <= SPREAD:
        return torch.zeros_like(advantages)
    return ((advantages - kept.mean()) / kept.std()).masked_fill(~mask, 0)


def at_last_token(rewards: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Rewards of tokens from rewards of sequences: all of it at the last token that counts, 0 elsewhere. (s,) -> (n,).

    A sequence without a token that counts has no place for its reward.
    """
    places = torch.arange(len(mask), device=mask.device)
    last = torch.full_like(places, -1).scatter_reduce(0, sequence_ids, places.masked_fill(~mask, -1), "amax")
    return torch.where(last[sequence_ids] == places, rewards[sequence_ids], 0)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, 1506.02438), with the tokens that count as the only steps.

        A_t = sum_(l >= 0) (gamma lambda)^l (r_(t+l) + gamma V_(t+l+1) - V_(t+l))

    rewards (n,); values (n,): V_t is the critic's before token t is chosen. After a sequence's last token stands bootstrap
    (s,): 0, or the critic's value where the sequence was cut rather than ended. t + 1 is the next token that counts: after a
    call comes the first token written with the tool's result in view. Returns advantages and returns A + V, (n,) each.

    With the critic's error e = V - V^pi the expected gradient at gamma = 1 is off by

        E[sum_t grad log pi_t * (1 - lambda) sum_(l >= 1) lambda^(l-1) e_(t+l)]:

    nothing for an exact critic or for lambda = 1, where A_t is return minus V_t, and V_t a baseline.
    """
    if bootstrap is None:
        bootstrap = values.new_zeros(int(sequence_ids.max()) + 1 if len(mask) else 0)
    count = len(bootstrap)
    steps = mask.nonzero().flatten()
    steps = steps[sequence_ids[steps].argsort(stable=True)]  # sequence by sequence, each in its order
    rows = sequence_ids[steps]
    lengths = torch.bincount(rows, minlength=count)
    columns = torch.arange(len(steps), device=steps.device) - (lengths.cumsum(0) - lengths)[rows]
    longest = int(lengths.max()) if count else 0

    next_values = values.new_zeros(count, longest + 1)  # (sequence, step), one row each
    next_values[rows, columns] = values[steps]
    next_values[torch.arange(count, device=steps.device), lengths] = bootstrap.to(values.dtype)
    deltas = values.new_zeros(count, longest)
    deltas[rows, columns] = rewards[steps] + gamma * next_values[rows, columns + 1] - next_values[rows, columns]
    for step in range(longest - 2, -1, -1):
        deltas[:, step] += gamma * gae_lambda * deltas[:, step + 1]

    found = torch.zeros_like(values)
    found[steps] = deltas[rows, columns]
    return found, (found + values).masked_fill(~mask, 0)
