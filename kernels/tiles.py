"""What each GPU offers, and the block sizes that the kernels use on it. The launchers and `kernels.compile` read this table.

A matrix kernel makes a tile of `m` rows by `n` columns of its result in registers, from slices `k` deep of both factors that
wait in shared memory, `stages` of them in flight. The table is chosen so that no kernel spills registers or exceeds the
shared memory of its target: `python -m kernels.compile` checks each entry and the tests run it.
"""

from typing import NamedTuple


class Target(NamedTuple):
    """A GPU architecture as Triton's compiler names it. `shared_limit`: bytes of shared memory that one block may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


class Tile(NamedTuple):
    """Rows and columns of the result, depth of a slice of the sum, warps, slices in flight. Norms use m rows and no n, k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Shared memory a block: CUDA programming guide, table of technical specifications; gfx942: 64 KiB of LDS a workgroup.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_86": Target("cuda", 86, 32, 99 * 1024),
    "sm_89": Target("cuda", 89, 32, 99 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "sm_120": Target("cuda", 120, 32, 99 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}

# The matrix kernels, by bytes of an element. `gate_up` holds two accumulators, so its tile is half as wide.
# Exact fp32 products run on the ordinary cores, whose operands come through registers: small tiles.
_FP32 = {
    "gate_up": Tile(64, 32, 16, 8, 3),
    "down": Tile(64, 64, 16, 8, 2),
    "dact": Tile(64, 32, 16, 8, 3),
    "drows": Tile(64, 64, 16, 8, 2),
    "dmatrix": Tile(64, 64, 16, 8, 3),
}
_AMPERE = {
    "gate_up": Tile(128, 64, 32, 8, 4),
    "down": Tile(128, 128, 64, 8, 3),
    "dact": Tile(128, 64, 32, 8, 3),  # its many results leave no registers for a wider tile
    "drows": Tile(128, 128, 64, 8, 3),
    "dmatrix": Tile(128, 128, 32, 8, 3),
}
_HOPPER = {
    "gate_up": Tile(128, 128, 64, 8, 3),
    "down": Tile(128, 256, 64, 8, 3),
    "dact": Tile(128, 64, 64, 8, 3),
    "drows": Tile(128, 256, 64, 8, 3),
    "dmatrix": Tile(128, 256, 64, 8, 3),
}
_BLACKWELL = _HOPPER | {"gate_up": Tile(256, 64, 64, 8, 3)}
_CDNA3 = {
    "gate_up": Tile(128, 128, 32, 8, 2),
    "down": Tile(128, 128, 64, 8, 2),
    "dact": Tile(128, 64, 64, 8, 2),
    "drows": Tile(128, 128, 64, 8, 2),
    "dmatrix": Tile(128, 128, 64, 8, 2),
}
# Triton's interpreter runs each block as Python: tiles small enough that small tests have several in each direction.
_INTERPRETER = {
    "gate_up": Tile(16, 32, 32, 4, 1),
    "down": Tile(16, 64, 32, 4, 1),
    "dact": Tile(16, 32, 32, 4, 1),
    "drows": Tile(16, 64, 32, 4, 1),
    "dmatrix": Tile(32, 64, 16, 4, 1),
}

TILES: dict[str, dict[int, dict[str, Tile]]] = {
    "sm_80": {2: _AMPERE, 4: _FP32},
    "sm_86": {2: _AMPERE, 4: _FP32},
    "sm_89": {2: _AMPERE, 4: _FP32},
    "sm_90": {2: _HOPPER, 4: _FP32},
    "sm_100": {2: _BLACKWELL, 4: _FP32},
    "sm_120": {2: _AMPERE, 4: _FP32},
    "gfx942": {2: _CDNA3, 4: {name: tile._replace(stages=2) for name, tile in _FP32.items()}},
    "interpreter": {2: _INTERPRETER, 4: _INTERPRETER},
}


def norm_tile(d: int) -> Tile:
    """For norms over `d` numbers: as many rows as make 4,096 numbers a block, at most 32 of them for each thread."""
    padded = 1 << (d - 1).bit_length()
    rows = max(1, min(32, 4096 // padded))
    return Tile(rows, padded, 0, min(16, max(4, rows * padded // 1024)), 1)
