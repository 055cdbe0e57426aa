import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import STEPS, small_recipe, write_text

from minglm.__main__ import main
from minglm.checkpoint import load_model
from minglm.tokenizer import Tokenizer
from minglm.train.metrics import read_metrics
from minglm.train.recipe import save_recipe
from minglm.train.run_folder import RunFolder
from minglm.train.stages import Stage

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe_file(tmp_path, monkeypatch) -> Path:
    """A small recipe in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    save_recipe(small_recipe(write_text(tmp_path / "text.jsonl")), tmp_path / "small.toml")
    return tmp_path / "small.toml"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; tyro ends the process itself when it prints help or refuses an option."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def python(*arguments: object, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_train_writes_the_run_folder_of_the_design_and_says_where(recipe_file, capsys):
    code, out, _ = run(capsys, "train", "small.toml")
    folder = Path("runs/small")
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"config.toml", "metrics.jsonl", "checkpoints", "data", "overview.png"}
    checkpoint = folder / "checkpoints" / f"step-{STEPS}"
    for made in (folder / "overview.png", checkpoint, folder / "metrics.jsonl", folder / "config.toml"):
        assert str(made) in out
    assert "bits per byte" in out and "to try next" in out and "device: cpu, fp32" in out
    model, tokenizer = load_model(checkpoint), Tokenizer.from_pretrained(checkpoint)
    assert model.config.unused["eos_token_id"] == list(tokenizer.end_of_turn_ids)


def test_any_key_of_the_recipe_is_an_option(recipe_file, capsys):
    arguments = ["--training.steps", "2", "--optimizer.kind", "adamw", "--run-folder", "other", "--seed", "9"]
    code, out, _ = run(capsys, "train", recipe_file, *arguments)
    assert code == 0 and "2 steps" in out and "adamw" in out
    steps = [record for record in read_metrics("other/metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) == 2


def test_a_finished_run_and_its_own_config_are_recognised(recipe_file, capsys):
    run(capsys, "train", recipe_file, "--training.steps", "4")
    before = Path("runs/small/metrics.jsonl").read_bytes()
    code, out, _ = run(capsys, "train", "runs/small/config.toml", "--resume")
    assert code == 0 and "resuming: runs/small/checkpoints/step-4" in out
    assert Path("runs/small/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["train", "nowhere"], "nowhere: no such file, and recipe 'nowhere' is none of"),
        (["train", "small.toml", "--resume"], "runs/small: found no checkpoint to resume from"),
        (["train", "small.toml", "--data.path", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["train", "small.toml", "--training.steps", "1"], "warmup_steps = 2: wanted"),
        (["train", "small.toml", "--hardware.device", "cuda:77"], "hardware.device = 'cuda:77' is not on this machine"),
        (
            ["train", "small.toml", "--model.vocab-size", "100"],
            "model.vocab_size = 100: vocab_size is 100; wanted at least 288",
        ),
        (["train", "broken.toml"], "broken.toml: training: unknown key 'stpes'; the nearest known key is 'steps'"),
        (["convert", "nowhere", "target"], "nowhere: no such folder"),
        (["params", "nowhere"], "nowhere: no such file, and model 'nowhere' is none of"),
        (["params", "nano", "--tokens", "5"], "params: the training time needs both"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line_and_exit_code_2(recipe_file, capsys, arguments, complaint):
    Path("broken.toml").write_text(recipe_file.read_text().replace("steps = ", "stpes = ", 1))
    code, _, err = run(capsys, *arguments)
    *_, last = err.strip().splitlines()
    assert code == 2
    assert last.startswith("python -m minglm: ") and complaint in last and "Traceback" not in err


@pytest.mark.parametrize("option", ["--training.step", "--trainnig.steps"])
def test_a_misspelt_option_is_refused_with_the_nearest_one(recipe_file, capsys, option):
    code, out, err = run(capsys, "train", recipe_file, option, "3")
    assert code == 2 and "--training.steps" in out + err
    assert not Path("runs").exists()


def test_another_recipe_in_the_same_folder_is_refused(recipe_file, capsys):
    run(capsys, "train", recipe_file, "--training.steps", "2")
    code, _, err = run(capsys, "train", recipe_file, "--training.steps", "3")
    assert code == 2 and "training.steps: found 2, wanted 3" in err and "--run-folder" in err


def test_help_is_there_without_torch():
    program = "import sys, minglm.__main__ as m\ntry: m.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for arguments in (["--help"], ["train", "nano", "--help"], ["bench", "--help"]):
        out, err = python("-c", program, *arguments).communicate()
        assert "usage: python -m minglm" in out and out.rstrip().endswith("False"), err


def test_help_of_a_recipe_shows_its_values(capsys, recipe_file):
    code, out, _ = run(capsys, "train", recipe_file, "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    assert f"Optimiser steps; none where there are stages, which say their tokens. (default: {STEPS})" in words


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_has_the_usual_exit_code_and_says_how_to_go_on(recipe_file, tmp_path, number):
    process = python("-m", "minglm", "train", recipe_file, "--training.steps", "100000", "--checkpoints.every", "100000")
    run_folder = RunFolder(tmp_path / "runs" / "small")
    while not run_folder.metrics.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert "to go on: python -m minglm train runs/small/config.toml" in out and number.name in out
    assert run_folder.newest_checkpoint() is not None


def test_convert_keeps_the_weights_and_casts_on_request(recipe_file, capsys):
    run(capsys, "train", recipe_file, "--training.steps", "2")
    source = Path("runs/small/checkpoints/step-2")
    assert run(capsys, "convert", source, "same")[0] == 0
    assert run(capsys, "convert", source, "half", "--dtype", "bf16")[0] == 0
    model, same, half = (load_model(folder).state_dict() for folder in (source, "same", "half"))
    assert all(torch.equal(model[name], same[name]) for name in model)
    assert all(torch.equal(model[name].bfloat16(), half[name].bfloat16()) for name in model)
    assert half["lm_head.weight"].dtype == torch.bfloat16
    assert Path("half/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not Path("half/trainer").exists()


def test_params_reads_sizes_files_and_folders(recipe_file, capsys):
    run(capsys, "train", recipe_file, "--training.steps", "2")
    folder = "runs/small/checkpoints/step-2"
    for model in ("nano", ROOT / "configs/model/nano.toml", folder, f"{folder}/config.json"):
        code, out, _ = run(capsys, "params", model)
        assert code == 0 and "activated per token" in out


@pytest.mark.slow
def test_the_training_of_the_quick_demo_ends_well(tmp_path, monkeypatch, capsys):  # the whole of it is in .ci/run
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "train", "quick")
    assert code == 0 and "runs/quick/overview.png" in out
    records = read_metrics("runs/quick/metrics.jsonl")
    bits = [record["bits_per_byte"] for record in records if record["kind"] == "held_out"]
    assert bits[-1] < 0.9 * bits[0]
    assert [record["name"] for record in records if record["kind"] == "stage"] == ["general", "reasoning", "long"]


def test_a_stage_alone_and_from_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stages = (Stage("first", tokens=64), Stage("second", tokens=64, rope_theta=1e6))
    save_recipe(small_recipe(write_text(tmp_path / "text.jsonl"), stages=stages, warmup_steps=0), tmp_path / "small.toml")
    code, out, _ = run(capsys, "train", "small.toml", "--until-stage", "first")
    assert code == 0 and "the stage has ended with step 1 of 2" in out and "to go on: python -m minglm train runs/small" in out
    start = ["--from-stage", "second", "--from-run", "runs/small", "--run-folder", "other"]
    code, out, _ = run(capsys, "train", "small.toml", *start, "--stages.1.rope-theta", "1e5")
    assert code == 0 and "RoPE 100000" in out
    assert load_model("other/checkpoints/step-2").config.rope_theta == 1e5
    code, _, err = run(capsys, "train", "small.toml", "--until-stage", "third")
    assert code == 2 and "stage 'third': wanted one of first, second" in err
