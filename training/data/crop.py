"""The square of a photo that keeps its subject, where there is no mask to tell: by the border's saliency."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.data.masks import border_saliency, plausible, threshold

LOOK = 192
"""Longer side in pixels of the copy that is looked at."""


def salient_box(picture: Image.Image) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) in pixels of what differs from the border's colours; None where nothing clear does."""
    small = picture.convert("RGB")
    small.thumbnail((LOOK, LOOK))
    mask = threshold(border_saliency(small), floor=0.06)
    if not plausible(mask):
        return None
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    across, down = picture.width / small.width, picture.height / small.height
    return columns[0] * across, rows[0] * down, (columns[-1] + 1) * across, (rows[-1] + 1) * down


def square_box(size: tuple[int, int], salient: tuple[float, float, float, float] | None) -> tuple[int, int, int, int]:
    """The largest square inside a picture (W, H) whose middle is as near to the salient part's as it can be."""
    side = min(size)
    left, top, right, bottom = salient or (0.0, 0.0, float(size[0]), float(size[1]))
    x = round(min(max((left + right - side) / 2, 0), size[0] - side))
    y = round(min(max((top + bottom - side) / 2, 0), size[1] - side))
    return x, y, x + side, y + side


def crop_square(picture: Image.Image, size: int) -> Image.Image:
    """A photo as a square of ``size`` pixels that keeps its subject, RGB; the middle where no subject stands out."""
    salient = None if picture.width == picture.height else salient_box(picture)
    box = square_box(picture.size, salient)
    return picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=box)
