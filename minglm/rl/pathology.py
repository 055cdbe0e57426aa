"""Pathologies of an answer, found by rules: what the report's pathology RL penalises (section 3.4): mixed languages, excessive
repetition, mistakes of format.

    pathologies([{"role": "user", "content": "Which is first?"}], [{"role": "assistant", "content": "ha " * 30}])
    # ("repetition: 'ha ' 30 times in a row",)

Each rule is exact about what it names and silent about the rest: a loop whose rounds differ, and two languages that share a
script, are left to a reward model or a rubric. Answers that were cut off and calls that cannot be read are known before
(`minglm.rl.rollout`): they have earned nothing already.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from minglm.posttrain.lint import MARK
from minglm.tasks.task import Message

TIMES, CHARACTERS, UNIT = 4, 32, 256  # a loop: so many times in a row, over so many characters; a round has at most so many
RULERS = " -=_*#~+|"  # of which lines and indentation are made
CALLS = 4  # the same calls in so many turns in a row

LATIN, EAST_ASIAN = "Latin", "East Asian"  # the latter share characters, and whose texts mix them
SCRIPTS = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC"), EAST_ASIAN)
WORD = re.compile(r"[^\W\d_]+")


def pathologies(asked: Sequence[Message], response: Sequence[Message]) -> tuple[str, ...]:
    """What is wrong with a response whatever it says, each as "kind: what was found". Takes anything, raises nothing.

    asked: what the policy was given, whose marks and scripts it may use, as those of results of tools.
    """
    found: list[str] = []
    given = "\n".join(itertools.chain.from_iterable(map(_texts, asked)))
    said = [message for message in response if isinstance(message, Mapping)]
    for message in said:
        texts = list(_texts(message))
        if message.get("role") == "assistant":
            if not message.get("content") and not message.get("tool_calls"):
                found.append("empty: a turn with neither answer nor call")
            for text in texts:
                found += [*_repetition(text), *_marks(text, given), *_mixing(text, given)]
        else:
            given = "\n".join([given, *texts])
    calls = [repr(one["tool_calls"]) for one in said if one.get("role") == "assistant" and one.get("tool_calls")]
    rounds = max((len(list(same)) for _, same in itertools.groupby(calls)), default=0)
    if rounds >= CALLS:
        found.append(f"repetition: the same calls in {rounds} turns in a row")
    return tuple(dict.fromkeys(found))


def _texts(message: Message) -> Iterator[str]:
    for key in ("reasoning_content", "content"):
        text = message.get(key) if isinstance(message, Mapping) else None
        if isinstance(text, str) and text:
            yield text


def periodic(codes: np.ndarray, longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each period from 1 to `longest`, which is shorter than the codes: where the stretches of them that have it begin, and
    how long they are, (stretches,) each. One without a repetition is as long as its period."""
    for period in range(1, longest + 1):
        # A stretch of period p and length n is n - p places in a row that equal the place p further on.
        differ = np.flatnonzero(codes[period:] != codes[:-period])
        edges = np.concatenate([[-1], differ, [len(codes) - period]])
        yield period, edges[:-1] + 1, np.diff(edges) - 1 + period


def _repetition(text: str) -> Iterator[str]:
    """The longest loop: a stretch of `CHARACTERS` or more that repeats a round of at most `UNIT` characters `TIMES` or more."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    best, unit = 0, ""
    for period, starts, lengths in periodic(codes, min(UNIT, len(codes) // TIMES)):
        for at in np.flatnonzero(lengths >= max(CHARACTERS, TIMES * period)):
            start = int(starts[at])
            once = text[start : start + period]
            if lengths[at] > best and once.strip(RULERS):
                best, unit = int(lengths[at]), once
    if unit:
        yield f"repetition: {unit!r} {best // len(unit)} times in a row"


def _marks(text: str, given: str) -> Iterator[str]:
    """Names of special tokens in a text of the policy's: a thinking that was opened twice or late, a call inside it, ..."""
    for mark in sorted({*MARK.findall(text)}):
        if mark not in given:
            yield f"mark out of place: {mark}"
    if sum(line.lstrip().startswith("```") for line in re.split(r"\r\n|\n|\r", text)) % 2:
        yield "mark out of place: a block of code that is never closed"


def _mixing(text: str, given: str) -> Iterator[str]:
    """Words of a script that what was given has not, in a text that has words of another one too. Latin ones stand in texts of
    every language, as names, units and code."""
    scripts = _scripts(text)
    if len(scripts) > 1:
        for script in sorted(scripts - _scripts(given) - {LATIN}):
            yield f"mixed scripts: {script} words among {' and '.join(sorted(scripts - {script}))} ones"


def _scripts(text: str) -> set[str]:
    """Of which words are made: two letters in a row, or one that is East Asian; other single letters are symbols (`Δx`)."""
    if text.isascii():
        return {LATIN} if any(len(word) > 1 for word in WORD.findall(text)) else set()
    found = set()
    for word in WORD.findall(unicodedata.normalize("NFKC", text)):
        names = [unicodedata.name(letter, "").split(" ")[0] for letter in word]
        scripts = [SCRIPTS.get(name, name.capitalize()) for name in names]
        found |= {one for one, next_one in itertools.pairwise(scripts) if one == next_one}
        found |= {EAST_ASIAN} & {*scripts}
    return found - {""}
