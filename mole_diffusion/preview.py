"""What an unfinished picture looks like: the decoder where it is cheap, a fitted linear map where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from mole_diffusion.bases.base import Base

_CHEAP_PLACES = 32 * 32


class Previewer:
    """Previews of one run.

    Colour is nearly linear in the latents of such autoencoders, so for large pictures the map latent → RGB is fitted by
    least squares whenever a real decode happens, and used in between: no table per base, and it costs nothing.
    """

    def __init__(self, base: Base, pipe: Any) -> None:
        self._base = base
        self._pipe = pipe
        self._map: Tensor | None = None

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0…1 on the CPU from latents (B, C, h, w); exact."""
        pictures = torch.cat([self._base.decode(self._pipe, row[None]) for row in x0]).cpu()
        if x0.shape[-2] * x0.shape[-1] > _CHEAP_PLACES:
            self._map = fit_linear(x0.float().cpu(), pictures)
        return pictures

    def quick(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, …) in 0…1, exact where that is cheap, otherwise an approximation at lower resolution."""
        if self._map is None:
            return self.decode(x0)
        rough = apply_linear(self._map, x0.float().cpu())
        return F.interpolate(rough, scale_factor=4, mode="bilinear")


def fit_linear(latents: Tensor, pictures: Tensor) -> Tensor:
    """(C + 1, 3): the affine map from latents (B, C, h, w) to the mean colour of the pixels each place stands for."""
    colours = F.adaptive_avg_pool2d(pictures, (latents.shape[-2], latents.shape[-1])).permute(0, 2, 3, 1).reshape(-1, 3)
    return torch.linalg.lstsq(_design(latents), colours, driver="gelsd").solution


def apply_linear(affine: Tensor, latents: Tensor) -> Tensor:
    """Pictures (B, 3, h, w) in 0…1 from latents (B, C, h, w)."""
    batch, _, height, width = latents.shape
    return (_design(latents) @ affine).clamp(0, 1).view(batch, height, width, 3).permute(0, 3, 1, 2)


def _design(latents: Tensor) -> Tensor:
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)


def to_image(picture: Tensor) -> Image:
    """A PIL picture from (3, H, W) in 0…1."""
    from PIL import Image as pil

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return pil.fromarray(pixels)
