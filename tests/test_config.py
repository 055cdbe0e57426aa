"""Configurations: published files are read as they are, what is not understood is refused, and nothing is lost.

The published values below are those of the GLM-4.5 and GLM-4.5-Air `config.json`, typed in a second time.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Glm4MoeConfig

from minglm.config import ConfigError, GLMConfig, build, read_toml

LAW = settings(deadline=None, derandomize=True, max_examples=60)
SIZES = Path(__file__).parents[1] / "configs" / "model"

SHARED = {
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "vocab_size": 151552,
}
GLM_45 = SHARED | {
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
GLM_45_AIR = SHARED | {
    "first_k_dense_replace": 1,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_hidden_layers": 46,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
BESIDE_THE_ARCHITECTURE = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "model_type": "glm4_moe",
    "pad_token_id": 151329,
    "use_cache": True,
}
OLDER = {"partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
ROPE = {"partial_rotary_factor": 0.5, "rope_theta": 1e6, "rope_type": "default"}
NEWER = {"rope_parameters": ROPE, "dtype": "bfloat16"}


def write_json(folder: Path, mapping: Any) -> Path:
    (folder / "config.json").write_text(mapping if isinstance(mapping, str) else json.dumps(mapping))
    return folder


def assert_holds(config: GLMConfig, published: dict[str, Any]) -> None:
    """Every field of the configuration is published, and equal."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "unused"}
    assert values == published | {"partial_rotary_factor": 0.5, "rope_theta": 1e6}


# ------------------------------------------------------------------------------------------------------ published files


@pytest.mark.parametrize("rope", [OLDER, NEWER], ids=["older spelling", "newer spelling"])
@pytest.mark.parametrize("published", [GLM_45, GLM_45_AIR], ids=["glm-4.5", "glm-4.5-air"])
def test_a_published_config_is_read_in_both_spellings_of_rope(tmp_path, published, rope):
    write_json(tmp_path, published | BESIDE_THE_ARCHITECTURE | rope | {"transformers_version": "4.54.0"})
    config = GLMConfig.from_pretrained(tmp_path)
    assert_holds(config, published)
    assert config == GLMConfig.from_pretrained(tmp_path / "config.json")
    assert config.rotary_dim == 64
    assert config.num_moe_layers == published["num_hidden_layers"] - published["first_k_dense_replace"]


@pytest.mark.parametrize("rope", [OLDER, NEWER], ids=["older spelling", "newer spelling"])
def test_what_the_architecture_does_not_need_is_kept_and_written_back(tmp_path, rope):
    beside = BESIDE_THE_ARCHITECTURE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    GLMConfig.from_pretrained(write_json(tmp_path, GLM_45 | beside | rope)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert GLM_45.items() <= written.items() and beside.items() <= written.items()
    assert written["rope_parameters"] == ROPE
    assert "rope_theta" not in written and "partial_rotary_factor" not in written
    assert written.get("torch_dtype", written.get("dtype")) == "bfloat16"


def test_a_config_of_our_own_is_written_as_a_model_of_the_family(tmp_path):
    GLMConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "glm4_moe" and written["architectures"] == ["Glm4MoeForCausalLM"]
    assert "unused" not in written
    assert GLMConfig.from_pretrained(tmp_path) == GLMConfig()


def test_hugging_faces_other_names_are_read():
    config = GLMConfig.from_dict({"num_local_experts": 32, "num_mtp_layers": 0})
    assert (config.n_routed_experts, config.num_nextn_predict_layers) == (32, 0)


def test_a_missing_head_dim_is_derived_as_transformers_does(tmp_path):
    mapping = GLM_45_AIR | OLDER | {"num_attention_heads": 32}
    del mapping["head_dim"]
    assert GLMConfig.from_pretrained(write_json(tmp_path, mapping)).head_dim == 4096 // 32


@pytest.mark.parametrize("mistyped", [{"hidden_size": "4096"}, {"num_attention_heads": 0}])
def test_a_missing_head_dim_hides_no_mistake_in_what_it_is_derived_from(tmp_path, mistyped):
    mapping = GLM_45_AIR | OLDER | mistyped
    del mapping["head_dim"]
    with pytest.raises(ConfigError, match=f"config.json: {next(iter(mistyped))} = "):
        GLMConfig.from_pretrained(write_json(tmp_path, mapping))


@st.composite
def configs(draw) -> GLMConfig:
    """Any configuration that the architecture allows."""
    group_size, n_group = draw(st.integers(2, 64)), draw(st.integers(1, 8))
    topk_group = draw(st.integers(1, n_group))
    kv_heads = draw(st.integers(1, 16))
    sizes = st.integers(1, 10_000)
    return GLMConfig(
        vocab_size=draw(sizes),
        hidden_size=draw(sizes),
        num_hidden_layers=draw(st.integers(1, 100)),
        first_k_dense_replace=draw(st.integers(0, 100)),
        intermediate_size=draw(sizes),
        num_attention_heads=kv_heads * draw(st.integers(1, 12)),
        num_key_value_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 64)),
        attention_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        partial_rotary_factor=draw(st.sampled_from([0.5, 1.0])),
        rope_theta=draw(st.floats(1.0, 1e9)),
        max_position_embeddings=draw(sizes),
        n_routed_experts=group_size * n_group,
        num_experts_per_tok=draw(st.integers(1, group_size * topk_group)),
        moe_intermediate_size=draw(sizes),
        n_shared_experts=draw(st.integers(1, 4)),
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.floats(0.1, 10.0)),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        initializer_range=draw(st.floats(0.0, 1.0)),
    )


@given(config=configs())
@LAW
def test_the_round_trip_through_transformers_changes_nothing(tmp_path_factory, config):
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    config.save_pretrained(ours)
    Glm4MoeConfig.from_pretrained(ours).save_pretrained(theirs)
    assert GLMConfig.from_pretrained(theirs) == config


@given(config=configs())
@LAW
def test_transformers_reads_the_values_that_we_wrote(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("ours")
    config.save_pretrained(folder)
    theirs = Glm4MoeConfig.from_pretrained(folder)
    for f in dataclasses.fields(config):
        if f.name in ("rope_theta", "partial_rotary_factor"):
            assert theirs.rope_parameters[f.name] == getattr(config, f.name)
        elif f.name != "unused":
            assert getattr(theirs, f.name) == getattr(config, f.name)


# ------------------------------------------------------------------------------------------------------------ our sizes


@pytest.mark.parametrize("path", sorted(SIZES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_size_has_the_shape_of_the_family(path):
    config = GLMConfig.from_toml(path)
    assert config.num_hidden_layers > config.first_k_dense_replace >= 1
    assert config.num_nextn_predict_layers == 1 and config.n_shared_experts == 1
    assert config.num_attention_heads * config.head_dim > config.hidden_size
    assert config.moe_intermediate_size < config.intermediate_size
    assert not config.unused


@pytest.mark.parametrize(("name", "published"), [("glm-4.5", GLM_45), ("glm-4.5-air", GLM_45_AIR)])
def test_the_published_sizes_are_exact(name, published):
    assert_holds(GLMConfig.from_toml(SIZES / f"{name}.toml"), published)


# ----------------------------------------------------------------------------------- what is refused, and in what words


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("n_routed_expert", "n_routed_experts"),
        ("hiden_size", "hidden_size"),
        ("num_kv_heads", "num_key_value_heads"),
        ("rope_thetta", "rope_theta"),
    ],
)
def test_a_misspelt_key_is_refused_and_the_nearest_named(tmp_path, key, nearest):
    (tmp_path / "size.toml").write_text(f"{key} = 8\n")
    message = f"unknown key '{key}'; the nearest known key is '{nearest}'"
    with pytest.raises(ConfigError, match=f"size.toml: {message}"):
        GLMConfig.from_toml(tmp_path / "size.toml")
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        GLMConfig.from_pretrained(write_json(tmp_path, {key: 8}))


def test_a_misspelt_key_inside_rope_parameters_is_refused():
    with pytest.raises(ConfigError, match="unknown key 'rope_teta'; the nearest known key is 'rope_theta'"):
        GLMConfig.from_dict({"rope_parameters": {"rope_type": "default", "rope_teta": 1e6}})


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("hidden_size", 128.0, "a whole number"),
        ("hidden_size", "128", "a whole number"),
        ("hidden_size", True, "a whole number"),
        ("hidden_size", None, "a whole number"),
        ("hidden_size", [128], "a whole number"),
        ("use_qk_norm", 1, "true or false"),
        ("use_qk_norm", "true", "true or false"),
        ("rope_theta", "1e6", "a finite number"),
        ("rope_theta", float("inf"), "a finite number"),
        ("rope_theta", float("nan"), "a finite number"),
        ("rms_norm_eps", False, "a finite number"),
        ("hidden_act", "gelu", "one of 'silu'"),
    ],
)
def test_a_value_of_another_type_is_refused_and_the_type_named(tmp_path, key, value, wanted):
    folder = write_json(tmp_path, {key: value})
    with pytest.raises(ConfigError) as error:
        GLMConfig.from_pretrained(folder)
    assert str(error.value) == f"{folder / 'config.json'}: {key} = {value!r}: wanted {wanted}"


def test_a_whole_number_is_a_number():
    theta = GLMConfig.from_dict({"rope_theta": 1_000_000}).rope_theta
    assert theta == 1e6 and isinstance(theta, float)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"head_dim": 6, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),  # 3 components make no pairs
        ({"n_routed_experts": 16, "n_group": 3}, "n_group"),
        ({"n_routed_experts": 4, "n_group": 4, "topk_group": 4}, "n_group"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"n_routed_experts": 16, "num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"n_routed_experts": 16, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"initializer_range": -0.02}, "initializer_range"),
    ],
)
def test_values_that_contradict_each_other_are_refused(changes, key):
    with pytest.raises(ConfigError, match=rf"^{key} = .*: wanted "):
        GLMConfig(**changes)
    with pytest.raises(ConfigError, match=rf"^here: {key} = .*: wanted "):
        GLMConfig.from_dict(changes, where="here")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama': wanted 'glm4_moe'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: wanted 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "only plain RoPE"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type = 'yarn'.*only plain RoPE"),
        ({"rope_parameters": [1e6]}, r"rope_parameters = \[1000000.0\]: wanted a table"),
    ],
)
def test_another_architecture_is_refused(tmp_path, mapping, message):
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        GLMConfig.from_pretrained(write_json(tmp_path, mapping))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "wanted a table of keys, found list"), ('{"hidden_size": 1', "not valid JSON")],
)
def test_a_broken_json_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        GLMConfig.from_pretrained(write_json(tmp_path, text))


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.json: no such file"):
        GLMConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="absent.toml: no such file"):
        GLMConfig.from_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"hidden_size = ", b"hidden_size = 1\nhidden_size = 2", b"\xff\xfe"])
def test_a_broken_toml_file_is_named(tmp_path, content):
    (tmp_path / "size.toml").write_bytes(content)
    with pytest.raises(ConfigError, match="size.toml: not valid TOML"):
        GLMConfig.from_toml(tmp_path / "size.toml")


@given(key=st.text(min_size=1), value=st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
@LAW
def test_no_unknown_key_is_ever_dropped_in_silence(key, value):
    known = {f.name for f in dataclasses.fields(GLMConfig)} | BESIDE_THE_ARCHITECTURE.keys()
    assume(key not in known)
    with pytest.raises(ConfigError):
        GLMConfig.from_dict({key: value})


# ---------------------------------------------------------------------------------------------- any dataclass from TOML


@dataclass(frozen=True)
class Schedule:
    kind: Literal["cosine", "wsd"]
    warmup: float = 0.1


@dataclass(frozen=True)
class Recipe:
    steps: int
    schedule: Schedule
    paths: tuple[Path, ...] = ()
    seed: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    model: GLMConfig | str = "nano"

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps = {self.steps}: wanted 1 or more")


def test_tables_become_nested_dataclasses(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'steps = 10\npaths = ["a", "b"]\nseed = 3\nschedule = {kind = "wsd", warmup = 1}\n'
        "weights = {web = 0.5}\n[model]\nhidden_size = 64\n"
    )
    recipe = read_toml(Recipe, tmp_path / "recipe.toml")
    assert recipe == Recipe(
        steps=10,
        schedule=Schedule("wsd", 1.0),
        paths=(Path("a"), Path("b")),
        seed=3,
        weights={"web": 0.5},
        model=GLMConfig(hidden_size=64),
    )
    assert isinstance(recipe.schedule.warmup, float)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"schedule": {"kind": "wsd"}}, "here: key 'steps' is missing; wanted a whole number"),
        ({"steps": 1}, "here: key 'schedule' is missing; wanted Schedule"),
        ({"steps": 1, "schedule": "wsd"}, "here: schedule: wanted a table for Schedule, found 'wsd'"),
        ({"steps": 1, "schedule": {"kind": "cos"}}, "here: schedule: kind = 'cos': wanted one of 'cosine', 'wsd'"),
        (
            {"steps": 1, "schedule": {"kinds": "wsd"}},
            "here: schedule: unknown key 'kinds'; the nearest known key is ",
        ),
        ({"steps": 1, "schedule": {"kind": "wsd"}, "seed": "3"}, "here: seed = '3': wanted a whole number"),
        ({"steps": 1, "schedule": {"kind": "wsd"}, "paths": [1]}, "here: paths[0] = 1: wanted Path"),
        ({"steps": 1, "schedule": {"kind": "wsd"}, "paths": "a"}, "here: paths = 'a': wanted "),
        ({"steps": 1, "schedule": {"kind": "wsd"}, "weights": {"web": "much"}}, "here: weights: web = 'much': wanted "),
        ({"steps": 0, "schedule": {"kind": "wsd"}}, "here: steps = 0: wanted 1 or more"),
        ([], "here: wanted a table for Recipe, found []"),
    ],
)
def test_errors_name_the_table_the_key_and_the_value(mapping, message):
    with pytest.raises(ConfigError) as error:
        build(Recipe, mapping, "here")
    assert str(error.value).startswith(message)
