"""Backgrounds for augmented views and collages: those of the demo world, which are plain enough for any base."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.base.scenes import COLOURS, PLACES, background_phrase, paint_background

PLACE_CHANCE = 0.3


@dataclass(frozen=True)
class Background:
    """A square picture, and how a caption names it, for instance "on a red background"."""

    picture: Image.Image
    phrase: str


def random_background(size: int, rng: np.random.Generator, *, places: float = PLACE_CHANCE) -> Background:
    """A background of ``size`` pixels: a place with chance ``places``, else a plain colour or a gradient of it."""
    name = str(rng.choice(list(PLACES if rng.random() < places else COLOURS)))
    return background(name, size, rng)


def background(name: str, size: int, rng: np.random.Generator) -> Background:
    """The background called ``name``: one of the demo world's colours or places, drawn anew."""
    pixels = np.clip(paint_background(name, size, rng) + 0.5, 0, 255).astype(np.uint8)
    return Background(Image.fromarray(pixels), background_phrase(name))
