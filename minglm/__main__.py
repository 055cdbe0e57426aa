"""The command line: `python -m minglm [command]`. Without a command it is `demo`.

Each command is a dataclass here (tyro makes the options of it) with the function that does it. torch is imported only by
those that compute, so that `--help` answers at once.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from minglm.config import ConfigError, GLMConfig
from minglm.evals.command import Eval, run_eval
from minglm.posttrain.recipe import RewardRecipe, SFTRecipe, load_reward_recipe, load_sft_recipe
from minglm.rl.recipe import RLRecipe, load_rl_recipe
from minglm.train.recipe import Recipe, find_config, load_recipe

if TYPE_CHECKING:
    from minglm.engine.engine import Engine
    from minglm.tokenizer import Tokenizer
    from minglm.train.span import Span
    from minglm.train.trainer import Outcome

PROGRAM = "python -m minglm"
DESCRIPTION = "A compact GLM-4.5, from the architecture to its training. Without a command: demo."


@dataclass(frozen=True)
class Demo:
    """The whole story on this machine, on what this Python installation holds: tokenizer, all stages of training, SFT, experts
    by RL, one model from their answers, RL on it, evaluation, and report.html, which grows while the story goes on.

    Half an hour on two CPU cores. Run again, it goes on where it was stopped.
    """

    quick: bool = False
    """Minutes instead: only to see that everything works."""
    full: bool = False
    """Hours instead: nano's recipes, every length eight times."""
    run_folder: Path | None = None
    """Where everything is written (runs/demo, runs/quick or runs/full)."""


@dataclass(frozen=True)
class Report:
    """Write report.html of a folder anew, from what is in it."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Of the demo, or of `train`."""


@dataclass(frozen=True)
class Train:
    """Train by a recipe: a TOML file, or the name of one in configs/recipe.

    Any key of the recipe can be overridden: --training.scale 2, --stages.0.tokens 100000. Run again, it goes on from the
    newest checkpoint.
    """

    recipe_file: Annotated[Positional[str], arg(metavar="RECIPE")]
    """nano, tiny, mini or a path; runs/NAME/config.toml goes on with that run."""
    recipe: Annotated[Recipe, arg(name="")]  # its options have no prefix
    run_folder: Path | None = None
    """Where everything is written (runs/ and the recipe's name)."""
    resume: bool = False
    """Refuse to start anew if there is no checkpoint to go on from."""
    from_stage: str | None = None
    """Start from the end of the stage before this one. In the run's own folder, what came later is deleted."""
    from_run: Path | None = None
    """With --from-stage: the folder of the run to start from (by default this one); a run of other later stages will do."""
    until_stage: str | None = None
    """Stop at the end of this stage; the same command without it goes on."""


@dataclass(frozen=True)
class Ablate:
    """Does it help? Every combination of some values of a recipe, over several seeds, with 95% intervals and curves.

    With --stages, instead: does each stage earn its keep? Against the same number of tokens of the stage before it, without
    the change of RoPE's base, and without filling in the middle; judged as `eval` does.
    """

    recipe_file: Annotated[Positional[str], arg(metavar="RECIPE")]
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """table.key=value,value,... as in the recipe; may be given several times."""
    stages: bool = False
    """The arms of the recipe's stages, not variations."""
    only: tuple[str, ...] = ()
    """With --stages: only these stages (by default all)."""
    arms: tuple[Literal["control", "rope", "fim"], ...] = ("control", "rope", "fim")
    """With --stages: which arms."""
    suite: str = "bits,completion,fim,names,needle,likelihood"
    """With --stages: what they are judged by, as in eval."""
    limit: int = 32
    """With --stages: problems of each kind, as in eval."""
    scale: float = 1.0
    """A longer or shorter recipe: training.scale."""
    seeds: tuple[int, ...] = (1, 2, 3)
    workers: int = 1
    """Runs at a time, on equal shares of the cores."""
    run_folder: Path | None = None
    """Where everything is written (runs/ablate- and the recipe's name)."""


@dataclass(frozen=True)
class SFT:
    """Fine-tune a model on conversations: with thinking, without, and with tools, only the assistant's tokens being learnt.

    Any key of the recipe can be overridden: --conversations.thinking 1, --conversations.files my.jsonl. Run again, it goes on
    from the newest checkpoint.
    """

    recipe: Annotated[SFTRecipe, arg(name="")]
    recipe_file: Annotated[str, arg(name="recipe")] = "nano"
    """nano or a path; runs/NAME/config.toml goes on with that run."""
    run_folder: Path | None = None
    """Where everything is written (runs/, the base's name and -sft)."""
    resume: bool = False
    """Refuse to start anew if there is no checkpoint to go on from."""
    lint: bool = False
    """Only check the conversations and count them."""


@dataclass(frozen=True)
class Reward:
    """Learn from preferences, pairs of answers of which one is better: a reward model, or the policy itself by DPO.

    Any key of the recipe can be overridden: --objective dpo, --preferences.files my.jsonl. Run again, it goes on from the
    newest checkpoint.
    """

    recipe: Annotated[RewardRecipe, arg(name="")]
    recipe_file: Annotated[str, arg(name="recipe")] = "nano"
    """nano or a path; runs/NAME/config.toml goes on with that run."""
    run_folder: Path | None = None
    """Where everything is written (runs/, the base's name and -reward or -dpo)."""
    resume: bool = False
    """Refuse to start anew if there is no checkpoint to go on from."""
    lint: bool = False
    """Only check the pairs and count them."""


@dataclass(frozen=True)
class Audit:
    """Can these rewards be fooled? Right answers, near misses and canaries for hacking, judged by each family's verifier, or by
    a reward model or by all that an RL recipe combines."""

    families: Annotated[Positional[tuple[str, ...]], arg(metavar="FAMILY")] = ()
    """Of problems (by default all)."""
    reward_model: Path | None = None
    """Audit this reward model, a run folder or a checkpoint, instead of the verifiers."""
    recipe: Path | None = None
    """Audit the rewards of this RL recipe instead."""
    problems: int = 32
    """Of each family."""
    seed: int = 0


@dataclass(frozen=True)
class RL:
    """Train a policy by its rewards: GRPO as in the report, PPO and others, on problem families with exact verifiers.

    Any key of the recipe can be overridden: --objective.advantage gae, --sampling.rounds 1. Run again, it goes on from the
    newest checkpoint.
    """

    recipe: Annotated[RLRecipe, arg(name="")]
    recipe_file: Annotated[str, arg(name="recipe")] = "nano"
    """nano or a path; runs/NAME/config.toml goes on with that run."""
    run_folder: Path | None = None
    """Where everything is written (runs/, the base's name and -rl)."""
    resume: bool = False
    """Refuse to start anew if there is no checkpoint to go on from."""


@dataclass(frozen=True)
class AblateRL:
    """Does it help in RL? Each part of the report's recipe turned off (or on) by itself, or every combination of some values,
    over several seeds, by the reward on held-out problems with 95% intervals. Killed, the same command goes on.
    """

    base: Annotated[Positional[Path], arg(metavar="BASE")]
    """The policy to start from: a run folder, or a Hugging Face folder with its tokenizer."""
    recipe_file: Annotated[str, arg(name="recipe")] = "nano"
    """nano or a path."""
    arms: tuple[Literal["curriculum", "dynamic_sampling", "aggregation", "length", "format_penalty", "temperature"], ...] = ()
    """Which parts (by default all; format_penalty needs a family with tools)."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Instead of parts: table.key=value,value,... as in the recipe; may be given several times. A single value is for all."""
    seeds: tuple[int, ...] = (1, 2, 3)
    workers: int = 1
    """Runs at a time, on equal shares of the cores."""
    run_folder: Path | None = None
    """Where everything is written (runs/ablate-rl- and the recipe's name)."""


@dataclass(frozen=True)
class Experts:
    """From a mid-trained base to one hybrid model: cold-start SFT, an expert of each domain by RL, one model from their
    answers, RL on it, and for agents the same again, round by round.

    Run again, it goes on where it was stopped. A table of what each step has gained is written at the end.
    """

    base: Annotated[Positional[Path | None], arg(metavar="BASE")] = None
    """The mid-trained model: a run folder, or a Hugging Face folder with its tokenizer."""
    recipe_file: Annotated[str, arg(name="recipe")] = "nano"
    """nano or a path; runs/NAME/config.toml goes on with that iteration."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another value for any key of the recipe, such as experts.agent.steps=40 or rl.sampling.groups=8; may be given several
    times."""
    seeds: tuple[int, ...] = ()
    """An iteration with each, in seed-N, and the table with intervals over them (by default the recipe's seed alone)."""
    workers: int = 1
    """Iterations at a time, on equal shares of the cores; what several print goes into their log.txt. With it goes --set
    experts_at_once=1, or each of them has as many processes of its own as the recipe says."""
    compare: bool = False
    """Also the two other ways to one model at equal compute: on-policy distillation from the experts, and RL on all rewards
    from the start."""
    run_folder: Path | None = None
    """Where everything is written (runs/, the base's name and -experts)."""


@dataclass(frozen=True)
class Params:
    """What a model costs before anything is trained: parameters, FLOPs a token, memory, and the time to train it."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """The name of a size in configs/model, a TOML file, or a Hugging Face folder."""
    sequence_length: int | None = None
    """Of training, for the share of attention."""
    tokens: int | None = None
    """To train on, for the time; goes with --device-tflops."""
    device_tflops: float | None = None
    """What the devices together really reach, in 10^12 FLOPs a second."""
    micro_batch_tokens: int | None = None
    """So many go through the model at once, for the memory of the activations (by default one sequence)."""


@dataclass(frozen=True)
class Bench:
    """Speed of training, data and decoding on this machine, beside transformers' model and our naive gear, as ratios."""

    sizes: tuple[Literal["nano", "tiny"], ...] = ("nano", "tiny")
    repeats: int | None = None
    """Timed steps of each contestant (by default as many as the size needs)."""
    out: Path | None = None
    """Also append the numbers to this file, one JSON object a line."""


@dataclass(frozen=True)
class Race:
    """Tiny shakespeare by characters: minglm's held-out loss when GPT-2, in nanoGPT's CPU setting, has finished."""

    text: Annotated[Positional[Path], arg(metavar="TEXT")]
    """tinyshakespeare.txt (1,115,394 bytes), or any text to race on."""
    seed: int = 1
    run_folder: Path = Path("runs", "race")
    """Where everything is written; a new folder, for a clock cannot be resumed."""


@dataclass(frozen=True)
class Loading:
    """Which model, and how the engine runs it."""

    folder: Annotated[Positional[Path | None], arg(metavar="FOLDER")] = None
    """A Hugging Face folder with its tokenizer, ours or published, or a run folder (by default runs/demo)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; bf16 where a GPU has it, fp32 elsewhere."""
    draft_tokens: int = 0
    """The MTP layer drafts so many tokens a step; the text stays the same."""
    gear: Literal["torch", "exact", "naive"] = "torch"
    """exact: a token's log-probability has the same bits in any company; slower."""


@dataclass(frozen=True)
class Chat:
    """Talk to a model here in the terminal. /help lists what else can be typed; Ctrl-C stops an answer, Ctrl-D leaves."""

    loading: Annotated[Loading, arg(name="")]
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    """Of an answer, thinking included."""
    thinking_budget: int | None = None
    """Most tokens of thinking in an answer."""
    seed: int | None = None
    """For the same answers every time."""


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP as OpenAI does, with a chat page at /. On this machine only, unless --host says otherwise."""

    loading: Annotated[Loading, arg(name="")]
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for everyone who can reach this machine (then give an API key)."""
    port: int = 8000
    name: str | None = None
    """What requests call the model (by default the folder's name, such as demo-step-600)."""
    api_key: str | None = None
    """Asked of everyone; better given as the environment variable MINGLM_API_KEY, which other users cannot see."""
    weights_token: str | None = None
    """Turns on POST /v1/weights, for RL, and is asked there; also as MINGLM_WEIGHTS_TOKEN."""
    max_running: int = 64
    """Answers that are computed at a time; others wait."""
    max_queue: int = 256
    """Answers computed or waiting; more are refused (429)."""
    max_context: int | None = None
    """Tokens of prompt and answer (by default as many as model and cache can hold)."""
    max_body_mb: float = 4.0
    """Larger requests are refused (413)."""


@dataclass(frozen=True)
class Convert:
    """Read a Hugging Face folder of this architecture (published, FP8, ours) and write it anew, shard by shard."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of the weights; FP8 is dequantised in any case. Routing biases stay fp32 always."""
    max_shard_gb: float = 5.0
    """Size of a file at most, in GB."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for what went wrong on the way, 2 for what cannot be done as asked."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["demo", *arguments]
    try:
        command = _parse(arguments)
        run = {
            Demo: run_demo,
            Report: run_report,
            Train: run_train,
            Ablate: run_ablate,
            SFT: run_sft,
            Reward: run_reward,
            Audit: run_audit,
            RL: run_rl,
            AblateRL: run_ablate_rl,
            Experts: run_experts,
            Eval: run_eval,
            Params: run_params,
            Bench: run_bench,
            Race: run_race,
            Chat: run_chat,
            Serve: run_serve,
            Convert: run_convert,
        }
        return run[type(command)](command)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        is_ours = type(error).__module__.partition(".")[0] == "minglm"  # written for people to read
        if not is_ours and not isinstance(error, OSError):
            raise
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


Posttraining = SFT | Reward | Audit | RL | AblateRL | Experts
Command = Demo | Report | Train | Ablate | Posttraining | Eval | Params | Bench | Race | Chat | Serve | Convert


def _parse(arguments: list[str]) -> Command:
    """After `train RECIPE`, and with `--recipe RECIPE` in `sft`, `reward` and `rl`, that recipe's values are the defaults of
    the options; else nano's."""
    name = arguments[1] if arguments[0] == "train" and len(arguments) > 1 else ""
    recipe = load_recipe("nano" if not name or name.startswith("-") else name)
    sft_recipe = load_sft_recipe(_option(arguments, "--recipe") or "nano" if arguments[0] == "sft" else "nano")
    reward_recipe = load_reward_recipe(_option(arguments, "--recipe") or "nano" if arguments[0] == "reward" else "nano")
    rl_recipe = load_rl_recipe(_option(arguments, "--recipe") or "nano" if arguments[0] == "rl" else "nano")
    commands = (
        Annotated[Demo, subcommand("demo")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Train, subcommand("train", default=Train(tyro.MISSING, recipe))]
        | Annotated[Ablate, subcommand("ablate")]
        | Annotated[SFT, subcommand("sft", default=SFT(sft_recipe))]
        | Annotated[Reward, subcommand("reward", default=Reward(reward_recipe))]
        | Annotated[Audit, subcommand("audit")]
        | Annotated[RL, subcommand("rl", default=RL(rl_recipe))]
        | Annotated[AblateRL, subcommand("ablate-rl")]
        | Annotated[Experts, subcommand("experts")]
        | Annotated[Eval, subcommand("eval")]
        | Annotated[Params, subcommand("params")]
        | Annotated[Bench, subcommand("bench")]
        | Annotated[Race, subcommand("race")]
        | Annotated[Chat, subcommand("chat")]
        | Annotated[Serve, subcommand("serve")]
        | Annotated[Convert, subcommand("convert")]
    )
    command = tyro.cli(commands, prog=PROGRAM, description=DESCRIPTION, args=arguments)
    if isinstance(command, Train) and command.recipe_file != name:
        raise ConfigError(f"train: found {name!r} first; wanted the recipe first and its options after it")
    return command


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option, before tyro reads it: `--name value` or `--name=value`."""
    for place, argument in enumerate(arguments):
        if argument == name:
            return next(iter(arguments[place + 1 :]), None)
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
    return None


def run_demo(command: Demo) -> int:
    if command.quick and command.full:
        raise ConfigError("demo: found --quick and --full; wanted one of them, or neither")
    from minglm.demo import Plan, demo

    form = "quick" if command.quick else "full" if command.full else "default"
    return demo(Plan.of(form, command.run_folder))


def run_report(command: Report) -> int:
    from minglm.report.page import write_report

    if not command.run_folder.is_dir():
        raise ConfigError(f"report: found no folder {command.run_folder}; wanted that of a run")
    print(f"made: {write_report(command.run_folder)}")
    return 0


def run_train(command: Train) -> int:
    path = Path(command.recipe_file)
    # A run's own config.toml goes on with that run.
    folder = command.run_folder or (path.parent if path.name == "config.toml" else Path("runs", path.stem))
    print(f"train: {command.recipe_file}; everything is written to {folder}\n")
    from minglm.train.span import Span

    return _train(command.recipe, folder, command.resume, Span(command.from_stage, command.from_run, command.until_stage))


def _train(recipe: Recipe, folder: Path, must_resume: bool = False, span: "Span | None" = None) -> int:
    from minglm.engine.generate import generate
    from minglm.train.metrics import read_metrics
    from minglm.train.run_folder import RunFolder
    from minglm.train.span import WHOLE_RUN
    from minglm.train.trainer import train

    outcome = train(recipe, folder, generate, must_resume, span or WHOLE_RUN)
    run = RunFolder(folder)
    if outcome.stopped_by is not None:
        return _stopped(outcome, f"train {run.config}")
    last_step = recipe.plan().steps
    if outcome.step < last_step:
        print(f"\nthe stage has ended with step {outcome.step:,} of {last_step:,}: {outcome.checkpoint}")
        print(f"to go on: {PROGRAM} train {run.config}")
        return 0
    held_out = [record for record in read_metrics(run.metrics) if record["kind"] == "held_out"]
    first, last = (record["bits_per_byte"] for record in (held_out[0], held_out[-1]))
    print(f"""
held-out text: from {first:.3f} to {last:.3f} bits per byte in {held_out[-1]["seconds"]:,.0f} s

made:
  {run.overview}    plots: losses, bits per byte, how the experts are used
  {outcome.checkpoint}    the model: a Hugging Face folder, with its tokenizer
  {run.metrics}    every number
  {run.config}    the recipe, with every default

to try next:
  {PROGRAM} train {run.config} --run-folder {folder}-adamw --optimizer.kind adamw
  {PROGRAM} eval {folder}    every stage, a column each
  {PROGRAM} train text --data.path YOUR_TEXT
  {PROGRAM} chat {folder}
  {PROGRAM} params configs/model/glm-4.5.toml
  {PROGRAM} bench""")
    return 0


def run_ablate(command: Ablate) -> int:
    from minglm.train.ablation import ablate, report, with_value

    recipe = load_recipe(command.recipe_file)
    recipe = with_value(recipe, "training.scale", command.scale * recipe.training.scale)
    if command.stages:
        return _ablate_stages(command, recipe)
    folder = command.run_folder or Path("runs", f"ablate-{Path(command.recipe_file).stem}")
    print(f"ablate: {command.recipe_file} with {len(command.seeds)} seeds; everything is written to {folder}\n")
    results = ablate(recipe, command.vary, command.seeds, folder, command.workers)
    print(f"\n{report(results)}\n\nmade: {folder / 'results.json'}, {folder / 'curves.png'}, and a run folder of each run")
    return 0


def _ablate_stages(command: Ablate, recipe: Recipe) -> int:
    from minglm.evals.judge import Judge
    from minglm.train.stage_ablation import ablate_stages

    if command.vary:
        raise ConfigError("ablate: found --vary and --stages; wanted one of them")
    folder = command.run_folder or Path("runs", f"ablate-stages-{Path(command.recipe_file).stem}")
    print(f"ablate: the stages of {command.recipe_file}, {len(command.seeds)} seeds; everything is written to {folder}\n")

    judge = Judge(command.suite, command.limit, recipe.plan().stages[0].sequence_length, recipe.data.families)
    judged_by = f"suite {command.suite}, limit {command.limit}, families {', '.join(judge.families) or 'all'}"
    text = ablate_stages(recipe, command.seeds, folder, judge, judged_by, command.arms, command.only, command.workers)
    print(f"\n{text}\nmade: {folder / 'stages.md'}, {folder / 'stages.json'}, and a run folder of each run")
    return 0


def _stopped(outcome: "Outcome", command: str) -> int:
    """Say that a signal has stopped a run, and what goes on with it; returns the exit code."""
    print(f"\nstopped by {outcome.stopped_by.name} after step {outcome.step}, which is saved in {outcome.checkpoint}")
    print(f"to go on: {PROGRAM} {command}")
    return 128 + outcome.stopped_by


def _base_and_folder(command: SFT | Reward | RL, name: str) -> tuple[Path, Path]:
    """The model that a command of post-training starts from, and where it writes. Raises `ConfigError` without a model."""
    if command.recipe.base is None:
        raise ConfigError(f"{name}: wanted the model to start from: a run folder, or a Hugging Face folder")
    base, path = _find_checkpoint(command.recipe.base), Path(command.recipe_file)
    default = path.parent if path.name == "config.toml" else Path("runs", f"{_name_of(base.resolve())}-{name}")
    return base, command.run_folder or default


def run_sft(command: SFT) -> int:
    from minglm.posttrain.sft import ConversationData, judge_modes, sft
    from minglm.tokenizer import Tokenizer
    from minglm.train.metrics import read_metrics
    from minglm.train.run_folder import RunFolder

    base, folder = _base_and_folder(command, "sft")
    recipe = replace(command.recipe, base=base)
    if command.lint:
        print(f"sft: the conversations of {command.recipe_file} as {base} reads them; nothing is written\n")
        data = ConversationData.gather(recipe, Tokenizer.from_pretrained(base))
        print(f"{data.training.table()}\n\nheld out:\n\n{data.held_out.table()}")
        data.refuse_faults()
        return 0
    print(f"sft: {base} by {command.recipe_file}; everything is written to {folder}\n")
    outcome = sft(recipe, folder, command.resume)
    run = RunFolder(folder)
    if outcome.stopped_by is not None:
        return _stopped(outcome, f"sft --recipe {run.config}")
    held_out = [record["loss"] for record in read_metrics(run.metrics) if record["kind"] == "held_out"]
    print(f"\nheld-out conversations: from {held_out[0]:.3f} to {held_out[-1]:.3f} nats per token of the assistant's")
    switch = judge_modes(recipe, folder)
    for line in switch.lines() if switch else ():
        print(line)
    print(f"""
made:
  {run.overview}    plots: losses, how the experts are used
  {outcome.checkpoint}    the model: a Hugging Face folder, with its tokenizer
  {run.metrics}    every number
  {run.config}    the recipe, with every default

to try next:
  {PROGRAM} chat {folder}
  {PROGRAM} eval {folder} --suite chat
  {PROGRAM} rl {folder}""")
    return 0


def run_reward(command: Reward) -> int:
    from minglm.posttrain.preferences import preference_data
    from minglm.posttrain.reward import train_on_preferences
    from minglm.tokenizer import Tokenizer
    from minglm.train.metrics import read_metrics
    from minglm.train.run_folder import RunFolder

    is_policy = command.recipe.objective == "dpo"
    base, folder = _base_and_folder(command, "dpo" if is_policy else "reward")
    recipe = replace(command.recipe, base=base)
    if command.lint:
        print(f"reward: the pairs of {command.recipe_file} as {base} reads them, two answers each; nothing is written\n")
        data = preference_data(recipe, Tokenizer.from_pretrained(base))
        print(f"{data.training.table()}\n\nheld out:\n\n{data.held_out.table()}")
        data.refuse_faults()
        return 0
    print(f"reward: {base} by {command.recipe_file} ({recipe.objective}); everything is written to {folder}\n")
    outcome = train_on_preferences(recipe, folder, command.resume)
    run = RunFolder(folder)
    if outcome.stopped_by is not None:
        return _stopped(outcome, f"reward --recipe {run.config}")
    held_out = [record for record in read_metrics(run.metrics) if record["kind"] == "held_out"]
    first, last = ("{:.3f} ({:.3f} to {:.3f})".format(*record["accuracy"]) for record in (held_out[0], held_out[-1]))
    error, pairs = held_out[-1]["calibration_error"], held_out[-1]["pairs"]
    print(f"""
{pairs} held-out pairs: accuracy from {first} to {last}, 95% intervals; calibration error {error:.3f}

made:
  {run.overview}    plots: loss, accuracy, reliability
  {outcome.checkpoint}    the {"policy: a" if is_policy else "reward model: GLM's trunk with a score, a"} Hugging Face folder
  {run.metrics}    every number
  {run.config}    the recipe, with every default

to try next:
  {PROGRAM} {f"chat {folder}" if is_policy else f"rl {base} --recipe style --rewards.model-folder {folder}"}""")
    return 0


def run_audit(command: Audit) -> int:
    import torch

    from minglm.rl.audit import audit, report
    from minglm.rl.rewards import Verifier, combined, model_source
    from minglm.tasks import FAMILIES

    source, what, right = Verifier(), "each family's verifier", 1.0
    if command.reward_model is not None:
        source, right = model_source(_find_checkpoint(command.reward_model), torch.device("cpu")), 0.5
        what = f"the reward model {command.reward_model}"
    elif command.recipe is not None:
        source = combined(load_rl_recipe(command.recipe).rewards, torch.device("cpu"))
        what, right = f"the rewards of {command.recipe}", 0.5
    families = command.families or tuple(FAMILIES)
    for family in families:
        if family not in FAMILIES:
            raise ConfigError(f"audit: found {family!r}; wanted some of {', '.join(FAMILIES)}")
    print(f"audit: {what}, {command.problems} problems of each family\n")
    found = [audit(source, FAMILIES[family], command.problems, command.seed, right) for family in families]
    print(report(found))
    return 1 if any(one.faults for one in found) else 0


def run_rl(command: RL) -> int:
    from minglm.evals.interval import Estimate
    from minglm.rl.loop import rl
    from minglm.train.metrics import read_metrics
    from minglm.train.run_folder import RunFolder

    base, folder = _base_and_folder(command, "rl")
    print(f"rl: {base} by {command.recipe_file}; everything is written to {folder}\n")
    outcome = rl(replace(command.recipe, base=base), folder, command.resume)
    run = RunFolder(folder)
    if outcome.stopped_by is not None:
        return _stopped(outcome, f"rl --recipe {run.config}")
    held_out = [record["rewards"]["all"] for record in read_metrics(run.metrics) if record["kind"] == "held_out"]
    first, last = (Estimate(*reward, count=0).text() for reward in (held_out[0], held_out[-1]))
    is_asynchronous = command.recipe.mode == "asynchronous"
    timeline = f"\n  {folder / 'timeline.png'}    what trainer and workers did when" if is_asynchronous else ""
    print(f"""
held-out problems: reward from {first} to {last}, 95% intervals

made:
  {run.overview}    plots: rewards, lengths, entropy, the gap between sampler and trainer
  {outcome.checkpoint}    the policy: a Hugging Face folder, with its tokenizer
  {folder / "rollouts.html"}    the attempts, to read in a browser
  {folder / "rollouts"}    every attempt of every step, as text{timeline}
  {run.metrics}    every number
  {run.config}    the recipe, with every default

to try next:
  {PROGRAM} chat {folder}
  {PROGRAM} rl {base} --objective.advantage gae --run-folder {folder}-ppo""")
    return 0


def run_ablate_rl(command: AblateRL) -> int:
    from minglm.rl.ablation import ablate_rl

    base = _find_checkpoint(command.base)
    folder = command.run_folder or Path("runs", f"ablate-rl-{Path(command.recipe_file).stem}")
    print(f"ablate-rl: {command.recipe_file} from {base}, {len(command.seeds)} seeds; everything is written to {folder}\n")
    recipe = replace(load_rl_recipe(command.recipe_file), base=base)
    table = ablate_rl(recipe, command.vary, command.arms, command.seeds, folder, command.workers)
    made = ", ".join(str(folder / name) for name in ("ablation.md", "results.json", "curves.png"))
    print(f"\n{table}\n\nmade: {made}, and a run folder of each run")
    return 0


def run_experts(command: Experts) -> int:
    from minglm.posttrain.experts.paths import compare, write_paths
    from minglm.posttrain.experts.pipeline import Stopped, experts
    from minglm.posttrain.experts.recipe import load_experts_recipe
    from minglm.posttrain.experts.results import write_results_of_seeds
    from minglm.train.processes import in_processes, run_quietly

    recipe, path = load_experts_recipe(command.recipe_file, command.set), Path(command.recipe_file)
    base = command.base or recipe.base
    if base is None:
        raise ConfigError("experts: wanted the mid-trained model: a run folder, or a Hugging Face folder")
    base = _find_checkpoint(base)
    default = path.parent if path.name == "config.toml" else Path("runs", f"{_name_of(base.resolve())}-experts")
    folder = command.run_folder or default
    print(f"experts: {base} by {command.recipe_file}; everything is written to {folder}\n")
    folders = {seed: folder / f"seed-{seed}" for seed in command.seeds} or {recipe.seed: folder}
    iterate = compare if command.compare else experts
    seeded = {own: replace(recipe, base=base, seed=seed) for seed, own in folders.items()}
    if command.workers > 1:
        jobs = [(iterate, one, str(own)) for own, one in seeded.items()]
        in_processes(run_quietly, jobs, command.workers, "iterations")
    try:
        found = [iterate(one, own) for own, one in seeded.items()]  # or read what is there
    except Stopped as stopped:
        print(f"\n{stopped}\nto go on: the same command")
        return 128 + stopped.signal
    if command.seeds:
        write_results_of_seeds(recipe, folder, list(folders.values()))
    if command.compare:
        print(f"\nthree ways to one model at equal compute:\n\n{write_paths(folder, found)}")
    first = next(iter(folders.values()))
    kept = first / f"round-{json.loads((first / 'results.json').read_text(encoding='utf-8'))['kept_round']}"
    print(f"""
{(folder / "results.md").read_text(encoding="utf-8")}
made:
  {folder / "results.md"}    what each step has gained; as numbers in results.json
  {kept / "rl"}    the unified model: a run folder
  {kept / "answers"}    what the experts have taught, and what the filters took

to try next:
  {PROGRAM} chat {kept / "rl"}
  {PROGRAM} eval {kept / "rl"} --suite chat""")
    return 0


def run_params(command: Params) -> int:
    from minglm.params import report

    path = Path(command.model)
    is_folder = path.is_dir() or path.suffix == ".json"
    config = GLMConfig.from_pretrained(path) if is_folder else GLMConfig.from_toml(find_config("model", path))
    try:
        print(report(config, command.sequence_length, command.tokens, command.device_tflops, command.micro_batch_tokens))
    except ValueError as error:
        raise ConfigError(f"params: {error}") from error
    return 0


def run_bench(command: Bench) -> int:
    from minglm.bench import main as bench

    print(f"bench: a training step at {', '.join(command.sizes)}; close other programs, they cost every contestant")
    bench(command.sizes, command.out, command.repeats)
    return 0


def run_race(command: Race) -> int:
    from minglm.shakespeare import race, report

    print(f"race: GPT-2 first, then configs/recipe/shakespeare.toml; everything is written to {command.run_folder}\n")
    print("\n" + report(race(command.text, command.run_folder, command.seed)))
    print(f"\nmade: {command.run_folder / 'race.json'}, and our run folder around it")
    return 0


def run_chat(command: Chat) -> int:
    from minglm.engine.sampling import SamplingParams
    from minglm.serve.app import context_of
    from minglm.terminal import Terminal

    folder = _find_model(command.loading.folder)
    print(f"chat: {folder}; /help lists the commands\n")
    engine, tokenizer = _load_engine(command.loading, folder, max_running=1)
    try:
        params = SamplingParams(
            temperature=command.temperature,
            top_p=command.top_p,
            max_tokens=command.max_tokens,
            seed=command.seed,
            thinking_budget=command.thinking_budget,
        )
    except ValueError as error:
        raise ConfigError(f"chat: {error}") from error
    Terminal(engine, tokenizer, params, context_of(engine)).run()
    return 0


def run_serve(command: Serve) -> int:
    from minglm.serve.app import Settings, build_app, is_local, run

    folder = _find_model(command.loading.folder)
    engine, tokenizer = _load_engine(command.loading, folder, command.max_running)
    settings = Settings(
        model_name=command.name or _name_of(folder.resolve()),
        api_key=command.api_key or os.environ.get("MINGLM_API_KEY"),
        weights_token=command.weights_token or os.environ.get("MINGLM_WEIGHTS_TOKEN"),
        max_body_bytes=int(command.max_body_mb * 2**20),
        max_queue=command.max_queue,
        max_context=command.max_context,
        local_only=is_local(command.host),
    )
    if not settings.local_only and settings.api_key is None:
        print("serve: everyone who can reach this machine can use the model: there is no API key", file=sys.stderr)
    host = f"[{command.host}]" if ":" in command.host else command.host
    print(f"""serve: {folder} as {settings.model_name!r}; Ctrl-C stops

  http://{host}:{command.port}/           to chat in a browser
  http://{host}:{command.port}/v1         for OpenAI's clients (base_url)
  http://{host}:{command.port}/metrics    for Prometheus
""")
    run(build_app(engine, tokenizer, settings), command.host, command.port)
    return 0


def _find_checkpoint(folder: Path | None) -> Path:
    """The folder that was asked for; a run folder's newest checkpoint; else that of the demo."""
    from minglm.train.run_folder import RunFolder

    run = RunFolder(folder or Path("runs", "demo"))
    if folder is not None and (folder / "config.json").is_file():
        return folder
    newest = run.newest_checkpoint()
    if newest is None:
        wanted = f"found no checkpoint in {run.path}; wanted a folder with config.json, or a run folder"
        raise ConfigError(f"{wanted}; `{PROGRAM}` makes one" if folder is None else wanted)
    return newest


def _find_model(folder: Path | None) -> Path:
    """What to talk to: of the demo the model at the end of its story, if it is there; else as `_find_checkpoint`."""
    model = (folder or Path("runs", "demo")) / "model"
    return model if (model / "config.json").is_file() else _find_checkpoint(folder)


def _name_of(folder: Path) -> str:
    """runs/demo/checkpoints/step-600 is demo-step-600."""
    return f"{folder.parents[1].name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name


def _load_engine(loading: Loading, folder: Path, max_running: int) -> "tuple[Engine, Tokenizer]":
    import torch

    from minglm.checkpoint import load_model
    from minglm.engine.engine import Engine
    from minglm.tokenizer import Tokenizer
    from minglm.train.device import choose_device
    from minglm.train.recipe import Hardware

    tokenizer = Tokenizer.from_pretrained(folder)
    device = choose_device(Hardware(device=loading.device))
    model = load_model(folder, torch.bfloat16 if device.bf16 else torch.float32, device.torch_device).eval()
    try:
        engine = Engine(model, tokenizer, max_running=max_running, draft_tokens=loading.draft_tokens, gear=loading.gear)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return engine, tokenizer


def run_convert(command: Convert) -> int:
    import torch

    from minglm.checkpoint import convert

    dtypes = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    print(f"convert: {command.source} is read shard by shard, {command.target} is written when all of it is there")
    convert(command.source, command.target, dtypes[command.dtype], int(command.max_shard_gb * 1e9))
    print(f"made: {command.target}, a Hugging Face folder that minglm, transformers, vLLM and SGLang read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
