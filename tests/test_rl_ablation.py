"""Ablations of RL: each part of the recipe is turned by itself, no run is done twice, the table says what helped."""

import json
import shutil

import pytest
from test_rl_loop import CONTEXT, base, recipe_of  # noqa: F401 (a fixture)

from minglm.config import ConfigError
from minglm.rl.ablation import AS_IT_IS, RunResult, ablate_rl, missing, one_by_one, report
from minglm.rl.objective import Objective
from minglm.rl.recipe import RLRecipe, Sampling, Tasks
from minglm.train.ablation import parse_variation, variants, with_value
from minglm.train.recipe import differences

RECIPE = RLRecipe(Tasks({"ordering": (1, 2), "function_calling": (1,)}), steps=10)
ALL = ("curriculum", "dynamic_sampling", "aggregation", "length", "format_penalty", "temperature")


def test_an_arm_turns_one_part_and_turning_it_again_gives_the_recipe_back():
    grid = one_by_one(RECIPE, ALL)
    assert grid[AS_IT_IS] == RECIPE and len(grid) == 1 + len(ALL)
    changes = [list(differences(RECIPE, varied)) for label, varied in grid.items() if label != AS_IT_IS]
    assert [len(change) for change in changes] == [1] * len(ALL)
    assert [change[0].split(":")[0] for change in changes] == [label.split("=")[0] for label in list(grid)[1:]]
    for arm, varied in zip(ALL, list(grid.values())[1:], strict=True):
        assert list(one_by_one(varied, [arm]).values())[1] == RECIPE
    assert one_by_one(RECIPE, ["length"])["sampling.tokens=[32,64,128]"].sampling.tokens == (32, 64, 128)
    assert one_by_one(RECIPE, ["temperature"])["sampling.temperatures=[1.0,1.1,1.2,1.3,1.4]"].sampling.temperatures[-1] == 1.4


def test_what_has_no_other_way_is_refused():
    constant = with_value(RECIPE, "objective", Objective(aggregation="constant", fixed_length=8))
    with pytest.raises(ConfigError, match="arm aggregation: objective.aggregation = 'constant'"):
        one_by_one(constant, ["aggregation"])
    without_tools = with_value(RECIPE, "tasks", Tasks({"ordering": (1,)}))
    assert list(missing(without_tools)) == ["format_penalty"] and not missing(RECIPE)
    with pytest.raises(ConfigError, match="arm format_penalty: tasks.levels: no family has tools"):
        one_by_one(without_tools, ALL)
    with pytest.raises(ConfigError, match="found --vary and --arms"):
        ablate_rl(RECIPE, ("passes=1,2",), ("length",), (1,), "nowhere")


def test_variations_may_hold_lists():
    assert parse_variation("sampling.tokens=96,[24,48,96]") == ("sampling.tokens", [96, [24, 48, 96]])
    assert parse_variation("tasks.curriculum=none,pass_rate") == ("tasks.curriculum", ["none", "pass_rate"])
    found = variants(RECIPE, ["sampling.tokens=96,[24,48,96]"])
    assert [one.sampling.tokens for one in found.values()] == [96, (24, 48, 96)]


def test_the_table_compares_seed_by_seed():
    """All seeds gain 0.1 more, which is certain although they differ by more than that."""
    found = {"as it is": [RunResult(0.1, 0.3), RunResult(0.2, 0.8)], "x=1": [RunResult(0.1, 0.4), RunResult(0.2, 0.9)]}
    first, second = report(found).splitlines()[2:]
    assert first.startswith("| as it is | 0.150 [") and first.endswith("|  |")
    assert second.startswith("| x=1 |") and second.endswith("| 0.100 [0.100, 0.100] |")


def test_runs_are_done_once_and_what_was_cut_off_goes_on(base, tmp_path):  # noqa: F811
    recipe = recipe_of(
        base, steps=2, sampling=Sampling(group_size=2, groups=1, tokens=2, rounds=1, context=CONTEXT), evaluation_problems=2
    )
    first = ablate_rl(recipe, ("passes=1,2",), (), (3,), tmp_path)
    folders = [tmp_path / f"passes={n}" / "seed-3" for n in (1, 2)]
    assert all((folder / "checkpoints" / "step-2").is_dir() for folder in folders)
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {"passes=1", "passes=2"}
    assert (tmp_path / "ablation.md").read_text() == first + "\n" and (tmp_path / "curves.png").is_file()
    done = (folders[0] / "checkpoints" / "step-2" / "config.json").stat().st_mtime_ns
    shutil.rmtree(folders[1] / "checkpoints" / "step-2")
    assert ablate_rl(recipe, ("passes=1,2",), (), (3,), tmp_path) == first
    assert (folders[0] / "checkpoints" / "step-2" / "config.json").stat().st_mtime_ns == done
    assert (folders[1] / "checkpoints" / "step-2").is_dir()
