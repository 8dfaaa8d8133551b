"""Mixed precision where it pays: bf16 on GPUs and on CPUs with matrix units."""

from __future__ import annotations

import torch


def autocast(device: str) -> torch.autocast:
    """bf16 autocast on ``device``; weights and losses stay fp32."""
    return torch.autocast(device.split(":")[0], torch.bfloat16)
