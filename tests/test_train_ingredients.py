"""What a recipe's data is made of."""

import pytest

from minglm.config import ConfigError
from minglm.data.sources import HELD_OUT, TRAIN, split_documents
from minglm.tasks import FAMILIES
from minglm.train.ingredients import DOMAINS, DOMAINS_OF_FAMILIES, SHORT_DOCUMENTS, corpus_of, families_of
from minglm.train.recipe import CONFIGS, Data, load_recipe

PROBLEMS = (*DOMAINS.values(), *DOMAINS_OF_FAMILIES.values())


def test_every_family_is_in_exactly_one_ingredient():
    found = [family for ingredient in PROBLEMS for family in families_of(ingredient)]
    assert sorted(found) == sorted(FAMILIES)


def test_short_documents_are_long_ones_at_easy_difficulties():
    assert families_of(SHORT_DOCUMENTS) == families_of("long_documents") == ("long_document",)
    short, long = (
        [len(document.text) for document in corpus_of(Data(ingredients=(name,), documents=60, levels=2, long_levels=(4, 5)))]
        for name in (SHORT_DOCUMENTS, "long_documents")
    )
    assert max(short) < min(long)


def test_each_ingredient_of_problems_fills_its_domain_in_both_splits():
    asked = (*PROBLEMS, SHORT_DOCUMENTS)
    corpus = corpus_of(Data(ingredients=asked, documents=51, levels=1, long_levels=(1, 2)))
    found = {(split, document.domain) for split, document in split_documents(corpus)}
    assert found == {(split, domain) for split in (TRAIN, HELD_OUT) for domain in asked}
    assert list(corpus) == list(corpus)


def test_the_identity_tells_what_was_asked_for():
    asked = [Data(ingredients=("reasoning",), documents=n, thinking_share=s) for n in (10, 11) for s in (0.0, 1.0)]
    identities = [str(corpus_of(data).identity) for data in asked]
    assert len(set(identities)) == 4
    assert str(corpus_of(asked[0]).identity) == identities[0]


def test_own_text_and_ingredients_come_together(tmp_path):
    (tmp_path / "own.md").write_text("Own text, not much of it.")
    corpus = corpus_of(Data(path=tmp_path, ingredients=("reasoning",), documents=5))
    assert {document.domain for document in corpus} == {"prose", "reasoning"}


@pytest.mark.parametrize("documents", [5, 600])
def test_own_text_keeps_held_out_text_however_much_it_is_joined_with(tmp_path, documents):
    (tmp_path / "own.md").write_text("Own text, not much of it.\n" * 20)
    alone = list(split_documents(corpus_of(Data(path=tmp_path))))
    assert {split for split, _ in alone} == {TRAIN, HELD_OUT}
    joined = split_documents(corpus_of(Data(path=tmp_path, ingredients=("reasoning",), documents=documents)))
    own = [(split, document.text) for split, document in joined if document.domain == "prose"]
    assert own == [(split, document.text) for split, document in alone]


@pytest.mark.parametrize(
    "data, complaint",
    [
        (
            Data(ingredients=("resoning",)),
            "data.ingredients: 'resoning' is none; wanted some of prose, code, repositories, rea",
        ),
        (Data(datasets={"prose": ""}), "data.datasets.prose = '': wanted the name of a dataset"),
        (Data(datasets={"prose": "a b"}), "data.datasets.prose = 'a b': wanted the name of a dataset"),
    ],
)
def test_what_is_no_ingredient_is_refused(data, complaint):
    with pytest.raises(ConfigError, match=complaint):
        corpus_of(data)


@pytest.mark.parametrize("key, value", [("fim_rate", 1.5), ("documents", 0), ("levels", -1), ("characters", -1)])
def test_numbers_that_make_no_data_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} = {value}: wanted"):
        Data(**{key: value})


def test_the_stages_of_shipped_recipes_mix_domains_that_their_data_has():
    from minglm.data.pipeline import INGREDIENTS

    staged = [recipe for recipe in map(load_recipe, (CONFIGS / "recipe").glob("*.toml")) if recipe.stages]
    assert len(staged) >= 3
    for recipe in staged:
        known = {domain for name in recipe.data.ingredients for domain in INGREDIENTS.get(name, (name,))}
        known |= set(recipe.data.datasets) | ({"prose", "code"} if recipe.data.sources else set())
        for stage in recipe.plan().stages:
            assert set(stage.mixture) <= known, stage.name


def test_the_published_recipe_has_the_published_numbers():
    recipe = load_recipe("glm-4.5")
    plan = recipe.plan()
    tokens = [stage.tokens / 1e12 for stage in recipe.stages]
    assert tokens == [15, 7, 0.5, 0.5, 0.1]
    assert [stage.sequence_length for stage in plan.stages] == [4096, 4096, 32768, 32768, 131072]
    assert [stage.rope_theta for stage in plan.stages] == [1e4, 1e4, 1e6, 1e6, 1e6]
    assert [stage.mtp_weight for stage in plan.stages] == [0.3, 0.1, 0.1, 0.1, 0.1]
    assert [stage.router_bias_rate for stage in plan.stages] == [1e-3, 0, 0, 0, 0]
    assert {stage.sequences_per_step * stage.sequence_length for stage in plan.stages} == {64 * 2**20}
    assert plan.first_sequences_per_step * 4096 == 16 * 2**20
    warmed = plan.batch_warmup_steps * 4096 * (plan.first_sequences_per_step + 16384) / 2
    assert warmed == pytest.approx(500e9, rel=0.1)
    assert recipe.optimizer.learning_rate * recipe.schedule.final_fraction == pytest.approx(2.5e-5)
