"""`minglm/inference.c`, built with this machine's C compiler when it is first wanted, and called through ctypes.

It takes about a second, once: the library is kept in the user's cache folder under a name made of the source, the compiler
and the machine. Without a compiler `library()` is None, and the torch forms do the same work more slowly.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("inference.c")
# Sums may be reordered (that is what vectors need); infinities and NaN keep their meaning.
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC")

# Of each function: p a pointer (`Tensor.data_ptr()` of a contiguous tensor), i an int64, f a float.
ARGUMENTS = {
    "rms_norm": "ppp ii f",
    "rotary": "pppp iiii",
    "paged_attention": "pppp i pppp iiiiii",
    "linear": "ppppp iii",
    "swiglu": "ppppppp iiii",
    "routed_experts": "ppppppppp iiiii",
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built library; None where there is no C compiler, or it fails (with a warning). MINGLM_NATIVE=0 turns it off."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("MINGLM_NATIVE") == "0" or compiler is None:
        return None
    identity = [SOURCE.read_bytes().decode(), compiler, *FLAGS, platform.node(), platform.machine()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minglm"
    try:
        if not (built := folder / f"inference-{name}.so").exists():
            _build(compiler, built)
        return _typed(ctypes.CDLL(str(built)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"{SOURCE.name} could not be built with {compiler}; inference goes on without it: {reason}", stacklevel=2)
        return None


def _typed(built: ctypes.CDLL) -> ctypes.CDLL:
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
    for name, arguments in ARGUMENTS.items():
        function = getattr(built, name)
        function.restype, function.argtypes = None, [kinds[letter] for letter in arguments.replace(" ", "")]
    return built


def _build(compiler: str, built: Path) -> None:
    """Beside its place first: two processes may build at the same time."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder, built.name)
        command = [compiler, *FLAGS, "-o", str(fresh), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(fresh, built)
