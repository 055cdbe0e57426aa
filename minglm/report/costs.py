"""Sections of the page: how far the story is, time and FLOPs of its parts, how to have it again, how to talk to the model."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from minglm.config import GLMConfig
from minglm.params import forward_flops_per_token, training_flops_per_token
from minglm.posttrain.experts.exam import RECORDS, read_attempts
from minglm.posttrain.experts.harvest import COUNTS, read_counts
from minglm.posttrain.experts.pipeline import GATE
from minglm.report.html import Html, charts, commands, duration, folded, later, paragraph, section, si, table
from minglm.report.parts import EXPERTS, Part, Story
from minglm.report.record import Record
from minglm.report.svg import bars
from minglm.train.metrics import read_metrics

PROGRAM = "python -m minglm"
ATTEMPT = 512  # tokens before and in an attempt, about, for the share of attention


def story_section(story: Story, record: Record, parts: Sequence[Part]) -> Html:
    done = sum(part.done for part in parts)
    now = next((part for part in parts if not part.done), None)
    if not parts:
        return section("story", "The story so far", "", later("this folder holds no run yet."))
    said = f"{done} of {len(parts)} parts are done" + (f"; next: {now.title}." if now else ".")
    if now and record.seconds:
        said += f" About {duration(record.left(parts))} are left. Load the page again to see more."
    bar = Html(f'<progress value="{done}" max="{len(parts)}">{done} of {len(parts)}</progress>')
    rows = []
    for part in parts:
        share = part.share()
        state = "done" if part.done else f"{share:.0%}" if share else "to come"
        rows.append([part.title, state, duration(record.seconds[part.name]) if part.name in record.seconds else "–"])
    every = table(["part", "state", "time"], rows)
    return section("story", "The story so far", "", bar, said, folded("all parts", every) if done else every)


def costs_section(story: Story, record: Record, parts: Sequence[Part]) -> Html:
    title, paper = "Time and FLOPs", "report, section 2.4 (the schedule) and 3.5 (the infrastructure of RL)"
    flops = {part.name: found for part in parts if (found := flops_of(story, part))}
    timed = [part for part in parts if part.name in record.seconds]
    if not timed and not flops:
        return section("costs", title, paper, later("what each part has cost."))
    rows, drawn = [], []
    for part in parts:
        seconds, own = record.seconds.get(part.name), flops.get(part.name)
        if seconds is None and own is None:
            continue
        rate = f"{si(own / seconds)}FLOP/s" if seconds and own else "–"
        rows.append([part.title, duration(seconds) if seconds is not None else "–", f"{own:.2e}" if own else "–", rate])
        if seconds is not None:
            drawn.append((part.title, seconds, duration(seconds)))
    spent = sum(record.seconds.values())
    rows.append(["all", duration(spent), f"{sum(flops.values()):.2e}", "–"])
    text = (
        "Training counts a forward and a backward pass through what a token meets, with the MTP layer where it learns; "
        "attempts count the forward pass of the tokens that the model chose, prompts and what tools answered left out."
    )
    chart = (bars(drawn, "seconds"), "Time by part, minutes and seconds.")
    tables = table(["part", "time", "FLOPs", "rate"], rows)
    return section("costs", title, paper, text, *([charts(chart)] if drawn else []), tables)


def flops_of(story: Story, part: Part) -> float | None:
    """Those of a part, as far as it is; None where nothing is known yet, or nothing computed that counts."""
    if story.training is None:
        return None
    config, folder = story.training.model, part.result.parent
    if part.kind == "training":
        stage = story.training.plan().named(part.name.partition("/")[2])
        done = 1.0 if part.done else part.share() or 0.0
        return done * part.work * training_flops_per_token(config, stage.sequence_length)
    if part.metrics is not None and part.metrics.is_file():
        steps = [one for one in read_metrics(part.metrics) if one["kind"] == "step"]
        if part.kind == "sft" and steps:
            recipe = story.experts.start if part.name == "start" else story.experts.unified_sft
            return steps[-1]["tokens"] * training_flops_per_token(config, recipe.training.sequence_length)
        if part.kind == "rl" and steps:
            recipe = story.experts.experts.get(folder.name, story.experts.unified_rl)
            generated, trained = (sum(one[f"{what}_tokens"] for one in steps) for what in ("generated", "trained"))
            both_ways = 3 * forward_flops_per_token(config, _length(config), mtp=recipe.mtp_weight > 0)
            return _forward(config, generated) + trained * both_ways
    if part.kind == "answers" and (part.result / COUNTS).is_file():
        return _forward(config, read_counts(part.result)["generated_tokens"])
    sat = folder / "gate" if part.result.name == GATE else folder
    if part.kind == "exam" and (sat / RECORDS).is_file():
        return _forward(config, sum(one.tokens for one in read_attempts(sat)))
    return None


def _forward(config: GLMConfig, tokens: int) -> float:
    return tokens * forward_flops_per_token(config, _length(config))


def _length(config: GLMConfig) -> int:
    return min(ATTEMPT, config.max_position_embeddings)


def reproduce_section(story: Story, record: Record, evaluations: Sequence[Sequence[str]]) -> Html:
    """evaluations: the arguments of the `eval` commands that the demo gives."""
    folder = story.folder
    lines = []
    if record.form:
        form = "" if record.form == "default" else f" --{record.form}"
        lines += ["# the whole story once more, in another folder: the same seed, the same numbers on the same machine"]
        lines += [f"{PROGRAM}{form} --run-folder {shlex.quote(f'{folder}-again')}", ""]
    if story.training:
        lines += ["# part by part, from the recipes as they were resolved; each goes on where it was stopped"]
        lines += [f"{PROGRAM} train {_quoted(story.run.config)}"]
    if story.experts:
        lines += [f"{PROGRAM} experts --recipe {_quoted(folder / EXPERTS / 'config.toml')}"]
    lines += [shlex.join([*PROGRAM.split(), "eval", *arguments]) for arguments in evaluations]
    lines += ["", "# this page, from what is in the folder", f"{PROGRAM} report {_quoted(folder)}"]
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items())
    seeds = ", ".join(dict.fromkeys(str(one.seed) for one in (story.training, story.experts) if one))
    where = f"Seed {seeds}. " * bool(seeds) + f"Made with {machine}." * bool(machine)
    return section("reproduce", "Do it again", "", commands(*lines), *([where] if where else []))


def chat_section(story: Story) -> Html:
    folder, model = _quoted(story.folder), _quoted(story.model)
    lines = [
        f"{PROGRAM} chat {folder}        # in the terminal; /think, /nothink and /auto switch the mode",
        f"{PROGRAM} serve {folder}       # OpenAI's protocol, and a chat page, on http://127.0.0.1:8000",
        f"{PROGRAM} convert {model} my-model --dtype bf16    # a folder that transformers, vLLM and SGLang read",
    ]
    text = "The unified model is small, and knows what its task families have taught it: ask it what they ask."
    asked = _questions(story)
    return section("chat", "Talk to it", "", text, commands(*lines), *asked)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _questions(story: Story) -> Iterator[Html]:
    """One question of each family that needs no tools, to type in."""
    import random

    from minglm.tasks import FAMILIES

    found = []
    for family, levels in (story.experts.levels if story.experts else {}).items():
        problem = FAMILIES[family].sample(random.Random(story.experts.seed), levels[0])
        if not problem.tools and len(problem.messages) == 1:
            found.append([family, json.dumps(problem.messages[0]["content"], ensure_ascii=False)])
    if found:
        yield paragraph("Questions to begin with:")
        yield table(["family", "ask"], found)
