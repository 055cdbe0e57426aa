"""The plan of a recipe's stages, and runs that are killed, started and stopped at the borders between them."""

import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import MODEL, equal, everything_written, finished_run, in_child, run_small, run_until_killed, small_recipe

from minglm.checkpoint import CheckpointError
from minglm.config import ConfigError, GLMConfig
from minglm.engine.generate import generate
from minglm.tokenizer import train_tokenizer
from minglm.train.metrics import read_metrics
from minglm.train.recipe import differences, load_recipe, save_recipe
from minglm.train.run_folder import RunFolder
from minglm.train.span import Span
from minglm.train.stages import Stage
from minglm.train.trainer import train

# 4 sequences of 16 tokens a step, as small_recipe has it: 64 tokens.
STAGES = (
    Stage("general", tokens=6 * 64, mixture={"prose": 3.0, "code": 1.0}),
    Stage("code", tokens=5 * 64, mixture={"code": 1.0}, packing="best_fit", router_bias_rate=0.0, mtp_weight=0.1),
    Stage("long", tokens=4 * 64, mixture={"prose": 1.0, "code": 1.0}, sequence_length=32, rope_theta=1e6),
)
BORDERS = {"general": 6, "code": 11, "long": 15}


def write_folder(folder: Path) -> Path:
    """Text of two domains."""
    draw = random.Random(0)
    folder.mkdir()
    for number in range(40):
        words = [draw.choice("the a of model token expert router learns reads small large".split()) for _ in range(40)]
        (folder / f"{number}.md").write_text(" ".join(words) + f" {number}.\n")
        (folder / f"{number}.py").write_text("".join(f"def {w}_{number}(x):\n    return {w}(x)\n\n\n" for w in words[:6]))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("text") / "texts")


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    return finished_run(staged(text), tmp_path_factory.mktemp("undisturbed"))


def staged(text: Path, **changes: object):
    return small_recipe(text, **({"stages": STAGES, "every": 4, "keep": 1} | changes))


def assert_same(folder: Path, undisturbed: Path) -> None:
    found, wanted = everything_written(folder), everything_written(undisturbed)
    assert found[0] == wanted[0]
    assert found[1] == wanted[1]
    assert equal(found[2], wanted[2])


# ---- the plan


def test_a_plan_has_every_stages_steps_and_what_a_stage_leaves_out_is_the_recipes(text):
    plan = staged(text).plan()
    assert {stage.name: stage.last_step for stage in plan.stages} == BORDERS
    assert [(s.sequence_length, s.sequences_per_step, s.sequences_per_micro_batch) for s in plan.stages] == [
        (16, 4, 2), (16, 4, 2), (32, 2, 1),
    ]  # fmt: skip
    assert [s.rope_theta for s in plan.stages] == [1e4, 1e4, 1e6]
    assert [(s.mtp_weight, s.router_bias_rate) for s in plan.stages] == [(0.3, 1e-3), (0.1, 0.0), (0.3, 1e-3)]


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([8, 16, 32])), min_size=1, max_size=5),
    st.floats(0.1, 10),
    st.integers(0, 30),
)
def test_stages_follow_one_another_and_their_tokens_are_met_within_a_step(stages, scale, warmup):
    stages = tuple(Stage(str(i), tokens=100_000 + tokens, sequence_length=t) for i, (tokens, t) in enumerate(stages))
    changes = dict(stages=stages, scale=scale, batch_warmup_steps=warmup, first_sequences_per_step=2 if warmup else 0)
    plan = small_recipe(Path("text"), **changes).plan()
    assert plan.stages[0].first_step == 1
    for stage, following in zip(plan.stages, plan.stages[1:], strict=False):
        assert following.first_step == stage.last_step + 1 and following.border == stage.last_step
    for stage, wanted in zip(plan.stages, stages, strict=True):
        assert stage.sequences_per_step * stage.sequence_length == 64
        missed = stage.steps * 64 - wanted.tokens * scale
        small_steps = plan.batch_warmup_steps * 16 if stage.number == 0 else 0  # 32 to 64 tokens
        assert abs(missed - small_steps) <= 32 + 1e-6 * wanted.tokens * scale
        assert plan.at(stage.first_step) is plan.at(stage.last_step) is stage is plan.named(stage.name)
        assert plan.is_border(stage.last_step) and (stage.steps == 1 or not plan.is_border(stage.first_step))


def test_one_number_makes_a_recipe_longer_with_and_without_stages(text):
    assert staged(text, scale=3.0).plan().steps == 3 * 15
    plain = small_recipe(text, steps=10, scale=3.0, warmup_steps=4).plan()
    assert (plain.steps, plain.warmup_steps) == (30, 12)


def test_a_recipe_with_stages_is_saved_and_read_back_equal(text, tmp_path):
    recipe = staged(text)
    save_recipe(recipe, tmp_path / "config.toml")
    assert load_recipe(tmp_path / "config.toml") == recipe
    later = replace(recipe, stages=(*STAGES[:2], replace(STAGES[2], mixture={"prose": 2.0, "code": 1.0})))
    assert list(differences(recipe, later)) == ["stages.long.mixture.prose: found 1.0, wanted 2.0"]
    turned = replace(recipe, stages=STAGES[::-1])
    assert list(differences(recipe, turned)) == [
        "stages: found ['general', 'code', 'long'], wanted ['long', 'code', 'general']"
    ]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(sequence_length=100), r"stages.long.sequence_length = 100: wanted at most model.max_position_embeddings = 64"),
        (dict(tokens=31), r"stages.long.tokens = 31: the stage would see no data: .*wanted at least 32, or a larger"),
        (dict(name="code"), r"stages = \['general', 'code', 'code'\]: wanted a name of its own"),
        (dict(name=""), r"name = '': wanted a name"),
        (dict(tokens=0), r"tokens = 0: wanted above 0"),
        (dict(sequences_per_step=3, sequences_per_micro_batch=2), r"stages.long.sequences_per_step = 3: wanted a multiple"),
        (dict(mixture={"prose": -1.0}), r"mixture.prose = -1.0: wanted 0 or more"),
        (dict(mixture={"prose": 0.0}), r"mixture = .*: wanted a weight above 0"),
        (dict(mixture={}, packing="best_fit"), r"mixture = {}: wanted the weights"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_when_the_recipe_is_read(text, change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        staged(text, stages=(*STAGES[:2], replace(STAGES[2], **change)))


def test_steps_beside_stages_are_refused(text):
    with pytest.raises(ConfigError, match="training.steps = 5: wanted none beside stages"):
        staged(text, steps=5)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(mixture={"cod": 1.0}), r"stages.long.mixture: the data has no domain 'cod'; wanted some of .*code"),
        (dict(sequence_length=4096, sequences_per_step=1, tokens=4096), r"stages.long: .*fewer than one sequence of 4096"),
    ],
)
def test_data_that_a_stage_lacks_is_refused_before_the_first_step_naming_the_stage(text, tmp_path, change, complaint):
    (tmp_path / "few").mkdir()
    for name in ("1.md", "1.py", "2.md", "2.py"):
        shutil.copy(text / name, tmp_path / "few")
    model = replace(MODEL, max_position_embeddings=4096)
    recipe = staged(tmp_path / "few", model=model, stages=(*STAGES[:2], replace(STAGES[2], **change)))
    with pytest.raises(ConfigError, match=complaint):
        run_small(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- the run


def test_every_stage_ends_with_its_records_and_a_checkpoint_that_stays(undisturbed):
    records = read_metrics(undisturbed / "metrics.jsonl")
    assert {r["name"]: r["step"] for r in records if r["kind"] == "stage"} == BORDERS
    for step in BORDERS.values():
        assert {r["domain"] for r in records if r["kind"] == "domain" and r["step"] == step} == {"prose", "code"}
    run = RunFolder(undisturbed)
    assert [path.name for path in run.checkpoints()] == ["step-6", "step-11", "step-15"]  # 4, 8 and 12 are gone
    assert run.stage_checkpoints() == {name: run.checkpoint(step) for name, step in BORDERS.items()}
    assert {r["sequences"] for r in records if r["kind"] == "step" and r["step"] > 11} == {2}
    assert [r["tokens"] for r in records if r["kind"] == "step"] == [64 * step for step in range(1, 16)]


def test_a_checkpoint_carries_the_rope_base_of_its_stage(undisturbed):
    run = RunFolder(undisturbed)
    bases = {name: GLMConfig.from_pretrained(folder).rope_theta for name, folder in run.stage_checkpoints().items()}
    assert bases == {"general": 1e4, "code": 1e4, "long": 1e6}


def test_a_bias_rate_of_zero_freezes_the_bias_through_its_stage(undisturbed):
    bias = {r["step"]: r["bias"] for r in read_metrics(undisturbed / "metrics.jsonl") if r["kind"] == "router"}
    assert bias[6] == bias[11] != bias[15]


def test_a_run_killed_in_and_between_stages_ends_as_the_undisturbed_one(text, undisturbed, tmp_path):
    recipe, folder, draw = staged(text), tmp_path / "run", random.Random(0)
    calls = int((undisturbed.parent / "calls").read_text())
    resumed_from = set()
    for _ in range(12):
        process = in_child(run_until_killed, recipe, folder, draw.randrange(calls // 4, calls // 2))
        process.join()
        if process.exitcode == 0:  # what was left took fewer calls
            break
        assert process.exitcode == -signal.SIGKILL
        newest = RunFolder(folder).newest_checkpoint()
        resumed_from.add(newest and newest.name)
    assert len(resumed_from) >= 3, "the kills did not spread over the run"
    run_small(recipe, folder)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("border", BORDERS.values())
def test_a_run_that_goes_on_exactly_from_a_border_ends_as_the_undisturbed_one(text, undisturbed, tmp_path, border):
    """As if it had been killed just after the checkpoint there."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    for checkpoint in RunFolder(folder).checkpoints():
        if int(checkpoint.name.removeprefix("step-")) > border:
            shutil.rmtree(checkpoint)
    run_small(staged(text), folder)
    assert_same(folder, undisturbed)


def test_zero_is_the_ends_of_stages_alone(text, tmp_path):
    """And before the first step, for held-out documents: where they begin."""
    recipe = staged(text, every=0)
    run_small(replace(recipe, samples=replace(recipe.samples, every=0)), tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "held_out"] == [0, *BORDERS.values()]
    assert [record["step"] for record in records if record["kind"] == "sample"] == list(BORDERS.values())


# ---- parts of a run


def run_span(recipe, folder: Path, **span):
    return train(recipe, folder, generate, span=Span(**span))


def test_stage_by_stage_is_the_undisturbed_run(text, undisturbed, tmp_path):
    folder = tmp_path / "run"
    for name, step in BORDERS.items():
        outcome = run_span(staged(text), folder, until_stage=name)
        assert (outcome.step, outcome.stopped_by) == (step, None)
    assert_same(folder, undisturbed)


def test_from_a_stage_of_another_run_is_the_undisturbed_run_and_can_be_resumed(text, undisturbed, tmp_path):
    folder, start = tmp_path / "run", dict(from_stage="code", from_run=undisturbed)
    recipe = staged(text)
    run_span(recipe, folder, **start, until_stage="code")
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["step-11"]
    run_span(recipe, folder, **start)  # the same command again goes on
    assert_same(folder, undisturbed)
    assert not (folder / "data").exists()


def test_from_a_stage_in_the_same_folder_takes_the_run_back_and_later_stages_may_have_changed(text, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    run_span(staged(text), folder, from_stage="long")
    assert_same(folder, undisturbed)
    other = replace(staged(text), stages=(*STAGES[:2], replace(STAGES[2], rope_theta=1e5)))
    with pytest.raises(ConfigError, match="rope_theta: found 1000000.0, wanted 100000.0"):
        run_small(other, folder)
    run_span(other, folder, from_stage="long")
    config = GLMConfig.from_pretrained(RunFolder(folder).newest_checkpoint())
    assert config.rope_theta == 1e5 and load_recipe(folder / "config.toml").stages == other.stages
    run_small(other, folder)  # it is this recipe's run now


@pytest.mark.parametrize(
    "span, complaint",
    [
        (dict(from_stage="lang"), "stage 'lang': wanted one of general, code, long"),
        (dict(until_stage="lang"), "stage 'lang': wanted one of general, code, long"),
        (dict(from_stage="general"), "from_stage = 'general' is the first stage: wanted a later one"),
        (dict(from_stage="long", until_stage="code"), "until_stage = 'code' comes before from_stage = 'long'"),
        (dict(from_run=Path("elsewhere")), "from_run without from_stage"),
        (dict(from_stage="long"), "no run folder"),
    ],
)
def test_a_span_that_cannot_be_is_refused(text, tmp_path, span, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run_span(staged(text), tmp_path / "run", **{"from_run": None} | span)


def test_a_start_that_is_not_on_the_recipes_way_is_refused(text, undisturbed, tmp_path):
    longer = replace(staged(text), stages=(replace(STAGES[0], tokens=7 * 64), *STAGES[1:]))
    with pytest.raises(ConfigError, match=r"stages to step 7 .*found \[\('general', 6\)\], wanted \[\('general', 7\)\]"):
        run_span(longer, tmp_path / "run", from_stage="code", from_run=undisturbed)
    wider = staged(text, model=replace(MODEL, hidden_size=32))
    with pytest.raises(ConfigError, match="model.hidden_size: found 16, wanted 32"):
        run_span(wider, tmp_path / "run", from_stage="code", from_run=undisturbed)
    short = tmp_path / "short"
    run_span(staged(text), short, until_stage="general")
    with pytest.raises(ConfigError, match=r"step-11: no such checkpoint.*general \(step-6\).*--until-stage code"):
        run_span(staged(text), tmp_path / "run", from_stage="long", from_run=short)
    train_tokenizer(["some other words " * 9], vocab_size=300).save_pretrained(tmp_path / "words")
    other = staged(text, tokenizer=str(tmp_path / "words"), folder=tmp_path / "data")
    with pytest.raises(CheckpointError, match="its tokenizer has fingerprint.*--tokenizer"):
        run_span(other, tmp_path / "run", from_stage="code", from_run=undisturbed)
