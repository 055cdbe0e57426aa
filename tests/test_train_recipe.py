import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import ConfigError, GLMConfig
from minglm.train.recipe import (
    CONFIGS,
    Data,
    Evaluation,
    Optimizer,
    Recipe,
    Samples,
    Training,
    differences,
    load_recipe,
    resolve_paths,
    save_recipe,
)

MINIMAL = """
model = "nano"
[training]
steps = 10
sequence_length = 64
sequences_per_step = 8
sequences_per_micro_batch = 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("file", sorted((CONFIGS / "recipe").glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_read_by_its_name(file):
    assert load_recipe(file.stem) == load_recipe(file)


recipes = st.builds(
    Recipe,
    model=st.builds(GLMConfig, hidden_size=st.sampled_from([64, 128]), rms_norm_eps=st.floats(1e-9, 1e-3)),
    training=st.builds(
        Training,
        steps=st.integers(1, 10**9),
        sequence_length=st.integers(1, 2048),
        sequences_per_step=st.sampled_from([4, 8]),
        sequences_per_micro_batch=st.sampled_from([1, 2, 4]),
        mtp_weight=st.floats(0, 1),
    ),
    tokenizer=st.sampled_from(["train", "characters", "/some/where"]),
    seed=st.integers(0, 2**63 - 1),
    data=st.builds(Data, path=st.none() | st.just(Path("/a b/ü.txt"))),
    optimizer=st.builds(Optimizer, kind=st.sampled_from(["muon", "adamw"]), learning_rate=st.floats(0, 1)),
    samples=st.builds(Samples, prompts=st.lists(st.text(min_size=1, alphabet=st.characters(codec="utf-8"))).map(tuple)),
)


@settings(deadline=None)
@given(recipe=recipes)
def test_a_saved_recipe_is_read_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "config.toml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    assert list(differences(recipe, load_recipe(path))) == []


def test_a_saved_recipe_names_every_key(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    save_recipe(recipe, tmp_path / "config.toml")
    saved = tomllib.loads((tmp_path / "config.toml").read_text(encoding="utf-8"))
    for table in ("training", "optimizer", "schedule", "evaluation", "samples", "checkpoints", "hardware"):
        assert saved[table].keys() == {field.name for field in dataclasses.fields(getattr(recipe, table))}
    assert saved["model"]["n_routed_experts"] == recipe.model.n_routed_experts


@pytest.mark.parametrize(
    "change, complaint",
    [
        (("steps = 10", "step = 10"), r"recipe.toml: training: unknown key 'step'; the nearest known key is 'steps'"),
        (("steps = 10", 'steps = "10"'), r"training: steps = '10': wanted a whole number"),
        (("steps = 10", ""), r"training.steps = 0: wanted 1 or more, or stages"),
        (("steps = 10", "steps = 0"), r"steps = 0: wanted 1 or more"),
        (("[training]", "[trainning]"), r"unknown key 'trainning'; the nearest known key is 'training'"),
        (("sequences_per_step = 8", "sequences_per_step = 6"), r"sequences_per_step = 6: wanted a multiple of .* = 4"),
        (("sequence_length = 64", "sequence_length = 4096"), r"sequence_length = 4096: wanted at most .* = 2048"),
        (('model = "nano"', 'model = "nona"'), r"nona: no such file, and model 'nona' is none of .*nano"),
        (('model = "nano"', ""), r"key 'model' is missing"),
        (('model = "nano"', "model = 3"), r"model: wanted a table"),
        (('model = "nano"', "model = {hiden_size = 3}"), r"unknown key 'hiden_size'; .* 'hidden_size'"),
        (('model = "nano"', 'model = "nano'), r"recipe.toml: not valid TOML"),
        (("[training]", 'tokenizer = "x"\nseed = -1\n[training]'), r"seed = -1: wanted"),
        (("[training]", "[optimizer]\nbetas = [0.9]\n[training]"), r"betas = \(0.9,\): wanted two numbers"),
        (("[training]", '[schedule]\nkind = "wsd"\n[training]'), r"decay_steps = 0: wanted 1 or more"),
        (("[training]", "[schedule]\nwarmup_steps = 11\n[training]"), r"warmup_steps = 11: wanted .* at most .* = 10"),
        (("steps = 10", "steps = 10\nbatch_warmup_steps = 5"), r"first_sequences_per_step = 0: wanted"),
        (("steps = 10", "steps = 10\nfirst_sequences_per_step = 4"), r"batch_warmup_steps = 0: wanted"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_naming_file_and_key(tmp_path, change, complaint):
    assert change[0] in MINIMAL
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_recipe(write(tmp_path, MINIMAL.replace(*change)))
    assert str(tmp_path) in str(caught.value)


def test_paths_in_a_recipe_start_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text("hidden_size = 64\n")
    text = MINIMAL.replace('"nano"', '"small.toml"').replace("[training]", '[data]\npath = "text"\n[training]')
    recipe = resolve_paths(load_recipe(write(tmp_path, 'tokenizer = "words"\n' + text)))
    assert recipe.model.hidden_size == 64
    assert recipe.data.path == tmp_path / "text" and recipe.tokenizer == str(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    assert resolve_paths(load_recipe("recipe.toml")) == recipe


def test_differences_name_each_key_with_both_values():
    recipe = load_recipe("nano")
    other = dataclasses.replace(recipe, seed=recipe.seed + 1, evaluation=Evaluation(every=7, tokens=recipe.evaluation.tokens))
    assert list(differences(other, recipe)) == [
        f"seed: found {other.seed}, wanted {recipe.seed}",
        f"evaluation.every: found 7, wanted {recipe.evaluation.every}",
    ]
