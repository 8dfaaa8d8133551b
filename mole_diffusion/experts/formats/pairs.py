"""Shared by the layouts: put down, up and alpha of one module together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.canonical import LowRank


@dataclass
class Parts:
    """Tensors of one module by their part (down, up, alpha), and the key that each came under."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def add(self, part: str, key: str, tensor: Tensor) -> None:
        """Note one tensor; two keys that mean the same part are refused."""
        if part in self.keys:
            raise InvalidFile(f"{self.keys[part]!r} and {key!r} are the same weight twice: refused as ambiguous.")
        self.tensors[part] = tensor
        self.keys[part] = key


class Built(NamedTuple):
    """A module's pair, the α that its file states, and the relative error where the pair is only near the file's ΔW."""

    pair: LowRank
    alpha: float | None
    error: float = 0.0


def build_pair(module: str, parts: Parts, default_scale: float | None = None) -> Built | None:
    """One module's pair and its α; None where down or up is missing.

    scale = α / r; α absent or 0 means α = r, or ``default_scale`` where the file's metadata gives one.
    """
    down, up = parts.tensors.get("down"), parts.tensors.get("up")
    if down is None or up is None:
        return None
    if up.ndim == 4:
        if tuple(up.shape[2:]) != (1, 1):
            raise InvalidFile(f"The up weight of {module} has the shape {tuple(up.shape)}, expected a 1×1 convolution.")
        up = up.flatten(1)
    down, up = (_single(module, tensor) for tensor in (down, up))
    alpha = read_alpha(module, parts.tensors.get("alpha"))
    if alpha:
        scale = alpha / down.shape[0] if down.shape[0] else 1.0
    else:
        scale = 1.0 if default_scale is None else default_scale
    return Built(LowRank(down, up, scale), alpha or None)


def _single(module: str, tensor: Tensor) -> Tensor:
    """At most fp32; what overflows there is refused."""
    if tensor.dtype != torch.float64:
        return tensor
    single = tensor.float()
    if not single.isfinite().all():
        raise InvalidFile(f"The weights of {module} are too large for float32: the file is damaged.")
    return single


def unmatched_keys(all_keys: Mapping[str, object], placed: set[str]) -> tuple[str, ...]:
    """Keys that no module took, by name."""
    return tuple(sorted(key for key in all_keys if key not in placed))


def read_alpha(module: str, alpha: Tensor | None) -> float:
    """α of a module; 0 where its file states none."""
    if alpha is None:
        return 0.0
    if alpha.numel() != 1:
        raise InvalidFile(f"The alpha of {module} must be one number, got the shape {tuple(alpha.shape)}.")
    return float(alpha.reshape(()))
