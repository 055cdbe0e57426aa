"""Drafting changes how fast an answer comes, and neither what is written (greedy) nor how often (sampled)."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import GLMConfig
from minglm.engine import speculative
from minglm.engine.engine import Engine
from minglm.engine.grammar import GrammarCompiler
from minglm.engine.sampling import SamplingParams, Settings, distribution, draw, uniforms
from minglm.engine.speculative import residual
from minglm.model import GLM
from minglm.tokenizer import Tokenizer, train_tokenizer

SPECIALS = ["<|endoftext|>", "<|user|>", "<think>", "</think>"]
ANSWERS = 3000
LENGTH = 4
GRAMMAR = "start: /[ab]{1,2}(c|[ab]d)/ <|user|>\n"


@functools.cache
def small() -> tuple[Tokenizer, GLM]:
    """Eight ids, and weights so large that model and MTP layer differ about most of them."""
    tokenizer = train_tokenizer(["abcd"], characters=True, specials=SPECIALS, show_progress=False)
    config = GLMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        num_nextn_predict_layers=1,
        initializer_range=0.35,
    )
    torch.manual_seed(4)
    model = GLM(config).eval()
    model.requires_grad_(False)
    return tokenizer, model


def answer_probabilities(prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every possible answer with its probability, from whole forward passes and one row at a time."""
    tokenizer, model = small()
    chosen = Settings.of([params], tokenizer.vocab_size, torch.device("cpu"))
    compiler = GrammarCompiler(tokenizer)
    done, open_answers = {}, {(): 1.0}
    while open_answers:
        answers = list(open_answers)
        logits = model(torch.tensor([prompt + list(answer) for answer in answers])).logits[:, -1].clone()
        for answer, row in zip(answers, logits, strict=True):
            if params.grammar is not None:
                matcher = compiler.matcher(params.grammar)
                for id in answer:
                    matcher.advance(id)
                matcher.hide(row)
        following = {}
        for answer, row in zip(answers, distribution(logits, chosen), strict=True):
            for id in row.nonzero()[:, 0].tolist():
                longer, probability = (*answer, id), open_answers[answer] * row[id].item()
                ends = len(longer) == params.max_tokens or (id in tokenizer.end_of_turn_ids and not params.ignore_stop)
                (done if ends else following)[longer] = probability
        open_answers = following
    return done


def too_far(counts: Counter, probabilities: dict[tuple[int, ...], float]) -> bool:
    """Pearson's chi-square test at 1e-6; answers expected fewer than ten times share a cell. Impossible ones are too far."""
    if counts.keys() - probabilities.keys():
        return True
    total = counts.total()
    rare = [answer for answer, p in probabilities.items() if p * total < 10]
    cells = [(counts[answer], p * total) for answer, p in probabilities.items() if p * total >= 10]
    if rare:
        cells.append((sum(counts[answer] for answer in rare), sum(probabilities[answer] for answer in rare) * total))
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells if expected > 0)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item() < 1e-6  # the chi-square distribution's upper tail


def sampled(prompt: list[int], params: SamplingParams, draft_tokens: int, answers: int = ANSWERS) -> tuple[Counter, Engine]:
    tokenizer, model = small()
    engine = Engine(model, tokenizer, draft_tokens=draft_tokens, max_running=500, num_blocks=1100, block_size=8)
    each = [dataclasses.replace(params, seed=seed) for seed in range(answers)]
    return Counter(tuple(answer.ids) for answer in engine.generate([prompt] * answers, each)), engine


PROMPT = [0, 1, 2]
WAYS = {
    "temperature": SamplingParams(temperature=1.3, max_tokens=LENGTH, ignore_stop=True),
    "top-p": SamplingParams(temperature=0.9, top_p=0.8, max_tokens=LENGTH, ignore_stop=True),
    "top-k and min-p": SamplingParams(temperature=1.5, top_k=5, min_p=0.15, max_tokens=LENGTH, ignore_stop=True),
    "grammar": SamplingParams(temperature=1.0, max_tokens=8, grammar=GRAMMAR),
    "grammar and top-p": SamplingParams(temperature=1.2, top_p=0.85, max_tokens=8, grammar=GRAMMAR),
}


@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_as_frequent_as_the_model_says(way, draft_tokens):
    counts, engine = sampled(PROMPT, WAYS[way], draft_tokens)
    assert not too_far(counts, answer_probabilities(PROMPT, WAYS[way]))
    if draft_tokens:  # both verdicts have occurred often, so both rules were tried
        assert 150 < engine.stats.accepted[0] < engine.stats.drafted[0] - 150


def accepts_the_likeliest(items, drafts, first_rows, p, proposals) -> list[int]:
    """A wrong rule: a draft holds where it is the model's likeliest token, whatever the temperature."""
    best = p.argmax(-1).tolist()
    return [speculative._agree(own, best[row : row + len(own)]) for own, row in zip(drafts, first_rows, strict=True)]


def draws_from_p_again(p, q):
    """A wrong rule: a rejected draft is replaced by a draw from p, so what q favours comes too often."""
    return p


@pytest.mark.parametrize("name, wrong", [("accepted", accepts_the_likeliest), ("residual", draws_from_p_again)])
def test_a_wrong_rule_is_found_out(monkeypatch, name: str, wrong: Callable):
    monkeypatch.setattr(speculative, name, wrong)
    way = WAYS["temperature"]
    counts, _ = sampled(PROMPT, way, draft_tokens=2)
    assert too_far(counts, answer_probabilities(PROMPT, way))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 9), sharpness=st.floats(0.1, 8))
def test_accepting_and_residual_together_give_p(seed, size, sharpness):
    p, q = (torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharpness).softmax(-1)
    accepted = torch.minimum(p, q)
    rest = residual(p, q)
    assert torch.allclose(accepted + (1 - accepted.sum()) * rest / rest.sum(), p, atol=1e-12)


def test_equal_distributions_never_reject():
    p = torch.rand(7)
    assert torch.equal(residual(p, p), p)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    draft_tokens=st.integers(1, 4),
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.sampled_from([("a",), ("ba", "cc"), ("dab",)]),
            "thinking_budget": st.integers(0, 4),
            "must_think": st.booleans(),
            "grammar": st.sampled_from([GRAMMAR, "start: /(ab|ba|cd)*/ <think> /[ad]*/ </think> /c*/\n"]),
            "ignore_stop": st.booleans(),
        },
    ),
    block_size=st.sampled_from([2, 16]),
)
def test_greedy_text_is_that_of_plain_decoding(draft_tokens, prompts, options, block_size):
    tokenizer, model = small()
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0, **options)
    plain = Engine(model, tokenizer, block_size=block_size, num_blocks=200).generate(prompts, params)
    drafted = Engine(model, tokenizer, block_size=block_size, num_blocks=200, draft_tokens=draft_tokens)
    for a, b in zip(plain, drafted.generate(prompts, params), strict=True):
        assert (a.ids, a.text, a.finish_reason, a.stop_reason) == (b.ids, b.text, b.finish_reason, b.stop_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    drafted.check_invariants()


def test_a_perfect_draft_is_always_accepted_and_counted():
    """An MTP layer that says what the trunk will say: a trunk that only knows its last token, read off by the MTP layer."""
    tokenizer, model = small()
    bigram = GLM(model.config).eval()
    bigram.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in (*bigram.model.layers, bigram.mtp.layer):  # nothing but the residual stream is left
            layer.self_attn.o_proj.weight.zero_()
            for name, weight in layer.mlp.named_parameters():
                if "down_proj" in name:
                    weight.zero_()
        bigram.mtp.eh_proj.weight.zero_()
        bigram.mtp.eh_proj.weight[:, : model.config.hidden_size] = torch.eye(model.config.hidden_size)
    engine = Engine(bigram, tokenizer, draft_tokens=3)
    for params in (
        SamplingParams(temperature=0, max_tokens=33, ignore_stop=True),
        SamplingParams(temperature=1, seed=1, max_tokens=33, ignore_stop=True),
    ):
        engine.generate([PROMPT], params)
    stats = engine.stats
    assert stats.accepted == stats.drafted == [16, 16, 16] and stats.steps == 2 * 9


def test_drafts_need_an_mtp_layer():
    tokenizer, model = small()
    without = GLM(dataclasses.replace(model.config, num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="MTP"):
        Engine(without, tokenizer, draft_tokens=1)


def test_the_same_seed_draws_the_same_and_neighbours_draw_independently():
    first, again = uniforms([1, 2, 3], [5, 5, 5], 0), uniforms([1, 2, 3], [5, 5, 5], 0)
    assert (first == again).all() and len(set(first)) == 3
    numbers = uniforms([seed for seed in range(100) for _ in range(100)], list(range(100)) * 100, 1)
    cells = Counter((int(a * 8), int(b * 8)) for a, b in zip(numbers[:-1], numbers[1:], strict=True))
    assert not too_far(cells, {(a, b): 1 / 64 for a in range(8) for b in range(8)})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 12), top_k=st.integers(1, 12), top_p=st.floats(0.05, 0.99))
def test_a_draw_is_from_the_nucleus_of_the_likeliest_k(seed, size, top_k, top_p):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2
    chosen = Settings.of([SamplingParams(top_k=top_k, top_p=top_p)], size, logits.device)
    probabilities = distribution(logits, chosen)
    drawn = draw(probabilities.repeat(300, 1), uniforms(list(range(300)), [0] * 300, 0)).unique()
    likeliest = logits[0].softmax(-1).sort(descending=True)
    kept = likeliest.values[:top_k] / likeliest.values[:top_k].sum()
    number = 1 + int((kept.cumsum(0)[:-1] < top_p).sum())
    assert set(drawn.tolist()) <= set(likeliest.indices[:number].tolist())
    assert set(probabilities[0].nonzero()[:, 0].tolist()) == set(likeliest.indices[:number].tolist())
