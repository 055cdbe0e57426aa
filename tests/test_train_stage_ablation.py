"""Arms do one thing otherwise, start where they say, and are compared seed by seed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from small_run import MODEL, small_recipe
from test_train_stages import STAGES, staged, write_folder

from minglm.checkpoint import load_model
from minglm.config import ConfigError
from minglm.train.metrics import read_metrics
from minglm.train.recipe import differences, load_recipe
from minglm.train.run_folder import RunFolder
from minglm.train.stage_ablation import ablate_stages, arms, report


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("text") / "texts")


def test_a_control_reads_what_the_stage_before_reads_for_as_many_tokens(text):
    recipe = staged(text)
    found = {arm.label: arm for arm in arms(recipe, ["control"])}
    assert list(found) == ["code, control", "long, control"]
    for label, arm in found.items():
        name = label.partition(",")[0]
        own, control = recipe.plan().named(name), arm.recipe.plan().named(name)
        before = recipe.plan().stages[own.number - 1]
        assert (control.first_step, control.last_step) == (own.first_step, own.last_step)
        for key in ("mixture", "packing", "sequence_length", "sequences_per_step", "rope_theta"):
            assert getattr(control, key) == getattr(before, key)
        for key in ("mtp_weight", "balance_weight", "router_bias_rate"):
            assert getattr(control, key) == getattr(own, key)
        assert all(line.startswith(f"stages.{name}.") for line in differences(recipe, arm.recipe))


def test_the_rope_arm_keeps_the_base_to_the_end(text):
    stages = (*STAGES[:2], STAGES[2], replace(STAGES[2], name="longer", sequence_length=64))
    (arm,) = arms(staged(text, stages=stages), ["rope"])
    assert {stage.rope_theta for stage in arm.recipe.plan().stages} == {1e4}
    assert (arm.stage, arm.span.from_stage) == ("longer", "long")
    assert arms(staged(text), ["rope"], ["code"]) == []


def test_the_fim_arm_is_there_where_code_is_cut(text):
    recipe = staged(text)
    assert arms(recipe, ["fim"]) == []
    cut = replace(recipe, data=replace(recipe.data, ingredients=("code",), fim_rate=0.5))
    (arm,) = arms(cut, ["fim"])
    assert list(differences(cut, arm.recipe)) == ["data.fim_rate: found 0.5, wanted 0.0"]
    assert (arm.stage, arm.span.from_stage, arm.span.until_stage) == ("code", None, "code")


def test_what_is_no_arm_is_refused(text):
    with pytest.raises(ConfigError, match="a single stage; wanted"):
        arms(small_recipe(text))
    with pytest.raises(ConfigError, match="arms = 'other': wanted some of control, rope, fim"):
        arms(staged(text), ["other"])
    with pytest.raises(ConfigError, match="stage 'lang': wanted one of"):
        arms(staged(text), stages=["lang"])


@dataclass(frozen=True)
class Norm:
    """Judges by the norm of a weight, and notes in a file what it has judged."""

    notes: Path

    def __call__(self, checkpoint: Path, data: Path) -> dict[str, float]:
        assert (data / "tokens").is_dir()
        with self.notes.open("a") as notes:
            notes.write(f"{checkpoint}\n")
        return {"norm": load_model(checkpoint).model.norm.weight.norm().item()}

    def judged(self) -> list[str]:
        return self.notes.read_text().splitlines()


def test_arms_start_from_the_recipes_own_checkpoints_and_a_second_call_trains_and_judges_nothing(text, tmp_path):
    recipe, judge = staged(text), Norm(tmp_path / "judged")
    arguments = (recipe, [1, 2], tmp_path / "out", judge, "the norm", ["control"], ["long"], 2)
    text_of_report = ablate_stages(*arguments)
    assert len(judge.judged()) == 4 and "### long, control" in text_of_report
    for seed in (1, 2):
        whole, arm = (RunFolder(tmp_path / "out" / name / f"seed-{seed}") for name in ("recipe", "long+control"))
        losses = [[r["loss"] for r in read_metrics(run.metrics) if r["kind"] == "step"] for run in (whole, arm)]
        assert losses[0][:11] == losses[1][:11] and losses[0][11:] != losses[1][11:]
        assert len(losses[0]) == len(losses[1]) == 15
        assert load_recipe(arm.config).model == MODEL
    found = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [len(pair) for pair in found["arms"]["long, control"]] == [2, 2]
    assert ablate_stages(*arguments) == text_of_report and len(judge.judged()) == 4


def test_the_recipe_is_trained_as_far_as_it_is_judged(text, tmp_path):
    recipe, judge = staged(text), Norm(tmp_path / "judged")
    ablate_stages(recipe, [1], tmp_path / "out", judge, "the norm", ["control"], ["code"])
    plan, run = recipe.plan(), RunFolder(tmp_path / "out" / "recipe" / "seed-1")
    assert read_metrics(run.metrics)[-1]["step"] == plan.named("code").last_step < plan.steps
    with pytest.raises(ConfigError, match="no arm control at general; wanted a later stage"):
        ablate_stages(recipe, [1], tmp_path / "out", judge, "the norm", ["control"], ["general"])


def test_a_report_pairs_the_seeds_and_marks_what_is_no_chance():
    pairs = [({"a": 1.0 + seed, "b": 1.0}, {"a": 0.5 + seed, "b": 1.0 + (-1) ** seed}) for seed in range(3)]
    lines = report({"code, control": pairs}).splitlines()
    assert lines[0] == "### code, control"
    assert lines[4] == "| a | 2.0000 | 1.5000 | **0.5000 ± 0.0000** |"  # seeds differ, but not their difference
    assert "**" not in lines[5]
    small = report({"code, control": [({"a": 1e-5 * seed}, {"a": 0.0}) for seed in (3, 4, 4)]})
    assert "**0.0000 ± 0.0000**" in small  # by the numbers, not by their four digits
