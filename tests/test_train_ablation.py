"""An ablation changes what it says, runs every variant with every seed, and reports means with their intervals."""

import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import in_child, small_recipe, write_text

from minglm.config import ConfigError
from minglm.train import ablation
from minglm.train.stop import StopRequest, sigterm_as_interrupt


def test_a_grid_has_every_combination_and_names_what_differs(tmp_path):
    recipe = small_recipe(write_text(tmp_path / "text.jsonl"))
    grid = ablation.variants(recipe, ["optimizer.kind=muon,adamw", "training.steps=3", "optimizer.learning_rate=1e-3,2e-3"])
    assert list(grid) == [
        f"optimizer.kind={kind} optimizer.learning_rate={rate}" for kind in ("muon", "adamw") for rate in (1e-3, 2e-3)
    ]
    for label, varied in grid.items():
        assert varied.training.steps == 3
        assert f"kind={varied.optimizer.kind}" in label and f"rate={varied.optimizer.learning_rate}" in label
    assert ablation.variants(recipe, []) == {"as it is": recipe}


@pytest.mark.parametrize(
    ("variation", "message"),
    [
        ("optimizer.kin=muon", "'kind'"),
        ("optimizer.kind=sgd", "'muon', 'adamw'"),
        ("training.steps=many", "a whole number"),
        ("training.steps", "table.key=value,value"),
    ],
)
def test_a_variation_that_does_not_fit_is_refused_with_what_would(tmp_path, variation, message):
    with pytest.raises(ConfigError, match=message):
        ablation.variants(small_recipe(write_text(tmp_path / "text.jsonl")), [variation])


def test_each_variant_is_trained_with_each_seed_and_a_second_call_trains_nothing(tmp_path):
    recipe = small_recipe(write_text(tmp_path / "text.jsonl"), steps=3)
    arguments = (recipe, ["training.router_bias_rate=0.0,0.001"], [1, 2], tmp_path / "out")
    results = ablation.ablate(*arguments)
    assert [len(runs) for runs in results.values()] == [2, 2]
    assert len({run.loss for runs in results.values() for run in runs}) > 2  # seeds differ
    assert all(run.loss > 0 and run.bits_per_byte > 0 and run.max_violation >= 0 for runs in results.values() for run in runs)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "results.json").read_text()).keys() == results.keys()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert ablation.ablate(*arguments) == results
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == before
    assert ablation.report(results).count("\n| ") == 2


def run_until_stopped(recipe, folder: str) -> None:
    """As a run of any kind does: at SIGTERM it ends, and all is saved."""
    with StopRequest() as stop:
        Path(folder, "process").write_text(str(os.getpid()))
        while stop.signal is None:
            time.sleep(0.01)
    Path(folder, "saved").touch()


def test_sigterm_ends_the_runs_that_are_under_way_and_they_save(tmp_path):
    recipe = small_recipe(write_text(tmp_path / "text.jsonl"))
    grid = in_child(ablation.run_grid, run_until_stopped, {"as it is": recipe}, [1, 2], tmp_path / "out", 2)
    folders = [tmp_path / "out" / "as+it+is" / f"seed-{seed}" for seed in (1, 2)]
    deadline = time.monotonic() + 120
    while not all((folder / "process").is_file() for folder in folders):
        assert grid.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    grid.terminate()
    grid.join(60)
    assert grid.exitcode not in (0, None)
    for folder in folders:
        assert (folder / "saved").is_file()
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "process").read_text()), 0)


def handler_of_sigterm_inside() -> object:
    with sigterm_as_interrupt():
        return signal.getsignal(signal.SIGTERM)


def test_sigterm_is_as_ctrl_c_in_the_main_thread_and_what_it_was_before_and_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as raised, sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.args == (signal.SIGTERM,)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(handler_of_sigterm_inside).result() is before
    assert signal.getsignal(signal.SIGTERM) is before


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-1e3, 1e3))
def test_the_interval_moves_with_the_values_and_keeps_its_width(values, shift):
    mean, width = map(float, ablation.mean_and_interval(values).split(" ± "))
    moved_mean, moved_width = map(float, ablation.mean_and_interval([value + shift for value in values]).split(" ± "))
    assert math.isclose(moved_mean, mean + shift, abs_tol=2e-4) and math.isclose(moved_width, width, abs_tol=2e-4)


def test_the_interval_of_three_values_is_students():
    assert ablation.mean_and_interval([1.0, 2.0, 3.0]) == "2.0000 ± 2.4841"  # 4.3027 * 1 / sqrt(3)
    assert ablation.mean_and_interval([1.5]) == "1.5000"
