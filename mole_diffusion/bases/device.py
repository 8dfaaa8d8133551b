"""Which device and precision to run on, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mole_diffusion.errors import InvalidRequest

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Device, precision, and the reason in words that can be shown."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_placement(device: str | None = None, precision: str | None = None) -> Placement:
    """Where a base should run: CUDA, then Apple's GPU, then the CPU; a device or precision asked for is honoured.

    Raises:
        InvalidRequest: the device is not there, or the precision has no such name.
    """
    name = device or _best_device()
    chosen = _present(name)
    dtype, reason = _default_precision(chosen)
    if precision is not None:
        dtype, reason = _named_precision(precision), "asked for"
    return Placement(chosen, dtype, f"{chosen} in {str(dtype).removeprefix('torch.')}: {reason}")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _present(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"Expected a device such as cpu, cuda or mps, got {name!r}.") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise InvalidRequest(f"The device {name!r} was asked for, but this machine has none: use cpu.")
    return device


def _default_precision(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes bfloat16 natively, with the range of float32"
        return torch.float16, "the GPU has no native bfloat16"
    if device.type == "mps":
        return torch.float16, "Apple's GPU is fastest in float16"
    return torch.float32, "exact, and fast enough everywhere; bfloat16 pays on few CPUs"


def _named_precision(precision: str) -> torch.dtype:
    if precision not in _PRECISIONS:
        raise InvalidRequest(f"Expected a precision out of {', '.join(_PRECISIONS)}, got {precision!r}.")
    return _PRECISIONS[precision]
