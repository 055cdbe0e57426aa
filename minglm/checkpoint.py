"""Checkpoints: Hugging Face folders in and out, in the layout of the published GLM-4.5 (facts, section 3).

A folder holds config.json, generation_config.json, model-0000k-of-0000n.safetensors and model.safetensors.index.json.
Files and memory differ in three ways, all of them in `tensor_map`: files keep one tensor an expert, where the model
keeps stacks; the MTP layer is layer `num_hidden_layers`; and with tied embeddings there is no `lm_head.weight`.

Folders are written whole or not at all (`minglm.files`). Our index carries each file's sha256, so that a damaged file is
refused; folders from elsewhere have no checksums, and there only damage to a file's header or length is noticed.
"""

import dataclasses
import functools
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minglm.config import GLMConfig
from minglm.files import old_folder, sha256_of, write_folder_atomically
from minglm.model import GLM

INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written. The message names the file or folder and what to do."""


# ----------------------------------------------------------------------------------------- names in files and in memory


class Piece(NamedTuple):
    """Where a file's tensor lives in memory: all of a parameter, or the part of a stack that is one expert's."""

    parameter: str
    part: tuple = ()

    def view(self, state: Mapping[str, Tensor]) -> Tensor:
        """The piece itself inside a model's state dict: read it to save, copy into it to load."""
        return state[self.parameter][self.part]


def tensor_map(model: GLM) -> dict[str, Piece]:
    """Every tensor of a checkpoint's files by name, in order, and where it lives in `model` (any device, meta too)."""
    state = model.state_dict()
    mtp = _mtp_prefix(model.config)
    pieces = {}
    for parameter, tensor in state.items():
        name = re.sub(r"^mtp\.(layer\.)?", mtp, parameter)
        experts, _, stack = name.rpartition(".experts.")
        if stack == "gate_up_proj":  # (E, 2I, H), gate first
            width = tensor.shape[1] // 2
            for e in range(tensor.shape[0]):
                pieces[f"{experts}.experts.{e}.gate_proj.weight"] = Piece(parameter, (e, slice(0, width)))
                pieces[f"{experts}.experts.{e}.up_proj.weight"] = Piece(parameter, (e, slice(width, 2 * width)))
        elif stack == "down_proj":  # (E, H, I)
            for e in range(tensor.shape[0]):
                pieces[f"{experts}.experts.{e}.down_proj.weight"] = Piece(parameter, (e,))
        elif not (model.config.tie_word_embeddings and parameter == "lm_head.weight"):
            pieces[name] = Piece(parameter)
    parameters_in_files = sum(piece.view(state).numel() for piece in pieces.values())
    parameters_in_memory = sum(tensor.numel() for tensor in state.values())
    if model.config.tie_word_embeddings:
        parameters_in_memory -= state["lm_head.weight"].numel()
    assert parameters_in_files == parameters_in_memory, "the tensor map does not cover the model"
    return pieces


def _mtp_prefix(config: GLMConfig) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def _mtp_copies(config: GLMConfig) -> dict[str, str]:
    """The MTP layer's own copies of embedding and head, as the published files have them: name -> name of the original.

    We write them, so that whoever reads the MTP layer by itself finds what the published files have. On reading, the
    model uses the originals, as Hugging Face does.
    """
    if not config.num_nextn_predict_layers:
        return {}
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    mtp = _mtp_prefix(config)
    return {f"{mtp}embed_tokens.weight": "model.embed_tokens.weight", f"{mtp}shared_head.head.weight": head}


def _readable_copies(config: GLMConfig) -> dict[str, str]:
    """All copies that a folder may hold: a tied head, too, which some writers store beside the embedding."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    return _mtp_copies(config) | tied


# -------------------------------------------------------------------------------------------------------------- writing


def save_model(model: GLM, folder: str | Path, max_shard_bytes: int = 5 * 2**30, dtype: torch.dtype | None = None) -> None:
    """Write `model` as a Hugging Face folder, atomically, holding at most `max_shard_bytes` beside the model.

    dtype: cast on the way (None: as in memory); routing biases stay fp32 always. An existing folder keeps all that is
    neither weights nor config.json, such as tokenizer files. Raises `WriteError` when the disk is too small.
    May be called inside `write_folder_atomically`, to save a model together with other things.
    """
    state = model.state_dict()
    pieces = tensor_map(model)
    pieces |= {copy: pieces[original] for copy, original in _mtp_copies(model.config).items()}
    views = {name: piece.view(state) for name, piece in pieces.items()}
    dtypes = {name: _dtype_in_memory(name, dtype, view.dtype) for name, view in views.items()}
    weights = _Weights({name: views[name].shape for name in views}, dtypes, views.__getitem__)
    with write_folder_atomically(folder, weights.nbytes) as new:
        _write_weights(weights, model.config, new, max_shard_bytes)
        _copy_other_files(Path(folder), new, with_folders=True)
        _write_generation_config(model.config, new)


def convert(source: str | Path, target: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 2**30) -> None:
    """Read any folder that `load_model` reads and write it as `save_model` does, never holding more than a shard.

    FP8 weights come out in `dtype` (None: the dtype that config.json names, or else bf16). Files beside the weights,
    such as the tokenizer's, come along; subfolders (a trainer's state) do not. Raises what the two functions raise.
    """
    model, stored = _open_folder(source)
    originals = {name: name for name in tensor_map(model)} | _mtp_copies(model.config)
    weights = _Weights(
        {name: stored.headers[original].shape for name, original in originals.items()},
        {name: stored.dtype(original, dtype) for name, original in originals.items()},
        lambda name: stored.read(originals[name]),
    )
    with write_folder_atomically(target, weights.nbytes) as new:
        _write_weights(weights, model.config, new, max_shard_bytes)
        _copy_other_files(Path(target), new, with_folders=True)
        _copy_other_files(Path(source), new, with_folders=False)
        _write_generation_config(model.config, new)


def write_parameters(
    config: GLMConfig,
    read: Callable[[str], Tensor],
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    copy_from: str | Path | None = None,
) -> None:
    """Write a folder as `save_model` does, of a model that is never in memory as a whole.

    `read(name)` gives one entry of its state dict, fp32; a stack of experts is asked for once and held until its last expert
    is written. dtype None: fp32. Files beside the weights in the folder `copy_from`, such as a tokenizer's, come along.
    """
    with torch.device("meta"):
        model = GLM(config)
    state, pieces = model.state_dict(), tensor_map(model)
    pieces |= {copy: pieces[original] for copy, original in _mtp_copies(config).items()}

    @functools.lru_cache(maxsize=1)
    def held(parameter: str) -> dict[str, Tensor]:
        return {parameter: read(parameter)}

    weights = _Weights(
        {name: piece.view(state).shape for name, piece in pieces.items()},
        {name: _dtype_in_memory(name, dtype, torch.float32) for name in pieces},
        lambda name: pieces[name].view(held(pieces[name].parameter)),
    )
    with write_folder_atomically(folder, weights.nbytes) as new:
        _write_weights(weights, config, new, max_shard_bytes)
        if copy_from is not None:
            _copy_other_files(Path(copy_from), new, with_folders=False)
        _write_generation_config(config, new)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """What is to be written: shape and dtype of each tensor by name, in order, and how to get it (in any dtype)."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    get: Callable[[str], Tensor]

    def nbytes_of(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_of(name) for name in self.shapes)


def _dtype_in_memory(name: str, wanted: torch.dtype | None, present: torch.dtype) -> torch.dtype:
    """The dtype asked for, or the present one; routing biases are fp32 always: their steps of 0.001 vanish in bf16."""
    return torch.float32 if name.endswith("e_score_correction_bias") else wanted or present


def _write_weights(weights: _Weights, config: GLMConfig, folder: Path, max_shard_bytes: int) -> None:
    """config.json, the shards, and the index with the checksum of each."""
    unused = {key: value for key, value in config.unused.items() if key != "torch_dtype"}  # the old name of "dtype"
    unused["dtype"] = str(weights.dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    dataclasses.replace(config, unused=unused).save_pretrained(folder)

    shards = list(_cut_into_shards(weights, max_shard_bytes))
    copies = _mtp_copies(config)
    weight_map, checksums = {}, {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights.get(name).to("cpu", weights.dtypes[name]).contiguous() for name in names}
        # The library refuses two names for one piece of memory.
        tensors |= {name: tensors[name].clone() for name in names if name in copies}
        save_file(tensors, path, metadata={"format": "pt"})
        del tensors  # before the next shard is made
        shutil.copymode(folder / "config.json", path)  # the library makes files that only their owner can read
        weight_map.update(dict.fromkeys(names, path.name))
        checksums[path.name] = sha256_of(path)
    index = {"metadata": {"total_size": weights.nbytes, "sha256": checksums}, "weight_map": weight_map}
    _write_json(index, folder / INDEX)


def _cut_into_shards(weights: _Weights, max_shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut before a shard would grow over the limit; a tensor over the limit gets its own shard."""
    shard, size = [], 0
    for name in weights.shapes:
        if shard and size + weights.nbytes_of(name) > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += weights.nbytes_of(name)
    yield shard


def _write_generation_config(config: GLMConfig, folder: Path) -> None:
    """The special ids that config.json names, unless the folder came with a generation_config.json of its own."""
    path = folder / "generation_config.json"
    if not path.exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {key: config.unused[key] for key in keys if config.unused.get(key) is not None}
        _write_json({"_from_model_config": True, **ids}, path)


def _copy_other_files(source: Path, target: Path, with_folders: bool) -> None:
    """All but config.json and weights, which the target has already; nothing if there is no source folder."""
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if path.name == "config.json" or re.fullmatch(r"model.*\.safetensors(\.index\.json)?", path.name):
            continue
        if path.is_file():
            shutil.copy2(path, target)
        elif path.is_dir() and with_folders:
            shutil.copytree(path, target / path.name, symlinks=True)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- reading


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    make: Callable[[GLMConfig], GLM] = GLM,
) -> GLM:
    """Read a Hugging Face folder, tensor by tensor: the memory of one model and one mapped shard is enough.

    dtype None: as in the file, and FP8 weights (e4m3 with `weight_scale_inv` per block of 128 x 128, or `weight_scale`
    per row or block) become the dtype that config.json names, or else bf16. Routing biases are fp32 always.
    make: another class with the same way of saving, whose folder this is. A folder without the MTP layer gives a warning and a
    model with `mtp` None. Raises `CheckpointError` that names the
    file for damage, and one that lists all tensors which are missing, unexpected or misshapen; `ConfigError` for a
    config.json that cannot be used.
    """
    model, stored = _open_folder(folder, make)
    pieces = tensor_map(model)
    dtypes: dict[str, torch.dtype] = {}  # of a stack: the widest that any of its experts has
    for name, piece in pieces.items():
        found = stored.dtype(name, dtype)
        dtypes[piece.parameter] = torch.promote_types(found, dtypes.get(piece.parameter, found))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    empty = {name: torch.empty(shapes[name], dtype=dtypes[name], device=device) for name in dtypes}
    if model.config.tie_word_embeddings:
        empty["lm_head.weight"] = empty["model.embed_tokens.weight"]
    model.load_state_dict(empty, assign=True)
    model.tie_weights()
    model.expert_load = torch.zeros_like(model.expert_load, device=device)

    state = model.state_dict()
    for name in stored.in_file_order(pieces):
        pieces[name].view(state).copy_(stored.read(name))
    return model


# How safetensors calls the dtypes that a weight may have.
_FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_FP8_BLOCK = 128  # rows and columns that share a scale


class _Header(NamedTuple):
    """What a safetensors file says of a tensor before any data is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class _StoredWeights:
    """The tensors in a folder's safetensors files, by name. FP8 tensors are dequantised as they are read.

    One file is open (mapped) at a time; each is held against its checksum, where the index has one, when first opened.
    """

    def __init__(self, folder: Path, fp8_becomes: torch.dtype):
        self.folder = folder
        self.fp8_becomes = fp8_becomes
        self.files, self.checksums = _find_weight_files(folder)
        self.headers: dict[str, _Header] = {}
        for file in self.files:
            for name, header in _read_headers(file).items():
                if name in self.headers:
                    raise CheckpointError(
                        f"{folder}: {name} is both in {self.headers[name].file.name} and in {file.name}: "
                        "files of two checkpoints are mixed; copy the folder again from where it came"
                    )
                self.headers[name] = header
        # weight -> its scale, for FP8
        self.scales = {
            name: name + suffix
            for name, header in self.headers.items()
            for suffix in ("_scale_inv", "_scale")
            if header.dtype == "F8_E4M3" and name + suffix in self.headers
        }
        self._open_file: Path | None = None
        self._handle: Any = None
        self._verified: set[Path] = set()

    def dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype that tensor `name` gets in memory when the caller wants `wanted` (None: as in the file)."""
        present = self.fp8_becomes if name in self.scales else _FLOATING[self.headers[name].dtype]
        return _dtype_in_memory(name, wanted, present)

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        position = {file: number for number, file in enumerate(self.files)}
        return sorted(names, key=lambda name: position[self.headers[name].file])

    def read(self, name: str) -> Tensor:
        """Tensor `name` on the CPU, in the file's dtype; FP8 as fp32. May be a view of the file: copy it."""
        tensor = self._read_raw(name)
        if name in self.scales:
            return _dequantise(tensor, self._read_raw(self.scales[name]))
        return tensor

    def _read_raw(self, name: str) -> Tensor:
        file = self.headers[name].file
        if file != self._open_file:
            self.verify(file)
            self._handle, self._open_file = safe_open(file, framework="pt"), file
        return self._handle.get_tensor(name)

    def verify(self, file: Path) -> None:
        """Hold a file against its checksum in the index. Raises `CheckpointError`."""
        if file in self._verified or file.name not in self.checksums:
            return
        if sha256_of(file) != self.checksums[file.name]:
            raise CheckpointError(
                f"{file}: damaged, its sha256 is not the one in {INDEX}; copy the file again from where it came, or "
                "use an older checkpoint"
            )
        self._verified.add(file)

    def check(self, wanted: Mapping[str, tuple[int, ...]], copies: Mapping[str, str]) -> None:
        """Hold names, shapes and dtypes against what the model wants; one `CheckpointError` lists all that is wrong."""
        wanted = {**wanted, **{copy: wanted[original] for copy, original in copies.items() if copy in self.headers}}
        known = wanted.keys() | set(self.scales.values())
        problems = [f"unexpected: {name} {header.shape}" for name, header in self.headers.items() if name not in known]
        for name, shape in wanted.items():
            if name not in self.headers:
                problems.append(f"missing: {name} {shape}")
                continue
            _, found, dtype = self.headers[name]
            scale = self.headers.get(self.scales.get(name, f"{name}_scale_inv"))
            if found != shape:
                problems.append(f"misshapen: {name} {found}, wanted {shape}")
            elif dtype not in _FLOATING:
                problems.append(f"of dtype {dtype}: {name}, wanted one of {', '.join(_FLOATING)}")
            elif dtype == "F8_E4M3" and scale is None:
                problems.append(f"missing: {name}_scale_inv, the scale of an FP8 weight")
            elif dtype == "F8_E4M3" and not _fits(scale.shape, shape):
                blocks = tuple(math.ceil(size / _FP8_BLOCK) for size in shape)
                problems.append(f"misshapen: {self.scales[name]} {scale.shape}, wanted {blocks}")
        if not problems:
            return
        for file in self.files:  # a damaged header can look like a missing tensor
            self.verify(file)
        shown = sorted(problems)[:40] + [f"... and {len(problems) - 40} more"][: len(problems) > 40]
        raise CheckpointError(
            f"{self.folder}: the tensors are not those that its config.json calls for; do the two belong together?\n  "
            + "\n  ".join(shown)
        )


def _open_folder(folder: str | Path, make: Callable[[GLMConfig], GLM] = GLM) -> tuple[GLM, _StoredWeights]:
    """The model of a folder, on the meta device, and the folder's weights, which have been checked to fit it."""
    folder = Path(folder)
    if not folder.is_dir() and old_folder(folder).is_dir():
        folder = old_folder(folder)  # a writer was killed between its two renames; this is what was there before
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; wanted a folder with config.json and safetensors files")
    config = GLMConfig.from_pretrained(folder)
    unused = dict(config.unused)
    unused.pop("quantization_config", None)  # what we read is not quantised any more
    config = dataclasses.replace(config, unused=unused)
    named = getattr(torch, str(unused.get("dtype") or unused.get("torch_dtype")), None)
    stored = _StoredWeights(folder, named if named in _FLOATING.values() else torch.bfloat16)

    if config.num_nextn_predict_layers and not any(name.startswith(_mtp_prefix(config)) for name in stored.headers):
        warnings.warn(f"{folder}: no MTP layer in the files, so the model has none", stacklevel=3)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = make(config)
    state = model.state_dict()
    copies = _readable_copies(config)
    stored.check({name: tuple(piece.view(state).shape) for name, piece in tensor_map(model).items()}, copies)
    for copy, original in copies.items():
        if copy in stored.headers and not torch.equal(stored.read(copy).float(), stored.read(original).float()):
            warnings.warn(f"{folder}: {copy} differs from {original}; the model shares the latter", stacklevel=3)
    return model, stored


def _find_weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder in order, and the checksums that the index has for them (by file name)."""
    single = folder / "model.safetensors"
    if single.exists():  # Hugging Face looks for it first, too
        return [single], {}
    index = folder / INDEX
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        checksums = (content.get("metadata") or {}).get("sha256") or {}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: neither {INDEX} nor model.safetensors is there; wanted one of them") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: damaged, it has no readable weight_map ({error!r}); copy the file again from where it came"
        ) from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX} names files that are missing: {', '.join(missing)}; copy them from where the rest came"
        )
    return [folder / name for name in names], checksums


def _read_headers(file: Path) -> dict[str, _Header]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}
            return {name: _Header(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); copy it again from where it came, or use an older checkpoint"
        ) from None


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether an FP8 weight's scale has, along rows and columns, one value for all, one each, or one a block of 128."""
    return len(scale) == len(weight) == 2 and all(
        s in (1, w, math.ceil(w / _FP8_BLOCK)) for s, w in zip(scale, weight, strict=True)
    )


def _dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """weight (rows, columns) e4m3 times its scale, which `_fits` it -> fp32. Blocks at the edges may be smaller."""
    scale = scale.float()
    for dim, size in enumerate(weight.shape):
        if scale.shape[dim] not in (1, size):
            scale = scale.repeat_interleave(_FP8_BLOCK, dim).narrow(dim, 0, size)
    return weight.float() * scale
