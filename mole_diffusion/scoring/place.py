"""Where in a picture a subject is: square windows of several sizes over the picture, each compared with its views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring.identity import IdentityScorer
from mole_diffusion.scoring.views import Gallery, border_colours

SCALES = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Sides of the windows as fractions of the picture's shorter side."""
_CHUNK = 512


def windows(height: int, width: int, *, scales: Sequence[float] = SCALES, stride: float = 0.125) -> Tensor:
    """Boxes (W, 4) of x0, y0, x1, y1 in pixels: squares of every scale on a regular grid that reaches all edges.

    Args:
        height, width: the picture's, in pixels.
        scales: sides of the squares as fractions of the shorter side, each in (0, 1].
        stride: largest step of the grid, as a fraction of the shorter side.
    """
    if not scales or not all(0 < scale <= 1 for scale in scales) or stride <= 0:
        raise InvalidRequest("Expected window scales in (0, 1] and a positive stride.")
    shorter = min(height, width)
    boxes = [_grid(height, width, scale * shorter, stride * shorter) for scale in scales]
    return torch.cat(boxes)


def _grid(height: int, width: int, side: float, step: float) -> Tensor:
    xs, ys = (torch.linspace(0, length - side, int((length - side) / step + 0.999) + 1) for length in (width, height))
    corners = torch.cartesian_prod(ys, xs).flip(1)
    return torch.cat([corners, corners + side], dim=1)


def crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Every box (W, 4) of every picture (B, 3, H, W), resampled to (B·W, 3, size, size), picture by picture."""
    from torchvision.ops import roi_align

    everywhere = [boxes.to(images.device, torch.float32)] * len(images)
    return roi_align(images.float(), everywhere, (size, size), aligned=True)


def embed_places(images: Tensor, boxes: Tensor, scorer: IdentityScorer, *, chunk: int = _CHUNK) -> Tensor:
    """Unit vectors (B, W, D) of every window of every picture (B, 3, H, W) in 0…1.

    Crops of several pictures go through the scorer together, about ``chunk`` at a time.
    """
    together = max(1, chunk // len(boxes))
    parts = []
    for start in range(0, len(images), together):
        cut = crops(images[start : start + together], boxes, scorer.size)
        vectors = torch.cat([scorer.embed(part) for part in cut.split(chunk)])
        parts.append(vectors.view(-1, len(boxes), vectors.shape[-1]))
    return torch.cat(parts)


def place_scores(images: Tensor, gallery: Gallery, scorer: IdentityScorer, boxes: Tensor) -> Tensor:
    """Likeness (B, W, C) of every window of every picture to every candidate of the gallery."""
    return gallery.similarity(embed_places(images, boxes, scorer), border_colours(images).cpu())


def subject_score(image: Tensor, views: Sequence[Tensor], scorer: IdentityScorer) -> tuple[float, tuple[float, ...]]:
    """The best place of one subject in one picture.

    Args:
        image: (3, H, W) in 0…1.
        views: cut-outs (4, h, w) in 0…1.
        scorer: what likeness means.

    Returns:
        Its likeness to the views, and the place as x0, y0, x1, y1 in pixels.
    """
    boxes = windows(*image.shape[1:])
    scores = place_scores(image[None], Gallery.build({"subject": views}, scorer), scorer, boxes)[0, :, 0]
    best = int(scores.argmax())
    return float(scores[best]), tuple(float(value) for value in boxes[best])


def overlap(boxes: Tensor) -> Tensor:
    """Shared area of every two boxes (W, 4) as a fraction of the smaller one: (W, W).

    At most 0.5 here means an intersection over union below 0.5, and also that no box lies inside the other.
    """
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return shared / torch.minimum(areas[:, None], areas[None, :])
