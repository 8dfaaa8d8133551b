"""Optimisers and learning-rate schedules. A schedule is a function of the step's number, so that resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch

from training.config import check

OptimiserName = Literal["adamw", "adamw8bit"]
ScheduleName = Literal["constant", "cosine"]
WEIGHT_DECAY = 1e-2


def make_optimiser(name: OptimiserName, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, each with its "lr"; ``adamw8bit`` keeps its moments in 8 bits (2110.02861).

    Raises:
        InvalidRequest: 8 bits without bitsandbytes, or on a device that it does not know.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    check(
        find_spec("bitsandbytes") is not None,
        "The optimiser adamw8bit needs the package bitsandbytes: install it, or choose adamw.",
    )
    check(device.type in ("cuda", "cpu"), f"The optimiser adamw8bit runs on CUDA, not on {device.type}: choose adamw.")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, weight_decay=WEIGHT_DECAY)


def rate_factor(schedule: ScheduleName, index: int, total: int, warmup: int) -> float:
    """What the learning rate is multiplied with in step ``index`` (0-based) of ``total``.

    It rises evenly over the first ``warmup`` steps; then it stays 1, or falls along half a cosine towards 0.
    """
    if index < warmup:
        return (index + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (index - warmup) / max(total - warmup, 1)))


def set_rates(optimiser: torch.optim.Optimizer, rates: Sequence[float], factor: float) -> None:
    """Give each group its rate times ``factor``."""
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * factor
