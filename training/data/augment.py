"""Views of one subject as training pictures with captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from training.base.corpus import THING_NAMES
from training.base.scenes import article, slots, snap

from .backgrounds import random_background
from .crop import crop_square
from .paste import Placement, fit, paste, to_tensor
from .pictures import has_mask
from .subjects import crop_to_mask

SCALES = (0.4, 0.85)
"""Longer side of a cut-out as a fraction of the picture."""

BARE = 0.1
"""Chance of a caption that does not name the background."""


WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Captioned:
    """A training picture (3, H, W) in 0…1, its caption, and the part of its width that the loss looks at."""

    picture: torch.Tensor
    caption: str
    counted: tuple[float, float] = WHOLE


def augment(
    view: Image.Image,
    phrase: str,
    size: int,
    rng: np.random.Generator,
    *,
    caption: str | None = None,
    flip: bool = False,
    on_slots: bool = False,
) -> Captioned:
    """One training picture of ``size`` pixels: a cut-out on a random background, or the square of a photo.

    ``caption``: of a photo; cut-outs are described by what they were put on. ``flip``: half of the pictures are
    mirrored, which turns writing and everything else that has a left and a right, so it must be asked for.
    ``on_slots``: the cut-out stands where things of the demo world stand, alone or as one of two. As one of two its
    caption names another thing beside it that is not drawn, and only the subject's half counts: an expert that saw
    the other half empty would learn to empty it, and two such experts erase each other (LOG.md).
    """
    mirrored = bool(flip and rng.random() < 0.5)
    if not has_mask(view):
        square = crop_square(view, size)
        words = f"a photo of {article(phrase)}" if caption is None else caption
        return Captioned(to_tensor(ImageOps.mirror(square) if mirrored else square), words)
    cutout = crop_to_mask(view)
    x, y, scale, words, counted = (
        _standing(phrase, rng) if on_slots else (*_anywhere(cutout, rng), article(phrase), WHOLE)
    )
    place = Placement(snap(x, size), snap(y, size), scale, mirrored, float(rng.uniform(0, 0.6)))
    layer = fit(cutout, size, place)
    background = random_background(size, rng)
    picture, _ = paste(background.picture, [layer])
    where = "" if rng.random() < BARE else f" {background.phrase}"
    return Captioned(to_tensor(picture), words + where, counted)


def _anywhere(cutout: Image.Image, rng: np.random.Generator) -> tuple[float, float, float]:
    """A random size, and a centre that keeps nearly all of the cut-out inside: (x, y, scale)."""
    scale = float(rng.uniform(*SCALES))
    free = [max(1 - scale * side / max(cutout.size), 0) / 2 + 0.03 for side in cutout.size]
    x, y = (0.5 + float(rng.uniform(-room, room)) for room in free)
    return x, y, scale


def _standing(phrase: str, rng: np.random.Generator) -> tuple[float, float, float, str, tuple[float, float]]:
    """A slot of the demo world: (x, y, scale), the caption's first words and what counts."""
    if rng.random() < 0.5:
        return (*slots(1)[0], article(phrase), WHOLE)
    index = int(rng.integers(2))
    pair = [article(phrase), article(THING_NAMES[int(rng.integers(len(THING_NAMES)))])]
    return (*slots(2)[index], " and ".join(pair if index == 0 else pair[::-1]), (index / 2, (index + 1) / 2))
