"""Does a model keep to its mode? Thinking mode must think and non-thinking mode must not, and neither may leak.

Leaks are what servers stumble over: marks of thinking in the content, an answer that never left the reasoning
(sgl-project/sglang#37645), a thinking that is never closed, and calls within it (vllm-project/vllm#31449).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from minglm.chat import OPENS_THINKING, render_tokens
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.evals.interval import Estimate, share
from minglm.posttrain.recipe import Conversations
from minglm.posttrain.sft_data import problems_of
from minglm.tasks.task import HELD_OUT, Problem

THINK, CLOSE, CALL = "<think>", "</think>", "<tool_call>"
MARKS_IN_CONTENT, NO_ANSWER, NO_CLOSE, CALL_IN_THINKING = (
    "marks of thinking in the content",
    "answer inside the reasoning",
    "thinking never closed",
    "call inside the reasoning",
)
LEAKS = (MARKS_IN_CONTENT, NO_ANSWER, NO_CLOSE, CALL_IN_THINKING)
SLACK = 16  # more tokens than half as many again as the demonstration's


@dataclass(frozen=True)
class Response:
    """What a model wrote after `<|assistant|>` (in non-thinking mode: after the empty thinking), marks included."""

    text: str
    thinking: bool


def keeps_to_mode(response: Response) -> bool:
    """In thinking mode: opens with a thinking that holds something. In non-thinking mode: has no mark of one."""
    before, mark, rest = response.text.lstrip().partition(THINK)
    if not response.thinking:
        return not mark and CLOSE not in before
    return not before and bool(rest.split(CLOSE)[0].strip())


def leaks(response: Response) -> set[str]:
    """Which of `LEAKS` the response has."""
    text = response.text.lstrip()
    if not response.thinking or not text.startswith(THINK):
        found = {MARKS_IN_CONTENT} if THINK in text or CLOSE in text else set()
        return found | ({NO_CLOSE} if THINK in text and CLOSE not in text.split(THINK, 1)[1] else set())
    reasoning, close, content = text.removeprefix(THINK).partition(CLOSE)
    found = set()
    if not close:
        found.add(NO_CLOSE)
    elif not content.strip():
        found.add(NO_ANSWER)
    if THINK in content or CLOSE in content or THINK in reasoning:
        found.add(MARKS_IN_CONTENT)
    if CALL in reasoning:
        found.add(CALL_IN_THINKING)
    return found


@dataclass(frozen=True)
class ModeSwitch:
    """thinking, non_thinking: share of responses that keep to the mode; leaks: share of all responses that have each."""

    thinking: Estimate | None
    non_thinking: Estimate | None
    leaks: dict[str, Estimate]

    def lines(self) -> Iterator[str]:
        for name, found in (("thinking mode thinks", self.thinking), ("non-thinking mode does not", self.non_thinking)):
            if found is not None:
                yield f"{name}: {found.text()} of {found.count} held-out problems"
        for leak, found in self.leaks.items():
            yield f"leak, {leak}: {found.text()} of {found.count}"


def measure(responses: Sequence[Response]) -> ModeSwitch:
    """Shares with 95% intervals. Raises ValueError for no responses."""
    kept = {mode: [float(keeps_to_mode(one)) for one in responses if one.thinking == mode] for mode in (True, False)}
    found = [leaks(one) for one in responses]
    return ModeSwitch(
        *(share(kept[mode]) if kept[mode] else None for mode in (True, False)),
        {leak: share([float(leak in one) for one in found]) for leak in LEAKS},
    )


def ask(engine: Engine, recipe: Conversations) -> list[Response]:
    """Greedy first turns to `recipe.mode_prompts` held-out problems of its families, each in both modes; a thinking that the
    prompt has opened stands before its response."""
    asked = _problems(recipe)
    responses = []
    for thinking in (True, False):
        opens = thinking and recipe.opens_thinking
        prompts, params = zip(*(_request(engine, problem, thinking, opens) for problem in asked), strict=True)
        begun = OPENS_THINKING if opens else ""
        responses += [Response(begun + found.text, thinking) for found in engine.generate(list(prompts), list(params))]
    return responses


def _problems(recipe: Conversations) -> list[Problem]:
    sources = [problems_of(name, HELD_OUT, 1, recipe.levels_of(name)) for name in recipe.families]
    rounds = zip(*sources, strict=False)
    return list(islice((problem for one in rounds for problem in one), recipe.mode_prompts))


def _request(engine: Engine, problem: Problem, thinking: bool, opens: bool) -> tuple[list[int], SamplingParams]:
    tokenizer, tools = engine.tokenizer, problem.tools or None
    asked = {"add_generation_prompt": True, "opens_thinking": opens}
    prompt = render_tokens(tokenizer, problem.messages, tools, thinking, **asked).ids
    shown = render_tokens(tokenizer, [*problem.messages, *problem.demonstrate(thinking)], tools, thinking).ids
    limit = 3 * (len(shown) - len(prompt)) // 2 + SLACK
    room = engine.model.config.max_position_embeddings - len(prompt)
    return prompt, SamplingParams(temperature=0.0, max_tokens=max(1, min(limit, room)), seed=0)
