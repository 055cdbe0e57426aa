"""One version of a policy's weights on its way from trainer to workers: a safetensors file with a checksum of every tensor.

The trainer takes the checksums of the tensors that it trains, the worker of those that it is about to sample with, and they
must be equal: nothing on the way can go unseen, be it a cast, a router bias in bf16 (radixark/miles#811) or an MTP layer left
behind (vllm-project/vllm#48296).
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from minglm.engine.engine import Engine
from minglm.model import GLM


class WeightsError(RuntimeError):
    """Weights that are not what the trainer has. The message names the tensors."""


def checksums(model: GLM) -> dict[str, str]:
    """SHA-256 of each tensor of `state_dict()`, router biases and the MTP layer included: of its dtype, shape and bytes."""
    return {name: _checksum(tensor) for name, tensor in model.state_dict().items()}


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_weights(model: GLM, version: int, path: Path) -> None:
    """Write the weights as `version`; the file has its name only when it is complete."""
    aside = path.with_name(f".{path.name}.writing")
    metadata = {"version": str(version), "checksums": json.dumps(checksums(model))}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, aside, metadata)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_metadata(data: bytes) -> tuple[int, dict[str, str]]:
    """Of a file that `write_weights` wrote, or its first bytes up to the tensors -> version and checksums.

    Raises WeightsError for anything else.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        return int(metadata["version"]), json.loads(metadata["checksums"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"weights of {len(data)} bytes: found no version and checksums in their header") from None


def read_metadata_of(path: Path) -> tuple[int, dict[str, str]]:
    with path.open("rb") as file:
        start = file.read(8)
        return read_metadata(start + file.read(int.from_bytes(start, "little")))


def take_weights(engine: Engine, data: bytes) -> int:
    """Let `engine` sample with these weights -> their version. What is under way goes on with them, its cache computed anew.

    Raises WeightsError if what the engine then holds differs from what the trainer has in any tensor.
    """
    version, wanted = read_metadata(data)
    try:
        engine.update_weights(load(data))
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"version {version}: {error}") from error
    compare(f"version {version}", wanted, checksums(engine.model))
    engine.weights_version = version
    return version


def compare(what: str, wanted: dict[str, str], found: dict[str, str]) -> None:
    """Raises WeightsError that names the tensors whose checksums differ."""
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise WeightsError(f"{what}: {len(wrong)} of {len(wanted)} tensors differ from the trainer's: {', '.join(wrong[:5])}")
