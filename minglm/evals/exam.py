"""An exam: questions of benchmarks and families, asked in chat form, in several modes, several times each.

Every answer is a line of a JSONL file as soon as it is judged, so that the same call goes on where it was stopped, and asks
only what is new if it wants more questions, modes or samples. What is drawn for an answer depends on the seed, question, mode
and number of the sample, and on nothing else.
"""

import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minglm.chat import has_thought
from minglm.evals.attempts import Attempt, Writer, attempt
from minglm.evals.benchmarks.question import Question
from minglm.evals.interval import Estimate
from minglm.evals.measure import EvaluationError, Measure, scored, summed
from minglm.evals.passes import ks_of, pass_all, pass_at
from minglm.files import whole_lines

TOGETHER = 64  # answers between two looks at what is left to ask
Row = dict[str, Any]


def drawn(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` of them, in their order: with a larger limit these and more."""
    if limit is None or limit >= len(questions):
        return list(questions)
    places = random.Random(f"questions {seed}").sample(range(len(questions)), len(questions))[:limit]
    return [questions[place] for place in sorted(places)]


def key_of(question: Question, mode: str, sample: int) -> tuple[str, str, str, int, str]:
    """What an answer belongs to. A question that reads otherwise than before is another one."""
    asked = json.dumps([question.messages, question.tools], sort_keys=True, default=str)
    return question.suite, question.id, mode, sample, hashlib.sha256(asked.encode()).hexdigest()[:12]


def sit(
    questions: Sequence[Question],
    writers: Mapping[str, Callable[[], Writer]],
    samples: int,
    seed: int,
    file: Path,
    options: Mapping[str, Any],
    progress: bool = False,
) -> list[Row]:
    """Ask what the file does not hold yet. -> the rows of all that was asked for.

    writers: by mode. options: all else that decides an answer; a file of others is refused. A row holds suite, id, mode,
    sample, asked (the question's hash), reward (None: not judged, see `reasons`), tokens, thought, cut, too_long, response.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"options": dict(options)}) + "\n"
    if not file.is_file() or head.encode().startswith(file.read_bytes()):  # none yet, or killed while this line was written
        file.write_text(head, encoding="utf-8")
    known = read_rows(file, options)
    wanted = [(q, mode, sample) for mode in writers for q in questions for sample in range(samples)]
    open = [one for one in wanted if key_of(*one) not in known]
    if known and open:
        print(f"{file}: {len(wanted) - len(open)} of {len(wanted)} answers are there")
    with (
        file.open("a", encoding="utf-8") as lines,
        tqdm(total=len(wanted), initial=len(wanted) - len(open), desc="exam", unit="answer", disable=not progress) as bar,
    ):
        for mode, writer_of in writers.items():
            own = [one for one in open if one[1] == mode]
            writer = writer_of() if own else None
            for start in range(0, len(own), TOGETHER):
                part = own[start : start + TOGETHER]
                attempts = [Attempt(q, _seed(seed, key_of(q, mode, sample))) for q, _, sample in part]
                keys = {id(one): key_of(*asked) for one, asked in zip(attempts, part, strict=True)}

                def keep(one: Attempt, keys: dict[int, Any] = keys) -> None:
                    key = keys[id(one)]
                    known[key] = _row(key, one)
                    lines.write(json.dumps(known[key]) + "\n")
                    lines.flush()
                    bar.update()

                bar.set_postfix_str(f"{mode}, {part[0][0].suite}")
                attempt(writer, attempts, mode, progress=False, done=keep)
    return [known[key_of(*one)] for one in wanted]


def _seed(seed: int, key: Sequence[Any]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *key]).encode()).digest()[:7])


def _row(key: Sequence[Any], one: Attempt) -> Row:
    reasons = [one.unjudged] if one.unjudged else list(one.verdict.reasons)
    return {
        **dict(zip(("suite", "id", "mode", "sample", "asked"), key, strict=True)),
        "reward": None if one.unjudged else one.verdict.reward,
        "reasons": reasons,
        "tokens": one.tokens,
        "thought": has_thought(one.response),
        "cut": one.cut,
        "too_long": one.too_long,
        "response": one.response,
    }


def read_rows(file: Path, options: Mapping[str, Any] | None = None) -> dict[tuple, Row]:
    """The answers of a file by their keys. A last line that was cut off is taken away. Raises EvaluationError for a file of
    other options, or one that is none of ours."""
    whole = whole_lines(file.read_bytes())
    try:
        head, *rows = map(json.loads, whole)
        found = {tuple(row[name] for name in ("suite", "id", "mode", "sample", "asked")): row for row in rows}
        known = head["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file}: these are no answers of an exam ({error!r}); delete the file") from error
    if options is not None:
        if known != json.loads(json.dumps(dict(options))):
            differ = [key for key in {**known, **options} if known.get(key) != options.get(key)]
            told = ", ".join(f"{key} = {known.get(key)!r}, now {options.get(key)!r}" for key in differ)
            raise EvaluationError(f"{file} was written with {told}; wanted another --out, or --again to begin anew")
        os.truncate(file, sum(len(line) + 1 for line in whole))
    return found


def by_suite(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """(suite, mode) -> question -> its rows; the modes of a suite one after the other."""
    suites: dict[str, dict[tuple[str, str], dict[str, list[Row]]]] = {}
    for row in rows:
        key = row["suite"], row["mode"]
        suites.setdefault(row["suite"], {}).setdefault(key, {}).setdefault(row["id"], []).append(row)
    return {key: own for modes in suites.values() for key, own in modes.items()}


def measures_of(rows: Sequence[Row], chances: Mapping[str, float | None], overlapping: Mapping[str, set[str]]) -> list[Measure]:
    """For each suite and mode: the mean reward over all samples, pass@k, pass^k, tokens and the share of answers that thought.

    Problems are the units, so that an interval says what another draw of problems would give; those without an answer that
    was judged are left out. chances: by suite. overlapping: of a suite, the ids that training text holds; where there are some,
    the others are measured apart.
    """
    return [
        measure
        for (suite, mode), questions in by_suite(rows).items()
        for measure in _measures(suite, mode, questions, chances.get(suite), overlapping.get(suite, set()))
    ]


def _measures(
    suite: str, mode: str, questions: Mapping[str, list[Row]], chance: float | None, overlapping: set[str]
) -> Iterator[Measure]:
    judged = [[row for row in own if usable(row)] for own in questions.values()]
    if not any(judged):
        return

    def each(
        quantity: str, value: Callable[[list[Row]], float], of: Sequence[list[Row]], chance: float | None = None
    ) -> Measure:
        return scored("exam", suite, f"{quantity}, {mode}", [value(own) if own else None for own in of], chance)

    n = max(map(len, questions.values()))
    average = f"mean of {n}" if n > 1 else "mean"
    yield each(average, _mean("reward"), judged, chance)
    clean = [[] if id in overlapping else own for id, own in zip(questions, judged, strict=True)]
    if any(clean) and clean != judged:
        yield each(f"{average} without overlap", _mean("reward"), clean, chance)
    for k in ks_of(n):
        enough = [own if len(own) >= k else [] for own in judged]  # of fewer answers there is nothing to draw k from
        if any(enough):
            yield each(f"pass@{k}", functools.partial(_passes, pass_at, k), enough)
            yield each(f"pass^{k}", functools.partial(_passes, pass_all, k), enough)
    tokens = [sum(row["tokens"] for row in own) for own in judged]
    yield summed("exam", suite, f"tokens an answer, {mode}", tokens, [len(own) for own in judged])
    yield each("answers that thought", _mean("thought"), judged)
    if any(row["cut"] for own in judged for row in own):
        yield each("answers cut at the limit", _mean("cut"), judged)


def _passes(chance_of: Callable[[int, int, int], float], k: int, own: Sequence[Row]) -> float:
    return chance_of(k, len(own), sum(row["reward"] >= 1 for row in own))


def usable(row: Row) -> bool:
    """Whether an answer says something about the model: it was asked, and judged."""
    return row["reward"] is not None and not row["too_long"]


def _mean(what: str) -> Callable[[list[Row]], float]:
    return lambda own: sum(row[what] for row in own) / len(own)


def unjudged(rows: Iterable[Row]) -> dict[str, int]:
    """Why answers could not be judged, and how many."""
    found: dict[str, int] = {}
    for row in rows:
        if row["reward"] is None:
            found[row["reasons"][0]] = found.get(row["reasons"][0], 0) + 1
    return found


def overview(measures_by_label: Mapping[str, Sequence[Measure]]) -> str:
    """Markdown that fits a screen: a row for each suite, a column for each model and mode: mean reward, tokens an answer."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for label, own in measures_by_label.items():
        for measure in own:
            mode = measure.quantity.rpartition(", ")[2]
            column = f"{label}, {mode}" if len(measures_by_label) > 1 else mode
            row = cells.setdefault(measure.name, {})
            if measure.quantity.startswith("mean") and "without overlap" not in measure.quantity:
                columns[column] = None
                row[column] = measure.estimate.text(2)
            elif measure.quantity.startswith("tokens") and column in row:  # of some groups there is no mean
                row[column] += f", {measure.estimate.value:.0f} tokens"
    lines = [f"| suite | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | {' | '.join(row.get(column, '–') for column in columns)} |" for name, row in cells.items()]
    return "\n".join(lines)


def plot(measures_by_label: Mapping[str, Sequence[Measure]], path: Path) -> None:
    """Mean rewards with their intervals, and tokens beside them: a row for each suite and mode, a colour for each model."""
    from minglm.train.plots import DOMAIN_COLORS, drawing

    drawn = {label: [m for m in own if "without overlap" not in m.quantity] for label, own in measures_by_label.items()}
    names = list(dict.fromkeys(_named(m) for own in drawn.values() for m in own if m.quantity.startswith("mean")))
    with drawing(path, 10, 1.4 + 0.28 * len(names) * max(1, len(measures_by_label))) as figure:
        reward, tokens = figure.subplots(1, 2, sharey=True)
        height = 0.8 / len(measures_by_label)
        for number, (label, own) in enumerate(drawn.items()):
            colour = DOMAIN_COLORS[number % len(DOMAIN_COLORS)]
            for axes, beginning in ((reward, "mean"), (tokens, "tokens")):
                estimates = {_named(m): m.estimate for m in own if m.quantity.startswith(beginning)}
                places = [(place, estimates[name]) for place, name in enumerate(names) if name in estimates]
                ys = [place + number * height for place, _ in places]
                values = [estimate.value for _, estimate in places]
                axes.barh(ys, values, height, color=colour, label=label, xerr=_errors([one for _, one in places]))
        reward.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
        reward.invert_yaxis()
        reward.set(title="mean reward, 95% intervals", xlim=(0, 1))
        tokens.set(title="tokens an answer")
        reward.legend(loc="lower right")


def _named(measure: Measure) -> str:
    return f"{measure.name}, {measure.quantity.rpartition(', ')[2]}"


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    low = [one.value - (one.value if one.low is None else max(0.0, one.low)) for one in estimates]
    return [low, [(one.value if one.high is None else one.high) - one.value for one in estimates]]
