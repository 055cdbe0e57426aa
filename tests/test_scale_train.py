"""`scale.train` as its users start it: under torchrun, killed, stopped, resumed on other numbers of processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import MODEL, run_small, small_recipe, write_text

from minglm.config import ConfigError
from minglm.train.metrics import WALL_CLOCK, read_metrics
from minglm.train.recipe import save_recipe
from minglm.train.run_folder import RunFolder
from scale.bench import Bench, bench
from scale.mesh import Layout, LayoutError
from scale.train import check, main, train

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose four sequences a step can be taken by one, two or four ranks."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    changes = dict(steps=STEPS, sequences_per_micro_batch=1, warmup_steps=2, every=4, tokens=200)
    return small_recipe(text, **changes)


@pytest.fixture(scope="module")
def recipe_file(recipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    save_recipe(recipe, path)
    return path


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> list[dict]:
    """The metrics of one process that trains by the recipe with `minglm train`'s trainer."""
    folder = tmp_path_factory.mktemp("alone")
    run_small(recipe, folder)
    return read_metrics(RunFolder(folder).metrics)


def torchrun(ranks: int, recipe_file: Path, folder: Path, *options: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", "-m", "scale.train", str(recipe_file), "--run-folder", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def assert_same_metrics(folder: Path, wanted: list[dict]) -> None:
    """All that was recorded but the clock and the samples, which ranks do not write."""
    found = read_metrics(RunFolder(folder).metrics)
    wanted = [record for record in wanted if record["kind"] != "sample"]
    assert [(record["step"], record["kind"]) for record in found] == [(record["step"], record["kind"]) for record in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"kind", *WALL_CLOCK}:
            torch.testing.assert_close(torch.tensor(one[key]), torch.tensor(other[key]), rtol=2e-3, atol=2e-3, msg=key)


def test_four_ranks_then_two_then_one_record_what_one_process_does(recipe_file, alone, tmp_path):
    """Each stage is stopped by asking for fewer steps, in a recipe that is otherwise the same."""
    for ranks, step in ((4, 4), (2, 6), (1, STEPS)):
        process = torchrun(ranks, recipe_file, tmp_path, "--ep", str(min(ranks, 2)))
        if step < STEPS:
            stop_after(process, tmp_path, step)
        else:
            out = finish(process)
    assert "python -m scale.export" in out and (tmp_path / "overview.png").stat().st_size > 10_000
    assert_same_metrics(tmp_path, alone)


def stop_after(process: subprocess.Popen, folder: Path, step: int) -> None:
    """SIGTERM as a job scheduler sends it: to all; the step is finished and saved."""
    wait_for_checkpoint(process, folder, step)
    for _, child in ranks_of(process):
        os.kill(child, signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert "stopped by SIGTERM after step" in out, out
    newest = RunFolder(folder).newest_checkpoint()
    assert newest is not None and int(newest.name.removeprefix("step-")) >= step


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int) -> None:
    for _ in range(3000):
        newest = RunFolder(folder).newest_checkpoint()
        if newest is not None and int(newest.name.removeprefix("step-")) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no checkpoint came")


def ranks_of(process: subprocess.Popen) -> list[tuple[int, int]]:
    """(rank, process id) of torchrun's children, by what their environment says."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", path.read_bytes())
        except (OSError, ValueError):
            continue  # it has just ended, or is another user's
        if parent == process.pid and rank:
            found.append((int(rank[1]), int(path.parent.name)))
    return sorted(found)


def test_a_killed_rank_is_named_and_the_run_goes_on_from_the_last_checkpoint(recipe_file, alone, tmp_path):
    process = torchrun(2, recipe_file, tmp_path, "--checkpoints.every", "1", restarts=0)
    wait_for_checkpoint(process, tmp_path, 2)
    (_, victim) = ranks_of(process)[1]
    os.kill(victim, signal.SIGKILL)
    out = finish(process, code=1)
    root_cause = out[out.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root_cause and "exitcode  : -9" in root_cause, out
    saved = int(RunFolder(tmp_path).newest_checkpoint().name.removeprefix("step-"))
    assert 2 <= saved < STEPS
    out = finish(torchrun(2, recipe_file, tmp_path, "--checkpoints.every", "1", "--resume"))
    assert f"resuming: {RunFolder(tmp_path).checkpoint(saved)}" in out
    assert_same_metrics(tmp_path, alone)


def test_torchrun_restarts_a_killed_rank_by_itself(recipe_file, alone, tmp_path):
    process = torchrun(2, recipe_file, tmp_path, "--checkpoints.every", "1", restarts=1)
    wait_for_checkpoint(process, tmp_path, 2)
    os.kill(ranks_of(process)[0][1], signal.SIGKILL)
    out = finish(process)
    assert "resuming: " in out
    assert_same_metrics(tmp_path, alone)


def test_one_process_needs_no_torchrun_and_computes_the_same_bits(recipe, alone, tmp_path):
    train(recipe, tmp_path, Layout())
    wanted = [{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in alone if r["kind"] != "sample"]
    found = [{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in read_metrics(RunFolder(tmp_path).metrics)]
    assert found == wanted


def test_the_benchmark_times_both_sides_of_one_step():
    """It refuses to, unless their losses have the same bits."""
    plain, spread = bench(Bench(sequences=1, length=8, repeats=1))
    assert plain > 0 and spread > 0


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (Layout(1, 1, 3), {}, r"ep = 3: 4 routed experts do not divide by it; wanted one of 1, 2, 4"),
        (
            Layout(8, 1, 1),
            {},
            r"training.sequences_per_step = 4: 8 ranks take 16 .* --training.sequences-per-step 16, or fewer",
        ),
        (Layout(2, 1, 1), dict(sequences_per_micro_batch=4), r"--training.sequences-per-micro-batch 2, or fewer ranks"),
        (Layout(1, 1, 1), dict(compile=True), "hardware.compile = true"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_with_the_fix(recipe, layout, changes, message):
    recipe = small_recipe(recipe.data.path, **changes)
    with pytest.raises(ConfigError, match=message):
        check(recipe, layout)


def test_impossible_numbers_of_processes_are_refused():
    with pytest.raises(LayoutError, match=r"dp 2 x fsdp 2 x ep 2 needs 8 processes; 4 were started. Start 8"):
        Layout.over(4, 2, 2, 2)
    with pytest.raises(LayoutError, match=r"6 processes cannot be laid out as dp 1 x fsdp x ep 4: .* Start 8 processes"):
        Layout.over(6, 1, None, 4)
    with pytest.raises(LayoutError, match="ep = 0: wanted 1 or more"):
        Layout.over(4, 1, None, 0)


def test_rows_that_do_not_divide_are_refused_with_a_number_that_does():
    with pytest.raises(LayoutError, match=r"fsdp = 7: the 4 experts .* such as 4"):
        Layout(1, 7, 1).check(MODEL)


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        ("3", ["--ep", "2"], "3 processes cannot be laid out as dp 1 x fsdp x ep 2"),
        ("4", ["--dp", "3", "--fsdp", "1"], "dp 3 x fsdp 1 x ep 1 needs 3 processes; 4 were started"),
        ("4", ["--ep", "4", "--model.n-routed-experts", "6"], "ep = 4: 6 routed experts do not divide by it"),
        ("8", [], "training.sequences_per_step = 4: 8 ranks take 8 sequences at once"),
    ],
)
def test_a_layout_is_refused_before_any_process_waits_for_another(
    recipe_file, tmp_path, monkeypatch, capsys, world_size, options, message
):
    """There are no other processes here: if it got as far as to look for them, the test would hang."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("RANK", "0")
    assert main([str(recipe_file), "--run-folder", str(tmp_path / "run"), *options]) == 2
    assert f"scale.train: {message}" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_recipe_in_the_run_folder_is_refused_on_all_ranks(recipe_file, tmp_path):
    finish(torchrun(2, recipe_file, tmp_path, "--training.steps", "2"))
    out = finish(torchrun(2, recipe_file, tmp_path, "--training.steps", "2", "--seed", "5"), code=1)
    assert "holds the checkpoints of another recipe; seed: found 1, wanted 5" in out
