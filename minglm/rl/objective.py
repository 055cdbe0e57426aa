"""Which objective a run of reinforcement learning follows, and its exact formula as text.

    objective = Objective()                          # GRPO as in the GLM-4.5 report, without KL
    objective = named("dr_grpo", fixed_length=1024)  # the algorithms of the papers, by name
    print(formula(objective))                        # what the loss really is, with all its numbers

Every algorithm is a choice of the same few parts: the advantage and its scale, the loss of a token, how tokens are summed,
and the corrections. `minglm.rl.advantages` and `minglm.rl.algorithms` compute what is chosen here. Nothing here needs torch.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

SPREAD = 1e-6  # rewards of a group that differ by no more than this are equal, but for rounding
LOG_RATIO_LIMIT = 20.0  # log-ratios are held within: exp of more is so large that 0 times its gradient is NaN in fp32


class ObjectiveError(ValueError):
    """An objective that is not defined, or a batch that lacks what it needs."""


@dataclass(frozen=True)
class Objective:
    """The parts of an objective; `formula` says what they amount to. Raises `ObjectiveError` for values that do not exist
    or contradict each other."""

    advantage: Literal["group_mean", "leave_one_out", "return", "gae"] = "group_mean"
    """Reward minus the mean of its group (GRPO) or of the others in it (RLOO), the return itself, or PPO's with a critic."""
    normalise: Literal["none", "group", "batch"] = "none"
    """Divide advantages by the standard deviation of their group's rewards, or centre and scale all tokens of the step."""
    policy: Literal["reinforce", "clip", "gspo", "cispo"] = "clip"
    """The loss of a token: plain, PPO's clipped ratio, the sequence's ratio clipped, a clipped weight without gradient."""
    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low; 1: not held from below."""
    clip_high: float = 0.28
    """The ratio is held below 1 + clip_high: DAPO's clip-higher where it is more than clip_low."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """The mean of all tokens, the mean of the sequences' means, or the sum over sequences times fixed_length."""
    fixed_length: int = 0
    """What a sequence counts as under "constant", whatever its own length, such as the longest one allowed."""
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """The estimator of the divergence from the reference policy: `minglm.rl.algorithms.kl_estimate`."""
    kl_place: Literal["reward", "loss"] = "loss"
    """Taken off the reward, without gradient, or added to the loss of each token."""
    kl_weight: float = 0.0
    importance: Literal["none", "truncate", "mask_tokens", "mask_sequences"] = "truncate"
    """What is done about a sampler whose log-probabilities are not the trainer's."""
    importance_low: float = 0.5
    """Of the band outside of which "mask_..." drops."""
    importance_high: float = 2.0
    """The most that "truncate" lets a token weigh; the band's other end."""
    entropy_weight: float = 0.0
    """Of the entropy bonus."""
    gamma: float = 1.0
    """The discount of a token."""
    gae_lambda: float = 1.0
    """1: the advantage is return minus value, whatever the critic's faults; below 1: less noise, and the critic's bias."""
    value_clip: float = 0.2
    """How far the critic's loss follows a value from its old one; inf: any way."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if choices := get_args(field.type):
                _require(getattr(self, field.name) in choices, field.name, self, f"one of {', '.join(choices)}")
        for key in ("clip_high", "value_clip"):
            _require(getattr(self, key) > 0, key, self, "above 0")
        _require(0 < self.clip_low <= 1, "clip_low", self, "above 0, 1 at most")
        for key in ("gamma", "gae_lambda"):
            _require(0 <= getattr(self, key) <= 1, key, self, "0 to 1")
        _require(0 <= self.entropy_weight < math.inf, "entropy_weight", self, "0 or more")
        _require(0 <= self.importance_low <= 1, "importance_low", self, "0 to 1")
        _require(self.importance_high >= 1, "importance_high", self, "1 or more")
        by_constant = self.aggregation == "constant"
        _require((self.fixed_length > 0) == by_constant, "fixed_length", self, "above 0 with aggregation 'constant', else 0")
        with_kl = self.kl != "none"
        _require(
            0 < self.kl_weight < math.inf if with_kl else self.kl_weight == 0, "kl_weight", self, "above 0 with a kl, else 0"
        )
        _require(
            self.normalise != "group" or self.relative,
            "normalise",
            self,
            "'group' only with advantage 'group_mean' or 'leave_one_out'",
        )

    @property
    def relative(self) -> bool:
        """Whether responses are judged against others to the same prompt, so that a group without a spread says nothing."""
        return self.advantage in ("group_mean", "leave_one_out")


def _require(holds: bool, key: str, objective: Objective, wanted: str) -> None:
    if not holds:
        raise ObjectiveError(f"{key} is {getattr(objective, key)!r}; wanted {wanted}")


NAMED: dict[str, dict[str, Any]] = {
    "grpo": {},  # GLM-4.5's report, section 3.2, r - mean without KL; the bounds of the clip are DAPO's
    "grpo_normalised": {"normalise": "group", "aggregation": "sequence", "clip_high": 0.2},  # DeepSeekMath, 2402.03300
    "dr_grpo": {"aggregation": "constant", "clip_high": 0.2},  # 2503.20783; needs fixed_length
    "dapo": {"normalise": "group"},  # 2503.14476: clip-higher, mean of tokens
    "rloo": {"advantage": "leave_one_out", "policy": "reinforce", "aggregation": "constant"},  # 2402.14740; fixed_length
    "reinforce++": {"advantage": "return", "normalise": "batch", "clip_high": 0.2},  # 2501.03262
    "ppo": {"advantage": "gae", "normalise": "batch", "clip_high": 0.2, "gae_lambda": 0.95},  # 1707.06347
    "gspo": {
        "normalise": "group",
        "policy": "gspo",
        "aggregation": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },  # 2507.18071
    "cispo": {"normalise": "group", "policy": "cispo", "clip_low": 1.0, "clip_high": 4.0},  # 2506.13585; the upper one is tuned
}
"""Algorithm -> where it differs from `Objective()`; the number is the paper's on arXiv. All of them correct a sampler that is
not the trainer, which the papers leave out."""


def named(name: str, **changes: Any) -> Objective:
    """The objective of that name in `NAMED`, with other values where given. Raises `ObjectiveError` for unknown names."""
    if name not in NAMED:
        raise ObjectiveError(f"objective {name!r} does not exist; wanted one of {', '.join(NAMED)}")
    return Objective(**{**NAMED[name], **changes})


def formula(objective: Objective) -> str:
    """The loss of `objective` as it is computed, term by term with its numbers; only what has an effect is named.

    i: a sequence, t: one of its tokens that count, those that the model wrote itself.
    """
    o = objective
    low, high = f"{1 - o.clip_low:g}", f"{1 + o.clip_high:g}"
    sums = {"sequence": "1/N sum_i 1/n_i sum_t", "token": "1/N sum_i sum_t", "constant": "1/N sum_i sum_t"}[o.aggregation]
    w = "" if o.importance == "none" else "w_it "
    loss = {
        "reinforce": f"-{w}A_it log pi_it",
        "clip": f"-{w}min(rho_it A_it, clip(rho_it, {low}, {high}) A_it)",
        "gspo": f"-{w}min(rho_it A_it, clip(rho_it, {low}, {high}) A_it)",
        "cispo": f"-{w}const(clip(rho_it, {low}, {high})) A_it log pi_it",
    }[o.policy]
    if o.kl != "none" and o.kl_place == "loss":
        loss += f" + {o.kl_weight:g} {o.kl}_it"
    if o.entropy_weight:
        loss += f" - {o.entropy_weight:g} H_it"
    lines = [f"loss = {sums} [ {loss} ]", *_advantage_lines(o)]
    if o.kl != "none":
        estimate = {"k1": "x", "k2": "x^2 / 2", "k3": "exp(-x) - 1 + x"}[o.kl]
        source = "pi" if o.kl_place == "loss" else "pi_old"
        note = ", of no expected gradient on policy" if (o.kl, o.kl_place) == ("k1", "loss") else ""
        lines.append(f"{o.kl}_it = {estimate} with x = log({source}_it / pi_reference_it){note}")
    if o.policy != "reinforce":
        lines.append(
            "rho_it = const(exp(1/n_i sum_u log(pi_iu / pi_old_iu))) pi_it / const(pi_it)"
            if o.policy == "gspo"
            else "rho_it = pi_it / pi_old_it"
        )
    if w:
        lines.append(f"w_it = const({_weight(o)}) with v_it = pi_old_it / pi_sampler_it")
    if o.entropy_weight:
        lines.append("H_it = entropy of the whole distribution that token t was drawn from")
    counted = {"token": "tokens", "sequence": "sequences", "constant": f"sequences times {o.fixed_length}"}[o.aggregation]
    lengths = ", n_i = tokens of sequence i" if any("n_i" in line for line in lines) else ""
    lines.append(f"N = {counted} of the whole step{lengths}; only tokens of the model's own count")
    if o.policy != "reinforce" or w or o.kl == "k3":
        lines.append(f"log-ratios are held within -{LOG_RATIO_LIMIT:g} and {LOG_RATIO_LIMIT:g} before exp")
    if o.relative:
        lines.append(f"groups whose rewards differ by {SPREAD:g} at most are left out, of N, too")
    if o.advantage == "gae":
        value = (
            "(V_it - G_it)^2"
            if o.value_clip == math.inf
            else f"max((V_it - G_it)^2, (clip(V_it, V_old_it - {o.value_clip:g}, V_old_it + {o.value_clip:g}) - G_it)^2)"
        )
        lines.append(f"value loss = {sums} [ 1/2 {value} ] with G_it = A_it + V_old_it before any scaling")
    return "\n".join(lines)


def _weight(o: Objective) -> str:
    band = f"{o.importance_low:g} to {o.importance_high:g}"
    return {
        "truncate": f"min(v_it, {o.importance_high:g})",
        "mask_tokens": f"v_it, 0 outside {band}",
        "mask_sequences": f"v_it, 0 where exp(1/n_i sum_u log v_iu) is outside {band}",
    }[o.importance]


def _advantage_lines(o: Objective) -> list[str]:
    penalty = f"{o.kl_weight:g} {o.kl}" if o.kl != "none" and o.kl_place == "reward" else ""
    reward = f"R_i = reward of i{penalty and f' - sum_t {penalty}_it'}"
    step_reward = f"R_it = reward of i at its last token, else 0{penalty and f'; less {penalty}_it'}"
    scale = " / std(R over its group of K, with K - 1)" if o.normalise == "group" else ""
    lines = {
        "group_mean": [f"A_it = (R_i - mean(R over its group)){scale}", reward],
        "leave_one_out": [f"A_it = (R_i - mean(R over the others of its group)){scale}", reward],
        "return": [f"A_it = sum_(u >= t) {o.gamma:g}^(u - t) R_iu", step_reward],
        "gae": [
            f"A_it = sum_(u >= t) ({o.gamma:g} * {o.gae_lambda:g})^(u - t) (R_iu + {o.gamma:g} V_old_i(u+1) - V_old_iu)",
            step_reward,
        ],
    }[o.advantage]
    if o.normalise == "batch":
        lines.append("A_it is then centred and divided by its std over all tokens of the step, with their number - 1")
    return lines
