"""An RL run that is killed anywhere, by SIGKILL in the middle of whatever it does, goes on to the undisturbed run's bits."""

import signal
from pathlib import Path

import pytest
import torch
from small_run import equal, in_child, run_counting, run_until_killed
from test_rl_loop import CONTEXT, base, recipe_of  # noqa: F401 (a fixture)

from minglm.rl.loop import rl
from minglm.rl.objective import named
from minglm.rl.recipe import RLRecipe, Sampling, Tasks
from minglm.train.metrics import WALL_CLOCK, read_metrics
from minglm.train.run_folder import RunFolder
from minglm.train.state import read_state

CLOCKS = (*WALL_CLOCK, "sampling_seconds", "update_seconds")


def run(recipe: RLRecipe, folder: Path) -> None:
    torch.set_num_threads(1)
    rl(recipe, folder)


def finished(function, *arguments) -> int:
    process = in_child(function, *arguments)
    process.join()
    return process.exitcode


def everything_written(folder: Path) -> tuple[list[dict], dict[str, bytes], dict, dict[str, bytes]]:
    records = read_metrics(folder / "metrics.jsonl")
    metrics = [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]
    checkpoint = RunFolder(folder).newest_checkpoint()
    files = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir()) if path.is_file()}
    state = {key: value for key, value in read_state(checkpoint).items() if key != "seconds"}
    return metrics, files, state, {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()}


@pytest.fixture
def recipe(base) -> RLRecipe:  # noqa: F811
    sampling = Sampling(group_size=2, groups=2, tokens=(2, 4), rounds=2, context=CONTEXT, temperatures=(1.0, 1.2))
    tasks = Tasks({"arithmetic": (1, 2)})
    return recipe_of(
        base,
        tasks=tasks,
        sampling=sampling,
        objective=named("reinforce++"),
        steps=4,
        evaluation_problems=2,
        checkpoint_every=1,
        keep=2,
    )


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(recipe, tmp_path):
    assert finished(run_counting, recipe, tmp_path / "whole", tmp_path / "calls", run) == 0
    total = int((tmp_path / "calls").read_text())
    wanted = everything_written(tmp_path / "whole")
    for tenths in (3, 6, 9):
        folder = tmp_path / f"killed-{tenths}"
        assert finished(run_until_killed, recipe, folder, total * tenths // 10, run) == -signal.SIGKILL
        assert finished(run, recipe, folder) == 0
        assert equal(everything_written(folder), wanted), tenths
