"""The command `eval`: judge checkpoints, or all stages of a run, in one table.

python -m minglm eval runs/nano                      every stage of the run, a column each
python -m minglm eval runs/a/checkpoints/step-600 my/model --suite needle

With --benchmark, --endpoint, --self-test or --compare it is an exam in chat form: minglm/evals/exam_command.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from minglm.config import ConfigError

if TYPE_CHECKING:
    from minglm.data.shards import Dataset
    from minglm.evals.measure import Results
    from minglm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Eval:
    """Judge models on held-out documents and problems: a table with 95% intervals, a column for each model or stage.

    With --benchmark or --endpoint: an exam in chat form, of our families or of published benchmarks, in several modes.
    """

    models: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_OR_CHECKPOINT")] = ()
    """Run folders (each stage of the run is a column) and folders of models: ours or published, with their tokenizer."""
    suite: str = "base"
    """base, chat or all; or parts: bits, completion, fim, names, needle, likelihood, families, chat, joined by commas."""
    limit: int | None = None
    """Problems of each family and mode (16), to which the other parts ask in proportion; of a published benchmark (all)."""
    seed: int = 0
    """Which problems and documents."""
    levels: int = 2
    """Of each family's difficulties, from the easiest on."""
    families: tuple[str, ...] = ()
    """Only these families (by default all)."""
    window: int | None = None
    """Tokens of a held-out document read at once (by default those of the run's first stage, or 512)."""
    data: Path | None = None
    """A folder prepared by training, or own text, for held-out documents (by default the run's own). With --benchmark: the
    benchmark's file or folder, or a folder of several by their names."""
    out: Path | None = None
    """Where everything is written (by default eval-SUITE in the first one's run folder, or in runs/)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; bf16 where a GPU has it, fp32 elsewhere."""
    again: bool = False
    """Judge anew what was judged before with the same options."""
    benchmark: tuple[str, ...] = ()
    """An exam: families, or published benchmarks, from files that you have (--data); nothing is downloaded."""
    endpoint: str | None = None
    """Ask a model behind this OpenAI-compatible URL (key: MINGLM_EVAL_KEY), which --model names, instead of a folder's."""
    model: str | None = None
    """With --endpoint: what it calls the model."""
    modes: tuple[Literal["thinking", "non-thinking", "automatic"], ...] = ("thinking", "non-thinking", "automatic")
    """Of an exam."""
    samples: int = 1
    """Answers to each question of an exam; several give pass@k and pass^k."""
    temperature: float | None = None
    """Of an exam (0, and 0.6 for several samples)."""
    tokens: int | None = None
    """Of a turn of an exam, at most (4096; of our families half as many again as their demonstrations have; the limit of an
    endpoint is its own)."""
    grader_url: str | None = None
    """An endpoint with a model that judges free answers and plays customers (key: MINGLM_GRADER_KEY)."""
    grader_name: str | None = None
    """What it calls that model."""
    training_data: Path | None = None
    """Text, or a prepared folder, that questions of an exam are looked for in, 13 words in a row (by default the run's)."""
    self_test: bool = False
    """Ask no model: does every judge give right answers 1, and empty and copied ones 0?"""
    compare: tuple[Path, Path] | None = None
    """Two folders of exams: differences problem by problem, and the smallest that could be seen."""


def run_eval(command: Eval) -> int:
    """Judge every model, write results.json of each, a table and a picture; or sit an exam. -> 0; 1 if a self-test fails."""
    if command.compare or command.self_test or command.benchmark or command.endpoint:
        from minglm.evals import exam_command

        if command.compare:
            return exam_command.run_compare(command)
        return exam_command.run_self_test(command) if command.self_test else exam_command.run_exam(command)
    from minglm.evals.measure import table
    from minglm.evals.needle import plot_grids
    from minglm.evals.suite import parts_of

    parts = parts_of(command.suite)
    columns = find_columns(command.models)
    out = command.out or _place(command.suite, *next(iter(columns.values())))
    print(f"eval: {', '.join(columns)}; suite {command.suite} ({', '.join(parts)}); everything is written to {out}\n")
    out.mkdir(parents=True, exist_ok=True)
    results = {label: _judged(command, label, folder, run, out) for label, (folder, run) in columns.items()}
    text = table(results)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    made = [out / "table.md", *(out / f"{file_name(label)}.json" for label in columns)]
    grids = {label: one.details["needle"] for label, one in results.items() if "needle" in one.details}
    if grids:
        for what in ("chosen", "exact"):
            made.append(out / f"needle-{what}.png")
            plot_grids(grids, made[-1], what)
    print(f"\n{text}\n\nintervals are 95%; bold: better than chance; ▲ ▼: better or worse than the column before, item by item")
    print(f"made: {', '.join(map(str, made))}")
    return 0


def find_columns(models: Sequence[Path]) -> dict[str, tuple[Path, Path | None]]:
    """Label -> model folder, and the run folder that it belongs to. Raises `ConfigError` for what holds no model."""
    from minglm.train.run_folder import RunFolder

    if not models:
        raise ConfigError("eval: wanted a run folder or a folder of a model")
    found: dict[str, tuple[Path, Path | None]] = {}

    def add(label: str, folder: Path, run: Path | None) -> None:
        if label in found:
            raise ConfigError(f"eval: found {folder} twice; wanted different models")
        found[label] = (folder, run)

    runs = [path.resolve().parents[1] if _is_checkpoint(path) else None for path in models]
    names = _names([run or path.resolve() for path, run in zip(models, runs, strict=True)])
    for path, its_run in zip(models, runs, strict=True):
        name = names[its_run or path.resolve()]
        if (path / "config.json").is_file():
            add(f"{name}: {path.resolve().name}" if its_run else name, path, its_run)
            continue
        prefix = f"{name}: " if len(models) > 1 else ""
        run = RunFolder(path)
        newest = run.newest_checkpoint()
        if newest is None:
            raise ConfigError(f"eval: found no checkpoint in {path}; wanted a folder with config.json, or a run folder")
        stages = run.stage_checkpoints()
        if newest not in stages.values():
            stages[newest.name] = newest
        for label, folder in stages.items():
            add(prefix + label, folder, path)
    return found


def _is_checkpoint(path: Path) -> bool:
    """Of a run."""
    return (path / "config.json").is_file() and path.resolve().parent.name == "checkpoints"


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The ends of absolute paths, with as many of the folders above as tell them apart: an ablation's are all called seed-1."""
    different = list(dict.fromkeys(paths))
    for count in range(1, 1 + max(len(path.parts) for path in different)):
        names = {path: "/".join(path.parts[-count:]) for path in different}
        if len(set(names.values())) == len(different):
            break
    return names


def _place(suite: str, folder: Path, run: Path | None) -> Path:
    """Beside the run's other files; never inside a model's folder."""
    name = f"eval-{suite.replace(',', '+')}"
    return run / name if run else Path("runs", f"{name}-{folder.resolve().name}")


def _judged(command: Eval, label: str, folder: Path, run: Path | None, out: Path) -> "Results":
    """The results of one model; those of an earlier call with the same options are read."""
    import torch

    from minglm.checkpoint import load_model
    from minglm.evals.measure import Results
    from minglm.evals.suite import evaluate
    from minglm.tokenizer import Tokenizer
    from minglm.train.device import choose_device
    from minglm.train.recipe import Hardware

    path = out / f"{file_name(label)}.json"
    options = _options(command, folder, run)
    if path.is_file() and not command.again:
        known = Results.load(path)
        if known.details.get("options") == options:
            print(f"{label}: judged before, {path}")
            return known
    tokenizer = Tokenizer.from_pretrained(folder)
    dataset = find_dataset(command.data, run, tokenizer, out)
    device = choose_device(Hardware(device=command.device))
    model = load_model(folder, torch.bfloat16 if device.bf16 else torch.float32, device.torch_device).eval()
    results = evaluate(
        model,
        tokenizer,
        dataset,
        command.suite,
        options["limit"],
        command.seed,
        label=label,
        window=options["window"],
        levels=command.levels,
        families_asked=command.families or None,
        progress=True,
    )
    results.details["options"] = options
    results.save(path)
    return results


def _options(command: Eval, folder: Path, run: Path | None) -> dict[str, Any]:
    """Everything that decides the results."""
    from minglm.config import GLMConfig
    from minglm.evals.suite import LIMIT, SHORTEST_WINDOW, WINDOW

    positions = GLMConfig.from_pretrained(folder).max_position_embeddings
    window = command.window or min(max(first_length(run) or WINDOW, SHORTEST_WINDOW), positions)
    return {
        "model": str(folder.resolve()),
        "weights_written": weights_written(folder),
        "suite": command.suite,
        "limit": LIMIT if command.limit is None else command.limit,
        "seed": command.seed,
        "levels": command.levels,
        "families": list(command.families),
        "window": window,
        "data": str(command.data) if command.data else None,
    }


def weights_written(folder: Path) -> int:
    """When a model's newest weights were, in ns. Raises `ConfigError` for a folder without."""
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"eval: found no *.safetensors in {folder}; wanted a Hugging Face folder, which python -m scale.export makes of "
            "the sharded checkpoint of many ranks"
        )
    return max(file.stat().st_mtime_ns for file in weights)


def first_length(run: Path | None) -> int | None:
    """The sequence length of a run's first stage: what all its stages have learnt, so that their windows compare."""
    from minglm.train.run_folder import RunFolder

    recipe = RunFolder(run).training_recipe() if run else None
    return recipe.plan().stages[0].sequence_length if recipe else None


def find_dataset(data: Path | None, run: Path | None, tokenizer: "Tokenizer", out: Path) -> "Dataset | None":
    """The held-out documents: of a prepared folder, of own text (prepared in `out`), or of the run's data.

    None, with a word about it, where none are given and the model belongs to no run.
    """
    from minglm.data.shards import MANIFEST, open_dataset, prepare
    from minglm.data.sources import documents_from_path

    if data is not None and not (data / MANIFEST).is_file() and not (data / "tokens" / MANIFEST).is_file():
        return prepare(documents_from_path(data), tokenizer, out / f"data-{tokenizer.fingerprint[:12]}")
    folder = data or data_of(run)
    if folder is None:
        print("no held-out documents: the model belongs to no run; --data names a prepared folder or own text")
        return None
    return open_dataset(folder if (folder / MANIFEST).is_file() else folder / "tokens", tokenizer)


def data_of(run: Path | None) -> Path | None:
    from minglm.train.run_folder import RunFolder

    recipe = RunFolder(run).training_recipe() if run else None
    return (recipe.data.folder or run / "data") if recipe else None


def file_name(label: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in label)
