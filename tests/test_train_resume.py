"""What happens to a run that is killed, stopped, repeated, or started beside its own remains."""

import dataclasses
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from small_run import (
    STEPS,
    equal,
    everything_written,
    finished_run,
    in_child,
    run_small,
    run_until_killed,
    small_recipe,
    write_text,
)

from minglm.checkpoint import CheckpointError
from minglm.config import ConfigError
from minglm.train.metrics import MetricsError, MetricsFile, read_metrics
from minglm.train.run_folder import RunFolder
from minglm.train.stop import SAME_REQUEST_SECONDS
from minglm.train.trainer import train


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    return finished_run(small_recipe(text), tmp_path_factory.mktemp("undisturbed"))


def assert_same(folder: Path, undisturbed: Path) -> None:
    metrics, files, state = everything_written(folder)
    wanted_metrics, wanted_files, wanted_state = everything_written(undisturbed)
    assert metrics == wanted_metrics
    assert files == wanted_files, "weights, configuration or tokenizer differ"
    assert equal(state["optimizer"], wanted_state["optimizer"])
    assert equal(state, wanted_state)


def test_a_run_killed_ten_times_at_random_points_ends_as_the_undisturbed_one(text, undisturbed, tmp_path):
    recipe, folder, draw = small_recipe(text), tmp_path / "run", random.Random(0)
    calls = int((undisturbed.parent / "calls").read_text())
    resumed_from = []
    for _ in range(10):
        process = in_child(run_until_killed, recipe, folder, draw.randrange(1, calls // 4))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        newest = RunFolder(folder).newest_checkpoint()
        resumed_from.append(newest and newest.name)
    assert len(set(resumed_from)) >= 3, "the kills did not spread over the run"
    assert run_small(recipe, folder).step == STEPS
    assert_same(folder, undisturbed)


def test_the_same_command_twice_gives_the_same_bits(text, undisturbed, tmp_path):
    run_small(small_recipe(text), tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def test_another_seed_gives_another_run(text, undisturbed, tmp_path):
    run_small(small_recipe(text, seed=2), tmp_path / "run")
    losses, others = (
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]
        for folder in (tmp_path / "run", undisturbed)
    )
    assert all(a != b for a, b in zip(losses, others, strict=True))


def test_a_finished_run_is_left_as_it_is(text, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = run_small(small_recipe(text), folder)
    assert outcome.step == STEPS and outcome.stopped_by is None
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves_it(text, undisturbed, tmp_path, monkeypatch, number):
    """The signal comes in the middle of step 5, where no checkpoint is due."""
    folder = tmp_path / "run"
    clip = torch.nn.utils.clip_grad_norm_
    calls = 0

    def clip_and_signal(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(number)
        return clip(*arguments)

    before = signal.getsignal(number)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)
    outcome = run_small(small_recipe(text), folder)
    assert (outcome.step, outcome.stopped_by) == (5, number)
    assert outcome.checkpoint == folder / "checkpoints" / "step-5" == RunFolder(folder).newest_checkpoint()
    assert signal.getsignal(number) == before
    assert run_small(small_recipe(text), folder).step == STEPS
    assert_same(folder, undisturbed)


def run_and_signal_twice(recipe, folder: Path, number: signal.Signals, seconds_between: float) -> None:
    clip = torch.nn.utils.clip_grad_norm_

    def signal_twice(*arguments):
        torch.nn.utils.clip_grad_norm_ = clip
        signal.raise_signal(number)
        time.sleep(seconds_between)
        signal.raise_signal(number)
        return clip(*arguments)

    torch.nn.utils.clip_grad_norm_ = signal_twice
    run_small(recipe, folder)


def test_a_second_interrupt_ends_the_process_at_once(text, tmp_path):
    process = in_child(run_and_signal_twice, small_recipe(text), tmp_path / "run", signal.SIGINT, SAME_REQUEST_SECONDS + 0.1)
    process.join()
    assert process.exitcode != 0
    assert RunFolder(tmp_path / "run").checkpoints() == []


@pytest.mark.parametrize(
    ("number", "seconds_between"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.0), (signal.SIGTERM, SAME_REQUEST_SECONDS + 0.1)]
)
def test_a_signal_that_arrives_twice_still_saves_the_step(text, tmp_path, number, seconds_between):
    """torchrun and Slurm pass on to each process a signal that the whole group has got."""
    process = in_child(run_and_signal_twice, small_recipe(text), tmp_path / "run", number, seconds_between)
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()] == ["step-1"]


def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_when_there_is_room(text, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    save, saves = torch.save, 0

    def save_once(state, file) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(ValueError, match="step-4: the disk is full.* nothing that was saved before is lost"):
        run_small(small_recipe(text), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    run_small(small_recipe(text), folder)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("file", ["trainer/state.pt", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("damage", ["a flipped bit", "a cut"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_carries_on(text, undisturbed, tmp_path, file, damage):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    path = folder / "checkpoints" / f"step-{STEPS}" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content if damage == "a flipped bit" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=path.name):
        run_small(small_recipe(text), folder)
    shutil.rmtree(path.parents[len(Path(file).parts) - 1])
    run_small(small_recipe(text), folder)
    assert_same(folder, undisturbed)


def test_metrics_that_cannot_be_written_are_a_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(MetricsError, match="metrics.jsonl: cannot be written: No space left"):
        MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, "kind": "step"})


def test_another_recipe_is_refused_and_the_difference_named(text, undisturbed):
    recipe = small_recipe(text, learning_rate=2e-2)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: found 0.01, wanted 0.02.* another --run-folder"):
        run_small(recipe, undisturbed)


def test_resuming_nothing_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="found no checkpoint to resume from"):
        train(small_recipe(text), tmp_path / "run", must_resume=True)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_only_the_newest_checkpoints_are_kept(undisturbed, text, tmp_path):
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step-22", "step-24"]
    run_small(small_recipe(text, steps=4, keep=0), tmp_path / "run")
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()] == ["step-2", "step-4"]


def test_what_a_kill_left_of_a_deleted_checkpoint_is_removed(text, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    (folder / "checkpoints" / "step-22").rename(folder / "checkpoints" / ".step-22.deleted")
    run_small(small_recipe(text), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-24"]


def test_metrics_after_the_checkpoint_and_a_line_cut_short_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(*({"step": step, "kind": "step"} for step in (1, 2, 2, 3)))
    with path.open("a") as file:
        file.write('{"step": 2, "ki')
    metrics.cut_back(2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 2]
    metrics.write({"step": 3, "kind": "step"})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 2, 3]


@pytest.mark.parametrize("line", ["[]", "{", '{"kind": "step"}', '{"step": "1", "kind": "step"}'])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "step"}\n' + line + "\n")
    with pytest.raises(MetricsError, match="metrics.jsonl, line 2: found"):
        read_metrics(path)


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, "kind": "step", "loss": float("nan")})
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_bytes()


def test_the_finished_config_is_itself_a_recipe(text, undisturbed, tmp_path):
    recipe = dataclasses.replace(small_recipe(text))
    assert RunFolder(undisturbed).open(recipe) == undisturbed / "checkpoints" / f"step-{STEPS}"
