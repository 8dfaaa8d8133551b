"""Shared by the layouts: put down, up, alpha and DoRA magnitude of one module together.

Tensors on the meta device stand for those of a file of which only the header was read: shapes without values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """A module's pair, the α that its file states, and the relative error where the pair is only near the file's ΔW.

    The error is NaN where it takes values to know it and there are none.
    """

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


def with_magnitude(module: str, parts: Parts, built: Built) -> Built:
    """The pair with its DoRA magnitude, where the parts hold one.

    PEFT's ``lora_magnitude_vector`` has one number per output: (d_out,), or (1, d_out, 1, 1) for a convolution.
    LyCORIS and OneTrainer write ``dora_scale``: (d_out, 1, …) on the output axis, (1, d_in, …) on the input axis.

    Raises:
        InvalidFile: on the input axis, or no number per output.
    """
    outputs = built.pair.b.shape[0]
    for part in ("magnitude", "dora_scale"):
        tensor = parts.tensors.get(part)
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if part == "dora_scale" and len(shape) > 1 and shape[0] == 1 != outputs:
            raise InvalidFile(
                f"The DoRA of {module} has one magnitude per input ({shape}), not per output as the paper has it: each "
                "expert would need inputs of its own. Train it on the output axis (LyCORIS: wd_on_output=True, "
                "OneTrainer: apply on output axis)."
            )
        if outputs not in shape or tensor.numel() != outputs:
            raise InvalidFile(f"The DoRA magnitude of {module} has the shape {shape}, expected {outputs} numbers.")
        return built._replace(pair=replace(built.pair, magnitude=_single(module, tensor.reshape(outputs))))
    return built


def _single(module: str, tensor: Tensor) -> Tensor:
    """At most fp32; what overflows there is refused."""
    if tensor.dtype != torch.float64:
        return tensor
    single = tensor.float()
    if not single.is_meta and not single.isfinite().all():
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
