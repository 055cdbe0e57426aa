"""The engine writes what a loop of whole forward passes writes, whatever the schedule, and loses no block over it."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minglm.config import GLMConfig
from minglm.engine.engine import Engine
from minglm.engine.sampling import DRAW, SamplingParams, Settings, distribution, draw, uniforms
from minglm.model import GLM
from minglm.tokenizer import train_tokenizer

CONFIG = GLMConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    max_position_embeddings=96,
    num_nextn_predict_layers=1,
    initializer_range=0.3,  # far from uniform, so that no rounding changes a choice
)


@functools.cache
def tiny_model() -> GLM:
    torch.manual_seed(0)
    return GLM(CONFIG).eval()


@torch.no_grad()
def full_logits(ids: list[int]) -> torch.Tensor:
    """(1, v) of the token after `ids`, from a pass over all of them in the naive gear's definition of the model."""
    return tiny_model()(torch.tensor([ids])).logits[:, -1]


@functools.lru_cache(maxsize=4096)
def written_by_loop(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    """One full forward pass a token."""
    ids = list(prompt)
    chosen = Settings.of([params], CONFIG.vocab_size, torch.device("cpu"))
    while len(ids) < len(prompt) + params.max_tokens:
        uniform = uniforms([params.seed or 0], [len(ids)], DRAW)
        ids.append(draw(distribution(full_logits(ids), chosen), uniform).item())
        if ids[-1] in params.stop_ids:
            break
    return ids[len(prompt) :]


# Few beginnings, so that prompts share prefixes.
PROMPTS = st.builds(
    lambda head, tail: (head * 14)[:28] + tail,
    st.sampled_from([[3], [1, 2], [5, 6, 7]]),
    st.lists(st.integers(0, CONFIG.vocab_size - 1), max_size=4),
) | st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=12)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([None, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 5),
    max_tokens=st.integers(1, 14),
    stop_ids=st.sampled_from([(), (4, 9)]),
)


class Schedules(RuleBasedStateMachine):
    """Arrivals, steps and cancellations in any order, with caches so small that sequences are preempted."""

    @initialize(
        block_size=st.sampled_from([1, 3, 4, 16]),
        spare=st.integers(0, 30),
        max_batch_tokens=st.sampled_from([1, 5, 13, 200]),
        max_running=st.sampled_from([1, 3, 8]),
        draft_tokens=st.sampled_from([0, 0, 1, 3]),
    )
    def build(self, block_size, spare, max_batch_tokens, max_running, draft_tokens):
        num_blocks = -(-(45 + spare) // block_size)
        self.engine = Engine(
            tiny_model(),
            None,
            block_size=block_size,
            num_blocks=num_blocks,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            draft_tokens=draft_tokens,
        )
        self.asked: dict[int, tuple[tuple[int, ...], SamplingParams]] = {}
        self.got: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.cancelled: set[int] = set()

    @rule(prompt=PROMPTS, params=PARAMS)
    def arrive(self, prompt, params):
        request = self.engine.add(prompt, params)
        self.asked[request], self.got[request] = (tuple(prompt), params), []

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(sorted(self.asked)))
        if request not in self.ended:
            self.cancelled.add(request)
        self.engine.cancel(request)

    @rule(steps=st.integers(1, 6))
    def steps(self, steps):
        for _ in range(steps):
            for output in self.engine.step():
                assert output.request_id not in self.ended
                self.got[output.request_id] += output.new_ids
                if output.finish_reason is not None:
                    self.ended[output.request_id] = output.finish_reason

    @rule()
    def new_weights_of_the_same_values(self):
        self.engine.update_weights({name: value.clone() for name, value in tiny_model().state_dict().items()})

    @invariant()
    def no_block_is_leaked_or_used_twice(self):
        if hasattr(self, "engine"):
            self.engine.check_invariants()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.steps(1)
        self.engine.check_invariants()
        stats = self.engine.stats
        assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
        for request, (prompt, params) in self.asked.items():
            whole = written_by_loop(prompt, params)
            got = self.got[request]
            if request in self.cancelled:
                assert self.ended[request] == "cancelled" and len(got) < len(whole) + 1
            else:
                assert self.ended[request] == ("stop" if whole[-1] in params.stop_ids else "length") or params.temperature
            if params.temperature == 0 or self.engine.draft_tokens == 0:
                assert got == whole[: len(got)] and (request in self.cancelled or len(got) == len(whole))


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)


def engine(**options) -> Engine:
    return Engine(tiny_model(), None, **options)


def test_a_small_cache_preempts_and_still_gives_the_same_text():
    small = engine(block_size=2, num_blocks=20)
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=30)
    written = [completion.ids for completion in small.generate(prompts, params)]
    assert written == [written_by_loop(tuple(prompt), params) for prompt in prompts]
    assert small.stats.preemptions > 0
    small.check_invariants()


def test_a_known_prefix_is_computed_once():
    shared = engine(block_size=4)
    prompt = [7, 8, 9] * 7
    first, second = (shared.generate([prompt + [1]], SamplingParams(temperature=0, max_tokens=5))[0] for _ in range(2))
    assert first.ids == second.ids and shared.stats.prefix_hit_tokens == 20
    assert shared.generate([[1] + prompt], SamplingParams(max_tokens=1)) and shared.stats.prefix_hit_tokens == 20
    shared.update_weights(tiny_model().state_dict())
    shared.generate([prompt + [1]], SamplingParams(max_tokens=1))
    assert shared.stats.prefix_hit_tokens == 20 and shared.weights_version == 1


def test_new_weights_are_those_of_the_next_token():
    torch.manual_seed(1)
    own, other = GLM(CONFIG).eval(), GLM(CONFIG).eval()
    busy = Engine(own, None)
    request = busy.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=8))
    before = [id for _ in range(3) for output in busy.step() for id in output.new_ids]
    busy.update_weights(other.state_dict())
    after = []
    while busy.has_work:
        after += [id for output in busy.step() for id in output.new_ids]
    expected = Engine(other, None).generate([[1, 2, 3] + before], SamplingParams(temperature=0, max_tokens=5))[0].ids
    assert after == expected and busy.weights_version == 1 and request == 0
    with pytest.raises(ValueError, match="lm_head.weight"):
        busy.update_weights({k: v for k, v in other.state_dict().items() if k != "lm_head.weight"})


def test_a_prompt_in_pieces_leaves_decoding_sequences_going():
    busy = engine(max_batch_tokens=8)
    decoding = busy.add([1, 2], SamplingParams(temperature=0, max_tokens=20))
    busy.step()
    busy.add([3] * 40, SamplingParams(temperature=0, max_tokens=1))
    for _ in range(5):
        assert [output.request_id for output in busy.step()] == [decoding]


def test_logprobs_are_the_models_own_and_the_best_come_first():
    params = SamplingParams(temperature=0.5, top_k=2, seed=3, max_tokens=6, logprobs=4)
    (answer,) = engine().generate([[1, 2, 3]], params)
    ids = [1, 2, 3]
    for id, logprob, best in zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=True):
        expected = full_logits(ids)[0].log_softmax(-1)
        assert logprob == pytest.approx(expected[id].item(), abs=1e-4)
        assert [i for i, _ in best] == expected.topk(4).indices.tolist()
        assert [value for _, value in best] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
        ids.append(id)
    (plain,) = engine().generate([[1, 2, 3]], SamplingParams(temperature=0.5, top_k=2, seed=3, max_tokens=6, logprobs=0))
    assert plain.ids == answer.ids and plain.top_logprobs is None and len(plain.logprobs) == 6


@pytest.mark.parametrize("options", [{}, {"draft_tokens": 2}, {"block_size": 2, "num_blocks": 16, "max_batch_tokens": 5}])
def test_the_experts_of_every_fed_token_are_reported_once(options):
    prompts = [[5, 6, 7, 8], [9] * 7, [2, 3]]
    answers = engine(**options).generate(prompts, SamplingParams(temperature=0, max_tokens=18, return_experts=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        fed = torch.tensor([prompt + answer.ids[:-1]])
        with torch.no_grad():
            _, statistics = tiny_model()._run_trunk(fed, None, None)
        expected = torch.stack([s.experts for s in statistics], 1)  # (tokens, layers, K)
        assert torch.equal(answer.experts.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize(
    "prompt, params, complaint",
    [
        ([], {}, "empty"),
        ([24], {}, "id 24"),
        ([-1], {}, "id -1"),
        ([1] * 90, {"max_tokens": 8}, "97 positions"),
        ([1] * 50, {"max_tokens": 32}, "holds 64"),
        ([1], {"stop": ("x",), "max_tokens": 5}, "tokenizer"),
        ([1], {"thinking_budget": 3, "max_tokens": 5}, "tokenizer"),
        ([1], {"must_think": True, "max_tokens": 5}, "tokenizer"),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt, params, complaint):
    small = engine(block_size=8, num_blocks=8)
    with pytest.raises(ValueError, match=complaint):
        small.add(prompt, SamplingParams(**params))
    assert not small.has_work


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"thinking_budget": -1},
        {"stop": ("",)},
    ],
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


# ------------------------------------------------------------------------------------------------------ text and control


@functools.cache
def tokenizer_and_model():
    tokenizer = train_tokenizer(["abcdefgh ü"], characters=True, specials=SPECIALS, show_progress=False)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(2)
    return tokenizer, GLM(config).eval()


SPECIALS = ["<|endoftext|>", "<|user|>", "<|observation|>", "<|assistant|>", "<think>", "</think>"]


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_text_is_the_decoded_ids_and_ends_before_a_stop(draft_tokens):
    tokenizer, model = tokenizer_and_model()
    writer = Engine(model, tokenizer, draft_tokens=draft_tokens)
    prompts = [tokenizer.encode(text) for text in ("abc", "dd", "h ü", "fga")]
    free = writer.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_stop=True))
    for prompt, answer in zip(prompts, free, strict=True):
        assert answer.text == tokenizer.decode(answer.ids) and len(answer.ids) == 40
        stop = tokenizer.decode(answer.ids[7:9])
        (cut,) = writer.generate([prompt], SamplingParams(temperature=0, max_tokens=40, stop=(stop, "never")))
        plain = answer.text[: answer.text.index(stop)]
        ends = [i for i, id in enumerate(answer.ids) if id in tokenizer.end_of_turn_ids]
        if not ends or len(tokenizer.decode(answer.ids[: ends[0]])) > len(plain):
            assert (cut.text, cut.finish_reason, cut.stop_reason) == (plain, "stop", stop)
        stopped = writer.generate([prompt], SamplingParams(temperature=0, max_tokens=40, stop_ids=(answer.ids[5],)))[0]
        first = min(i for i, id in enumerate(answer.ids) if id == answer.ids[5] or id in tokenizer.end_of_turn_ids)
        assert stopped.ids == answer.ids[: first + 1] and stopped.text == tokenizer.decode(answer.ids[:first])
        assert stopped.finish_reason == "stop" and stopped.stop_reason == answer.ids[first]


@pytest.mark.parametrize("draft_tokens", [0, 2])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thinking_ends_when_its_budget_is_used_up(draft_tokens, budget):
    tokenizer, model = tokenizer_and_model()
    think, end = tokenizer.special_ids["<think>"], tokenizer.special_ids["</think>"]
    open_prompt = [tokenizer.special_ids["<|assistant|>"], think]
    for seed in range(8):
        params = SamplingParams(seed=seed, max_tokens=30, thinking_budget=budget, ignore_stop=True)
        (answer,) = Engine(model, tokenizer, draft_tokens=draft_tokens).generate([open_prompt], params)
        is_open, used = True, 0
        for id in answer.ids:
            assert not (is_open and used >= budget) or id == end
            used += is_open and id not in (think, end)
            is_open = id == think or (is_open and id != end)
        assert end in answer.ids[: budget + 1 + answer.ids.count(think)]


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_a_thinking_that_the_prompt_has_opened_is_not_closed_at_once(draft_tokens):
    tokenizer, model = tokenizer_and_model()
    names = ("<|assistant|>", "<think>", "</think>", "<|user|>")
    assistant, think, end, user = (tokenizer.special_ids[name] for name in names)
    opened = [assistant, think]
    with torch.no_grad():  # a model that would close it
        hidden, _ = model.hidden_and_experts(torch.tensor([opened]))
        model.lm_head.weight[end] = 10 * hidden[0, -1]
    engine = Engine(model, tokenizer, draft_tokens=draft_tokens)

    def first(prompt: list[int], **more: object) -> int:
        (answer,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=4, ignore_stop=True, **more))
        return answer.ids[0]

    assert first(opened) == end != first(opened, must_think=True)
    assert first(opened, must_think=True, thinking_budget=0) == end  # who allows no thinking means it
    closed = [*opened, 0, end]
    assert first(closed, must_think=True) == first(closed)
    unasked = [*opened, 1, user, 2, assistant]  # an earlier turn's thinking was cut off
    assert first(unasked, must_think=True) == first(unasked)


def test_typed_tags_neither_open_nor_close_the_thinking():
    tokenizer, model = tokenizer_and_model()
    assistant, think = tokenizer.special_ids["<|assistant|>"], tokenizer.special_ids["<think>"]
    # An earlier turn's thinking, cut off; then a new turn that has not begun to think.
    prompt = [assistant, think, 1, 2, tokenizer.special_ids["<|user|>"], 3, assistant]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_stop=True)
    (free,) = Engine(model, tokenizer).generate([prompt], params)
    budgeted = SamplingParams(temperature=0, max_tokens=5, ignore_stop=True, thinking_budget=0)
    (held,) = Engine(model, tokenizer).generate([prompt], budgeted)
    if think not in free.ids:
        assert held.ids == free.ids
    assert held.ids[0] != tokenizer.special_ids["</think>"] or free.ids[0] == held.ids[0]
