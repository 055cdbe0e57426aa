"""Where a run computes, and in which precision, chosen by what the machine has."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from minglm.config import ConfigError
from minglm.train.recipe import Hardware


@dataclass(frozen=True)
class Device:
    """A device with a precision, and `why` they were chosen, for people."""

    torch_device: torch.device
    bf16: bool
    why: str

    def autocast(self) -> AbstractContextManager:
        """Matrix products in bf16 where that was chosen; weights and all else stay fp32."""
        # autocast's cache would keep a bf16 copy of every weight until the forward pass ends, for weights that are used once.
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def __str__(self) -> str:
        return f"{self.torch_device}, {'bf16 autocast, fp32 master weights' if self.bf16 else 'fp32'} ({self.why})"


def choose_device(hardware: Hardware) -> Device:
    """The device and precision that a recipe asks for. Raises `ConfigError` if this machine lacks them."""
    device, why = _find_device(hardware.device)
    if device.type == "cpu":
        # Many CPUs emulate bf16 hundreds of times slower than fp32.
        if hardware.precision == "bf16":
            raise ConfigError("hardware.precision = 'bf16': wanted 'fp32' or 'auto' on a CPU, which computes in fp32 always")
        return Device(device, False, f"{why}; a CPU computes in fp32")
    if hardware.precision != "auto":
        return Device(device, hardware.precision == "bf16", f"{why}; {hardware.precision} as the recipe says")
    if device.type != "cuda":
        return Device(device, False, f"{why}; bf16 there only if the recipe says so")
    bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    name = torch.cuda.get_device_name(device)
    return Device(device, bf16, f"{why}; the {name} {'has' if bf16 else 'lacks'} bf16 matrix products")


def _find_device(wanted: str) -> tuple[torch.device, str]:
    """The device, and why this one."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        kind = next(kind for kind, is_present in present.items() if is_present)
        return torch.device(kind), "no CUDA or Apple GPU found" if kind == "cpu" else "the first GPU found"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in present:
        raise ConfigError(f"hardware.device = {wanted!r}: wanted 'auto', 'cuda', 'cuda:<number>', 'mps' or 'cpu'")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not present[device.type] or (device.index or 0) >= count:
        available = ", ".join(kind for kind, is_present in present.items() if is_present)
        raise ConfigError(f"hardware.device = {wanted!r} is not on this machine, which has {available}; 'auto' takes the best")
    return device, "as the recipe says"
