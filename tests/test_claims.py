"""Claims of an iteration against hand-made exams: each number is that of the models, modes, domains and problems it names."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_experts import small_recipe

from minglm.chat import MODES
from minglm.evals.interval import Estimate
from minglm.posttrain.experts.claims import Claim, claims, claims_of, claims_table, easiest_first, hard_half, over_seeds
from minglm.posttrain.experts.exam import Sat

FAMILY = {"reasoning": "say_yes", "agent": "say_no"}
LEVELS = (1, 2)


@pytest.fixture
def recipe(tmp_path):
    found = small_recipe(tmp_path)
    practise = {
        domain: replace(
            one,
            tasks=replace(one.tasks, levels={FAMILY[domain]: LEVELS}),
            sampling=replace(one.sampling, thinking="thinking" if domain == "reasoning" else "non-thinking"),
        )
        for domain, one in found.experts.items()
    }
    return replace(found, experts=practise)


def exam(reward, tokens=lambda family, level, mode: 10, domains=("reasoning", "agent"), calls=(0, 0)) -> list[Sat]:
    """Two problems of each pool; reward and tokens: functions of family, level and mode."""
    return [
        Sat(
            FAMILY[domain],
            level,
            mode,
            reward(FAMILY[domain], level, mode),
            tokens(FAMILY[domain], level, mode),
            False,
            "done",
            *calls,
        )
        for mode in MODES
        for domain in domains
        for level in LEVELS
        for _ in range(2)
    ]


def by_text(found: list[Claim], part: str) -> Claim:
    (one,) = (one for one in found if part in one.text)
    return one


def test_each_number_is_of_the_models_modes_and_problems_that_it_names(recipe):
    def start(family, level, mode):
        return 0.5 if level == 1 else 0.0  # so level 2 is the harder half

    def expert(family, level, mode):
        return 1.0 if (family, mode) in (("say_yes", "thinking"), ("say_no", "non-thinking")) else 0.0

    def before(family, level, mode):
        return 0.0

    def last(family, level, mode):
        return {"thinking": 1.0, "non-thinking": 0.5 if level == 1 else 0.25, "automatic": 0.75}[mode]

    def tokens(family, level, mode):
        return {"thinking": 40, "non-thinking": 10 if level == 2 else 80, "automatic": 30}[mode]

    def first(family, level, mode):
        return 1.0 if family == "say_yes" else 0.125

    sat = {
        "start": exam(start),
        "expert-reasoning": exam(expert, domains=("reasoning",)),
        "expert-agent": exam(expert, domains=("agent",)),
        "unified-1": exam(before),
        "unified-1-rl": exam(first),
        "unified-2": exam(before),
        "unified-2-rl": exam(last, tokens, calls=(4, 3)),
    }
    found = claims(recipe, sat, kept=2)
    wanted = {
        "expert of reasoning, less": 0.75,
        "expert of agent, less": 0.75,
        "less the expert of reasoning": 0.0,
        "less the expert of agent": -0.625,
        "thinking, less answering at once": 0.75,
        "tokens of answering at once": 0.25,
        "automatic mode, less": -0.25,
        "tokens of the automatic mode": 0.75,
        "after RL": (1 + 0.375 + 0.75) / 3,
        "second round": (1 + 0.375 + 0.75) / 3 - 0.125,
        "calls of tools": 0.75,
    }
    assert {part: by_text(found, part).measured.value for part in wanted} == pytest.approx(wanted)
    assert len(found) == len(wanted)
    assert by_text(found, "less the expert of agent").verdict == "missed" == by_text(found, "automatic mode, less").verdict
    assert by_text(found, "tokens of answering at once").verdict == "shown"


def test_what_has_no_verdict_is_no_claim_and_what_has_no_calls_neither(recipe):
    def nothing(family, level, mode):
        return None if family == "say_no" else 1.0

    sat = {name: exam(nothing) for name in ("start", "unified-1", "unified-1-rl")}
    sat |= {f"expert-{domain}": exam(nothing, domains=(domain,)) for domain in FAMILY}
    texts = " ".join(one.text for one in claims(replace(recipe, rounds=1), sat, kept=1))
    assert "expert of reasoning" in texts
    assert all(part not in texts for part in ("expert of agent", "calls of tools", "second round"))


@pytest.mark.parametrize(
    "measured, wanted, verdict",
    [
        ((0.1, 0.05, 0.15), "above", "shown"),
        ((0.1, -0.05, 0.25), "above", "likely"),
        ((0.1, None, None), "above", "likely"),  # one seed has no interval
        ((0.0, 0.0, 0.0), "above", "missed"),
        ((0.0, 0.0, 0.0), "at least", "shown"),
        ((0.0, -0.1, 0.1), "at most", "likely"),
        ((0.1, 0.05, 0.15), "at most", "missed"),
    ],
)
def test_a_claim_is_shown_by_its_whole_interval_only(measured, wanted, verdict):
    claim = Claim("so", Estimate(*measured, count=3), wanted, 0.0)
    assert claim.verdict == verdict and f"| {verdict} |" in claims_table([claim])
    assert claims_of({claim.text: claim.numbers})[0].verdict == verdict


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_over_seeds_a_claim_has_the_mean_and_only_what_all_seeds_have_stays(values):
    seeds = [[Claim("so", Estimate(value, None, None, 1), "above", 0.0)] for value in values]
    seeds[0].append(Claim("once", Estimate(0.0, None, None, 1), "above", 0.0))
    (claim,) = over_seeds(seeds)
    assert claim.text == "so" and claim.measured.value == pytest.approx(sum(values) / len(values))
    assert claim.measured.count == len(values)


@given(st.randoms(use_true_random=False))
def test_pools_stand_in_the_order_of_what_is_solved_in_all_modes_together(rng):
    at = [(family, level, mode) for family in ("a", "b") for level in (1, 2, 3) for mode in MODES]
    sat = [Sat(*one, float(rng.random() < 0.5), 9, False, "done", 0, 0) for one in at for _ in range(3)]
    ranked = easiest_first(sat)
    solved = [sum(one.reward for one in sat if (one.family, one.level) == pool) for pool in ranked]
    assert solved == sorted(solved, reverse=True) and len(set(ranked)) == len(ranked) == 6
    assert hard_half(sat) == set(ranked[3:])


def test_the_harder_half_is_solved_least_and_holds_the_middle_pool(recipe):
    rewards = {1: 0.9, 2: 0.1, 3: 0.5}
    sat = [Sat("say_yes", level, mode, reward, 3, False, "done", 0, 0) for mode in MODES for level, reward in rewards.items()]
    assert hard_half(sat) == {("say_yes", 2), ("say_yes", 3)}
