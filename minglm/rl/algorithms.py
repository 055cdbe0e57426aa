"""The losses of reinforcement learning on packed tokens: `policy_loss` composes what an `Objective` chooses.

Packed form, as in `minglm.rl.advantages`: flat tensors of n tokens, sequences side by side, `mask` for the tokens that count.
A sequence lies whole in one micro-batch. Every mean is a sum divided by `total`, what the whole step counts: the sum of
`count` over its micro-batches and ranks. So losses and gradients of micro-batches add up to those of one big batch, however
it is cut or packed. Nothing here makes the host wait for the device.

Notation: pi the policy in training, pi_old the trainer's at the weights that sampled, pi_sampler the rollout engine's at the
same weights, const(x) x without its gradient.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minglm.rl.objective import LOG_RATIO_LIMIT, Objective, ObjectiveError


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of some sequences before the step: all (n,), side by side, without gradients."""

    mask: Tensor  # bool
    sequence_ids: Tensor  # int64, from 0 to n - 1 at most: every sequence has a token, of its prompt at least
    old_log_probs: Tensor
    sampler_log_probs: Tensor
    reference_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.ndim != 1:
            raise ObjectiveError(f"mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; wanted bool, (tokens,)")
        for name in ("sequence_ids", "old_log_probs", "sampler_log_probs", "reference_log_probs"):
            found = getattr(self, name)
            if found is not None:
                check_constant(name, found, self.mask)

    def reference(self) -> Tensor:
        """The reference policy's log-probabilities. Raises `ObjectiveError` where there are none."""
        if self.reference_log_probs is None:
            raise ObjectiveError("a KL penalty found no reference_log_probs: wanted those of the reference policy")
        return self.reference_log_probs


def check_shape(name: str, found: Tensor, mask: Tensor) -> None:
    """Raise `ObjectiveError` unless there is one number for each token."""
    if found.shape != mask.shape:
        raise ObjectiveError(f"{name} is of shape {tuple(found.shape)}; wanted {tuple(mask.shape)}, one for each token")


def check_constant(name: str, found: Tensor, mask: Tensor) -> None:
    """`check_shape`; and raise `ObjectiveError` for a gradient, which would cancel that of the ratio without a sign."""
    check_shape(name, found, mask)
    if found.requires_grad:
        raise ObjectiveError(f"{name} has a gradient; wanted a constant: detach it")


class PolicyLoss(NamedTuple):
    """Sums over a micro-batch divided by the step's total, so that those of all micro-batches add up. All 0-dimensional."""

    total: Tensor  # what to call backward on
    policy: Tensor
    kl: Tensor  # the estimate, before its weight; 0 unless the loss holds one
    entropy: Tensor  # likewise
    clipped: Tensor  # the share of tokens that give no gradient, or a held weight, because of the clip
    dropped: Tensor  # the share of tokens that the importance correction gives no weight


def policy_loss(
    objective: Objective,
    log_probs: Tensor,
    tokens: Tokens,
    advantages: Tensor,
    total: Tensor,
    entropies: Tensor | None = None,
) -> PolicyLoss:
    """The loss of a micro-batch: `minglm.rl.objective.formula` writes it out.

    log_probs (n,) of pi, with gradient; tokens, with the mask that `advantages` gave back; advantages (n,);
    total: the sum of `count` over the whole step; entropies (n,), with gradient, where there is a bonus (see `entropy`).
    Tokens outside the mask have no effect, not even as NaN. A step in which nothing counts (total 0) has loss 0.
    Raises `ObjectiveError` for shapes that do not fit, advantages with a gradient, or where entropies or reference
    log-probabilities are missing.
    """
    mask = tokens.mask
    check_shape("log_probs", log_probs, mask)
    check_constant("advantages", advantages, mask)
    # What does not count may be infinite or NaN: it is replaced before any arithmetic, for 0 * NaN is NaN.
    log_probs, advantages, old = (x.masked_fill(~mask, 0) for x in (log_probs, advantages, tokens.old_log_probs))
    weights = importance_weights(objective, old, tokens.sampler_log_probs.masked_fill(~mask, 0), mask, tokens.sequence_ids)
    if objective.policy == "reinforce":
        losses, clipped = reinforce(log_probs, advantages), torch.zeros_like(mask)
    elif objective.policy == "cispo":
        losses, clipped = cispo(log_probs, old, advantages, objective.clip_low, objective.clip_high)
    else:
        ratios = ratio(log_probs - old)
        if objective.policy == "gspo":
            ratios = sequence_ratio(log_probs, old, mask, tokens.sequence_ids)
        losses, clipped = clipped_surrogate(ratios, advantages, objective.clip_low, objective.clip_high)

    def mean(values: Tensor) -> Tensor:
        return aggregate(objective, values, mask, tokens.sequence_ids, total)

    policy = mean(weights * losses)
    kl = entropy_mean = torch.zeros_like(policy)
    if objective.kl != "none" and objective.kl_place == "loss":
        kl = mean(kl_estimate(objective.kl, log_probs, tokens.reference().masked_fill(~mask, 0)))
    if objective.entropy_weight:
        if entropies is None:
            raise ObjectiveError("entropy_weight is above 0, but there are no entropies: wanted one for each token")
        check_shape("entropies", entropies, mask)
        entropy_mean = mean(entropies)
    return PolicyLoss(
        policy + objective.kl_weight * kl - objective.entropy_weight * entropy_mean,
        policy.detach(),
        kl.detach(),
        entropy_mean.detach(),
        mean(clipped.to(policy.dtype)),
        mean((weights == 0).to(policy.dtype)),
    )


def value_loss(
    objective: Objective, values: Tensor, old_values: Tensor, returns: Tensor, tokens: Tokens, total: Tensor
) -> Tensor:
    """The critic's loss (PPO): the mean, as `aggregate` takes it, of

        1/2 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)

    with c = objective.value_clip. values (n,) with gradient; old_values, returns G (n,), of `gae`. -> 0-dimensional.
    A value that has moved by more than c towards G gets no gradient until the next batch. Raises `ObjectiveError` for shapes
    that do not fit, and for old values or returns with a gradient.
    """
    check_shape("values", values, tokens.mask)
    for name, found in (("old_values", old_values), ("returns", returns)):
        check_constant(name, found, tokens.mask)
    values, old_values, returns = (x.masked_fill(~tokens.mask, 0) for x in (values, old_values, returns))
    held = values.clamp(old_values - objective.value_clip, old_values + objective.value_clip)
    losses = torch.maximum((values - returns).square(), (held - returns).square()) / 2
    return aggregate(objective, losses, tokens.mask, tokens.sequence_ids, total)


# ------------------------------------------------------------------------------------------------ how tokens are summed


def count(objective: Objective, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """What these tokens add to the total that a step divides by: (n,) bool, (n,) -> 0-dimensional int64.

    Tokens that count; or sequences that have one, times fixed_length under "constant". From the step's own mask: what
    the importance correction drops still counts, so that dropping never makes the others louder.
    """
    if objective.aggregation == "token":
        return mask.sum()
    sequences = (torch.zeros_like(sequence_ids).index_add(0, sequence_ids, mask.long()) > 0).sum()
    return sequences * objective.fixed_length if objective.aggregation == "constant" else sequences


def aggregate(objective: Objective, losses: Tensor, mask: Tensor, sequence_ids: Tensor, total: Tensor) -> Tensor:
    """The step's mean: (n,) -> 0-dimensional.

        token     1/N sum_i sum_t l_it        N tokens of the step
        sequence  1/N sum_i 1/n_i sum_t l_it  N sequences of the step, n_i tokens of sequence i
        constant  1/N sum_i sum_t l_it        N sequences of the step, times fixed_length

    For policy gradients on policy, "constant" is fixed_length times smaller than the gradient of J = E[r], without bias.
    "sequence" with `leave_one_out` gives grad E[r / n] - J grad E[1 / n], n the length: a right answer is worth more the
    shorter it is, and a wrong one costs less the longer it is (Dr. GRPO, 2503.20783). "token" divides by a number that
    depends on the samples: over K = 2 responses y and y' it is the gradient of E[const(E_y'[(r - r') / (n + n')])], which
    tends to 1 / E[n] times the gradient of J only as the step grows.
    """
    losses = losses.masked_fill(~mask, 0)
    if objective.aggregation == "sequence":
        losses = losses / sum_within(sequence_ids, mask.to(losses.dtype)).clamp(min=1)
    return losses.sum() / total.clamp(min=1)


def sum_within(ids: Tensor, values: Tensor) -> Tensor:
    """For each of n entries the sum of all that have its id: (n,) int64 from 0 to n - 1, (n,) -> (n,)."""
    return torch.zeros_like(values).index_add(0, ids, values)[ids]


# ---------------------------------------------------------------------------------------------------- losses of a token


def ratio(log_ratio: Tensor) -> Tensor:
    """exp, of at most `LOG_RATIO_LIMIT` on either side."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def reinforce(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A_t log pi_t (Williams 1992): on policy the gradient of J. (n,), (n,) -> (n,)."""
    return -advantages * log_probs


def clipped_surrogate(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO (1707.06347), with bounds of their own as in DAPO (2503.14476): -min(rho A, clip(rho, 1 - low, 1 + high) A).

    (n,), (n,) -> losses (n,) and where the clip acts (n,) bool. On policy rho = 1, and the gradient is that of `reinforce`.
    Off policy it is E_old[rho A grad log pi] without the tokens with A > 0, rho > 1 + high or A < 0, rho < 1 - low: that is
    the bias, on top of the states, which stay pi_old's.
    """
    free, held = ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, held), held < free


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """GSPO (2507.18071): rho_it = const(s_i) pi_it / const(pi_it), s_i = exp(1/n_i sum_t log(pi_it / pi_old_it)). -> (n,).

    The paper's form for tokens (GSPO-token), which for one advantage a sequence has the value and gradient of s_i itself.
    Under "sequence" a sequence's gradient on policy is A_i / n_i grad log pi(y_i), biased by length as `aggregate` says.
    """
    lengths = sum_within(sequence_ids, mask.to(log_probs.dtype)).clamp(min=1)
    difference = (log_probs.detach() - old_log_probs).masked_fill(~mask, 0)
    return ratio(sum_within(sequence_ids, difference) / lengths) * (log_probs - log_probs.detach()).exp()


def cispo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, 2506.13585): -const(clip(rho, 1 - low, 1 + high)) A log pi. No token loses its gradient.

    (n,) each -> losses (n,) and where the clip acts (n,) bool. Off policy the bias against E_old[rho A grad log pi] is
    E_old[(clip(rho) - rho) A grad log pi].
    """
    free = ratio(log_probs.detach() - old_log_probs)
    held = free.clamp(1 - low, 1 + high)
    return -held * advantages * log_probs, held != free


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v of each distribution: (n, vocabulary) -> (n,), with gradient.

    As a bonus its gradient is that of the entropy in the states that were visited; that another policy visits others is left
    out, as by everybody.
    """
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


# --------------------------------------------------------------------------------------------- corrections and penalties


def importance_weights(
    objective: Objective, old_log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, sequence_ids: Tensor
) -> Tensor:
    """What each token weighs because another arithmetic sampled it than trains: (n,) each -> (n,), without gradient.

    With v = pi_old / pi_sampler: truncate, min(v, importance_high); mask_tokens, v within the band and 0 outside (IcePop,
    2510.18855); mask_sequences, v where the geometric mean of the sequence's v is within the band, 0 elsewhere.

    v corrects the choice of its token; that the sampler also reached other states is left out: with V_it the product of v over
    the whole sequence, the gradient is off by E_sampler[(w_it - V_it) A grad log pi_it]. For sequences of one token the bias of
    "truncate" is -E_sampler[(v - importance_high)^+ A grad log pi], and 0 where no v exceeds it.
    """
    log_weights = (old_log_probs - sampler_log_probs).detach()
    weights = ratio(log_weights)
    if objective.importance == "none":
        return torch.ones_like(weights)
    if objective.importance == "truncate":
        return weights.clamp(max=objective.importance_high)
    judged = weights
    if objective.importance == "mask_sequences":
        lengths = sum_within(sequence_ids, mask.to(weights.dtype)).clamp(min=1)
        judged = ratio(sum_within(sequence_ids, log_weights.masked_fill(~mask, 0)) / lengths)
    within = (judged >= objective.importance_low) & (judged <= objective.importance_high)
    return weights.masked_fill(~within, 0)


def kl_estimate(kind: str, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Schulman's estimates of KL(pi || reference) from sampled tokens, x = log(pi / reference): (n,), (n,) -> (n,).

        k1 = x    k2 = x^2 / 2    k3 = exp(-x) - 1 + x

    Value on policy: k1 and k3 are unbiased (E[exp(-x)] = 1), k2 is not. Their gradients, with KL_s that of the next token in
    a state s, and "held" for an expectation over the states of pi that takes no gradient itself:

    In the reward (a constant, times grad log pi of the sequence): k1 gives grad KL of sequences exactly. k3 gives
    grad KL - held E[grad KL_s(reference || pi)], and k2 grad E[sum k2] - held E[grad KL_s(pi || reference)], since of
    grad E[k] = E[k grad log pi] + E[grad k] the reward has only the first part.

    In the loss (that other part only): k1 gives E[grad log pi] = 0, noise alone. k2 gives held E[grad KL_s(pi || reference)]:
    unbiased for one token. k3 gives E[(1 - reference / pi) grad log pi] = held E[grad KL_s(reference || pi)], the other
    direction, whose gradient meets that of k2 only near pi = reference. Off policy, samples of mu give
    E_mu[(1 - reference / pi) grad log pi]: what pi has made rare weighs by mu / pi too much, the gradient of no divergence;
    it is off by E_mu[(1 - pi / mu) (1 - reference / pi) grad log pi].
    """
    x = log_probs - reference_log_probs
    if kind == "k1":
        return x
    return x.square() / 2 if kind == "k2" else ratio(-x) - 1 + x
