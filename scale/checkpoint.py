"""Checkpoints of a model that is spread over ranks: written and read by all of them at once, whatever the layout.

`distributed/` inside a run's `checkpoints/step-N/` is PyTorch's format (torch.distributed.checkpoint, DCP): every rank
writes its parts of the weights and of the optimiser's state as parts of whole tensors, so that any number of ranks in any
layout can read them. Beside the files lie their checksums. `python -m scale.export` makes a Hugging Face folder of it.
"""

import functools
import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from minglm.checkpoint import CheckpointError, write_parameters
from minglm.config import GLMConfig
from minglm.files import sha256_of
from minglm.model import GLM
from scale.muon import ShardedMuonAdamW
from scale.shard import Part

FOLDER = "distributed"
CHECKSUMS = "sha256.json"


def save(folder: Path, model: GLM, parts: list[Part], optimizer: ShardedMuonAdamW) -> None:
    """Write this rank's part into `folder`/distributed; all ranks must call it, and `folder` must be one that all see."""
    folder = folder / FOLDER
    dcp.save(_state(model, parts, optimizer), checkpoint_id=folder)
    ours = {path.name: sha256_of(path) for path in folder.glob(f"__{dist.get_rank()}_*")}
    everybody: list[dict[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, ours)
    if dist.get_rank() == 0:
        checksums = {name: digest for some in everybody for name, digest in some.items()}
        checksums[".metadata"] = sha256_of(folder / ".metadata")
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")


def load(folder: Path, model: GLM, parts: list[Part], optimizer: ShardedMuonAdamW) -> None:
    """Fill this rank's parts in place from what any layout saved. Call `check` first."""
    state = _state(model, parts, optimizer)
    dcp.load(state, checkpoint_id=folder / FOLDER)
    for module_name, buffer in _buffers(model).items():
        buffer.copy_(state["model"][module_name])
    for name, key, tensor, part in optimizer.state_parts():
        if part is None:
            tensor.copy_(state["optimizer"][f"{name}/{key}"])


def check(checkpoint: Path, config: GLMConfig, rank: int = 0, ranks: int = 1) -> None:
    """Raises `CheckpointError` that names the file if a part is missing, cut off or damaged, or of another model.

    Nothing is allocated for it. Each of `ranks` reads its share of the files; together they have looked at all.
    """
    folder = checkpoint / FOLDER
    metadata = _Reader(folder).read_metadata()
    again = f"copy {folder} again from where it came, or delete {checkpoint} to go on from the checkpoint before it"
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder / CHECKSUMS}: missing or damaged; {again}") from None
    needed = sorted({info.relative_path for info in metadata.storage_data.values()} | {".metadata"})
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of its {len(needed)} files are missing: {', '.join(missing)}; {again}")
    with torch.device("meta"):
        wanted = {f"model.{name}": tuple(tensor.shape) for name, tensor in GLM(config).state_dict().items()}
    found = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items() if name.startswith("model.")}
    if config.tie_word_embeddings:
        del wanted["model.lm_head.weight"]
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{folder}: not the tensors of this model: "
            + "; ".join(f"{name} is {found.get(name, 'missing')}, wanted {wanted.get(name, 'none')}" for name in names[:20])
        )
    for name in needed[rank::ranks]:
        if sha256_of(folder / name) != checksums.get(name):
            raise CheckpointError(f"{folder / name}: damaged, its sha256 is not the one in {CHECKSUMS}; {again}")


def export(checkpoint: Path, target: Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write the weights of a run's checkpoint as a Hugging Face folder, with one process and the memory of one stack.

    dtype None keeps fp32. The tokenizer comes along. Raises what `check` raises, before anything is written.
    """
    config = GLMConfig.from_pretrained(checkpoint)
    check(checkpoint, config)
    reader = _Reader(checkpoint / FOLDER)
    metadata = reader.read_metadata().state_dict_metadata

    def read(name: str) -> Tensor:
        entry = metadata[f"model.{name}"]
        state = {"model": {name: torch.empty(entry.size, dtype=entry.properties.dtype)}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted here
            dcp.load(state, storage_reader=reader, no_dist=True)
        return state["model"][name]

    write_parameters(config, read, target, dtype, max_shard_bytes, copy_from=checkpoint)


def _state(model: GLM, parts: list[Part], optimizer: ShardedMuonAdamW) -> dict[str, dict[str, Tensor]]:
    """What is kept, as parts of whole tensors in this process's own memory."""
    kept = {
        f"{name}/{key}": tensor if part is None else part.whole(tensor) for name, key, tensor, part in optimizer.state_parts()
    }
    return {"model": {part.name: part.whole(part.local) for part in parts} | _buffers(model), "optimizer": kept}


def _buffers(model: GLM) -> dict[str, Tensor]:
    """The routers' biases, which every rank has whole."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("e_score_correction_bias")}


class _Reader(dcp.FileSystemReader):
    """Reads the table of contents once: at full size it is large, and an export comes back for every parameter."""

    @functools.cache  # noqa: B019 (a reader lives as long as one export)
    def read_metadata(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            return super().read_metadata()
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: missing; wanted a checkpoint of `scale.train`, a step-N folder with {FOLDER}/ in it"
            ) from None
        except Exception as error:  # pickle raises anything on damaged bytes
            raise CheckpointError(f"{path}: damaged ({error!r}); copy it again from where it came") from error
