"""The task families as an exam: rewards on held-out problems, and how likely the right answer is to the model.

A base model is asked in plain text behind solved problems, a chat model in the chat template; both with and without
thinking. A model of a few million parameters may solve nothing at all, so graded measures stand beside the reward: nats
per token of the right answer, and how often it is likelier than near misses.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from tqdm import tqdm

from minglm.engine.engine import Engine
from minglm.evals.attempts import MORE_TURNS, Attempt, BaseForm, ChatForm, EngineWriter, Form, attempt
from minglm.evals.benchmarks.question import Question
from minglm.evals.measure import Measure, scored, summed
from minglm.evals.scoring import Passage, Scored, Scorer, split_at_choice
from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.sandbox import SandboxError
from minglm.tasks.task import HELD_OUT, TRAIN, Message, Problem, different_problems, problems
from minglm.tasks.text import conversation_text, ended, in_one_form
from minglm.tokenizer import Tokenizer

SHOTS = 2
LEVELS = 2  # of a family's difficulties, from the easiest on: what small models differ in
NEAR_MISSES = 3
ALIKE = 1e-3  # shares


def exam(family: type[Problem], limit: int, seed: int = 0, levels: int = LEVELS) -> list[Problem]:
    """Up to `limit` different held-out problems of the `levels` easiest difficulties; fewer where there are no more."""
    return different_problems(family, HELD_OUT, seed, limit, family.difficulties[:levels])


def shots_of(family: type[Problem], seed: int = 0, levels: int = LEVELS, count: int = SHOTS) -> tuple[Problem, ...]:
    """Solved problems to show: of the training split, so that none of them is asked."""
    return tuple(islice(problems(family, TRAIN, seed, family.difficulties[:levels]), count))


def forms(suite: str, tokenizer: Tokenizer, family: type[Problem], seed: int, levels: int) -> Iterator[tuple[str, Form]]:
    """How the suite asks, by name: "base" or "chat"."""
    shots = shots_of(family, seed, levels) if suite == "base" else ()
    for thinking in (False, True):
        mode = "thinking" if thinking else "at once"
        if suite == "base":
            yield f"{len(shots)} shots, {mode}", BaseForm(tokenizer, shots, thinking)
        else:
            yield f"chat, {mode}", ChatForm(tokenizer, thinking)


def rewards(
    engine: Engine,
    suite: str,
    limit: int,
    seed: int = 0,
    levels: int = LEVELS,
    families: Sequence[str] | None = None,
    progress: bool = False,
) -> Iterator[Measure]:
    """The mean reward of greedy answers in each family and mode, with the family's chance level.

    A family that cannot be judged here, because there is no sandbox, is left out with a printed line.
    """
    for name in FAMILIES if families is None else families:
        asked = exam(FAMILIES[name], limit, seed, levels)
        if not judgeable(asked[0]):
            continue
        for quantity, form in forms(suite, engine.tokenizer, FAMILIES[name], seed, levels):
            attempts = [Attempt(problem, seed) for problem in asked]
            yield judged(
                name, f"reward, {quantity}", attempt(EngineWriter(engine, form), attempts, f"{name}: {quantity}", progress)
            )


def question_of(problem: Problem) -> Question:
    """A problem as a question of an exam."""
    gold, thought = problem.demonstrate(thinking=False), problem.demonstrate(thinking=True)
    turns = MORE_TURNS + sum(message["role"] == "assistant" for message in thought)
    id = hashlib.sha256(problem.key.encode()).hexdigest()[:16]
    return Question(
        problem.family, id, problem.messages, problem.verify, gold, thought, problem.tools, turns, problem.start, problem.chance
    )


def questions(limit: int, seed: int, levels: int, families: Sequence[str]) -> list[Question]:
    """The exams of families as questions. Families that cannot be judged on this machine are left out with a printed line."""
    exams = [exam(FAMILIES[name], limit, seed, levels) for name in families]
    return [question_of(problem) for asked in exams if judgeable(asked[0]) for problem in asked]


def judgeable(problem: Problem) -> bool:
    """Whether the problem's family can be judged on this machine; a line that says why not is printed.

    Asked before the model is: a verifier that needs no sandbox to refuse an empty answer would let bad models have a row in
    the table, and good ones none.
    """
    try:
        problem.verify(problem.demonstrate(thinking=False))
        problem.verify(problem.near_miss(random.Random(0)))
    except SandboxError as error:
        _say_left_out(problem.family, error)
        return False
    return True


def _say_left_out(family: str, error: SandboxError) -> None:
    tqdm.write(f"{family}: left out of the table, for it is judged in the sandbox: {error}")


def judged(name: str, quantity: str, attempts: Sequence[Attempt]) -> Measure:
    """The mean reward; what the model could not be asked, or nobody could judge, is counted beside it; as 0 if that is all."""
    scores = [one.verdict.reward if one.verdict and not one.too_long else None for one in attempts]
    chances = [one.problem.chance for one, score in zip(attempts, scores, strict=True) if score is not None]
    if not chances:
        chances = [one.problem.chance for one in attempts]
        return scored("families", name, quantity, [0.0] * len(attempts), sum(chances) / len(chances), len(attempts))
    return scored("families", name, quantity, scores, sum(chances) / len(chances))


def graded(
    scorer: Scorer, limit: int, seed: int = 0, levels: int = LEVELS, families: Sequence[str] | None = None
) -> Iterator[Measure]:
    """Nats per token of the right answer given the question, and how often the right one is chosen among near misses.

    Both behind `SHOTS` solved problems, or as many as fit, answered at once. Of an answer of several turns only the first is
    scored, and none is chosen.

    Chosen is the answer whose share of the likelihood its question raises most, over what another problem's question gives
    it. By likelihood alone a model that knows nothing may be far from chance, for right answers and near misses differ in
    kind: a wrong sign is longer, a wrong digit a rarer one (compare Holtzman et al., arXiv 2104.08315).
    What remains errs on the safe side: near misses resemble the right answer more than one another, so that one of them is
    the odd one out, and a model that knows nothing scores chance or somewhat less.
    """
    for name in FAMILIES if families is None else families:
        form = BaseForm(scorer.tokenizer, shots_of(FAMILIES[name], seed, levels), thinking=False)
        asked = exam(FAMILIES[name], limit, seed, levels)
        rng = random.Random(f"near misses {name} {seed}")
        try:
            pairs = [_question(scorer, form, problem, asked[i - 1], rng) for i, problem in enumerate(asked)]
        except SandboxError as error:  # some near misses are tried before they are called wrong
            _say_left_out(name, error)
            continue
        pairs = [pair for pair in pairs if pair is not None]
        if not pairs:
            continue
        scores = scorer.score([passage for pair in pairs for passage in pair], f"{name}: likelihood")
        own, others = scores[::2], scores[1::2]
        left_out = len(asked) - len(pairs)
        nats, tokens = [], []
        for (passage, _), one in zip(pairs, own, strict=True):
            # The mark of the end, which follows every answer, would make each look likelier than it is.
            counted = [bool(scorer.tokenizer.decode_bytes([id]).strip()) for id in passage.continuations[0]]
            nats.append(float(one.continuations[0].nats[counted].sum()))
            tokens.append(sum(counted))
        quantity = f"nats per answer token, {len(form.shots)} shots"
        yield summed("families", name, quantity, nats, tokens, left_out=left_out)
        choices = [
            (raised(one.continuations, other.continuations), len(one.continuations))
            for one, other in zip(own, others, strict=True)
            if len(one.continuations) > 1
        ]
        if choices and len(asked) > 1:
            values, sizes = zip(*choices, strict=True)
            chance = sum(1 / size for size in sizes) / len(sizes)
            yield scored("families", name, "chosen among near misses", values, chance, left_out)


def by_group(measures: Sequence[Measure]) -> Iterator[Measure]:
    """All problems of a group's families together, for each quantity: many problems, a narrow interval."""
    for group, names in GROUPS.items():
        pooled: dict[str, list[Measure]] = {}
        for measure in measures:
            if measure.name in names:
                pooled.setdefault(measure.quantity, []).append(measure)
        for quantity, own in pooled.items():
            if len(own) < 2:
                continue
            units = [unit for measure in own for unit in measure.units]
            left_out = sum(measure.left_out for measure in own) - sum(not any(unit) for unit in units)  # which are counted anew
            name = f"all {group}"
            if own[0].lower_is_better:
                yield summed("families", name, quantity, *zip(*units, strict=True), left_out=left_out)
            else:
                chance = sum(m.chance * m.estimate.count for m in own) / sum(m.estimate.count for m in own)
                yield scored("families", name, quantity, [top if bottom else None for top, bottom in units], chance, left_out)


def raised(own: Sequence[Scored], others: Sequence[Scored]) -> float:
    """1 if the first answer is the one whose share its own question raises most over another question; a share of a tie.

    Shares are of likelihood per token, so that they are equal in a model that knows nothing. Not log-likelihoods are compared
    but shares: of two unlikely answers one may be a thousand times likelier than before and still be unlikely. Of answers
    raised alike (`ALIKE`), such as by a question that the other one resembles, the likeliest is chosen.
    """
    shares = _shares(own)
    gains = shares - _shares(others)
    left = np.where(gains >= gains.max() - ALIKE, shares, 0.0)
    best = np.isclose(left, left.max(), rtol=1e-6, atol=0)
    return float(best[0] / best.sum())


def _shares(scores: Sequence[Scored]) -> np.ndarray:
    """Softmax of the mean log-probability of each answer's tokens."""
    means = -np.array([one.total / len(one.nats) for one in scores])
    weights = np.exp(means - means.max())
    return weights / weights.sum()


def _question(
    scorer: Scorer, form: BaseForm, problem: Problem, other: Problem, rng: random.Random
) -> tuple[Passage, Passage] | None:
    """The right answer and near misses as text, behind the problem and behind another one; None if they do not fit."""
    begun = form.begun(problem)
    demonstration = problem.demonstrate(thinking=False)
    right = _first_turn(demonstration, begun)
    if right is None:
        return None
    wrong: dict[str, None] = {}
    for _ in range(2 * NEAR_MISSES):
        response = problem.near_miss(rng)
        miss = _first_turn(response, begun)
        # In a world of several turns the first one ("look it up") is right for most problems: no question raises it.
        whole = len(demonstration) == len(response) == 1
        if whole and miss is not None and miss != right and len(wrong) < NEAR_MISSES:
            wrong[miss] = None
    for shots in range(len(form.shots), -1, -1):
        pair = tuple(
            split_at_choice(scorer.tokenizer, form.text(asked, (), shots), [right, *wrong]) for asked in (problem, other)
        )
        if max(passage.longest for passage in pair) <= scorer.model.config.max_position_embeddings:
            return pair
    return None


def _first_turn(response: Sequence[Message], begun: str) -> str | None:
    """The text of the first message, without what the prompt has begun; None where it does not begin so."""
    message = {**in_one_form(response[0]), "reasoning_content": ""}
    text = conversation_text([message])
    text = ended(text) if len(response) == 1 else text
    return text.removeprefix(begun) if text.startswith(begun) else None
