"""Expert iteration from a mid-trained base to a hybrid model (report, section 3), step by step:

    start/                       cold-start SFT, from the base
    experts/DOMAIN/              RL of each expert, from the start
    round-1/answers/DOMAIN/      what the experts answer, filtered, as samples
    round-1/sft/                 the unified model: SFT on these samples, from the base
    round-1/rl/                  RL on it, over all domains
    round-2/...                  `regenerated` domains are answered anew by the last kept model; then SFT and RL of it again
    round-N/gate.json            whether the round is kept: its held-out score is no worse than the last kept one's
    exams/MODEL/                 held-out attempts of each model in each mode
    results.json, results.md     the tables

Every step is a run folder of its own or a folder that is there only when it is complete, so that the same command goes on
where it was killed, repeats nothing that is finished, and ends with the same bits.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from signal import Signals
from typing import Any

from minglm.chat import MODES
from minglm.config import ConfigError
from minglm.files import write_text_atomically
from minglm.posttrain.experts.exam import ExpertsError, Questions, Sat, difference, questions, score, sit
from minglm.posttrain.experts.harvest import SAMPLES, counts_table, harvest, read_counts
from minglm.posttrain.experts.policy import Placed
from minglm.posttrain.experts.recipe import ExpertsRecipe, load_experts_recipe, save_experts_recipe, with_paths
from minglm.posttrain.experts.results import write_results
from minglm.posttrain.recipe import SFTRecipe
from minglm.posttrain.sft import sft
from minglm.rl.loop import rl
from minglm.rl.recipe import RLRecipe
from minglm.train.processes import in_processes, run_quietly
from minglm.train.recipe import differences
from minglm.train.run_folder import RunFolder, model_folder
from minglm.train.trainer import Outcome

GATE, FINISHED = "gate.json", "finished.json"


class Stopped(RuntimeError):
    """A signal has stopped a run on the way, which is saved. Attributes: signal, folder."""

    def __init__(self, signal: Signals, folder: Path):
        super().__init__(signal, folder)  # which other processes make it of again
        self.signal, self.folder = signal, folder

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} in {self.folder}, which is saved"


@dataclass(frozen=True)
class Round:
    """A round that has been done. answers: of each domain, where its samples are; sft, rl: the models' checkpoints; gate: what
    gate.json holds."""

    number: int
    answers: dict[str, Path]
    sft: Path
    rl: Path
    gate: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """The checkpoints of an iteration. kept: the last round that was kept."""

    start: Path
    experts: dict[str, Path]
    rounds: list[Round]

    @property
    def kept(self) -> Round:
        return next(one for one in reversed(self.rounds) if one.gate["kept"])


def experts(recipe: ExpertsRecipe, folder: str | Path) -> Made:
    """Do all steps in `folder`, or those that are still to be done there, and write the results.

    Raises `ConfigError` for a recipe that is not the folder's or does not fit, `Stopped` when a run was stopped by a signal,
    `ExpertsError`, and what `sft` and `rl` raise.
    """
    recipe, folder = open_folder(recipe, Path(folder))
    asked = questions(recipe.levels, recipe.exam, recipe.seed)
    made = _make(recipe, folder, asked)
    write_results(recipe, folder, sit_exams(recipe, folder, models_of(recipe, made), asked.judging), made)
    return made


def open_folder(recipe: ExpertsRecipe, folder: Path) -> tuple[ExpertsRecipe, Path]:
    """The recipe and the folder with absolute paths. Raises `ConfigError` if the folder holds another recipe's iteration."""
    if recipe.base is None:
        raise ConfigError("base: missing; wanted the run folder or the folder of the mid-trained model")
    folder, config = folder.resolve(), folder.resolve() / "config.toml"
    recipe = with_paths(replace(recipe, base=model_folder(recipe.base).resolve()), Path.resolve)
    if config.is_file():
        changes = list(differences(load_experts_recipe(config), recipe))
        if changes:
            raise ConfigError(
                f"{folder} holds the iteration of another recipe; {'; '.join(changes)}. To go on with it, give its own recipe "
                f"({config}); to start anew, give another --run-folder or delete this one"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_experts_recipe(recipe, config)
    return recipe, folder


def _make(recipe: ExpertsRecipe, folder: Path, asked: Questions) -> Made:
    start = run_once(sft, replace(recipe.start, base=recipe.base), folder / "start")
    runs = [(replace(one, base=start), folder / "experts" / domain) for domain, one in recipe.experts.items()]
    made = Made(start, dict(zip(recipe.experts, practise(runs, recipe.experts_at_once, folder), strict=True)), [])
    scored: list[Sat] = []
    for number in range(1, recipe.rounds + 1):
        done, sat = _round(recipe, folder / f"round-{number}", number, made, asked, scored)
        made.rounds.append(done)
        scored = sat if done.gate["kept"] else scored
    return made


def _round(
    recipe: ExpertsRecipe, folder: Path, number: int, made: Made, asked: Questions, scored: list[Sat]
) -> tuple[Round, list[Sat]]:
    """scored: the attempts of the last kept model at the problems that choose. -> the round, and its own attempts."""
    answers = dict(made.kept.answers) if made.rounds else {}
    draw = 1000 * recipe.seed + number  # other problems in each round
    for domain, expert in recipe.experts.items():
        if made.rounds and domain not in recipe.regenerated:
            continue
        answers[domain] = folder / "answers" / domain
        if not answers[domain].is_dir():
            teacher = made.kept.rl if made.rounds else made.experts[domain]
            row = recipe.unified_sft.training.sequence_length
            harvest(teacher, domain, expert, recipe.harvest, row, draw, answers[domain])
    print(f"\nround {number}, answers:\n\n{counts_table({domain: read_counts(answers[domain]) for domain in answers})}\n")
    distilled, practised = unified_sft(recipe, answers), recipe.unified_rl
    if made.rounds:
        distilled = replace(distilled, base=made.kept.rl, seed=draw)
        practised = replace(practised, seed=draw)
    unified = run_once(sft, distilled, folder / "sft")
    trained = run_once(rl, replace(practised, base=unified), folder / "rl")
    sat = sit(trained, recipe.unified_rl, asked.choosing, recipe.exam, folder / "gate", f"gate of round {number}")
    gate = gate_of(scored, sat, recipe.domain_of)
    text = json.dumps({"round": number, **gate}, indent=1) + "\n"
    write_text_atomically(folder / GATE, text)  # a function of the attempts, which are kept
    print(f"round {number}: held-out score {gate['score']:.3f}, {gate['reason']}")
    return Round(number, answers, unified, trained, gate), sat


def gate_of(before: list[Sat], after: list[Sat], domain_of: dict[str, str]) -> dict[str, Any]:
    """Whether a round is kept: the first one is; a later one if its score is no worse than that of the last kept one."""
    found = score(after, domain_of)
    if not before:
        return {"score": found, "before": None, "difference": None, "kept": True, "reason": "kept: it is the first round"}
    last, change = score(before, domain_of), difference(before, after)
    kept = found >= last
    reason = f"{'kept' if kept else 'not kept'}: the last kept round has {last:.3f}; problem by problem {change.text()} more"
    return {"score": found, "before": last, "difference": change.numbers, "kept": kept, "reason": reason}


def unified_sft(recipe: ExpertsRecipe, answers: dict[str, Path]) -> SFTRecipe:
    """SFT from the base on samples of all domains, by the weights of the recipe's modes; a mode without samples is left out
    unless demonstrations fill it. Raises `ExpertsError` where nothing is left to learn from."""
    counts = [read_counts(folder)["kept"] for folder in answers.values()]
    data = recipe.unified_sft.conversations
    held = {mode: sum(one[mode] for one in counts) for mode in MODES}
    weights = {mode: weight if held[mode] or data.file_share < 1 else 0.0 for mode, weight in data.weights.items()}
    if not any(weights.values()):
        raise ExpertsError(f"no answer has passed the filters (counts.json in {', '.join(map(str, answers.values()))})")
    # So many that each sample is dealt once, at least; those of a mode with few come round again.
    share = data.file_share or 1.0
    needed = [held[mode] * sum(weights.values()) / (weight * share) for mode, weight in weights.items() if weight]
    conversations = replace(
        data,
        samples=ceil(max(needed)) or data.samples,  # none held: demonstrations alone
        files=tuple(folder / SAMPLES for folder in answers.values()),
        **{mode.replace("-", "_"): weight for mode, weight in weights.items()},
    )
    return replace(recipe.unified_sft, base=recipe.base, conversations=conversations)


def run_once(run: Callable[[Any, Path], Outcome], recipe: SFTRecipe | RLRecipe, folder: Path) -> Path:
    """The last checkpoint of a run of `sft` or `rl`, which is gone on with unless it is finished. Raises `Stopped`."""
    mark = folder / FINISHED
    if not mark.is_file():
        print(f"\n=== {folder}\n")
        outcome = run(recipe, folder)
        if outcome.stopped_by is not None:
            raise Stopped(outcome.stopped_by, folder)
        write_text_atomically(mark, json.dumps({"step": outcome.step}) + "\n")
    return RunFolder(folder).newest_checkpoint()


def practise(runs: Sequence[tuple[RLRecipe, Path]], at_once: int, folder: Path) -> list[Path]:
    """The last checkpoint of each of several runs of RL, so many of them side by side: recipes, and folders in `folder`. Raises
    `Stopped`, with the latter where there are several."""
    left = [(partial(run_once, rl), *run) for run in runs if not (run[1] / FINISHED).is_file()]
    if at_once > 1 and left:
        print(f"\n=== {len(left)} runs of RL, {at_once} at a time; what each prints: log.txt in its folder in {folder}\n")
        try:
            in_processes(run_quietly, left, at_once, "RL")
        except KeyboardInterrupt as stop:  # each has saved
            raise Stopped(stop.args[0] if stop.args else Signals.SIGINT, folder) from stop
    return [run_once(rl, *run) for run in runs]  # or read what is there


def models_of(recipe: ExpertsRecipe, made: Made) -> dict[str, tuple[Path, list[str]]]:
    """What is examined, by name: each model, and the domains in which. Experts, in their own one."""
    everywhere = list(recipe.experts)
    found = {"base": (recipe.base, everywhere), "start": (made.start, everywhere)}
    found |= {f"expert-{domain}": (path, [domain]) for domain, path in made.experts.items()}
    for one in made.rounds:
        found |= {f"unified-{one.number}": (one.sft, everywhere), f"unified-{one.number}-rl": (one.rl, everywhere)}
    return found


def sit_exams(
    recipe: ExpertsRecipe, folder: Path, models: dict[str, tuple[Path, list[str]]], asked: list[Placed]
) -> dict[str, list[Sat]]:
    """The attempts of each model at the problems that judge (`asked`), those of its domains."""
    found = {}
    for name, (path, domains) in models.items():
        own = [one for one in asked if recipe.domain_of[one.family] in domains]
        found[name] = sit(path, recipe.unified_rl, own, recipe.exam, folder / "exams" / name, name)
    return found
