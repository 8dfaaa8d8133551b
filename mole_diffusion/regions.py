"""Regions: where an expert belongs in the picture, drawn by the user."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidRequest

Region = Tensor | Sequence[float]
_SIDE = 256


def region_maps(regions: Sequence[Region | None], floor: float) -> Tensor:
    """(1, N, 256, 256) fp32 in ``floor`` … 1, to be area-pooled to each layer's grid.

    Args:
        regions: per expert a box (left, top, right, bottom) in 0…1, a mask (H, W) in 0…1, or None for everywhere.
        floor: the least value.

    Raises:
        InvalidRequest: neither, or values outside 0…1.
    """
    return torch.stack([_map(region) for region in regions]).clamp_min(floor).unsqueeze(0)


def check_grid(cells: tuple[int, int], latent: tuple[int, int]) -> None:
    """Do these tokens lie as the latents do, halved some number of times?

    Raises:
        InvalidRequest: they do not, so that nobody knows where a region is among them.
    """
    size = latent
    while size != cells and max(size) > 1:
        size = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    if size != cells:
        raise InvalidRequest(
            f"Regions need image tokens that lie as the latents do, and {cells[0] * cells[1]} tokens of latents "
            f"{latent} do not: call place(None) for this model."
        )


def _map(region: Region | None) -> Tensor:
    if region is None:
        return torch.ones(_SIDE, _SIDE)
    if isinstance(region, Tensor):
        return _mask(region)
    return _box(region)


def _mask(mask: Tensor) -> Tensor:
    values = mask.detach().float().cpu()
    if values.ndim != 2 or not values.numel() or not bool(((values >= 0) & (values <= 1)).all()):
        raise InvalidRequest(f"A region's mask must be (H, W) with values from 0 to 1, got shape {tuple(mask.shape)}.")
    if max(values.shape) <= _SIDE:
        return torch.nn.functional.interpolate(values[None, None], size=(_SIDE, _SIDE), mode="nearest")[0, 0]
    return torch.nn.functional.adaptive_avg_pool2d(values[None, None], (_SIDE, _SIDE))[0, 0]


def _box(box: Sequence[float]) -> Tensor:
    """Cells that the box covers in part get the part."""
    try:
        left, top, right, bottom = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"A region is a box (left, top, right, bottom) or a mask, got {box!r}.") from error
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise InvalidRequest(
            f"A region's box must have 0 ≤ left < right ≤ 1 and 0 ≤ top < bottom ≤ 1, got {(left, top, right, bottom)}."
        )
    return _cover(top, bottom).unsqueeze(1) * _cover(left, right).unsqueeze(0)


def _cover(low: float, high: float) -> Tensor:
    """(256,) share of every cell that lies between ``low`` and ``high``."""
    edges = torch.arange(_SIDE + 1) / _SIDE
    return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)) * _SIDE).clamp(0.0, 1.0)
