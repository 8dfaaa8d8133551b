"""Views of one subject as training pictures with captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from training.base.scenes import article, slots, snap

from .backgrounds import random_background
from .paste import Placement, fit, paste, to_tensor
from .pictures import has_mask
from .subjects import crop_to_mask

SCALES = (0.4, 0.85)
"""Longer side of a cut-out as a fraction of the picture."""

BARE = 0.1
"""Chance of a caption that does not name the background."""


@dataclass(frozen=True)
class Captioned:
    """A training picture (3, H, W) in 0…1 and its caption."""

    picture: torch.Tensor
    caption: str


def augment(
    view: Image.Image,
    phrase: str,
    size: int,
    rng: np.random.Generator,
    *,
    flip: bool = True,
    on_slots: bool = False,
) -> Captioned:
    """One training picture of ``size`` pixels: a cut-out on a random background, or a photo's centre.

    ``on_slots``: the cut-out stands where things of the demo world stand, alone or as one of two.
    """
    mirrored = bool(flip and rng.random() < 0.5)
    if not has_mask(view):
        square = ImageOps.fit(view.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return Captioned(to_tensor(ImageOps.mirror(square) if mirrored else square), f"a photo of {article(phrase)}")
    cutout = crop_to_mask(view)
    x, y, scale = _standing(rng) if on_slots else _anywhere(cutout, rng)
    place = Placement(snap(x, size), snap(y, size), scale, mirrored, float(rng.uniform(0, 0.6)))
    layer = fit(cutout, size, place)
    background = random_background(size, rng)
    picture, _ = paste(background.picture, [layer])
    where = "" if rng.random() < BARE else f" {background.phrase}"
    return Captioned(to_tensor(picture), article(phrase) + where)


def _anywhere(cutout: Image.Image, rng: np.random.Generator) -> tuple[float, float, float]:
    """A random size, and a centre that keeps nearly all of the cut-out inside: (x, y, scale)."""
    scale = float(rng.uniform(*SCALES))
    free = [max(1 - scale * side / max(cutout.size), 0) / 2 + 0.03 for side in cutout.size]
    x, y = (0.5 + float(rng.uniform(-room, room)) for room in free)
    return x, y, scale


def _standing(rng: np.random.Generator) -> tuple[float, float, float]:
    """A slot of the demo world: (x, y, scale)."""
    places = slots(1) if rng.random() < 0.5 else slots(2)
    return places[int(rng.integers(len(places)))]
