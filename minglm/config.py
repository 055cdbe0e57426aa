"""Configuration: Hugging Face's keys for the model, strict TOML for everything else.

`GLMConfig` is the architecture (table 1 of the GLM-4.5 report) in the keys of Hugging Face's `Glm4MoeConfig`, so that a
published `config.json` is read as it is. `build` turns any mapping into a frozen dataclass and refuses what it does not
know: a misspelt key must never be a silent default.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the file, the key, the value found and the value wanted."""


@dataclass(frozen=True)
class GLMConfig:
    """The architecture of a GLM-4.5 model. Defaults are the shape of the `nano` size with a 2,048-token vocabulary.

    Raises `ConfigError` when the values contradict each other.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1  # so many first layers are dense, all others mixture-of-experts
    intermediate_size: int = 384  # of the dense layers
    hidden_act: Literal["silu"] = "silu"

    # Attention. GLM-4.5 has 2.5 times the usual number of heads: heads * head_dim > hidden_size.
    num_attention_heads: int = 5
    num_key_value_heads: int = 1
    head_dim: int = 64
    attention_bias: bool = True  # on q, k and v; never on o
    use_qk_norm: bool = True
    partial_rotary_factor: float = 0.5  # RoPE turns this part of each head
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048

    # Mixture of experts.
    n_routed_experts: int = 32
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 32
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    num_nextn_predict_layers: int = 1  # multi-token-prediction layers: 0 or 1
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    # Keys of a published config.json that the architecture does not need; kept and written back.
    unused: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings n_routed_experts num_experts_per_tok moe_intermediate_size n_shared_experts n_group "
            "topk_group rope_theta rms_norm_eps"
        )
        for key in positive.split():
            self._require(getattr(self, key) > 0, key, "a value above 0")
        self._require(self.first_k_dense_replace >= 0, "first_k_dense_replace", "0 or more")
        self._require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        self._require(
            0 < self.partial_rotary_factor <= 1 and self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
            "partial_rotary_factor",
            f"a part of head_dim = {self.head_dim} that holds an even number of components, 2 at least",
        )
        self._require(
            self.n_routed_experts % self.n_group == 0, "n_group", f"a divisor of n_routed_experts = {self.n_routed_experts}"
        )
        # A group is judged by its two best experts (facts, section 2.4), so it must have two.
        group_size = self.n_routed_experts // self.n_group
        self._require(self.n_group == 1 or group_size >= 2, "n_group", "at least two experts in each group")
        self._require(self.topk_group <= self.n_group, "topk_group", f"at most n_group = {self.n_group}")
        self._require(
            self.num_experts_per_tok <= group_size * self.topk_group,
            "num_experts_per_tok",
            f"at most the {group_size * self.topk_group} experts of the chosen groups",
        )
        self._require(self.initializer_range >= 0, "initializer_range", "0 or more")
        self._require(self.num_nextn_predict_layers in (0, 1), "num_nextn_predict_layers", "0 or 1, as in GLM-4.5")

    def _require(self, holds: bool, key: str, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"{key} = {getattr(self, key)!r}: wanted {wanted}")

    @property
    def rotary_dim(self) -> int:
        """How many components of each head RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main stack; the MTP layer is not counted."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GLMConfig":
        """Read `config.json` of a Hugging Face folder (or the file itself). Both spellings of the RoPE keys are read."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a model folder holds a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        if isinstance(mapping, Mapping):
            mapping = {**_HF_DEFAULTS, **mapping}
        return cls.from_dict(mapping, where=str(path), head_dim_optional=True)

    @classmethod
    def from_toml(cls, path: str | Path) -> "GLMConfig":
        """Read a model size such as `configs/model/nano.toml`."""
        return cls.from_dict(read_toml_mapping(path), where=str(path))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "model", head_dim_optional: bool = False) -> "GLMConfig":
        """From a flat mapping of Hugging Face's keys. Raises `ConfigError` for unknown keys and wrong types."""
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{where}: wanted a table of keys, found {type(mapping).__name__}")
        keys = {_HF_SYNONYMS.get(key, key): value for key, value in mapping.items()}
        model_type = keys.get("model_type", "glm4_moe")
        if model_type != "glm4_moe":
            raise ConfigError(f"{where}: model_type = {model_type!r}: wanted 'glm4_moe', the architecture of GLM-4.5")
        if keys.get("attention_dropout"):
            raise ConfigError(f"{where}: attention_dropout = {keys['attention_dropout']!r}: wanted 0, GLM-4.5 has no dropout")

        rope = keys.pop("rope_parameters", None) or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{where}: rope_parameters = {rope!r}: wanted a table")
        rope_type = rope.get("rope_type", "default")
        if rope_type != "default" or keys.get("rope_scaling"):
            raise ConfigError(
                f"{where}: rope_type = {rope_type!r}, rope_scaling = {keys.get('rope_scaling')!r}: only plain RoPE"
            )
        keys.update({key: value for key, value in rope.items() if key != "rope_type"})
        width, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
        if head_dim_optional and not keys.get("head_dim") and type(width) is type(heads) is int and heads > 0:
            keys["head_dim"] = width // heads

        unused = {key: keys.pop(key) for key in sorted(_HF_UNUSED & keys.keys())}
        return build(cls, {**keys, "unused": unused}, where)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, with the newer, nested spelling of the RoPE keys."""
        mapping = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "unused"}
        mapping["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": mapping.pop("rope_theta"),
            "partial_rotary_factor": mapping.pop("partial_rotary_factor"),
        }
        defaults = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}
        return {**defaults, **self.unused, **mapping}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` into an existing folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")


_HF_SYNONYMS = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
# What a config.json means by leaving a key out; ours are nano's.
_HF_DEFAULTS = {
    "attention_bias": False,
    "use_qk_norm": False,
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
}
# What published and transformers-written files carry beside the architecture.
_HF_UNUSED = frozenset(
    "_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "is_encoder_decoder label2id model_type output_attentions output_hidden_states output_router_logits pad_token_id "
    "problem_type quantization_config return_dict rope_scaling torch_dtype transformers_version use_cache".split()
)


def read_toml_mapping(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; `ConfigError` names the file when it is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def read_toml(cls: type[T], path: str | Path) -> T:
    """Read a TOML file into the (nested) frozen dataclass `cls`; strict as `build`."""
    return build(cls, read_toml_mapping(path), where=str(path))


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Make the dataclass `cls` from a mapping, nested tables included.

    `where` names the source in errors (a file, then the table's path). Raises `ConfigError` for an unknown key (naming the
    nearest known one), a missing key without default, and a value of another type than the field's annotation.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: wanted a table for {cls.__name__}, found {mapping!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in mapping.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest known key is {near[0]!r}")
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    for name, f in known.items():
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise ConfigError(f"{where}: key {name!r} is missing; wanted {_type_name(hints[name])}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(wanted: Any, value: Any, where: str) -> Any:
    """Check `value` against a type annotation; tables become dataclasses, lists become tuples, integers may be floats."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if dataclasses.is_dataclass(wanted):
        return value if isinstance(value, wanted) else build(wanted, value, where)
    if origin in (typing.Union, types.UnionType):
        errors = []
        for option in arguments:
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if (origin or wanted) in (dict, Mapping) and isinstance(value, Mapping):
        item_type = arguments[1] if arguments else Any
        return {key: _convert(item_type, item, f"{where}: {key}") for key, item in value.items()}
    if wanted is type(None) and value is None:
        return None
    if wanted is Path and isinstance(value, str | Path):
        return Path(value)
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(wanted, type) and wanted is not float and type(value) is wanted:
        return value
    raise ConfigError(f"{where} = {value!r}: wanted {_type_name(wanted)}")


def _type_name(wanted: Any) -> str:
    """A type annotation as a person would say it."""
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(wanted))
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string", type(None): "nothing"}
    return names.get(wanted, getattr(wanted, "__name__", str(wanted)))
