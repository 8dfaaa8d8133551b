"""An image-text model's own preprocessing on tensors: resize, crop or pad, normalise. No detour through PIL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.errors import InvalidFile

_MODES = {"squash", "shortest", "longest"}


@dataclass(frozen=True)
class Preprocess:
    """How pictures are fed to an image tower; the fields are those of open_clip's ``preprocess_cfg``.

    Attributes:
        size: (height, width) of the tower's input in pixels.
        mean, std: normalisation per channel, on values in 0…1.
        interpolation: ``bicubic`` or ``bilinear``.
        resize_mode: ``squash`` to the size, ``shortest`` side to the size and centre crop, or ``longest`` and pad.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill: float = 0.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From open_clip's ``preprocess_cfg``. Raises InvalidFile for a mode that open_clip does not know either."""
        size, mode = config["size"], config.get("resize_mode") or "shortest"
        if mode not in _MODES:
            raise InvalidFile(f"Expected a resize_mode out of {', '.join(sorted(_MODES))}, got {mode!r}.")
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
        fill = float(config.get("fill_color") or 0) / 255
        return cls((height, width), tuple(config["mean"]), tuple(config["std"]), interpolation, mode, fill)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Tower inputs (B, 3, h, w) from pictures (B, 3, H, W) in 0…1."""
        fitted = self._fit(pictures.float())
        mean, std = (torch.tensor(values, device=fitted.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (fitted - mean) / std

    def _fit(self, pictures: Tensor) -> Tensor:
        if self.resize_mode == "squash":
            return self._resize(pictures, self.size)
        ratios = [target / side for target, side in zip(self.size, pictures.shape[-2:], strict=True)]
        ratio = max(ratios) if self.resize_mode == "shortest" else min(ratios)
        height, width = (round(side * ratio) for side in pictures.shape[-2:])
        return self._centre(self._resize(pictures, (height, width)))

    def _resize(self, pictures: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(pictures.shape[-2:]) == size:
            return pictures
        return F.interpolate(pictures, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)

    def _centre(self, pictures: Tensor) -> Tensor:
        """Centre crop where the picture is larger than the input, padding where it is smaller."""
        pads = []
        for target, side in reversed(list(zip(self.size, pictures.shape[-2:], strict=True))):
            before = (target - side) // 2 if target > side else -round((side - target) / 2)
            pads += [before, target - side - before]
        return F.pad(pictures, pads, value=self.fill)
