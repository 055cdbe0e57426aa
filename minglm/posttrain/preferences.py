"""Preferences to learn from: of the style family and from files, both answers of a pair side by side.

Each answer is linted as a conversation of its own. What a reward model reads is what a user would: answers without their
reasoning, so that it can judge every policy, however that thinks, and no reasoning can talk it into a reward.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from minglm.config import ConfigError
from minglm.data.mixture import Turns
from minglm.posttrain.lint import LintError, Sample, lint, read_objects, sample_of
from minglm.posttrain.recipe import Preferences, RewardRecipe
from minglm.posttrain.sft import ConversationData
from minglm.posttrain.sft_data import MODE_OF, SHOWN_FAULTS, Census, Conversation
from minglm.tasks.general.style import StylePreference
from minglm.tasks.task import HELD_OUT, TRAIN, Message, problems
from minglm.tokenizer import Tokenizer

Pair = tuple[Conversation, Conversation]
"""Chosen and rejected."""


@dataclass(frozen=True)
class PairReader:
    """From messages to ids. longest: tokens of both answers together; reasoning: whether it is read."""

    tokenizer: Tokenizer
    longest: int
    reasoning: bool

    def read(self, context: Sample, answers: Sequence[Sequence[Message]], source: str) -> Pair | LintError:
        """context: the conversation before the answers, chosen and rejected."""
        if any(not answer or not isinstance(answer[0], Mapping) or answer[0].get("role") != "assistant" for answer in answers):
            return LintError(context.where, "pair", "an answer does not begin with a message of the assistant; wanted one")
        found = []
        for answer in answers:
            sample = Sample([*context.messages, *answer], context.where, context.tools, context.thinking)
            if not self.reasoning:
                sample = Sample(without_reasoning(sample.messages), sample.where, sample.tools)
            try:
                rendered = lint(sample, self.tokenizer, self.longest)
            except LintError as error:
                return error
            found.append(
                Conversation(np.array(rendered.ids), np.array(rendered.assistant_mask), MODE_OF[sample.thinking], source)
            )
        tokens = sum(len(one.ids) for one in found)
        if tokens > self.longest:
            reason = f"both answers have {tokens} tokens; wanted at most a row's {self.longest}: none is ever cut"
            return LintError(context.where, "too long", reason)
        if np.array_equal(found[0].ids, found[1].ids):
            return LintError(context.where, "pair", "chosen and rejected are the same; wanted two answers")
        return tuple(found)


def without_reasoning(messages: Sequence[Any]) -> list[Any]:
    """The messages as their reader sees them."""
    return [_shown(one) if isinstance(one, Mapping) and one.get("role") == "assistant" else one for one in messages]


def _shown(message: Mapping[str, Any]) -> Message:
    shown = {key: value for key, value in message.items() if key != "reasoning_content"}
    if isinstance(shown.get("content"), str):
        shown["content"] = shown["content"].split("</think>")[-1].lstrip("\n")
    return shown


def preference_data(recipe: RewardRecipe, tokenizer: Tokenizer) -> ConversationData:
    """The pairs of a run, each as two neighbours, the chosen one first; refused ones included."""
    data = recipe.preferences
    reader = PairReader(tokenizer, recipe.training.sequence_length, recipe.objective == "dpo")
    pool = _read_files(data.files, reader)
    dealt = list(islice(_deal(data, TRAIN, pool, reader, recipe.seed), data.pairs))
    held_out, tokens = [], 0
    for one in _deal(data, HELD_OUT, _read_files(data.held_out_files, reader), reader, 0):
        held_out.append(one)
        tokens += 0 if isinstance(one, LintError) else sum(len(answer.ids) for answer in one)
        if tokens >= recipe.evaluation.tokens or sum(isinstance(one, LintError) for one in held_out) == SHOWN_FAULTS:
            break
    return ConversationData(_census([*dealt, *(one for one in pool if isinstance(one, LintError))]), _census(held_out))


def _deal(data: Preferences, split: str, pool: list[Pair | LintError], reader: PairReader, seed: int) -> Iterator:
    """Pairs of a split without end, in shares that hold at every number; those of files come round again."""
    sources: dict[str, tuple[float, Iterator]] = {}
    if data.levels and not (pool and data.file_share == 1):
        sources["style"] = (1 - data.file_share if pool else 1.0, _of_style(data.levels, split, reader, seed))
    if pool and (data.file_share or not data.levels):
        sources["files"] = (data.file_share if data.levels else 1.0, cycle(pool))
    if not sources:
        raise ConfigError(f"preferences: the files hold no {split} pairs; wanted some, or levels of the style family")
    turns, dealt = Turns({name: weight for name, (weight, _) in sources.items()}), [each for _, each in sources.values()]
    for number in count():
        (source,), _ = turns.at(np.array([number]))
        yield next(dealt[source])


def _of_style(levels: Sequence[int], split: str, reader: PairReader, seed: int) -> Iterator[Pair | LintError]:
    for number, problem in enumerate(problems(StylePreference, split, seed, levels), 1):
        found = problem.preference
        context = Sample(found.messages, f"style ({split}), pair {number}")
        yield reader.read(context, (found.chosen, found.rejected), f"style, margin {found.margin}")


def _read_files(files: Sequence[Path], reader: PairReader) -> list[Pair | LintError]:
    pairs = []
    for path in files:
        for where, found in read_objects(path, ("messages", "chosen", "rejected")):
            if not isinstance(found, LintError):
                context = sample_of(found, where, found["messages"])
                found = reader.read(context, (found["chosen"], found["rejected"]), path.name)
            pairs.append(found)
    return pairs


def _census(dealt: Sequence[Pair | LintError]) -> Census:
    faults = {str(one): one for one in dealt if isinstance(one, LintError)}
    return Census([answer for one in dealt if not isinstance(one, LintError) for answer in one], list(faults.values()))
