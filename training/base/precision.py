"""Mixed precision where it pays: bf16 on GPUs and on CPUs that compute in it."""

from __future__ import annotations

from functools import cache

import torch

_UNITS = ("amx_bf16", "avx512_bf16")


@cache
def bf16_pays(device: str) -> bool:
    """Whether ``device`` computes in bf16; a CPU that cannot takes 50 to 90 times as long as in fp32 (LOG.md)."""
    if device != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
    return any(capabilities.get(unit, False) for unit in _UNITS)


def autocast(device: str) -> torch.autocast:
    """bf16 autocast on ``device`` where it pays; weights and losses stay fp32."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16_pays(device))
