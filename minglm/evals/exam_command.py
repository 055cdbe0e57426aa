"""What `eval` does with --benchmark, --endpoint, --self-test and --compare.

python -m minglm eval runs/demo --benchmark families --modes thinking automatic --samples 4
python -m minglm eval --endpoint http://localhost:8000/v1 --model mine --benchmark aime --data aime_2024.jsonl
python -m minglm eval --compare runs/a/eval-families runs/b/eval-families
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.chat import MODES
from minglm.config import ConfigError
from minglm.evals.attempts import ChatForm, EndpointWriter, EngineWriter, Writer
from minglm.evals.benchmarks.question import Question
from minglm.evals.benchmarks.registry import BENCHMARKS, load
from minglm.evals.compare import ANSWERS, compare, table_of
from minglm.evals.endpoint import GRADER_KEY, Endpoint
from minglm.evals.exam import drawn, measures_of, overview, plot, sit, unjudged
from minglm.evals.families import by_group
from minglm.evals.families import questions as family_questions
from minglm.evals.measure import Results, table
from minglm.evals.self_test import self_test, summary
from minglm.evals.suite import LIMIT
from minglm.tasks import FAMILIES

if TYPE_CHECKING:
    from minglm.evals.command import Eval

OURS = "families"
TOKENS = 4096  # of a turn, for benchmarks
TEMPERATURE = 0.6  # of several samples


def run_compare(command: "Eval") -> int:
    before, after = command.compare
    print(table_of(compare(before, after)))
    print(
        "\nafter - before, problem by problem, with 95% intervals; bold: surely not chance; detectable: the smallest true "
        "difference that this many problems would show in 80 of 100 comparisons"
    )
    return 0


def run_self_test(command: "Eval") -> int:
    """-> 0 if every judge gives gold 1, and empty and copied answers 0; else 1."""
    names = command.benchmark or (OURS, *(name for name in BENCHMARKS if command.data and _entry(command.data, name)))
    checks = list(self_test(questions_of(command, names)))
    print("\n".join(summary(checks)))
    return int(any(check.fails for check in checks))


def run_exam(command: "Eval") -> int:
    """Ask, judge, and write answers, results.json of each model, a table and a picture. -> 0."""
    names = command.benchmark or (OURS,)
    questions = questions_of(command, names)
    subjects = _subjects(command, names)
    out = command.out or _place(names, subjects)
    asked = f"{len(questions)} questions, each {command.samples} times in {', '.join(command.modes)}"
    print(f"eval: {', '.join(names)}: {asked}; everything is written to {out}\n")
    results = {}
    for label, (options, run, writer_of) in subjects.items():
        file = out / f"{_file_name(label)}{ANSWERS}"
        if command.again:
            file.unlink(missing_ok=True)
        writers = {mode: functools.partial(writer_of, MODES[mode]) for mode in command.modes}
        rows = sit(questions, writers, command.samples, command.seed, file, options, progress=True)
        overlap = _overlap(command, questions, run, options)
        own = Results(label, "+".join(names), command.limit or 0, command.seed)
        own.measures = measures_of(rows, _chances(questions), overlap or {})
        own.measures += by_group([m for m in own.measures if m.quantity.startswith(("mean", "tokens"))])
        own.details = {"options": options, "unjudged": unjudged(rows)}
        if overlap is not None:
            own.details["overlap"] = {suite: sorted(ids) for suite, ids in overlap.items()}
            _tell_overlap(questions, overlap)
        own.save(out / f"{_file_name(label)}.json")
        results[label] = own
        for reason, count in own.details["unjudged"].items():
            print(f"{label}: {count} answers not judged: {reason}")
    text = overview({label: own.measures for label, own in results.items()})
    stands_for = "\n".join(_stands_for(questions))
    (out / "table.md").write_text(f"{text}\n\n{stands_for}\n\n{table(results)}\n", encoding="utf-8")
    print(f"\n{text}\n\n{stands_for}\n\nmean reward, 95% intervals over problems; table.md has pass@k, pass^k and all else")
    if any(own.measures for own in results.values()):
        plot({label: own.measures for label, own in results.items()}, out / "exam.png")
    print(f"made: {', '.join(str(path) for path in sorted(out.iterdir()))}")
    return 0


def questions_of(command: "Eval", names: Sequence[str]) -> list[Question]:
    """The questions of our families and of published benchmarks. Raises EvaluationError for a name or file that is none."""
    grader = _grader(command)
    found: list[Question] = []
    for name in names:
        if name == OURS:
            unknown = [family for family in command.families if family not in FAMILIES]
            if unknown:
                raise ConfigError(f"families {unknown}: wanted some of {', '.join(FAMILIES)}")
            limit = LIMIT if command.limit is None else command.limit
            found += family_questions(limit, command.seed, command.levels, command.families or list(FAMILIES))
            continue
        path = command.data and (_entry(command.data, name) or command.data)
        if path is None:
            wanted = BENCHMARKS[name].data if name in BENCHMARKS else "file"
            raise ConfigError(f"eval: --benchmark {name} without --data; wanted the path of its {wanted}")
        found += drawn(load(name, path, grader), command.limit, command.seed)
    return found


def _entry(data: Path, name: str) -> Path | None:
    """In a folder of several benchmarks: the file or folder of this name."""
    found = [data / name, *sorted(data.glob(f"{name}.*"))] if data.is_dir() else []
    return next((path for path in found if path.exists()), None)


def _grader(command: "Eval") -> Endpoint | None:
    if (command.grader_url is None) != (command.grader_name is None):
        raise ConfigError("eval: wanted --grader-url and --grader-name, or neither")
    return Endpoint(command.grader_url, command.grader_name, GRADER_KEY) if command.grader_url else None


Subject = tuple[dict[str, Any], Path | None, Callable[[bool | None], Writer]]


def _subjects(command: "Eval", names: Sequence[str]) -> dict[str, Subject]:
    """Label -> options that decide its answers, its run folder, and how a writer of a mode is made."""
    temperature = command.temperature
    if temperature is None:
        temperature = 0.0 if command.samples == 1 else TEMPERATURE
    if command.samples < 1 or command.limit is not None and command.limit < 1 or temperature < 0:
        raise ConfigError(
            f"samples = {command.samples}, limit = {command.limit}, temperature = {temperature}: wanted 1 or more, 0 or more"
        )
    shared = {"seed": command.seed, "temperature": temperature}
    if command.grader_name is not None:
        shared["grader"] = command.grader_name  # an answer left unjudged for want of one stays so in its file
    if command.endpoint is not None:
        if command.model is None or command.models:
            raise ConfigError("eval: wanted --endpoint with --model NAME, and no folder of a model")
        endpoint, tokens = Endpoint(command.endpoint, command.model), command.tokens
        options = {"endpoint": command.endpoint, "model": command.model, **shared, "tokens": tokens}
        return {command.model: (options, None, lambda mode: EndpointWriter(endpoint, mode, temperature, tokens))}
    from minglm.evals.command import find_columns, weights_written

    tokens = command.tokens or (None if tuple(names) == (OURS,) else TOKENS)
    found = {}
    for label, (folder, run) in find_columns(command.models).items():
        options = {"model": str(folder.resolve()), "weights_written": weights_written(folder), **shared, "tokens": tokens}
        found[label] = (options, run, functools.partial(_engine_writer, folder, command.device, temperature, tokens))
    return found


def _engine_writer(folder: Path, device: str, temperature: float, tokens: int | None, mode: bool | None) -> EngineWriter:
    engine = _engine(folder, device)
    return EngineWriter(engine, ChatForm(engine.tokenizer, mode), temperature, tokens)


@functools.lru_cache(1)
def _engine(folder: Path, device: str):
    import torch

    from minglm.checkpoint import load_model
    from minglm.engine.engine import Engine
    from minglm.tokenizer import Tokenizer
    from minglm.train.device import choose_device
    from minglm.train.recipe import Hardware

    chosen = choose_device(Hardware(device=device))
    model = load_model(folder, torch.bfloat16 if chosen.bf16 else torch.float32, chosen.torch_device).eval()
    return Engine(model, Tokenizer.from_pretrained(folder))


def _place(names: Sequence[str], subjects: Mapping[str, Subject]) -> Path:
    """Beside the run's other files, or in runs/."""
    label, (_, run, _) = next(iter(subjects.items()))
    name = f"eval-{'+'.join(names)}"
    return run / name if run else Path("runs", f"{name}-{_file_name(label)}")


def _file_name(label: str) -> str:
    from minglm.evals.command import file_name

    return file_name(label)


def _chances(questions: Sequence[Question]) -> dict[str, float | None]:
    found: dict[str, list[float | None]] = {}
    for question in questions:
        found.setdefault(question.suite, []).append(question.chance)
    return {suite: None if None in own else sum(own) / len(own) for suite, own in found.items()}


def _stands_for(questions: Sequence[Question]) -> Iterator[str]:
    """A line for each suite: what it stands for, or how it is judged."""
    for suite in dict.fromkeys(question.suite for question in questions):
        if suite in FAMILIES:
            yield f"- {suite}: {FAMILIES[suite].stands_for}"
        else:
            needs = f"; not without {BENCHMARKS[suite].needs}" if BENCHMARKS[suite].needs else ""
            yield f"- {BENCHMARKS[suite].title}: {BENCHMARKS[suite].judged}{needs}"


# ---- contamination


def _overlap(
    command: "Eval", questions: Sequence[Question], run: Path | None, options: Mapping[str, Any]
) -> dict[str, set[str]] | None:
    """Of each suite the questions that training text holds 13 words in a row of; None where no such text is known."""
    from minglm.data.duplicates import shared_with

    texts = _training_texts(command.training_data, run, Path(options["model"]) if "endpoint" not in options else None)
    if texts is None:
        return None
    found: dict[str, set[str]] = {question.suite: set() for question in questions}
    for index in shared_with([question.published or question.text for question in questions], texts):
        found[questions[index].suite].add(questions[index].id)
    return found


def _training_texts(data: Path | None, run: Path | None, model: Path | None) -> Iterable[str] | None:
    from minglm.data.shards import MANIFEST, open_dataset
    from minglm.data.sources import TRAIN, documents_from_path
    from minglm.evals.command import data_of
    from minglm.tokenizer import Tokenizer

    folder = data or data_of(run)
    if folder is None:
        return None
    prepared = next((place for place in (folder, folder / "tokens") if (place / MANIFEST).is_file()), None)
    if prepared is None:
        return (document.text for document in documents_from_path(folder)) if data else None
    if model is None:
        raise ConfigError(f"eval: {prepared} holds tokens, and an endpoint has no tokenizer here; wanted own text")
    tokenizer: Tokenizer = Tokenizer.from_pretrained(model)
    split = open_dataset(prepared, tokenizer).splits[TRAIN]
    return (tokenizer.decode(split.document(index).tolist()) for index in range(split.num_documents))


def _tell_overlap(questions: Sequence[Question], overlap: Mapping[str, set[str]]) -> None:
    for suite, ids in overlap.items():
        count = sum(question.suite == suite for question in questions)
        if ids:
            print(f"{suite}: {len(ids)} of {count} questions have 13 words in a row in common with the training text")
    if not any(overlap.values()):
        print(f"none of {len(questions)} questions has 13 words in a row in common with the training text")
