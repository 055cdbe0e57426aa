"""Between operations and kernels: refuses what the kernels cannot do, finds the GPU's block sizes, starts kernels.

Every kernel starts through `launch`. While `recording` is on, launches are written down instead of run; that is how
`kernels.compile` learns, from the launchers themselves and meta tensors, which variants GLM-4.5 needs.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.tiles import TARGETS, TILES, Tile
from minglm.ops import GearError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31  # what a 32-bit number cannot count: elements of one expert's matrix, programs of a launch
MOST_ROWS = 2**30  # rows are counted in 32 bits, and the last block may reach beyond the last row


class Cost(NamedTuple):
    """The work of one launch: floating-point operations, and bytes that must move if each is read or written once."""

    flops: int
    bytes: int


class Launch(NamedTuple):
    """One launch of a kernel: what it is called, how many programs, block sizes, work, and the kernel's arguments by name."""

    kernel: triton.JITFunction
    name: str
    programs: int
    tile: Tile
    cost: Cost
    arguments: dict


_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list that this yields, with the block sizes of `target`, and nothing runs."""
    global _recording
    before, _recording = _recording, (target, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def launch(
    kernel: triton.JITFunction, name: str, programs: int, tile: Tile, cost: Cost, on: Tensor, **arguments: object
) -> None:
    """Start `programs` instances of `kernel` on the device of tensor `on`."""
    if programs >= LARGEST:
        raise ValueError(
            f"{name}: found work for {programs:,} blocks; wanted fewer than {LARGEST:,}; use fewer tokens at a time"
        )
    if _recording is not None:
        _recording[1].append(Launch(kernel, name, programs, tile, cost, arguments))
    elif programs:
        # Triton starts kernels on the current device, which need not be that of the tensors.
        with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)


def tile_for(name: str, x: Tensor) -> Tile:
    """Block sizes of the matrix kernel `name` for tensors like `x`."""
    return TILES[target_of(x.device)][x.element_size()][name]


def target_of(device: torch.device) -> str:
    """The row of the table of tiles for `device`. Raises `GearError` where the kernels do not run."""
    if _recording is not None:
        return _recording[0]
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if device.type != "cuda":  # AMD's GPUs, too, are called "cuda" by torch
        raise GearError(
            f"gear 'triton': found tensors on {device}; wanted a GPU of NVIDIA or AMD. Use gear 'torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow; for tests)"
        )
    return _target_of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _target_of_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
        found = name if name in TILES else None
    else:
        name = f"sm_{properties.major}{properties.minor}"
        found = nearest_target(properties.major, properties.minor)
    if found is None:
        raise GearError(f"gear 'triton': found a GPU {name}; wanted one of {', '.join(TARGETS)} or newer; use gear 'torch'")
    return found


def nearest_target(major: int, minor: int) -> str | None:
    """The newest known NVIDIA target of the same generation, or of an older one, that is no newer than this GPU."""
    known = {target.arch: name for name, target in TARGETS.items() if target.backend == "cuda"}
    older = [arch for arch in known if arch <= 10 * major + minor]
    return known[max(older)] if older else None


def refuse_what_cannot_run(operation: str, **tensors: Tensor) -> None:
    """Raise `TypeError` for dtypes that the kernels lack, `ValueError` for mixed devices, `GearError` where they do not run.

    Nothing has been allocated by then.
    """
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{operation}: found {name} in {_short(x.dtype)}; gear 'triton' takes "
                f"{', '.join(map(_short, DTYPES))}: convert it, or use gear 'torch'"
            )
    refuse_mixed_devices(operation, **tensors)
    target_of(next(iter(tensors.values())).device)


def refuse_mixed_devices(operation: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors are on one device."""
    if len({x.device for x in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{operation}: found {found}; wanted all on one device: move them with .to(device)")


def refuse_mixed_dtypes(operation: str, **tensors: Tensor) -> None:
    """Raise `TypeError` unless all tensors have one dtype."""
    if len({x.dtype for x in tensors.values()}) > 1:
        found = ", ".join(f"{name} in {_short(x.dtype)}" for name, x in tensors.items())
        raise TypeError(f"{operation}: found {found}; wanted one dtype: convert them, or run under torch.autocast")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows_of(x: Tensor) -> Tensor:
    """`x` (..., d) as (rows, d) with the numbers of a row side by side; copies only what no row stride can describe."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
