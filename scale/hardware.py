"""The accelerators that `scale.plan` knows, as numbers.

Source: the vendors' data sheets of the module in its usual 8-way server (NVIDIA DGX/HGX A100, H100, H200, B200; AMD Instinct
MI300X platform). Peaks are dense bf16 without sparsity, bandwidths are of one GPU and one direction, the network is one
card for each GPU (200 Gb/s beside an A100, 400 Gb/s beside the others). Memory is what a process can really allocate, a
little less than the name says. Any number can be overridden on the command line: clusters differ most in their network.
"""

import dataclasses
import difflib
from dataclasses import dataclass

from minglm.config import ConfigError


@dataclass(frozen=True)
class GPU:
    """One accelerator and its surroundings. Bandwidths in 10^9 bytes a second."""

    name: str
    memory_gib: float
    """That a process can allocate."""
    tflops: float
    """Peak of dense bf16 matrix products, 10^12 FLOPs a second."""
    memory_gb_per_s: float
    """To its own memory."""
    intra_node_gb_per_s: float
    """To the other GPUs of its node, one direction."""
    inter_node_gb_per_s: float
    """Its share of the node's network, one direction."""
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise ConfigError(f"{field.name} = {value!r}: wanted a number above 0")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40", 39, 312, 1555, 300, 25),
        GPU("a100-80", 79, 312, 2039, 300, 25),
        GPU("h100", 79, 989, 3350, 450, 50),
        GPU("h200", 139, 989, 4800, 450, 50),
        GPU("b200", 178, 2250, 7700, 900, 50),
        GPU("mi300x", 191, 1307, 5300, 448, 50),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name. Raises `ConfigError` that lists the names there are."""
    if name not in GPUS:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        guess = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"--gpu {name}: wanted one of {', '.join(GPUS)}{guess}")
    return GPUS[name]
