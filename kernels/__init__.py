"""The Triton gear: our own kernels, registered with `minglm.ops` under "triton" when this package is imported.

Each file holds one operation: its kernels, their launchers, the autograd function around them, and a docstring on what is
computed and what moves through memory. `tiles.py` has the block sizes of each GPU, `launch.py` refuses what the kernels
cannot do and starts what they can, and `python -m kernels.compile` compiles all of them without a GPU.

Importing it where Triton does not exist (macOS, Windows) registers nothing; `ops.using("triton")` then says what to do.
"""

from importlib.util import find_spec

if find_spec("triton") is not None:
    from kernels import rms_norm, routed_experts  # noqa: F401
