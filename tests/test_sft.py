"""Fine-tuning a small model: what it learns from, how it goes on after a kill, and whether it keeps to its mode."""

import dataclasses
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import MODEL, count_calls, equal, everything_written, in_child

from minglm.__main__ import main
from minglm.chat import OPENS_THINKING
from minglm.checkpoint import load_model
from minglm.config import ConfigError
from minglm.engine.engine import Engine
from minglm.model import GLM
from minglm.posttrain.mode_switch import (
    CALL_IN_THINKING,
    LEAKS,
    MARKS_IN_CONTENT,
    NO_ANSWER,
    NO_CLOSE,
    Response,
    ask,
    keeps_to_mode,
    leaks,
    measure,
)
from minglm.posttrain.recipe import Conversations, LoRA, SFTRecipe, load_sft_recipe, resolve_paths, save_sft_recipe
from minglm.posttrain.sft import ConversationData, judge_modes, sft
from minglm.posttrain.sft_data import DataRefused
from minglm.tokenizer import Tokenizer, train_tokenizer
from minglm.train.metrics import read_metrics
from minglm.train.recipe import Checkpoints, Evaluation, Hardware, Optimizer, Schedule, Training
from minglm.train.run_folder import RunFolder

STEPS = 4
TEXTS = ("What day is it? Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. The day after 3 days.",)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model without training, with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    GLM(dataclasses.replace(MODEL, max_position_embeddings=256)).save_pretrained(folder)
    train_tokenizer(TEXTS * 3, MODEL.vocab_size, show_progress=False).save_pretrained(folder)
    return folder


def small(base: Path, **changes: object) -> SFTRecipe:
    """`changes` are keys of any of the tables, or of the top, by name."""
    tables = {
        "conversations": (Conversations, dict(samples=24, families=("weekdays",), automatic=0.5, levels=1, mode_prompts=0)),
        "training": (Training, dict(steps=STEPS, sequence_length=192, sequences_per_step=2, sequences_per_micro_batch=1)),
        "lora": (LoRA, {}),
        "optimizer": (Optimizer, dict(learning_rate=1e-2)),
        "schedule": (Schedule, dict(warmup_steps=1)),
        "evaluation": (Evaluation, dict(every=2, tokens=400)),
        "checkpoints": (Checkpoints, dict(every=1)),
        "hardware": (Hardware, dict(device="cpu")),
    }
    for cls, values in tables.values():
        values |= {key: changes.pop(key) for key in list(changes) if key in cls.__dataclass_fields__}
    return SFTRecipe(**{name: cls(**values) for name, (cls, values) in tables.items()}, base=base, **changes)


def run_small(recipe: SFTRecipe, folder: Path, killed_at: int = 0, calls: Path | None = None) -> None:
    """Fine-tune; kill this process at its `killed_at`-th call; write into the file `calls` how many there were."""
    torch.set_num_threads(1)
    last = 0

    def reached(made: int) -> None:
        nonlocal last
        last = made
        if made == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if killed_at or calls:
        count_calls(reached)
    sft(recipe, folder)
    if calls:
        sys.setprofile(None)
        calls.write_text(str(last))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = in_child(run_small, small(base), folder / "run", 0, folder / "calls")
    process.join()
    assert process.exitcode == 0
    return folder / "run"


def steps_of(folder: Path, kind: str = "step") -> list[dict]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def test_a_run_killed_at_random_points_ends_with_the_bits_of_the_undisturbed_one(base, undisturbed, tmp_path):
    draw, calls, resumed_from = random.Random(0), int((undisturbed.parent / "calls").read_text()), set()
    for _ in range(3):
        process = in_child(run_small, small(base), tmp_path / "run", draw.randrange(calls // 3, 2 * calls // 3))
        process.join()
        if process.exitcode != -signal.SIGKILL:  # it had come so far that it ended before
            break
        resumed_from.add(RunFolder(tmp_path / "run").newest_checkpoint())
    assert len(resumed_from) >= 2, "the kills did not spread over the run"
    run_small(small(base), tmp_path / "run")
    for found, wanted in zip(everything_written(tmp_path / "run"), everything_written(undisturbed), strict=True):
        assert equal(found, wanted)


def test_the_run_folder_is_that_of_training_and_the_model_learns(base, undisturbed):
    run = RunFolder(undisturbed)
    assert {path.name for path in undisturbed.iterdir()} == {"config.toml", "metrics.jsonl", "checkpoints", "overview.png"}
    held_out = [record["loss"] for record in steps_of(undisturbed, "held_out")]
    assert held_out[-1] < held_out[0] - 0.2
    assert run.newest_checkpoint().name == f"step-{STEPS}"
    before, after = load_model(base), load_model(run.newest_checkpoint())
    assert not torch.equal(before.mtp.eh_proj.weight, after.mtp.eh_proj.weight)
    assert Tokenizer.from_pretrained(run.newest_checkpoint()).fingerprint == Tokenizer.from_pretrained(base).fingerprint
    assert load_sft_recipe(run.config) == resolve_paths(small(base))


def test_another_recipe_in_the_same_folder_is_refused(base, undisturbed):
    with pytest.raises(ConfigError, match="conversations.thinking: found 0.5, wanted 0.25"):
        sft(small(base, thinking=0.25), undisturbed)


def test_the_held_out_loss_is_that_of_the_conversations_alone(base, undisturbed):
    recipe, model = small(base), load_model(base).eval()
    total = tokens = 0
    for one in ConversationData.gather(recipe, Tokenizer.from_pretrained(base)).held_out.conversations:
        ids = torch.from_numpy(one.ids)[None]
        labels = ids[:, 1:].masked_fill(~torch.from_numpy(one.mask)[None, 1:], -100)
        with torch.no_grad():
            total += model.loss(ids[:, :-1], labels).lm.item() * one.mask.sum()
        tokens += one.mask.sum()
    assert steps_of(undisturbed, "held_out")[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("router", ["update", "sequence_loss_only", "freeze"])
def test_what_balances_the_experts_is_as_the_recipe_says(base, tmp_path, router):
    sft(small(base, router=router, steps=2, balance_weight=0.5, router_bias_rate=1e-2), tmp_path / "run")
    moved = any(r.e_score_correction_bias.any() for r in load_model(tmp_path / "run/checkpoints/step-2").routers())
    assert moved == (router == "update")
    for step in steps_of(tmp_path / "run"):
        assert step["balance_loss"] > 0 and step["mtp_loss"] > 0
        weight = 0 if router == "freeze" else 0.5
        wanted = step["lm_loss"] + 0.3 * step["mtp_loss"] + weight * step["balance_loss"]
        assert step["loss"] == pytest.approx(wanted, rel=1e-5)


def test_adapters_go_on_to_the_bit_and_checkpoints_hold_the_merged_model(base, tmp_path):
    recipe = small(base, rank=2, kind="adamw")
    sft(recipe, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run = RunFolder(tmp_path / "run")
    run.delete(run.newest_checkpoint())
    sft(recipe, tmp_path / "run")
    for found, wanted in zip(everything_written(tmp_path / "run"), everything_written(tmp_path / "copy"), strict=True):
        assert equal(found, wanted)
    before, after = load_model(base), load_model(run.newest_checkpoint())
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved and all("_proj" in name and "shared" not in name and "eh_proj" not in name for name in moved)


@pytest.mark.parametrize(
    "changes, complaint", [({}, "optimizer.kind = 'muon'"), (dict(kind="adamw", router="update"), "router")]
)
def test_what_adapters_cannot_do_is_refused(base, changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        small(base, rank=2, **changes)


def test_it_starts_from_the_weights_of_the_base(base, tmp_path):
    sft(small(base, steps=1, learning_rate=0.0, warmup_steps=0), tmp_path / "run")
    before, after = (load_model(folder).state_dict() for folder in (base, tmp_path / "run/checkpoints/step-1"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_samples_that_are_refused_stop_the_run_before_it_writes_anything(base, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "thinking": true}\n')
    recipe = small(base, files=(tmp_path / "own.jsonl",))
    with pytest.raises(DataRefused, match="1 samples are refused, such as\n.*own.jsonl, line 1, sample 1: empty mask"):
        sft(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_trains_goes_on_and_checks(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_sft_recipe(small(base, steps=2, mode_prompts=2), tmp_path / "small.toml")
    arguments = ["sft", str(base), "--recipe", "small.toml", "--run-folder", "run"]
    assert main([*arguments, "--lint"]) == 0
    out = capsys.readouterr().out
    assert "refused" in out and "weekdays" in out and not Path("run").exists()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "thinking mode thinks: " in out and "run/checkpoints/step-2" in out and "nats per token" in out
    before = Path("run/metrics.jsonl").read_bytes()
    assert main(["sft", "--recipe", "run/config.toml"]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == before
    Path("own.jsonl").write_text("[]\n")
    assert main([*arguments, "--lint", "--conversations.files", "own.jsonl"]) == 2
    captured = capsys.readouterr()
    assert "own.jsonl, line 1, sample 1: json" in captured.err and "not a JSON object" in captured.out
    assert main(["sft"]) == 2 and "wanted the model to start from" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- mode switch

plain = st.text("ab .\n", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(plain, plain)
def test_right_responses_keep_to_their_mode_and_planted_leaks_are_found(reasoning, content):
    thought = f"\n<think>{reasoning}</think>"
    right = [Response(f"{thought}\n{content}", True), Response(f"\n{content}", False)]
    right.append(Response(f"{thought}\n<tool_call>f\n</tool_call>", True))
    assert all(keeps_to_mode(one) and not leaks(one) for one in right)
    planted = [
        (Response(f"{thought}\n{content}</think>", True), {MARKS_IN_CONTENT}),
        (Response(f"{thought}\n{content}<think>{content}", True), {MARKS_IN_CONTENT}),
        (Response(f"\n<think>{reasoning}<think></think>\n{content}", True), {MARKS_IN_CONTENT}),
        (Response(f"{content}</think>", False), {MARKS_IN_CONTENT}),
        (Response(f"{thought}\n{content}", False), {MARKS_IN_CONTENT}),
        (Response(f"<think>{reasoning}", False), {MARKS_IN_CONTENT, NO_CLOSE}),
        (Response(thought + "\n", True), {NO_ANSWER}),
        (Response(f"<think>{reasoning}{content}", True), {NO_CLOSE}),
        (Response(f"<think>{reasoning}<tool_call>f\n</tool_call></think>{content}", True), {CALL_IN_THINKING}),
    ]
    for response, wanted in planted:
        assert leaks(response) == wanted, response
    wrong = [Response(f"\n{content}", True), Response(f"<think></think>{content}", True), planted[3][0], planted[4][0]]
    assert not any(map(keeps_to_mode, wrong))

    found = measure([*right, *(response for response, _ in planted), *wrong])
    assert found.thinking.value == pytest.approx(8 / 10) and found.non_thinking.value == pytest.approx(1 / 6)
    counts = {leak: sum(leak in wanted for _, wanted in planted) for leak in LEAKS}
    counts[MARKS_IN_CONTENT] += 2
    assert {leak: round(one.value * one.count) for leak, one in found.leaks.items()} == counts
    assert len(list(found.lines())) == 2 + len(LEAKS)


def test_held_out_problems_are_asked_in_both_modes(base):
    model, tokenizer = load_model(base).eval(), Tokenizer.from_pretrained(base)
    recipe = Conversations(1, families=("weekdays", "arithmetic"), mode_prompts=3, levels=1)
    responses = ask(Engine(model, tokenizer), recipe)
    assert [one.thinking for one in responses] == [True] * 3 + [False] * 3
    assert responses == ask(Engine(model, tokenizer), recipe)
    assert measure(responses).thinking.count == 3
    opened = ask(Engine(model, tokenizer), replace(recipe, opens_thinking=True))
    assert all(one.text.startswith(OPENS_THINKING) for one in opened[:3]) and opened[3:] == responses[3:]


def test_nothing_is_asked_where_the_recipe_wants_nothing(base, undisturbed):
    assert judge_modes(small(base), undisturbed) is None
