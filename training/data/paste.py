"""Pasting cut-outs on backgrounds with blended edges, and pictures as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps


@dataclass(frozen=True)
class Placement:
    """Where a cut-out goes: its centre and its longer side as fractions of the canvas, mirrored or not."""

    x: float
    y: float
    scale: float
    mirrored: bool = False
    blur: float = 0.0
    """Radius of the mask's soft edge in pixels."""


def fit(cutout: Image.Image, size: int, placement: Placement) -> Image.Image:
    """The cut-out alone on a transparent canvas of ``size`` pixels."""
    source = ImageOps.mirror(cutout) if placement.mirrored else cutout
    factor = placement.scale * size / max(source.size)
    width, height = (max(1, round(side * factor)) for side in source.size)
    small = source.resize((width, height), Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(small, (round(placement.x * size - width / 2), round(placement.y * size - height / 2)))
    if placement.blur > 0:
        alpha = canvas.getchannel("A")
        soft = alpha.filter(ImageFilter.GaussianBlur(placement.blur))
        canvas.putalpha(ImageChops.darker(alpha, soft))  # inwards only: outside there is no colour to show
    return canvas


def paste(background: Image.Image, layers: list[Image.Image]) -> tuple[Image.Image, np.ndarray]:
    """Paint ``layers`` (RGBA, bottom first) and give the picture and what stays visible of each.

    The visible parts have shape (layers, H, W), values 0…1; where layers overlap the upper one wins.
    """
    picture = background.convert("RGB")
    visible = np.zeros((len(layers), picture.height, picture.width), np.float32)
    for index, layer in enumerate(layers):
        alpha = np.asarray(layer.getchannel("A"), np.float32) / 255
        visible[:index] *= 1 - alpha
        visible[index] = alpha
        picture.paste(layer.convert("RGB"), (0, 0), layer.getchannel("A"))
    return picture, visible


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture → (3, H, W) in 0…1."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"), np.float32))
    return pixels.permute(2, 0, 1) / 255
