"""The trainer's own part of a checkpoint: `trainer/state.pt`, and a checksum, for torch.load does not notice flipped bits.

It holds what resuming to the bit needs beside the weights: steps and tokens done, the optimiser's state, the position in
the data, the states of random generators.
"""

from pathlib import Path
from typing import Any

import torch

from minglm.checkpoint import CheckpointError
from minglm.files import sha256_of

STATE = Path("trainer", "state.pt")
CHECKSUM = Path("trainer", "state.sha256")


def write_state(state: dict[str, Any], checkpoint: Path) -> None:
    """Write `state` (tensors, numbers, strings, nested) into a checkpoint that is being written."""
    path = checkpoint / STATE
    path.parent.mkdir()
    with path.open("wb") as file:
        torch.save(state, file)
    (checkpoint / CHECKSUM).write_text(sha256_of(path) + "\n")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU. Raises `CheckpointError` if the file is damaged."""
    path, checksum = checkpoint / STATE, checkpoint / CHECKSUM
    if not checksum.is_file() or checksum.read_text().strip() != sha256_of(path):
        raise CheckpointError(
            f"{path}: damaged, its sha256 is not the one in {checksum.name}. Delete {checkpoint}, and the same command "
            "goes on from the checkpoint before it"
        )
    return torch.load(path, weights_only=True, map_location="cpu")
